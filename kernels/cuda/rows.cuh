// What layer_norm.cuh and gelu.cuh share: rows in chunks of eight elements, sums over a row, sums over rows.
//
//             columns  0 ... 7 | 8 ... 15 | ...            a chunk: one 16-byte access of a 16-bit type, two of float32
//     row 0   thread 0         | thread 1 | ...            thread t holds the same columns of every row that it sees,
//     row 1   thread 0         | thread 1 | ...            so the sums over rows need nobody else
#pragma once

#include "kernels/cuda/ptx.cuh"
#include "kernels/kernels.h"

namespace gptcore {

constexpr int kChunk = 8;

// A chunk as it is stored: half the registers that its floats would take, for 16-bit types. n is how many elements of
// the row are left: eight or more make a whole chunk, none or fewer an empty one, and what is not there reads as zero.
// `vectors` says that no chunk is cut and that all lie at multiples of 16 bytes.
template <class T>
struct Chunk {
  static constexpr int kParts = kChunk * sizeof(T) / 16, kPart = kChunk / kParts;
  Vec16 parts[kParts];

  GPTCORE_DEVICE void load(const T* from, int n, bool vectors) {
#pragma unroll
    for (int k = 0; k < kParts; ++k) parts[k] = Vec16{};
    if (n <= 0) return;
    if (vectors) {
#pragma unroll
      for (int k = 0; k < kParts; ++k) parts[k] = load_vec(from + k * kPart);
    } else {
      float v[kChunk];
#pragma unroll
      for (int i = 0; i < kChunk; ++i) v[i] = i < n ? to_float(from[i]) : 0.0f;
      set(v);
    }
  }

  GPTCORE_DEVICE void store(T* to, int n, bool vectors) const {
    if (n <= 0) return;
    if (vectors) {
#pragma unroll
      for (int k = 0; k < kParts; ++k) store_vec(to + k * kPart, parts[k]);
    } else {
      float v[kChunk];
      get(v);
#pragma unroll
      for (int i = 0; i < kChunk; ++i)
        if (i < n) to[i] = from_float<T>(v[i]);
    }
  }

  GPTCORE_DEVICE void get(float (&v)[kChunk]) const {
#pragma unroll
    for (int k = 0; k < kParts; ++k)
#pragma unroll
      for (int w = 0; w < 4; ++w) {
        if constexpr (kParts == 2) v[4 * k + w] = float_of(parts[k].w[w]);
        else unpack<T>(parts[k].w[w], v[2 * w], v[2 * w + 1]);
      }
  }

  GPTCORE_DEVICE void set(const float (&v)[kChunk]) {
#pragma unroll
    for (int k = 0; k < kParts; ++k)
#pragma unroll
      for (int w = 0; w < 4; ++w) {
        if constexpr (kParts == 2) parts[k].w[w] = bits_of(v[4 * k + w]);
        else parts[k].w[w] = pack<T>(v[2 * w], v[2 * w + 1]);
      }
  }
};

template <class T>
GPTCORE_DEVICE void load_chunk(const T* from, int n, bool vectors, float (&v)[kChunk]) {
  Chunk<T> chunk;
  chunk.load(from, n, vectors);
  chunk.get(v);
}
template <class T>
GPTCORE_DEVICE void store_chunk(T* to, int n, bool vectors, const float (&v)[kChunk]) {
  Chunk<T> chunk;
  chunk.set(v);
  chunk.store(to, n, vectors);
}

// Elements that a chunk of n does not have, set to what adds nothing to a sum.
GPTCORE_DEVICE void fill_chunk(int n, float value, float (&v)[kChunk]) {
  if (n >= kChunk) return;
#pragma unroll
  for (int i = 0; i < kChunk; ++i)
    if (i >= n) v[i] = value;
}

// v summed over the threads of each row, in an order that does not depend on anything: over lanes by a butterfly, over
// the row's warps one after the other. `shared` holds kCount floats for each warp of the block; the caller sees to it
// that nobody still reads it. All threads of the block take part.
template <int kCount>
GPTCORE_DEVICE void sum_over_row(float (&v)[kCount], int warps_per_row, float* shared) {
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) v[i] += shuffle_xor(v[i], mask);
  }
  if (warps_per_row == 1) return;
  const int warp = threadIdx.x / 32, first = warp / warps_per_row * warps_per_row;
  if (threadIdx.x % 32 == 0) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) shared[warp * kCount + i] = v[i];
  }
  barrier();  // every warp's part is there
#pragma unroll
  for (int i = 0; i < kCount; ++i) v[i] = 0.0f;
#pragma unroll 1
  for (int other = first; other < first + warps_per_row; ++other) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) v[i] += shared[other * kCount + i];
  }
}

// The second kernel of every sum over rows: out[c] = the sum over p of partial[p * stride + c], for c < columns. A
// block takes 32 columns; each of its warps takes every kWarps-th part, and warp 0 adds up the warps. Dynamic shared
// memory: a float a thread.
template <int kWarps>
__global__ void __launch_bounds__(32 * kWarps)
    sum_partials(const float* partial, int64_t parts, int64_t stride, int64_t columns, float* out) {
  float* shared = reinterpret_cast<float*>(shared_memory());
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t column = int64_t(blockIdx.x) * 32 + lane;
  float sum = 0.0f;
  if (column < columns) {
#pragma unroll 4
    for (int64_t part = warp; part < parts; part += kWarps) sum += partial[part * stride + column];
  }
  shared[threadIdx.x] = sum;
  barrier();  // every warp's sum is there
  if (warp > 0 || column >= columns) return;
#pragma unroll
  for (int other = 1; other < kWarps; ++other) sum += shared[other * 32 + lane];
  out[column] = sum;
}

}  // namespace gptcore
