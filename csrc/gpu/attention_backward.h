// Launches of attention's backward kernels, for attention_backward.cu and attention_backward_sm90.cu.
#pragma once

#include "csrc/gpu/attention.h"
#include "csrc/launch.h"
#include "kernels/cuda/attention_backward.cuh"

namespace gptcore {
namespace GPTCORE_GPU {

template <class Math, int kWidth, Gradients kOf>
void launch_gradients(const AttentionArgs& args, AttentionBackwardParams p) {
  using Shared = BackwardShared<Math, kWidth, kOf>;
  const int64_t length = Shared::kKeyRows ? args.kv_len : args.query_len;
  const int64_t heads = Shared::kKeyRows ? args.kv_heads : args.query_heads;
  const int64_t blocks = ceil_div(length, Shared::kRows) * heads * args.batch;
  if (blocks == 0) return;
  p.heads_per_wave = Shared::kKeyRows ? heads_per_wave(args, heads, args.query_len * p.group, 1)
                                      : heads_per_wave(args, heads, args.kv_len, p.group);
  constexpr const char* kNames[][2] = {
      {"attention_backward_query", "attention_backward_query_sm90"},
      {"attention_backward_key", ""},
      {"attention_backward_value", ""},
      {"attention_backward_key_value", "attention_backward_key_value_sm90"}};
  void (*kernel)(AttentionBackwardParams) = attention_backward_kernel<Math, kWidth, kOf, Calls::all>;
  if constexpr (has_common_kernel(kWidth, sizeof(Storage<Math>)))
    if (is_common(p)) kernel = attention_backward_kernel<Math, kWidth, kOf, Calls::common>;
  launch({kNames[int(kOf)][kWarpgroup<Math>], unsigned(blocks), 1, 1, Shared::kThreads, Shared::kBytes, args.stream},
         kernel, p);
}

template <class Math, int kWidth>
void launch_width(const AttentionArgs& args, const AttentionBackwardParams& p) {
  launch_gradients<Math, kWidth, Gradients::query>(args, p);
  if constexpr (kWidth <= 128) {
    launch_gradients<Math, kWidth, Gradients::key_value>(args, p);
  } else {
    launch_gradients<Math, kWidth, Gradients::key>(args, p);
    launch_gradients<Math, kWidth, Gradients::value>(args, p);
  }
}

}  // namespace GPTCORE_GPU
}  // namespace gptcore
