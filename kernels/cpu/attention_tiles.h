// The matrix product of one tile of attention, and the packing of its operands.
#pragma once

#include "kernels/kernels.h"
#include "kernels/cpu/simd.h"

namespace gptcore {
namespace GPTCORE_ISA {
namespace {

constexpr int kPanel = kPanelVectors * kLanes;  // queries in one block of scores
constexpr int kBlockN = 64;                     // keys in one block of scores
constexpr int kTileRows = 6;                    // rows of one register tile
constexpr int kDepth = 64;  // terms that are added up on their own: the error of a sum grows with its length

constexpr int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }
constexpr int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
constexpr int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

// ---- the matrix product -----------------------------------------------------------------------------------------------
//
// C (rows x width) = or += A (rows x depth) B (depth x width). A is row-major in T. B is in Wide<T>: a float, or two
// bfloat16 that are neighbours in depth, side by side for one column; `steps` counts those, so depth = steps x kStep.

template <class T> struct Operand;
template <> struct Operand<float> { using Wide = float; static constexpr int kStep = 1; };
template <> struct Operand<bfloat16> { using Wide = uint32_t; static constexpr int kStep = 2; };
template <class T> using Wide = typename Operand<T>::Wide;
template <class T> constexpr int kStep = Operand<T>::kStep;

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

// Unrolled by hand: left to itself GCC 12 keeps part of the accumulators in memory.
#define GPTCORE_UNROLL _Pragma("GCC unroll 8")

template <int Rows, int Vectors, class T>
void tile(const T* a, int64_t lda, const Wide<T>* b, int64_t steps, float* c, int64_t ldc, bool accumulate) {
  Vec acc[Rows][Vectors];
  GPTCORE_UNROLL for (int r = 0; r < Rows; ++r)
    GPTCORE_UNROLL for (int v = 0; v < Vectors; ++v) acc[r][v] = Vec{};
  for (int64_t k = 0; k < steps; ++k) {
    decltype(load_wide(b)) row[Vectors];
    GPTCORE_UNROLL for (int v = 0; v < Vectors; ++v) row[v] = load_wide(b + k * kPanel + v * kLanes);
    GPTCORE_UNROLL for (int r = 0; r < Rows; ++r)
      GPTCORE_UNROLL for (int v = 0; v < Vectors; ++v)
        multiply_add(acc[r][v], splat_wide(a + r * lda + k * kStep<T>), row[v]);
  }
  GPTCORE_UNROLL for (int r = 0; r < Rows; ++r)
    GPTCORE_UNROLL for (int v = 0; v < Vectors; ++v) {
      float* to = c + r * ldc + v * kLanes;
      store(to, accumulate ? load(to) + acc[r][v] : acc[r][v]);
    }
}

template <int Vectors, class T>
void multiply_rows(const T* a, int64_t lda, const Wide<T>* b, int64_t rows, int64_t steps, float* c, int64_t ldc,
                   bool accumulate) {
  for (; rows >= kTileRows; rows -= kTileRows, a += kTileRows * lda, c += kTileRows * ldc)
    tile<kTileRows, Vectors>(a, lda, b, steps, c, ldc, accumulate);
  switch (rows) {
    case 5: return tile<5, Vectors>(a, lda, b, steps, c, ldc, accumulate);
    case 4: return tile<4, Vectors>(a, lda, b, steps, c, ldc, accumulate);
    case 3: return tile<3, Vectors>(a, lda, b, steps, c, ldc, accumulate);
    case 2: return tile<2, Vectors>(a, lda, b, steps, c, ldc, accumulate);
    case 1: return tile<1, Vectors>(a, lda, b, steps, c, ldc, accumulate);
  }
}

// The first `width` columns (rounded up to whole vectors) of a product whose B has rows of kPanel.
template <class T>
void multiply(const T* a, int64_t lda, const Wide<T>* b, int64_t rows, int64_t steps, int64_t width, float* c,
              int64_t ldc, bool accumulate) {
  switch ((width + kLanes - 1) / kLanes) {
    case 1: return multiply_rows<1>(a, lda, b, rows, steps, c, ldc, accumulate);
    case 2: return multiply_rows<2>(a, lda, b, rows, steps, c, ldc, accumulate);
#if defined(__AVX512F__)
    case 3: return multiply_rows<3>(a, lda, b, rows, steps, c, ldc, accumulate);
    case 4: return multiply_rows<4>(a, lda, b, rows, steps, c, ldc, accumulate);
#endif
  }
}

// Under a causal mask the left half of a panel's queries sees only the first `left` of `count` keys: the products of a
// block of scores spare what no query of a half sees.

// S^T = K Q^T: rows are keys.
template <class T>
void multiply_left_right(const T* a, int64_t lda, const Wide<T>* b, int64_t left, int64_t count, int64_t steps,
                         int64_t width, float* c) {
  constexpr int64_t kSteps = kDepth / kStep<T>;
  for (int64_t done = 0; done < steps; done += kSteps, a += kDepth, b += kSteps * kPanel) {
    const int64_t these = smaller(kSteps, steps - done);
    multiply<T>(a, lda, b, left, these, width, c, kPanel, done > 0);
    if (left < count)
      multiply<T>(a + left * lda, lda, b + kPanel / 2, count - left, these, width - kPanel / 2,
                  c + left * kPanel + kPanel / 2, kPanel, done > 0);
  }
}

// O^T += V^T P^T: depth is keys.
template <class T>
void add_left_right(const T* a, int64_t lda, const Wide<T>* b, int64_t rows, int64_t left, int64_t count, int64_t width,
                    float* c, bool accumulate) {
  const int64_t left_steps = (left + kStep<T> - 1) / kStep<T>, steps = (count + kStep<T> - 1) / kStep<T>;
  if (left == count) return multiply<T>(a, lda, b, rows, steps, width, c, kPanel, accumulate);
  multiply<T>(a, lda, b, rows, left_steps, kPanel / 2, c, kPanel, accumulate);
  multiply<T>(a, lda, b + kPanel / 2, rows, steps, width - kPanel / 2, c + kPanel / 2, kPanel, accumulate);
}

// ---- packing: from strided rows of any storage type S to operands of type T -------------------------------------------

template <int Half>
GPTCORE_INLINE void exchange(Vec (&v)[kLanes]) {
  const IntVec lane = lane_index();
  const IntVec low = (lane & Half) ? lane - Half + kLanes : lane, high = (lane & Half) ? lane + kLanes : lane + Half;
  for (int i = 0; i < kLanes; ++i)
    if (!(i & Half)) {
      Vec a = v[i], b = v[i + Half];
      v[i] = __builtin_shuffle(a, b, low);
      v[i + Half] = __builtin_shuffle(a, b, high);
    }
  if constexpr (Half > 1) exchange<Half / 2>(v);
}

// Transposes kLanes vectors in registers, by exchanging quarters of halves of halves.
GPTCORE_INLINE void transpose(Vec (&v)[kLanes]) { exchange<kLanes / 2>(v); }

// A vector of the sums over the lanes of each of kLanes vectors: as above, but of the two halves only the sum goes on.
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

// A kLanes x kLanes corner of the source; zeros beyond its rows and columns.
template <class S>
GPTCORE_INLINE void load_square(Vec (&v)[kLanes], const S* source, int64_t stride, int64_t rows, int64_t columns) {
  for (int i = 0; i < kLanes; ++i) v[i] = i < rows ? load_up_to(source + i * stride, columns) : Vec{};
}

// A, one source row a row, zeros up to `depth` columns (a multiple of kStep).
template <class T>
void pack_rows(T* to, int64_t ld, const T* source, int64_t stride, int64_t rows, int64_t columns, int64_t depth) {
  for (int64_t i = 0; i < rows; ++i) {
    memcpy(to + i * ld, source + i * stride, columns * sizeof(T));
    memset(to + i * ld + columns, 0, (depth - columns) * sizeof(T));
  }
}
template <class S, class T>
void pack_rows(T* to, int64_t ld, const S* source, int64_t stride, int64_t rows, int64_t columns, int64_t depth) {
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < depth; j += kLanes) {
      Vec v = j < columns ? load_up_to(source + i * stride + j, columns - j) : Vec{};
      store_up_to(to + i * ld + j, v, depth - j);
    }
}

// A, one source column a row: to[column][row], in blocks of kBlockN source rows, each `columns` x kBlockN.
template <class S, class T>
void pack_columns(T* to, const S* source, int64_t stride, int64_t rows, int64_t columns) {
  for (int64_t i = 0; i < rows; i += kLanes) {
    T* block = to + i / kBlockN * kBlockN * columns + i % kBlockN;
    for (int64_t j = 0; j < columns; j += kLanes) {
      Vec v[kLanes];
      load_square(v, source + i * stride + j, stride, rows - i, columns - j);
      transpose(v);
      for (int64_t c = 0; c < smaller(kLanes, columns - j); ++c) store(block + (j + c) * kBlockN, v[c]);
    }
  }
}

#if defined(__AVX512BF16__)
// The same from bfloat16 to bfloat16: rows in pairs, which are moved as one number of 32 bits.
void pack_columns(bfloat16* to, const bfloat16* source, int64_t stride, int64_t rows, int64_t columns) {
  for (int64_t i = 0; i < rows; i += 2 * kLanes) {
    bfloat16* block = to + i / kBlockN * kBlockN * columns + i % kBlockN;
    for (int64_t j = 0; j < columns; j += kLanes) {
      Vec v[kLanes];
      for (int r = 0; r < kLanes; ++r) {
        const bfloat16* at = source + (i + 2 * r) * stride + j;
        Vec pair[2];
        for (int s = 0; s < 2; ++s) pair[s] = i + 2 * r + s < rows ? load_up_to(at + s * stride, columns - j) : Vec{};
        v[r] = bit_cast<Vec>(bit_cast<UintVec>(pair[0]) >> 16 | bit_cast<UintVec>(pair[1]));
      }
      transpose(v);
      for (int64_t c = 0; c < smaller(kLanes, columns - j); ++c) store((float*)(block + (j + c) * kBlockN), v[c]);
    }
  }
}
#endif

// B, one source row a column: depth runs along the source's columns; kPanel source rows, times `sign`.
template <class S, class T>
void pack_panel_columns(Wide<T>* to, const S* source, int64_t stride, int64_t rows, int64_t columns, float sign) {
  if constexpr (kStep<T> == 2)
    if (columns % 2 == 0 && stride % 2 == 0 && sign == 1.0f)  // neighbours stay together: move them as one float
      return pack_panel_columns<float, float>((float*)to, (const float*)source, stride / 2, rows, columns / 2, 1.0f);
  for (int64_t i = 0; i < kPanel; i += kLanes)
    for (int64_t j = 0; j < columns; j += kLanes) {
      Vec v[kLanes];
      load_square(v, source + i * stride + j, stride, rows - i, columns - j);
      transpose(v);
      if (sign != 1.0f)  // a product with 1 would change the bits of two bfloat16 that look like a NaN
        for (int c = 0; c < kLanes; ++c) v[c] *= sign;
      for (int64_t c = 0; c < smaller(kLanes, columns - j); c += kStep<T>)
        store_wide(to + (j + c) / kStep<T> * kPanel + i, v + c);
    }
}

// B, one source column a column: depth runs along the rows; panels of kPanel columns, each kPanel rows deep.
template <class S, class T>
void pack_panel_rows(Wide<T>* to, const S* source, int64_t stride, int64_t rows, int64_t columns) {
  for (int64_t j = 0; j < columns; j += kLanes) {
    Wide<T>* panel = to + j / kPanel * kPanel * (kPanel / kStep<T>) + j % kPanel;
    for (int64_t i = 0; i < kPanel; i += kStep<T>) {
      Vec v[2];
      for (int s = 0; s < kStep<T>; ++s)
        v[s] = i + s < rows ? load_up_to(source + (i + s) * stride + j, columns - j) : Vec{};
      store_wide(panel + i / kStep<T> * kPanel, v);
    }
  }
}

// From accumulators with one destination row a column (rows of kPanel) to the strided rows of a tensor, times `factor`.
template <class S>
void unpack_columns(S* to, int64_t stride, const float* from, int64_t rows, int64_t columns, float factor) {
  for (int64_t i = 0; i < rows; i += kLanes)
    for (int64_t j = 0; j < columns; j += kLanes) {
      Vec v[kLanes];
      for (int c = 0; c < kLanes; ++c) v[c] = j + c < columns ? load(from + (j + c) * kPanel + i) * factor : Vec{};
      transpose(v);
      for (int64_t r = 0; r < smaller(kLanes, rows - i); ++r) store_up_to(to + (i + r) * stride + j, v[r], columns - j);
    }
}

template <class S>
void unpack_rows(S* to, int64_t stride, const float* from, int64_t ld, int64_t rows, int64_t columns, float factor) {
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < columns; j += kLanes)
      store_up_to(to + i * stride + j, load(from + i * ld + j) * factor, columns - j);
}

}  // namespace
}  // namespace GPTCORE_ISA
}  // namespace gptcore
