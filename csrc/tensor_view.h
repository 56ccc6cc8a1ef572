// TensorView: what a kernel needs to know of a torch.Tensor, read through Python's own attributes, or in a tenth of the time
// through DLPack's C functions, where this PyTorch has them.
//
// Nothing of libtorch is included or linked, so that one build of this module serves every version of PyTorch.
// A view is borrowed: it is good while the caller holds the tensor, which the arguments of a call do.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <cstring>
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

// The part that is used here of DLPack 1's dlpack.h: its types, by their own names, with the layout that it promises.
namespace dlpack {

enum : int32_t { kDLCPU = 1, kDLCUDA = 2 };
enum : uint8_t { kDLInt = 0, kDLUInt = 1, kDLFloat = 2, kDLBfloat = 4 };
struct DLDataType {
  uint8_t code, bits;
  uint16_t lanes;
};
struct DLTensor {
  void* data;
  struct { int32_t device_type, device_id; } device;
  int32_t ndim;
  DLDataType dtype;
  int64_t *shape, *strides;
  uint64_t byte_offset;
};
struct DLPackExchangeAPI {
  struct { uint32_t major, minor; } version;
  void *prev_api, *managed_tensor_allocator, *managed_tensor_from_py_object_no_sync, *managed_tensor_to_py_object_no_sync;
  int (*dltensor_from_py_object_no_sync)(void* py_object, DLTensor* out);
};

}  // namespace dlpack
}  // namespace gptcore

namespace pybind11::detail {

// Converts an argument. Throws instead of returning false, so that the message names what came in.
template <>
struct type_caster<gptcore::TensorView> {
  PYBIND11_TYPE_CASTER(gptcore::TensorView, const_name("torch.Tensor"));

  bool load(handle source, bool) {
    const Torch& torch = Torch::get();
    value.tensor = source;
    if (torch.view && is_plain(source) && load_dlpack(torch, source)) return true;
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
    value.data = reinterpret_cast<void*>(source.attr(torch.data_ptr)().cast<uintptr_t>());
    if (!value.data && value.size() > 0) throw value_error("a tensor without storage: its data pointer is null");
    return true;
  }

  static handle cast(const gptcore::TensorView&, return_value_policy, handle) = delete;

  // A tensor that is no other subclass: what those hold, and whether it is memory, is for their attributes to say.
  static bool is_plain(handle source) { return Torch::get().is_plain(source); }

 private:
  // Names are interned and types looked up once: a call with four tensors costs about as much as one small torch.add.
  struct Torch {
    static constexpr int kDTypes = 6;
    object tensor, parameter, dtypes[kDTypes];
    object shape, stride, dtype, is_cpu, is_cuda, data_ptr;

    decltype(gptcore::dlpack::DLPackExchangeAPI::dltensor_from_py_object_no_sync) view = nullptr;

    bool is_plain(handle source) const {
      auto type = reinterpret_cast<PyObject*>(Py_TYPE(source.ptr()));
      return type == tensor.ptr() || type == parameter.ptr();
    }
    static object interned(const char* name) { return reinterpret_steal<object>(PyUnicode_InternFromString(name)); }
    Torch() {
      module_ torch = module_::import("torch");
      tensor = torch.attr("Tensor"), parameter = torch.attr("nn").attr("Parameter");
      if (hasattr(tensor, "__dlpack_c_exchange_api__")) {
        capsule table = tensor.attr("__dlpack_c_exchange_api__");
        auto* api = static_cast<gptcore::dlpack::DLPackExchangeAPI*>(table.get_pointer());
        if (api->version.major == 1) view = api->dltensor_from_py_object_no_sync;
      }
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

  // False for what DLPack has no word for; the attributes then say what it is, or why it is refused.
  bool load_dlpack(const Torch& torch, handle source) {
    gptcore::dlpack::DLTensor t;
    if (torch.view(source.ptr(), &t) != 0) {
      PyErr_Clear();
      return false;
    }
    using namespace gptcore::dlpack;
    if (t.ndim > gptcore::kMaxDims || (t.device.device_type != kDLCPU && t.device.device_type != kDLCUDA)) return false;
    value.ndim = t.ndim;
    for (int i = 0; i < t.ndim; ++i) value.shape[i] = t.shape[i], value.strides[i] = t.strides[i];
    static constexpr DLDataType kTypes[Torch::kDTypes] = {{kDLFloat, 32, 1}, {kDLBfloat, 16, 1}, {kDLFloat, 16, 1},
                                                          {kDLInt, 32, 1},   {kDLInt, 64, 1},    {kDLUInt, 8, 1}};
    value.dtype = gptcore::DType::other;
    for (int i = 0; i < Torch::kDTypes; ++i)
      if (memcmp(&kTypes[i], &t.dtype, sizeof t.dtype) == 0) value.dtype = static_cast<gptcore::DType>(i);
    const bool cpu = t.device.device_type == kDLCPU;
    value.device_type = cpu ? gptcore::Device::cpu : gptcore::Device::cuda;
    value.device_index = cpu ? -1 : t.device.device_id;
    value.data = static_cast<char*>(t.data) + t.byte_offset;
    return value.data || value.size() == 0;
  }
};

}  // namespace pybind11::detail
