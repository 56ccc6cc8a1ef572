// Attention backward: from q, k, v, out, the log-sum-exp and dO to dQ, dK, dV (FlashAttention, algorithm 4).
//
//     S = Q K^T    P = exp(scale S - LSE)    dP = dO V^T    dS = P (dP - delta)    delta = rowsum(dO O) - dLSE
//     dV = P^T dO            dK = scale dS^T Q            dQ = scale dS K
//
// Deterministic, without atomics: one pass owns rows of keys and accumulates dK and dV over the queries, one owns rows
// of queries and accumulates dQ over the keys. Both recompute S and dP: seven products instead of five.
//
// The passes are one kernel with queries and keys exchanged. A block owns "rows" and iterates over tiles of "columns":
//
//                    rows: A1, A2   columns: B1, B2   S = A1 B1^T   dP = A2 B2^T    sums
//     dQ             Q, dO          K, V                                            dQ += dS B1
//     dK, dV         K, V           Q, dO             (S^T)         (dP^T)          dK += dS B1    dV += P B2
//
// A warp owns whole rows, so P and dS stay in its registers: the accumulators of S and dP are the A operands of the
// sums. A1 and A2 stay in shared memory; B1 and B2 are double buffered there: cp.async loads the next tile while this
// one is multiplied. At head_dim 128 in 16 bits two warps share their rows, with A1 and A2 in registers instead
// (docs/kernels.md, "Pairs of warps"). On Hopper a warpgroup owns 64 rows, and multiplies with wgmma (there, "Attention
// backward on Hopper").
#pragma once

#include "kernels/cuda/attention_delta.cuh"
#include "kernels/cuda/nonfinite.cuh"
#include "kernels/cuda/policy.h"
#include "kernels/cuda/warpgroup.cuh"

namespace gptcore {
namespace GPTCORE_GPU {

// ---- dQ, dK, dV -----------------------------------------------------------------------------------------------------

constexpr int max_of(int a, int b) { return a > b ? a : b; }

// The gradients that one launch accumulates. At head_dim 256 dK and dV do not fit in registers together.
enum class Gradients { query, key, value, key_value };

template <class Math, int kWidth, Gradients kOf>
struct BackwardShared {
  using T = Storage<Math>;
  static constexpr bool kKeyRows = kOf != Gradients::query;
  static constexpr BackwardTile kTile = kWarpgroup<Math>
                                            ? warpgroup_backward_tile(kWidth)
                                            : backward_tile(kWidth, sizeof(T), kKeyRows, kPlainFloat<Math>);
  using RowTile = TileOf<Math, kWidth, kTile.rows()>;
  using ColumnTile = TileOf<Math, kWidth, kTile.columns>;
  static constexpr int kThreads = kTile.threads(), kRows = kTile.rows();
  static constexpr int kRowBytes = kRows * kWidth * sizeof(T), kColumnBytes = kTile.columns * kWidth * sizeof(T);
  static constexpr int kAlignment = kWarpgroup<Math> ? 1024 : 16;  // of tiles
  static constexpr int kStage =
      (2 * kColumnBytes + 2 * kTile.columns * int(sizeof(float)) + kAlignment - 1) / kAlignment * kAlignment;
  // A pair of warps keeps its rows in registers, and their memory becomes the stages and the exchange of the pairs.
  static constexpr int kExchangeBytes = kTile.paired ? kRows * kTile.chunk * sizeof(float) : 0;
  static constexpr int kStages = kTile.paired ? 0 : 2 * kRowBytes, kExchange = kStages + 2 * kStage;
  // The registers beside dK or dV hold half of the fragments, those beside a half of dQ all of them.
  static constexpr int kSteps = kTile.paired ? kWidth / 16 : 1, kHeld = kKeyRows && kSteps > 1 ? 3 : kSteps;
  using Fragments = RowFragments<kTile.m_tiles, 16 * kSteps, kHeld>;
  static constexpr int kParked = kExchange + kExchangeBytes;
  static constexpr int kRanges = max_of(2 * kRowBytes, kParked + kTile.warps * Fragments::kParkedBytes);
  static constexpr int kBytes = kRanges + kRows * sizeof(Range);
};

// Returns the dropout mask of a chunk: bit 4 (kN m + n) + i for a lane's element [m][n][i]. One Philox call covers four
// keys of a query: two elements in each of two lanes, or, if rows are keys, one in each of four. Each lane draws once,
// for its element `drawn_element` of four, and the lanes exchange the bits.
template <bool kKeyRows, int kM, int kN>
GPTCORE_DEVICE uint32_t kept_weights(const AttentionBackwardParams& p, int first_row, int first_column,
                                     uint32_t batch_head, int lane) {
  static_assert(kM * kN * 4 <= 32, "a bit for each element");
  const int drawn_element = kKeyRows ? lane / 4 % 4 : lane % 2 * 2;
  uint32_t kept = 0;
#pragma unroll 1
  for (int tile = 0; tile < kM * kN; ++tile) {
    const int row = first_row + tile / kN * 16 + lane / 4 + drawn_element / 2 * 8;
    const int column = first_column + tile % kN * 8 + lane % 4 * 2 + drawn_element % 2;
    const Philox words(kKeyRows ? row / 4 : column / 4, kKeyRows ? column : row, batch_head, p.seed);
    uint32_t drawn = 0;
#pragma unroll
    for (int k = 0; k < 4; ++k) drawn |= uint32_t(words.w[k] >= p.dropout_threshold) << k;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t bits = shuffle(drawn, kKeyRows ? (lane & ~12) | i * 4 : (lane & ~1) | i / 2);
      const int key = kKeyRows ? lane / 4 % 4 : lane % 2 * 2 + i % 2;  // of the four
      kept |= (bits >> key & 1) << (tile * 4 + i);
    }
  }
  return kept;
}

template <int kM, int kN>
GPTCORE_DEVICE void drop(float (&s)[kM][kN][4], uint32_t kept, float dropout_scale) {
#pragma unroll
  for (int m = 0; m < kM; ++m)
#pragma unroll
    for (int n = 0; n < kN; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) s[m][n][i] *= kept >> ((m * kN + n) * 4 + i) & 1 ? dropout_scale : 0.0f;
}

// The columns of a step: of one query head, from `column` on.
struct Columns {
  int query_head, column;
};

template <class Math, int kWidth, Gradients kOf, Calls kCalls>
__global__ void __launch_bounds__(BackwardShared<Math, kWidth, kOf>::kThreads,
                                  BackwardShared<Math, kWidth, kOf>::kTile.blocks)
    attention_backward_kernel(AttentionBackwardParams p) {
  using T = Storage<Math>;
  using Shared = BackwardShared<Math, kWidth, kOf>;
  constexpr BackwardTile kTile = Shared::kTile;
  constexpr bool kKeyRows = Shared::kKeyRows;
  constexpr bool kHasDs = kOf != Gradients::value;                               // dQ or dK
  constexpr bool kHasDv = kOf == Gradients::value || kOf == Gradients::key_value;
  constexpr int kThreads = Shared::kThreads, kRows = Shared::kRows, kColumns = kTile.columns, kChunk = kTile.chunk;
  constexpr int kM = kTile.m_tiles, kN = kChunk / 8;
  constexpr int kGroupRows = kWarpgroup<Math> ? 64 : 16 * kM;  // rows whose products are computed together
  // A pair shares its rows: either one warp accumulates dV of them and the other dK, or each dQ of a half of them.
  constexpr bool kPaired = kTile.paired;
  static_assert(!kPaired || (kChunk == kColumns && (kHasDs && (kHasDv || kM == 2))), "what pairs can compute");
  static_assert(!kWarpgroup<Math> || (kChunk == kColumns && kHasDs && kM == 1), "what warpgroups can compute");
  constexpr int kOwnM = kPaired && !kHasDv ? 1 : kM;
  if constexpr (kCalls == Calls::common) p.dropout = false, p.vectors = true;

  char* const shared = shared_memory();
  const typename Shared::RowTile a1{shared}, a2{shared + Shared::kRowBytes};
  Range* const ranges = reinterpret_cast<Range*>(shared + Shared::kRanges);
  const auto column_tile = [&](int stage, int which) {  // b1 or b2
    char* const first = shared + Shared::kStages + stage * Shared::kStage;
    return typename Shared::ColumnTile{first + which * Shared::kColumnBytes};
  };
  const auto b1 = [&](int stage) { return column_tile(stage, 0); };
  const auto b2 = [&](int stage) { return column_tile(stage, 1); };
  const auto stats = [&](int stage) { return reinterpret_cast<float*>(b2(stage).data + Shared::kColumnBytes); };

  // The rows and head of this block.
  const int row_len = kKeyRows ? p.kv_len : p.query_len, column_len = kKeyRows ? p.query_len : p.kv_len;
  const int tiles = (row_len + kRows - 1) / kRows, heads = kKeyRows ? p.kv_heads : p.query_heads;
  const BlockTile block = block_tile(blockIdx.x, tiles, p.batch * heads, p.heads_per_wave);
  const int head = block.head % heads, batch = block.head / heads;
  const int first_row = (kKeyRows ? block.tile : tiles - 1 - block.tile) * kRows;  // causal: the longest first
  const int rows = row_len - first_row < kRows ? row_len - first_row : kRows;
  const int first_head = kKeyRows ? head * p.group : head, query_heads = kKeyRows ? p.group : 1;

  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int role = kPaired ? warp % 2 : 0;                           // in a pair: 0 computes S, 1 computes dP
  const int warp_row = (kPaired ? warp / 2 : warp) * 16 * kM;        // the first row of S and dP
  const int own_row = kOwnM < kM ? warp_row + role * 16 : warp_row;  // the first row of the gradients
  const int group_row = kWarpgroup<Math> ? warp_row / kGroupRows * kGroupRows : warp_row;
  const HeadsView &a1_view = kKeyRows ? p.key : p.query, &a2_view = kKeyRows ? p.value : p.grad_out;
  const HeadsView &b1_view = kKeyRows ? p.query : p.key, &b2_view = kKeyRows ? p.grad_out : p.value;

  // The range of columns of each row; empty beyond the last row.
  for (int i = threadIdx.x; i < kRows; i += kThreads) {
    const Documents queries(p.cu_seqlens_q, p.num_boundaries, batch, p.query_len);
    const Documents keys(p.cu_seqlens_k, p.num_boundaries, batch, p.kv_len);
    const int row = first_row + (i < rows ? i : rows - 1);
    const Range range = kKeyRows ? attended(row, keys, queries, p.num_boundaries, p.window_right, p.window_left)
                                 : attended(row, queries, keys, p.num_boundaries, p.window_left, p.window_right);
    store_words(ranges + i, i < rows ? range.begin : range.end, range.end);
  }
  barrier();  // ranges written

  const int first_column = ranges[0].begin / kColumns * kColumns;
  const int column_tiles = (ranges[kRows - 1].end - first_column + kColumns - 1) / kColumns;
  const int steps = ranges[0].begin < ranges[kRows - 1].end ? query_heads * column_tiles : 0;
  const int end_column = first_column + column_tiles * kColumns, kv_head = kKeyRows ? head : head / p.group;
  const auto after = [&](Columns c) {
    c.column += kColumns;
    return c.column < end_column ? c : Columns{c.query_head + 1, first_column};
  };

  const auto load_columns = [&](Columns c, int stage) {
    const int query_head = c.query_head, column = c.column;
    const int column_head = kKeyRows ? query_head : kv_head, count = column_len - column;
    load_tile<kColumns, kThreads>(b1(stage), rows_of<const T>(b1_view, batch, column_head, column), b1_view.row_stride,
                                  count, p.head_dim, p.vectors);
    load_tile<kColumns, kThreads>(b2(stage), rows_of<const T>(b2_view, batch, column_head, column), b2_view.row_stride,
                                  count, p.head_dim, p.vectors);
    if constexpr (kKeyRows) {
      static_assert(2 * kColumns <= kThreads, "a thread copies one element");
      const int64_t first = ((int64_t)batch * p.query_heads + query_head) * p.query_len + column;
      const unsigned i = threadIdx.x, in_tile = i % kColumns;
      if (i < 2 * kColumns)
        copy_async<4>(stats(stage) + i, (i < kColumns ? p.lse : p.delta) + first + in_tile, int(in_tile) < count);
    }
    copy_commit();
  };

  // LSE and delta of the rows, if these are queries.
  float row_lse[kOwnM][2] = {}, row_delta[kOwnM][2] = {};
  if constexpr (!kKeyRows) {
    const int64_t first = ((int64_t)batch * p.query_heads + head) * p.query_len + first_row;
#pragma unroll
    for (int m = 0; m < kOwnM; ++m)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = own_row + m * 16 + half * 8 + lane / 4;
        if (row < rows) row_lse[m][half] = p.lse[first + row], row_delta[m][half] = p.delta[first + row];
      }
  }

  typename Shared::Fragments fragments;
  if (steps > 0) {
    load_tile<kRows, kThreads>(a1, rows_of<const T>(a1_view, batch, head, first_row), a1_view.row_stride, rows,
                               p.head_dim, p.vectors);
    if constexpr (kHasDs)
      load_tile<kRows, kThreads>(a2, rows_of<const T>(a2_view, batch, head, first_row), a2_view.row_stride, rows,
                                 p.head_dim, p.vectors);
    if constexpr (kPaired) {
      copy_commit();
      copy_wait<0>();
      barrier();  // rows loaded
#pragma unroll
      for (int m = 0; m < kM; ++m)  // for dQ, the warp's own half first
        fragments.load(m, role == 0 ? a1 : a2, warp_row + (kHasDv ? m : m ^ role) * 16, lane);
      barrier();  // rows in registers; their memory is free
      fragments.park(shared + Shared::kParked + warp * Shared::Fragments::kParkedBytes + lane * 16);
    }
  }
  // S becomes P, and dP becomes dS. `stats` are LSE and, kColumns further, delta of the columns, if these are queries.
  const auto to_probabilities = [&](float (&s)[kM][kN][4], const float* stats) {
#pragma unroll
    for (int n = 0; n < kN; ++n) {
      Float2 lse{};
      if constexpr (kKeyRows) lse = load_shared<Float2>(stats + n * 8 + lane % 4 * 2);
#pragma unroll
      for (int m = 0; m < kOwnM; ++m)
#pragma unroll
        for (int i = 0; i < 4; ++i)
          s[m][n][i] = probability<T>(s[m][n][i], p.scale, kKeyRows ? lse.v[i % 2] : row_lse[m][i / 2]);
    }
  };
  const auto to_gradients = [&](float (&dp)[kM][kN][4], const float (&weights)[kM][kN][4], const float* stats) {
#pragma unroll
    for (int n = 0; n < kN; ++n) {
      Float2 delta{};
      if constexpr (kKeyRows) delta = load_shared<Float2>(stats + kColumns + n * 8 + lane % 4 * 2);
#pragma unroll
      for (int m = 0; m < kOwnM; ++m)
#pragma unroll
        for (int i = 0; i < 4; ++i)
          dp[m][n][i] = weights[m][n][i] * (dp[m][n][i] - (kKeyRows ? delta.v[i % 2] : row_delta[m][i / 2]));
    }
  };
  // In a pair with dK and dV, acc_ds is dV of the first warp and dK of the second.
  float acc_ds[kOwnM][kHasDs ? kWidth / 8 : 1][4] = {}, acc_dv[kM][kHasDv && !kPaired ? kWidth / 8 : 1][4] = {};
  Columns next{first_head, first_column};
  if (steps > 0) load_columns(next, steps % 2);
#pragma unroll 1
  for (int left = steps; left > 0; --left) {
    copy_wait<0>();
    if constexpr (kWarpgroup<Math>) fence_proxy_async();
    barrier();  // columns loaded; the previous buffer is free
    const int stage = left % 2, query_head = next.query_head, column = next.column;
    next = after(next);
    const auto load_next = [&] {
      if (left > 1) load_columns(next, (left - 1) % 2);
    };
    if constexpr (!kWarpgroup<Math>) load_next();
    const uint32_t batch_head = batch * p.query_heads + query_head;
    const Range first = ranges[group_row], last = ranges[group_row + kGroupRows - 1];
    if constexpr (kPaired) {
      const bool active = column < last.end && column + kColumns > first.begin;
      const bool masked = column < last.begin || column + kColumns > first.end;
      char* const exchange = shared + Shared::kExchange + lane * 16;
      constexpr int kSent = kHasDv ? kM * kN : kN;  // vectors of four floats that a lane sends
      float s[kM][kN][4];  // S or dP
      if (active) {
        multiply_fragments<Math>(s, fragments, column_tile(stage, role), 0, lane);
        if constexpr (kHasDv) {
          if (role == 0) {
#pragma unroll
            for (int n = 0; n < kN; ++n) {
              const Float2 lse = load_shared<Float2>(stats(stage) + n * 8 + lane % 4 * 2);
#pragma unroll
              for (int m = 0; m < kM; ++m) {
#pragma unroll
                for (int i = 0; i < 4; ++i) s[m][n][i] = probability<T>(s[m][n][i], p.scale, lse.v[i % 2]);
                store_float4(exchange + (warp / 2 * kSent + m * kN + n) * 512, s[m][n]);
              }
            }
          }
        } else {
#pragma unroll
          for (int n = 0; n < kN; ++n) store_float4(exchange + (warp * kSent + n) * 512, s[1][n]);
        }
      }
      barrier();  // P, or the other half of S or dP, is in shared memory
      if (!active) continue;
      uint32_t kept = 0;
      if (p.dropout) kept = kept_weights<kKeyRows, kOwnM, kN>(p, first_row + own_row, column, batch_head, lane);
      if constexpr (kHasDv) {
        if (p.dropout) drop(s, kept, p.dropout_scale);  // P or dP
        if (role == 1) {
#pragma unroll
          for (int n = 0; n < kN; ++n) {
            const Float2 delta = load_shared<Float2>(stats(stage) + kColumns + n * 8 + lane % 4 * 2);
#pragma unroll
            for (int m = 0; m < kM; ++m) {
              const Float4 weights = load_shared<Float4>(exchange + (warp / 2 * kSent + m * kN + n) * 512);
#pragma unroll
              for (int i = 0; i < 4; ++i) s[m][n][i] = weights.v[i] * (s[m][n][i] - delta.v[i % 2]);
            }
          }
        }
        if (masked) mask_scores(s, ranges + own_row, column, 0.0f, lane);
        multiply_add<Math>(acc_ds, s, column_tile(stage, 1 - role), 0, lane);
      } else {
        float ds[1][kN][4];
        const auto gradient = [&](int n, const float* score, const float* dp) {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const float factor = !p.dropout ? 1.0f : kept >> (n * 4 + i) & 1 ? p.dropout_scale : 0.0f;
            ds[0][n][i] = probability<T>(score[i], p.scale, row_lse[0][i / 2]) * (dp[i] * factor - row_delta[0][i / 2]);
          }
        };
        const auto received = [&](int n) {
          return load_shared<Float4>(exchange + ((warp ^ 1) * kSent + n) * 512);
        };
        if (role == 0) {
#pragma unroll
          for (int n = 0; n < kN; ++n) gradient(n, s[0][n], received(n).v);
        } else {
#pragma unroll
          for (int n = 0; n < kN; ++n) gradient(n, received(n).v, s[0][n]);
        }
        if (masked) mask_scores(ds, ranges + own_row, column, 0.0f, lane);
        multiply_add<Math>(acc_ds, ds, b1(stage), 0, lane);
      }
    } else if constexpr (kWarpgroup<Math>) {  // P is computed while dP is multiplied
      if (column >= last.end || column + kColumns <= first.begin) {
        load_next();
        continue;
      }
      const bool masked = column < last.begin || column + kColumns > first.end;
      float s[kM][kN][4], dp[kM][kN][4];  // S, then P; dP, then dS
      keep(s);
      keep(dp);
      wgmma_fence();
      start_transposed(s, a1, group_row, b1(stage));
      wgmma_commit();
      start_transposed(dp, a2, group_row, b2(stage));
      wgmma_commit();
      uint32_t kept = 0;
      if (p.dropout) kept = kept_weights<kKeyRows, kM, kN>(p, first_row + warp_row, column, batch_head, lane);
      wgmma_wait<1>();  // S
      keep(s);
      to_probabilities(s, stats(stage));
      load_next();  // a branch: without one, ptxas moves the exponentials behind the wait
      wgmma_wait<0>();  // dP
      keep(dp);
      if (p.dropout) drop(dp, kept, p.dropout_scale);
      to_gradients(dp, s, stats(stage));
      if (masked) {
        mask_scores(s, ranges + warp_row, column, 0.0f, lane);
        mask_scores(dp, ranges + warp_row, column, 0.0f, lane);
      }
      uint32_t weights[kN / 2][4], gradients[kN / 2][4];  // P and dS
      if (kHasDv && p.dropout) drop(s, kept, p.dropout_scale);
      if constexpr (kHasDv) to_operand<T>(weights, s);
      to_operand<T>(gradients, dp);
      keep(acc_dv);
      keep(acc_ds);
      wgmma_fence();
      if constexpr (kHasDv) start_add(acc_dv, weights, b2(stage));
      start_add(acc_ds, gradients, b1(stage));
      wgmma_commit();
      wgmma_wait<0>();
      keep(acc_dv);
      keep(acc_ds);
    } else {
#pragma unroll 1
      for (int chunk = 0; chunk < kColumns; chunk += kChunk) {
        const int begin = column + chunk, end = begin + kChunk;
        if (begin >= last.end || end <= first.begin) continue;
        float s[kM][kN][4], dp[kM][kN][4];  // S, then P; dP, then dS
        multiply_transposed<Math>(s, a1, warp_row, b1(stage), chunk, lane);
        if constexpr (kHasDs) multiply_transposed<Math>(dp, a2, warp_row, b2(stage), chunk, lane);

        uint32_t kept = 0;
        if (p.dropout) {
          kept = kept_weights<kKeyRows, kM, kN>(p, first_row + warp_row, begin, batch_head, lane);
          if constexpr (kHasDs) drop(dp, kept, p.dropout_scale);
        }
        to_probabilities(s, stats(stage) + chunk);
        if constexpr (kHasDs) to_gradients(dp, s, stats(stage) + chunk);
        const bool masked = begin < last.begin || end > first.end;  // some row does not attend to some column
        if (masked) {
          mask_scores(s, ranges + warp_row, begin, 0.0f, lane);
          if constexpr (kHasDs) mask_scores(dp, ranges + warp_row, begin, 0.0f, lane);
        }
        if constexpr (kHasDv) {
          if (p.dropout) drop(s, kept, p.dropout_scale);
          multiply_add<Math>(acc_dv, s, b2(stage), chunk, lane);
        }
        if constexpr (kHasDs) multiply_add<Math>(acc_ds, dp, b1(stage), chunk, lane);
      }
    }
  }

  const bool nonfinite = any(probe(acc_ds) + probe(acc_dv) != 0.0f);
  if constexpr (kPaired) barrier();  // the stages and the exchange are free
  // Only this warp uses its rows of A1, and of a pair with dK and dV the second warp those of A2: the accumulators go
  // through them, to be stored in whole vectors.
  const typename Shared::RowTile staged = kPaired && kHasDv && role == 1 ? a2 : a1;
  const auto store = [&](const auto& sums, const HeadsView& view, float factor) {
    warp_barrier();
#pragma unroll
    for (int m = 0; m < kOwnM; ++m)
#pragma unroll
      for (int j = 0; j < kWidth / 8; ++j)
#pragma unroll
        for (int i = 0; i < 4; i += 2)
          store_pair(staged.pair(own_row + m * 16 + i / 2 * 8 + lane / 4, j * 8 + lane % 4 * 2),
                     sums[m][j][i] * factor, sums[m][j][i + 1] * factor);
    warp_barrier();
    const auto row_at = [&](int row) {
      return row < rows ? rows_of<T>(view, batch, head, first_row + row) : nullptr;
    };
    store_rows<16 * kOwnM>(staged, own_row, row_at, p.head_dim, p.vectors, lane);
  };
  const bool stores_dv = kHasDv && (!kPaired || role == 0), stores_ds = kHasDs && !(kPaired && stores_dv);
  if constexpr (kPaired) {
    HeadsView view = kKeyRows ? p.grad_key : p.grad_query;
    if (stores_dv) view = p.grad_value;
    store(acc_ds, view, stores_dv ? 1.0f : p.scale);
  } else {
    if constexpr (kHasDv) store(acc_dv, p.grad_value, 1.0f);
    if constexpr (kHasDs) store(acc_ds, kKeyRows ? p.grad_key : p.grad_query, p.scale);
  }
  if (!nonfinite) return;

  warp_barrier();  // the warp's results are in global memory
#pragma unroll 1
  for (int i = own_row; i < own_row + 16 * kOwnM && i < rows; ++i) {
    const int row = first_row + i;
    const auto sum_again = [&](const HeadsView& result, const HeadsView& values, float factor, bool of_ds) {
      const RowColumns columns{ranges[i], batch, kKeyRows ? first_head : kv_head, query_heads, values};
      const auto weight = [&](int column_head, int column) {
        const int query_head = batch * p.query_heads + (kKeyRows ? column_head : head);
        const int query = kKeyRows ? column : row, key = kKeyRows ? row : column;
        const int64_t stat = (int64_t)query_head * p.query_len + query;
        const float s = dot<Math>(rows_of<const T>(a1_view, batch, head, row),
                                  rows_of<const T>(b1_view, batch, column_head, column), p.head_dim);
        const float kept = !p.dropout ? 1.0f : is_kept(p, query_head, query, key) ? p.dropout_scale : 0.0f;
        const float weight = probability<T>(s, p.scale, p.lse[stat]);
        if (!of_ds) return weight * kept;
        const float dp = dot<Math>(rows_of<const T>(a2_view, batch, head, row),
                                   rows_of<const T>(b2_view, batch, column_head, column), p.head_dim);
        return weight * (dp * kept - p.delta[stat]);
      };
      sum_nonfinite<T>(rows_of<T>(result, batch, head, row), columns, p.head_dim, factor, lane, weight);
    };
    if (stores_dv) sum_again(p.grad_value, b2_view, 1.0f, false);
    if (stores_ds) sum_again(kKeyRows ? p.grad_key : p.grad_query, b1_view, p.scale, true);
  }
}

}  // namespace GPTCORE_GPU
}  // namespace gptcore
