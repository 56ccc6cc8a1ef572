// Attention forward for the CPU: softmax(scale Q K^T + mask) V. kernels/cpu/attention.h explains the algorithm.
#include "kernels/cpu/attention.h"

namespace gptcore {
namespace GPTCORE_ISA {
namespace {

// A panel is kPanel queries. kStep is 2 for bfloat16, whose dot products take pairs of numbers, else 1; a Wide<T> holds
// kStep numbers. depth and width are head_dim rounded up to kStep and to kPanel, and steps is depth / kStep.
template <class T>
struct ForwardScratch {
  T* key;                          // K (keys x depth)
  Wide<T>*value, *query, *probs;   // V (keys / kStep x width), Q^T (steps x kPanel), P^T (kBlockN / kStep x kPanel)
  float *scores, *out;             // S^T (kBlockN x kPanel), O (kPanel x width, in panels)
  float *max, *sum;                // per lane: maximum of the scores, sum of exp2((score - max) x |scale| log2(e))
  size_t bytes;

  ForwardScratch(const AttentionArgs& args, char* base) {
    const Sizes<T> size(args);
    const int64_t keys = max_key_len(args);
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

// Lazy rescaling (FlashAttention-4): accumulators are rescaled only if a maximum x size_log2 rises by more than this,
// so P is at most 2^8.
constexpr float kRescaleThreshold = 8.0f;

// One step of the online softmax for one vector of queries over `count` keys: scores become probabilities relative to
// the maximum, and the accumulators are rescaled if it rises. kDropout is a template parameter, so that the inner loop
// has no branch.
template <bool kDropout, class T>
void softmax_block(const ForwardScratch<T>& scratch, const Panel& panel, int v, int64_t key, int64_t count, bool first,
                   float size_log2, int64_t width, Dropout& dropout, float dropout_scale) {
  float* scores = scratch.scores + v * kLanes;
  const int64_t unmasked = panel.unmasked(v, key, count);
  // Four independent dependency chains.
  Vec maxima[4] = {splat(-kInfinity), splat(-kInfinity), splat(-kInfinity), splat(-kInfinity)};
  const int64_t fours = unmasked / 4 * 4;
  for (int64_t j = 0; j < fours; j += 4)
    for (int i = 0; i < 4; ++i) maxima[i] = max(maxima[i], load(scores + (j + i) * kPanel));
  for (int64_t j = fours; j < unmasked; ++j) maxima[0] = max(maxima[0], load(scores + j * kPanel));
  Vec block_max = max(max(maxima[0], maxima[1]), max(maxima[2], maxima[3]));
  for (int64_t j = unmasked; j < count; ++j) {
    Vec s = panel.attends(v, key + j) ? load(scores + j * kPanel) : splat(-kInfinity);
    store(scores + j * kPanel, s);
    block_max = max(block_max, s);
  }
  if (count % kStep<T>) store(scores + count * kPanel, splat(-kInfinity));  // pads an odd number of keys

  Vec old_max = load(scratch.max + v * kLanes), new_max = max(old_max, block_max);
  Vec sum = load(scratch.sum + v * kLanes);
  if (any((new_max - old_max) * size_log2 > kRescaleThreshold)) {
    // A lane that has attended to no key yet has a maximum of -inf, and -inf - -inf would be NaN.
    Vec rescale = exp2((old_max - (new_max == -kInfinity ? splat(0.0f) : new_max)) * size_log2);
    sum *= rescale;
    for (int64_t i = 0; i < smaller(kLanes, panel.rows - v * kLanes) && !first; ++i)
      for (int64_t d = 0; d < width; d += kLanes) {
        float* out = scratch.out + (d / kPanel * kPanel + v * kLanes + i) * kPanel + d % kPanel;
        store(out, load(out) * rescale[i]);
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

// Computes a panel of queries of one head of a segment (a document). K and V are packed from key `packed_from` on. If
// `nonfinite`, the NaN and infinities of V are zeroed in its packed copy, and added to the rows that attend to them.
template <class S, class T>
void forward_panel(const AttentionArgs& args, const ForwardScratch<T>& scratch, const Segment& segment, int64_t head,
                   int64_t first_query, int64_t packed_from, bool nonfinite) {
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
    const KeyCounts counts = panel.key_counts<T>(key, smaller(kBlockN, panel.key_end - key));
    const bool first = key == first_key;
    multiply_keys_queries<T>(by_rows(scratch.key + (key - packed_from) * size.depth, size.depth), scratch.query, counts,
                             size.steps, scratch.scores);
    for (int v = 0; v < counts.vectors; ++v)
      softmax(scratch, panel, v, key, counts.count[v], first, scale.size_log2, size.width, dropout,
              (float)(1 / (1 - args.dropout_p)));
    multiply_queries<T>(scratch.probs, scratch.value + (key - packed_from) / kStep<T> * size.width, counts, panel.rows,
                        args.head_dim, scratch.out, !first);
  }

  if (nonfinite) {
    const int64_t kv_head = head / (args.query_heads / args.kv_heads);
    for (int64_t i = 0; i < panel.rows; ++i)
      for (int64_t key = panel.begin[i]; key < panel.end[i]; ++key)
        add_nonfinite(scratch.out + i * kPanel, kPanel,
                      row<S>(args.value, segment.batch, kv_head, segment.key_begin + key), args.head_dim);
  }
  for (int64_t i = 0; i < panel.rows; ++i)  // a query that attends to no key gets zeros
    unpack_row(row<S>(args.out, segment.batch, head, query_row + i), scratch.out + i * kPanel, kPanel, args.head_dim,
               scratch.sum[i] == 0.0f ? 0.0f : 1.0f / scratch.sum[i]);
  float* lse = args.lse + (segment.batch * args.query_heads + head) * args.query_len + query_row;
  for (int64_t i = 0; i < panel.rows; ++i) lse[i] = scale.lse(scratch.max[i], scratch.sum[i]);
}

// A task processes a range of query panels of one segment and KV head, and packs the K and V that they attend to.
template <class S, class T>
void forward(Types<S, T>, const AttentionArgs& args) {
  const Sizes<T> size(args);
  const size_t bytes = ForwardScratch<T>(args, nullptr).bytes;
  const int64_t pairs = args.num_segments * args.kv_heads, group = args.query_heads / args.kv_heads;
  const int64_t panels = max_query_len(args) / kPanel;
  const bool masked = is_masked(args);
  // About four tasks per thread balance the load; more would pack the same keys more often.
  const int64_t chunks = pairs ? larger(1, smaller(panels, (4 * args.num_threads + pairs - 1) / pairs)) : 0;
  const int64_t chunk_rows = chunks ? (panels + chunks - 1) / chunks * kPanel : 0;
#pragma omp parallel num_threads(args.num_threads) if (args.num_threads > 1 && pairs * chunks > 1)
  {
    const ForwardScratch<T> scratch(args, args.workspace + bytes * omp_get_thread_num());
    const TileRegisters<T> registers;
#pragma omp for schedule(dynamic, 1)
    for (int64_t task = 0; task < pairs * chunks; ++task) {
      const int64_t chunk = chunks - 1 - task / pairs, pair = task % pairs;  // the last chunks take longest if causal
      const Segment& segment = args.segments[pair / args.kv_heads];
      const int64_t kv_head = pair % args.kv_heads;
      const int64_t begin = chunk * chunk_rows, end = smaller(segment.query_len, begin + chunk_rows);
      if (begin >= end || is_decode(args, segment)) continue;
      const int64_t key_begin = attended(args, segment, begin).begin / kBlockN * kBlockN;
      const int64_t key_end = attended(args, segment, end - 1).end;
      const int64_t first = segment.key_begin + key_begin, count = larger(0, key_end - key_begin);
      pack_rows(scratch.key, size.depth, row<S>(args.key, segment.batch, kv_head, first), args.key.row_stride, count,
                args.head_dim);
      const S* values = row<S>(args.value, segment.batch, kv_head, first);
      pack_blocks<S, T>(scratch.value, values, args.value.row_stride, count, args.head_dim);
      const bool nonfinite = masked && any_nonfinite(values, args.value.row_stride, count, args.head_dim);
      if (nonfinite) zero_nonfinite(scratch.value, round_up(count, kBlockN) / kStep<T> * size.width);
      for (int64_t head = kv_head * group; head < (kv_head + 1) * group; ++head)
        for (int64_t query = begin; query < end; query += kPanel)
          forward_panel<S, T>(args, scratch, segment, head, query, key_begin, nonfinite);
    }
  }
}

// Whether there are segments for the decoding kernel, or for that above. Each is computed as if it were alone.
bool has_segments(const AttentionArgs& args, bool decode) {
  for (int64_t i = 0; i < args.num_segments; ++i)
    if (is_decode(args, args.segments[i]) == decode) return true;
  return false;
}

}  // namespace

size_t attention_forward_workspace(const AttentionArgs& args) {
  const size_t decoding = has_segments(args, true) ? attention_decode_workspace(args) : 0;
  return !has_segments(args, false) ? decoding : larger(decoding, with_types(args.dtype, [&](auto types) {
    return args.num_threads * ForwardScratch<typename decltype(types)::Operand>(args, nullptr).bytes;
  }));
}

void attention_forward(const AttentionArgs& args) {
  if (has_segments(args, true)) attention_decode(args);
  if (has_segments(args, false)) with_types(args.dtype, [&](auto types) { forward(types, args); });
}

}  // namespace GPTCORE_ISA
}  // namespace gptcore
