// Shared by the attention kernels: parameters, tiles in shared memory, the matrix products of a warp, masks, dropout.
//
// A warp owns whole rows of its products. Accumulators always have the layout of mma's m16n8: in an m x n array of
// 16 x 8 tiles, acc[m][n][i] of a lane is the element of
//
//     row 16 m + lane / 4 + 8 (i / 2),   column 8 n + 2 (lane % 4) + i % 2
//
// so four lanes (a quad) hold a row, and the accumulators of one product are the A operand of the next without
// leaving registers. `Math` selects the multiplication: bfloat16 and float16 on tensor cores, Tf32 on tensor cores with
// float storage, float with fused multiply-adds.
#pragma once

#include "kernels/cuda/ptx.cuh"
#include "kernels/kernels.h"

namespace gptcore {

struct Tf32 {};  // float in memory, rounded to TF32 before the multiplication
template <class Math> struct StorageOf { using Type = Math; };
template <> struct StorageOf<Tf32> { using Type = float; };
template <class Math> using Storage = typename StorageOf<Math>::Type;

template <class Math> constexpr bool kPlainFloat = false;
template <> constexpr bool kPlainFloat<float> = true;
template <class Math> constexpr bool kTf32 = false;
template <> constexpr bool kTf32<Tf32> = true;

template <class T>
GPTCORE_DEVICE T* rows_of(const HeadsView& view, int batch, int head, int row) {
  return static_cast<T*>(view.data) + batch * view.batch_stride + head * view.head_stride + row * view.row_stride;
}

// ---- parameters and scheduling --------------------------------------------------------------------------------------

struct AttentionParams {
  HeadsView query, key, value, out;
  float* lse;  // (batch, query_heads, query_len)
  const int64_t *cu_seqlens_q, *cu_seqlens_k;
  int64_t num_boundaries;
  int batch, kv_heads, group, query_len, kv_len, head_dim, heads_per_wave;
  int64_t window_left, window_right;  // a query at position i attends to keys i - window_left to i + window_right
  bool vectors;                       // every row of every tensor is whole 16-byte vectors
  bool dropout;
  uint32_t dropout_threshold;
  float dropout_scale;
  uint64_t seed;
};

// The head and tile of block `index` of a grid of heads x tiles. Heads of one wave are interleaved, tile 0 of all of
// them first: tiles are ordered by decreasing work, so the longest start first. K and V of a wave stay in the L2 cache.
struct BlockTile {
  int head, tile;
};
GPTCORE_DEVICE BlockTile block_tile(int index, int tiles, int heads, int heads_per_wave) {
  const int first = index / (heads_per_wave * tiles) * heads_per_wave, in_wave = index - first * tiles;
  const int wave_heads = heads - first < heads_per_wave ? heads - first : heads_per_wave;
  return {first + in_wave % wave_heads, in_wave / wave_heads};
}

// ---- tiles in shared memory -----------------------------------------------------------------------------------------

// Rows of kWidth elements, in chunks of 16 bytes, swizzled: the same chunk of eight successive rows (one ldmatrix) and
// eight successive chunks of a row (one copy) each cover all 32 banks.
template <class T, int kWidth>
struct SharedTile {
  using Element = T;
  static constexpr int kPerChunk = 16 / sizeof(T), kChunks = kWidth / kPerChunk;
  static_assert(kWidth % kPerChunk == 0 && kChunks % 4 == 0, "the swizzle permutes four or eight chunks");
  char* data;

  // Returns chunk `index` + `more`, which have no bit in common. The variable of an unrolled loop goes into `more`, so
  // that every address is one base address XOR a constant. The tile must begin at a multiple of 128 bytes.
  GPTCORE_DEVICE char* chunk(unsigned row, unsigned index, unsigned more = 0) const {
    constexpr unsigned kPermuted = kChunks % 8 == 0 ? 8 : 4;
    const unsigned swizzle = kPermuted == 8 ? row % 8 : row / 2 % 4;
    const SharedAddress base = shared_address(data) + (row * kChunks + (index ^ swizzle)) * 16;
    return shared_pointer((base ^ more % kPermuted * 16) + more / kPermuted * kPermuted * 16);
  }
  GPTCORE_DEVICE T* pair(int row, int column) const {  // two adjacent elements, from an even column
    return reinterpret_cast<T*>(chunk(row, column / kPerChunk)) + column % kPerChunk;
  }
};

// Starts the copy of kRows rows of head_dim elements; row_at(i) is the address of row i, or null for a row of zeros.
// Without `vectors` (addresses or head_dim not multiples of 16 bytes) elements are copied synchronously, one by one.
template <int kRows, int kThreads, class Tile, class RowAt>
GPTCORE_DEVICE void load_rows(Tile to, RowAt row_at, int head_dim, bool vectors) {
  using T = typename Tile::Element;
  constexpr unsigned kChunks = Tile::kChunks;
  constexpr int kPerChunk = Tile::kPerChunk;
#pragma unroll 1  // unrolled, all addresses would stay in registers across the caller's loop
  for (unsigned i = threadIdx.x; i < kRows * kChunks; i += kThreads) {
    const int row = i / kChunks, column = i % kChunks * kPerChunk;
    const T* const from = row_at(row);
    if (vectors) {
      copy_async<16>(to.chunk(row, i % kChunks), from + column, from && column < head_dim);
    } else {
      T* const slot = reinterpret_cast<T*>(to.chunk(row, i % kChunks));
      for (int j = 0; j < kPerChunk; ++j) slot[j] = from && column + j < head_dim ? from[column + j] : T{};
    }
  }
}

// load_rows for rows at one stride, of which `rows` exist. Each thread copies one column of every kStep-th row, so the
// next address is one addition. A row of 12 chunks takes 16 threads, so that threads cover whole rows.
template <int kRows, int kThreads, class Tile>
GPTCORE_DEVICE void load_tile(Tile to, const typename Tile::Element* from, int64_t stride, int rows, int head_dim,
                              bool vectors) {
  using T = typename Tile::Element;
  constexpr unsigned kChunks = Tile::kChunks, kLanes = kChunks == 12 ? 16 : kChunks;
  constexpr unsigned kStep = kThreads / kLanes;  // 0 if a row has more chunks than there are threads
  if constexpr (kStep > 0) {
    static_assert(kThreads % kLanes == 0 && kRows % kStep == 0, "each thread copies the same number of rows");
    if (vectors) {
      const unsigned first = threadIdx.x / kLanes, index = threadIdx.x % kLanes, column = index * (16 / sizeof(T));
      const bool inside = column < unsigned(head_dim);
      const T* chunk = from + first * stride + column;
      if (index >= kChunks) return;
#pragma unroll
      for (unsigned row = 0; row < kRows; row += kStep, chunk += kStep * stride)
        copy_async<16>(to.chunk(first + row, index), chunk, inside && int(first + row) < rows);
      return;
    }
  }
  const auto row_at = [&](int row) { return row < rows ? from + row * stride : nullptr; };
  load_rows<kRows, kThreads>(to, row_at, head_dim, vectors);
}

// Stores two adjacent words, or elements, in one access.
GPTCORE_DEVICE void store_words(void* to, uint32_t first, uint32_t second) {
  *static_cast<uint64_t*>(to) = first | static_cast<uint64_t>(second) << 32;
}
template <class T>
GPTCORE_DEVICE void store_pair(T* to, float first, float second) {
  if constexpr (sizeof(T) == 2) *reinterpret_cast<uint32_t*>(to) = pack<T>(first, second);
  else store_words(to, bits_of(first), bits_of(second));
}

GPTCORE_DEVICE void store_float4(void* to, const float (&v)[4]) {
  store_vec(to, {{bits_of(v[0]), bits_of(v[1]), bits_of(v[2]), bits_of(v[3])}});
}

// A warp stores kRows rows of a tile from first_row; row_at(i) is the destination of row i of the tile, or null.
template <int kRows, class Tile, class RowAt>
GPTCORE_DEVICE void store_rows(Tile from, int first_row, RowAt row_at, int head_dim, bool vectors, int lane) {
  using T = typename Tile::Element;
  constexpr int kChunks = Tile::kChunks, kPerChunk = Tile::kPerChunk;
  for (int i = lane; i < kRows * kChunks; i += 32) {
    const int row = first_row + i / kChunks, column = i % kChunks * kPerChunk;
    T* const to = row_at(row);
    const char* const chunk = from.chunk(row, i % kChunks);
    if (!to) continue;
    if (!vectors)
      for (int j = 0; j < kPerChunk && column + j < head_dim; ++j)
        to[column + j] = reinterpret_cast<const T*>(chunk)[j];
    else if (column < head_dim)
      store_vec(to + column, load_vec(chunk));
  }
}

// ---- products of a warp ---------------------------------------------------------------------------------------------

// Fragments of one mma: A has 16 rows, B two tiles of 8 columns; both are 32 bytes deep (16 16-bit elements, 8 TF32).
template <class T, int kWidth>
GPTCORE_DEVICE void load_a(uint32_t (&a)[4], SharedTile<T, kWidth> tile, int row, int step, int lane) {
  load_matrix(a, tile.chunk(row + lane % 16, lane / 16, 2 * step));
}
template <class T, int kWidth>  // the tile holds B^T: a row of the tile is a column of B
GPTCORE_DEVICE void load_b(uint32_t (&b)[4], SharedTile<T, kWidth> tile, int row, int step, int lane) {
  load_matrix(b, tile.chunk(row + lane / 16 * 8 + lane % 8, lane / 8 % 2, 2 * step));
}

GPTCORE_DEVICE void round_to_tf32(uint32_t (&r)[4]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) r[i] = to_tf32(float_of(r[i]));
}

template <class Math>
GPTCORE_DEVICE void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  const uint32_t b[2] = {b0, b1};
  if constexpr (kTf32<Math>) mma_1688_tf32(d, a, b);
  else mma_16816<Math>(d, a, b);
}

struct Float2 { float v[2]; };
struct Float4 { float v[4]; };
template <class Vector>
GPTCORE_DEVICE Vector load_shared(const void* from);  // one access
template <>
GPTCORE_DEVICE Float2 load_shared<Float2>(const void* from) {
  const uint64_t both = *static_cast<const uint64_t*>(from);
  return {{float_of(static_cast<uint32_t>(both)), float_of(static_cast<uint32_t>(both >> 32))}};
}
template <>
GPTCORE_DEVICE Float4 load_shared<Float4>(const void* from) {
  const Vec16 four = load_vec(from);
  return {{float_of(four.w[0]), float_of(four.w[1]), float_of(four.w[2]), float_of(four.w[3])}};
}

template <int kM, int kN>
GPTCORE_DEVICE void clear(float (&s)[kM][kN][4]) {
#pragma unroll
  for (int m = 0; m < kM; ++m)
#pragma unroll
    for (int n = 0; n < kN; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) s[m][n][i] = 0.0f;
}

// The mma of S = A B^T. fragments(m, step, a) sets the operand of rows 16 m of A.
template <class Math, int kM, int kN, int kWidth, class Fragments>
GPTCORE_DEVICE void multiply_fragments(float (&s)[kM][kN][4], Fragments fragments,
                                       SharedTile<Storage<Math>, kWidth> b_tile, int b_row, int lane) {
  clear(s);
#pragma unroll
  for (int step = 0; step < SharedTile<Storage<Math>, kWidth>::kChunks / 2; ++step) {
    uint32_t a[kM][4];
#pragma unroll
    for (int m = 0; m < kM; ++m) fragments(m, step, a[m]);
#pragma unroll
    for (int n = 0; n < kN; n += 2) {
      uint32_t b[4];
      load_b(b, b_tile, b_row + n * 8, step, lane);
      if constexpr (kTf32<Math>) round_to_tf32(b);
#pragma unroll
      for (int m = 0; m < kM; ++m) {
        mma<Math>(s[m][n], a[m], b[0], b[1]);
        mma<Math>(s[m][n + 1], a[m], b[2], b[3]);
      }
    }
  }
}

// S = A B^T: the warp's rows of A times 8 kN rows of B, over the width of the tiles.
template <class Math, int kM, int kN, int kWidth>
GPTCORE_DEVICE void multiply_transposed(float (&s)[kM][kN][4], SharedTile<Storage<Math>, kWidth> a_tile, int a_row,
                                        SharedTile<Storage<Math>, kWidth> b_tile, int b_row, int lane) {
  if constexpr (kPlainFloat<Math>) {
    clear(s);
#pragma unroll 2
    for (int c = 0; c < kWidth / 4; ++c) {
      Float4 a[kM][2];
#pragma unroll
      for (int m = 0; m < kM; ++m)
#pragma unroll
        for (int h = 0; h < 2; ++h) a[m][h] = load_shared<Float4>(a_tile.chunk(a_row + m * 16 + h * 8 + lane / 4, c));
#pragma unroll
      for (int n = 0; n < kN; ++n)
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const Float4 b = load_shared<Float4>(b_tile.chunk(b_row + n * 8 + lane % 4 * 2 + h, c));
#pragma unroll
          for (int m = 0; m < kM; ++m)
#pragma unroll
            for (int k = 0; k < 4; ++k) {
              s[m][n][h] += a[m][0].v[k] * b.v[k];
              s[m][n][2 + h] += a[m][1].v[k] * b.v[k];
            }
        }
    }
  } else {
    const auto fragments = [&](int m, int step, uint32_t (&a)[4]) {
      load_a(a, a_tile, a_row + m * 16, step, lane);
      if constexpr (kTf32<Math>) round_to_tf32(a);
    };
    multiply_fragments<Math>(s, fragments, b_tile, b_row, lane);
  }
}

// Rows of A as operands of several products, for 16-bit types. The fragments of the first kHeld steps stay in registers.
// Each lane parks the others in shared memory, as vectors of 16 bytes, 512 bytes apart.
template <int kM, int kWidth, int kHeld>
struct RowFragments {
  static constexpr int kSteps = kWidth / 16, kParkedBytes = kM * (kSteps - kHeld) * 512;  // of a warp
  uint32_t fragments[kM][kSteps][4];
  char* parked;  // of this lane

  // Sets rows 16 m of A to those from `row` on.
  template <class T>
  GPTCORE_DEVICE void load(int m, SharedTile<T, kWidth> tile, int row, int lane) {
#pragma unroll
    for (int step = 0; step < kSteps; ++step) load_a(fragments[m][step], tile, row, step, lane);
  }
  GPTCORE_DEVICE void park(char* to) {
    parked = to;
#pragma unroll
    for (int m = 0; m < kM; ++m)
#pragma unroll
      for (int step = kHeld; step < kSteps; ++step) {
        const auto& a = fragments[m][step];
        store_vec(parked + (m * (kSteps - kHeld) + step - kHeld) * 512, {{a[0], a[1], a[2], a[3]}});
      }
  }
  GPTCORE_DEVICE void operator()(int m, int step, uint32_t (&a)[4]) const {
    Vec16 v{};
    if (step >= kHeld) v = load_vec(parked + (m * (kSteps - kHeld) + step - kHeld) * 512);
#pragma unroll
    for (int i = 0; i < 4; ++i) a[i] = step < kHeld ? fragments[m][step][i] : v.w[i];
  }
};

// acc += P B: P in registers, 8 kN columns wide, times 8 kN rows of B.
template <class Math, int kM, int kN, int kWidth>
GPTCORE_DEVICE void multiply_add(float (&acc)[kM][kWidth / 8][4], const float (&p)[kM][kN][4],
                                 SharedTile<Storage<Math>, kWidth> b_tile, int b_row, int lane) {
  if constexpr (kPlainFloat<Math>) {
    // Every lane needs the whole row of P, which its quad holds.
#pragma unroll
    for (int n = 0; n < kN; ++n)
#pragma unroll 1
      for (int holder = 0; holder < 4; ++holder)
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          float a[kM][2];
#pragma unroll
          for (int m = 0; m < kM; ++m)
#pragma unroll
            for (int h = 0; h < 2; ++h) a[m][h] = shuffle(p[m][n][2 * h + c], lane / 4 * 4 + holder);
#pragma unroll
          for (int j = 0; j < kWidth / 8; ++j) {
            const Float2 b = load_shared<Float2>(b_tile.pair(b_row + n * 8 + holder * 2 + c, j * 8 + lane % 4 * 2));
#pragma unroll
            for (int m = 0; m < kM; ++m)
#pragma unroll
              for (int i = 0; i < 4; ++i) acc[m][j][i] += a[m][i / 2] * b.v[i % 2];
          }
        }
  } else if constexpr (kTf32<Math>) {
    // mma's k = t and t + 4 stand for columns 2 t and 2 t + 1, which lane t of the quad holds.
#pragma unroll
    for (int n = 0; n < kN; ++n) {
      uint32_t a[kM][4];
#pragma unroll
      for (int m = 0; m < kM; ++m)
#pragma unroll
        for (int i = 0; i < 4; ++i) a[m][i] = to_tf32(p[m][n][i % 2 * 2 + i / 2]);
#pragma unroll
      for (int j = 0; j < kWidth / 8; ++j) {
        const int row = b_row + n * 8 + lane % 4 * 2, column = j * 8 + lane / 4;
        const uint32_t b0 = to_tf32(*b_tile.pair(row, column)), b1 = to_tf32(*b_tile.pair(row + 1, column));
#pragma unroll
        for (int m = 0; m < kM; ++m) mma<Math>(acc[m][j], a[m], b0, b1);
      }
    }
  } else {
#pragma unroll
    for (int n = 0; n < kN; n += 2) {
      uint32_t a[kM][4];
#pragma unroll
      for (int m = 0; m < kM; ++m)
#pragma unroll
        for (int i = 0; i < 4; ++i) a[m][i] = pack<Math>(p[m][n + i / 2][i % 2 * 2], p[m][n + i / 2][i % 2 * 2 + 1]);
#pragma unroll
      for (int j = 0; j < kWidth / 8; j += 2) {
        uint32_t b[4];
        load_matrix_trans(b, b_tile.chunk(b_row + n * 8 + lane % 16, lane / 16, j));
#pragma unroll
        for (int m = 0; m < kM; ++m) {
          mma<Math>(acc[m][j], a[m], b[0], b[1]);
          mma<Math>(acc[m][j + 1], a[m], b[2], b[3]);
        }
      }
    }
  }
}

// ---- masks ----------------------------------------------------------------------------------------------------------

// The columns [begin, end) that a row attends to.
struct alignas(8) Range {
  int begin, end;
};

GPTCORE_DEVICE Range intersection(Range a, Range b) {
  return {a.begin > b.begin ? a.begin : b.begin, a.end < b.end ? a.end : b.end};
}

GPTCORE_DEVICE int64_t clamp(int64_t x, int64_t low, int64_t high) { return x < low ? low : x > high ? high : x; }

// The document boundaries of one batch row. Null cu_seqlens: one document.
struct Documents {
  const int64_t* cu_seqlens;
  int64_t base, length;

  // cu_seqlens covers batch x length, or one row and then holds for every row.
  GPTCORE_DEVICE Documents(const int64_t* cu, int64_t count, int64_t batch, int64_t len)
      : cu_seqlens(cu), base(cu && cu[count - 1] != len ? batch * len : 0), length(len) {}
  GPTCORE_DEVICE int64_t boundary(int64_t i) const { return clamp(cu_seqlens[i] - base, 0, length); }
};

// The keys that query `row` attends to (rows = queries, columns = keys), or, with both sides and both limits exchanged,
// the queries that attend to key `row`. Both ends of the range increase with the row. So a tile of rows attends to
// [begin of its first row, end of its last), and all of its rows to [begin of the last, end of the first).
GPTCORE_DEVICE Range attended(int row, Documents rows, Documents columns, int64_t num_boundaries, int64_t left,
                              int64_t right) {
  int64_t row_end = rows.length, column_begin = 0, column_end = columns.length;
  if (rows.cu_seqlens) {
    int64_t low = 0, high = num_boundaries - 1;  // binary search: the document that contains the row
    while (high - low > 1) {
      const int64_t middle = (low + high) / 2;
      (rows.cu_seqlens[middle] <= rows.base + row ? low : high) = middle;
    }
    row_end = rows.boundary(low + 1);
    column_begin = columns.boundary(low), column_end = columns.boundary(low + 1);
  }
  const int64_t position = row - row_end + column_end;  // aligned at the end: the last query is at the last key
  const int64_t begin = clamp(position - left, column_begin, column_end);
  return {(int)begin, (int)clamp(position + right + 1, begin, column_end)};
}

// Sets elements outside the range of their row to `value`. `ranges` are those of the warp's rows, `column` is the first
// column of s.
template <int kM, int kN>
GPTCORE_DEVICE void mask_scores(float (&s)[kM][kN][4], const Range* ranges, int column, float value, int lane) {
#pragma unroll
  for (int m = 0; m < kM; ++m)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const Range range = ranges[m * 16 + half * 8 + lane / 4];
#pragma unroll
      for (int n = 0; n < kN; ++n)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int index = column + n * 8 + lane % 4 * 2 + i;
          if (index < range.begin || index >= range.end) s[m][n][half * 2 + i] = value;
        }
    }
}

// ---- dropout --------------------------------------------------------------------------------------------------------

// Philox4x32-10 (Salmon et al. 2011). Counter (i, query, batch x heads + head, 0) gives the words of keys 4 i to
// 4 i + 3 of a query, on every backend. A weight is kept if its word is at least dropout_threshold = dropout_p x 2^32.
struct Philox {
  uint32_t w[4];

  GPTCORE_DEVICE Philox(uint32_t c0, uint32_t c1, uint32_t c2, uint64_t seed) {
    uint32_t c3 = 0, k0 = (uint32_t)seed, k1 = (uint32_t)(seed >> 32);
#pragma unroll
    for (int round = 0; round < 10; ++round, k0 += 0x9E3779B9u, k1 += 0xBB67AE85u) {
      const uint32_t high0 = mul_high(0xD2511F53u, c0), low0 = 0xD2511F53u * c0;
      const uint32_t high1 = mul_high(0xCD9E8D57u, c2), low1 = 0xCD9E8D57u * c2;
      c0 = high1 ^ c1 ^ k0, c1 = low1, c2 = high0 ^ c3 ^ k1, c3 = low0;
    }
    w[0] = c0, w[1] = c1, w[2] = c2, w[3] = c3;
  }
};

constexpr float kLog2e = 1.44269504f, kLn2 = 0.693147181f;

// exp(scale s - lse). float32: scale s is rounded as in the forward (see log_sum_exp). 16 bits: one fused multiply-add.
template <class T>
GPTCORE_DEVICE float probability(float s, float scale, float lse) {
  if constexpr (sizeof(T) == 4) return exp2_approx(mul_rn(mul_rn(s, scale) - lse, kLog2e));
  else return exp2_approx(fmaf(s, mul_rn(scale, kLog2e), -mul_rn(lse, kLog2e)));
}

}  // namespace gptcore
