// TensorView: pointer, shape, strides, dtype and device of a torch.Tensor, read through Python attributes, or ten times
// as fast through DLPack's C exchange API if this PyTorch has it.
//
// libtorch is neither included nor linked, so one build of this module works with every version of PyTorch.
// A view does not own the tensor; it is valid while the caller holds a reference, as during a call.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <cstring>
#include <optional>
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
  pybind11::handle tensor;  // borrowed, for error messages

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

// The types of DLPack 1's dlpack.h that are used here, with the same names and layout.
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

// Converts an argument. Throws instead of returning false, so that the message names the type that was given.
template <>
struct type_caster<gptcore::TensorView> {
  PYBIND11_TYPE_CASTER(gptcore::TensorView, const_name("torch.Tensor"));

  bool load(handle source, bool) {
    describe(source);
    check_memory(source);
    return true;
  }

  static handle cast(const gptcore::TensorView&, return_value_policy, handle) = delete;

  // Reads everything except the storage, which check_memory() reads.
  const gptcore::TensorView& describe(handle source) {
    const Torch& torch = Torch::get();
    value.tensor = source;
    if (torch.view && is_plain(source) && load_dlpack(torch, source)) return value;
    if (!isinstance(source, torch.tensor))
      throw type_error("expected a torch.Tensor, got " + std::string(str(type::handle_of(source).attr("__name__"))));
    // A subclass may override these attributes, but the kernel reads the memory of the base class.
    const NoOverrides no_overrides(torch);
    object shape = torch.shape(source), strides = torch.stride(source);
    value.ndim = static_cast<int>(PyTuple_GET_SIZE(shape.ptr()));
    if (value.ndim > gptcore::kMaxDims)
      throw value_error("a tensor of " + std::to_string(value.ndim) + " dimensions, at most " +
                        std::to_string(gptcore::kMaxDims) + " are supported");
    for (int i = 0; i < value.ndim; ++i) {
      value.shape[i] = PyLong_AsLongLong(PyTuple_GET_ITEM(shape.ptr(), i));
      value.strides[i] = PyLong_AsLongLong(PyTuple_GET_ITEM(strides.ptr(), i));
    }
    if (PyErr_Occurred()) throw error_already_set();
    object dtype = torch.dtype(source);
    value.dtype = gptcore::DType::other;
    for (int i = 0; i < Torch::kDTypes; ++i)
      if (dtype.is(torch.dtypes[i])) value.dtype = static_cast<gptcore::DType>(i);
    if (torch.is_cpu(source).ptr() == Py_True) {
      value.device_type = gptcore::Device::cpu;
      value.device_index = -1;
    } else {
      bool cuda = torch.is_cuda(source).ptr() == Py_True;
      value.device_type = cuda ? gptcore::Device::cuda : gptcore::Device::other;
      value.device_index = torch.get_device(source).cast<int64_t>();
    }
    value.data = reinterpret_cast<void*>(torch.data_ptr(source).cast<uintptr_t>());
    if (!value.data && value.size() > 0) throw value_error("a tensor without storage: its data pointer is null");
    return value;
  }

  // Throws for a tensor of any dtype that exceeds its storage. For PyTorch's own functions, which would access memory
  // beyond it. Other objects pass, and tensors without a storage in memory: sparse, meta and fake ones, wrappers.
  static void check_storage(handle source) {
    const Torch& torch = Torch::get();
    std::optional<NoOverrides> no_overrides;
    if (!is_plain(source)) {
      if (!isinstance(source, torch.tensor)) return;
      if (object(type::handle_of(source).attr("__torch_dispatch__")).ptr() != torch.torch_dispatch.ptr()) return;
      no_overrides.emplace(torch);
    }
    PyObject* arguments[] = {source.ptr()};
    const auto storage = reinterpret_steal<object>(PyObject_Vectorcall(torch.untyped_storage.ptr(), arguments, 1, nullptr));
    if (!storage) return PyErr_Clear();
    const auto number = [&](const object& method) { return PyLong_AsLongLong(call(method, source).ptr()); };
    int64_t last = number(torch.storage_offset), item_size;
    bool is_empty = false;
    const auto add = [&](int64_t size, int64_t stride) { is_empty |= size == 0, last += (size - 1) * stride; };
    gptcore::dlpack::DLTensor t;
    if (!no_overrides && torch.view && torch.view(source.ptr(), &t) == 0) {
      for (int i = 0; i < t.ndim; ++i) add(t.shape[i], t.strides[i]);
      item_size = t.dtype.bits * t.dtype.lanes / 8;
    } else {
      PyErr_Clear();
      if (call(torch.is_cpu, source).ptr() != Py_True && call(torch.is_cuda, source).ptr() != Py_True) return;
      const object shape = call(torch.shape, source), strides = call(torch.stride, source);
      for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(shape.ptr()); ++i)
        add(PyLong_AsLongLong(PyTuple_GET_ITEM(shape.ptr(), i)), PyLong_AsLongLong(PyTuple_GET_ITEM(strides.ptr(), i)));
      item_size = number(torch.element_size);
    }
    const int64_t end = (last + 1) * item_size, bytes = PyObject_Size(storage.ptr());
    if (PyErr_Occurred()) throw error_already_set();
    if (end > bytes && !is_empty) throw beyond_storage(end, bytes);
  }

  // Returns whether the type is Tensor or Parameter itself, which DLPack describes correctly.
  static bool is_plain(handle source) { return Torch::get().is_plain(source); }

 private:
  // Names are interned and types looked up once: a call with four tensors costs about as much as one small torch.add.
  struct Torch {
    static constexpr int kDTypes = 6;
    object tensor, parameter, dtypes[kDTypes];
    // Getters and methods of torch.Tensor and of its storage, called with the object.
    object shape, stride, dtype, is_cpu, is_cuda, get_device, data_ptr, is_neg, untyped_storage, storage_ptr;
    object storage_offset, element_size, torch_dispatch, no_torch_function;

    decltype(gptcore::dlpack::DLPackExchangeAPI::dltensor_from_py_object_no_sync) view = nullptr;

    bool is_plain(handle source) const {
      auto type = reinterpret_cast<PyObject*>(Py_TYPE(source.ptr()));
      return type == tensor.ptr() || type == parameter.ptr();
    }
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
      const auto getter = [&](const char* name) -> object { return tensor.attr(name).attr("__get__"); };
      shape = getter("shape"), dtype = getter("dtype"), is_cpu = getter("is_cpu"), is_cuda = getter("is_cuda");
      stride = tensor.attr("stride"), get_device = tensor.attr("get_device"), data_ptr = tensor.attr("data_ptr");
      is_neg = tensor.attr("is_neg"), untyped_storage = tensor.attr("untyped_storage");
      storage_offset = tensor.attr("storage_offset"), element_size = tensor.attr("element_size");
      torch_dispatch = tensor.attr("__torch_dispatch__");
      storage_ptr = torch.attr("UntypedStorage").attr("data_ptr");
      no_torch_function = torch.attr("_C").attr("DisableTorchFunctionSubclass");
    }
    static const Torch& get() {
      static const Torch* torch = new Torch();  // never freed: static destructors may run after Python's finalisation
      return *torch;
    }
  };

  // Disables __torch_function__ of subclasses.
  struct NoOverrides {
    object guard;
    explicit NoOverrides(const Torch& torch) : guard(torch.no_torch_function()) { guard.attr("__enter__")(); }
    ~NoOverrides() {
      error_scope errors;  // preserves an exception that is being propagated
      guard.attr("__exit__")(none(), none(), none());
    }
  };

  static object call(const object& method, handle self) {
    PyObject* arguments[] = {self.ptr()};
    PyObject* result = PyObject_Vectorcall(method.ptr(), arguments, 1, nullptr);
    if (!result) throw error_already_set();
    return reinterpret_steal<object>(result);
  }

  // Throws if the storage was resized or the negative bit is set: shape, strides and pointer do not show either.
  void check_memory(handle source) const {
    if (value.dtype == gptcore::DType::other || value.device_type == gptcore::Device::other || value.size() == 0) return;
    const Torch& torch = Torch::get();
    std::optional<NoOverrides> no_overrides;
    if (!is_plain(source)) no_overrides.emplace(torch);
    if (call(torch.is_neg, source).ptr() == Py_True)
      throw value_error("a tensor whose negative bit is set; call .resolve_neg() on it first");
    const object storage = call(torch.untyped_storage, source);
    const int64_t bytes = PyObject_Size(storage.ptr());
    const uintptr_t begin = PyLong_AsSize_t(call(torch.storage_ptr, storage).ptr());
    if (PyErr_Occurred()) throw error_already_set();
    int64_t last = 0;
    for (int i = 0; i < value.ndim; ++i) last += (value.shape[i] - 1) * value.strides[i];
    const int64_t end = reinterpret_cast<uintptr_t>(value.data) - begin + (last + 1) * gptcore::item_size(value.dtype);
    if (begin == 0 || end < 0 || end > bytes) throw beyond_storage(end, bytes);
  }

  static value_error beyond_storage(int64_t end, int64_t bytes) {
    return value_error("a tensor that ends at byte " + std::to_string(end) + " of its storage, which has " +
                       std::to_string(bytes) + ": the storage was resized; resize it back or make a new tensor");
  }

  // Returns false for tensors that DLPack cannot describe; the Python attributes are read instead.
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
