// AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101, algorithm 2) and the norm of gradients, of many tensors at once.
//
// Memory is the limit: parameter, gradient and both moments are read once, and all but the gradient written once.
#include "kernels/cpu/rows.h"

namespace gptcore {
namespace GPTCORE_ISA {
namespace {

GPTCORE_INLINE Vec root(Vec x) {
#if defined(__AVX512F__)
  return (Vec)_mm512_sqrt_ps((__m512)x);
#elif defined(__AVX2__)
  return (Vec)_mm256_sqrt_ps((__m256)x);
#else
  for (int i = 0; i < kLanes; ++i) x[i] = __builtin_sqrtf(x[i]);
  return x;
#endif
}

GPTCORE_INLINE void update(const AdamWArgs& args, const ParameterPiece& piece) {
  for (int64_t i = 0; i < piece.size; i += kLanes) {
    const int64_t left = piece.size - i;
    Vec param = load_up_to(piece.param + i, left), grad = load_up_to(piece.grad + i, left) * args.grad_scale;
    Vec exp_avg = load_up_to(piece.exp_avg + i, left), exp_avg_sq = load_up_to(piece.exp_avg_sq + i, left);
    exp_avg += (grad - exp_avg) * args.beta1_rest;
    exp_avg_sq = exp_avg_sq * args.beta2 + (grad * grad) * args.beta2_rest;
    Vec step = exp_avg * piece.step_size / (root(exp_avg_sq) * piece.root_scale + args.eps);
    store_up_to(piece.param + i, param * args.decay - step, left);
    store_up_to(piece.exp_avg + i, exp_avg, left);
    store_up_to(piece.exp_avg_sq + i, exp_avg_sq, left);
  }
}

// In double, in which no square of a float32 overflows or vanishes.
GPTCORE_INLINE double sum_of_squares(const float* x, int64_t n) {
  typedef float Floats __attribute__((vector_size(kLanes * 2)));
  typedef double Doubles __attribute__((vector_size(kLanes * 4)));
  constexpr int kWidth = kLanes / 2, kSums = 4;  // four: one addition need not wait for the one before it
  Doubles sums[kSums] = {};
  int64_t i = 0;
  for (; i + kSums * kWidth <= n; i += kSums * kWidth)
    for (int j = 0; j < kSums; ++j) {
      Floats narrow;
      memcpy(&narrow, x + i + j * kWidth, sizeof narrow);
      Doubles wide = __builtin_convertvector(narrow, Doubles);
      sums[j] += wide * wide;
    }
  double sum = 0;
  for (; i < n; ++i) sum += (double)x[i] * x[i];
  for (int j = 0; j < kSums; ++j)
    for (int lane = 0; lane < kWidth; ++lane) sum += sums[j][lane];
  return sum;
}

}  // namespace

void adamw(const AdamWArgs& args) {
  parallel_for(args.num_pieces, args.num_threads, [&](int64_t i) { update(args, args.pieces[i]); });
}

void grad_norm(const GradNormArgs& args) {
  parallel_for(args.num_pieces, args.num_threads,
               [&](int64_t i) { args.sums[i] = sum_of_squares(args.pieces[i].grad, args.pieces[i].size); });
}

}  // namespace GPTCORE_ISA
}  // namespace gptcore
