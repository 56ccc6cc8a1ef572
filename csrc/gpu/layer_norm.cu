// Chooses and launches the kernels of kernels/cuda/layer_norm.cuh.
#include "kernels/cuda/layer_norm.cuh"

#include <algorithm>

#include "csrc/gpu/rows.h"

namespace gptcore {
namespace GPTCORE_GPU {
namespace {

// As many warps as a row needs, if each of their threads holds `chunks` of it; none if a block has too few.
RowPlan plan_rows(int64_t width, int chunks, int max_warps, int min_warps, bool vectors) {
  const int64_t warps = ceil_div(width, 32 * chunks * kChunk);
  if (warps > max_warps) return {0, 1, vectors};
  return {int(warps), std::max(1, min_warps / int(warps)), vectors};
}

RowPlan forward_plan(const LayerNormArgs& args) {
  const bool vectors =
      whole_vectors(args.width, {args.x, args.residual, args.weight, args.bias, args.out, args.sum});
  return plan_rows(args.width, kForwardChunks, kForwardWarps, 4, vectors);
}

template <class T>
RowPlan backward_plan(const LayerNormArgs& args) {
  const bool vectors =
      whole_vectors(args.width, {args.x, args.grad_out, args.grad_sum, args.weight, args.grad_x, args.workspace});
  return plan_rows(args.width, kBackwardChunks<T>, kBackwardWarps, kBackwardWarps, vectors);
}

// A block writes two rows of partial sums, so it must have taken enough rows for them not to count.
unsigned backward_blocks(const LayerNormArgs& args, const RowPlan& plan) {
  return unsigned(std::min<int64_t>(ceil_div(args.rows, 6 * plan.groups), multiprocessors()));
}

template <class X, class R>
void forward(const LayerNormArgs& args) {
  const RowPlan plan = forward_plan(args);
  if (plan.warps == 0) {
    launch({"layer_norm_forward_wide", unsigned(args.rows), 1, 1, kForwardThreads, 3 * kForwardWarps * sizeof(float),
            args.stream},
           layer_norm_forward_wide<X, R>, args, plan.vectors);
    return;
  }
  // As many blocks as a GPU runs at a time with 128 registers a thread: weight and bias are read once for many rows.
  const int warps = plan.warps * plan.groups, resident = multiprocessors() * std::max(1, kForwardWarps / warps);
  const unsigned blocks = unsigned(std::min<int64_t>(ceil_div(args.rows, plan.groups), resident));
  launch({"layer_norm_forward", blocks, 1, 1, unsigned(32 * warps), 3 * kForwardWarps * sizeof(float),
          args.stream},
         layer_norm_forward_kernel<X, R>, args, plan);
}

template <class T>
void backward(const LayerNormArgs& args) {
  const RowPlan plan = backward_plan<T>(args);
  const unsigned blocks = backward_blocks(args, plan);
  if (plan.warps == 0) {
    launch({"layer_norm_backward_wide", blocks, 1, 1, kBackwardThreads, 6 * kBackwardWarps * sizeof(float),
            args.stream},
           layer_norm_backward_wide<T>, args, plan.vectors);
    return;
  }
  const size_t row_floats = plan.groups > 1 ? 2 * kBackwardChunks<T> * kChunk * 32 * plan.warps : 0;
  launch({"layer_norm_backward", blocks, 1, 1, unsigned(32 * plan.warps * plan.groups),
          (6 * kBackwardWarps + row_floats) * sizeof(float), args.stream},
         layer_norm_backward_kernel<T>, args, plan);
}

}  // namespace

void layer_norm_forward(const LayerNormArgs& args) {
  if (args.rows == 0) return;
  with_type(args.dtype, [&](auto zero) {
    using X = decltype(zero);
    args.residual && args.residual_dtype == DType::float32 ? forward<X, float>(args) : forward<X, X>(args);
  });
}

size_t layer_norm_backward_workspace(const LayerNormArgs& args) {
  size_t blocks = 0;
  with_type(args.dtype, [&](auto zero) { blocks = backward_blocks(args, backward_plan<decltype(zero)>(args)); });
  return blocks * 2 * args.width * sizeof(float);
}

void layer_norm_backward(const LayerNormArgs& args) {
  unsigned blocks = 0;
  with_type(args.dtype, [&](auto zero) {
    blocks = backward_blocks(args, backward_plan<decltype(zero)>(args));
    if (blocks > 0) backward<decltype(zero)>(args);
  });
  launch_sum_partials(args.workspace, blocks, 2 * args.width, args.width, args.grad_weight, args.stream);
  if (args.grad_bias)
    launch_sum_partials(args.workspace + args.width, blocks, 2 * args.width, args.width, args.grad_bias, args.stream);
}

}  // namespace GPTCORE_GPU
}  // namespace gptcore
