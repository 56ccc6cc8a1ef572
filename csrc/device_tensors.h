// The tensors that a launch may access. The simulator, csrc/simt, reports other accesses; on a GPU it has no effect.
#pragma once

#include <initializer_list>
#include <memory>
#include <optional>

#include "csrc/tensor_view.h"

namespace gptcore {

enum class Access { read, write };  // write: uninitialised before the launch

struct DeviceTensor {
  const char* name;
  const TensorView* view;  // null for an absent optional tensor
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
