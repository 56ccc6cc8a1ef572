// Small kernels for benchmarks/on_gpu/units.py: rates of instructions, and golden values for the simulator's tests.
//
// Compiled by nvcc to a cubin for sm_90a and loaded through the driver, so that they need no module of gptcore.
#include <cuda.h>
#include <cuda_bf16.h>
#include <stdint.h>

extern __shared__ __align__(1024) unsigned char shared_bytes[];

__device__ uint32_t address(const void* p) { return uint32_t(__cvta_generic_to_shared(p)); }
__device__ void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
__device__ void ldmatrix(uint32_t (&r)[4], uint32_t from) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(from));
}
__device__ void ldmatrix_trans(uint32_t (&r)[4], uint32_t from) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(from));
}
// The registers have their values here: none is set between two wgmma.
__device__ void keep(float (&d)[32]) {
#pragma unroll
  for (int i = 0; i < 32; ++i) asm volatile("" : "+f"(d[i])::"memory");
}
__device__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ void wgmma_end() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
  asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
}
// m64n64k16, both operands in shared memory; kTransB: the B tile has N as its contiguous dimension.
template <int kTransB>
__device__ void wgmma(float (&d)[32], uint64_t a, uint64_t b, int accumulate) {
  asm volatile("{.reg .pred p; setp.ne.b32 p, %34, 0;\n"
    "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,"
    "%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31}, %32, %33, p, 1, 1, 0, %35;}"
    : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), "+f"(d[8]),
      "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]), "+f"(d[16]),
      "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), "+f"(d[24]),
      "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31])
    : "l"(a), "l"(b), "r"(accumulate), "n"(kTransB));
}
__device__ void copy_in(const uint32_t* from, int words) {
  for (int i = threadIdx.x; i < words; i += blockDim.x) reinterpret_cast<uint32_t*>(shared_bytes)[i] = from[i];
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
  __syncthreads();
}

// ---- rates: `count` instructions a warp; cycles of the block are written -------------------------------------------

extern "C" __global__ void empty() {}

extern "C" __global__ void rate_mma(int count, long long* cycles, float* out) {
  float d[8][4] = {};
  uint32_t a[4] = {threadIdx.x, 1, 2, 3}, b[2] = {4, threadIdx.x};
  __syncthreads();
  const long long start = clock64();
  for (int i = 0; i < count; i += 8)
#pragma unroll
    for (int j = 0; j < 8; ++j) mma(d[j], a, b);
  __syncthreads();
  if (threadIdx.x == 0) cycles[blockIdx.x] = clock64() - start;
  for (int j = 0; j < 8; ++j) out[blockIdx.x * blockDim.x + threadIdx.x] = d[j][0] + d[j][1] + d[j][2] + d[j][3];
}

extern "C" __global__ void rate_ldmatrix(int count, long long* cycles, float* out) {
  uint32_t r[4], sum = 0, from = address(shared_bytes) + threadIdx.x % 32 * 16;
  __syncthreads();
  const long long start = clock64();
  for (int i = 0; i < count; ++i) ldmatrix(r, from), sum ^= r[0] ^ r[1] ^ r[2] ^ r[3];
  __syncthreads();
  if (threadIdx.x == 0) cycles[blockIdx.x] = clock64() - start;
  out[blockIdx.x * blockDim.x + threadIdx.x] = float(sum);
}

extern "C" __global__ void rate_ex2(int count, long long* cycles, float* out) {
  float v[8];
  for (int j = 0; j < 8; ++j) v[j] = float(threadIdx.x + j) * 1e-3f;
  __syncthreads();
  const long long start = clock64();
  for (int i = 0; i < count; i += 8)
#pragma unroll
    for (int j = 0; j < 8; ++j) asm volatile("ex2.approx.ftz.f32 %0, %0;" : "+f"(v[j]));
  __syncthreads();
  if (threadIdx.x == 0) cycles[blockIdx.x] = clock64() - start;
  for (int j = 1; j < 8; ++j) v[0] += v[j];
  out[blockIdx.x * blockDim.x + threadIdx.x] = v[0];
}

// Shared memory is 16 KB of whatever it holds: the rate does not depend on values.
extern "C" __global__ void __launch_bounds__(512) rate_wgmma(int count, uint64_t descriptor, long long* cycles, float* out) {
  float d[32] = {};
  const uint64_t base = descriptor | ((address(shared_bytes) & 0x3ffff) >> 4);
  __syncthreads();
  const long long start = clock64();
  keep(d);
  wgmma_fence();
  for (int i = 0; i < count; i += 8)
#pragma unroll
    for (int j = 0; j < 8; ++j) wgmma<0>(d, base, base + 512, 1);
  wgmma_end();
  keep(d);
  __syncthreads();
  if (threadIdx.x == 0) cycles[blockIdx.x] = clock64() - start;
  float sum = 0;
  for (int i = 0; i < 32; ++i) sum += d[i];
  out[blockIdx.x * blockDim.x + threadIdx.x] = sum;
}

// ---- golden values: inputs and results as raw bytes ----------------------------------------------------------------

// One warp. in: 512 bytes of shared memory; offsets: of the row that each lane points to.
extern "C" __global__ void golden_ldmatrix(const uint32_t* in, const int* offsets, int transposed, uint32_t* out) {
  copy_in(in, 128);
  uint32_t r[4];
  const uint32_t from = address(shared_bytes) + offsets[threadIdx.x];
  if (transposed) ldmatrix_trans(r, from);
  else ldmatrix(r, from);
  for (int i = 0; i < 4; ++i) out[threadIdx.x * 4 + i] = r[i];
}

// One warp. in: four words of A, two of B for each lane.
extern "C" __global__ void golden_mma(const uint32_t* in, float* out) {
  uint32_t a[4], b[2];
  for (int i = 0; i < 4; ++i) a[i] = in[threadIdx.x * 6 + i];
  for (int i = 0; i < 2; ++i) b[i] = in[threadIdx.x * 6 + 4 + i];
  float d[4] = {};
  mma(d, a, b);
  for (int i = 0; i < 4; ++i) out[threadIdx.x * 4 + i] = d[i];
}

// One warpgroup. in: 16 KB of shared memory, A at 0 and B at 8192; descriptors without their addresses.
extern "C" __global__ void golden_wgmma(const uint32_t* in, uint64_t a, uint64_t b, int transposed, float* out) {
  copy_in(in, 4096);
  const uint32_t base = address(shared_bytes);
  a |= (base & 0x3ffff) >> 4, b |= ((base + 8192) & 0x3ffff) >> 4;
  float d[32] = {};
  keep(d);
  wgmma_fence();
  if (transposed) wgmma<1>(d, a, b, 0);
  else wgmma<0>(d, a, b, 0);
  wgmma_end();
  keep(d);
  for (int i = 0; i < 32; ++i) out[threadIdx.x * 32 + i] = d[i];
}

// One warp. Loads a box of `bytes` at (x, y); out: shared memory as it is then.
extern "C" __global__ void golden_tma(const __grid_constant__ CUtensorMap map, int x, int y, int bytes, uint32_t* out) {
  __shared__ __align__(8) uint64_t barrier;
  const uint32_t at = address(&barrier);
  for (int i = threadIdx.x; i < bytes / 4; i += 32) reinterpret_cast<uint32_t*>(shared_bytes)[i] = 0xdeadbeef;
  if (threadIdx.x == 0) {
    asm volatile("mbarrier.init.shared.b64 [%0], 1;" :: "r"(at) : "memory");
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
  __syncthreads();
  if (threadIdx.x == 0) {
    asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" :: "r"(at), "r"(bytes) : "memory");
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];"
                 :: "r"(address(shared_bytes)), "l"(&map), "r"(at), "r"(x), "r"(y) : "memory");
  }
  uint32_t done = 0;
  for (int i = 0; i < 1 << 20 && !done; ++i)
    asm volatile("{.reg .pred p; mbarrier.try_wait.parity.shared.b64 p, [%1], 0; selp.u32 %0, 1, 0, p;}"
                 : "=r"(done) : "r"(at) : "memory");
  __syncthreads();
  for (int i = threadIdx.x; i < bytes / 4; i += 32) out[i] = done ? reinterpret_cast<uint32_t*>(shared_bytes)[i] : 0xbad;
}

// One thread. steps: pairs of an act (0 init with a count, 1 arrive, 2 expect bytes and arrive, 3 expect bytes, 4 test
// of a parity, 5 inval) and its number; out: the result of a test, and the barrier's 64 bits after each step.
extern "C" __global__ void golden_mbarrier(const int* steps, int count, unsigned long long* out) {
  __shared__ __align__(8) unsigned long long barrier;
  const uint32_t at = address(&barrier);
  for (int i = 0; i < count; ++i) {
    const int act = steps[2 * i], number = steps[2 * i + 1];
    uint32_t result = 0;
    if (act == 0) asm volatile("mbarrier.init.shared.b64 [%0], %1;" :: "r"(at), "r"(number) : "memory");
    if (act == 1) asm volatile("mbarrier.arrive.shared.b64 _, [%0];" :: "r"(at) : "memory");
    if (act == 2) asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" :: "r"(at), "r"(number) : "memory");
    if (act == 3) asm volatile("mbarrier.expect_tx.relaxed.cta.shared.b64 [%0], %1;" :: "r"(at), "r"(number) : "memory");
    if (act == 4)
      asm volatile("{.reg .pred p; mbarrier.test_wait.parity.shared.b64 p, [%1], %2; selp.u32 %0, 1, 0, p;}"
                   : "=r"(result) : "r"(at), "r"(number) : "memory");
    out[2 * i] = result, out[2 * i + 1] = barrier;
    if (act == 5) asm volatile("mbarrier.inval.shared.b64 [%0];" :: "r"(at) : "memory");
  }
}
