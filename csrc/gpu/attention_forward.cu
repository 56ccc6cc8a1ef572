// Chooses and launches the kernels of kernels/cuda/attention_forward.cuh.
#include "kernels/cuda/attention_forward.cuh"

#include <algorithm>
#include <cmath>

#include "csrc/gpu/attention.h"

namespace gptcore {
namespace GPTCORE_GPU {

#ifdef GPTCORE_SM90
void launch_forward_sm90(const AttentionArgs& args, const AttentionForwardParams& p, int64_t blocks);
#endif

namespace {

struct ForwardPlan {
  bool is_decode, is_sm90;
  int width, num_splits;
  int64_t blocks;  // of one split
  ForwardTile tile;
};

ForwardPlan plan_of(const AttentionArgs& args) {
  const int element_size = args.dtype == DType::float32 ? 4 : 2;
  const int64_t rows = args.query_len * (args.query_heads / args.kv_heads);
  ForwardPlan plan{};
  plan.width = tile_width(int(args.head_dim), element_size);
  plan.is_decode = rows <= forward_tile(plan.width, element_size, true).rows();
  if (plan.is_decode) plan.width = decode_width(plan.width);
  plan.tile = forward_tile(plan.width, element_size, plan.is_decode);
#ifdef GPTCORE_SM90
  plan.is_sm90 = !plan.is_decode && has_warpgroup_kernel(plan.width, element_size) && compute_capability() == 90;
  if (plan.is_sm90) plan.tile = warpgroup_forward_tile(plan.width);
#endif
  plan.blocks = ceil_div(rows, plan.tile.rows()) * args.kv_heads * args.batch;
  plan.num_splits = num_splits(plan.tile, rows, plan.blocks, args.kv_len, multiprocessors());
  return plan;
}

int64_t partial_rows(const AttentionArgs& args, const ForwardPlan& plan) {
  return plan.num_splits > 1 ? plan.num_splits * args.batch * args.query_heads * args.query_len : 0;
}

AttentionForwardParams forward_params(const AttentionArgs& args, const ForwardPlan& plan) {
  AttentionForwardParams p{};
  set_common(p, args, {args.query, args.key, args.value, args.out});
  p.sign = args.scale == 0 ? 0.0f : args.scale < 0 ? -1.0f : 1.0f;
  p.scale = args.scale == 0 ? 1.0f : std::fabs(args.scale);
  p.scale_log2 = p.scale * kLog2e;
  p.num_splits = plan.num_splits;
  p.width = plan.width;
  p.heads_per_wave = heads_per_wave(args, args.kv_heads, args.kv_len, 1);
  p.partial_out = reinterpret_cast<float*>(args.workspace);
  p.partial_softmax = reinterpret_cast<RowSoftmax*>(p.partial_out + partial_rows(args, plan) * p.width);
  return p;
}

template <class Math, int kWidth, bool kIsDecode>
void launch_forward(const AttentionArgs& args, const ForwardPlan& plan, const AttentionForwardParams& p) {
  using Shared = ForwardShared<Math, kWidth, kIsDecode>;
  void (*kernel)(AttentionForwardParams) = attention_forward_kernel<Math, kWidth, kIsDecode, Calls::all>;
  if constexpr (!kIsDecode && has_common_kernel(kWidth, sizeof(Storage<Math>)))
    if (is_common(p)) kernel = attention_forward_kernel<Math, kWidth, kIsDecode, Calls::common>;
  launch({kIsDecode ? "attention_decode" : "attention_forward", unsigned(plan.blocks * plan.num_splits), 1, 1,
          Shared::kThreads, Shared::kBytes, args.stream},
         kernel, p);
}

template <class Math>
void launch_width(const AttentionArgs& args, const ForwardPlan& plan, const AttentionForwardParams& p) {
  if (plan.is_decode) {
    // Decoding is bound by memory bandwidth and does not use TF32.
    using DecodeMath = std::conditional_t<kTf32<Math>, float, Math>;
    switch (plan.width) {
      case 64: return launch_forward<DecodeMath, 64, true>(args, plan, p);
      case 128: return launch_forward<DecodeMath, 128, true>(args, plan, p);
      default: return launch_forward<DecodeMath, 256, true>(args, plan, p);
    }
  }
  if constexpr (sizeof(Storage<Math>) == 2) {
    if (plan.width == 32) return launch_forward<Math, 32, false>(args, plan, p);
    if (plan.width == 96) return launch_forward<Math, 96, false>(args, plan, p);
  }
  switch (plan.width) {
    case 64: return launch_forward<Math, 64, false>(args, plan, p);
    case 128: return launch_forward<Math, 128, false>(args, plan, p);
    default: return launch_forward<Math, 256, false>(args, plan, p);
  }
}

}  // namespace

size_t attention_forward_workspace(const AttentionArgs& args) {
  if (args.batch * args.query_heads * args.query_len == 0) return 0;
  const ForwardPlan plan = plan_of(args);
  return partial_rows(args, plan) * (plan.width * sizeof(float) + sizeof(RowSoftmax));
}

void attention_forward(const AttentionArgs& args) {
  const int64_t rows = args.batch * args.query_heads * args.query_len;
  if (rows == 0) return;
  const ForwardPlan plan = plan_of(args);
  const AttentionForwardParams p = forward_params(args, plan);
  with_math(args, [&](auto math) {
    using Math = decltype(math);
#ifdef GPTCORE_SM90
    if (plan.is_sm90) launch_forward_sm90(args, p, plan.blocks * plan.num_splits);
    else launch_width<Math>(args, plan, p);
#else
    launch_width<Math>(args, plan, p);
#endif
    if (plan.num_splits > 1)
      launch({"attention_combine", unsigned(ceil_div(rows, kCombineThreads / 32)), 1, 1, kCombineThreads,
              kCombineThreads / 32 * kMaxSplits * sizeof(float), args.stream},
             attention_combine_kernel<Storage<Math>>, p);
  });
}

}  // namespace GPTCORE_GPU
}  // namespace gptcore
