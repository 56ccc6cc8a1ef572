// Tensor maps: how bulk copies (TMA) find a box of a tensor in global memory. Encoded on the host.
#pragma once

#include <array>
#include <cstdint>
#include <optional>
#include <stdexcept>
#include <string>

namespace gptcore {

// CUtensorMap: 128 opaque bytes. A kernel takes it as const __grid_constant__ TensorMap.
struct alignas(64) TensorMap {
  uint64_t words[16];
};

// A tensor of 16-bit elements, innermost dimension first; `strides` are of dimensions 1 and up, in bytes.
struct TensorMapArgs {
  const void* data;
  int rank;
  std::array<int64_t, 5> sizes;
  std::array<int64_t, 4> strides;
  std::array<int, 5> box;
  int swizzle_bytes;  // 0 (none), 32, 64 or 128: at least the bytes of a row of the box
};

// Raises std::invalid_argument for what the hardware cannot do.
inline void check_tensor_map(const TensorMapArgs& args) {
  const auto require = [](bool holds, const std::string& what, auto given, const char* expected) {
    if (!holds)
      throw std::invalid_argument("tensor map: " + what + " is " + std::to_string(given) + ", expected " + expected);
  };
  require(args.rank >= 1 && args.rank <= 5, "rank", args.rank, "1 to 5");
  require(reinterpret_cast<uintptr_t>(args.data) % 16 == 0, "the address", reinterpret_cast<uintptr_t>(args.data),
          "a multiple of 16");
  const int span = args.swizzle_bytes;
  require(span == 0 || span == 32 || span == 64 || span == 128, "swizzle_bytes", span, "0, 32, 64 or 128");
  for (int i = 0; i < args.rank; ++i) {
    const std::string dim = " of dimension " + std::to_string(i);
    require(args.sizes[i] >= 1 && args.sizes[i] <= int64_t{1} << 32, "the size" + dim, args.sizes[i], "1 to 2^32");
    require(args.box[i] >= 1 && args.box[i] <= 256, "the box" + dim, args.box[i], "1 to 256");
    if (i > 0)
      require(args.strides[i - 1] % 16 == 0 && args.strides[i - 1] >= 0 && args.strides[i - 1] < int64_t{1} << 40,
              "the stride" + dim, args.strides[i - 1], "a multiple of 16 bytes, at most 2^40");
  }
  require(args.box[0] * 2 % 16 == 0, "the bytes of a row of the box", args.box[0] * 2, "a multiple of 16");
  // The driver also takes shorter rows; where it puts them is not documented.
  require(span == 0 || args.box[0] * 2 == span, "the bytes of a row of the box", args.box[0] * 2, "swizzle_bytes");
}

// Empty if the driver refuses the map.
std::optional<TensorMap> encode_tensor_map(const TensorMapArgs& args);

}  // namespace gptcore
