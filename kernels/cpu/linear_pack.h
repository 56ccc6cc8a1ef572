// Packing of the operands of linear layers: into panels whose rows are steps of the sum.
#pragma once

#include "kernels/cpu/panels.h"
#include "kernels/cpu/rows.h"
#include "kernels/cpu/tiles.h"

namespace gptcore {
namespace GPTCORE_ISA {
namespace {

// A tile of C in registers: 12 x 2 vectors read less of B than 6 x 4, and B comes from the second level of the cache.
constexpr int kRows = kLanes == 16 ? 12 : 6, kVectors = 2;
constexpr int kWidth = kVectors * kLanes;  // columns of a panel of B
constexpr int64_t kStretch = 64;           // rows or columns that are packed in one go

// Returns v rounded to T.
template <class T>
GPTCORE_INLINE Vec rounded_to(Vec v) {
  if constexpr (kStep<T> == 2) return bit_cast<Vec>(__builtin_convertvector(to_bfloat16(v), UintVec) << 16);
  return v;
}

// Stores one float32 number per column, or two adjacent ones that bfloat16 can represent.
GPTCORE_INLINE void store_exactly(float* p, const Vec* v) { store(p, v[0]); }
GPTCORE_INLINE void store_exactly(uint32_t* p, const Vec* v) {
  store((float*)p, bit_cast<Vec>(bit_cast<UintVec>(v[0]) >> 16 | bit_cast<UintVec>(v[1])));
}

// Packs rows of a source that follow each other in depth: Width columns of each, of which `columns` exist. The last
// vector may be written beyond Width, where the next row goes.
template <int Width, class S, class T>
void pack_from_rows(Wide<T>* to, const S* source, int64_t stride, int64_t rows, int64_t columns) {
  auto pack = [&](int64_t count, auto load_at) {
    for (int64_t j = 0; j < Width; j += kLanes) {
      Vec v[kStep<T>] = {};
      for (int s = 0; s < count; ++s) {
        v[s] = load_at(source + s * stride + j, j);
        if (sizeof(S) > sizeof(T)) v[s] = rounded_to<T>(v[s]);
      }
      store_exactly(to + j, v);
    }
    source += count * stride, to += Width;
  };
  auto some = [&](const S* p, int64_t j) { return j < columns ? load_up_to(p, columns - j) : Vec{}; };
  auto all = [](const S* p, int64_t) { return load(p); };
  const bool whole = columns >= (Width + kLanes - 1) / kLanes * kLanes;
  int64_t k = 0;
  for (; whole && k + kStep<T> <= rows; k += kStep<T>) pack(kStep<T>, all);
  for (; k < rows; k += kStep<T>) pack(smaller(kStep<T>, rows - k), some);
}

// Transposes up to Vectors * kLanes rows of units of 32 bits, floats or pairs of 16-bit numbers, and calls emit(unit,
// vectors), units in order. Prefetches as many bytes.
template <int Vectors, class Emit>
GPTCORE_INLINE void transpose_units(const float* source, int64_t stride, int64_t rows, int64_t units, Prefetch& next,
                                    Emit emit) {
  constexpr int64_t kRowsAtOnce = Vectors * kLanes;
  // At such strides rows share few sets of the first-level cache, and evict one another between two parts of a line.
  if (rows >= kRowsAtOnce && units % 4 == 0 && stride * (int64_t)sizeof(float) % 2048 != 0) {
    for (int64_t k = 0; k < units; k += 4) {
      Vec v[Vectors][4];
      GPTCORE_UNROLL for (int u = 0; u < Vectors; ++u) {
        GPTCORE_UNROLL for (int i = 0; i < 4; ++i) v[u][i] = load_quads(source + k + (u * kLanes + i) * stride, stride * 4);
        transpose_quads(v[u]);
      }
      next.fetch<kRowsAtOnce * 16>();
      GPTCORE_UNROLL for (int i = 0; i < 4; ++i) {
        Vec of_unit[Vectors];
        GPTCORE_UNROLL for (int u = 0; u < Vectors; ++u) of_unit[u] = v[u][i];
        emit(k + i, of_unit);
      }
    }
    return;
  }
  // So whole lines are transposed.
  Vec staged[kLanes][Vectors] = {};
  for (int64_t k = 0; k < units; k += kLanes) {
    const int64_t here = smaller(kLanes, units - k);
    for (int u = 0; u < Vectors; ++u) {
      Vec square[kLanes];
      if (rows >= kRowsAtOnce && here == kLanes) {
        GPTCORE_UNROLL for (int i = 0; i < kLanes; ++i) square[i] = load(source + k + (u * kLanes + i) * stride);
      } else {
        load_square(square, source + k + u * kLanes * stride, stride, rows - u * kLanes, here);
      }
      transpose(square);
      GPTCORE_UNROLL for (int i = 0; i < kLanes; ++i) staged[i][u] = square[i];
    }
    next.fetch_some(kRowsAtOnce * here * 4);
    for (int64_t i = 0; i < here; ++i) emit(k + i, staged[i]);
  }
}

// The two numbers of each 32-bit unit.
GPTCORE_INLINE void split(Vec pairs, Vec (&v)[2], bfloat16) {
  const UintVec u = bit_cast<UintVec>(pairs);
  v[0] = bit_cast<Vec>(u << 16), v[1] = bit_cast<Vec>(u & 0xffff0000u);
}
GPTCORE_INLINE void split(Vec pairs, Vec (&v)[2], float16) {
#if defined(__AVX512F__)
  const IntVec lane = lane_index(), first = lane * 4 % 32 + lane / 8;  // the even numbers, then the odd ones
  const __m512i order = (__m512i)(first | (first + 2) << 16), halves = _mm512_permutexvar_epi16(order, (__m512i)pairs);
  v[0] = (Vec)_mm512_cvtph_ps(_mm512_castsi512_si256(halves));
  v[1] = (Vec)_mm512_cvtph_ps(_mm512_extracti64x4_epi64(halves, 1));
#elif defined(__F16C__)
  const __m256i order = _mm256_setr_epi8(0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15,
                                         0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15);
  const __m256i halves = _mm256_permute4x64_epi64(_mm256_shuffle_epi8((__m256i)pairs, order), 0xd8);
  v[0] = (Vec)_mm256_cvtph_ps(_mm256_castsi256_si128(halves));
  v[1] = (Vec)_mm256_cvtph_ps(_mm256_extracti128_si256(halves, 1));
#else
  const UintVec u = bit_cast<UintVec>(pairs);
  const HalfBits even = __builtin_convertvector(u & 0xffffu, HalfBits), odd = __builtin_convertvector(u >> 16, HalfBits);
  v[0] = load((const float16*)&even), v[1] = load((const float16*)&odd);
#endif
}
GPTCORE_INLINE void split(Vec, Vec (&)[2], float) {}  // not called

// Packs rows of a source side by side, up to kWidth: depth runs along its columns.
template <class S, class T>
void pack_from_columns(Wide<T>* to, const S* source, int64_t stride, int64_t rows, int64_t columns, Prefetch& next) {
  if constexpr (sizeof(S) > sizeof(T)) {
    for (int64_t k = 0; k < columns; k += kStretch, source += kStretch, to += kStretch / kStep<T> * kWidth) {
      T narrow[kWidth * kStretch];
      const int64_t here = smaller(kStretch, columns - k);
      pack_rows(narrow, kStretch, source, stride, rows, here);
      pack_panel_columns<T, T, kWidth>(to, narrow, kStretch, rows, round_up(here, kStep<T>), 1.0f);
    }
  } else {
    constexpr int64_t kNumbers = 4 / sizeof(S);
    if (columns % kNumbers != 0 || stride % kNumbers != 0)
      return pack_panel_columns<S, T, kWidth>(to, source, stride, rows, columns, 1.0f);
    transpose_units<kVectors>((const float*)source, stride / kNumbers, rows, columns / kNumbers, next,
                              [&](int64_t k, const Vec (&v)[kVectors]) {
      for (int u = 0; u < kVectors; ++u) {
        if constexpr (kNumbers == kStep<T>) {
          store((float*)to + k * kWidth + u * kLanes, v[u]);
        } else {
          Vec both[2];
          split(v[u], both, S());
          for (int i = 0; i < 2; ++i) store((float*)to + (2 * k + i) * kWidth + u * kLanes, both[i]);
        }
      }
    });
  }
}

}  // namespace
}  // namespace GPTCORE_ISA
}  // namespace gptcore
