#include "csrc/forward.h"

namespace gptcore {
namespace {

GeluArgs common_args(const TensorView& x, const OptionalView& bias, bool tanh_form, const Execution& execution) {
  const auto [rows, width] = check_rows(x, "x");
  GeluArgs args{};
  args.dtype = x.dtype;
  args.tanh_form = tanh_form;
  args.rows = rows, args.width = width;
  args.x = x.data;
  args.bias = float_array(bias, "bias", x, {args.width});
  args.num_threads = execution.num_threads, args.stream = execution.stream;
  return args;
}

void gelu_forward(const TensorView& x, const OptionalView& bias, const TensorView& out, bool tanh_form,
                  const Execution& execution) {
  const GeluArgs args = gelu_forward_args(x, bias, out, tanh_form, execution);
  const Kernels& kernels = kernels_for(x, execution);
  if (execution.check_only) return;
  DeviceTensors tensors{{"x", x, Access::read}, {"bias", bias, Access::read}, {"out", out, Access::write}};
  py::gil_scoped_release release;
  prefer_huge_pages(out);
  kernels.gelu_forward(args);
}

void gelu_backward(const TensorView& grad_out, const TensorView& x, const OptionalView& bias, const TensorView& grad_x,
                   const OptionalView& grad_bias, bool tanh_form, const Execution& execution) {
  GeluArgs args = common_args(x, bias, tanh_form, execution);
  if (bias.has_value() != grad_bias.has_value()) refuse("bias and grad_bias must be given together");
  check_like(grad_out, "grad_out", x);
  check_like(grad_x, "grad_x", x);
  args.grad_out = grad_out.data, args.grad_x = grad_x.data;
  args.grad_bias = float_array(grad_bias, "grad_bias", x, {args.width});
  check_apart(grad_x, "grad_x", x, "x");
  const Kernels& kernels = kernels_for(x, execution);
  if (execution.check_only) return;
  Workspace workspace(execution, x, kernels.gelu_backward_workspace(args));
  args.workspace = workspace.as<float>();
  DeviceTensors tensors{{"grad_out", grad_out, Access::read}, {"x", x, Access::read},
                        {"bias", bias, Access::read},         {"grad_x", grad_x, Access::write},
                        {"grad_bias", grad_bias, Access::write}, {"workspace", workspace.view(), Access::write}};
  py::gil_scoped_release release;
  prefer_huge_pages(grad_x);
  kernels.gelu_backward(args);
}

}  // namespace

GeluArgs gelu_forward_args(const TensorView& x, const OptionalView& bias, const TensorView& out, bool tanh_form,
                           const Execution& execution) {
  GeluArgs args = common_args(x, bias, tanh_form, execution);
  check_like(out, "out", x);
  args.out = out.data;
  check_apart(out, "out", x, "x");
  return args;
}

void bind_gelu(py::module_& m) {
  m.def("gelu_forward", &gelu_forward, py::arg("x"), py::arg("bias"), py::arg("out"), py::arg("tanh_form"),
        py::arg("execution"));
  m.def("gelu_backward", &gelu_backward, py::arg("grad_out"), py::arg("x"), py::arg("bias"), py::arg("grad_x"),
        py::arg("grad_bias"), py::arg("tanh_form"), py::arg("execution"));
}

}  // namespace gptcore
