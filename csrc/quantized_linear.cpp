#include "csrc/forward.h"

namespace gptcore {

QuantizedLinearArgs quantized_linear_forward_args(const TensorView& x, const TensorView& weight,
                                                  const std::string& kind, const OptionalView& bias,
                                                  const TensorView& out, const Execution& execution) {
  constexpr int64_t kBlock = 32;
  QuantizedLinearArgs args{};
  if (kind == "q8_0") args.type = BlockType::q8_0;
  else if (kind == "q4_0") args.type = BlockType::q4_0;
  else refuse("kind is ", kind, ", expected q8_0 or q4_0");
  const int64_t bytes = args.type == BlockType::q8_0 ? 34 : 18;
  for (const auto& [t, name] : {std::pair(&x, "x"), std::pair(&weight, "weight"), std::pair(&out, "out")}) {
    check_device(*t, name, x);
    check_contiguous(*t, name);
  }
  check_dtype(weight, "weight", DType::uint8, "torch.uint8");
  if (weight.ndim != 2 || weight.shape[1] % bytes != 0)
    refuse("weight has shape ", shape_text(weight.shape, weight.ndim), ", expected (out_features, blocks x ", bytes,
           ")");
  args.num_threads = execution.num_threads;
  args.out_features = weight.shape[0], args.in_features = weight.shape[1] / bytes * kBlock;
  const Rows in = check_rows(x, "x"), result = check_rows(out, "out");
  if (x.ndim < 1 || in.width != args.in_features)
    refuse("x has shape ", shape_text(x.shape, x.ndim), ", expected rows of ", args.in_features);
  if (out.ndim < 1 || result.width != args.out_features || result.rows != in.rows)
    refuse("out has shape ", shape_text(out.shape, out.ndim), ", expected ", in.rows, " rows of ", args.out_features);
  args.rows = in.rows;
  args.x = {x.data, x.dtype, in.width}, args.out = {out.data, out.dtype, result.width};
  args.weight = weight.as<uint8_t>();
  check_apart(out, "out", x, "x");
  check_apart(out, "out", weight, "weight");
  if (bias) {
    check_device(*bias, "bias", x);
    check_float(*bias, "bias");
    check_shape(*bias, "bias", {args.out_features});
    check_contiguous(*bias, "bias");
    check_apart(out, "out", *bias, "bias");
    args.bias = bias->data, args.bias_dtype = bias->dtype;
  }
  return args;
}

namespace {

// Computes out = x @ weight^T + bias, where weight holds rows of GGUF's blocks.
void quantized_linear_forward(const TensorView& x, const TensorView& weight, const std::string& kind,
                              const OptionalView& bias, const TensorView& out, const Execution& execution) {
  QuantizedLinearArgs args = quantized_linear_forward_args(x, weight, kind, bias, out, execution);
  const Kernels& kernels = kernels_for(x, execution);
  if (execution.check_only) return;
  if (!kernels.quantized_linear) check_cpu(x, "x");
  const Workspace workspace(kernels.quantized_linear_workspace(args));
  args.workspace = workspace.as<char>();
  py::gil_scoped_release release;
  kernels.quantized_linear(args);
}

}  // namespace

void bind_quantized_linear(py::module_& m) {
  m.def("quantized_linear_forward", &quantized_linear_forward, py::arg("x"), py::arg("weight"), py::arg("kind"),
        py::arg("bias"), py::arg("out"), py::arg("execution"));
}

}  // namespace gptcore
