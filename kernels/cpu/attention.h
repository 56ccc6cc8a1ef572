// Shared by the attention kernels for the CPU: scratch memory, packing, the scale of the scores, non-finite numbers.
//
// The method is FlashAttention's (Dao et al. 2022, arXiv:2205.14135): a block of queries iterates over blocks of keys
// and keeps a running maximum and sum of its softmax. A block of scores is held transposed, one key per row and one
// query per vector lane. The softmax is then plain vector arithmetic without operations across lanes, and every product
// of forward and backward is the same small matrix product, `multiply`, with its B operand in the first-level cache:
//
//     forward    S^T = K Q^T     O += P V
//     backward   S^T = K Q^T   dP^T = V dO^T   dV += P^T dO   dK += dS^T Q   dQ += dS K
//
// Operands are converted and packed once per task, in the order in which `multiply` reads them, so only packing handles
// strides, storage types and odd sizes. T is the type that is multiplied: float, or bfloat16 if the CPU has a dot
// product for it, or AMX tiles. Accumulators are float32.
#pragma once

#include <math.h>
#include <omp.h>

#include "kernels/kernels.h"
#include "kernels/cpu/attention_mask.h"
#include "kernels/cpu/attention_tiles.h"

namespace gptcore {
namespace GPTCORE_ISA {
namespace {

// ---- scratch memory and packing -------------------------------------------------------------------------------------

// Allocates from the scratch memory of a thread. With a null base it only counts bytes.
struct Arena {
  char* base;
  size_t used = 0;
  template <class T>
  T* take(int64_t count) {
    size_t offset = used;
    used += round_up(count * sizeof(T), 64);
    return base ? reinterpret_cast<T*>(base + offset) : nullptr;
  }
};

// The longest segment, rounded up to whole panels or blocks.
inline int64_t max_query_len(const AttentionArgs& args) {
  int64_t longest = 0;
  for (int64_t i = 0; i < args.num_segments; ++i) longest = larger(longest, args.segments[i].query_len);
  return round_up(longest, kPanel);
}
inline int64_t max_key_len(const AttentionArgs& args) {
  int64_t longest = 0;
  for (int64_t i = 0; i < args.num_segments; ++i) longest = larger(longest, args.segments[i].key_len);
  return round_up(longest, kBlockN);
}

// The padded sizes of a packed head.
template <class T>
struct Sizes {
  int64_t depth, steps, width;
  explicit Sizes(const AttentionArgs& args)
      : depth(round_up(args.head_dim, kStep<T>)), steps(depth / kStep<T>), width(round_up(args.head_dim, kPanel)) {}
};

template <class S>
S* row(const HeadsView& view, int64_t batch, int64_t head, int64_t index) {
  return static_cast<S*>(view.data) + batch * view.batch_stride + head * view.head_stride + index * view.row_stride;
}

// Packs each block of keys as a B operand.
template <class S, class T>
void pack_blocks(Wide<T>* to, const S* source, int64_t stride, int64_t keys, int64_t head_dim) {
  for (int64_t key = 0; key < keys; key += kBlockN)
    pack_panel_rows<S, T>(to + key / kStep<T> * round_up(head_dim, kPanel), source + key * stride, stride,
                          smaller(kBlockN, keys - key), head_dim, kBlockN);
}

// scale = sign x size. The sign is applied to Q, so that the largest score has the largest probability. Exponents are
// (score - max) x size x log2(e): docs/kernels.md, "Rounding".
struct Scale {
  float sign, size, size_log2;
  explicit Scale(float scale)
      : sign(scale == 0 ? 0.0f : scale < 0 ? -1.0f : 1.0f), size(scale == 0 ? 1.0f : fabsf(scale)),
        size_log2(size * kLog2e) {}

  float lse(float max, float sum) const { return sum == 0 ? -kInfinity : max * size + logf(sum); }
};

// The accuracy that exp2 needs: P is rounded to T, but the LSE is float32.
template <class T> constexpr int kExpDegree = kStep<T> == 1 ? 6 : 5;

// ---- NaN and infinities ---------------------------------------------------------------------------------------------
//
// A weight of 0 times NaN is NaN. Non-finite numbers must not reach rows that do not attend to them. If an operand has
// any, they are zeroed in its packed copy, and added to the accumulators of the rows that attend to them.

// Whether there can be a weight of 0 within a block.
inline bool is_masked(const AttentionArgs& args) { return args.causal || args.window_left >= 0 || args.window_right >= 0; }

template <class S>
bool any_nonfinite(const S* source, int64_t stride, int64_t rows, int64_t columns) {
  Vec sums[4] = {};  // of x * 0: 0 or NaN
  for (int64_t i = 0; i < rows; ++i, source += stride) {
    int64_t d = 0;
    for (; d + 4 * kLanes <= columns; d += 4 * kLanes)
      for (int j = 0; j < 4; ++j) sums[j] += load(source + d + j * kLanes) * 0.0f;
    for (; d < columns; d += kLanes) sums[0] += load_up_to(source + d, columns - d) * 0.0f;
  }
  const Vec sum = (sums[0] + sums[1]) + (sums[2] + sums[3]);
  return any(sum != sum);
}

inline bool is_finite(float x) { return x - x == 0.0f; }

// Of a packed operand of floats, or of pairs of bfloat16.
inline void zero_nonfinite(float* packed, int64_t count) {
  for (int64_t i = 0; i < count; ++i)
    if (!is_finite(packed[i])) packed[i] = 0.0f;
}
inline void zero_nonfinite(uint32_t* packed, int64_t count) {
  for (int64_t i = 0; i < count; ++i)
    for (uint32_t half = 0xffffu; half; half <<= 16)
      if ((~packed[i] & half & 0x7f807f80u) == 0) packed[i] &= ~half;
}

// Adds the non-finite elements of a source row to a row of accumulators in panels, each `rows` long.
template <class S>
void add_nonfinite(float* acc, int64_t rows, const S* source, int64_t columns) {
  for (int64_t d = 0; d < columns; ++d) {
    const float x = load_partial(source + d, 1)[0];
    if (!is_finite(x)) acc[d / kPanel * kPanel * rows + d % kPanel] += x;
  }
}

template <class S, class T>
struct Types {  // of the elements of a dtype, and of the operands of a product that they become
  using Operand = T;
};

template <class F>
auto with_types(DType dtype, F f) {  // calls f with the Types of dtype
  switch (dtype) {
    case DType::bfloat16: return f(Types<bfloat16, Bfloat16Operand>());
    case DType::float16: return f(Types<float16, float>());
    default: return f(Types<float, float>());
  }
}

}  // namespace

// ---- decoding: attention_decode.cpp ---------------------------------------------------------------------------------

bool is_decode(const AttentionArgs& args, const Segment& segment);
size_t attention_decode_workspace(const AttentionArgs& args);
void attention_decode(const AttentionArgs& args);

}  // namespace GPTCORE_ISA
}  // namespace gptcore
