#include "csrc/checks.h"
#include "csrc/cpu_isa.h"
#include "csrc/ops.h"
#include "csrc/workspace.h"

namespace gptcore {
namespace {

GeluArgs common_args(const TensorView& x, const OptionalView& bias, bool tanh_form, int64_t num_threads) {
  check_matrix(x, "x");
  GeluArgs args{};
  args.dtype = x.dtype;
  args.tanh_form = tanh_form;
  args.rows = x.shape[0], args.width = x.shape[1];
  args.x = x.data;
  args.bias = float_array(bias, "bias", {args.width});
  args.num_threads = check_threads(num_threads);
  return args;
}

}  // namespace

void gelu_forward(const TensorView& x, const OptionalView& bias, const TensorView& out, bool tanh_form,
                  int64_t num_threads) {
  GeluArgs args = common_args(x, bias, tanh_form, num_threads);
  check_like(out, "out", x);
  args.out = out.data;
  check_apart(out, "out", x, "x");
  pybind11::gil_scoped_release release;
  cpu_kernels().gelu_forward(args);
}

void gelu_backward(const TensorView& grad_out, const TensorView& x, const OptionalView& bias, const TensorView& grad_x,
                   const OptionalView& grad_bias, bool tanh_form, int64_t num_threads) {
  GeluArgs args = common_args(x, bias, tanh_form, num_threads);
  if (bias.has_value() != grad_bias.has_value()) refuse("bias and grad_bias must be given together");
  check_like(grad_out, "grad_out", x);
  check_like(grad_x, "grad_x", x);
  args.grad_out = grad_out.data, args.grad_x = grad_x.data;
  args.grad_bias = float_array(grad_bias, "grad_bias", {args.width});
  check_apart(grad_x, "grad_x", x, "x");
  pybind11::gil_scoped_release release;
  auto scratch = workspace<float>(bias ? row_chunks(args.rows) * args.width : 0);
  args.workspace = scratch.get();
  cpu_kernels().gelu_backward(args);
}

}  // namespace gptcore
