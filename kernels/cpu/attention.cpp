// Fused attention for the CPU, forward and backward: softmax(scale Q K^T + mask) V without the score matrix.
//
// The method is FlashAttention's (Dao et al. 2022, arXiv:2205.14135): blocks of keys pass by a block of queries, whose
// softmax is kept as a running maximum and a running sum. Here a block of scores is held transposed, one key a row and
// one query a lane of the vectors. So the softmax is plain vector arithmetic (no lane ever meets another), and every
// product of forward and backward is the same small matrix product, `multiply`, with its right side in the first-level
// cache:
//
//     forward    S^T = K Q^T     O += P V
//     backward   S^T = K Q^T   dP^T = V dO^T   dV += P^T dO   dK += dS^T Q   dQ += dS K
//
// Operands are packed once per task into the order in which `multiply` reads them, converted on the way; that is where
// strides, storage types and odd sizes end. T is the type that is multiplied: float, or bfloat16 where the CPU has a
// dot product for it, or AMX's tiles. Sums are float32 always.
#include <math.h>
#include <omp.h>

#include "kernels/kernels.h"
#include "kernels/cpu/attention_mask.h"
#include "kernels/cpu/attention_tiles.h"

namespace gptcore {
namespace GPTCORE_ISA {
namespace {

// ---- scratch memory ---------------------------------------------------------------------------------------------------

// Hands out pieces of a thread's scratch; from a null base it only counts.
struct Arena {
  char* base;
  size_t used = 0;
  template <class T>
  T* take(int64_t count) {
    size_t at = used;
    used += round_up(count * sizeof(T), 64);
    return base ? reinterpret_cast<T*>(base + at) : nullptr;
  }
};

// The longest segment, in whole panels or blocks.
int64_t most_queries(const AttentionArgs& args) {
  int64_t longest = 0;
  for (int64_t i = 0; i < args.num_segments; ++i) longest = larger(longest, args.segments[i].query_len);
  return round_up(longest, kPanel);
}
int64_t most_keys(const AttentionArgs& args) {
  int64_t longest = 0;
  for (int64_t i = 0; i < args.num_segments; ++i) longest = larger(longest, args.segments[i].key_len);
  return round_up(longest, kBlockN);
}

// The sizes to which one head is packed.
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

// B of each block of keys, one after the other.
template <class S, class T>
void pack_blocks(Wide<T>* to, const S* source, int64_t stride, int64_t keys, int64_t head_dim) {
  for (int64_t key = 0; key < keys; key += kBlockN)
    pack_panel_rows<S, T>(to + key / kStep<T> * round_up(head_dim, kPanel), source + key * stride, stride,
                          smaller(kBlockN, keys - key), head_dim, kBlockN);
}

// scale = sign x size. The sign goes into Q, so that the largest score stays the largest; scores and their maxima are
// kept without the size. Only differences of scores are multiplied by size x log2(e), since a product with a large
// score is rounded by more than an exponent can bear.
struct Scale {
  float sign, size, size_log2;
  explicit Scale(float scale)
      : sign(scale == 0 ? 0.0f : scale < 0 ? -1.0f : 1.0f), size(scale == 0 ? 1.0f : fabsf(scale)),
        size_log2(size * kLog2e) {}

  float lse(float max, float sum) const { return sum == 0 ? -kInfinity : max * size + logf(sum); }
};

// ---- forward ----------------------------------------------------------------------------------------------------------

template <class T>
struct ForwardScratch {
  T* key;                          // K (keys x depth)
  Wide<T>*value, *query, *probs;   // V (keys / kStep x width), Q^T (steps x kPanel), P^T (kBlockN / kStep x kPanel)
  float *scores, *out;             // S^T (kBlockN x kPanel), O (kPanel x width, in panels)
  float *max, *sum;       // of each lane: of the scores, and of exp2((score - max) x size_log2)
  size_t bytes;

  ForwardScratch(const AttentionArgs& args, char* base) {
    const Sizes<T> size(args);
    const int64_t keys = most_keys(args);
    Arena arena{base};
    key = arena.take<T>(keys * size.depth);
    value = arena.take<Wide<T>>(keys / kStep<T> * size.width);
    query = arena.take<Wide<T>>(size.steps * kPanel);
    probs = arena.take<Wide<T>>(kBlockN / kStep<T> * kPanel);
    scores = arena.take<float>(kBlockN * kPanel);
    out = arena.take<float>(kPanel * size.width);
    max = arena.take<float>(kPanel);
    sum = arena.take<float>(kPanel);
    bytes = arena.used;
  }
};

// The accuracy that exp2 needs: P is rounded to T, but the LSE is float32.
template <class T> constexpr int kExpDegree = kStep<T> == 1 ? 6 : 5;

// How far the maximum of a lane may lag behind its scores, as a power of two: probabilities then go up to 2^8 before
// the division by their sum, and what was accumulated hardly ever needs to be scaled (FlashAttention-4).
constexpr float kMaxLag = 8.0f;

// One step of the online softmax for one vector of queries over `count` keys: scores become probabilities relative to
// the maximum; if that has to rise, what was accumulated under the old one is scaled down. An `if` around dropout in the
// innermost loop, instead of kDropout, would take a fifth more time.
template <bool kDropout, class T>
void softmax_block(const ForwardScratch<T>& scratch, const Panel& panel, int v, int64_t key, int64_t count, bool first,
                   float size_log2, int64_t width, Dropout& dropout, float dropout_scale) {
  float* scores = scratch.scores + v * kLanes;
  const int64_t unmasked = panel.unmasked(v, key, count);
  Vec maxima[4] = {splat(-kInfinity), splat(-kInfinity), splat(-kInfinity), splat(-kInfinity)};  // none waits for another
  const int64_t fours = unmasked / 4 * 4;
  for (int64_t j = 0; j < fours; j += 4)
    for (int i = 0; i < 4; ++i) maxima[i] = max(maxima[i], load(scores + (j + i) * kPanel));
  for (int64_t j = fours; j < unmasked; ++j) maxima[0] = max(maxima[0], load(scores + j * kPanel));
  Vec block_max = max(max(maxima[0], maxima[1]), max(maxima[2], maxima[3]));
  for (int64_t j = unmasked; j < count; ++j) {
    Vec s = panel.sees(v, key + j) ? load(scores + j * kPanel) : splat(-kInfinity);
    store(scores + j * kPanel, s);
    block_max = max(block_max, s);
  }
  if (count % kStep<T>) store(scores + count * kPanel, splat(-kInfinity));  // completes the last pair

  Vec old_max = load(scratch.max + v * kLanes), new_max = max(old_max, block_max);
  Vec sum = load(scratch.sum + v * kLanes);
  if (any((new_max - old_max) * size_log2 > kMaxLag)) {
    // A lane that has seen no key yet has a maximum of -inf, and -inf - -inf would be NaN.
    Vec shrink = exp2((old_max - (new_max == -kInfinity ? splat(0.0f) : new_max)) * size_log2);
    sum *= shrink;
    for (int64_t i = 0; i < smaller(kLanes, panel.rows - v * kLanes) && !first; ++i)
      for (int64_t d = 0; d < width; d += kLanes) {
        float* out = scratch.out + (d / kPanel * kPanel + v * kLanes + i) * kPanel + d % kPanel;
        store(out, load(out) * shrink[i]);
      }
    store(scratch.max + v * kLanes, old_max = new_max);
  }
  const Vec shift = old_max == -kInfinity ? splat(0.0f) : old_max;
  for (int64_t j = 0; j < count; j += kStep<T>) {
    Vec p[2] = {};
    for (int s = 0; s < kStep<T>; ++s) {
      p[s] = exp2<kExpDegree<T>>((load(scores + (j + s) * kPanel) - shift) * size_log2);
      sum += p[s];
      if (kDropout) p[s] = dropout.keeps(v, key + j + s) ? p[s] * dropout_scale : splat(0.0f);
    }
    store_wide(scratch.probs + j / kStep<T> * kPanel + v * kLanes, p);
  }
  store(scratch.sum + v * kLanes, sum);
}

template <class S, class T>
void forward_panel(const AttentionArgs& args, const ForwardScratch<T>& scratch, const Segment& segment, int64_t head,
                   int64_t first_query, int64_t packed_from) {
  const Sizes<T> size(args);
  const Scale scale(args.scale);
  const Panel panel(args, segment, first_query);
  Dropout dropout(args, segment, head, first_query);
  const int64_t query_row = segment.query_begin + first_query;
  pack_panel_columns<S, T>(scratch.query, row<S>(args.query, segment.batch, head, query_row), args.query.row_stride,
                           panel.rows, args.head_dim, scale.sign);
  for (int i = 0; i < kPanel; ++i) scratch.max[i] = -kInfinity, scratch.sum[i] = 0.0f;
  if (panel.key_begin == panel.key_end) memset(scratch.out, 0, kPanel * size.width * sizeof(float));

  const auto softmax = args.dropout_p > 0 ? softmax_block<true, T> : softmax_block<false, T>;
  const int64_t first_key = panel.key_begin / kBlockN * kBlockN;
  for (int64_t key = first_key; key < panel.key_end; key += kBlockN) {
    const Seen seen = panel.seen<T>(key, smaller(kBlockN, panel.key_end - key));
    const bool first = key == first_key;
    multiply_keys_queries<T>(by_rows(scratch.key + (key - packed_from) * size.depth, size.depth), scratch.query, seen,
                             size.steps, scratch.scores);
    for (int v = 0; v < seen.vectors; ++v)
      softmax(scratch, panel, v, key, seen.count[v], first, scale.size_log2, size.width, dropout,
              (float)(1 / (1 - args.dropout_p)));
    multiply_queries<T>(scratch.probs, scratch.value + (key - packed_from) / kStep<T> * size.width, seen, panel.rows,
                        args.head_dim, scratch.out, !first);
  }

  for (int64_t i = 0; i < panel.rows; ++i)  // no key seen: zeros
    unpack_row(row<S>(args.out, segment.batch, head, query_row + i), scratch.out + i * kPanel, kPanel, args.head_dim,
               scratch.sum[i] == 0.0f ? 0.0f : 1.0f / scratch.sum[i]);
  float* lse = args.lse + (segment.batch * args.query_heads + head) * args.query_len + query_row;
  for (int64_t i = 0; i < panel.rows; ++i)
    lse[i] = scale.lse(scratch.max[i], scratch.sum[i]);
}

// A task is a key-value head of a segment and a run of its query panels, for which it packs the keys that they see.
template <class S, class T>
void forward(const AttentionArgs& args) {
  const Sizes<T> size(args);
  const size_t bytes = ForwardScratch<T>(args, nullptr).bytes;
  const int64_t pairs = args.num_segments * args.kv_heads, group = args.query_heads / args.kv_heads;
  const int64_t panels = most_queries(args) / kPanel;
  // Enough tasks to keep every thread busy to the end, and no more: each packs its keys again.
  const int64_t chunks = pairs ? larger(1, smaller(panels, (4 * args.num_threads + pairs - 1) / pairs)) : 0;
  const int64_t chunk_rows = chunks ? (panels + chunks - 1) / chunks * kPanel : 0;
#pragma omp parallel num_threads(args.num_threads) if (args.num_threads > 1 && pairs * chunks > 1)
  {
    const ForwardScratch<T> scratch(args, args.workspace + bytes * omp_get_thread_num());
    const TileRegisters<T> registers;
#pragma omp for schedule(dynamic, 1)
    for (int64_t task = 0; task < pairs * chunks; ++task) {
      const int64_t chunk = chunks - 1 - task / pairs, pair = task % pairs;  // the longest (under a causal mask) first
      const Segment& segment = args.segments[pair / args.kv_heads];
      const int64_t kv_head = pair % args.kv_heads;
      const int64_t begin = chunk * chunk_rows, end = smaller(segment.query_len, begin + chunk_rows);
      if (begin >= end) continue;
      const int64_t key_begin = visible(args, segment, begin).begin / kBlockN * kBlockN;
      const int64_t key_end = visible(args, segment, end - 1).end;
      const int64_t first = segment.key_begin + key_begin, count = larger(0, key_end - key_begin);
      pack_rows(scratch.key, size.depth, row<S>(args.key, segment.batch, kv_head, first), args.key.row_stride, count,
                args.head_dim);
      pack_blocks<S, T>(scratch.value, row<S>(args.value, segment.batch, kv_head, first), args.value.row_stride, count,
                        args.head_dim);
      for (int64_t head = kv_head * group; head < (kv_head + 1) * group; ++head)
        for (int64_t query = begin; query < end; query += kPanel)
          forward_panel<S, T>(args, scratch, segment, head, query, key_begin);
    }
  }
}

// ---- forward for few queries: decoding ----------------------------------------------------------------------------------
//
// With a handful of queries the time is that of reading K and V once from memory, and packing would read and write them
// again. So here keys are used where they lie: dot products along head_dim, kLanes keys at a time, whose lanes are then
// summed to a vector of scores.

constexpr int kFewRows = 8;  // query heads of the group x queries
constexpr int kMaxHeadDim = 256;

bool few_queries(const AttentionArgs& args) {
  const int64_t group = args.query_heads / args.kv_heads;
  for (int64_t i = 0; i < args.num_segments; ++i)
    if (args.segments[i].query_len * group > kFewRows) return false;
  return args.dropout_p == 0;
}

// A query as its dot products take it: float, or bfloat16 where the CPU has a dot product for it.
template <class S> struct FewOperand { using Query = float; };
#if defined(__AVX512BF16__)
template <> struct FewOperand<bfloat16> { using Query = bfloat16; };
#endif
template <class S> using FewQuery = typename FewOperand<S>::Query;

template <class S>
struct FewScratch {
  FewQuery<S>* query;   // (kFewRows x width)
  float *out, *scores;  // (kFewRows x width), (kBlockN)
  int64_t width;
  size_t bytes;

  FewScratch(const AttentionArgs& args, char* base) : width(round_up(args.head_dim, 2 * kLanes)) {
    Arena arena{base};
    query = arena.take<FewQuery<S>>(kFewRows * width);
    out = arena.take<float>(kFewRows * width);
    scores = arena.take<float>(kBlockN);
    bytes = arena.used;
  }
};

// One query, times `sign`, with zeros up to two whole vectors.
template <class S>
void load_query(FewQuery<S>* to, const S* query, int64_t head_dim, float sign) {
  for (int64_t d = 0; d < round_up(head_dim, 2 * kLanes); d += kLanes)
    store(to + d, d < head_dim ? load_up_to(query + d, head_dim - d) * sign : Vec{});
}

#if defined(__AVX512BF16__)
// Up to 2 kLanes elements, zeros after them.
GPTCORE_INLINE UintVec load_pairs(const bfloat16* p, int64_t n) {
  if (n >= 2 * kLanes) return bit_cast<UintVec>(load((const float*)p));
  return (UintVec)_mm512_maskz_loadu_epi16(n > 0 ? (1u << n) - 1 : 0, p);
}
#endif

// The lanes of query . key, still to be summed.
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

// scores[j] = query . key j for j < count; what is beyond, up to a whole vector, is a copy of the last.
template <class S>
void dot_keys(const FewQuery<S>* query, const S* keys, int64_t stride, int64_t count, int64_t head_dim, float* scores) {
  for (int64_t j = 0; j < count; j += kLanes) {
    Vec products[kLanes];
    for (int i = 0; i < kLanes; ++i)
      products[i] = dot_lanes(query, keys + smaller(j + i, count - 1) * stride, head_dim);
    store(scores + j, sums_of(products));
  }
}

// out = out x shrink + the sum of probs[j] x value j for j < count.
template <class S>
void add_values(const float* probs, const S* values, int64_t stride, int64_t count, int64_t head_dim, float shrink,
                float* out) {
  constexpr int kVectors = 4;
  for (int64_t d = 0; d < head_dim; d += kVectors * kLanes) {
    Vec sum[kVectors];
    for (int v = 0; v < kVectors; ++v) sum[v] = d + v * kLanes < head_dim ? load(out + d + v * kLanes) * shrink : Vec{};
    for (int64_t j = 0; j < count; ++j)
      for (int v = 0; v < kVectors; ++v)
        if (d + v * kLanes < head_dim)
          sum[v] += splat(probs[j]) * load_up_to(values + j * stride + d + v * kLanes, head_dim - d - v * kLanes);
    for (int v = 0; v < kVectors; ++v)
      if (d + v * kLanes < head_dim) store(out + d + v * kLanes, sum[v]);
  }
}

#if defined(__AVX512BF16__)
// Two keys at a time, whose values are interleaved to the pairs that the dot product takes. So probabilities are rounded
// to bfloat16, as those of many queries are.
void add_values(const float* probs, const bfloat16* values, int64_t stride, int64_t count, int64_t head_dim,
                float shrink, float* out) {
  uint32_t pairs[kBlockN / 2];
  for (int64_t j = 0; j < count; j += kLanes) store((bfloat16*)pairs + j, load_up_to(probs + j, count - j));
  // Interleaving is by groups of four: lanes 4g to 4g + 3 of `low` are elements 8g to 8g + 3, of `high` the next four.
  const IntVec lane = lane_index(), swapped = (lane & 3) + (lane & 4) * (kLanes / 4);
  const IntVec first = swapped + (lane >> 3) * 4, second = first + kLanes / 2;
  const IntVec low = (lane & 3) + (lane >> 2) * 8, high = low + 4;
  constexpr int kParts = 2;
  for (int64_t d = 0; d < head_dim; d += kParts * 2 * kLanes) {
    Vec sum[kParts][2] = {};
    for (int p = 0; p < kParts; ++p)
      if (float* at = out + d + p * 2 * kLanes; d + p * 2 * kLanes < head_dim) {
        sum[p][0] = __builtin_shuffle(load(at), load(at + kLanes), low) * shrink;
        sum[p][1] = __builtin_shuffle(load(at), load(at + kLanes), high) * shrink;
      }
    for (int64_t j = 0; j < count; j += 2) {
      const UintVec pair = UintVec{} + pairs[j / 2];
      for (int p = 0; p < kParts; ++p) {
        const int64_t at = d + p * 2 * kLanes;
        if (at >= head_dim) continue;
        const bfloat16* value = values + j * stride + at;
        const __m512i even = (__m512i)load_pairs(value, head_dim - at);
        const __m512i odd = (__m512i)load_pairs(value + stride, j + 1 < count ? head_dim - at : 0);
        multiply_add(sum[p][0], pair, (UintVec)_mm512_unpacklo_epi16(even, odd));
        multiply_add(sum[p][1], pair, (UintVec)_mm512_unpackhi_epi16(even, odd));
      }
    }
    for (int p = 0; p < kParts; ++p)
      if (float* at = out + d + p * 2 * kLanes; d + p * 2 * kLanes < head_dim) {
        store(at, __builtin_shuffle(sum[p][0], sum[p][1], first));
        store(at + kLanes, __builtin_shuffle(sum[p][0], sum[p][1], second));
      }
  }
}
#endif

// A task is a key-value head of a segment with all of its queries.
template <class S>
void forward_few(const AttentionArgs& args) {
  const size_t bytes = FewScratch<S>(args, nullptr).bytes;
  const int64_t pairs = args.num_segments * args.kv_heads, group = args.query_heads / args.kv_heads;
  const Scale scale(args.scale);
#pragma omp parallel num_threads(args.num_threads) if (args.num_threads > 1 && pairs > 1)
  {
    const FewScratch<S> scratch(args, args.workspace + bytes * omp_get_thread_num());
#pragma omp for schedule(dynamic, 1)
    for (int64_t task = 0; task < pairs; ++task) {
      const Segment& segment = args.segments[task / args.kv_heads];
      const int64_t kv_head = task % args.kv_heads, rows = segment.query_len * group;
      float max[kFewRows], sum[kFewRows];
      for (int64_t r = 0; r < rows; ++r) {  // row r: head r / query_len of the group, query r % query_len
        const int64_t head = kv_head * group + r / segment.query_len, query = r % segment.query_len;
        load_query(scratch.query + r * scratch.width,
                   row<S>(args.query, segment.batch, head, segment.query_begin + query), args.head_dim, scale.sign);
        memset(scratch.out + r * scratch.width, 0, scratch.width * sizeof(float));
        max[r] = -kInfinity, sum[r] = 0.0f;
      }
      for (int64_t block = 0; block < segment.key_len; block += kBlockN)
        for (int64_t r = 0; r < rows; ++r) {
          Range range = visible(args, segment, r % segment.query_len);
          const int64_t begin = larger(block, range.begin), count = smaller(block + kBlockN, range.end) - begin;
          if (count <= 0) continue;
          const int64_t first = segment.key_begin + begin;
          dot_keys(scratch.query + r * scratch.width, row<S>(args.key, segment.batch, kv_head, first),
                   args.key.row_stride, count, args.head_dim, scratch.scores);
          Vec block_max = splat(-kInfinity), block_sum = Vec{};
          for (int64_t j = 0; j < count; j += kLanes)
            block_max = gptcore::GPTCORE_ISA::max(block_max, load(scratch.scores + j));
          float new_max = max[r];
          for (int i = 0; i < kLanes; ++i) new_max = block_max[i] > new_max ? block_max[i] : new_max;
          const float shift = new_max == -kInfinity ? 0.0f : new_max;
          for (int64_t j = 0; j < count; j += kLanes) {
            Vec p = exp2((load(scratch.scores + j) - shift) * scale.size_log2);
            block_sum += lane_index() < (int32_t)(count - j) ? p : Vec{};
            store(scratch.scores + j, p);
          }
          const float shrink = exp2f((max[r] - shift) * scale.size_log2);
          sum[r] = sum[r] * shrink + sum_lanes(block_sum), max[r] = new_max;
          add_values(scratch.scores, row<S>(args.value, segment.batch, kv_head, first), args.value.row_stride, count,
                     args.head_dim, shrink, scratch.out + r * scratch.width);
        }
      for (int64_t r = 0; r < rows; ++r) {
        const int64_t head = kv_head * group + r / segment.query_len;
        const int64_t query = segment.query_begin + r % segment.query_len;
        unpack_row(row<S>(args.out, segment.batch, head, query), scratch.out + r * scratch.width, 1, args.head_dim,
                   sum[r] == 0 ? 0.0f : 1.0f / sum[r]);
        args.lse[(segment.batch * args.query_heads + head) * args.query_len + query] = scale.lse(max[r], sum[r]);
      }
    }
  }
}

// ---- backward ---------------------------------------------------------------------------------------------------------

template <class T>
struct BackwardScratch {
  T *key, *value;                      // K, V (keys x depth)
  Wide<T>* key_blocks;                 // K (keys / kStep x width)
  float *grad_key, *grad_value;        // dK, dV (keys x width), in panels
  Wide<T>*query, *grad_out;            // of the panel at hand: Q^T, dO^T (steps x kPanel)
  Wide<T>*query_rows, *grad_out_rows;  // Q, dO (kPanel / kStep x width)
  float *scores, *grad_probs;          // S^T, then P^T; dP^T, then dS^T (kBlockN x kPanel)
  T *probs, *grad_scores;              // P^T, dS^T as left operands; for T = float the same memory
  Wide<T>* grad_scores_wide;           // dS^T as right operand; likewise
  float* grad_query;                   // dQ (kPanel x width), in panels
  float *lse, *delta;                  // of each lane
  size_t bytes;

  BackwardScratch(const AttentionArgs& args, char* base) {
    const Sizes<T> size(args);
    const int64_t keys = most_keys(args);
    Arena arena{base};
    key = arena.take<T>(keys * size.depth);
    value = arena.take<T>(keys * size.depth);
    key_blocks = arena.take<Wide<T>>(keys / kStep<T> * size.width);
    grad_key = arena.take<float>(keys * size.width);
    grad_value = arena.take<float>(keys * size.width);
    query = arena.take<Wide<T>>(size.steps * kPanel);
    grad_out = arena.take<Wide<T>>(size.steps * kPanel);
    query_rows = arena.take<Wide<T>>(kPanel / kStep<T> * size.width);
    grad_out_rows = arena.take<Wide<T>>(kPanel / kStep<T> * size.width);
    scores = arena.take<float>(kBlockN * kPanel);
    grad_probs = arena.take<float>(kBlockN * kPanel);
    if constexpr (kStep<T> == 1) {
      probs = scores, grad_scores = grad_probs, grad_scores_wide = grad_probs;
    } else {
      probs = arena.take<T>(kBlockN * kPanel);
      grad_scores = arena.take<T>(kBlockN * kPanel);
      grad_scores_wide = arena.take<Wide<T>>(kBlockN / kStep<T> * kPanel);
    }
    grad_query = arena.take<float>(kPanel * size.width);
    lse = arena.take<float>(kPanel);
    delta = arena.take<float>(kPanel);
    bytes = arena.used;
  }
};

// From scores and dP to P and dS = P (dP - delta), with P recomputed from the saved LSE (FlashAttention, algorithm 4).
template <bool kDropout, class T>
void softmax_backward_block(const BackwardScratch<T>& scratch, const Panel& panel, int64_t key, const Seen& seen,
                            float size, Dropout& dropout, float dropout_scale) {
  for (int v = 0; v < seen.vectors; ++v) {
    const Vec lse = load(scratch.lse + v * kLanes);
    const Vec delta = load(scratch.delta + v * kLanes);
    const int64_t count = seen.count[v], unmasked = panel.unmasked(v, key, count);
    for (int64_t j = 0; j < count; j += kStep<T>) {
      Vec ds[2] = {};
      for (int s = 0; s < kStep<T> && j + s < count; ++s) {
        const int64_t at = (j + s) * kPanel + v * kLanes;
        // Rounded like the maximum in the LSE, so that equal numbers cancel to the last digit.
        Vec score = rounded(load(scratch.scores + at) * size);
        Vec p = exp2<kExpDegree<T>>((score - lse) * kLog2e), dp = load(scratch.grad_probs + at);
        if (j + s >= unmasked) {
          IntVec sees = panel.sees(v, key + j + s);
          p = sees ? p : splat(0.0f), dp = sees ? dp : splat(0.0f);
        }
        Vec dropped = p;
        if (kDropout) {
          IntVec kept = dropout.keeps(v, key + j + s);
          dropped = kept ? p * dropout_scale : splat(0.0f), dp = kept ? dp * dropout_scale : splat(0.0f);
        }
        ds[s] = p * (dp - delta);
        store(scratch.probs + at, dropped);
        store(scratch.grad_scores + at, ds[s]);
      }
      if constexpr (kStep<T> > 1) store_wide(scratch.grad_scores_wide + j / kStep<T> * kPanel + v * kLanes, ds);
    }
  }
}

// Packs one panel of queries: Q and dO both ways, and of each query its LSE and delta = rowsum(dO O) - dLSE. The sum
// takes the order in which dP = dO V^T is summed: where a query sees one key alone, dP - delta is exactly zero.
template <class S, class T>
void pack_panel(const AttentionArgs& args, const BackwardScratch<T>& scratch, const Segment& segment, int64_t head,
                const Panel& panel) {
  const int64_t at = segment.query_begin + panel.first, rows = panel.rows;
  const S* query = row<S>(args.query, segment.batch, head, at);
  const S* out = row<S>(args.out, segment.batch, head, at);
  const S* grad_out = row<S>(args.grad_out, segment.batch, head, at);
  pack_panel_columns<S, T>(scratch.query, query, args.query.row_stride, rows, args.head_dim, Scale(args.scale).sign);
  pack_panel_columns<S, T>(scratch.grad_out, grad_out, args.grad_out.row_stride, rows, args.head_dim, 1.0f);
  pack_panel_rows<S, T>(scratch.query_rows, query, args.query.row_stride, rows, args.head_dim, kPanel);
  pack_panel_rows<S, T>(scratch.grad_out_rows, grad_out, args.grad_out.row_stride, rows, args.head_dim, kPanel);
  const Sizes<T> size(args);
  if constexpr (kInTiles<T>) {  // whose order only tiles have: those of the diagonal of O dO^T
    T* out_rows = (T*)scratch.grad_query;  // not in use yet, nor are the scores
    pack_rows(out_rows, size.depth, out, args.out.row_stride, rows, args.head_dim);
    for (int64_t v = 0; v < kPanel; v += kLanes) {
      multiply_keys_queries<T>(by_rows(out_rows + v * size.depth, size.depth), scratch.grad_out + v, {1, {kLanes}},
                               size.steps, scratch.scores);
      for (int64_t i = 0; i < kLanes; ++i) scratch.delta[v + i] = scratch.scores[i * kPanel + i];
    }
  } else {
    Wide<T>* out_columns = (Wide<T>*)scratch.grad_query;
    pack_panel_columns<S, T>(out_columns, out, args.out.row_stride, rows, args.head_dim, 1.0f);
    for (int64_t v = 0; v < kPanel; v += kLanes) {
      Vec delta = {}, part = {};
      for (int64_t k = 0; k < size.steps; ++k) {
        if (k % (kDepth / kStep<T>) == 0) delta += part, part = Vec{};
        multiply_add(part, load_wide(out_columns + k * kPanel + v), load_wide(scratch.grad_out + k * kPanel + v));
      }
      store(scratch.delta + v, delta + part);
    }
  }
  const int64_t lse_row = (segment.batch * args.query_heads + head) * args.query_len + at;
  for (int64_t i = 0; i < kPanel; ++i) {
    if (i < rows && args.lse[lse_row + i] != -kInfinity) {
      scratch.lse[i] = args.lse[lse_row + i];
      if (args.grad_lse) scratch.delta[i] -= args.grad_lse[lse_row + i];
    } else {
      scratch.lse[i] = kInfinity, scratch.delta[i] = 0.0f;  // probability zero: right for idle lanes
    }
  }
}

// S^T of the few queries of `forward_few`, added up in its order: its LSE does not fit other roundings of large scores.
template <class S>
void few_scores(const AttentionArgs& args, const Segment& segment, int64_t head, const Panel& panel, int64_t key,
                int64_t count, float* scores) {
  const int64_t kv_head = head / (args.query_heads / args.kv_heads);
  for (int64_t i = 0; i < panel.rows; ++i) {
    alignas(64) FewQuery<S> query[kMaxHeadDim];
    alignas(64) float products[kBlockN];
    load_query(query, row<S>(args.query, segment.batch, head, segment.query_begin + panel.first + i), args.head_dim,
               Scale(args.scale).sign);
    dot_keys(query, row<S>(args.key, segment.batch, kv_head, segment.key_begin + key), args.key.row_stride, count,
             args.head_dim, products);
    for (int64_t j = 0; j < count; ++j) scores[j * kPanel + i] = products[j];
  }
}

// One block of keys against the panel: the five products.
template <class S, class T>
void backward_block(const AttentionArgs& args, const BackwardScratch<T>& scratch, const Segment& segment, int64_t head,
                    const Panel& panel, int64_t key, bool few, Dropout& dropout) {
  const Sizes<T> size(args);
  const int64_t count = smaller(kBlockN, panel.key_end - key), keys = round_up(segment.key_len, kBlockN);
  const Seen seen = panel.seen<T>(key, count);
  multiply_keys_queries<T>(by_rows(scratch.key + key * size.depth, size.depth), scratch.query, seen, size.steps,
                           scratch.scores);
  if (few) few_scores<S>(args, segment, head, panel, key, count, scratch.scores);
  multiply_keys_queries<T>(by_rows(scratch.value + key * size.depth, size.depth), scratch.grad_out, seen, size.steps,
                           scratch.grad_probs);
  const auto softmax = args.dropout_p > 0 ? softmax_backward_block<true, T> : softmax_backward_block<false, T>;
  softmax(scratch, panel, key, seen, Scale(args.scale).size, dropout, (float)(1 / (1 - args.dropout_p)));
  add_keys<T>(scratch.probs, scratch.grad_out_rows, seen, keys, args.head_dim, scratch.grad_value + key * kPanel);
  add_keys<T>(scratch.grad_scores, scratch.query_rows, seen, keys, args.head_dim, scratch.grad_key + key * kPanel);
  multiply_queries<T>(scratch.grad_scores_wide, scratch.key_blocks + key / kStep<T> * size.width, seen, panel.rows,
                      args.head_dim, scratch.grad_query, true);
}

// A task is one key-value head of a segment with all of its query heads, so every sum has one owner and one order:
// the gradients are deterministic, and those of a group of query heads are added in float32.
template <class S, class T>
void backward(const AttentionArgs& args) {
  const Sizes<T> size(args);
  const bool few = few_queries(args);
  const size_t bytes = BackwardScratch<T>(args, nullptr).bytes;
  const int64_t pairs = args.num_segments * args.kv_heads, group = args.query_heads / args.kv_heads;
#pragma omp parallel num_threads(args.num_threads) if (args.num_threads > 1 && pairs > 1)
  {
    const BackwardScratch<T> scratch(args, args.workspace + bytes * omp_get_thread_num());
    const TileRegisters<T> registers;
#pragma omp for schedule(dynamic, 1)
    for (int64_t task = 0; task < pairs; ++task) {
      const Segment& segment = args.segments[task / args.kv_heads];
      const int64_t kv_head = task % args.kv_heads, keys = segment.key_len;
      const S* key_rows = row<S>(args.key, segment.batch, kv_head, segment.key_begin);
      const S* value_rows = row<S>(args.value, segment.batch, kv_head, segment.key_begin);
      pack_rows(scratch.key, size.depth, key_rows, args.key.row_stride, keys, args.head_dim);
      pack_rows(scratch.value, size.depth, value_rows, args.value.row_stride, keys, args.head_dim);
      pack_blocks<S, T>(scratch.key_blocks, key_rows, args.key.row_stride, keys, args.head_dim);
      memset(scratch.grad_key, 0, round_up(keys, kBlockN) * size.width * sizeof(float));
      memset(scratch.grad_value, 0, round_up(keys, kBlockN) * size.width * sizeof(float));

      for (int64_t head = kv_head * group; head < (kv_head + 1) * group; ++head)
        for (int64_t query = 0; query < segment.query_len; query += kPanel) {
          const Panel panel(args, segment, query);
          Dropout dropout(args, segment, head, query);
          pack_panel<S, T>(args, scratch, segment, head, panel);
          memset(scratch.grad_query, 0, kPanel * size.width * sizeof(float));
          for (int64_t block = panel.key_begin / kBlockN * kBlockN; block < panel.key_end; block += kBlockN)
            backward_block<S, T>(args, scratch, segment, head, panel, block, few, dropout);
          for (int64_t i = 0; i < panel.rows; ++i)
            unpack_row(row<S>(args.grad_query, segment.batch, head, segment.query_begin + query + i),
                       scratch.grad_query + i * kPanel, kPanel, args.head_dim, args.scale);
        }
      for (int64_t i = 0; i < keys; ++i) {
        unpack_row(row<S>(args.grad_key, segment.batch, kv_head, segment.key_begin + i), scratch.grad_key + i * kPanel,
                   round_up(keys, kBlockN), args.head_dim, args.scale);
        unpack_row(row<S>(args.grad_value, segment.batch, kv_head, segment.key_begin + i),
                   scratch.grad_value + i * kPanel, round_up(keys, kBlockN), args.head_dim, 1.0f);
      }
    }
  }
}

}  // namespace

// ---- the entries of the kernel table ------------------------------------------------------------------------------------

size_t attention_forward_workspace(const AttentionArgs& args) {
  const bool few = few_queries(args);
  if (args.dtype == DType::bfloat16)
    return args.num_threads * (few ? FewScratch<bfloat16>(args, nullptr).bytes
                                   : ForwardScratch<Bfloat16Operand>(args, nullptr).bytes);
  if (few) return args.num_threads * FewScratch<float>(args, nullptr).bytes;
  return args.num_threads * ForwardScratch<float>(args, nullptr).bytes;
}

void attention_forward(const AttentionArgs& args) {
  const bool few = few_queries(args);
  switch (args.dtype) {
    case DType::bfloat16: return few ? forward_few<bfloat16>(args) : forward<bfloat16, Bfloat16Operand>(args);
    case DType::float16: return few ? forward_few<float16>(args) : forward<float16, float>(args);
    default: return few ? forward_few<float>(args) : forward<float, float>(args);
  }
}

size_t attention_backward_workspace(const AttentionArgs& args) {
  if (args.dtype == DType::bfloat16) return args.num_threads * BackwardScratch<Bfloat16Operand>(args, nullptr).bytes;
  return args.num_threads * BackwardScratch<float>(args, nullptr).bytes;
}

void attention_backward(const AttentionArgs& args) {
  switch (args.dtype) {
    case DType::bfloat16: return backward<bfloat16, Bfloat16Operand>(args);
    case DType::float16: return backward<float16, float>(args);
    default: return backward<float, float>(args);
  }
}

}  // namespace GPTCORE_ISA
}  // namespace gptcore
