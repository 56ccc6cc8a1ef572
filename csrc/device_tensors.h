// The tensors that a launch may touch. A GPU is not told; its model, csrc/simt, holds the kernels to them.
#pragma once

#include <initializer_list>
#include <memory>
#include <optional>

#include "csrc/tensor_view.h"

namespace gptcore {

enum class Access { read, write };  // what is written has no value before

struct DeviceTensor {
  const char* name;
  const TensorView* view;  // null for an optional tensor that is not there
  Access access;

  DeviceTensor(const char* name, const TensorView& view, Access access) : name(name), view(&view), access(access) {}
  DeviceTensor(const char* name, const std::optional<TensorView>& view, Access access)
      : name(name), view(view ? &*view : nullptr), access(access) {}
};

#ifdef GPTCORE_SIMT
namespace simt { class Tensors; }

// Registers the tensors for the launches until it is destroyed.
class DeviceTensors {
 public:
  DeviceTensors(std::initializer_list<DeviceTensor> tensors);
  ~DeviceTensors();
  DeviceTensors(const DeviceTensors&) = delete;

 private:
  std::unique_ptr<simt::Tensors> tensors_;
};
#else
struct DeviceTensors {
  DeviceTensors(std::initializer_list<DeviceTensor>) {}
};
#endif

}  // namespace gptcore
