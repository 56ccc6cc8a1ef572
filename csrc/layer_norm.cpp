#include "csrc/forward.h"

namespace gptcore {

namespace {

// Returns the elements of weight, bias or a gradient of theirs, which have one dtype: that of the normalised tensor or
// float32, and on CPUs float32.
void* parameter(const TensorView& t, const char* name, const TensorView& normalised, const LayerNormArgs& args) {
  check_device(t, name, normalised);
  if (t.dtype != args.weight_dtype)
    refuse(name, " is ", t.dtype_name(), ", expected ",
           args.weight_dtype == DType::float32 ? "torch.float32" : normalised.dtype_name());
  check_shape(t, name, {args.width});
  check_contiguous(t, name);
  return t.data;
}
void* parameter(const OptionalView& t, const char* name, const TensorView& normalised, const LayerNormArgs& args) {
  return t ? parameter(*t, name, normalised, args) : nullptr;
}
DType weight_dtype(const TensorView& weight, const TensorView& normalised, const Execution& execution) {
  return execution.on_gpu() && weight.dtype == normalised.dtype ? weight.dtype : DType::float32;
}
// Checks out or its gradient: in the dtype of the normalised tensor or, if that is float32, in 16 bits, those of x.
void check_out(const TensorView& t, const char* name, const TensorView& normalised, DType dtype) {
  check_float(t, name);
  if (t.dtype != normalised.dtype &&
      (normalised.dtype != DType::float32 || (dtype != DType::float32 && dtype != t.dtype)))
    refuse(name, " is ", t.dtype_name(), ", expected ", normalised.dtype_name(),
           normalised.dtype == DType::float32 ? " or the dtype of x" : "");
  check_dense_like(t, name, normalised);
}

}  // namespace

LayerNormArgs layer_norm_forward_args(const TensorView& x, const OptionalView& residual, const TensorView& weight,
                                      const OptionalView& bias, const TensorView& out, const OptionalView& residual_out,
                                      const TensorView& mean, const TensorView& rstd, double eps,
                                      const Execution& execution) {
  const auto [rows, width] = check_rows(x, "x");
  const TensorView& normalised = residual ? *residual : x;
  if (residual) {
    if (residual->dtype != x.dtype && residual->dtype != DType::float32)
      refuse("residual is ", residual->dtype_name(), ", expected ", x.dtype_name(), " like x, or torch.float32");
    check_dense_like(*residual, "residual", x);
  }
  if (residual.has_value() != residual_out.has_value()) refuse("residual and residual_out must be given together");
  if (residual_out) check_like(*residual_out, "residual_out", normalised);
  check_out(out, "out", normalised, x.dtype);
  check_apart(out, "out", x, "x");
  if (residual_out) check_apart(*residual_out, "residual_out", out, "out");

  LayerNormArgs args{};
  args.dtype = x.dtype, args.residual_dtype = normalised.dtype, args.out_dtype = out.dtype;
  args.weight_dtype = weight_dtype(weight, normalised, execution);
  args.rows = rows, args.width = width;
  args.x = x.data, args.residual = residual ? residual->data : nullptr;
  args.weight = parameter(weight, "weight", normalised, args);
  args.bias = parameter(bias, "bias", normalised, args);
  args.out = out.data, args.residual_out = residual_out ? residual_out->data : nullptr;
  args.mean = float_array(mean, "mean", x, {rows});
  args.rstd = float_array(rstd, "rstd", x, {rows});
  args.eps = static_cast<float>(eps);
  args.num_threads = execution.num_threads, args.stream = execution.stream;
  return args;
}

namespace {

void layer_norm_forward(const TensorView& x, const OptionalView& residual, const TensorView& weight,
                        const OptionalView& bias, const TensorView& out, const OptionalView& residual_out,
                        const TensorView& mean, const TensorView& rstd, double eps, const Execution& execution) {
  const LayerNormArgs args =
      layer_norm_forward_args(x, residual, weight, bias, out, residual_out, mean, rstd, eps, execution);
  const Kernels& kernels = kernels_for(x, execution);
  if (execution.check_only) return;
  DeviceTensors tensors{{"x", x, Access::read},           {"residual", residual, Access::read},
                        {"weight", weight, Access::read}, {"bias", bias, Access::read},
                        {"out", out, Access::write},      {"residual_out", residual_out, Access::write},
                        {"mean", mean, Access::write},    {"rstd", rstd, Access::write}};
  py::gil_scoped_release release;
  prefer_huge_pages(out);
  prefer_huge_pages(residual_out);
  kernels.layer_norm_forward(args);
}

void layer_norm_backward(const TensorView& grad_out, const OptionalView& grad_residual_out, const TensorView& x,
                         const TensorView& weight, const TensorView& mean, const TensorView& rstd,
                         const TensorView& grad_x, const OptionalView& grad_narrow, const TensorView& grad_weight,
                         const OptionalView& grad_bias, const Execution& execution) {
  const auto [rows, width] = check_rows(x, "x");
  const Kernels& kernels = kernels_for(x, execution);
  check_out(grad_out, "grad_out", x, x.dtype);
  if (grad_residual_out) check_like(*grad_residual_out, "grad_residual_out", x);
  check_like(grad_x, "grad_x", x);
  check_apart(grad_x, "grad_x", x, "x");
  if (grad_narrow) {
    if (grad_out.dtype == x.dtype) refuse("grad_narrow is given, but grad_out is ", x.dtype_name(), " like x");
    check_like(*grad_narrow, "grad_narrow", grad_out);
    check_apart(*grad_narrow, "grad_narrow", x, "x");
    check_apart(*grad_narrow, "grad_narrow", grad_x, "grad_x");
  }

  LayerNormArgs args{};
  args.dtype = args.residual_dtype = x.dtype, args.out_dtype = grad_out.dtype;
  args.weight_dtype = weight_dtype(weight, x, execution);
  args.rows = rows, args.width = width;
  args.x = x.data, args.grad_out = grad_out.data;
  args.grad_residual_out = grad_residual_out ? grad_residual_out->data : nullptr;
  args.weight = parameter(weight, "weight", x, args);
  args.mean = float_array(mean, "mean", x, {rows});
  args.rstd = float_array(rstd, "rstd", x, {rows});
  args.grad_x = grad_x.data, args.grad_narrow = grad_narrow ? grad_narrow->data : nullptr;
  args.grad_weight = parameter(grad_weight, "grad_weight", x, args);
  args.grad_bias = parameter(grad_bias, "grad_bias", x, args);
  args.num_threads = execution.num_threads, args.stream = execution.stream;
  if (execution.check_only) return;
  Workspace workspace(execution, x, kernels.layer_norm_backward_workspace(args));
  args.workspace = workspace.as<float>();
  DeviceTensors tensors{{"grad_out", grad_out, Access::read},       {"grad_residual_out", grad_residual_out, Access::read},
                        {"x", x, Access::read},                     {"weight", weight, Access::read},
                        {"mean", mean, Access::read},               {"rstd", rstd, Access::read},
                        {"grad_x", grad_x, Access::write},          {"grad_narrow", grad_narrow, Access::write},
                        {"grad_weight", grad_weight, Access::write}, {"grad_bias", grad_bias, Access::write},
                        {"workspace", workspace.view(), Access::write}};
  py::gil_scoped_release release;
  prefer_huge_pages(grad_x);
  kernels.layer_norm_backward(args);
}

}  // namespace

void bind_layer_norm(py::module_& m) {
  m.def("layer_norm_forward", &layer_norm_forward, py::arg("x"), py::arg("residual"), py::arg("weight"),
        py::arg("bias"), py::arg("out"), py::arg("residual_out"), py::arg("mean"), py::arg("rstd"), py::arg("eps"),
        py::arg("execution"));
  m.def("layer_norm_backward", &layer_norm_backward, py::arg("grad_out"), py::arg("grad_residual_out"), py::arg("x"),
        py::arg("weight"), py::arg("mean"), py::arg("rstd"), py::arg("grad_x"), py::arg("grad_narrow"),
        py::arg("grad_weight"), py::arg("grad_bias"), py::arg("execution"));
}

}  // namespace gptcore
