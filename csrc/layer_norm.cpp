#include "csrc/checks.h"
#include "csrc/device_tensors.h"
#include "csrc/ops.h"
#include "csrc/pages.h"

namespace gptcore {

void layer_norm_forward(const TensorView& x, const OptionalView& residual, const TensorView& weight,
                        const OptionalView& bias, const TensorView& out, const OptionalView& sum,
                        const TensorView& mean, const TensorView& rstd, double eps, const Execution& execution) {
  check_matrix(x, "x");
  int64_t rows = x.shape[0], width = x.shape[1];
  const TensorView& normalised = residual ? *residual : x;
  const Kernels& kernels = kernels_for(x, execution);
  if (residual) {
    if (residual->dtype != x.dtype && residual->dtype != DType::float32)
      refuse("residual is ", residual->dtype_name(), ", expected ", x.dtype_name(), " like x, or torch.float32");
    check_matrix(*residual, "residual");
    check_device(*residual, "residual", x);
    check_shape(*residual, "residual", {rows, width});
  }
  if (residual.has_value() != sum.has_value()) refuse("residual and sum must be given together");
  if (sum) check_like(*sum, "sum", normalised);
  check_like(out, "out", normalised);
  check_apart(out, "out", x, "x");
  if (sum) check_apart(*sum, "sum", out, "out");

  LayerNormArgs args{};
  args.dtype = x.dtype, args.residual_dtype = normalised.dtype;
  args.rows = rows, args.width = width;
  args.x = x.data, args.residual = residual ? residual->data : nullptr;
  args.weight = float_array(weight, "weight", x, {width});
  args.bias = float_array(bias, "bias", x, {width});
  args.out = out.data, args.sum = sum ? sum->data : nullptr;
  args.mean = float_array(mean, "mean", x, {rows});
  args.rstd = float_array(rstd, "rstd", x, {rows});
  args.eps = static_cast<float>(eps);
  args.num_threads = execution.num_threads, args.stream = execution.stream;
  DeviceTensors tensors{{"x", x, Access::read},           {"residual", residual, Access::read},
                        {"weight", weight, Access::read}, {"bias", bias, Access::read},
                        {"out", out, Access::write},      {"sum", sum, Access::write},
                        {"mean", mean, Access::write},    {"rstd", rstd, Access::write}};
  pybind11::gil_scoped_release release;
  prefer_huge_pages(out);
  prefer_huge_pages(sum);
  kernels.layer_norm_forward(args);
}

void layer_norm_backward(const TensorView& grad_out, const OptionalView& grad_sum, const TensorView& x,
                         const TensorView& weight, const TensorView& mean, const TensorView& rstd,
                         const TensorView& grad_x, const TensorView& grad_weight, const OptionalView& grad_bias,
                         const Execution& execution) {
  check_matrix(x, "x");
  int64_t rows = x.shape[0], width = x.shape[1];
  const Kernels& kernels = kernels_for(x, execution);
  check_like(grad_out, "grad_out", x);
  if (grad_sum) check_like(*grad_sum, "grad_sum", x);
  check_like(grad_x, "grad_x", x);
  check_apart(grad_x, "grad_x", x, "x");

  LayerNormArgs args{};
  args.dtype = args.residual_dtype = x.dtype;
  args.rows = rows, args.width = width;
  args.x = x.data, args.grad_out = grad_out.data, args.grad_sum = grad_sum ? grad_sum->data : nullptr;
  args.weight = float_array(weight, "weight", x, {width});
  args.mean = float_array(mean, "mean", x, {rows});
  args.rstd = float_array(rstd, "rstd", x, {rows});
  args.grad_x = grad_x.data;
  args.grad_weight = float_array(grad_weight, "grad_weight", x, {width});
  args.grad_bias = float_array(grad_bias, "grad_bias", x, {width});
  args.num_threads = execution.num_threads, args.stream = execution.stream;
  Workspace workspace(execution, x, kernels.layer_norm_backward_workspace(args));
  args.workspace = workspace.as<float>();
  DeviceTensors tensors{{"grad_out", grad_out, Access::read},       {"grad_sum", grad_sum, Access::read},
                        {"x", x, Access::read},                     {"weight", weight, Access::read},
                        {"mean", mean, Access::read},               {"rstd", rstd, Access::read},
                        {"grad_x", grad_x, Access::write},          {"grad_weight", grad_weight, Access::write},
                        {"grad_bias", grad_bias, Access::write},    {"workspace", workspace.view(), Access::write}};
  pybind11::gil_scoped_release release;
  prefer_huge_pages(grad_x);
  kernels.layer_norm_backward(args);
}

}  // namespace gptcore
