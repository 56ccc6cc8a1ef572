// Compiled for sm_90a alone: the backward kernels with wgmma.
#include "csrc/gpu/attention_backward.h"

namespace gptcore {
namespace GPTCORE_GPU {

void launch_backward_sm90(const AttentionArgs& args, const AttentionBackwardParams& p) {
  const auto of_type = [&](auto type) {
    using Math = Warpgroup<decltype(type)>;
    switch (tile_width(p.head_dim, sizeof(type))) {
      case 32: return launch_width<Math, 32>(args, p);
      case 64: return launch_width<Math, 64>(args, p);
      case 96: return launch_width<Math, 96>(args, p);
      default: return launch_width<Math, 128>(args, p);
    }
  };
  if (args.dtype == DType::bfloat16) of_type(bfloat16());
  else of_type(float16());
}

}  // namespace GPTCORE_GPU
}  // namespace gptcore
