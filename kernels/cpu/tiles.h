// Matrix products of tiles, and the packing of their operands, for attention and linear layers.
#pragma once

#include "kernels/kernels.h"
#include "kernels/cpu/simd.h"

namespace gptcore {
namespace GPTCORE_ISA {
namespace {

constexpr int kPanel = kPanelVectors * kLanes;  // queries in one block of scores
constexpr int kBlockN = 64;                     // keys in one block of scores
constexpr int kTileRows = 6;                    // rows of a tile in vector registers
// Length of the partial sums of a dot product: the error of a sum grows with its length. Shorter for short vectors,
// where a product is rounded before it is added.
constexpr int kDepth = 4 * kLanes;

// Unrolled explicitly: otherwise GCC 12 keeps part of the accumulators in memory.
#define GPTCORE_UNROLL _Pragma("GCC unroll 16")

constexpr int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }
constexpr int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
constexpr int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

// Transposes each square of 4 vectors x 4 lanes.
GPTCORE_INLINE void transpose_quads(Vec* v) {
  const IntVec lane = lane_index(), quad = lane & ~3, odd = lane & 1, upper = lane >> 1 & 1;
  const IntVec ones = quad + upper + odd * kLanes, pairs = quad + odd + upper * kLanes;
  const Vec a = __builtin_shuffle(v[0], v[1], ones), b = __builtin_shuffle(v[0], v[1], ones + 2);
  const Vec c = __builtin_shuffle(v[2], v[3], ones), d = __builtin_shuffle(v[2], v[3], ones + 2);
  v[0] = __builtin_shuffle(a, c, pairs), v[1] = __builtin_shuffle(a, c, pairs + 2);
  v[2] = __builtin_shuffle(b, d, pairs), v[3] = __builtin_shuffle(b, d, pairs + 2);
}

// Transposes kLanes vectors in registers: squares of 4 x 4 numbers, then the squares.
GPTCORE_INLINE void transpose(Vec (&v)[kLanes]) {
  GPTCORE_UNROLL for (int i = 0; i < kLanes; i += 4) transpose_quads(v + i);
#if defined(__AVX512F__)
  GPTCORE_UNROLL for (int i = 0; i < 4; ++i) {
    const __m512 a = (__m512)v[i], b = (__m512)v[i + 4], c = (__m512)v[i + 8], d = (__m512)v[i + 12];
    const __m512 even = _mm512_shuffle_f32x4(a, b, 0x88), odd = _mm512_shuffle_f32x4(a, b, 0xdd);
    const __m512 even_2 = _mm512_shuffle_f32x4(c, d, 0x88), odd_2 = _mm512_shuffle_f32x4(c, d, 0xdd);
    v[i] = (Vec)_mm512_shuffle_f32x4(even, even_2, 0x88), v[i + 8] = (Vec)_mm512_shuffle_f32x4(even, even_2, 0xdd);
    v[i + 4] = (Vec)_mm512_shuffle_f32x4(odd, odd_2, 0x88), v[i + 12] = (Vec)_mm512_shuffle_f32x4(odd, odd_2, 0xdd);
  }
#elif defined(__AVX2__)
  GPTCORE_UNROLL for (int i = 0; i < 4; ++i) {
    const __m256 a = (__m256)v[i], b = (__m256)v[i + 4];
    v[i] = (Vec)_mm256_permute2f128_ps(a, b, 0x20), v[i + 4] = (Vec)_mm256_permute2f128_ps(a, b, 0x31);
  }
#endif
}

// Returns 16 bytes each of rows 0, 4, 8 and so on up to kLanes, side by side. `stride` is in bytes.
GPTCORE_INLINE Vec load_quads(const void* p, int64_t stride) {
#if defined(__AVX512F__)
  const auto at = [&](int64_t row) { return _mm_loadu_ps((const float*)((const char*)p + row * stride)); };
  const __m256 low = _mm256_insertf128_ps(_mm256_castps128_ps256(at(0)), at(4), 1);
  const __m256 high = _mm256_insertf128_ps(_mm256_castps128_ps256(at(8)), at(12), 1);
  return (Vec)_mm512_insertf32x8(_mm512_castps256_ps512(low), high, 1);
#elif defined(__AVX2__)
  const auto at = [&](int64_t row) { return _mm_loadu_ps((const float*)((const char*)p + row * stride)); };
  return (Vec)_mm256_insertf128_ps(_mm256_castps128_ps256(at(0)), at(4), 1);
#else
  return load((const float*)p);
#endif
}

// ---- the matrix product ---------------------------------------------------------------------------------------------
//
// C = A B or C += A B in T, with A (rows x depth), B (depth x width), C (rows x width). An element of B is a Wide<T>: a
// float, or two bfloat16 adjacent in depth; depth = steps x kStep. B and C are stored in panels of kPanel columns, and
// one call multiplies one panel.

template <class T> struct Operand;
template <> struct Operand<float> { using Wide = float; static constexpr int kStep = 1; };
template <> struct Operand<bfloat16> { using Wide = uint32_t; static constexpr int kStep = 2; };
#if defined(__AVX512BF16__)
using Bfloat16Operand = bfloat16;
#else
using Bfloat16Operand = float;
#endif
template <class T> using Wide = typename Operand<T>::Wide;
template <class T> constexpr int kStep = Operand<T>::kStep;
#if defined(__AMX_BF16__)
template <class T> constexpr bool kInTiles = kStep<T> == 2;  // multiplied in AMX tile registers
#else
template <class T> constexpr bool kInTiles = false;
#endif

// A: the kStep elements of row r and step k begin at data + r * row + k * step.
template <class T>
struct Left {
  const T* data;
  int64_t row, step;
  Left from_row(int64_t r) const { return {data + r * row, row, step}; }
  Left from_step(int64_t k) const { return {data + k * step, row, step}; }
};
template <class T>
Left<T> by_rows(const T* data, int64_t ld) { return {data, ld, kStep<T>}; }
template <class T>  // the transpose of a packed B operand
Left<T> by_columns(const Wide<T>* data) { return {(const T*)data, kStep<T>, kStep<T> * kPanel}; }

GPTCORE_INLINE void multiply_add(Vec& acc, Vec a, Vec b) { acc += a * b; }
GPTCORE_INLINE Vec splat_wide(const float* p) { return splat(*p); }
GPTCORE_INLINE Vec load_wide(const float* p) { return load(p); }

#if defined(__AVX512BF16__)
GPTCORE_INLINE void multiply_add(Vec& acc, UintVec a, UintVec b) {
  acc = (Vec)_mm512_dpbf16_ps((__m512)acc, (__m512bh)a, (__m512bh)b);
}
GPTCORE_INLINE UintVec splat_wide(const bfloat16* p) {
  int32_t pair;
  memcpy(&pair, p, sizeof pair);
  return (UintVec)_mm512_set1_epi32(pair);
}
GPTCORE_INLINE UintVec load_wide(const uint32_t* p) { return bit_cast<UintVec>(load((const float*)p)); }
#endif

template <int Rows, int Vectors, int Panel, class T>
GPTCORE_INLINE void add_products(Vec (&acc)[Rows][Vectors], Left<T> a, const Wide<T>* b, int64_t steps) {
  for (int64_t k = 0; k < steps; ++k) {
    decltype(load_wide(b)) row[Vectors];
    GPTCORE_UNROLL for (int v = 0; v < Vectors; ++v) row[v] = load_wide(b + k * Panel + v * kLanes);
    GPTCORE_UNROLL for (int r = 0; r < Rows; ++r)
      GPTCORE_UNROLL for (int v = 0; v < Vectors; ++v)
        multiply_add(acc[r][v], splat_wide(a.data + r * a.row + k * a.step), row[v]);
  }
}

template <int Rows, int Vectors, class T>
GPTCORE_INLINE void tile(Left<T> a, const Wide<T>* b, int64_t steps, float* c, bool accumulate) {
  Vec acc[Rows][Vectors];
  GPTCORE_UNROLL for (int r = 0; r < Rows; ++r)
    GPTCORE_UNROLL for (int v = 0; v < Vectors; ++v) acc[r][v] = Vec{};
  add_products<Rows, Vectors, kPanel>(acc, a, b, steps);
  GPTCORE_UNROLL for (int r = 0; r < Rows; ++r)
    GPTCORE_UNROLL for (int v = 0; v < Vectors; ++v) {
      float* to = c + r * kPanel + v * kLanes;
      store(to, accumulate ? load(to) + acc[r][v] : acc[r][v]);
    }
}

template <int Vectors, class T>
void multiply_rows(Left<T> a, const Wide<T>* b, int64_t rows, int64_t steps, float* c, bool accumulate) {
  for (int64_t tiles = (rows + kTileRows - 1) / kTileRows; tiles > 0; --tiles) {
    const int64_t count = (rows + tiles - 1) / tiles;  // tiles of about the same size
    switch (count) {
      case 6: tile<6, Vectors>(a, b, steps, c, accumulate); break;
      case 5: tile<5, Vectors>(a, b, steps, c, accumulate); break;
      case 4: tile<4, Vectors>(a, b, steps, c, accumulate); break;
      case 3: tile<3, Vectors>(a, b, steps, c, accumulate); break;
      case 2: tile<2, Vectors>(a, b, steps, c, accumulate); break;
      case 1: tile<1, Vectors>(a, b, steps, c, accumulate); break;
    }
    rows -= count, a = a.from_row(count), c += count * kPanel;
  }
}

#if defined(__AMX_BF16__)
// The same in AMX tile registers of 16 rows x 64 bytes: 16 rows and 16 steps of A, 16 steps and a vector of columns of
// B, 16 rows and a vector of columns of C. Tile loads need rows at one stride; a transposed A is transposed back first.
// All 16-bit products use tiles, tails included, so that equal numbers are always summed in the same order.
constexpr int kTile = 16;  // rows and steps

// Sets the shape of the tiles; their contents are lost.
inline void shape_tiles(int64_t rows, int64_t steps) {
  struct alignas(64) {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};
  } shape;
  for (int i = 0; i < 4; ++i) shape.row_bytes[i] = 4 * kTile, shape.rows[i] = rows;  // C
  shape.row_bytes[4] = 4 * steps, shape.rows[4] = rows;                              // A
  for (int i = 5; i < 8; ++i) shape.row_bytes[i] = 4 * kTile, shape.rows[i] = steps;  // B, alternately
  __asm__ volatile("ldtilecfg %0" ::"m"(shape));
}
// Configures the tile registers of a thread for its lifetime, if T is multiplied in them.
template <class T>
struct TileRegisters {
  TileRegisters() { if (kInTiles<T>) shape_tiles(kTile, kTile); }
  ~TileRegisters() { if (kInTiles<T>) __asm__ volatile("tilerelease"); }
};

// The compiler does not track these registers; "memory" tells it about their loads.
#define GPTCORE_LOAD_TILE(tile, from, stride) \
  __asm__ volatile("tileloadd (%0,%1,1), %%tmm" #tile ::"r"(from), "r"((int64_t)(stride)) : "memory")
#define GPTCORE_STORE_TILE(tile, to, stride) \
  __asm__ volatile("tilestored %%tmm" #tile ", (%0,%1,1)" ::"r"(to), "r"((int64_t)(stride)) : "memory")
#define GPTCORE_ZERO_TILE(tile) __asm__ volatile("tilezero %%tmm" #tile ::)
#define GPTCORE_MULTIPLY_TILES(c, a, b) __asm__ volatile("tdpbf16ps %%tmm" #b ", %%tmm" #a ", %%tmm" #c ::)

// One tile of rows, with the configured shape.
template <int Vectors>
void multiply_tiles(const void* a, int64_t a_stride, const uint32_t* b, int64_t steps, float* c, bool accumulate) {
#define GPTCORE_BEGIN(v)                                                                          \
  if (Vectors > v) {                                                                              \
    if (accumulate) GPTCORE_LOAD_TILE(v, c + v * kLanes, kPanel * sizeof *c);                     \
    else GPTCORE_ZERO_TILE(v);                                                                    \
  }
#define GPTCORE_STEP(v, b_tile)                                                                   \
  if (Vectors > v) {                                                                              \
    GPTCORE_LOAD_TILE(b_tile, b + k * kPanel + v * kLanes, kPanel * sizeof *b);                   \
    GPTCORE_MULTIPLY_TILES(v, 4, b_tile);                                                         \
  }
#define GPTCORE_END(v) \
  if (Vectors > v) GPTCORE_STORE_TILE(v, c + v * kLanes, kPanel * sizeof *c)
  GPTCORE_BEGIN(0) GPTCORE_BEGIN(1) GPTCORE_BEGIN(2) GPTCORE_BEGIN(3)
  for (int64_t k = 0; k < steps; k += kTile) {
    GPTCORE_LOAD_TILE(4, (const uint32_t*)a + k, a_stride);
    GPTCORE_STEP(0, 5) GPTCORE_STEP(1, 6) GPTCORE_STEP(2, 7) GPTCORE_STEP(3, 5)
  }
  GPTCORE_END(0); GPTCORE_END(1); GPTCORE_END(2); GPTCORE_END(3);
}

template <int Vectors>
void multiply_rows(Left<bfloat16> a, const uint32_t* b, int64_t rows, int64_t steps, float* c, bool accumulate) {
  alignas(64) uint32_t transposed[kTile * kBlockN / 2];
  const int64_t whole = steps / kTile * kTile;
  for (int64_t r = 0; r < rows; r += kTile, c += kTile * kPanel) {
    const void* rows_of_a = a.data + r * a.row;
    int64_t stride = a.row * sizeof(bfloat16);
    if (a.step != kStep<bfloat16>) {
      for (int64_t k = 0; k < steps; k += kTile) {
        Vec v[kLanes];
        for (int i = 0; i < kTile; ++i)
          v[i] = k + i < steps ? load((const float*)(a.data + r * a.row + (k + i) * a.step)) : Vec{};
        transpose(v);
        for (int i = 0; i < kTile; ++i) store((float*)transposed + i * (kBlockN / 2) + k, v[i]);
      }
      rows_of_a = transposed, stride = kBlockN / 2 * sizeof *transposed;
    }
    const int64_t here = smaller(kTile, rows - r);
    if (here < kTile) shape_tiles(here, kTile);
    if (whole > 0 || steps == 0) multiply_tiles<Vectors>(rows_of_a, stride, b, whole, c, accumulate);
    if (whole < steps) {
      shape_tiles(here, steps - whole);
      multiply_tiles<Vectors>((const uint32_t*)rows_of_a + whole, stride, b + whole * kPanel, steps - whole, c,
                              accumulate || whole > 0);
    }
    if (here < kTile || whole < steps) shape_tiles(kTile, kTile);
  }
}
#else
template <class T>
struct TileRegisters {
  TileRegisters() {}  // not trivial, so that the compiler does not warn of an unused variable
};
#endif

// Multiplies the first `width` columns, rounded up to whole vectors.
template <class T>
void multiply(Left<T> a, const Wide<T>* b, int64_t rows, int64_t steps, int64_t width, float* c, bool accumulate) {
  switch ((width + kLanes - 1) / kLanes) {
    case 1: return multiply_rows<1>(a, b, rows, steps, c, accumulate);
    case 2: return multiply_rows<2>(a, b, rows, steps, c, accumulate);
#if defined(__AVX512F__)
    case 3: return multiply_rows<3>(a, b, rows, steps, c, accumulate);
    case 4: return multiply_rows<4>(a, b, rows, steps, c, accumulate);
#endif
  }
}

// ---- packing: from strided rows of any storage type S to operands of type T -----------------------------------------

// A vector of the sums over lanes of kLanes vectors: a transposition that adds the two halves.
template <int Half = kLanes / 2>
GPTCORE_INLINE Vec sums_of(Vec (&v)[kLanes]) {
  const IntVec lane = lane_index();
  const IntVec low = (lane & Half) ? lane - Half + kLanes : lane, high = (lane & Half) ? lane + kLanes : lane + Half;
  for (int i = 0; i < Half; ++i)
    v[i] = __builtin_shuffle(v[i], v[i + Half], low) + __builtin_shuffle(v[i], v[i + Half], high);
  if constexpr (Half > 1) return sums_of<Half / 2>(v);
  return v[0];
}

GPTCORE_INLINE void store_wide(float* p, const Vec* v) { store(p, v[0]); }
GPTCORE_INLINE void store_wide(uint32_t* p, const Vec* v) {  // rounds halves up, in four instructions
  UintVec low = bit_cast<UintVec>(v[0]) + 0x8000u, high = bit_cast<UintVec>(v[1]) + 0x8000u;
  store((float*)p, bit_cast<Vec>(low >> 16 | (high & 0xffff0000u)));
}

// A kLanes x kLanes block of the source; zeros beyond its rows and columns.
template <class S>
GPTCORE_INLINE void load_square(Vec (&v)[kLanes], const S* source, int64_t stride, int64_t rows, int64_t columns) {
  for (int i = 0; i < kLanes; ++i) v[i] = i < rows ? load_up_to(source + i * stride, columns) : Vec{};
}

template <class S, class T> constexpr bool kSame = false;
template <class T> constexpr bool kSame<T, T> = true;

// Packs A: one source row per row, zeros up to `depth` columns (a multiple of kStep). Also useful without conversion:
// the copy reads memory at full bandwidth, which a product that reads several rows at a time does not.
template <class S, class T>
void pack_rows(T* to, int64_t depth, const S* source, int64_t stride, int64_t rows, int64_t columns, int64_t row_size) {
  for (int64_t i = 0; i < rows; ++i, to += row_size, source += stride)
    if constexpr (kSame<S, T>) {
      constexpr int64_t kWhole = sizeof(Vec) / sizeof(T);
      int64_t j = 0;
      for (; j + kWhole <= columns; j += kWhole) store((float*)(to + j), load((const float*)(source + j)));
      for (; j < depth; ++j) to[j] = j < columns ? source[j] : T{};
    } else {
      for (int64_t j = 0; j < depth; j += kLanes)
        store_up_to(to + j, j < columns ? load_up_to(source + j, columns - j) : Vec{}, depth - j);
    }
}

template <class S, class T>
void pack_rows(T* to, int64_t depth, const S* source, int64_t stride, int64_t rows, int64_t columns) {
  pack_rows(to, depth, source, stride, rows, columns, depth);
}

// Packs B, one source row per column: depth runs along the source's columns; Panel source rows, times `sign`.
template <class S, class T, int Panel = kPanel>
void pack_panel_columns(Wide<T>* to, const S* source, int64_t stride, int64_t rows, int64_t columns, float sign) {
  if constexpr (kStep<T> == 2)
    if (columns % 2 == 0 && stride % 2 == 0 && sign == 1.0f)  // move adjacent pairs as one float
      return pack_panel_columns<float, float, Panel>((float*)to, (const float*)source, stride / 2, rows, columns / 2, 1.0f);
  for (int64_t i = 0; i < Panel; i += kLanes)
    for (int64_t j = 0; j < columns; j += kLanes) {
      Vec v[kLanes];
      load_square(v, source + i * stride + j, stride, rows - i, columns - j);
      transpose(v);
      if (sign != 1.0f)  // multiplying by 1 would change pairs of bfloat16 that look like a NaN
        for (int c = 0; c < kLanes; ++c) v[c] *= sign;
      for (int64_t c = 0; c < smaller(kLanes, columns - j); c += kStep<T>)
        store_wide(to + (j + c) / kStep<T> * Panel + i, v + c);
    }
}

// Packs B, one source column per column: depth runs along the rows, `depth` of them; in panels of kPanel columns.
template <class S, class T>
void pack_panel_rows(Wide<T>* to, const S* source, int64_t stride, int64_t rows, int64_t columns, int64_t depth) {
  for (int64_t j = 0; j < columns; j += kLanes) {
    Wide<T>* panel = to + j / kPanel * kPanel * (depth / kStep<T>) + j % kPanel;
    for (int64_t i = 0; i < depth; i += kStep<T>) {
      Vec v[2];
      for (int s = 0; s < kStep<T>; ++s)
        v[s] = i + s < rows ? load_up_to(source + (i + s) * stride + j, columns - j) : Vec{};
      store_wide(panel + i / kStep<T> * kPanel, v);
    }
  }
}

// Stores row 0 of accumulators in panels, each `rows` long, to a row of a tensor, times `factor`.
template <class S>
void unpack_row(S* to, const float* from, int64_t rows, int64_t columns, float factor) {
  for (int64_t j = 0; j < columns; j += kLanes)
    store_up_to(to + j, load(from + j / kPanel * kPanel * rows + j % kPanel) * factor, columns - j);
}

}  // namespace
}  // namespace GPTCORE_ISA
}  // namespace gptcore
