#include "csrc/forward.h"

namespace gptcore {

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
  check_like(out, "out", normalised);
  check_apart(out, "out", x, "x");
  if (residual_out) check_apart(*residual_out, "residual_out", out, "out");

  LayerNormArgs args{};
  args.dtype = x.dtype, args.residual_dtype = normalised.dtype;
  args.rows = rows, args.width = width;
  args.x = x.data, args.residual = residual ? residual->data : nullptr;
  args.weight = float_array(weight, "weight", x, {width});
  args.bias = float_array(bias, "bias", x, {width});
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
                         const TensorView& grad_x, const TensorView& grad_weight, const OptionalView& grad_bias,
                         const Execution& execution) {
  const auto [rows, width] = check_rows(x, "x");
  const Kernels& kernels = kernels_for(x, execution);
  check_like(grad_out, "grad_out", x);
  if (grad_residual_out) check_like(*grad_residual_out, "grad_residual_out", x);
  check_like(grad_x, "grad_x", x);
  check_apart(grad_x, "grad_x", x, "x");

  LayerNormArgs args{};
  args.dtype = args.residual_dtype = x.dtype;
  args.rows = rows, args.width = width;
  args.x = x.data, args.grad_out = grad_out.data;
  args.grad_residual_out = grad_residual_out ? grad_residual_out->data : nullptr;
  args.weight = float_array(weight, "weight", x, {width});
  args.mean = float_array(mean, "mean", x, {rows});
  args.rstd = float_array(rstd, "rstd", x, {rows});
  args.grad_x = grad_x.data;
  args.grad_weight = float_array(grad_weight, "grad_weight", x, {width});
  args.grad_bias = float_array(grad_bias, "grad_bias", x, {width});
  args.num_threads = execution.num_threads, args.stream = execution.stream;
  if (execution.check_only) return;
  Workspace workspace(execution, x, kernels.layer_norm_backward_workspace(args));
  args.workspace = workspace.as<float>();
  DeviceTensors tensors{{"grad_out", grad_out, Access::read},       {"grad_residual_out", grad_residual_out, Access::read},
                        {"x", x, Access::read},                     {"weight", weight, Access::read},
                        {"mean", mean, Access::read},               {"rstd", rstd, Access::read},
                        {"grad_x", grad_x, Access::write},          {"grad_weight", grad_weight, Access::write},
                        {"grad_bias", grad_bias, Access::write},    {"workspace", workspace.view(), Access::write}};
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
        py::arg("weight"), py::arg("mean"), py::arg("rstd"), py::arg("grad_x"), py::arg("grad_weight"),
        py::arg("grad_bias"), py::arg("execution"));
}

}  // namespace gptcore
