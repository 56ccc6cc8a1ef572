// Shared by the host side of attention's forward and backward.
#pragma once

#include <initializer_list>

#include "csrc/gpu/rows.h"
#include "kernels/cuda/policy.h"
#include "kernels/cuda/tile.cuh"
#include "kernels/kernels.h"

namespace gptcore {
#ifdef GPTCORE_SIMT
namespace simt {
int compute_capability();  // of _simt.configure
}
#endif
namespace GPTCORE_GPU {

#ifdef GPTCORE_SIMT
inline int compute_capability() { return simt::compute_capability(); }
#else
inline int compute_capability() {
  return 10 * device_attribute(cudaDevAttrComputeCapabilityMajor) +
         device_attribute(cudaDevAttrComputeCapabilityMinor);
}
#endif

// Sets the parameters that both kernels share. `tensors` are all that the kernel accesses by rows.
inline void set_common(AttentionParams& p, const AttentionArgs& args, std::initializer_list<HeadsView> tensors) {
  constexpr int64_t kNoLimit = int64_t{1} << 40;  // more than any position
  p.query = args.query, p.key = args.key, p.value = args.value, p.out = args.out, p.lse = args.lse;
  p.cu_seqlens_q = args.cu_seqlens_q, p.cu_seqlens_k = args.cu_seqlens_k, p.num_boundaries = args.num_boundaries;
  p.batch = int(args.batch), p.kv_heads = int(args.kv_heads), p.group = int(args.query_heads / args.kv_heads);
  p.query_len = int(args.query_len), p.kv_len = int(args.kv_len), p.head_dim = int(args.head_dim);
  p.window_left = args.window_left < 0 ? kNoLimit : args.window_left;
  p.window_right = args.causal ? 0 : args.window_right < 0 ? kNoLimit : args.window_right;

  const int64_t element_size = args.dtype == DType::float32 ? 4 : 2;
  const auto whole = [&](int64_t elements) { return elements * element_size % 16 == 0; };
  p.vectors = whole(args.head_dim);
  for (const HeadsView& t : tensors)
    p.vectors &= reinterpret_cast<uintptr_t>(t.data) % 16 == 0 && whole(t.batch_stride) && whole(t.head_stride) &&
                 whole(t.row_stride);

  p.dropout = args.dropout_p > 0;
  p.dropout_threshold = uint32_t(args.dropout_p * 4294967296.0);
  p.dropout_scale = float(1 / (1 - args.dropout_p));
  p.seed = args.seed;
}

inline bool is_common(const AttentionParams& p) { return p.vectors && !p.dropout; }  // of Calls::common

// heads_per_wave for heads of rows, `sharing` of which read the same `columns` rows of two tensors.
inline int heads_per_wave(const AttentionArgs& args, int64_t heads, int64_t columns, int64_t sharing) {
  const int64_t bytes = 2 * columns * args.head_dim * (args.dtype == DType::float32 ? 4 : 2) / sharing;
  return gptcore::heads_per_wave(l2_bytes(), bytes, int(args.batch * heads));
}

// Calls body(Math()) with the Math of these arguments.
template <class Body>
auto with_math(const AttentionArgs& args, Body body) {
  if (args.dtype == DType::bfloat16) return body(bfloat16());
  if (args.dtype == DType::float16) return body(float16());
  return args.allow_tf32 ? body(Tf32()) : body(float());
}

}  // namespace GPTCORE_GPU
}  // namespace gptcore
