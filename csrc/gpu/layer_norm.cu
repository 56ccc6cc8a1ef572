// Chooses and launches the kernels of kernels/cuda/layer_norm.cuh.
#include "kernels/cuda/layer_norm.cuh"

#include <algorithm>

#include "csrc/gpu/rows.h"

namespace gptcore {
namespace GPTCORE_GPU {
namespace {

// The warps per row if each thread holds `chunks` chunks; 0 if that is more than max_warps.
int warps_of_row(int64_t width, int chunks, int max_warps) {
  const int64_t warps = ceil_div(width, 32 * chunks * kChunk);
  return warps > max_warps ? 0 : int(warps);
}

// A block reads weight and bias once. Rows of one warp need no barrier, so a block takes as many as a multiprocessor
// runs (fewer if some multiprocessors would have no block). Rows of several warps do: small blocks overlap loads and
// sums.
RowPlan forward_plan(const LayerNormArgs& args) {
  const bool vectors =
      whole_vectors(args.width, {args.x, args.residual, args.weight, args.bias, args.out, args.residual_out});
  const int warps = warps_of_row(args.width, kForwardChunks, kForwardWarps);
  if (warps == 1) return {1, int(std::min<int64_t>(kForwardWarps, ceil_div(args.rows, multiprocessors()))), vectors};
  return {warps, warps == kForwardSharing ? 2 : 1, vectors};
}

// As many concurrent rows as fit into a block.
template <class T>
RowPlan backward_plan(const LayerNormArgs& args) {
  const bool vectors =
      whole_vectors(args.width, {args.x, args.grad_out, args.grad_residual_out, args.weight, args.grad_x,
                                 args.grad_narrow, args.workspace});
  const int warps = warps_of_row(args.width, kBackwardChunks<T>, kBackwardWarps);
  return {warps, warps == 0 ? 1 : kBackwardWarps / warps, vectors};
}

// One block per multiprocessor. Its partial sums move 16 bytes per column; each of its rows moves three times 2 or 4,
// so a block has at least four rows.
unsigned backward_blocks(const LayerNormArgs& args, const RowPlan& plan) {
  return unsigned(std::min<int64_t>(ceil_div(args.rows, std::max(4, plan.groups)), multiprocessors()));
}

template <class X, class R, class W, class O = R>
void forward(const LayerNormArgs& args) {
  const RowPlan plan = forward_plan(args);
  if (plan.warps == 0) {
    launch({"layer_norm_forward_wide", unsigned(args.rows), 1, 1, kForwardThreads, kForwardSums * sizeof(float),
            args.stream},
           layer_norm_forward_wide<X, R, W, O>, args, plan.vectors);
    return;
  }
  // As many blocks as are resident with 128 registers per thread, each looping over many rows.
  const int warps = plan.warps * plan.groups, resident = multiprocessors() * std::max(1, kForwardWarps / warps);
  const unsigned blocks = unsigned(std::min<int64_t>(ceil_div(args.rows, plan.groups), resident));
  launch({"layer_norm_forward", blocks, 1, 1, unsigned(32 * warps),
          (kForwardSums + (plan.groups > 1 ? kForwardShared : 0)) * sizeof(float), args.stream},
         layer_norm_forward_kernel<X, R, W, O>, args, plan);
}

template <class T, class W, class G = T>
void backward(const LayerNormArgs& args) {
  const RowPlan plan = backward_plan<T>(args);
  const unsigned blocks = backward_blocks(args, plan);
  if (blocks > 0 && plan.warps == 0) {
    launch({"layer_norm_backward_wide", blocks, 1, 1, kBackwardThreads, kBackwardSums * sizeof(float),
            args.stream},
           layer_norm_backward_wide<T, W, G>, args, plan.vectors);
  } else if (blocks > 0) {
    launch({"layer_norm_backward", blocks, 1, 1, unsigned(32 * plan.warps * plan.groups),
            (kBackwardSums + (plan.groups > 1 ? kBackwardShared<T> : 0)) * sizeof(float), args.stream},
           layer_norm_backward_kernel<T, W, G>, args, plan);
  }
  launch_sum_partials(args.workspace, blocks, 2 * args.width, args.width, static_cast<W*>(args.grad_weight),
                      static_cast<W*>(args.grad_bias), args.stream);
}

}  // namespace

void layer_norm_forward(const LayerNormArgs& args) {
  if (args.rows == 0) return;
  with_type(args.dtype, [&](auto zero) {
    using X = decltype(zero);
    if (args.out_dtype != args.residual_dtype) {  // 16 bits of a float32 residual stream
      if constexpr (sizeof(X) == 2) forward<X, float, float, X>(args);
      else if (args.out_dtype == DType::bfloat16) forward<float, float, float, bfloat16>(args);
      else forward<float, float, float, float16>(args);
    } else if (args.residual && args.residual_dtype == DType::float32) forward<X, float, float>(args);
    else if (args.weight_dtype == DType::float32) forward<X, X, float>(args);
    else forward<X, X, X>(args);
  });
}

size_t layer_norm_backward_workspace(const LayerNormArgs& args) {
  size_t blocks = 0;
  with_type(args.dtype, [&](auto zero) { blocks = backward_blocks(args, backward_plan<decltype(zero)>(args)); });
  return blocks * 2 * args.width * sizeof(float);
}

void layer_norm_backward(const LayerNormArgs& args) {
  with_type(args.dtype, [&](auto zero) {
    using T = decltype(zero);
    if (args.out_dtype != args.dtype)
      args.out_dtype == DType::bfloat16 ? backward<float, float, bfloat16>(args) : backward<float, float, float16>(args);
    else
      args.weight_dtype == DType::float32 ? backward<T, float>(args) : backward<T, T>(args);
  });
}

}  // namespace GPTCORE_GPU
}  // namespace gptcore
