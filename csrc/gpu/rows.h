// Shared by the host side of layer norm and GELU.
#pragma once

#include <initializer_list>

#include "csrc/launch.h"
#include "kernels/cuda/rows.cuh"

namespace gptcore {
namespace GPTCORE_GPU {

// Calls body(T()) with the storage type T of dtype.
template <class Body>
void with_type(DType dtype, Body body) {
  if (dtype == DType::float32) body(float());
  else if (dtype == DType::bfloat16) body(bfloat16());
  else body(float16());
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Returns whether rows consist of whole, aligned 16-byte vectors in each of these dense tensors; null ones are skipped.
inline bool whole_vectors(int64_t width, std::initializer_list<const void*> tensors) {
  bool whole = width % kChunk == 0;
  for (const void* tensor : tensors) whole &= reinterpret_cast<uintptr_t>(tensor) % 16 == 0;
  return whole;
}

// Attributes of the current device. The simulator is an A100 with a small L2 cache, which small tensors fill.
#ifdef GPTCORE_SIMT
inline int multiprocessors() { return 108; }
inline int l2_bytes() { return 64 << 10; }
#else
inline int device_attribute(cudaDeviceAttr attribute) {
  int device = 0, value = 0;
  if (cudaGetDevice(&device) != cudaSuccess || cudaDeviceGetAttribute(&value, attribute, device) != cudaSuccess)
    throw std::runtime_error(std::string("cannot read the attributes of the GPU: ") +
                             cudaGetErrorString(cudaGetLastError()));
  return value;
}
inline int multiprocessors() { return device_attribute(cudaDevAttrMultiProcessorCount); }
inline int l2_bytes() { return device_attribute(cudaDevAttrL2CacheSize); }
#endif

// out[c] = the sum over p of partial[p * stride + c], and unless `second` is null second[c] that of columns + c.
template <class W>
void launch_sum_partials(const float* partial, int64_t parts, int64_t stride, int64_t columns, W* out, W* second,
                         void* stream) {
  constexpr int kWarps = 8;
  const int64_t all = second ? 2 * columns : columns;
  launch({"sum_partials", unsigned(ceil_div(all, 32)), 1, 1, 32 * kWarps, 32 * kWarps * sizeof(float), stream},
         sum_partials<kWarps, W>, partial, parts, stride, all, out, columns, second);
}

}  // namespace GPTCORE_GPU
}  // namespace gptcore
