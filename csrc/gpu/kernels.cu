#include "csrc/gpu/kernels.h"

#ifndef GPTCORE_SIMT
#include <cuda_runtime.h>
#endif

namespace gptcore {
namespace GPTCORE_GPU {

#ifdef GPTCORE_SIMT
constexpr const char* kName = "simt";
#else
constexpr const char* kName = "cuda";
#endif

const Kernels kernels = [] {
  Kernels kernels{kName};
  GPTCORE_OPERATIONS(GPTCORE_SET_KERNELS, GPTCORE_SKIP)
  return kernels;
}();

}  // namespace GPTCORE_GPU

#ifndef GPTCORE_SIMT

std::string cuda_problem() {
  const auto version = [](int number) {
    return std::to_string(number / 1000) + "." + std::to_string(number % 1000 / 10);
  };
  int driver = 0, devices = 0, runtime = CUDART_VERSION;
  if (cudaDriverGetVersion(&driver) != cudaSuccess || driver == 0) return "no NVIDIA driver";
  const cudaError_t status = cudaGetDeviceCount(&devices);
  if (status == cudaErrorInsufficientDriver)
    return "the NVIDIA driver supports CUDA up to " + version(driver) + ", this build needs " + version(runtime);
  if (status != cudaSuccess) return cudaGetErrorString(status);
  std::string found;
  for (int device = 0; device < devices; ++device) {
    int major = 0, minor = 0;
    cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
    cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
    if (major >= 8) return "";
    found += (found.empty() ? "" : ", ") + ("sm_" + std::to_string(major)) + std::to_string(minor);
  }
  return "expected a GPU of compute capability 8.0 or more, found " + (found.empty() ? "none" : found);
}

#endif

}  // namespace gptcore
