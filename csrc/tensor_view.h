// TensorView: what a kernel needs to know of a torch.Tensor, read through Python's own attributes.
//
// Nothing of libtorch is included or linked, so that one build of this module serves every version of PyTorch.
// A view is borrowed: it is good while the caller holds the tensor, which the arguments of a call do.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>

#include "kernels/kernels.h"

namespace gptcore {

constexpr int kMaxDims = 8;

enum class Device { cpu, cuda, other };

struct TensorView {
  void* data = nullptr;
  DType dtype = DType::other;
  int ndim = 0;
  int64_t shape[kMaxDims] = {};
  int64_t strides[kMaxDims] = {};  // in elements
  Device device_type = Device::other;
  int64_t device_index = -1;  // -1 on the CPU
  pybind11::handle tensor;  // borrowed, for the words of an error

  // As PyTorch prints them: "torch.bfloat16", "cpu", "cuda:0".
  std::string dtype_name() const { return pybind11::str(tensor.attr("dtype")); }
  std::string device() const { return pybind11::str(tensor.attr("device")); }
  int64_t size() const {
    int64_t n = 1;
    for (int i = 0; i < ndim; ++i) n *= shape[i];
    return n;
  }
  int64_t bytes() const;
  template <class T>
  T* as() const { return static_cast<T*>(data); }
};

inline int64_t item_size(DType dtype) {
  switch (dtype) {
    case DType::bfloat16: case DType::float16: return 2;
    case DType::float32: case DType::int32: return 4;
    case DType::uint8: return 1;
    default: return 8;
  }
}
inline int64_t TensorView::bytes() const { return size() * item_size(dtype); }

}  // namespace gptcore

namespace pybind11::detail {

// Converts an argument. Throws instead of returning false, so that the message names what came in.
template <>
struct type_caster<gptcore::TensorView> {
  PYBIND11_TYPE_CASTER(gptcore::TensorView, const_name("torch.Tensor"));

  bool load(handle source, bool) {
    const Torch& torch = Torch::get();
    if (!isinstance(source, torch.tensor))
      throw type_error("expected a torch.Tensor, got " + std::string(str(type::handle_of(source).attr("__name__"))));
    object shape = source.attr(torch.shape), strides = source.attr(torch.stride)();
    value.ndim = static_cast<int>(PyTuple_GET_SIZE(shape.ptr()));
    if (value.ndim > gptcore::kMaxDims)
      throw value_error("a tensor of " + std::to_string(value.ndim) + " dimensions, at most " +
                        std::to_string(gptcore::kMaxDims) + " are supported");
    for (int i = 0; i < value.ndim; ++i) {
      value.shape[i] = PyLong_AsLongLong(PyTuple_GET_ITEM(shape.ptr(), i));
      value.strides[i] = PyLong_AsLongLong(PyTuple_GET_ITEM(strides.ptr(), i));
    }
    if (PyErr_Occurred()) throw error_already_set();
    object dtype = source.attr(torch.dtype);
    value.dtype = gptcore::DType::other;
    for (int i = 0; i < Torch::kDTypes; ++i)
      if (dtype.is(torch.dtypes[i])) value.dtype = static_cast<gptcore::DType>(i);
    if (source.attr(torch.is_cpu).ptr() == Py_True) {
      value.device_type = gptcore::Device::cpu;
      value.device_index = -1;
    } else {
      bool cuda = source.attr(torch.is_cuda).ptr() == Py_True;
      value.device_type = cuda ? gptcore::Device::cuda : gptcore::Device::other;
      value.device_index = source.attr("get_device")().cast<int64_t>();
    }
    value.tensor = source;
    value.data = reinterpret_cast<void*>(source.attr(torch.data_ptr)().cast<uintptr_t>());
    if (!value.data && value.size() > 0) throw value_error("a tensor without storage: its data pointer is null");
    return true;
  }

  static handle cast(const gptcore::TensorView&, return_value_policy, handle) = delete;

 private:
  // Names are interned and types looked up once: a call with four tensors costs about as much as one small torch.add.
  struct Torch {
    static constexpr int kDTypes = 6;
    object tensor, dtypes[kDTypes];
    object shape, stride, dtype, is_cpu, is_cuda, data_ptr;

    static object interned(const char* name) { return reinterpret_steal<object>(PyUnicode_InternFromString(name)); }
    Torch() {
      module_ torch = module_::import("torch");
      tensor = torch.attr("Tensor");
      const char* names[kDTypes] = {"float32", "bfloat16", "float16", "int32", "int64", "uint8"};  // the order of DType
      for (int i = 0; i < kDTypes; ++i) dtypes[i] = torch.attr(names[i]);
      shape = interned("shape"), stride = interned("stride"), dtype = interned("dtype");
      is_cpu = interned("is_cpu"), is_cuda = interned("is_cuda"), data_ptr = interned("data_ptr");
    }
    static const Torch& get() {
      static const Torch* torch = new Torch();  // never freed: Python may be gone when statics are
      return *torch;
    }
  };
};

}  // namespace pybind11::detail
