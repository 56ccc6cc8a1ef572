// Attention forward: softmax(scale Q K^T + mask) V and the log-sum-exp of every query, by FlashAttention-2 (Dao 2023,
// arXiv:2307.08691).
//
//              K0 V0   K1 V1   K2 V2   K3 V3
//            +-------+-------+-------+-------+
//     warp 0 |   F   |   F   |   M   |   -   |     F full: no mask
//  Q  warp 1 |   F   |   F   |   M   |   -   |     M masked in part
//     warp 2 |   F   |   F   |   F   |   M   |     - skipped
//     warp 3 |   F   |   F   |   F   |   M   |
//            +-------+-------+-------+-------+
//
// A block owns a tile of query rows, a warp whole rows of it. The scores S = Q K^T stay in the warp's registers, become
// probabilities there, and are the A operand of O += P V. Only K and V pass through shared memory in the loop, double
// buffered, with one barrier per tile.
//
// Grouped-query attention: the query heads that share a head of K and V are rows of one tile. Row r is query r / group
// of head r % group. K and V are read once for all of them. In decoding the heads of a group fill the rows of the tile.
#pragma once

#include <type_traits>

#include "kernels/cuda/nonfinite.cuh"
#include "kernels/cuda/policy.h"
#include "kernels/cuda/warpgroup.cuh"
#include "kernels/kernels.h"

namespace gptcore {
namespace GPTCORE_GPU {

// The running maximum of the scores of a row, and the running sum of exponentials relative to it.
struct RowSoftmax {
  float max, sum;
};

struct AttentionForwardParams : AttentionParams {
  // args.scale = sign x scale, with scale > 0; for 0, sign is 0 and scale 1. Q is multiplied by sign, so that the
  // largest score has the largest probability, and exponents by scale_log2 = scale x log2(e).
  float sign, scale, scale_log2;
  // With several splits each block processes a part of the key tiles; attention_combine adds the partial results.
  int num_splits;
  RowSoftmax* partial_softmax;  // (batch, query_heads, query_len, num_splits)
  float* partial_out;           // (batch, query_heads, query_len, num_splits, width), unnormalised
  int width;                    // padded head_dim
};

// ---- one tile of scores ---------------------------------------------------------------------------------------------

constexpr float kMinusInfinity = -__builtin_inff();

// Lazy rescaling (FlashAttention-4): the accumulators are rescaled only if max x scale_log2 rises by more than this, so
// P is at most 2^8.
constexpr float kRescaleThreshold = 8.0f;

// How exponents are rounded; docs/kernels.md, "Rounding". 16 bits: fma(score, scale_log2, -(max scale_log2)).
// float32: (score - max) scale_log2, so that the maximum has a probability of exactly 1.
template <class T>
constexpr bool kDifferenceFirst = sizeof(T) == 4;

// Returns the factor that converts sums relative to the maximum `from` to sums relative to the maximum `to`.
template <class T>
GPTCORE_DEVICE float rescale_factor(float from, float to, float scale_log2) {
  return exp2_approx(kDifferenceFirst<T> ? mul_rn(from - to, scale_log2)
                                         : mul_rn(from, scale_log2) - mul_rn(to, scale_log2));
}

// One step of the online softmax: scores become probabilities relative to the row maximum. If it rises, the row sums are
// rescaled, and rescale(m, half, factor) rescales the accumulators. row.sum is over this lane's columns; the four lanes
// of a row are added after the loop.
template <class T, int kM, int kN, class Rescale>
GPTCORE_DEVICE void softmax_step(float (&s)[kM][kN][4], RowSoftmax (&rows)[kM][2], float scale_log2, Rescale rescale) {
  // The shuffles of all rows are interleaved, which hides their latency.
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
  bool rises = false;  // true at the first finite maximum; -inf - -inf is NaN, which compares false
#pragma unroll
  for (int m = 0; m < kM; ++m)
#pragma unroll
    for (int half = 0; half < 2; ++half) rises |= (max[m][half] - rows[m][half].max) * scale_log2 > kRescaleThreshold;
  if (rises) {
#pragma unroll
    for (int m = 0; m < kM; ++m)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        RowSoftmax& row = rows[m][half];
        const float factor = max[m][half] == row.max ? 1.0f : rescale_factor<T>(row.max, max[m][half], scale_log2);
        row.max = max[m][half];
        row.sum *= factor;
        rescale(m, half, factor);
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

// Zeroes the dropped probabilities; 1 / (1 - dropout_p) is applied at the end. One Philox call covers four keys, which
// two adjacent lanes hold: each lane draws for half of the rows. `row` is the warp's first row of kv_head.
template <int kM, int kN>
GPTCORE_DEVICE void drop(float (&s)[kM][kN][4], const AttentionForwardParams& p, int batch, int kv_head, int row,
                         int key, int lane) {
  static_assert(4 * kN <= 32, "one bit for each key of a row");
#pragma unroll
  for (int m = 0; m < kM; ++m) {
    const int drawn_row = row + m * 16 + lane % 2 * 8 + lane / 4;
    const int head = (batch * p.kv_heads + kv_head) * p.group + drawn_row % p.group;
    uint32_t drawn = 0;
#pragma unroll 1
    for (int n = 0; n < kN; ++n) {
      const Philox words(key / 4 + n * 2 + lane % 4 / 2, drawn_row / p.group, head, p.seed);
#pragma unroll
      for (int w = 0; w < 4; ++w) drawn |= (uint32_t)(words.w[w] >= p.dropout_threshold) << (n * 4 + w);
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const uint32_t kept = shuffle(drawn, lane / 2 * 2 + half) >> lane % 2 * 2;
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
  // row.sum is relative to the rounded product max scale_log2, which shift_error corrects. max scale is rounded as in
  // the backward (`probability`).
  const float shift_error = kDifferenceFirst<T> ? 0.0f : fmaf(row.max, scale_log2, -mul_rn(row.max, scale_log2));
  return mul_rn(row.max, scale) + (log_of(row.sum) - kLn2 * shift_error);
}

// ---- the kernel -----------------------------------------------------------------------------------------------------

template <class Math, int kWidth, bool kIsDecode>
struct ForwardShared {
  using T = Storage<Math>;
  static constexpr ForwardTile kTile =
      kWarpgroup<Math> ? warpgroup_forward_tile(kWidth) : forward_tile(kWidth, sizeof(T), kIsDecode);
  static constexpr int kThreads = kTile.threads(), kBlocks = kTile.blocks(), kRows = kTile.rows();
  static constexpr int kQueryBytes = kRows * kWidth * sizeof(T);
  static constexpr int kKeyBytes = kTile.keys * kWidth * sizeof(T);  // the same for values
  using QueryTile = TileOf<Math, kWidth, kRows>;
  using KeyTile = TileOf<Math, kWidth, kTile.keys>;  // and of values
  static constexpr int kRanges = kQueryBytes + 2 * 2 * kKeyBytes;
  static constexpr int kBarriers = kRanges + kRows * sizeof(Range);  // of the two stages of K, and of V
  static constexpr int kBytes = kBarriers + (kWarpgroup<Math> ? 4 * sizeof(uint64_t) : 0);
};

// Multiplies the rows of Q by the sign, each thread the chunks that it copied.
template <int kRows, int kThreads, class Tile>
GPTCORE_DEVICE void apply_sign(Tile queries, float sign) {
  using T = typename Tile::Element;
  constexpr unsigned kChunks = Tile::kChunks, kPerChunk = Tile::kPerChunk;
  copy_wait<0>();
#pragma unroll 1
  for (unsigned i = threadIdx.x; i < kRows * kChunks; i += kThreads) {
    T* const chunk = reinterpret_cast<T*>(queries.chunk(i / kChunks, i % kChunks));
#pragma unroll
    for (unsigned j = 0; j < kPerChunk; ++j) chunk[j] = from_float<T>(to_float(chunk[j]) * sign);
  }
}

// `p` is the kernel's parameter: a copy of it would take registers. The maps are for Calls::bulk.
template <class Math, int kWidth, bool kIsDecode, Calls kCalls>
GPTCORE_DEVICE void forward_block(AttentionForwardParams& p, const TensorMap* key_map, const TensorMap* value_map) {
  using T = Storage<Math>;
  using Shared = ForwardShared<Math, kWidth, kIsDecode>;
  constexpr int kThreads = Shared::kThreads, kRows = Shared::kRows, kKeys = Shared::kTile.keys;
  constexpr int kM = Shared::kTile.m_tiles;
  if constexpr (kCalls != Calls::all) p.dropout = false, p.vectors = true;
  constexpr bool kBulk = kCalls == Calls::bulk;

  char* const shared = shared_memory();
  const typename Shared::QueryTile query_tile{shared};
  Range* const ranges = reinterpret_cast<Range*>(shared + Shared::kRanges);
  const auto key_tile = [&](int tile) {
    return typename Shared::KeyTile{shared + Shared::kQueryBytes + tile % 2 * 2 * Shared::kKeyBytes};
  };
  const auto value_tile = [&](int tile) {
    return typename Shared::KeyTile{key_tile(tile).data + Shared::kKeyBytes};
  };

  uint64_t* const keys_full = reinterpret_cast<uint64_t*>(shared + Shared::kBarriers);
  uint64_t* const values_full = keys_full + 2;
  if constexpr (kBulk)
    if (threadIdx.x == 0) {
      for (int i = 0; i < 4; ++i) mbarrier_init(keys_full + i, 1);
      fence_mbarrier_init();
    }

  // The rows, head and split of this block. Under a causal mask the last rows take longest and come first.
  const int all_rows = p.query_len * p.group, row_tiles = (all_rows + kRows - 1) / kRows;
  const int split = blockIdx.x % p.num_splits;
  const BlockTile block = block_tile(blockIdx.x / p.num_splits, row_tiles, p.batch * p.kv_heads, p.heads_per_wave);
  const int first_row = (row_tiles - 1 - block.tile) * kRows;
  const int kv_head = block.head % p.kv_heads, batch = block.head / p.kv_heads;
  const int lane = threadIdx.x % 32, warp_row = threadIdx.x / 32 * 16 * kM;

  // The range of keys of each row. Rows beyond the last also get one, so that the last of the tile has the largest end.
  for (int i = threadIdx.x; i < kRows; i += kThreads) {
    const Documents queries(p.cu_seqlens_q, p.num_boundaries, batch, p.query_len);
    const Documents keys(p.cu_seqlens_k, p.num_boundaries, batch, p.kv_len);
    const int query = (first_row + i) / p.group;
    const Range range = attended(query, queries, keys, p.num_boundaries, p.window_left, p.window_right);
    store_words(ranges + i, range.begin, range.end);
  }
  barrier();  // ranges written, mbarriers initialised
  const int begin = ranges[0].begin, end = ranges[kRows - 1].end;  // of the keys that at least one row attends to
  const Range warp_first = ranges[warp_row], warp_last = ranges[warp_row + 16 * kM - 1];
  const int attended_tiles = begin < end ? (end - 1) / kKeys + 1 - begin / kKeys : 0;
  const int first_tile = begin / kKeys + (int)((int64_t)attended_tiles * split / p.num_splits);
  const int end_tile = begin / kKeys + (int)((int64_t)attended_tiles * (split + 1) / p.num_splits);

  const auto load = [&](typename Shared::KeyTile to, const HeadsView& from, const TensorMap* map, uint64_t* full,
                        int tile) {
    const int key = tile * kKeys;
    if constexpr (kBulk) {
      if (threadIdx.x == 0) load_bulk(to, map, full + tile % 2, key, kv_head, batch);
    } else {
      load_tile<kKeys, kThreads>(to, rows_of<const T>(from, batch, kv_head, key), from.row_stride, end - key,
                                 p.head_dim, p.vectors);
    }
  };
  const auto load_keys = [&](int tile) { load(key_tile(tile), p.key, key_map, keys_full, tile); };
  const auto load_values = [&](int tile) { load(value_tile(tile), p.value, value_map, values_full, tile); };
  const auto row_of = [&](const HeadsView& view, int row) -> T* {
    const int index = first_row + row;
    if (index >= all_rows) return nullptr;
    if (p.group == 1) return rows_of<T>(view, batch, kv_head, index);  // without the divisions
    return rows_of<T>(view, batch, kv_head * p.group + index % p.group, index / p.group);
  };

  float acc_o[kM][kWidth / 8][4] = {};
  RowSoftmax rows[kM][2];
#pragma unroll
  for (int m = 0; m < kM; ++m) rows[m][0] = rows[m][1] = {kMinusInfinity, 0.0f};

  if (first_tile < end_tile) {
    load_rows<kRows, kThreads>(query_tile, [&](int row) -> const T* { return row_of(p.query, row); }, p.head_dim,
                               p.vectors);
    load_keys(first_tile);
    if constexpr (!kWarpgroup<Math>) load_values(first_tile);
    copy_commit();
    if (p.sign != 1.0f) apply_sign<kRows, kThreads>(query_tile, p.sign);
  }

  const auto to_probabilities = [&](auto& acc_s, int key, auto rescale) {
    const bool masked = key < warp_last.begin || key + kKeys > warp_first.end;  // some row does not attend to some key
    if (masked) mask_scores(acc_s, ranges + warp_row, key, kMinusInfinity, lane);
    softmax_step<T>(acc_s, rows, p.scale_log2, rescale);
    if (p.dropout) drop(acc_s, p, batch, kv_head, first_row + warp_row, key, lane);
  };
  const auto rescale = [&](int m, int half, float factor) {
#pragma unroll
    for (int j = 0; j < kWidth / 8; ++j) acc_o[m][j][half * 2] *= factor, acc_o[m][j][half * 2 + 1] *= factor;
  };
  if constexpr (kWarpgroup<Math>) {
    // P V of a tile is computed during the softmax of the next. V is loaded one tile later than K.
    uint32_t weights[kKeys / 16][4];  // P
    const auto wait_for = [&](uint64_t* full, int tile) {
      mbarrier_wait(full + tile % 2, (tile - first_tile) / 2 % 2);
    };
    const auto step = [&](int tile, auto is_first) {
      if constexpr (!kBulk || is_first.value) {
        copy_wait<0>();
        fence_proxy_async();
        barrier();  // Q, K of this tile and V of the previous loaded; the buffers of the products before are free
      }
      if constexpr (kBulk) wait_for(keys_full, tile);
      if constexpr (kBulk && !is_first.value) wait_for(values_full, tile - 1);
      float acc_s[kM][kKeys / 8][4];
      keep(acc_s);
      keep(acc_o);
      wgmma_fence();
      start_transposed(acc_s, query_tile, 0, key_tile(tile));
      wgmma_commit();
      if constexpr (!is_first.value) start_add(acc_o, weights, value_tile(tile - 1));
      wgmma_commit();  // of nothing for the first tile
      // In bulk, no barrier: this thread has waited for the products of its warpgroup in the buffers of these copies.
      if (tile + 1 < end_tile) load_keys(tile + 1);
      load_values(tile);
      copy_commit();
      wgmma_wait<1>();
      keep(acc_s);
      float factors[2] = {1.0f, 1.0f};  // at most 1
      to_probabilities(acc_s, tile * kKeys, [&](int, int half, float factor) { factors[half] = factor; });
      wgmma_wait<0>();
      keep(acc_s);
      keep(acc_o);
      if constexpr (!is_first.value) keep(weights);
      if (factors[0] * factors[1] != 1.0f) rescale(0, 0, factors[0]), rescale(0, 1, factors[1]);
      to_operand<T>(weights, acc_s);
    };
    if (first_tile < end_tile) step(first_tile, std::true_type());
#pragma unroll 1
    for (int tile = first_tile + 1; tile < end_tile; ++tile) step(tile, std::false_type());
    if (first_tile < end_tile) {
      if constexpr (kBulk) {
        wait_for(values_full, end_tile - 1);
      } else {
        copy_wait<0>();
        fence_proxy_async();
        barrier();  // V of the last tile loaded
      }
      keep(acc_o);
      wgmma_fence();
      start_add(acc_o, weights, value_tile(end_tile - 1));
      wgmma_commit();
      wgmma_wait<0>();
      keep(acc_o);
      keep(weights);
    }
  } else {
#pragma unroll 1
    for (int tile = first_tile; tile < end_tile; ++tile) {
      copy_wait<0>();
      barrier();  // tile loaded; the previous buffer is free
      if (tile + 1 < end_tile) {
        load_keys(tile + 1);
        load_values(tile + 1);
        copy_commit();
      }
      const int key = tile * kKeys;
      if (key >= warp_last.end || key + kKeys <= warp_first.begin || first_row + warp_row >= all_rows) continue;
      float acc_s[kM][kKeys / 8][4];
      multiply_transposed<Math>(acc_s, query_tile, warp_row, key_tile(tile), 0, lane);
      to_probabilities(acc_s, key, rescale);
      multiply_add<Math>(acc_o, acc_s, value_tile(tile), 0, lane);
    }
  }

  // Row sums over the four lanes of a row.
#pragma unroll
  for (int m = 0; m < kM; ++m)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      rows[m][half].sum += shuffle_xor(rows[m][half].sum, 1);
      rows[m][half].sum += shuffle_xor(rows[m][half].sum, 2);
    }
  const auto lse_row = [&](int row) {
    const int head = (batch * p.kv_heads + kv_head) * p.group + row % p.group;
    return (int64_t)head * p.query_len + row / p.group;
  };

  const bool nonfinite = any(probe(acc_o) != 0.0f);
  const bool partial = p.num_splits > 1;
  if (partial) {  // unnormalised, for attention_combine
#pragma unroll
    for (int m = 0; m < kM; ++m)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = first_row + warp_row + m * 16 + half * 8 + lane / 4;
        if (row >= all_rows) continue;
        const RowSoftmax softmax = rows[m][half];
        const int64_t part = lse_row(row) * p.num_splits + split;
        if (lane % 4 == 0) store_words(p.partial_softmax + part, bits_of(softmax.max), bits_of(softmax.sum));
        float* const to = p.partial_out + part * kWidth + lane % 4 * 2;
#pragma unroll
        for (int j = 0; j < kWidth / 8; ++j) store_pair(to + j * 8, acc_o[m][j][half * 2], acc_o[m][j][half * 2 + 1]);
      }
  } else {
    // Stage the output in this warp's rows of the Q tile, which no other warp reads, to store it in 16-byte vectors.
    // A row that attends to no key has a sum of 0, and its output is 0.
    warp_barrier();  // all lanes have read Q
#pragma unroll
    for (int m = 0; m < kM; ++m)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const RowSoftmax softmax = rows[m][half];
        const int in_tile = warp_row + m * 16 + half * 8 + lane / 4, row = first_row + in_tile;
        if (lane % 4 == 0 && row < all_rows) p.lse[lse_row(row)] = log_sum_exp<T>(softmax, p.scale, p.scale_log2);
        const float factor = softmax.sum == 0.0f ? 0.0f : p.dropout_scale / softmax.sum;
#pragma unroll
        for (int j = 0; j < kWidth / 8; ++j)
          store_pair(query_tile.pair(in_tile, j * 8 + lane % 4 * 2), acc_o[m][j][half * 2] * factor,
                     acc_o[m][j][half * 2 + 1] * factor);
      }
    warp_barrier();  // the warp's output is in shared memory
    store_rows<16 * kM>(query_tile, warp_row, [&](int row) { return row_of(p.out, row); }, p.head_dim, p.vectors, lane);
  }
  if (!nonfinite) return;

  warp_barrier();  // the warp's output and LSE are in global memory
#pragma unroll 1
  for (int i = warp_row; i < warp_row + 16 * kM && first_row + i < all_rows; ++i) {
    const int row = first_row + i, head = (batch * p.kv_heads + kv_head) * p.group + row % p.group;
    const int64_t part = lse_row(row) * p.num_splits + split;
    // Partial sums are relative to the maximum: its product with scale takes the place of the LSE.
    float lse = partial ? mul_rn(p.partial_softmax[part].max, p.scale) : p.lse[lse_row(row)];
    if (lse == kMinusInfinity) lse = 0.0f;  // all scores are -inf, and -inf - -inf is NaN
    const auto weight = [&](int, int key) {
      const float s = dot<Math>(row_of(p.query, i), rows_of<const T>(p.key, batch, kv_head, key), p.head_dim);
      const float weight = probability<T>(s * p.sign, p.scale, lse);
      return p.dropout && !is_kept(p, head, row / p.group, key) ? 0.0f : weight;
    };
    RowColumns keys{ranges[i], batch, kv_head, 1, p.value};
    if (partial) {
      keys.range = intersection(keys.range, {first_tile * kKeys, end_tile * kKeys});
      sum_nonfinite<T>(p.partial_out + part * kWidth, keys, p.head_dim, 1.0f, lane, weight);
    } else {
      sum_nonfinite<T>(row_of(p.out, i), keys, p.head_dim, p.dropout_scale, lane, weight);
    }
  }
}

template <class Math, int kWidth, bool kIsDecode, Calls kCalls>
__global__ void
__launch_bounds__(ForwardShared<Math, kWidth, kIsDecode>::kThreads, ForwardShared<Math, kWidth, kIsDecode>::kBlocks)
    attention_forward_kernel(AttentionForwardParams p) {
  forward_block<Math, kWidth, kIsDecode, kCalls>(p, nullptr, nullptr);
}

template <class Math, int kWidth>
__global__ void
__launch_bounds__(ForwardShared<Math, kWidth, false>::kThreads, ForwardShared<Math, kWidth, false>::kBlocks)
    attention_forward_bulk(AttentionForwardParams p, const __grid_constant__ TensorMap key_map,
                           const __grid_constant__ TensorMap value_map) {
  forward_block<Math, kWidth, false, Calls::bulk>(p, &key_map, &value_map);
}

// ---- combine the splits ---------------------------------------------------------------------------------------------

constexpr int kCombineThreads = 128;

// One warp per row.
template <class T>
__global__ void __launch_bounds__(kCombineThreads) attention_combine_kernel(AttentionForwardParams p) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  float* const weights = reinterpret_cast<float*>(shared_memory()) + warp * kMaxSplits;
  const int64_t query_heads = (int64_t)p.kv_heads * p.group, all_rows = p.batch * query_heads * p.query_len;
  const int64_t row = (int64_t)blockIdx.x * (kCombineThreads / 32) + warp;
  if (row >= all_rows) return;
  const RowSoftmax* const parts = p.partial_softmax + row * p.num_splits;
  const float* const part_out = p.partial_out + row * p.num_splits * p.width;

  RowSoftmax total{kMinusInfinity, 0.0f};
  for (int i = lane; i < p.num_splits; i += 32) total.max = fmaxf(total.max, parts[i].max);
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) total.max = fmaxf(total.max, shuffle_xor(total.max, mask));
  for (int i = lane; i < p.num_splits; i += 32) {
    weights[i] = parts[i].sum == 0.0f ? 0.0f : rescale_factor<T>(parts[i].max, total.max, p.scale_log2);
    total.sum += weights[i] * parts[i].sum;
  }
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) total.sum += shuffle_xor(total.sum, mask);
  warp_barrier();  // weights written

  const int query = row % p.query_len, head = row / p.query_len % query_heads;
  const int batch = row / p.query_len / query_heads;
  T* const out = rows_of<T>(p.out, batch, head, query);
  const float factor = total.sum == 0.0f ? 0.0f : p.dropout_scale / total.sum;
  for (int d = lane; d < p.head_dim; d += 32) {
    float sum = 0.0f;
#pragma unroll 1  // else more registers and fewer resident blocks
    for (int i = 0; i < p.num_splits; ++i) sum += weights[i] * part_out[i * p.width + d];
    out[d] = from_float<T>(sum * factor);
  }
  if (lane == 0) p.lse[row] = log_sum_exp<T>(total, p.scale, p.scale_log2);
}

}  // namespace GPTCORE_GPU
}  // namespace gptcore
