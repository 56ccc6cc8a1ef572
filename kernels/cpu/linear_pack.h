// Packing of the operands of linear layers: into panels whose rows are steps of the sum.
#pragma once

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

// As transpose() of tiles.h, without vpermt2ps, which takes longer.
GPTCORE_INLINE void transpose_square(Vec (&v)[kLanes]) {
#if defined(__AVX512F__)
  __m512 t[16];
  _Pragma("GCC unroll 16") for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_ps((__m512)v[i], (__m512)v[i + 1]);
    t[i + 1] = _mm512_unpackhi_ps((__m512)v[i], (__m512)v[i + 1]);
  }
  _Pragma("GCC unroll 16") for (int i = 0; i < 16; i += 4)
    _Pragma("GCC unroll 16") for (int j = 0; j < 2; ++j) {
      const __m512d a = (__m512d)t[i + j], b = (__m512d)t[i + j + 2];
      v[i + 2 * j] = (Vec)_mm512_unpacklo_pd(a, b);
      v[i + 2 * j + 1] = (Vec)_mm512_unpackhi_pd(a, b);
    }
  _Pragma("GCC unroll 16") for (int i = 0; i < 4; ++i) {  // a lane of 128 bits of row i, i + 4, i + 8, i + 12
    const __m512 a = _mm512_shuffle_f32x4((__m512)v[i], (__m512)v[i + 4], 0x88);
    const __m512 b = _mm512_shuffle_f32x4((__m512)v[i], (__m512)v[i + 4], 0xdd);
    const __m512 c = _mm512_shuffle_f32x4((__m512)v[i + 8], (__m512)v[i + 12], 0x88);
    const __m512 d = _mm512_shuffle_f32x4((__m512)v[i + 8], (__m512)v[i + 12], 0xdd);
    v[i] = (Vec)_mm512_shuffle_f32x4(a, c, 0x88);
    v[i + 8] = (Vec)_mm512_shuffle_f32x4(a, c, 0xdd);
    v[i + 4] = (Vec)_mm512_shuffle_f32x4(b, d, 0x88);
    v[i + 12] = (Vec)_mm512_shuffle_f32x4(b, d, 0xdd);
  }
#else
  transpose(v);
#endif
}

// Transposes up to Width rows of 32-bit units in blocks of kLanes x kLanes and calls emit(column of the panel, unit,
// vector), units in order. `ahead` units further lies what is read next; it is prefetched.
template <int Width, class Emit>
GPTCORE_INLINE void transpose_units(const float* source, int64_t stride, int64_t rows, int64_t units, int64_t ahead,
                                    Emit emit) {
  for (int64_t i = 0; i < Width; i += kLanes)
    for (int64_t j = 0; j < units; j += kLanes) {
      Vec v[kLanes];
      const float* from = source + i * stride + j;
      if (rows - i >= kLanes && units - j >= kLanes) {
        for (int r = 0; r < kLanes; ++r) v[r] = load(from + r * stride);
        transpose_square(v);
        for (int r = 0; r < kLanes; ++r) __builtin_prefetch((const char*)(uintptr_t(from + r * stride) + ahead * 4));
        for (int c = 0; c < kLanes; ++c) emit(i, j + c, v[c]);
      } else {
        load_square(v, from, stride, rows - i, units - j);
        transpose_square(v);
        for (int c = 0; c < smaller(kLanes, units - j); ++c) emit(i, j + c, v[c]);
      }
    }
}

// The two numbers of each 32-bit unit.
GPTCORE_INLINE void split(UintVec pairs, Vec (&v)[2], bfloat16) {
  v[0] = bit_cast<Vec>(pairs << 16), v[1] = bit_cast<Vec>(pairs & 0xffff0000u);
}
GPTCORE_INLINE void split(UintVec pairs, Vec (&v)[2], float16) {
  const HalfBits halves[2] = {__builtin_convertvector(pairs & 0xffffu, HalfBits),
                              __builtin_convertvector(pairs >> 16, HalfBits)};
  v[0] = load((const float16*)&halves[0]), v[1] = load((const float16*)&halves[1]);
}
GPTCORE_INLINE void split(UintVec, Vec (&)[2], float) {}

// Packs rows of a source side by side, up to kWidth: depth runs along its columns. `ahead`: see transpose_units.
template <class S, class T>
void pack_from_columns(Wide<T>* to, const S* source, int64_t stride, int64_t rows, int64_t columns, int64_t ahead) {
  const float* units = (const float*)source;
  const bool pairs = columns % 2 == 0 && stride % 2 == 0;
  if constexpr (sizeof(S) > sizeof(T)) {
    for (int64_t k = 0; k < columns; k += kStretch, source += kStretch, to += kStretch / kStep<T> * kWidth) {
      T narrow[kWidth * kStretch];
      const int64_t here = smaller(kStretch, columns - k);
      pack_rows(narrow, kStretch, source, stride, rows, here);
      pack_panel_columns<T, T, kWidth>(to, narrow, kStretch, rows, round_up(here, kStep<T>), 1.0f);
    }
  } else if (kSame<S, float>) {
    transpose_units<kWidth>(units, stride, rows, columns, ahead,
                    [&](int64_t i, int64_t k, Vec v) { store((float*)to + k * kWidth + i, v); });
  } else if (!pairs) {
    pack_panel_columns<S, T, kWidth>(to, source, stride, rows, columns, 1.0f);
  } else if (kStep<T> == 2) {
    transpose_units<kWidth>(units, stride / 2, rows, columns / 2, ahead / 2,
                    [&](int64_t i, int64_t k, Vec v) { store((float*)to + k * kWidth + i, v); });
  } else {
    transpose_units<kWidth>(units, stride / 2, rows, columns / 2, ahead / 2, [&](int64_t i, int64_t k, Vec v) {
      Vec both[2];
      split(bit_cast<UintVec>(v), both, S());
      store((float*)to + 2 * k * kWidth + i, both[0]);
      store((float*)to + (2 * k + 1) * kWidth + i, both[1]);
    });
  }
}

}  // namespace
}  // namespace GPTCORE_ISA
}  // namespace gptcore
