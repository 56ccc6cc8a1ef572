// Chooses and launches the kernels of kernels/cuda/attention_backward.cuh.
#include "kernels/cuda/attention_backward.cuh"

#include "csrc/gpu/attention.h"
#include "csrc/launch.h"

namespace gptcore {
namespace GPTCORE_GPU {
namespace {

AttentionBackwardParams backward_params(const AttentionArgs& args) {
  AttentionBackwardParams p{};
  set_common(p, args, {args.query, args.key, args.value, args.out, args.grad_out, args.grad_query, args.grad_key,
                       args.grad_value});
  p.grad_out = args.grad_out, p.grad_query = args.grad_query;
  p.grad_key = args.grad_key, p.grad_value = args.grad_value;
  p.grad_lse = args.grad_lse, p.delta = reinterpret_cast<float*>(args.workspace);
  p.query_heads = int(args.query_heads);
  p.scale = args.scale;
  return p;
}

template <class Math, int kWidth, Gradients kOf>
void launch_gradients(const AttentionArgs& args, AttentionBackwardParams p) {
  using Shared = BackwardShared<Math, kWidth, kOf>;
  const int64_t length = Shared::kKeyRows ? args.kv_len : args.query_len;
  const int64_t heads = Shared::kKeyRows ? args.kv_heads : args.query_heads;
  const int64_t blocks = ceil_div(length, Shared::kRows) * heads * args.batch;
  if (blocks == 0) return;
  p.heads_per_wave = Shared::kKeyRows ? heads_per_wave(args, heads, args.query_len * p.group, 1)
                                      : heads_per_wave(args, heads, args.kv_len, p.group);
  constexpr const char* kNames[] = {"attention_backward_query", "attention_backward_key", "attention_backward_value",
                                    "attention_backward_key_value"};
  void (*kernel)(AttentionBackwardParams) = attention_backward_kernel<Math, kWidth, kOf, Calls::all>;
  if constexpr (has_common_kernel(kWidth, sizeof(Storage<Math>)))
    if (is_common(p)) kernel = attention_backward_kernel<Math, kWidth, kOf, Calls::common>;
  launch({kNames[int(kOf)], unsigned(blocks), 1, 1, Shared::kThreads, Shared::kBytes, args.stream}, kernel, p);
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

template <class Math>
void launch_all(const AttentionArgs& args, const AttentionBackwardParams& p) {
  constexpr int kRowsPerBlock = kDeltaThreads / kDeltaLanes<Storage<Math>>;
  const int64_t blocks = ceil_div(args.batch * args.query_heads * args.query_len, kRowsPerBlock);
  if (blocks > 0)
    launch({"attention_delta", unsigned(blocks), 1, 1, kDeltaThreads, 0, args.stream},
           attention_delta<Storage<Math>>, p);
  switch (tile_width(p.head_dim, sizeof(Storage<Math>))) {
    case 64: return launch_width<Math, 64>(args, p);
    case 128: return launch_width<Math, 128>(args, p);
    case 256: return launch_width<Math, 256>(args, p);
    default:
      if constexpr (sizeof(Storage<Math>) == 2)
        return p.head_dim <= 32 ? launch_width<Math, 32>(args, p) : launch_width<Math, 96>(args, p);
  }
}

}  // namespace

size_t attention_backward_workspace(const AttentionArgs& args) {
  return args.batch * args.query_heads * args.query_len * sizeof(float);
}

void attention_backward(const AttentionArgs& args) {
  const AttentionBackwardParams p = backward_params(args);
  with_math(args, [&](auto math) { launch_all<decltype(math)>(args, p); });
}

}  // namespace GPTCORE_GPU
}  // namespace gptcore
