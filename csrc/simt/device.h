// The simulator's interface for kernels compiled by g++: CUDA keywords, and the functions behind kernels/cuda/ptx.cuh.
#pragma once

#include <stdint.h>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)

namespace gptcore {

struct bfloat16;
struct float16;

namespace simt {

// Where in the source a warp-wide function was called.
struct Site {
  const char* file;
  int line;
  static constexpr Site here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) { return {file, line}; }
};

struct Float4 { float x[4]; };
struct Words4 { uint32_t w[4]; };
enum class Mma { bfloat16, float16, tf32 };
constexpr Mma kind_of(const gptcore::bfloat16*) { return Mma::bfloat16; }
constexpr Mma kind_of(const gptcore::float16*) { return Mma::float16; }

// Where the elements of a matrix lie in shared memory, in each repeat of eight rows: not permuted, or 16-byte chunks
// exclusive-ored with the row. The values are those of wgmma's matrix descriptors; a tensor map counts otherwise.
enum class Swizzle { none, bytes128, bytes64, bytes32 };

void barrier(Site);
void warp_barrier(Site);
uint32_t shuffle_xor(uint32_t value, int lane_mask, Site);
uint32_t shuffle(uint32_t value, int lane, Site);
char* shared_memory();
void copy_async(void* shared, const void* global, int bytes, bool valid, Site);
void copy_commit();
void copy_wait(int groups);
Words4 load_matrix(const void* row, bool transposed, Site);
Float4 mma(Mma kind, Float4 d, uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1, Site);
bool elect(Site);
void named_barrier(int id, int threads, bool waits, Site);
void set_max_registers(int count, bool increase, Site);
void mbarrier_init(const void*, int count);
void mbarrier_arrive(const void*, int64_t bytes);
bool mbarrier_try_wait(const void*, int parity);
void proxy_fence(bool only_mbarriers);
void wgmma_fence(Site);
void wgmma_commit(Site);
void wgmma_wait(int groups, Site);
void wgmma(Mma kind, int n, float* d, const uint32_t* a_registers, uint64_t a, uint64_t b, bool a_transposed,
           bool b_transposed, bool accumulate, Site);
void bulk_load(void* to, const void* map, const void* mbarrier, int x, int y, int z, int w);
void bulk_store(const void* map, const void* from, int x, int y, int z, int w);
void bulk_commit();
void bulk_wait(int groups, bool only_read);
Words4 load_vec(const void* from);
void store_vec(void* to, Words4 value);
void count_special();

inline float special(float result) {
  count_special();
  return result;
}

inline float bfloat16_value(uint16_t bits) { return __builtin_bit_cast(float, static_cast<uint32_t>(bits) << 16); }
inline uint16_t bfloat16_bits(float x) {
  const uint32_t bits = __builtin_bit_cast(uint32_t, x);
  if (__builtin_isnan(x)) return 0x7fff;
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
inline float float16_value(uint16_t half) {
  // The exponent's bias grows from 15 to 127 by a product, which also makes normal numbers of subnormal ones.
  const uint32_t bits = (half & 0x7fffu) << 13;
  float magnitude = __builtin_bit_cast(float, bits) * 0x1p112f;
  if (bits >= 0x0f800000) magnitude = __builtin_bit_cast(float, bits | 0x7f800000);  // infinity or NaN
  return half & 0x8000 ? -magnitude : magnitude;
}
inline uint16_t float16_bits(float x) {
  const uint32_t bits = __builtin_bit_cast(uint32_t, x);
  const uint32_t sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000) return 0x7fff;
  if (magnitude >= 0x477ff000) return static_cast<uint16_t>(sign | 0x7c00);  // rounds to 65536 or more
  if (magnitude < 0x38800000) {  // subnormal: the sum's last bit is worth what the result's last bit is
    const float sum = __builtin_fabsf(x) + 0.5f;
    return static_cast<uint16_t>(sign | (__builtin_bit_cast(uint32_t, sum) - 0x3f000000));
  }
  return static_cast<uint16_t>(sign | ((magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1)) >> 13));
}

// threadIdx.x and the like. They never change in the life of a kernel's thread, so the compiler may keep them.
__attribute__((const)) unsigned thread_index();
__attribute__((const)) unsigned block_index(int axis);
__attribute__((const)) unsigned block_size();
__attribute__((const)) unsigned grid_size(int axis);

struct ThreadIndex { operator unsigned() const { return thread_index(); } };
template <int Axis>
struct BlockIndex { operator unsigned() const { return block_index(Axis); } };
struct BlockSize { operator unsigned() const { return block_size(); } };
template <int Axis>
struct GridSize { operator unsigned() const { return grid_size(Axis); } };

}  // namespace simt
}  // namespace gptcore

// Blocks have one dimension here, and so these have only x.
constexpr struct { gptcore::simt::ThreadIndex x; } threadIdx{};
constexpr struct { gptcore::simt::BlockSize x; } blockDim{};
constexpr struct {
  gptcore::simt::BlockIndex<0> x;
  gptcore::simt::BlockIndex<1> y;
  gptcore::simt::BlockIndex<2> z;
} blockIdx{};
constexpr struct {
  gptcore::simt::GridSize<0> x;
  gptcore::simt::GridSize<1> y;
  gptcore::simt::GridSize<2> z;
} gridDim{};
