// Checks of tensors before a kernel gets their pointers, and `refuse`, which raises ValueError.
#pragma once

#include <algorithm>
#include <initializer_list>
#include <optional>
#include <string>

#include "csrc/tensor_view.h"

namespace gptcore {

template <class... Parts>
[[noreturn]] void refuse(const Parts&... parts) {
  std::string message;
  auto append = [&](const auto& part) {
    if constexpr (std::is_arithmetic_v<std::decay_t<decltype(part)>>) message += std::to_string(part);
    else message += part;
  };
  (append(parts), ...);
  throw pybind11::value_error(message);
}

inline std::string shape_text(const int64_t* shape, int ndim) {
  std::string text = "(";
  for (int i = 0; i < ndim; ++i) text += (i ? ", " : "") + std::to_string(shape[i]);
  return text + ")";
}

inline void check_device(const TensorView& t, const char* name, const TensorView& like) {
  if (t.device_type != like.device_type || t.device_index != like.device_index)
    refuse(name, " is on ", t.device(), ", expected ", like.device());
}
inline void check_cpu(const TensorView& t, const char* name) {
  if (t.device_type != Device::cpu) refuse(name, " is on ", t.device(), ", but this kernel runs on the CPU; move it with .cpu()");
}

inline void check_float(const TensorView& t, const char* name) {
  if (t.dtype != DType::float32 && t.dtype != DType::bfloat16 && t.dtype != DType::float16)
    refuse(name, " is ", t.dtype_name(), ", expected torch.float32, torch.bfloat16 or torch.float16");
}

inline void check_dtype(const TensorView& t, const char* name, DType dtype, const char* expected) {
  if (t.dtype != dtype) refuse(name, " is ", t.dtype_name(), ", expected ", expected);
}
inline void check_same_dtype(const TensorView& t, const char* name, const TensorView& like) {
  if (t.dtype != like.dtype) refuse(name, " is ", t.dtype_name(), ", expected ", like.dtype_name());
}

inline void check_shape(const TensorView& t, const char* name, std::initializer_list<int64_t> shape) {
  bool same = t.ndim == static_cast<int>(shape.size());
  for (int i = 0; same && i < t.ndim; ++i) same = t.shape[i] == shape.begin()[i];
  if (!same)
    refuse(name, " has shape ", shape_text(t.shape, t.ndim), ", expected ",
           shape_text(shape.begin(), static_cast<int>(shape.size())));
}

inline void check_contiguous(const TensorView& t, const char* name) {
  if (t.size() == 0) return;
  int64_t stride = 1;
  for (int i = t.ndim - 1; i >= 0; --i) {
    if (t.shape[i] != 1 && t.strides[i] != stride) refuse(name, " is not contiguous; call .contiguous() on it first");
    stride *= t.shape[i];
  }
}

// Requires a dense tensor with the device and the shape of `like`.
inline void check_dense_like(const TensorView& t, const char* name, const TensorView& like) {
  check_device(t, name, like);
  if (t.ndim != like.ndim || !std::equal(t.shape, t.shape + t.ndim, like.shape))
    refuse(name, " has shape ", shape_text(t.shape, t.ndim), ", expected ", shape_text(like.shape, like.ndim));
  check_contiguous(t, name);
}
// As check_dense_like, and with the same dtype.
inline void check_like(const TensorView& t, const char* name, const TensorView& like) {
  check_same_dtype(t, name, like);
  check_dense_like(t, name, like);
}

// Returns a dense tensor (..., width) of one of the three float types as a matrix; a scalar becomes (1, 1).
struct Rows { int64_t rows, width; };
inline Rows check_rows(const TensorView& t, const char* name) {
  check_float(t, name);
  check_contiguous(t, name);
  int64_t rows = 1;
  for (int i = 0; i + 1 < t.ndim; ++i) rows *= t.shape[i];
  return {rows, t.ndim ? t.shape[t.ndim - 1] : 1};
}

// Returns the elements of a dense float32 tensor of this shape on the device of `like`, or null for an absent optional
// tensor.
inline float* float_array(const TensorView& t, const char* name, const TensorView& like,
                          std::initializer_list<int64_t> shape) {
  check_device(t, name, like);
  check_dtype(t, name, DType::float32, "torch.float32");
  check_shape(t, name, shape);
  check_contiguous(t, name);
  return t.as<float>();
}
inline float* float_array(const std::optional<TensorView>& t, const char* name, const TensorView& like,
                          std::initializer_list<int64_t> shape) {
  return t ? float_array(*t, name, like, shape) : nullptr;
}

// Requires that no two elements share memory, as those of an expanded tensor do: outputs would be written twice.
inline void check_distinct(const TensorView& t, const char* name) {
  if (t.size() == 0) return;
  std::pair<int64_t, int64_t> dims[kMaxDims];  // (stride, shape), by stride
  for (int i = 0; i < t.ndim; ++i) dims[i] = {t.strides[i], t.shape[i]};
  for (int i = 1; i < t.ndim; ++i)
    for (int j = i; j > 0 && dims[j] < dims[j - 1]; --j) std::swap(dims[j], dims[j - 1]);
  int64_t last = 0;  // the furthest element of the dimensions so far
  for (int i = 0; i < t.ndim; ++i) {
    if (dims[i].second == 1) continue;
    if (dims[i].first <= last) refuse(name, " shares memory with itself; expected a tensor that is not expanded");
    last += (dims[i].second - 1) * dims[i].first;
  }
}

// Sets the range [begin, end) of bytes that a view can touch. Strides of a torch.Tensor are never negative.
inline void byte_range(const TensorView& t, uintptr_t* begin, uintptr_t* end) {
  int64_t last = 0;
  for (int i = 0; i < t.ndim; ++i) last += (t.shape[i] - 1) * t.strides[i];
  *begin = reinterpret_cast<uintptr_t>(t.data);
  *end = *begin + (t.size() > 0 ? (last + 1) * item_size(t.dtype) : 0);
}

// Requires that an output shares no memory with an input: kernels read inputs after they have begun to write.
inline void check_apart(const TensorView& out, const char* out_name, const TensorView& in, const char* in_name) {
  uintptr_t out_begin, out_end, in_begin, in_end;
  byte_range(out, &out_begin, &out_end);
  byte_range(in, &in_begin, &in_end);
  if (out_begin < in_end && in_begin < out_end) refuse(out_name, " shares memory with ", in_name);
}

inline int check_threads(int64_t num_threads) {
  if (num_threads < 1 || num_threads > 4096) refuse("num_threads is ", num_threads, ", expected 1 to 4096");
  return static_cast<int>(num_threads);
}

}  // namespace gptcore
