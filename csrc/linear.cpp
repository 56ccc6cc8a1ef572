#include "csrc/checks.h"
#include "csrc/cpu_isa.h"
#include "csrc/execution.h"
#include "csrc/ops.h"
#include "csrc/pages.h"

namespace gptcore {
namespace {

// What products in `dtype` take, and give.
void check_operand(const TensorView& t, const char* name, DType dtype) {
  check_cpu(t, name);
  check_float(t, name);
  if (t.dtype != dtype && t.dtype != DType::float32)
    refuse(name, " is ", t.dtype_name(), ", expected torch.float32 or the dtype of the output");
  check_contiguous(t, name);
}

// A tensor (..., columns) as so many rows.
Matrix as_rows(const TensorView& t, const char* name, DType dtype, int64_t rows, int64_t columns) {
  check_operand(t, name, dtype);
  if (t.ndim < 1 || t.shape[t.ndim - 1] != columns || t.size() != rows * columns)
    refuse(name, " has shape ", shape_text(t.shape, t.ndim), ", expected ", rows, " rows of ", columns);
  return {t.data, t.dtype, columns};
}

LinearArgs common_args(const TensorView& x, const TensorView& weight, DType dtype, int64_t num_threads) {
  LinearArgs args{};
  args.dtype = dtype;
  if (x.ndim < 1) refuse("x has shape (), expected (..., in_features)");
  if (weight.ndim != 2)
    refuse("weight has shape ", shape_text(weight.shape, weight.ndim), ", expected (out_features, in_features)");
  args.rows = 1, args.out_features = weight.shape[0], args.in_features = weight.shape[1];
  for (int i = 0; i + 1 < x.ndim; ++i) args.rows *= x.shape[i];
  args.x = as_rows(x, "x", dtype, args.rows, args.in_features);
  args.weight = as_rows(weight, "weight", dtype, args.out_features, args.in_features);
  args.num_threads = check_threads(num_threads);
  return args;
}

void check_bias(const TensorView& t, const char* name, const LinearArgs& args) {
  check_operand(t, name, args.dtype);
  check_shape(t, name, {args.out_features});
}

void run(LinearArgs& args) {
  const Kernels& kernels = cpu_kernels();
  const Workspace workspace(kernels.linear_workspace(args));
  args.workspace = workspace.as<char>();
  pybind11::gil_scoped_release release;
  kernels.linear(args);
}

}  // namespace

void linear_forward(const TensorView& x, const TensorView& weight, const OptionalView& bias, const TensorView& out,
                    int64_t num_threads) {
  LinearArgs args = common_args(x, weight, out.dtype, num_threads);
  args.out = as_rows(out, "out", out.dtype, args.rows, args.out_features);
  check_apart(out, "out", x, "x");
  check_apart(out, "out", weight, "weight");
  if (bias) {
    check_bias(*bias, "bias", args);
    check_apart(out, "out", *bias, "bias");
    args.bias = bias->data, args.bias_dtype = bias->dtype;
  }
  prefer_huge_pages(out);
  run(args);
}

void linear_backward(const TensorView& grad_out, const TensorView& x, const TensorView& weight,
                     const OptionalView& grad_x, const OptionalView& grad_weight, const OptionalView& grad_bias,
                     int64_t num_threads) {
  LinearArgs args = common_args(x, weight, grad_out.dtype, num_threads);
  args.grad_out = as_rows(grad_out, "grad_out", grad_out.dtype, args.rows, args.out_features);
  auto check_output = [&](const TensorView& t, const char* name) {
    check_apart(t, name, grad_out, "grad_out");
    check_apart(t, name, x, "x");
    check_apart(t, name, weight, "weight");
    prefer_huge_pages(t);
  };
  if (grad_x) {
    check_like(*grad_x, "grad_x", x);
    check_output(*grad_x, "grad_x");
    args.grad_x = as_rows(*grad_x, "grad_x", args.dtype, args.rows, args.in_features);
  }
  if (grad_weight) {
    check_like(*grad_weight, "grad_weight", weight);
    check_output(*grad_weight, "grad_weight");
    args.grad_weight = as_rows(*grad_weight, "grad_weight", args.dtype, args.out_features, args.in_features);
  }
  if (grad_bias) {
    check_bias(*grad_bias, "grad_bias", args);
    check_output(*grad_bias, "grad_bias");
    args.grad_bias = grad_bias->data, args.bias_dtype = grad_bias->dtype;
  }
  run(args);
}

}  // namespace gptcore
