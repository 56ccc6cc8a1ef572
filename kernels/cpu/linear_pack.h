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

// The units of a row that are transposed: floats, pairs of bfloat16, or float16, which are converted when loaded.
template <class S> struct UnitOf { using Type = float; };
template <> struct UnitOf<float16> { using Type = float16; };

// Returns four units each of rows 0, 4, 8 and so on up to kLanes, side by side.
GPTCORE_INLINE Vec load_units(const float* p, int64_t stride) { return load_quads(p, stride * sizeof *p); }
GPTCORE_INLINE Vec load_units(const float16* p, int64_t stride) {
  float16 quads[kLanes];
  for (int i = 0; i < kLanes; i += 4) memcpy(quads + i, p + i * stride, 4 * sizeof *quads);
  return load(quads);
}

// Transposes up to Vectors * kLanes rows of units and calls emit(unit, vectors), units in order. Prefetches as much.
template <int Vectors, class Unit, class Emit>
GPTCORE_INLINE void transpose_units(const Unit* source, int64_t stride, int64_t rows, int64_t units, Prefetch& next,
                                    Emit emit) {
  constexpr int64_t kRowsAtOnce = Vectors * kLanes, kStaged = 128, kPitch = kStaged + 64 / sizeof(Unit);
  auto transpose = [&](const Unit* from, int64_t pitch, int64_t begin, int64_t end, int64_t bytes) {
    for (int64_t k = begin; k < end; k += 4, from += 4) {
      Vec v[Vectors][4];
      GPTCORE_UNROLL for (int u = 0; u < Vectors; ++u) {
        GPTCORE_UNROLL for (int i = 0; i < 4; ++i) v[u][i] = load_units(from + (u * kLanes + i) * pitch, pitch);
        transpose_quads(v[u]);
      }
      next.fetch(bytes);
      GPTCORE_UNROLL for (int i = 0; i < 4; ++i) {
        Vec of_unit[Vectors];
        GPTCORE_UNROLL for (int u = 0; u < Vectors; ++u) of_unit[u] = v[u][i];
        if (i == 0 || k + i < units) emit(k + i, of_unit);
      }
    }
  };
  // Rows at such strides share few sets of the first-level cache, and would evict one another.
  if (rows >= kRowsAtOnce && units % 4 == 0 && stride * (int64_t)sizeof(Unit) % 2048 != 0)
    return transpose(source, stride, 0, units, kRowsAtOnce * 4 * sizeof(Unit));
  Unit staged[kRowsAtOnce * kPitch];
  for (int64_t k = 0; k < units; k += kStaged) {
    const int64_t here = smaller(kStaged, units - k), all = round_up(here, 4);
    for (int64_t r = 0; r < kRowsAtOnce; ++r) {
      pack_rows(staged + r * kPitch, all, source + smaller(r, rows - 1) * stride + k, stride, 1, here);
      next.fetch(here * sizeof(Unit) / 2);
    }
    transpose(staged, kPitch, k, k + all, kRowsAtOnce * 2 * sizeof(Unit));
  }
}

// The two numbers of each 32-bit unit.
GPTCORE_INLINE void split(UintVec pairs, Vec (&v)[2], bfloat16) {
  v[0] = bit_cast<Vec>(pairs << 16), v[1] = bit_cast<Vec>(pairs & 0xffff0000u);
}
template <class S>
GPTCORE_INLINE void split(UintVec, Vec (&)[2], S) {}  // not called

// Packs rows of a source side by side, up to kWidth: depth runs along its columns.
template <class S, class T>
void pack_from_columns(Wide<T>* to, const S* source, int64_t stride, int64_t rows, int64_t columns, Prefetch& next) {
  auto store_unit = [&](int64_t k, const Vec (&v)[kVectors]) {
    for (int u = 0; u < kVectors; ++u) store((float*)to + k * kWidth + u * kLanes, v[u]);
  };
  if constexpr (sizeof(S) > sizeof(T)) {
    for (int64_t k = 0; k < columns; k += kStretch, source += kStretch, to += kStretch / kStep<T> * kWidth) {
      T narrow[kWidth * kStretch];
      const int64_t here = smaller(kStretch, columns - k);
      pack_rows(narrow, kStretch, source, stride, rows, here);
      pack_panel_columns<T, T, kWidth>(to, narrow, kStretch, rows, round_up(here, kStep<T>), 1.0f);
    }
  } else if constexpr (!kSame<S, bfloat16>) {
    transpose_units<kVectors>(source, stride, rows, columns, next, store_unit);
  } else if (columns % 2 != 0 || stride % 2 != 0) {
    pack_panel_columns<S, T, kWidth>(to, source, stride, rows, columns, 1.0f);
  } else if constexpr (kStep<T> == 2) {
    transpose_units<kVectors>((const float*)source, stride / 2, rows, columns / 2, next, store_unit);
  } else {
    transpose_units<kVectors>((const float*)source, stride / 2, rows, columns / 2, next,
                              [&](int64_t k, const Vec (&v)[kVectors]) {
      for (int u = 0; u < kVectors; ++u) {
        float* at = (float*)to + 2 * k * kWidth + u * kLanes;
        Vec both[2];
        split(bit_cast<UintVec>(v[u]), both, S());
        store(at, both[0]), store(at + kWidth, both[1]);
      }
    });
  }
}

}  // namespace
}  // namespace GPTCORE_ISA
}  // namespace gptcore
