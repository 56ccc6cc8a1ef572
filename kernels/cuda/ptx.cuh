// Everything in the kernels that is not plain C++: barriers, shuffles, asynchronous copies, tensor cores. Each function
// has two bodies: PTX for nvcc and, for g++, a call into the GPU simulator, csrc/simt. All 32 lanes must reach a
// warp-wide function. In the simulator these carry the location of their call, for reports.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

#ifdef GPTCORE_SIMT
#include "csrc/simt/device.h"
#define GPTCORE_DEVICE inline __attribute__((always_inline))
#define GPTCORE_SITE simt::Site site = simt::Site::here()
#else
#define GPTCORE_DEVICE __device__ __forceinline__
#endif

namespace gptcore {

struct bfloat16 { uint16_t bits; };
struct float16 { uint16_t bits; };
struct alignas(16) Vec16 { uint32_t w[4]; };  // the largest access of a thread

#ifndef GPTCORE_SIMT

GPTCORE_DEVICE uint32_t bits_of(float x) { return __float_as_uint(x); }
GPTCORE_DEVICE float float_of(uint32_t bits) { return __uint_as_float(bits); }

GPTCORE_DEVICE void barrier() { __syncthreads(); }
GPTCORE_DEVICE void warp_barrier() { __syncwarp(); }  // orders the memory accesses of its lanes too
GPTCORE_DEVICE float shuffle_xor(float v, int lane_mask) { return __shfl_xor_sync(~0u, v, lane_mask); }
GPTCORE_DEVICE uint32_t shuffle_xor(uint32_t v, int lane_mask) { return __shfl_xor_sync(~0u, v, lane_mask); }
GPTCORE_DEVICE float shuffle(float v, int lane) { return __shfl_sync(~0u, v, lane); }
GPTCORE_DEVICE uint32_t shuffle(uint32_t v, int lane) { return __shfl_sync(~0u, v, lane); }
GPTCORE_DEVICE bool any(bool x) { return __any_sync(~0u, x); }  // whether it is true in a lane of the warp

// The block's dynamic shared memory. There is no other: a kernel declares no __shared__ variables.
GPTCORE_DEVICE char* shared_memory() {
  extern __shared__ __align__(1024) char gptcore_shared[];
  return gptcore_shared;
}
// Addresses of shared memory have 32 bits, which take half the registers and instructions of pointers.
using SharedAddress = uint32_t;
GPTCORE_DEVICE SharedAddress shared_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }
GPTCORE_DEVICE char* shared_pointer(SharedAddress a) { return static_cast<char*>(__cvta_shared_to_generic(a)); }

// If not `valid`, writes zeros and does not read `global`.
template <int Bytes>
GPTCORE_DEVICE void copy_async(void* shared, const void* global, bool valid) {
  static_assert(Bytes == 4 || Bytes == 8 || Bytes == 16, "cp.async copies 4, 8 or 16 bytes");
  const int source_bytes = valid ? Bytes : 0;
  if constexpr (Bytes == 16)
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global),
                 "r"(source_bytes) : "memory");
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(shared_address(shared)), "l"(global),
                 "n"(Bytes), "r"(source_bytes) : "memory");
}
GPTCORE_DEVICE void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits for this thread's copies, except the last N committed groups. Those of other threads need a barrier afterwards.
template <int N>
GPTCORE_DEVICE void copy_wait() { asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory"); }

// Four 8x8 matrices of 16-bit elements. Lane l gives the address of row l % 8 of matrix l / 8, and gets of each matrix
// elements 2 (l % 4) and the next of row l / 4, or, transposed, of column l / 4.
GPTCORE_DEVICE void load_matrix(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(shared_address(row)) : "memory");
}
GPTCORE_DEVICE void load_matrix_trans(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(shared_address(row)) : "memory");
}

// d += a b with a (16, 16), b (16, 8), d (16, 8); tests/test_fragments.py has the layout of the lanes.
template <class T>
GPTCORE_DEVICE void mma_16816(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);
template <>
GPTCORE_DEVICE void mma_16816<bfloat16>(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
               "{%0, %1, %2, %3};" : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
template <>
GPTCORE_DEVICE void mma_16816<float16>(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
               "{%0, %1, %2, %3};" : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
// The same with a (16, 8), b (8, 8) of TF32: float32 without the last 13 bits, as to_tf32 rounds it.
GPTCORE_DEVICE void mma_1688_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
               "{%0, %1, %2, %3};" : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
GPTCORE_DEVICE uint32_t to_tf32(float x) {
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));
  return bits;
}

GPTCORE_DEVICE float exp2_approx(float x) {  // 2 ulp, exp2_approx(-inf) = 0
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
GPTCORE_DEVICE float rcp_approx(float x) {  // 1 ulp
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
GPTCORE_DEVICE float log_of(float x) { return logf(x); }
GPTCORE_DEVICE float rsqrt_of(float x) { return rsqrtf(x); }
GPTCORE_DEVICE float mul_rn(float a, float b) { return __fmul_rn(a, b); }  // never part of a fused multiply-add
GPTCORE_DEVICE uint32_t mul_high(uint32_t a, uint32_t b) { return __umulhi(a, b); }

GPTCORE_DEVICE float to_float(float x) { return x; }
GPTCORE_DEVICE float to_float(bfloat16 x) { return __uint_as_float(static_cast<uint32_t>(x.bits) << 16); }
GPTCORE_DEVICE float to_float(float16 x) {
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
  return y;
}
template <class T>
GPTCORE_DEVICE uint32_t pack(float lo, float hi);  // two 16-bit elements in one register, rounded to nearest even
template <>
GPTCORE_DEVICE uint32_t pack<bfloat16>(float lo, float hi) {
  uint32_t bits;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(hi), "f"(lo));  // the first source is the upper half
  return bits;
}
template <>
GPTCORE_DEVICE uint32_t pack<float16>(float lo, float hi) {
  uint32_t bits;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(hi), "f"(lo));
  return bits;
}

GPTCORE_DEVICE Vec16 load_vec(const void* from) { return *static_cast<const Vec16*>(from); }
GPTCORE_DEVICE void store_vec(void* to, Vec16 v) { *static_cast<Vec16*>(to) = v; }

#else

GPTCORE_DEVICE uint32_t bits_of(float x) { return __builtin_bit_cast(uint32_t, x); }
GPTCORE_DEVICE float float_of(uint32_t bits) { return __builtin_bit_cast(float, bits); }

GPTCORE_DEVICE void barrier(GPTCORE_SITE) { simt::barrier(site); }
GPTCORE_DEVICE void warp_barrier(GPTCORE_SITE) { simt::warp_barrier(site); }
GPTCORE_DEVICE uint32_t shuffle_xor(uint32_t v, int lane_mask, GPTCORE_SITE) {
  return simt::shuffle_xor(v, lane_mask, site);
}
GPTCORE_DEVICE float shuffle_xor(float v, int lane_mask, GPTCORE_SITE) {
  return float_of(simt::shuffle_xor(bits_of(v), lane_mask, site));
}
GPTCORE_DEVICE uint32_t shuffle(uint32_t v, int lane, GPTCORE_SITE) { return simt::shuffle(v, lane, site); }
GPTCORE_DEVICE float shuffle(float v, int lane, GPTCORE_SITE) {
  return float_of(simt::shuffle(bits_of(v), lane, site));
}
GPTCORE_DEVICE bool any(bool x, GPTCORE_SITE) {
  uint32_t found = x;
  for (int mask = 16; mask > 0; mask /= 2) found |= simt::shuffle_xor(found, mask, site);
  return found;
}

GPTCORE_DEVICE char* shared_memory() { return simt::shared_memory(); }
using SharedAddress = uintptr_t;
GPTCORE_DEVICE SharedAddress shared_address(const void* p) { return reinterpret_cast<uintptr_t>(p); }
GPTCORE_DEVICE char* shared_pointer(SharedAddress a) { return reinterpret_cast<char*>(a); }

template <int Bytes>
GPTCORE_DEVICE void copy_async(void* shared, const void* global, bool valid, GPTCORE_SITE) {
  static_assert(Bytes == 4 || Bytes == 8 || Bytes == 16, "cp.async copies 4, 8 or 16 bytes");
  simt::copy_async(shared, global, Bytes, valid, site);
}
GPTCORE_DEVICE void copy_commit() { simt::copy_commit(); }
template <int N>
GPTCORE_DEVICE void copy_wait() { simt::copy_wait(N); }

// Operands are passed by value, so that the caller's arrays stay in registers.
GPTCORE_DEVICE void load_matrix(uint32_t (&r)[4], const void* row, GPTCORE_SITE) {
  const Vec16 v = __builtin_bit_cast(Vec16, simt::load_matrix(row, false, site));
  r[0] = v.w[0], r[1] = v.w[1], r[2] = v.w[2], r[3] = v.w[3];
}
GPTCORE_DEVICE void load_matrix_trans(uint32_t (&r)[4], const void* row, GPTCORE_SITE) {
  const Vec16 v = __builtin_bit_cast(Vec16, simt::load_matrix(row, true, site));
  r[0] = v.w[0], r[1] = v.w[1], r[2] = v.w[2], r[3] = v.w[3];
}

GPTCORE_DEVICE void mma(simt::Mma kind, float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                        simt::Site site) {
  const simt::Float4 sum = simt::mma(kind, {{d[0], d[1], d[2], d[3]}}, a[0], a[1], a[2], a[3], b[0], b[1], site);
  d[0] = sum.x[0], d[1] = sum.x[1], d[2] = sum.x[2], d[3] = sum.x[3];
}
template <class T>
GPTCORE_DEVICE void mma_16816(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], GPTCORE_SITE) {
  static_assert(sizeof(T) == 2, "a 16-bit element type");
  mma(simt::kind_of(static_cast<T*>(nullptr)), d, a, b, site);
}
GPTCORE_DEVICE void mma_1688_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], GPTCORE_SITE) {
  mma(simt::Mma::tf32, d, a, b, site);
}
GPTCORE_DEVICE uint32_t to_tf32(float x) { return isnan(x) ? 0x7fffffffu : (bits_of(x) + 0x1000u) & ~0x1fffu; }

GPTCORE_DEVICE float exp2_approx(float x) {
  const float y = simt::special(exp2f(x));
  return y < 0x1p-126f ? 0.0f : y;  // NaN stays NaN
}
GPTCORE_DEVICE float rcp_approx(float x) { return simt::special(1 / x); }
GPTCORE_DEVICE float log_of(float x) { return simt::special(logf(x)); }
GPTCORE_DEVICE float rsqrt_of(float x) { return simt::special(1 / sqrtf(x)); }
GPTCORE_DEVICE float mul_rn(float a, float b) {
  float product = a * b;
  asm("" : "+m"(product));  // the compiler may be told to fuse
  return product;
}
GPTCORE_DEVICE uint32_t mul_high(uint32_t a, uint32_t b) { return static_cast<uint64_t>(a) * b >> 32; }

GPTCORE_DEVICE float to_float(float x) { return x; }
GPTCORE_DEVICE float to_float(bfloat16 x) { return simt::bfloat16_value(x.bits); }
GPTCORE_DEVICE float to_float(float16 x) { return simt::float16_value(x.bits); }
template <class T>
GPTCORE_DEVICE uint32_t pack(float lo, float hi);
template <>
GPTCORE_DEVICE uint32_t pack<bfloat16>(float lo, float hi) {
  return simt::bfloat16_bits(lo) | static_cast<uint32_t>(simt::bfloat16_bits(hi)) << 16;
}
template <>
GPTCORE_DEVICE uint32_t pack<float16>(float lo, float hi) {
  return simt::float16_bits(lo) | static_cast<uint32_t>(simt::float16_bits(hi)) << 16;
}

GPTCORE_DEVICE Vec16 load_vec(const void* from) { return __builtin_bit_cast(Vec16, simt::load_vec(from)); }
GPTCORE_DEVICE void store_vec(void* to, Vec16 v) { simt::store_vec(to, __builtin_bit_cast(simt::Words4, v)); }

#endif

template <class T>
GPTCORE_DEVICE void unpack(uint32_t bits, float& lo, float& hi) {
  lo = to_float(T{static_cast<uint16_t>(bits)});
  hi = to_float(T{static_cast<uint16_t>(bits >> 16)});
}

template <class T>
GPTCORE_DEVICE T from_float(float x) { return {static_cast<uint16_t>(pack<T>(x, 0))}; }
template <>
GPTCORE_DEVICE float from_float<float>(float x) { return x; }

}  // namespace gptcore
