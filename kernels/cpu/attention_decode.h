// The dot products of a single query with keys in their original layout, for decoding and for its backward.
#pragma once

#include "kernels/cpu/attention.h"

namespace gptcore {
namespace GPTCORE_ISA {
namespace {

constexpr int kMaxHeadDim = 256;

// The type of a packed query: float, or bfloat16 if the CPU has a dot product for it.
template <class S> struct DecodeOperand { using Query = float; };
#if defined(__AVX512BF16__)
template <> struct DecodeOperand<bfloat16> { using Query = bfloat16; };
#endif
template <class S> using DecodeQuery = typename DecodeOperand<S>::Query;

// Packs one query, times `sign`, padded with zeros to two whole vectors.
template <class S>
void load_query(DecodeQuery<S>* to, const S* query, int64_t head_dim, float sign) {
  for (int64_t d = 0; d < round_up(head_dim, 2 * kLanes); d += kLanes)
    store(to + d, d < head_dim ? load_up_to(query + d, head_dim - d) * sign : Vec{});
}

#if defined(__AVX512BF16__)
// Loads up to 2 kLanes elements, padded with zeros.
GPTCORE_INLINE UintVec load_pairs(const bfloat16* p, int64_t n) {
  if (n >= 2 * kLanes) return bit_cast<UintVec>(load((const float*)p));
  return (UintVec)_mm512_maskz_loadu_epi16(n > 0 ? (1u << n) - 1 : 0, p);
}
#endif

// The dot product of query and key, before the sum over lanes.
template <class S>
GPTCORE_INLINE Vec dot_lanes(const float* query, const S* key, int64_t head_dim) {
  Vec sum = {};
  for (int64_t d = 0; d < head_dim; d += kLanes) sum += load(query + d) * load_up_to(key + d, head_dim - d);
  return sum;
}
#if defined(__AVX512BF16__)
GPTCORE_INLINE Vec dot_lanes(const bfloat16* query, const bfloat16* key, int64_t head_dim) {
  Vec sum = {};
  for (int64_t d = 0; d < head_dim; d += 2 * kLanes)
    multiply_add(sum, bit_cast<UintVec>(load((const float*)(query + d))), load_pairs(key + d, head_dim - d));
  return sum;
}
#endif

// scores[j] = query . key j for j < count, padded with copies of the last to a whole vector.
template <class S>
void dot_keys(const DecodeQuery<S>* query, const S* keys, int64_t stride, int64_t count, int64_t head_dim,
              float* scores) {
  for (int64_t j = 0; j < count; j += kLanes) {
    Vec products[kLanes];
    for (int i = 0; i < kLanes; ++i)
      products[i] = dot_lanes(query, keys + smaller(j + i, count - 1) * stride, head_dim);
    store(scores + j, sums_of(products));
  }
}

}  // namespace
}  // namespace GPTCORE_ISA
}  // namespace gptcore
