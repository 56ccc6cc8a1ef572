// Cross entropy of rows of logits, each against one target, and its gradient in place of the logits.
//
// A row is read from memory once: the softmax is taken online (Milakov & Gimelshein 2018, arXiv:1805.02867), by
// stretches that fit the first cache, and for the gradient the row is still in the second.
#include <math.h>

#include "kernels/cpu/rows.h"

namespace gptcore {
namespace GPTCORE_ISA {
namespace {

GPTCORE_INLINE float max_lane(Vec v) {
  for (int half = kLanes / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) v[i] = v[i] > v[i + half] ? v[i] : v[i + half];
  return v[0];
}

template <class T>
GPTCORE_INLINE Vec load_logits(const T* p, int64_t n) { return n >= kLanes ? load(p) : load_partial(p, n, -kInfinity); }

// The loss of a row, -log softmax(row)[target]. The row becomes softmax(row) - onehot(target) if `gradient`.
//
// As in PyTorch, logits of -inf are impossible tokens, and +inf, NaN or nothing but -inf makes NaN of a row.
template <class T>
GPTCORE_INLINE double cross_entropy_row(T* row, int64_t n, int64_t target, bool gradient) {
  constexpr int64_t kStretch = 4096;  // summed in float32; stretches are added up in double
  const double target_logit = load_partial(row + target, 1)[0];
  float top = -kInfinity;  // the largest logit so far, and
  double sum = 0;          // the sum so far of exp(logit - top)
  for (int64_t begin = 0; begin < n; begin += kStretch) {
    const T* stretch = row + begin;
    const int64_t length = n - begin < kStretch ? n - begin : kStretch;
    Vec tops[2] = {splat(-kInfinity), splat(-kInfinity)}, sums[2] = {};  // two: one need not wait for the other
    for (int64_t i = 0; i < length; i += 2 * kLanes) {
      tops[0] = max(tops[0], load_logits(stretch + i, length - i));
      if (i + kLanes < length) tops[1] = max(tops[1], load_logits(stretch + i + kLanes, length - i - kLanes));
    }
    const float stretch_top = max_lane(max(tops[0], tops[1]));
    if (stretch_top > top) {
      if (sum != 0) sum *= exp((double)top - stretch_top);
      top = stretch_top;
    }
    const float shift = top == -kInfinity ? 0.0f : top;  // -inf - -inf would be NaN, where e^-inf = 0 is meant
    for (int64_t i = 0; i < length; i += 2 * kLanes) {
      sums[0] += exp2((load_logits(stretch + i, length - i) - shift) * kLog2e);
      if (i + kLanes < length)
        sums[1] += exp2((load_logits(stretch + i + kLanes, length - i - kLanes) - shift) * kLog2e);
    }
    sum += sum_lanes(sums[0] + sums[1]);
  }
  if (gradient) {
    const float scale = 1 / sum;
    for (int64_t i = 0; i < n; i += kLanes)
      store_up_to(row + i, exp2((load_up_to(row + i, n - i) - top) * kLog2e) * scale, n - i);
    store_partial(row + target, splat(exp(target_logit - top) / sum - 1), 1);  // rounded to T once
  }
  return log(sum) - (target_logit - top);
}

}  // namespace

void cross_entropy(const CrossEntropyArgs& args) {
  const int threads = args.rows * args.vocab < 16384 ? 1 : args.num_threads;
  with_type(args.dtype, [&](auto zero) {
    using T = decltype(zero);
    parallel_for(args.rows, threads, [&](int64_t r) {
      args.losses[r] = cross_entropy_row((T*)args.logits + r * args.row_stride, args.vocab, args.targets[r], args.gradient);
    });
  });
}

}  // namespace GPTCORE_ISA
}  // namespace gptcore
