// Compiled for sm_90a alone: the forward kernels with wgmma.
#include "csrc/gpu/attention.h"
#include "kernels/cuda/attention_forward.cuh"

namespace gptcore {
namespace GPTCORE_GPU {
namespace {

template <class T, int kWidth>
void launch_forward(const AttentionForwardParams& p, unsigned blocks, void* stream) {
  using Math = Warpgroup<T>;
  using Shared = ForwardShared<Math, kWidth, false>;
  launch({"attention_forward_sm90", blocks, 1, 1, Shared::kThreads, Shared::kBytes, stream},
         is_common(p) ? attention_forward_kernel<Math, kWidth, false, Calls::common>
                      : attention_forward_kernel<Math, kWidth, false, Calls::all>, p);
}

}  // namespace

void launch_forward_sm90(const AttentionArgs& args, const AttentionForwardParams& p, int64_t blocks) {
  const auto of_type = [&](auto type) {
    using T = decltype(type);
    switch (p.width) {
      case 32: return launch_forward<T, 32>(p, unsigned(blocks), args.stream);
      case 64: return launch_forward<T, 64>(p, unsigned(blocks), args.stream);
      case 96: return launch_forward<T, 96>(p, unsigned(blocks), args.stream);
      default: return launch_forward<T, 128>(p, unsigned(blocks), args.stream);
    }
  };
  if (args.dtype == DType::bfloat16) of_type(bfloat16());
  else of_type(float16());
}

}  // namespace GPTCORE_GPU
}  // namespace gptcore
