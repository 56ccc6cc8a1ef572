// The arguments of forward kernels made from checked tensors, without workspace: for the operation itself and for decode.cpp.
#pragma once

#include "csrc/operations.h"

namespace gptcore {

// The arguments of attention besides query, key and value; see Settings in gptcore/ops/attention.py.
struct AttentionSettings {
  OptionalView cu_seqlens_q, cu_seqlens_k, seed;
  double scale;
  bool causal;
  int64_t window_left, window_right;
  double dropout_p;
};

// Without segments.
AttentionArgs attention_forward_args(const TensorView& query, const TensorView& key, const TensorView& value,
                                     const TensorView& out, const TensorView& lse, const AttentionSettings& settings,
                                     const Execution& execution);
LayerNormArgs layer_norm_forward_args(const TensorView& x, const OptionalView& residual, const TensorView& weight,
                                      const OptionalView& bias, const TensorView& out, const OptionalView& residual_out,
                                      const TensorView& mean, const TensorView& rstd, double eps,
                                      const Execution& execution);
GeluArgs gelu_forward_args(const TensorView& x, const OptionalView& bias, const TensorView& out, bool tanh_form,
                           const Execution& execution);
LinearArgs linear_forward_args(const TensorView& x, const TensorView& weight, const OptionalView& bias,
                               const TensorView& out, int64_t num_threads);
QuantizedLinearArgs quantized_linear_forward_args(const TensorView& x, const TensorView& weight,
                                                  const std::string& kind, const OptionalView& bias,
                                                  const TensorView& out, const Execution& execution);

}  // namespace gptcore
