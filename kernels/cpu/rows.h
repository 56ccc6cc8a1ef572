// Types, threads and sums over rows, shared by the operations on rows.
#pragma once

#include "kernels/kernels.h"
#include "kernels/cpu/simd.h"

namespace gptcore {
namespace GPTCORE_ISA {

// The number of chunks of sums over rows (grad_weight, grad_bias). Chunks are added in order, so that the result
// depends only on the shape, not on the number of threads.
static inline constexpr int64_t row_chunks(int64_t rows) { return rows < 64 ? 1 : rows < 2048 ? rows / 64 : 32; }

// Calls body(T()) with the storage type T of dtype.
template <class Body>
GPTCORE_INLINE void with_type(DType dtype, Body body) {
  if (dtype == DType::float32) body(float());
  else if (dtype == DType::bfloat16) body(bfloat16());
  else body(float16());
}

// Calls body(i) for each i < n on num_threads threads; without OpenMP for one thread, since a parallel region costs
// more than a small tensor.
template <class Body>
GPTCORE_INLINE void parallel_for(int64_t n, int num_threads, Body body) {
  if (num_threads <= 1) {
    for (int64_t i = 0; i < n; ++i) body(i);
  } else {
#pragma omp parallel for num_threads(num_threads) schedule(static)
    for (int64_t i = 0; i < n; ++i) body(i);
  }
}

// out[i] = the sum over chunks of partial[chunk * stride + i], in the order of the chunks.
GPTCORE_INLINE void sum_chunks(const float* partial, int64_t chunks, int64_t stride, int64_t n, float* out) {
  for (int64_t i = 0; i < n; i += kLanes) {
    Vec sum = {};
    for (int64_t chunk = 0; chunk < chunks; ++chunk) sum += load_up_to(partial + chunk * stride + i, n - i);
    store_up_to(out + i, sum, n - i);
  }
}

}  // namespace GPTCORE_ISA
}  // namespace gptcore
