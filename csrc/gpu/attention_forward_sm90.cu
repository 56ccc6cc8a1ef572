// Compiled for sm_90a alone: the forward kernels with wgmma.
#include <optional>

#include "csrc/gpu/attention.h"
#include "kernels/cuda/attention_forward.cuh"

namespace gptcore {
namespace GPTCORE_GPU {
namespace {

// Tiles of K or V, of rows of 16-byte vectors, as boxes of (columns, rows, heads, batch). Empty if a map does not
// take them, such as no keys, or the stride 0 of an expanded dimension: cp.async does.
template <class Tile>
std::optional<TensorMap> map_of(const AttentionForwardParams& p, const HeadsView& view) {
  TensorMapArgs args{view.data, 4, {p.head_dim, p.kv_len, p.kv_heads, p.batch},
                     {view.row_stride, view.head_stride, view.batch_stride},
                     {Tile::kBlockWidth, Tile::kRows, 1, 1}, Tile::kRowBytes};
  for (int i = 0; i < 3; ++i) {
    int64_t& stride = args.strides[i];
    stride = args.sizes[i + 1] == 1 ? 16 : stride * 2;  // that of one element does not matter
    if (args.sizes[i + 1] < 1 || stride <= 0 || stride >= int64_t{1} << 40) return {};
  }
  return encode_tensor_map(args);
}

template <class T, int kWidth>
void launch_forward(const AttentionForwardParams& p, unsigned blocks, void* stream) {
  using Math = Warpgroup<T>;
  using Shared = ForwardShared<Math, kWidth, false>;
  const Launch at{"attention_forward_sm90", blocks, 1, 1, Shared::kThreads, Shared::kBytes, stream};
  using Tile = typename Shared::KeyTile;
  std::optional<TensorMap> key_map, value_map;
  if (is_common(p)) key_map = map_of<Tile>(p, p.key), value_map = map_of<Tile>(p, p.value);
  if (key_map && value_map)
    launch(at, attention_forward_bulk<Math, kWidth>, p, *key_map, *value_map);
  else
    launch(at, attention_forward_kernel<Math, kWidth, false, Calls::all>, p);
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
