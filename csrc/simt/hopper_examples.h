// The Hopper examples, for the Python module.
#pragma once

#include <array>
#include <string>
#include <utility>
#include <vector>

#include "csrc/tensor_map.h"
#include "kernels/kernels.h"

namespace gptcore {
namespace GPTCORE_GPU {

struct HopperTensors {
  const uint16_t* x;  // (250, 64) bfloat16
  uint16_t* y;        // (256, 64) bfloat16
  float* out;         // (128, 32)

  static TensorMap map_of(const void* data, int rows) {
    return *encode_tensor_map({data, 4, {64, rows, 1, 1}, {128, 128, 128}, {64, 64, 1, 1}, 128});
  }
  TensorMap x_map() const { return map_of(x, 250); }
  TensorMap y_map() const { return map_of(y, 256); }
};
std::vector<std::pair<std::string, std::string>> hopper_examples();  // names, and the rules that may be reported
void run_hopper_example(const std::string& name, const HopperTensors& tensors);

struct HopperProduct {
  const uint16_t* image;  // what is in shared memory
  const uint32_t* a;      // (128, 4) fragments of A
  float* out;             // (128, n / 2): 1 + A B
  int elements, n;
  uint64_t a_descriptor, b_descriptor;
  bool a_transposed, b_transposed, from_registers, is_float16;
};
void run_product(const HopperProduct& product);

// Copies a box of `from` at `at` to shared memory and from there to `out`, or to the box of `to` at the last four.
void run_copy(const TensorMapArgs& from, const TensorMapArgs* to, const std::array<int, 8>& at, uint16_t* out);

}  // namespace GPTCORE_GPU
}  // namespace gptcore
