// gptcore._C: the list of all that Python can call. The checks and the work are in the files that it names.
#include <omp.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdlib>

#include "csrc/cpu_isa.h"
#include "csrc/ops.h"

namespace py = pybind11;
using namespace gptcore;

PYBIND11_MODULE(_C, m, py::mod_gil_not_used()) {
  m.doc() = "The native kernels of gptcore. Use gptcore.ops, which checks, differentiates and chooses among backends.";
  if (const char* isa = std::getenv("GPTCORE_CPU_ISA")) {
    try {
      use_isa(isa);
    } catch (const std::invalid_argument& error) {
      throw py::import_error("GPTCORE_CPU_ISA: " + std::string(error.what()));
    }
  }

  auto options = [](const OptionalView& cu_seqlens_q, const OptionalView& cu_seqlens_k, double scale, bool causal,
                    int64_t window_left, int64_t window_right, double dropout_p, uint64_t seed, int64_t num_threads) {
    return AttentionOptions{cu_seqlens_q, cu_seqlens_k, scale,     causal, window_left,
                            window_right, dropout_p,    seed, num_threads};
  };
  m.def(
      "attention_forward",
      [options](const TensorView& query, const TensorView& key, const TensorView& value, const TensorView& out,
                const TensorView& lse, const OptionalView& cu_seqlens_q, const OptionalView& cu_seqlens_k, double scale,
                bool causal, int64_t window_left, int64_t window_right, double dropout_p, uint64_t seed,
                int64_t num_threads) {
        attention_forward(query, key, value, out, lse,
                          options(cu_seqlens_q, cu_seqlens_k, scale, causal, window_left, window_right, dropout_p, seed,
                                  num_threads));
      },
      py::arg("query"), py::arg("key"), py::arg("value"), py::arg("out"), py::arg("lse"), py::arg("cu_seqlens_q"),
      py::arg("cu_seqlens_k"), py::arg("scale"), py::arg("causal"), py::arg("window_left"), py::arg("window_right"),
      py::arg("dropout_p"), py::arg("seed"), py::arg("num_threads"));
  m.def(
      "attention_backward",
      [options](const TensorView& grad_out, const OptionalView& grad_lse, const TensorView& query,
                const TensorView& key, const TensorView& value, const TensorView& out, const TensorView& lse,
                const TensorView& grad_query, const TensorView& grad_key, const TensorView& grad_value,
                const OptionalView& cu_seqlens_q, const OptionalView& cu_seqlens_k, double scale, bool causal,
                int64_t window_left, int64_t window_right, double dropout_p, uint64_t seed, int64_t num_threads) {
        attention_backward(grad_out, grad_lse, query, key, value, out, lse, grad_query, grad_key, grad_value,
                           options(cu_seqlens_q, cu_seqlens_k, scale, causal, window_left, window_right, dropout_p,
                                   seed, num_threads));
      },
      py::arg("grad_out"), py::arg("grad_lse"), py::arg("query"), py::arg("key"), py::arg("value"), py::arg("out"),
      py::arg("lse"), py::arg("grad_query"), py::arg("grad_key"), py::arg("grad_value"), py::arg("cu_seqlens_q"),
      py::arg("cu_seqlens_k"), py::arg("scale"), py::arg("causal"), py::arg("window_left"), py::arg("window_right"),
      py::arg("dropout_p"), py::arg("seed"), py::arg("num_threads"));
  m.def(
      "segments",
      [](const TensorView& cu_seqlens_q, const TensorView& cu_seqlens_k, int64_t batch, int64_t query_len,
         int64_t kv_len) {
        py::list segments;
        for (const Segment& s : make_segments(cu_seqlens_q, cu_seqlens_k, batch, query_len, kv_len))
          segments.append(py::make_tuple(s.batch, s.query_begin, s.query_len, s.key_begin, s.key_len));
        return segments;
      },
      py::arg("cu_seqlens_q"), py::arg("cu_seqlens_k"), py::arg("batch"), py::arg("query_len"), py::arg("kv_len"),
      "The segments (batch, query_begin, query_len, key_begin, key_len) that the boundaries mean.");

  m.def("layer_norm_forward", &layer_norm_forward, py::arg("x"), py::arg("residual"), py::arg("weight"),
        py::arg("bias"), py::arg("out"), py::arg("sum"), py::arg("mean"), py::arg("rstd"), py::arg("eps"),
        py::arg("num_threads"));
  m.def("layer_norm_backward", &layer_norm_backward, py::arg("grad_out"), py::arg("grad_sum"), py::arg("x"),
        py::arg("weight"), py::arg("mean"), py::arg("rstd"), py::arg("grad_x"), py::arg("grad_weight"),
        py::arg("grad_bias"), py::arg("num_threads"));
  m.def("gelu_forward", &gelu_forward, py::arg("x"), py::arg("bias"), py::arg("out"), py::arg("tanh_form"),
        py::arg("num_threads"));
  m.def("gelu_backward", &gelu_backward, py::arg("grad_out"), py::arg("x"), py::arg("bias"), py::arg("grad_x"),
        py::arg("grad_bias"), py::arg("tanh_form"), py::arg("num_threads"));
  m.def("cross_entropy", &cross_entropy, py::arg("logits"), py::arg("targets"), py::arg("gradient"),
        py::arg("num_threads"));
  m.def("grad_norm", &grad_norm, py::arg("grads"), py::arg("num_threads"));
  m.def("adamw", &adamw, py::arg("params"), py::arg("grads"), py::arg("exp_avgs"), py::arg("exp_avg_sqs"),
        py::arg("steps"), py::arg("lr"), py::arg("beta1"), py::arg("beta2"), py::arg("eps"), py::arg("weight_decay"),
        py::arg("grad_scale"), py::arg("num_threads"));

  m.def("compiled_isas", &compiled_isas, "CPU instruction sets that the kernels are compiled for, lowest first.");
  m.def("supported_isas", &supported_isas, "Those of them that this CPU has, lowest first.");
  m.def("cpu_isa", [] { return std::string(cpu_kernels().isa); }, "The instruction set in use.");
  m.def("use_cpu_isa", &use_isa, py::arg("name"), "Use this instruction set from now on. Raises ValueError.");
  m.def("build_info", [] {
    py::dict info;
    info["version"] = GPTCORE_VERSION;
    info["compiler"] = GPTCORE_COMPILER;
    info["openmp"] = _OPENMP;
    return info;
  });
}
