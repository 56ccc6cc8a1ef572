// One launch function for a GPU and for the GPU simulator, csrc/simt.
#pragma once

#include <cstddef>
#include <stdexcept>
#include <string>

#ifdef GPTCORE_SIMT
#include <tuple>
#include <utility>
#else
#include <cuda_runtime.h>

#include <map>
#include <mutex>
#include <utility>
#endif

namespace gptcore {

struct Launch {
  const char* kernel;  // its name, for errors and counters
  unsigned grid_x, grid_y, grid_z;
  unsigned threads;  // of a block, which has one dimension
  size_t shared_bytes;
  void* stream;
};

inline std::string describe(const Launch& at) {
  return std::string(at.kernel) + ": grid (" + std::to_string(at.grid_x) + ", " + std::to_string(at.grid_y) + ", " +
         std::to_string(at.grid_z) + "), " + std::to_string(at.threads) + " threads a block, " +
         std::to_string(at.shared_bytes) + " bytes of shared memory";
}

#ifdef GPTCORE_SIMT

namespace simt {
void run(const Launch& at, void (*thread)(void* call), void* call);  // runs `thread` once for each thread of the grid

template <class... P>
struct Call {
  void (*kernel)(P...);
  std::tuple<P...> arguments;

  // Not instrumented: the simulator does not track the memory of the arguments, which the kernel copies to its stack.
  template <size_t... I>
  __attribute__((no_sanitize("thread"))) void invoke(std::index_sequence<I...>) { kernel(std::get<I>(arguments)...); }
  static __attribute__((no_sanitize("thread"))) void invoke(void* call) {
    static_cast<Call*>(call)->invoke(std::index_sequence_for<P...>{});
  }
};
}  // namespace simt

template <class... P, class... A>
void launch(const Launch& at, void (*kernel)(P...), A... arguments) {
  simt::Call<P...> call{kernel, {static_cast<P>(arguments)...}};
  simt::run(at, &simt::Call<P...>::invoke, &call);
}

#else

inline void check_launch(cudaError_t status, const Launch& at) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // or the next call would find this error again
  throw std::runtime_error("cannot launch " + describe(at) + ": " + cudaGetErrorString(status));
}

// Lets a kernel have more shared memory than it gets unasked, with one call for each kernel and device.
inline void allow_shared_memory(const void* kernel, const Launch& at) {
  constexpr size_t kUnasked = 48 * 1024;
  if (at.shared_bytes <= kUnasked) return;
  static std::mutex mutex;
  static std::map<std::pair<const void*, int>, size_t> allowed;
  int device = 0;
  check_launch(cudaGetDevice(&device), at);
  const std::lock_guard<std::mutex> lock(mutex);
  size_t& most = allowed[{kernel, device}];
  if (at.shared_bytes <= most) return;
  check_launch(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                    static_cast<int>(at.shared_bytes)), at);
  most = at.shared_bytes;
}

// Puts the kernel on the stream; does not wait for it. Raises std::runtime_error.
template <class... P, class... A>
void launch(const Launch& at, void (*kernel)(P...), A... arguments) {
  allow_shared_memory(reinterpret_cast<const void*>(kernel), at);
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(at.grid_x, at.grid_y, at.grid_z);
  config.blockDim = dim3(at.threads);
  config.dynamicSmemBytes = at.shared_bytes;
  config.stream = static_cast<cudaStream_t>(at.stream);
  check_launch(cudaLaunchKernelEx(&config, kernel, static_cast<P>(arguments)...), at);
}

#endif

}  // namespace gptcore
