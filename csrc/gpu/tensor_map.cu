// Encodes tensor maps for a GPU; the simulator has its own encoder, csrc/simt/bulk.cpp.
#ifndef GPTCORE_SIMT
#include "csrc/tensor_map.h"

#include <cuda.h>
#include <cuda_runtime.h>

#include <cstring>

namespace gptcore {
namespace {

// The driver's function: the module does not link the driver.
decltype(&cuTensorMapEncodeTiled) encoder() {
  void* entry = nullptr;
  cudaDriverEntryPointQueryResult found{};
#if CUDART_VERSION >= 12050
  cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry, 12000, cudaEnableDefault, &found);
#else
  cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &entry, cudaEnableDefault, &found);
#endif
  if (!entry || found != cudaDriverEntryPointSuccess)
    throw std::runtime_error("the CUDA driver has no cuTensorMapEncodeTiled: update it to 12.0 or later");
  return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(entry);
}

}  // namespace

std::optional<TensorMap> encode_tensor_map(const TensorMapArgs& args) {
  check_tensor_map(args);
  static const auto encode = encoder();
  std::array<cuuint64_t, 5> sizes, strides{};
  std::array<cuuint32_t, 5> box, steps;
  for (int i = 0; i < 5; ++i) sizes[i] = args.sizes[i], box[i] = args.box[i], steps[i] = 1;
  for (int i = 0; i < 4; ++i) strides[i] = args.strides[i];
  // The order of the driver's values is the reverse of a matrix descriptor's.
  const CUtensorMapSwizzle swizzle = args.swizzle_bytes == 128  ? CU_TENSOR_MAP_SWIZZLE_128B
                                     : args.swizzle_bytes == 64 ? CU_TENSOR_MAP_SWIZZLE_64B
                                     : args.swizzle_bytes == 32 ? CU_TENSOR_MAP_SWIZZLE_32B
                                                                : CU_TENSOR_MAP_SWIZZLE_NONE;
  CUtensorMap map;
  static_assert(sizeof map == sizeof(TensorMap));
  // Bytes are copied as they are, so bfloat16 stands for both types.
  const CUresult status = encode(&map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, args.rank, const_cast<void*>(args.data),
                                 sizes.data(), strides.data(), box.data(), steps.data(),
                                 CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle, CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
                                 CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (status != CUDA_SUCCESS) return {};
  TensorMap encoded;
  static_assert(alignof(CUtensorMap) >= alignof(TensorMap));
  std::memcpy(&encoded, &map, sizeof map);
  return encoded;
}

}  // namespace gptcore
#endif
