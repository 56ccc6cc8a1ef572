// Attention forward: softmax(scale Q K^T + mask) V and the log-sum-exp of every query, as FlashAttention-2 computes
// them (Dao 2023, arXiv:2307.08691).
//
//             keys and values, in tiles that pass by, two stages
//            +-------+-------+-------+-------+
//            | K0 V0 | K1 V1 | K2 V2 | K3 V3 |
//            +-------+-------+-------+-------+
//     warp 0 |       |     \ |  not  |       |     A block owns a tile of query rows, a warp whole rows of it. Scores
//     Q   1  | full  | masked| visited       |     S = Q K^T stay in the warp's registers, become probabilities there,
//         2  |       |       \       |       |     and are the left operand of O += P V. Nothing but K and V passes
//         3  |       |       | \     |       |     through shared memory in the loop, and one barrier a tile suffices.
//            +-------+-------+-------+-------+
//
// The query heads that share a head of K and V are rows of one tile: row r is query r / group of head r % group. So K
// and V are read once for all of them, and decoding, with few queries, fills its rows with heads.
#pragma once

#include "kernels/cuda/policy.h"
#include "kernels/cuda/tile.cuh"
#include "kernels/kernels.h"

namespace gptcore {
namespace GPTCORE_GPU {

// The largest score of a row so far, and the sum of its exponentials relative to that.
struct RowSoftmax {
  float max, sum;
};

struct AttentionForwardParams {
  HeadsView query, key, value, out;
  float* lse;  // (batch, query_heads, query_len)
  const int64_t *cu_seqlens_q, *cu_seqlens_k;
  int64_t num_boundaries;
  int batch, kv_heads, group, query_len, kv_len, head_dim, together;
  // Scores are scaled by sign x scale. The sign goes into S, so that the largest score has the largest probability;
  // scale x log2(e) goes into the exponent. A scale of 0 is sign 0 and scale 1.
  float sign, scale, scale_log2;
  int64_t before, after;  // a query at position i sees the keys from i - before to i + after
  bool vectors;           // every row of every tensor is whole 16-byte vectors
  bool dropout;
  uint32_t dropout_threshold;
  float dropout_scale;
  uint64_t seed;
  // With more than one split each sums up its share of the key tiles, and attention_combine adds the shares.
  int splits;
  RowSoftmax* partial_softmax;  // (batch, query_heads, query_len, splits)
  float* partial_out;           // (batch, query_heads, query_len, splits, width), relative to its softmax
  int width;                    // of the tiles
};

// ---- one tile of scores ---------------------------------------------------------------------------------------------

constexpr float kMinusInfinity = -__builtin_inff();

// S outside of what its row sees becomes -inf. `ranges` is the first of the warp's rows, `key` the tile's first key.
template <int kM, int kN>
GPTCORE_DEVICE void mask_scores(float (&s)[kM][kN][4], const Range* ranges, int key, int lane) {
#pragma unroll
  for (int m = 0; m < kM; ++m)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const Range range = ranges[m * 16 + half * 8 + lane / 4];
#pragma unroll
      for (int n = 0; n < kN; ++n)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int column = key + n * 8 + lane % 4 * 2 + i;
          if (column < range.begin || column >= range.end) s[m][n][half * 2 + i] = kMinusInfinity;
        }
    }
}

// How far a row's maximum may lag behind its scores, in units of log2: probabilities then go up to 2^8 before the
// division by their sum, and the sums so far hardly ever need to be scaled (FlashAttention-4).
constexpr float kMaxLag = 8.0f;

// Exponents are (score - max) scale_log2. For 16 bits one fused multiply-add subtracts the maximum times the scale, which
// is rounded once and the same wherever this maximum is used: its error cancels. For float32 the difference comes first,
// one operation more, so that the maximum has a probability of exactly 1: where one key has all the weight, the output
// is its value, bit for bit, and the backward subtracts equal numbers.
template <class T>
constexpr bool kDifferenceFirst = sizeof(T) == 4;

// From sums relative to one maximum to sums relative to another.
template <class T>
GPTCORE_DEVICE float rescale(float from, float to, float scale_log2) {
  return exp2_approx(kDifferenceFirst<T> ? mul_rn(from - to, scale_log2)
                                         : mul_rn(from, scale_log2) - mul_rn(to, scale_log2));
}

// One step of the online softmax: scores become probabilities relative to the row's maximum; if that has to rise, what
// was summed under the old one is scaled down. Sums are of the lane's own columns; its quad's are added at the end.
template <class T, int kM, int kN, int kO>
GPTCORE_DEVICE void softmax_step(float (&s)[kM][kN][4], RowSoftmax (&rows)[kM][2], float (&acc)[kM][kO][4],
                                 float scale_log2) {
  // All rows together, so that one waits while the others compute.
  float max[kM][2];
#pragma unroll
  for (int m = 0; m < kM; ++m)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      max[m][half] = rows[m][half].max;
#pragma unroll
      for (int n = 0; n < kN; ++n) max[m][half] = fmaxf(max[m][half], fmaxf(s[m][n][half * 2], s[m][n][half * 2 + 1]));
    }
#pragma unroll
  for (int mask = 1; mask <= 2; mask *= 2)
#pragma unroll
    for (int m = 0; m < kM; ++m)
#pragma unroll
      for (int half = 0; half < 2; ++half) max[m][half] = fmaxf(max[m][half], shuffle_xor(max[m][half], mask));
  bool rises = false;  // also when there was no maximum yet; not if there still is none
#pragma unroll
  for (int m = 0; m < kM; ++m)
#pragma unroll
    for (int half = 0; half < 2; ++half) rises |= (max[m][half] - rows[m][half].max) * scale_log2 > kMaxLag;
  if (rises) {
#pragma unroll
    for (int m = 0; m < kM; ++m)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        RowSoftmax& row = rows[m][half];
        const float shrink = max[m][half] == row.max ? 1.0f : rescale<T>(row.max, max[m][half], scale_log2);
        row.max = max[m][half];
        row.sum *= shrink;
#pragma unroll
        for (int j = 0; j < kO; ++j) acc[m][j][half * 2] *= shrink, acc[m][j][half * 2 + 1] *= shrink;
      }
  }
#pragma unroll
  for (int m = 0; m < kM; ++m)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      RowSoftmax& row = rows[m][half];
      const float base = row.max == kMinusInfinity ? 0.0f : row.max, shift = mul_rn(base, scale_log2);
#pragma unroll
      for (int n = 0; n < kN; ++n)
#pragma unroll
        for (int i = half * 2; i < half * 2 + 2; ++i) {
          s[m][n][i] = exp2_approx(kDifferenceFirst<T> ? mul_rn(s[m][n][i] - base, scale_log2)
                                                       : fmaf(s[m][n][i], scale_log2, -shift));
          row.sum += s[m][n][i];
        }
    }
}

// Zeros the probabilities that are dropped; the others are scaled at the end. Four keys share the words of one Philox,
// so of two neighbouring lanes each draws for one half of the rows. `row` is the warp's first, of the rows of kv_head.
template <int kM, int kN>
GPTCORE_DEVICE void drop(float (&s)[kM][kN][4], const AttentionForwardParams& p, int batch, int kv_head, int row,
                         int key, int lane) {
  static_assert(4 * kN <= 32, "one bit for each key of a lane's row");
#pragma unroll
  for (int m = 0; m < kM; ++m) {
    const int own_row = row + m * 16 + lane % 2 * 8 + lane / 4;
    const int head = (batch * p.kv_heads + kv_head) * p.group + own_row % p.group;
    uint32_t own_kept = 0;
#pragma unroll 1
    for (int n = 0; n < kN; ++n) {
      const Philox words(key / 4 + n * 2 + lane % 4 / 2, own_row / p.group, head, p.seed);
#pragma unroll
      for (int w = 0; w < 4; ++w) own_kept |= (uint32_t)(words.w[w] >= p.dropout_threshold) << (n * 4 + w);
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const uint32_t kept = shuffle(own_kept, lane / 2 * 2 + half) >> lane % 2 * 2;
#pragma unroll
      for (int n = 0; n < kN; ++n)
#pragma unroll
        for (int i = 0; i < 2; ++i)
          if (!(kept >> (n * 4 + i) & 1)) s[m][n][half * 2 + i] = 0.0f;
    }
  }
}

template <class T>
GPTCORE_DEVICE float log_sum_exp(RowSoftmax row, float scale, float scale_log2) {
  if (row.sum == 0.0f) return kMinusInfinity;
  // The sum is relative to the rounded shift; the score that the LSE stands for is rounded as the backward rounds it.
  const float shift_error = kDifferenceFirst<T> ? 0.0f : fmaf(row.max, scale_log2, -mul_rn(row.max, scale_log2));
  return mul_rn(row.max, scale) + (log_of(row.sum) - kLn2 * shift_error);
}

// ---- the kernel -----------------------------------------------------------------------------------------------------

template <class Math, int kWidth, bool kFew>
struct ForwardShared {
  using T = Storage<Math>;
  static constexpr ForwardTile kTile = forward_tile(kWidth, sizeof(T), kFew);
  static constexpr int kThreads = kTile.threads(), kBlocks = kTile.blocks(), kRows = kTile.rows();
  static constexpr int kQueryBytes = kRows * kWidth * sizeof(T);
  static constexpr int kKeyBytes = kTile.keys * kWidth * sizeof(T);  // and as many of values
  static constexpr int kRanges = kQueryBytes + 2 * 2 * kKeyBytes;
  static constexpr int kBytes = kRanges + kRows * sizeof(Range);
};

template <class Math, int kWidth, bool kFew>
__global__ void
__launch_bounds__(ForwardShared<Math, kWidth, kFew>::kThreads, ForwardShared<Math, kWidth, kFew>::kBlocks)
    attention_forward_kernel(AttentionForwardParams p) {
  using T = Storage<Math>;
  using Shared = ForwardShared<Math, kWidth, kFew>;
  constexpr int kThreads = Shared::kThreads, kRows = Shared::kRows, kKeys = Shared::kTile.keys;
  constexpr int kM = Shared::kTile.m_tiles;

  char* const shared = shared_memory();
  const SharedTile<T, kWidth> query_tile{shared};
  Range* const ranges = reinterpret_cast<Range*>(shared + Shared::kRanges);
  const auto key_tile = [&](int tile) {
    return SharedTile<T, kWidth>{shared + Shared::kQueryBytes + tile % 2 * 2 * Shared::kKeyBytes};
  };
  const auto value_tile = [&](int tile) { return SharedTile<T, kWidth>{key_tile(tile).data + Shared::kKeyBytes}; };

  // Which rows of which head, and which split of their keys. Under a causal mask the last rows take longest: first.
  const int all_rows = p.query_len * p.group, row_tiles = (all_rows + kRows - 1) / kRows;
  const int split = blockIdx.x % p.splits;
  const BlockTile block = block_tile(blockIdx.x / p.splits, row_tiles, p.batch * p.kv_heads, p.together);
  const int first_row = (row_tiles - 1 - block.tile) * kRows;
  const int kv_head = block.head % p.kv_heads, batch = block.head / p.kv_heads;
  const int lane = threadIdx.x % 32, warp_row = threadIdx.x / 32 * 16 * kM;

  // What each row sees. The ends keep growing beyond the last row, where nothing is stored.
  for (int i = threadIdx.x; i < kRows; i += kThreads) {
    const Documents queries(p.cu_seqlens_q, p.num_boundaries, batch, p.query_len);
    const Documents keys(p.cu_seqlens_k, p.num_boundaries, batch, p.kv_len);
    const int query = (first_row + i) / p.group;
    const Range range = visible(query, queries, keys, p.num_boundaries, p.before, p.after);
    store_words(ranges + i, range.begin, range.end);
  }
  barrier();  // ranges
  const int begin = ranges[0].begin, end = ranges[kRows - 1].end;  // of the keys that any row sees
  const Range warp_first = ranges[warp_row], warp_last = ranges[warp_row + 16 * kM - 1];
  const int seen_tiles = begin < end ? (end - 1) / kKeys + 1 - begin / kKeys : 0;
  const int first_tile = begin / kKeys + (int)((int64_t)seen_tiles * split / p.splits);
  const int end_tile = begin / kKeys + (int)((int64_t)seen_tiles * (split + 1) / p.splits);

  const auto load_keys = [&](int tile) {
    const int key = tile * kKeys, count = end - key;
    load_tile<kKeys, kThreads>(key_tile(tile), rows_of<const T>(p.key, batch, kv_head, key), p.key.row_stride, count,
                               p.head_dim, p.vectors);
    load_tile<kKeys, kThreads>(value_tile(tile), rows_of<const T>(p.value, batch, kv_head, key), p.value.row_stride,
                               count, p.head_dim, p.vectors);
    copy_commit();
  };
  const auto row_of = [&](const HeadsView& view, int row) -> T* {
    const int at = first_row + row;
    if (at >= all_rows) return nullptr;
    if (p.group == 1) return rows_of<T>(view, batch, kv_head, at);  // without the divisions
    return rows_of<T>(view, batch, kv_head * p.group + at % p.group, at / p.group);
  };

  float acc[kM][kWidth / 8][4] = {};
  RowSoftmax rows[kM][2];
#pragma unroll
  for (int m = 0; m < kM; ++m) rows[m][0] = rows[m][1] = {kMinusInfinity, 0.0f};

  if (first_tile < end_tile) {
    load_rows<kRows, kThreads>(query_tile, [&](int row) -> const T* { return row_of(p.query, row); }, p.head_dim,
                               p.vectors);
    load_keys(first_tile);
  }
#pragma unroll 1
  for (int tile = first_tile; tile < end_tile; ++tile) {
    copy_wait<0>();
    barrier();  // this tile is there, and nobody reads the one before any more
    if (tile + 1 < end_tile) load_keys(tile + 1);

    const int key = tile * kKeys;
    if (key >= warp_last.end || key + kKeys <= warp_first.begin || first_row + warp_row >= all_rows) continue;
    float s[kM][kKeys / 8][4];
    multiply_transposed<Math>(s, query_tile, warp_row, key_tile(tile), 0, lane);
    if (p.sign != 1.0f) {
#pragma unroll
      for (int m = 0; m < kM; ++m)
#pragma unroll
        for (int n = 0; n < kKeys / 8; ++n)
#pragma unroll
          for (int i = 0; i < 4; ++i) s[m][n][i] *= p.sign;
    }
    const bool all_see_all = key >= warp_last.begin && key + kKeys <= warp_first.end;
    if (!all_see_all) mask_scores(s, ranges + warp_row, key, lane);
    softmax_step<T>(s, rows, acc, p.scale_log2);
    if (p.dropout) drop(s, p, batch, kv_head, first_row + warp_row, key, lane);
    multiply_add<Math>(acc, s, value_tile(tile), 0, lane);
  }

  // The sums of a row, from the four lanes that hold it.
#pragma unroll
  for (int m = 0; m < kM; ++m)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      rows[m][half].sum += shuffle_xor(rows[m][half].sum, 1);
      rows[m][half].sum += shuffle_xor(rows[m][half].sum, 2);
    }
  const auto lse_row = [&](int at) {
    const int head = (batch * p.kv_heads + kv_head) * p.group + at % p.group;
    return (int64_t)head * p.query_len + at / p.group;
  };

  if (p.splits > 1) {  // as they are, for attention_combine
#pragma unroll
    for (int m = 0; m < kM; ++m)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int at = first_row + warp_row + m * 16 + half * 8 + lane / 4;
        if (at >= all_rows) continue;
        const RowSoftmax row = rows[m][half];
        const int64_t part = lse_row(at) * p.splits + split;
        if (lane % 4 == 0) store_words(p.partial_softmax + part, bits_of(row.max), bits_of(row.sum));
        float* const to = p.partial_out + part * kWidth + lane % 4 * 2;
#pragma unroll
        for (int j = 0; j < kWidth / 8; ++j) store_pair(to + j * 8, acc[m][j][half * 2], acc[m][j][half * 2 + 1]);
      }
    return;
  }

  // The output is brought into whole vectors in the warp's rows of the Q tile, which nobody else reads. A row that saw
  // no key has a sum of 0: it gets zeros.
  warp_barrier();  // all lanes have read Q
#pragma unroll
  for (int m = 0; m < kM; ++m)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const RowSoftmax row = rows[m][half];
      const int in_tile = warp_row + m * 16 + half * 8 + lane / 4, at = first_row + in_tile;
      if (lane % 4 == 0 && at < all_rows) p.lse[lse_row(at)] = log_sum_exp<T>(row, p.scale, p.scale_log2);
      const float factor = row.sum == 0.0f ? 0.0f : p.dropout_scale / row.sum;
#pragma unroll
      for (int j = 0; j < kWidth / 8; ++j)
        store_pair(query_tile.pair(in_tile, j * 8 + lane % 4 * 2), acc[m][j][half * 2] * factor,
                   acc[m][j][half * 2 + 1] * factor);
    }
  warp_barrier();  // the warp's output is there
  store_rows<16 * kM>(query_tile, warp_row, [&](int row) { return row_of(p.out, row); }, p.head_dim, p.vectors, lane);
}

// ---- the shares of the splits, added --------------------------------------------------------------------------------

constexpr int kCombineThreads = 128;

// One warp a row.
template <class T>
__global__ void __launch_bounds__(kCombineThreads) attention_combine_kernel(AttentionForwardParams p) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  float* const weights = reinterpret_cast<float*>(shared_memory()) + warp * kMaxSplits;
  const int64_t query_heads = (int64_t)p.kv_heads * p.group, all_rows = p.batch * query_heads * p.query_len;
  const int64_t row = (int64_t)blockIdx.x * (kCombineThreads / 32) + warp;
  if (row >= all_rows) return;
  const RowSoftmax* const parts = p.partial_softmax + row * p.splits;
  const float* const part_out = p.partial_out + row * p.splits * p.width;

  RowSoftmax total{kMinusInfinity, 0.0f};
  for (int i = lane; i < p.splits; i += 32) total.max = fmaxf(total.max, parts[i].max);
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) total.max = fmaxf(total.max, shuffle_xor(total.max, mask));
  for (int i = lane; i < p.splits; i += 32) {
    weights[i] = parts[i].sum == 0.0f ? 0.0f : rescale<T>(parts[i].max, total.max, p.scale_log2);
    total.sum += weights[i] * parts[i].sum;
  }
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) total.sum += shuffle_xor(total.sum, mask);
  warp_barrier();  // weights

  const int query = row % p.query_len, head = row / p.query_len % query_heads;
  const int batch = row / p.query_len / query_heads;
  T* const out = rows_of<T>(p.out, batch, head, query);
  const float factor = total.sum == 0.0f ? 0.0f : p.dropout_scale / total.sum;
  for (int d = lane; d < p.head_dim; d += 32) {
    float sum = 0.0f;
    for (int i = 0; i < p.splits; ++i)
      if (weights[i] != 0.0f) sum += weights[i] * part_out[i * p.width + d];
    out[d] = from_float<T>(sum * factor);
  }
  if (lane == 0) p.lse[row] = log_sum_exp<T>(total, p.scale, p.scale_log2);
}

}  // namespace GPTCORE_GPU
}  // namespace gptcore
