// The operations as Python calls them: each checks its tensors, makes the kernel's arguments and runs it without the GIL.
// Outputs are allocated by the caller, on the device of the inputs. All throw std::invalid_argument or pybind11::value_error (ValueError in Python).
#pragma once

#include <optional>
#include <vector>

#include "csrc/execution.h"

namespace gptcore {

using OptionalView = std::optional<TensorView>;

// What a call of attention is besides its tensors; see gptcore/ops/attention.py for the meaning of each.
struct AttentionOptions {
  OptionalView cu_seqlens_q, cu_seqlens_k;
  double scale;
  bool causal;
  int64_t window_left, window_right;
  double dropout_p;
  uint64_t seed;
};

// Checks boundaries (int32 or int64, on the CPU) and returns the segments; without any, one for each batch row.
std::vector<Segment> make_segments(const OptionalView& cu_seqlens_q, const OptionalView& cu_seqlens_k, int64_t batch,
                                   int64_t query_len, int64_t kv_len);

// Whether these are tensors that attention's kernels can read, with shapes that fit; false where somebody has to look
// closer, and never throws.
bool attention_takes(pybind11::handle query, pybind11::handle key, pybind11::handle value);

void attention_forward(const TensorView& query, const TensorView& key, const TensorView& value, const TensorView& out,
                       const TensorView& lse, const AttentionOptions& options, const Execution& execution);
void attention_backward(const TensorView& grad_out, const OptionalView& grad_lse, const TensorView& query,
                        const TensorView& key, const TensorView& value, const TensorView& out, const TensorView& lse,
                        const TensorView& grad_query, const TensorView& grad_key, const TensorView& grad_value,
                        const AttentionOptions& options, const Execution& execution);

void layer_norm_forward(const TensorView& x, const OptionalView& residual, const TensorView& weight,
                        const OptionalView& bias, const TensorView& out, const OptionalView& sum,
                        const TensorView& mean, const TensorView& rstd, double eps, const Execution& execution);
void layer_norm_backward(const TensorView& grad_out, const OptionalView& grad_sum, const TensorView& x,
                         const TensorView& weight, const TensorView& mean, const TensorView& rstd,
                         const TensorView& grad_x, const TensorView& grad_weight, const OptionalView& grad_bias,
                         const Execution& execution);

void gelu_forward(const TensorView& x, const OptionalView& bias, const TensorView& out, bool tanh_form,
                  const Execution& execution);
void gelu_backward(const TensorView& grad_out, const TensorView& x, const OptionalView& bias, const TensorView& grad_x,
                   const OptionalView& grad_bias, bool tanh_form, const Execution& execution);

// x @ weight^T + bias, as F.linear has it, on the CPU. Which gradients are made is said by which are there; x is needed for
// that of weight, and weight for that of x.
void linear_forward(const TensorView& x, const TensorView& weight, const OptionalView& bias, const TensorView& out,
                    int64_t num_threads);
void linear_backward(const TensorView& grad_out, const OptionalView& x, const OptionalView& weight,
                     const OptionalView& grad_x, const OptionalView& grad_weight, const OptionalView& grad_bias,
                     int64_t num_threads);

// The sum over the rows. `gradient` overwrites the logits with softmax - onehot.
double cross_entropy(const TensorView& logits, const TensorView& targets, bool gradient, int64_t num_threads);

// Lists of as many tensors, all of one update; see gptcore/optim.py.
using Views = std::vector<TensorView>;

double grad_norm(const Views& grads, int64_t num_threads);
void adamw(const Views& params, const Views& copies, const Views& grads, const Views& exp_avgs,
           const Views& exp_avg_sqs, const Views& steps, double lr, double beta1, double beta2, double eps,
           double weight_decay, double grad_scale, int64_t num_threads);

// Defines attention, layer norm and GELU in a module; which kernels run them is said by that module's kernels_for.
void bind_ops(pybind11::module_& m);

}  // namespace gptcore
