#include "csrc/cpu_isa.h"
#include "csrc/forward.h"

namespace gptcore {
namespace {

// Requires an operand or result of matrix products in `dtype`: on the CPU, in `dtype` or float32.
void check_operand(const TensorView& t, const char* name, DType dtype) {
  check_cpu(t, name);
  check_float(t, name);
  if (t.dtype != dtype && t.dtype != DType::float32)
    refuse(name, " is ", t.dtype_name(), ", expected torch.float32 or the dtype of the output");
}

// Returns a tensor (..., columns) as a matrix with `rows` rows. It is dense, or a matrix with dense rows.
Matrix as_rows(const TensorView& t, const char* name, DType dtype, int64_t rows, int64_t columns) {
  check_operand(t, name, dtype);
  if (t.ndim < 1 || t.shape[t.ndim - 1] != columns || t.size() != rows * columns)
    refuse(name, " has shape ", shape_text(t.shape, t.ndim), ", expected ", rows, " rows of ", columns);
  if (t.ndim == 2 && t.strides[0] > columns && (columns == 1 || t.strides[1] == 1))
    return {t.data, t.dtype, t.strides[0]};
  check_contiguous(t, name);
  return {t.data, t.dtype, columns};
}

LinearArgs common_args(DType dtype, int64_t rows, int64_t in_features, int64_t out_features, int64_t num_threads) {
  LinearArgs args{};
  args.dtype = dtype;
  args.rows = rows, args.in_features = in_features, args.out_features = out_features;
  args.num_threads = check_threads(num_threads);
  return args;
}

// Returns the number of rows of a tensor (..., columns).
int64_t rows_of(const TensorView& t, const char* name) {
  if (t.ndim < 1) refuse(name, " has shape (), expected one dimension or more");
  int64_t rows = 1;
  for (int i = 0; i + 1 < t.ndim; ++i) rows *= t.shape[i];
  return rows;
}

void check_weight(const TensorView& t, const char* name) {
  if (t.ndim != 2) refuse(name, " has shape ", shape_text(t.shape, t.ndim), ", expected (out_features, in_features)");
}

void check_bias(const TensorView& t, const char* name, const LinearArgs& args) {
  check_operand(t, name, args.dtype);
  check_shape(t, name, {args.out_features});
  check_contiguous(t, name);
}

void run(LinearArgs& args, std::initializer_list<const OptionalView*> outputs) {
  const Kernels& kernels = cpu_kernels();
  const Workspace workspace(kernels.linear_workspace(args));
  args.workspace = workspace.as<char>();
  py::gil_scoped_release release;
  for (const OptionalView* output : outputs) prefer_huge_pages(*output);
  kernels.linear(args);
}

}  // namespace

LinearArgs linear_forward_args(const TensorView& x, const TensorView& weight, const OptionalView& bias,
                               const TensorView& out, int64_t num_threads) {
  check_weight(weight, "weight");
  LinearArgs args = common_args(out.dtype, rows_of(x, "x"), weight.shape[1], weight.shape[0], num_threads);
  args.x = as_rows(x, "x", args.dtype, args.rows, args.in_features);
  args.weight = as_rows(weight, "weight", args.dtype, args.out_features, args.in_features);
  args.out = as_rows(out, "out", args.dtype, args.rows, args.out_features);
  check_apart(out, "out", x, "x");
  check_apart(out, "out", weight, "weight");
  if (bias) {
    check_bias(*bias, "bias", args);
    check_apart(out, "out", *bias, "bias");
    args.bias = bias->data, args.bias_dtype = bias->dtype;
  }
  return args;
}

namespace {

// Computes out = x @ weight^T + bias, as F.linear does.
void linear_forward(const TensorView& x, const TensorView& weight, const OptionalView& bias, const TensorView& out,
                    int64_t num_threads) {
  LinearArgs args = linear_forward_args(x, weight, bias, out, num_threads);
  const OptionalView output = out;
  run(args, {&output});
}

// Computes the gradients that are given; grad_weight needs x, and grad_x needs weight. With `scale`, adds scale times
// the gradient to a float32 grad_weight.
void linear_backward(const TensorView& grad_out, const OptionalView& x, const OptionalView& weight,
                     const OptionalView& grad_x, const OptionalView& grad_weight, const OptionalView& grad_bias,
                     std::optional<double> scale, int64_t num_threads) {
  if (scale && !grad_weight) refuse("scale is given, but grad_weight is None");
  if (scale) check_dtype(*grad_weight, "grad_weight", DType::float32, "torch.float32 with a scale");
  if (grad_x.has_value() > weight.has_value()) refuse("weight is None, but grad_x needs it");
  if (grad_weight.has_value() > x.has_value()) refuse("x is None, but grad_weight needs it");
  if (weight) check_weight(*weight, "weight");
  if (grad_weight) check_weight(*grad_weight, "grad_weight");
  const int64_t rows = rows_of(grad_out, "grad_out");
  const int64_t in_features = weight ? weight->shape[1] : grad_weight ? grad_weight->shape[1] : 0;
  LinearArgs args = common_args(grad_out.dtype, rows, in_features, grad_out.shape[grad_out.ndim - 1], num_threads);
  args.grad_out = as_rows(grad_out, "grad_out", args.dtype, rows, args.out_features);
  args.accumulate = scale.has_value(), args.scale = static_cast<float>(scale.value_or(1.0));
  if (grad_x) {
    args.weight = as_rows(*weight, "weight", args.dtype, args.out_features, in_features);
    args.grad_x = as_rows(*grad_x, "grad_x", args.dtype, rows, in_features);
    check_apart(*grad_x, "grad_x", *weight, "weight");
  }
  if (grad_weight) {
    args.x = as_rows(*x, "x", args.dtype, rows, in_features);
    args.grad_weight = as_rows(*grad_weight, "grad_weight", args.dtype, args.out_features, in_features);
    check_apart(*grad_weight, "grad_weight", *x, "x");
    if (grad_x) check_apart(*grad_weight, "grad_weight", *weight, "weight"), check_apart(*grad_x, "grad_x", *x, "x");
  }
  if (grad_bias) {
    check_bias(*grad_bias, "grad_bias", args);
    args.grad_bias = grad_bias->data, args.bias_dtype = grad_bias->dtype;
  }
  const std::pair<const OptionalView*, const char*> outputs[] = {
      {&grad_x, "grad_x"}, {&grad_weight, "grad_weight"}, {&grad_bias, "grad_bias"}};
  for (const auto& [output, name] : outputs) {
    if (!*output) continue;
    check_apart(**output, name, grad_out, "grad_out");
    for (const auto& [other, other_name] : outputs)
      if (other != output && *other) check_apart(**output, name, **other, other_name);
  }
  run(args, {&grad_x, &grad_weight, &grad_bias});
}

}  // namespace

void bind_linear(py::module_& m) {
  m.def("linear_forward", &linear_forward, py::arg("x"), py::arg("weight"), py::arg("bias"), py::arg("out"),
        py::arg("num_threads"));
  m.def("linear_backward", &linear_backward, py::arg("grad_out"), py::arg("x"), py::arg("weight"), py::arg("grad_x"),
        py::arg("grad_weight"), py::arg("grad_bias"), py::arg("scale"), py::arg("num_threads"));
}

}  // namespace gptcore
