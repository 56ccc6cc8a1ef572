// Attention backward for the CPU: P is recomputed from the saved LSE (FlashAttention, algorithm 4). attention.h has the
// method.
#include "kernels/cpu/attention_decode.h"

namespace gptcore {
namespace GPTCORE_ISA {
namespace {

template <class T>
struct BackwardScratch {
  T *key, *value;                      // K, V (keys x depth)
  Wide<T>* key_blocks;                 // K (keys / kStep x width)
  float *grad_key, *grad_value;        // dK, dV (keys x width), in panels
  Wide<T>*query, *grad_out;            // of the panel: Q^T, dO^T (steps x kPanel)
  Wide<T>*query_rows, *grad_out_rows;  // Q, dO (kPanel / kStep x width)
  float *scores, *grad_probs;          // S^T, then P^T; dP^T, then dS^T (kBlockN x kPanel)
  T *probs, *grad_scores;              // P^T, dS^T as A operands; for T = float the same memory
  Wide<T>* grad_scores_wide;           // dS^T as B operand; likewise
  float* grad_query;                   // dQ (kPanel x width), in panels
  float *lse, *delta;                  // per lane
  size_t bytes;

  BackwardScratch(const AttentionArgs& args, char* base) {
    const Sizes<T> size(args);
    const int64_t keys = max_key_len(args);
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
void softmax_backward_block(const BackwardScratch<T>& scratch, const Panel& panel, int64_t key, const KeyCounts& counts,
                            float size, Dropout& dropout, float dropout_scale) {
  for (int v = 0; v < counts.vectors; ++v) {
    const Vec lse = load(scratch.lse + v * kLanes);
    const Vec delta = load(scratch.delta + v * kLanes);
    const int64_t count = counts.count[v], unmasked = panel.unmasked(v, key, count);
    for (int64_t j = 0; j < count; j += kStep<T>) {
      Vec ds[2] = {};
      for (int s = 0; s < kStep<T> && j + s < count; ++s) {
        const int64_t at = (j + s) * kPanel + v * kLanes;
        // Rounded like the maximum in the LSE (docs/kernels.md, "Rounding").
        Vec score = rounded(load(scratch.scores + at) * size);
        Vec p = exp2<kExpDegree<T>>((score - lse) * kLog2e), dp = load(scratch.grad_probs + at);
        Vec dropped = p;
        if (kDropout) {
          IntVec kept = dropout.keeps(v, key + j + s);
          dropped = kept ? p * dropout_scale : splat(0.0f), dp = kept ? dp * dropout_scale : splat(0.0f);
        }
        ds[s] = p * (dp - delta);
        if (j + s >= unmasked) {  // last, since dp and delta may be NaN
          const IntVec mask = panel.attends(v, key + j + s);
          dropped = mask ? dropped : splat(0.0f), ds[s] = mask ? ds[s] : splat(0.0f);
        }
        store(scratch.probs + at, dropped);
        store(scratch.grad_scores + at, ds[s]);
      }
      if constexpr (kStep<T> > 1) store_wide(scratch.grad_scores_wide + j / kStep<T> * kPanel + v * kLanes, ds);
    }
  }
}

// Packs one panel of queries: Q and dO in both layouts, and per query the LSE and delta = rowsum(dO O) - dLSE. delta is
// summed in the order of dP = dO V^T: for a query that attends to one key, dP - delta is exactly 0. Returns whether Q
// or dO may have non-finite elements: LSE or delta is then non-finite, too.
template <class S, class T>
bool pack_panel(const AttentionArgs& args, const BackwardScratch<T>& scratch, const Segment& segment, int64_t head,
                const Panel& panel) {
  const int64_t first = segment.query_begin + panel.first, rows = panel.rows;
  const S* query = row<S>(args.query, segment.batch, head, first);
  const S* out = row<S>(args.out, segment.batch, head, first);
  const S* grad_out = row<S>(args.grad_out, segment.batch, head, first);
  pack_panel_columns<S, T>(scratch.query, query, args.query.row_stride, rows, args.head_dim, Scale(args.scale).sign);
  pack_panel_columns<S, T>(scratch.grad_out, grad_out, args.grad_out.row_stride, rows, args.head_dim, 1.0f);
  pack_panel_rows<S, T>(scratch.query_rows, query, args.query.row_stride, rows, args.head_dim, kPanel);
  pack_panel_rows<S, T>(scratch.grad_out_rows, grad_out, args.grad_out.row_stride, rows, args.head_dim, kPanel);
  const Sizes<T> size(args);
  if constexpr (kInTiles<T>) {  // the order of AMX tiles: delta is the diagonal of O dO^T
    T* out_rows = (T*)scratch.grad_query;  // free at this point, like the scores
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
  const int64_t lse_row = (segment.batch * args.query_heads + head) * args.query_len + first;
  bool nonfinite = false;
  for (int64_t i = 0; i < kPanel; ++i) {
    if (i < rows) nonfinite |= !is_finite(args.lse[lse_row + i]) || !is_finite(scratch.delta[i]);
    if (i < rows && args.lse[lse_row + i] != -kInfinity) {
      scratch.lse[i] = args.lse[lse_row + i];
      if (args.grad_lse) scratch.delta[i] -= args.grad_lse[lse_row + i];
    } else {
      scratch.lse[i] = kInfinity, scratch.delta[i] = 0.0f;  // probability 0, also for idle lanes
    }
  }
  if (nonfinite) {
    zero_nonfinite(scratch.query_rows, kPanel / kStep<T> * size.width);
    zero_nonfinite(scratch.grad_out_rows, kPanel / kStep<T> * size.width);
  }
  return nonfinite;
}

// Adds the non-finite elements of K to dQ, and those of Q and dO to dK and dV, of a panel.
template <class S, class T>
void add_nonfinite_rows(const AttentionArgs& args, const BackwardScratch<T>& scratch, const Segment& segment,
                        int64_t head, const Panel& panel, bool of_keys, bool of_queries) {
  const int64_t kv_head = head / (args.query_heads / args.kv_heads), keys = round_up(segment.key_len, kBlockN);
  for (int64_t i = 0; i < panel.rows; ++i) {
    const int64_t index = segment.query_begin + panel.first + i;
    const S* query = row<S>(args.query, segment.batch, head, index);
    const S* grad_out = row<S>(args.grad_out, segment.batch, head, index);
    for (int64_t key = panel.begin[i]; key < panel.end[i]; ++key) {
      if (of_keys)
        add_nonfinite(scratch.grad_query + i * kPanel, kPanel,
                      row<S>(args.key, segment.batch, kv_head, segment.key_begin + key), args.head_dim);
      if (!of_queries) continue;
      add_nonfinite(scratch.grad_key + key * kPanel, keys, query, args.head_dim);
      add_nonfinite(scratch.grad_value + key * kPanel, keys, grad_out, args.head_dim);
    }
  }
}

// S^T of decoded queries, summed in the order of attention_decode: its LSE does not fit other roundings of large
// scores.
template <class S>
void decode_scores(const AttentionArgs& args, const Segment& segment, int64_t head, const Panel& panel, int64_t key,
                int64_t count, float* scores) {
  const int64_t kv_head = head / (args.query_heads / args.kv_heads);
  for (int64_t i = 0; i < panel.rows; ++i) {
    alignas(64) DecodeQuery<S> query[kMaxHeadDim];
    alignas(64) float products[kBlockN];
    load_query(query, row<S>(args.query, segment.batch, head, segment.query_begin + panel.first + i), args.head_dim,
               Scale(args.scale).sign);
    dot_keys(query, row<S>(args.key, segment.batch, kv_head, segment.key_begin + key), args.key.row_stride, count,
             args.head_dim, products);
    for (int64_t j = 0; j < count; ++j) scores[j * kPanel + i] = products[j];
  }
}

// The five products of a panel and one block of keys.
template <class S, class T>
void backward_block(const AttentionArgs& args, const BackwardScratch<T>& scratch, const Segment& segment, int64_t head,
                    const Panel& panel, int64_t key, bool decoded, Dropout& dropout) {
  const Sizes<T> size(args);
  const int64_t count = smaller(kBlockN, panel.key_end - key), keys = round_up(segment.key_len, kBlockN);
  const KeyCounts counts = panel.key_counts<T>(key, count);
  multiply_keys_queries<T>(by_rows(scratch.key + key * size.depth, size.depth), scratch.query, counts, size.steps,
                           scratch.scores);
  if (decoded) decode_scores<S>(args, segment, head, panel, key, count, scratch.scores);
  multiply_keys_queries<T>(by_rows(scratch.value + key * size.depth, size.depth), scratch.grad_out, counts, size.steps,
                           scratch.grad_probs);
  const auto softmax = args.dropout_p > 0 ? softmax_backward_block<true, T> : softmax_backward_block<false, T>;
  softmax(scratch, panel, key, counts, Scale(args.scale).size, dropout, (float)(1 / (1 - args.dropout_p)));
  add_keys<T>(scratch.probs, scratch.grad_out_rows, counts, keys, args.head_dim, scratch.grad_value + key * kPanel);
  add_keys<T>(scratch.grad_scores, scratch.query_rows, counts, keys, args.head_dim, scratch.grad_key + key * kPanel);
  multiply_queries<T>(scratch.grad_scores_wide, scratch.key_blocks + key / kStep<T> * size.width, counts, panel.rows,
                      args.head_dim, scratch.grad_query, true);
}

// A task is one key-value head of a segment with all of its query heads. So the gradients are deterministic, and those
// of a group of query heads are accumulated in float32.
template <class S, class T>
void backward(Types<S, T>, const AttentionArgs& args) {
  const Sizes<T> size(args);
  const bool masked = is_masked(args);
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
      const bool of_keys = masked && any_nonfinite(key_rows, args.key.row_stride, keys, args.head_dim);
      if (of_keys) zero_nonfinite(scratch.key_blocks, round_up(keys, kBlockN) / kStep<T> * size.width);
      memset(scratch.grad_key, 0, round_up(keys, kBlockN) * size.width * sizeof(float));
      memset(scratch.grad_value, 0, round_up(keys, kBlockN) * size.width * sizeof(float));

      for (int64_t head = kv_head * group; head < (kv_head + 1) * group; ++head)
        for (int64_t query = 0; query < segment.query_len; query += kPanel) {
          const Panel panel(args, segment, query);
          Dropout dropout(args, segment, head, query);
          const bool of_queries = pack_panel<S, T>(args, scratch, segment, head, panel);
          memset(scratch.grad_query, 0, kPanel * size.width * sizeof(float));
          for (int64_t block = panel.key_begin / kBlockN * kBlockN; block < panel.key_end; block += kBlockN)
            backward_block<S, T>(args, scratch, segment, head, panel, block, is_decode(args, segment), dropout);
          if (of_keys || of_queries)
            add_nonfinite_rows<S>(args, scratch, segment, head, panel, of_keys, of_queries);
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

size_t attention_backward_workspace(const AttentionArgs& args) {
  return with_types(args.dtype, [&](auto types) {
    return args.num_threads * BackwardScratch<typename decltype(types)::Operand>(args, nullptr).bytes;
  });
}

void attention_backward(const AttentionArgs& args) {
  with_types(args.dtype, [&](auto types) { backward(types, args); });
}

}  // namespace GPTCORE_ISA
}  // namespace gptcore
