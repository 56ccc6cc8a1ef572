// Chooses and launches the kernels of kernels/cuda/attention_backward.cuh.
#include "csrc/gpu/attention_backward.h"

namespace gptcore {
namespace GPTCORE_GPU {

#ifdef GPTCORE_SM90
void launch_backward_sm90(const AttentionArgs& args, const AttentionBackwardParams& p);
#endif

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

template <class Math>
void launch_all(const AttentionArgs& args, const AttentionBackwardParams& p) {
  constexpr int kRowsPerBlock = kDeltaThreads / kDeltaLanes<Storage<Math>>;
  const int64_t blocks = ceil_div(args.batch * args.query_heads * args.query_len, kRowsPerBlock);
  if (blocks > 0)
    launch({"attention_delta", unsigned(blocks), 1, 1, kDeltaThreads, 0, args.stream},
           attention_delta<Storage<Math>>, p);
  const int width = tile_width(p.head_dim, sizeof(Storage<Math>));
#ifdef GPTCORE_SM90
  if (has_warpgroup_kernel(width, sizeof(Storage<Math>)) && compute_capability() == 90)
    return launch_backward_sm90(args, p);
#endif
  switch (width) {
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
