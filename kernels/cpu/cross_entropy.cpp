// Cross entropy of rows of logits, each against one target, and its gradient in place of the logits.
//
// A row is read from memory once: the softmax is computed online (Milakov & Gimelshein 2018, arXiv:1805.02867), in
// chunks that fit the L1 cache, and the gradient finds the row in the L2 cache.
#include <math.h>

#include "kernels/cpu/rows.h"

namespace gptcore {
namespace GPTCORE_ISA {
namespace {

GPTCORE_INLINE float max_lanes(Vec v) {
  for (int half = kLanes / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) v[i] = v[i] > v[i + half] ? v[i] : v[i + half];
  return v[0];
}

template <class T>
GPTCORE_INLINE Vec load_logits(const T* p, int64_t n) { return n >= kLanes ? load(p) : load_partial(p, n, -kInfinity); }

// Returns the loss of a row, -log softmax(row)[target]. With `gradient`, the row becomes softmax(row) - onehot(target).
// As in PyTorch, a logit of -inf has a probability of 0, and the loss of a row with +inf or NaN, or all -inf, is NaN.
template <class T>
GPTCORE_INLINE double cross_entropy_row(T* row, int64_t n, int64_t target, bool gradient) {
  constexpr int64_t kChunk = 4096;  // summed in float32; sums of chunks are added in double
  const double target_logit = load_partial(row + target, 1)[0];
  float row_max = -kInfinity;
  double sum = 0;  // of exp(logit - row_max)
  for (int64_t begin = 0; begin < n; begin += kChunk) {
    const T* chunk = row + begin;
    const int64_t length = n - begin < kChunk ? n - begin : kChunk;
    Vec maxima[2] = {splat(-kInfinity), splat(-kInfinity)}, sums[2] = {};  // two independent chains
    for (int64_t i = 0; i < length; i += 2 * kLanes) {
      maxima[0] = max(maxima[0], load_logits(chunk + i, length - i));
      if (i + kLanes < length) maxima[1] = max(maxima[1], load_logits(chunk + i + kLanes, length - i - kLanes));
    }
    const float chunk_max = max_lanes(max(maxima[0], maxima[1]));
    if (chunk_max > row_max) {
      if (sum != 0) sum *= exp((double)row_max - chunk_max);
      row_max = chunk_max;
    }
    const float shift = row_max == -kInfinity ? 0.0f : row_max;  // -inf - -inf would be NaN
    for (int64_t i = 0; i < length; i += 2 * kLanes) {
      sums[0] += exp2((load_logits(chunk + i, length - i) - shift) * kLog2e);
      if (i + kLanes < length)
        sums[1] += exp2((load_logits(chunk + i + kLanes, length - i - kLanes) - shift) * kLog2e);
    }
    sum += sum_lanes(sums[0] + sums[1]);
  }
  if (gradient) {
    const float scale = 1 / sum;
    for (int64_t i = 0; i < n; i += kLanes)
      store_up_to(row + i, exp2((load_up_to(row + i, n - i) - row_max) * kLog2e) * scale, n - i);
    store_partial(row + target, splat(exp(target_logit - row_max) / sum - 1), 1);  // rounded to T once
  }
  return log(sum) - (target_logit - row_max);
}

}  // namespace

void cross_entropy(const CrossEntropyArgs& args) {
  const int threads = args.rows * args.vocab < 16384 ? 1 : args.num_threads;
  with_type(args.dtype, [&](auto zero) {
    using T = decltype(zero);
    parallel_for(args.rows, threads, [&](int64_t r) {
      T* row = (T*)args.logits + r * args.row_stride;
      args.losses[r] = cross_entropy_row(row, args.vocab, args.targets[r], args.gradient);
    });
  });
}

}  // namespace GPTCORE_ISA
}  // namespace gptcore
