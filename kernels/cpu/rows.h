// What layer_norm.cpp and gelu.cpp share: loops over rows, stores past the cache, and sums that do not depend on the
// number of threads.
#pragma once

#include "kernels/cpu/kernels.h"
#include "kernels/cpu/simd.h"

namespace gptcore {
namespace GPTCORE_ISA {

// body(T()) for the storage type T that dtype names.
template <class Body>
GPTCORE_INLINE void with_type(DType dtype, Body body) {
  if (dtype == DType::float32) body(float());
  else if (dtype == DType::bfloat16) body(bfloat16());
  else body(float16());
}

// stream() below may be seen late by others: called before a thread says that it is done.
GPTCORE_INLINE void store_fence() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

// body(i) for each i < n, shared out to the threads; without OpenMP for one thread, since opening a region costs more
// than a small tensor.
template <class Body>
GPTCORE_INLINE void parallel_for(int64_t n, int num_threads, Body body) {
  if (num_threads <= 1) {
    for (int64_t i = 0; i < n; ++i) body(i);
    store_fence();
  } else {
#pragma omp parallel num_threads(num_threads)
    {
#pragma omp for schedule(static) nowait
      for (int64_t i = 0; i < n; ++i) body(i);
      store_fence();
    }
  }
}

// A store past the cache spares reading the line that is to be overwritten, a third of the traffic of a copy. It pays
// for what is too large to be still in the cache when it is read next.
constexpr int64_t kStreamBytes = 16 << 20;

GPTCORE_INLINE void stream(float* p, Vec v) {
#if defined(__AVX512F__)
  _mm512_stream_ps(p, (__m512)v);
#elif defined(__AVX2__)
  _mm256_stream_ps(p, (__m256)v);
#else
  store(p, v);
#endif
}
template <class T>
GPTCORE_INLINE void stream(T* p, Vec v) {
  HalfBits bits;
  store((T*)&bits, v);
#if defined(__AVX512F__)
  _mm256_stream_si256((__m256i*)p, (__m256i)bits);
#elif defined(__AVX2__)
  _mm_stream_si128((__m128i*)p, (__m128i)bits);
#else
  memcpy(p, &bits, sizeof bits);
#endif
}
template <class T>
GPTCORE_INLINE void stream_up_to(T* p, Vec v, int64_t n, bool streaming) {
  if (streaming && n >= kLanes && (uintptr_t)p % (kLanes * sizeof(T)) == 0) stream(p, v);
  else store_up_to(p, v, n);
}
GPTCORE_INLINE bool pays_to_stream(int64_t bytes) { return bytes >= kStreamBytes; }

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
