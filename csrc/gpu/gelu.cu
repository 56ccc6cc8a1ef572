// Chooses and launches the kernels of kernels/cuda/gelu.cuh.
#include "kernels/cuda/gelu.cuh"

#include <algorithm>

#include "csrc/gpu/rows.h"

namespace gptcore {
namespace GPTCORE_GPU {
namespace {

// Without a bias the tensor is one line, cut into rows of kGeluColumns.
GeluPlan plan_of(const GeluArgs& args, int64_t rows_per_block) {
  GeluPlan plan{};
  plan.size = args.rows * args.width;
  plan.width = args.bias ? args.width : kGeluColumns;
  plan.rows = args.bias ? args.rows : ceil_div(plan.size, kGeluColumns);
  plan.rows_per_block = rows_per_block;
  plan.column_blocks = unsigned(ceil_div(plan.width, kGeluColumns));
  plan.vectors = whole_vectors(args.bias ? args.width : plan.size,
                               {args.x, args.bias, args.out, args.grad_out, args.grad_x});
  return plan;
}

// Rows per block: as many as are in flight at a time; with a bias at least 128, so that the row of partial sums that a
// block writes is negligible.
constexpr int64_t kForwardRows = 4 * kGeluWarps;
int64_t backward_rows(const GeluArgs& args) {
  return args.grad_bias ? std::max<int64_t>(128, ceil_div(args.rows, 256)) : kForwardRows;
}
int64_t backward_slices(const GeluArgs& args) { return ceil_div(args.rows, backward_rows(args)); }

unsigned blocks_of(const GeluPlan& plan) {
  return unsigned(ceil_div(plan.rows, plan.rows_per_block) * plan.column_blocks);
}

}  // namespace

void gelu_forward(const GeluArgs& args) {
  const GeluPlan plan = plan_of(args, kForwardRows);
  if (plan.size == 0) return;
  with_type(args.dtype, [&](auto zero) {
    using T = decltype(zero);
    void (*kernel)(GeluArgs, GeluPlan) =
        args.tanh_form ? gelu_forward_kernel<T, true> : gelu_forward_kernel<T, false>;
    launch({"gelu_forward", blocks_of(plan), 1, 1, 32 * kGeluWarps, 0, args.stream}, kernel, args, plan);
  });
}

size_t gelu_backward_workspace(const GeluArgs& args) {
  return args.grad_bias ? backward_slices(args) * args.width * sizeof(float) : 0;
}

void gelu_backward(const GeluArgs& args) {
  const GeluPlan plan = plan_of(args, backward_rows(args));
  if (plan.size > 0)
    with_type(args.dtype, [&](auto zero) {
      using T = decltype(zero);
      void (*kernel)(GeluArgs, GeluPlan) =
          args.tanh_form ? gelu_backward_kernel<T, true> : gelu_backward_kernel<T, false>;
      const size_t shared_bytes = args.grad_bias ? kGeluSharedBytes : 0;
      launch({"gelu_backward", blocks_of(plan), 1, 1, 32 * kGeluWarps, shared_bytes, args.stream}, kernel, args, plan);
    });
  if (args.grad_bias && args.width > 0)
    launch_sum_partials<float>(args.workspace, backward_slices(args), args.width, args.width, args.grad_bias, nullptr,
                               args.stream);
}

}  // namespace GPTCORE_GPU
}  // namespace gptcore
