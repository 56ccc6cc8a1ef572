// The operations that gptcore._C and gptcore._simt have alike, as Python calls them.
#include <pybind11/stl.h>

#include "csrc/ops.h"

namespace py = pybind11;

namespace gptcore {

void bind_ops(py::module_& m) {
  auto options = [](const OptionalView& cu_seqlens_q, const OptionalView& cu_seqlens_k, double scale, bool causal,
                    int64_t window_left, int64_t window_right, double dropout_p, uint64_t seed) {
    return AttentionOptions{cu_seqlens_q, cu_seqlens_k, scale, causal, window_left, window_right, dropout_p, seed};
  };
  m.def(
      "attention_forward",
      [options](const TensorView& query, const TensorView& key, const TensorView& value, const TensorView& out,
                const TensorView& lse, const OptionalView& cu_seqlens_q, const OptionalView& cu_seqlens_k, double scale,
                bool causal, int64_t window_left, int64_t window_right, double dropout_p, uint64_t seed,
                const Execution& execution) {
        attention_forward(query, key, value, out, lse,
                          options(cu_seqlens_q, cu_seqlens_k, scale, causal, window_left, window_right, dropout_p, seed),
                          execution);
      },
      py::arg("query"), py::arg("key"), py::arg("value"), py::arg("out"), py::arg("lse"), py::arg("cu_seqlens_q"),
      py::arg("cu_seqlens_k"), py::arg("scale"), py::arg("causal"), py::arg("window_left"), py::arg("window_right"),
      py::arg("dropout_p"), py::arg("seed"), py::arg("execution"));
  m.def(
      "attention_backward",
      [options](const TensorView& grad_out, const OptionalView& grad_lse, const TensorView& query,
                const TensorView& key, const TensorView& value, const TensorView& out, const TensorView& lse,
                const TensorView& grad_query, const TensorView& grad_key, const TensorView& grad_value,
                const OptionalView& cu_seqlens_q, const OptionalView& cu_seqlens_k, double scale, bool causal,
                int64_t window_left, int64_t window_right, double dropout_p, uint64_t seed,
                const Execution& execution) {
        attention_backward(grad_out, grad_lse, query, key, value, out, lse, grad_query, grad_key, grad_value,
                           options(cu_seqlens_q, cu_seqlens_k, scale, causal, window_left, window_right, dropout_p,
                                   seed),
                           execution);
      },
      py::arg("grad_out"), py::arg("grad_lse"), py::arg("query"), py::arg("key"), py::arg("value"), py::arg("out"),
      py::arg("lse"), py::arg("grad_query"), py::arg("grad_key"), py::arg("grad_value"), py::arg("cu_seqlens_q"),
      py::arg("cu_seqlens_k"), py::arg("scale"), py::arg("causal"), py::arg("window_left"), py::arg("window_right"),
      py::arg("dropout_p"), py::arg("seed"), py::arg("execution"));
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
        py::arg("execution"));
  m.def("layer_norm_backward", &layer_norm_backward, py::arg("grad_out"), py::arg("grad_sum"), py::arg("x"),
        py::arg("weight"), py::arg("mean"), py::arg("rstd"), py::arg("grad_x"), py::arg("grad_weight"),
        py::arg("grad_bias"), py::arg("execution"));
  m.def("gelu_forward", &gelu_forward, py::arg("x"), py::arg("bias"), py::arg("out"), py::arg("tanh_form"),
        py::arg("execution"));
  m.def("gelu_backward", &gelu_backward, py::arg("grad_out"), py::arg("x"), py::arg("bias"), py::arg("grad_x"),
        py::arg("grad_bias"), py::arg("tanh_form"), py::arg("execution"));
}

}  // namespace gptcore
