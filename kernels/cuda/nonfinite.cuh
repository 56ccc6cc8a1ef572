// NaN and infinities in attention: a row of Q, K, V or dO that is not finite reaches only the rows that attend to it.
//
// In a masked tile a warp multiplies every column for all of its rows, and 0 x NaN is NaN. An element of V that is not
// finite therefore makes its column of O non-finite in all rows of the warp. The loops of the kernels ignore this. After
// its results are stored, a warp with a column that is not finite sums those elements again, in float32 and row by row,
// over the columns that the row attends to. Other columns are not read.
#pragma once

#include "kernels/cuda/tile.cuh"

namespace gptcore {

GPTCORE_DEVICE bool is_finite(float x) { return x - x == 0.0f; }

// Returns 0, or NaN if a column of the warp's sums is not finite in all rows. Eight rows tell for all.
template <int kM, int kO>
GPTCORE_DEVICE float probe(const float (&acc)[kM][kO][4]) {
  float sum = 0.0f;
#pragma unroll
  for (int j = 0; j < kO; ++j) sum = fmaf(acc[0][j][0], 0.0f, fmaf(acc[0][j][1], 0.0f, sum));
  return sum;
}

// The dot product of two rows in global memory, summed in the order of multiply_transposed.
template <class Math>
GPTCORE_DEVICE float dot(const Storage<Math>* a, const Storage<Math>* b, int head_dim) {
  const auto operand = [](Storage<Math> x) {
    if constexpr (kTf32<Math>) return float_of(to_tf32(x));
    else return to_float(x);
  };
  float sum = 0.0f;
  for (int d = 0; d < head_dim; ++d) sum += operand(a[d]) * operand(b[d]);
  return sum;
}

// Whether dropout keeps the weight of a query and a key.
GPTCORE_DEVICE bool is_kept(const AttentionParams& p, int batch_head, int query, int key) {
  const Philox words(key / 4, query, batch_head, p.seed);
  uint32_t kept = 0;  // bits: words indexed by `key` would be an array in memory
#pragma unroll
  for (int i = 0; i < 4; ++i) kept |= uint32_t(words.w[i] >= p.dropout_threshold) << i;
  return kept >> key % 4 & 1;
}

// The columns of one row, in one head or several: rows of `values`, which the row sums.
struct RowColumns {
  Range range;
  int batch, first_head, heads;
  HeadsView values;
};

// A warp sums the elements of a stored row that are not finite again: factor x the sum of weight(head, column) x
// values. Weights are computed with one lane per column, sums with one lane per element.
template <class T, class Result, class Weight>
GPTCORE_DEVICE void sum_nonfinite(Result* result, const RowColumns& columns, int head_dim, float factor, int lane,
                                  Weight weight) {
#pragma unroll 1
  for (int first = 0; first < head_dim; first += 32) {
    const int d = first + lane;
    const bool lost = d < head_dim && !is_finite(to_float(result[d]));
    float sum = 0.0f;
#pragma unroll 1
    for (int head = columns.first_head; head < columns.first_head + columns.heads; ++head)
#pragma unroll 1
      for (int column = columns.range.begin; column < columns.range.end && any(lost && sum == sum); column += 32) {
        const int count = columns.range.end - column < 32 ? columns.range.end - column : 32;
        const float own = lane < count ? weight(head, column + lane) : 0.0f;
#pragma unroll 1
        for (int i = 0; i < count; ++i) {
          const float other = shuffle(own, i);
          if (lost) sum += other * to_float(rows_of<const T>(columns.values, columns.batch, head, column + i)[d]);
        }
      }
    if (lost) result[d] = from_float<Result>(sum * factor);
  }
}

}  // namespace gptcore
