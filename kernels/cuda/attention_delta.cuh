// The parameters of attention's backward, and its first kernel: delta = rowsum(dO O) - dLSE of each query.
#pragma once

#include "kernels/cuda/tile.cuh"
#include "kernels/kernels.h"

namespace gptcore {
namespace GPTCORE_GPU {

struct AttentionBackwardParams : AttentionParams {
  HeadsView grad_out, grad_query, grad_key, grad_value;
  const float* grad_lse;  // may be null
  float* delta;           // (batch, query_heads, query_len)
  int query_heads;
  float scale;
};

constexpr int kDeltaThreads = 128;
// Lanes per row. One for float, which adds in the order of multiply_transposed: with a probability of exactly 1 (see
// kDifferenceFirst) dP - delta is then exactly 0.
template <class T>
constexpr int kDeltaLanes = sizeof(T) == 4 ? 1 : 8;

// delta = rowsum(dO O) - dLSE of each query. dLSE enters with a minus sign, since d LSE / d S = P.
template <class T>
__global__ void __launch_bounds__(kDeltaThreads) attention_delta(AttentionBackwardParams p) {
  constexpr int kPerChunk = 16 / sizeof(T);
  constexpr int kLanes = kDeltaLanes<T>;
  const int64_t row = (int64_t)blockIdx.x * (kDeltaThreads / kLanes) + threadIdx.x / kLanes;
  const int lane = threadIdx.x % kLanes;
  const bool valid = row < (int64_t)p.batch * p.query_heads * p.query_len;
  float sum = 0.0f;
  if (valid) {
    const int query = row % p.query_len, head = row / p.query_len % p.query_heads;
    const int batch = row / p.query_len / p.query_heads;
    const T* out = rows_of<const T>(p.out, batch, head, query);
    const T* grad_out = rows_of<const T>(p.grad_out, batch, head, query);
    for (int d = lane * kPerChunk; d < p.head_dim; d += kLanes * kPerChunk) {
      if (p.vectors) {
        const Vec16 a = load_vec(out + d), b = load_vec(grad_out + d);
        T x[kPerChunk], y[kPerChunk];
        memcpy(x, &a, 16), memcpy(y, &b, 16);
#pragma unroll
        for (int j = 0; j < kPerChunk; ++j) sum += to_float(x[j]) * to_float(y[j]);
      } else {
        for (int j = d; j < d + kPerChunk && j < p.head_dim; ++j)
          sum += to_float(out[j]) * to_float(grad_out[j]);
      }
    }
  }
  for (int mask = kLanes / 2; mask > 0; mask /= 2) sum += shuffle_xor(sum, mask);
  if (valid && lane == 0) p.delta[row] = sum - (p.grad_lse ? p.grad_lse[row] : 0.0f);
}

}  // namespace GPTCORE_GPU
}  // namespace gptcore
