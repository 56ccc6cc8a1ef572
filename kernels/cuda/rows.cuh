// Shared by layer_norm.cuh and gelu.cuh: rows in chunks of eight elements, sums over a row, sums over rows.
//
//             columns  0 ... 7 | 8 ... 15 | ...            a chunk: one 16-byte access of a 16-bit type, two of float32
//     row 0   thread 0         | thread 1 | ...            thread t has the same columns of every row, so sums over
//     row 1   thread 0         | thread 1 | ...            rows stay within a thread
#pragma once

#include "kernels/cuda/ptx.cuh"
#include "kernels/kernels.h"

namespace gptcore {

constexpr int kChunk = 8;

// A chunk in its storage type: 16-bit types take half the registers of floats. n is the number of elements left in the
// row: at least eight for a whole chunk, at most 0 for an empty one; missing elements read as zero. `vectors`: all
// chunks are whole and aligned to 16 bytes.
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

// Sets the missing elements of a chunk of n to `value`.
GPTCORE_DEVICE void fill_chunk(int n, float value, float (&v)[kChunk]) {
  if (n >= kChunk) return;
#pragma unroll
  for (int i = 0; i < kChunk; ++i)
    if (i >= n) v[i] = value;
}

// Sums v over the threads of each row in a fixed order: over lanes by a butterfly, then over the warps of the row, of
// which `first` is the first, by another. `shared` holds kCount floats per warp of the block and must be free. All threads
// of the block take part.
template <int kCount>
GPTCORE_DEVICE void sum_over_row(float (&v)[kCount], int warps_per_row, int first, float* shared) {
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) v[i] += shuffle_xor(v[i], mask);
  }
  if (warps_per_row == 1) return;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  if (lane == 0) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) shared[warp * kCount + i] = v[i];
  }
  barrier();  // partial sums of every warp written
#pragma unroll
  for (int i = 0; i < kCount; ++i) v[i] = lane < warps_per_row ? shared[(first + lane) * kCount + i] : 0.0f;
#pragma unroll 1
  for (int mask = 1; mask < warps_per_row; mask *= 2) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) v[i] += shuffle_xor(v[i], mask);
  }
#pragma unroll
  for (int i = 0; i < kCount; ++i) v[i] = shuffle(v[i], 0);  // lanes beyond the warps have another sum
}

// The second pass of every sum over rows: out[c] = sum over p of partial[p * stride + c], for c < columns; where c is not
// below `split`, second[c - split] instead. A block covers 32 columns; each warp adds every kWarps-th part, and warp 0
// adds the warps. Dynamic shared memory: one float per thread.
template <int kWarps, class W>
__global__ void __launch_bounds__(32 * kWarps)
    sum_partials(const float* partial, int64_t parts, int64_t stride, int64_t columns, W* out, int64_t split, W* second) {
  float* shared = reinterpret_cast<float*>(shared_memory());
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t column = int64_t(blockIdx.x) * 32 + lane;
  float sum = 0.0f;
  if (column < columns) {
#pragma unroll 4
    for (int64_t part = warp; part < parts; part += kWarps) sum += partial[part * stride + column];
  }
  shared[threadIdx.x] = sum;
  barrier();  // sum of every warp written
  if (warp > 0 || column >= columns) return;
#pragma unroll
  for (int other = 1; other < kWarps; ++other) sum += shared[other * 32 + lane];
  *(column < split ? out + column : second + (column - split)) = from_float<W>(sum);
}

}  // namespace gptcore
