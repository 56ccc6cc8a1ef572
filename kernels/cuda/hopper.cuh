// What kernels for Hopper (sm_90a) need beyond ptx.cuh: mbarriers, bulk copies (TMA), products of warpgroups (wgmma),
// named barriers, register counts. As there, each function has two bodies: PTX, and a call into the simulator.
#pragma once

#include "csrc/tensor_map.h"
#include "kernels/cuda/ptx.cuh"

namespace gptcore {

// How wgmma finds a matrix of 16-bit elements in shared memory, 64 bits ("Matrix descriptor" of the PTX ISA).
//
//                      rows of K (Q, K)                           rows of M or N (V), transposed
//     leading bytes    unused; not swizzled: 8 of K further       to the next repeat along M or N; not swizzled: K
//     stride bytes     8 rows further                             8 rows of K further; not swizzled: 8 of M or N
//
// The start of K + 16 lies 32 bytes further, and transposed 16 rows. The hardware permutes address bits, so a swizzled
// tile must begin at a multiple of 1024 bytes.
struct MatrixDescriptor { uint64_t bits; };

#ifndef GPTCORE_SIMT

enum class Swizzle { none, bytes128, bytes64, bytes32 };  // values of a descriptor, not of a tensor map

GPTCORE_DEVICE uint32_t shared_offset(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

// ---- mbarriers: `bar` is 8 bytes of shared memory, aligned ----------------------------------------------------------

GPTCORE_DEVICE void mbarrier_init(uint64_t* bar, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_offset(bar)), "r"(arrivals) : "memory");
}
GPTCORE_DEVICE void mbarrier_arrive(uint64_t* bar) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_offset(bar)) : "memory");
}
GPTCORE_DEVICE void mbarrier_arrive_expect(uint64_t* bar, int bytes) {  // of bulk copies, before the phase ends
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_offset(bar)), "r"(bytes)
               : "memory");
}
// Returns whether the phase of this parity has ended; may be false though it has. Parity 1 of a new mbarrier has.
GPTCORE_DEVICE bool mbarrier_try_wait(uint64_t* bar, int parity) {
  uint32_t done;
  asm volatile("{.reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p;}"
               : "=r"(done) : "r"(shared_offset(bar)), "r"(parity) : "memory");
  return done;
}
GPTCORE_DEVICE void fence_mbarrier_init() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
// This thread's writes to shared memory so far become visible to bulk copies and wgmma, which read after a barrier.
GPTCORE_DEVICE void fence_proxy_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// ---- warps ----------------------------------------------------------------------------------------------------------

GPTCORE_DEVICE bool elect() {  // true in one lane of the warp
  uint32_t elected;
  asm volatile("{.reg .pred p; elect.sync _|p, 0xffffffff; selp.u32 %0, 1, 0, p;}" : "=r"(elected));
  return elected;
}
// Named barriers 1 to 15 of `threads` threads, whole warps; 0 is that of barrier(). `arrive` does not wait.
GPTCORE_DEVICE void named_barrier_sync(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
GPTCORE_DEVICE void named_barrier_arrive(int id, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
template <int N>
GPTCORE_DEVICE void increase_registers() { asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(N)); }
template <int N>
GPTCORE_DEVICE void decrease_registers() { asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(N)); }

// ---- bulk copies of a box of a tensor, by one thread; coordinates of its begin, innermost first ---------------------

GPTCORE_DEVICE void bulk_load(void* to, const TensorMap* map, uint64_t* bar, int x, int y, int z, int w) {
  asm volatile("cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, "
               "%6}], [%2];" ::"r"(shared_offset(to)), "l"(map), "r"(shared_offset(bar)), "r"(x), "r"(y), "r"(z),
               "r"(w) : "memory");
}
GPTCORE_DEVICE void bulk_store(const TensorMap* map, const void* from, int x, int y, int z, int w) {
  asm volatile("cp.async.bulk.tensor.4d.global.shared::cta.bulk_group [%0, {%2, %3, %4, %5}], [%1];" ::"l"(map),
               "r"(shared_offset(from)), "r"(x), "r"(y), "r"(z), "r"(w) : "memory");
}
GPTCORE_DEVICE void bulk_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
template <int N>  // all but the last N groups of this thread have read shared memory
GPTCORE_DEVICE void bulk_wait_read() { asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(N) : "memory"); }
template <int N>  // and written global memory
GPTCORE_DEVICE void bulk_wait() { asm volatile("cp.async.bulk.wait_group %0;" ::"n"(N) : "memory"); }

// ---- products of a warpgroup ----------------------------------------------------------------------------------------

// The compiler moves no access of `registers` across this, and gives them to nothing else before.
template <int N>
GPTCORE_DEVICE void keep(float* registers) {
#pragma unroll
  for (int i = 0; i < N; ++i) asm volatile("" : "+f"(registers[i])::"memory");
}
template <int N>
GPTCORE_DEVICE void keep(uint32_t* registers) {
#pragma unroll
  for (int i = 0; i < N; ++i) asm volatile("" : "+r"(registers[i])::"memory");
}
GPTCORE_DEVICE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
GPTCORE_DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int N>
GPTCORE_DEVICE void wgmma_wait() { asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory"); }

#define GPTCORE_D16(i) \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), \
      "+f"(d[i + 7]), "+f"(d[i + 8]), "+f"(d[i + 9]), "+f"(d[i + 10]), "+f"(d[i + 11]), "+f"(d[i + 12]), \
      "+f"(d[i + 13]), "+f"(d[i + 14]), "+f"(d[i + 15])

// In turn n, the type, the names of the accumulators, the numbers of the operands after them, and the accumulators.
#define GPTCORE_WGMMA(n, type) "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32." type "." type " {"
#define GPTCORE_WGMMA_SS(n, type, names, i, j, k, l, m, ...) \
  asm volatile("{.reg .pred p; setp.ne.b32 p, %" #k ", 0; " GPTCORE_WGMMA(n, type) names "}, %" #i ", %" #j \
               ", p, 1, 1, %" #l ", %" #m ";}" : __VA_ARGS__ \
               : "l"(a.bits), "l"(b.bits), "r"(int(accumulate)), "n"(int(kTransposeA)), "n"(int(kTransposeB)))
#define GPTCORE_WGMMA_RS(n, type, names, i, j, k, l, m, o, q, ...) \
  asm volatile("{.reg .pred p; setp.ne.b32 p, %" #o ", 0; " GPTCORE_WGMMA(n, type) names "}, {%" #i ", %" #j \
               ", %" #k ", %" #l "}, %" #m ", p, 1, 1, %" #q ";}" : __VA_ARGS__ \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b.bits), "r"(int(accumulate)), \
                 "n"(int(kTransposeB)))
#define GPTCORE_NAMES16 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define GPTCORE_SUMS16 GPTCORE_D16(0)
#define GPTCORE_NAMES32 GPTCORE_NAMES16 ", " \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define GPTCORE_SUMS32 GPTCORE_SUMS16, GPTCORE_D16(16)
#define GPTCORE_NAMES48 GPTCORE_NAMES32 ", " \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47"
#define GPTCORE_SUMS48 GPTCORE_SUMS32, GPTCORE_D16(32)
#define GPTCORE_NAMES64 GPTCORE_NAMES48 ", " \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define GPTCORE_SUMS64 GPTCORE_SUMS48, GPTCORE_D16(48)
#define GPTCORE_SS32(type) \
  GPTCORE_WGMMA_SS(32, type, GPTCORE_NAMES16, 16, 17, 18, 19, 20, GPTCORE_SUMS16)
#define GPTCORE_RS32(type) \
  GPTCORE_WGMMA_RS(32, type, GPTCORE_NAMES16, 16, 17, 18, 19, 20, 21, 22, GPTCORE_SUMS16)
#define GPTCORE_SS64(type) \
  GPTCORE_WGMMA_SS(64, type, GPTCORE_NAMES32, 32, 33, 34, 35, 36, GPTCORE_SUMS32)
#define GPTCORE_RS64(type) \
  GPTCORE_WGMMA_RS(64, type, GPTCORE_NAMES32, 32, 33, 34, 35, 36, 37, 38, GPTCORE_SUMS32)
#define GPTCORE_SS96(type) \
  GPTCORE_WGMMA_SS(96, type, GPTCORE_NAMES48, 48, 49, 50, 51, 52, GPTCORE_SUMS48)
#define GPTCORE_RS96(type) \
  GPTCORE_WGMMA_RS(96, type, GPTCORE_NAMES48, 48, 49, 50, 51, 52, 53, 54, GPTCORE_SUMS48)
#define GPTCORE_SS128(type) \
  GPTCORE_WGMMA_SS(128, type, GPTCORE_NAMES64, 64, 65, 66, 67, 68, GPTCORE_SUMS64)
#define GPTCORE_RS128(type) \
  GPTCORE_WGMMA_RS(128, type, GPTCORE_NAMES64, 64, 65, 66, 67, 68, 69, 70, GPTCORE_SUMS64)

template <class T> constexpr bool kIsBfloat16 = false;
template <> constexpr bool kIsBfloat16<bfloat16> = true;
template <int kN> constexpr bool kHasWgmma = kN == 32 || kN == 64 || kN == 96 || kN == 128;

// d (64, kN) = a (64, 16) b (16, kN), plus d if `accumulate`; d has kN / 2 floats of each thread, laid out as those of
// mma_16816 for rows 16 warp to 16 warp + 15. d and a's registers may not be touched until wgmma_wait.
template <class T, int kN, bool kTransposeA = false, bool kTransposeB = false>
GPTCORE_DEVICE void wgmma(float* d, MatrixDescriptor a, MatrixDescriptor b, bool accumulate) {
  static_assert(kHasWgmma<kN>, "add it above");
  if constexpr (kN == 32 && kIsBfloat16<T>) GPTCORE_SS32("bf16");
  if constexpr (kN == 32 && !kIsBfloat16<T>) GPTCORE_SS32("f16");
  if constexpr (kN == 64 && kIsBfloat16<T>) GPTCORE_SS64("bf16");
  if constexpr (kN == 64 && !kIsBfloat16<T>) GPTCORE_SS64("f16");
  if constexpr (kN == 96 && kIsBfloat16<T>) GPTCORE_SS96("bf16");
  if constexpr (kN == 96 && !kIsBfloat16<T>) GPTCORE_SS96("f16");
  if constexpr (kN == 128 && kIsBfloat16<T>) GPTCORE_SS128("bf16");
  if constexpr (kN == 128 && !kIsBfloat16<T>) GPTCORE_SS128("f16");
}
template <class T, int kN, bool kTransposeB = false>
GPTCORE_DEVICE void wgmma(float* d, const uint32_t* a, MatrixDescriptor b, bool accumulate) {
  static_assert(kHasWgmma<kN>, "add it above");
  if constexpr (kN == 32 && kIsBfloat16<T>) GPTCORE_RS32("bf16");
  if constexpr (kN == 32 && !kIsBfloat16<T>) GPTCORE_RS32("f16");
  if constexpr (kN == 64 && kIsBfloat16<T>) GPTCORE_RS64("bf16");
  if constexpr (kN == 64 && !kIsBfloat16<T>) GPTCORE_RS64("f16");
  if constexpr (kN == 96 && kIsBfloat16<T>) GPTCORE_RS96("bf16");
  if constexpr (kN == 96 && !kIsBfloat16<T>) GPTCORE_RS96("f16");
  if constexpr (kN == 128 && kIsBfloat16<T>) GPTCORE_RS128("bf16");
  if constexpr (kN == 128 && !kIsBfloat16<T>) GPTCORE_RS128("f16");
}

#else

#define __grid_constant__

using simt::Swizzle;

GPTCORE_DEVICE uint32_t shared_offset(const void* p) {
  return static_cast<uint32_t>(static_cast<const char*>(p) - simt::shared_memory());
}
GPTCORE_DEVICE void mbarrier_init(uint64_t* bar, int arrivals) { simt::mbarrier_init(bar, arrivals); }
GPTCORE_DEVICE void mbarrier_arrive(uint64_t* bar) { simt::mbarrier_arrive(bar, 0); }
GPTCORE_DEVICE void mbarrier_arrive_expect(uint64_t* bar, int bytes) { simt::mbarrier_arrive(bar, bytes); }
GPTCORE_DEVICE bool mbarrier_try_wait(uint64_t* bar, int parity) { return simt::mbarrier_try_wait(bar, parity); }
GPTCORE_DEVICE void fence_mbarrier_init() { simt::proxy_fence(true); }
GPTCORE_DEVICE void fence_proxy_async() { simt::proxy_fence(false); }
GPTCORE_DEVICE bool elect(GPTCORE_SITE) { return simt::elect(site); }
GPTCORE_DEVICE void named_barrier_sync(int id, int threads, GPTCORE_SITE) {
  simt::named_barrier(id, threads, true, site);
}
GPTCORE_DEVICE void named_barrier_arrive(int id, int threads, GPTCORE_SITE) {
  simt::named_barrier(id, threads, false, site);
}
template <int N>
GPTCORE_DEVICE void increase_registers(GPTCORE_SITE) { simt::set_max_registers(N, true, site); }
template <int N>
GPTCORE_DEVICE void decrease_registers(GPTCORE_SITE) { simt::set_max_registers(N, false, site); }
GPTCORE_DEVICE void bulk_load(void* to, const TensorMap* map, uint64_t* bar, int x, int y, int z, int w) {
  simt::bulk_load(to, map, bar, x, y, z, w);
}
GPTCORE_DEVICE void bulk_store(const TensorMap* map, const void* from, int x, int y, int z, int w) {
  simt::bulk_store(map, from, x, y, z, w);
}
GPTCORE_DEVICE void bulk_commit() { simt::bulk_commit(); }
template <int N>
GPTCORE_DEVICE void bulk_wait_read() { simt::bulk_wait(N, true); }
template <int N>
GPTCORE_DEVICE void bulk_wait() { simt::bulk_wait(N, false); }
template <int N>
GPTCORE_DEVICE void keep(float*) {}
template <int N>
GPTCORE_DEVICE void keep(uint32_t*) {}
GPTCORE_DEVICE void wgmma_fence(GPTCORE_SITE) { simt::wgmma_fence(site); }
GPTCORE_DEVICE void wgmma_commit(GPTCORE_SITE) { simt::wgmma_commit(site); }
template <int N>
GPTCORE_DEVICE void wgmma_wait(GPTCORE_SITE) { simt::wgmma_wait(N, site); }
template <class T, int kN, bool kTransposeA = false, bool kTransposeB = false>
GPTCORE_DEVICE void wgmma(float* d, MatrixDescriptor a, MatrixDescriptor b, bool accumulate, GPTCORE_SITE) {
  static_assert(kN % 8 == 0 && kN >= 8 && kN <= 256, "n of wgmma");
  simt::wgmma(simt::kind_of(static_cast<T*>(nullptr)), kN, d, nullptr, a.bits, b.bits, kTransposeA, kTransposeB,
              accumulate, site);
}
template <class T, int kN, bool kTransposeB = false>
GPTCORE_DEVICE void wgmma(float* d, const uint32_t* a, MatrixDescriptor b, bool accumulate, GPTCORE_SITE) {
  static_assert(kN % 8 == 0 && kN >= 8 && kN <= 256, "n of wgmma");
  simt::wgmma(simt::kind_of(static_cast<T*>(nullptr)), kN, d, a, 0, b.bits, false, kTransposeB, accumulate, site);
}

#endif

GPTCORE_DEVICE MatrixDescriptor matrix_descriptor(const void* start, int leading_bytes, int stride_bytes,
                                                  Swizzle swizzle) {
  return {uint64_t(shared_offset(start) >> 4 & 0x3fff) | uint64_t(leading_bytes >> 4 & 0x3fff) << 16 |
          uint64_t(stride_bytes >> 4 & 0x3fff) << 32 | uint64_t(swizzle) << 62};
}
GPTCORE_DEVICE void mbarrier_wait(uint64_t* bar, int parity) {
  while (!mbarrier_try_wait(bar, parity)) {}
}

}  // namespace gptcore
