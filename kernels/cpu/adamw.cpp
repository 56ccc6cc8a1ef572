// AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101, algorithm 2) and the norm of gradients, for many tensors at a
// time.
//
// Bound by memory bandwidth: parameter, gradient and both moments are read once, all but the gradient written once.
// 16-bit parameters have float32 master weights, since most updates are smaller than half a unit in the last place of
// 16 bits.
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

template <class T>
GPTCORE_INLINE Vec rounded_to(Vec x) {
  T buffer[kLanes];
  store(buffer, x);
  return load(buffer);
}

template <class T>
GPTCORE_INLINE void update(const AdamWArgs& args, const ParameterPiece& piece) {
  const T* grads = static_cast<const T*>(piece.grad);
  T* copies = static_cast<T*>(piece.copy);
  for (int64_t i = 0; i < piece.size; i += kLanes) {
    const int64_t left = piece.size - i;
    Vec param = load_up_to(piece.param + i, left), grad = load_up_to(grads + i, left) * args.grad_scale;
    if (sizeof(T) == 2) {  // the model's weights may have been replaced since the last step
      Vec copy = load_up_to(copies + i, left);
      param = copy == rounded_to<T>(param) ? param : copy;
    }
    Vec exp_avg = load_up_to(piece.exp_avg + i, left), exp_avg_sq = load_up_to(piece.exp_avg_sq + i, left);
    exp_avg += (grad - exp_avg) * args.one_minus_beta1;
    exp_avg_sq = exp_avg_sq * args.beta2 + (grad * grad) * args.one_minus_beta2;
    Vec step = exp_avg * piece.step_size / (root(exp_avg_sq) * piece.inv_sqrt_bias_correction2 + args.eps);
    param = param * args.decay - step;
    store_up_to(piece.param + i, param, left);
    if (sizeof(T) == 2) store_up_to(copies + i, param, left);
    store_up_to(piece.exp_avg + i, exp_avg, left);
    store_up_to(piece.exp_avg_sq + i, exp_avg_sq, left);
  }
}

// In double: the square of a float32 neither overflows nor underflows.
template <class T>
GPTCORE_INLINE double sum_of_squares(const T* x, int64_t n) {
  typedef float Floats __attribute__((vector_size(kLanes * 2)));
  typedef double Doubles __attribute__((vector_size(kLanes * 4)));
  constexpr int kWidth = kLanes / 2, kVecs = 2;  // four independent sums hide the latency of additions
  Doubles sums[kVecs][2] = {};
  for (int64_t i = 0; i < n; i += kVecs * kLanes)
    for (int j = 0; j < kVecs; ++j) {
      const int64_t begin = i + j * kLanes;
      if (begin >= n) break;
      Vec both = load_up_to(x + begin, n - begin);
      Floats halves[2];
      memcpy(halves, &both, sizeof both);
      for (int half = 0; half < 2; ++half) {
        Doubles wide = __builtin_convertvector(halves[half], Doubles);
        sums[j][half] += wide * wide;
      }
    }
  double sum = 0;
  for (const auto& pair : sums)
    for (const Doubles& part : pair)
      for (int lane = 0; lane < kWidth; ++lane) sum += part[lane];
  return sum;
}

}  // namespace

void adamw(const AdamWArgs& args) {
  parallel_for(args.num_pieces, args.num_threads, [&](int64_t i) {
    with_type(args.pieces[i].dtype, [&](auto zero) { update<decltype(zero)>(args, args.pieces[i]); });
  });
}

void grad_norm(const GradNormArgs& args) {
  parallel_for(args.num_pieces, args.num_threads, [&](int64_t i) {
    const ParameterPiece& piece = args.pieces[i];
    with_type(piece.dtype, [&](auto zero) {
      args.sums[i] = sum_of_squares(static_cast<const decltype(zero)*>(piece.grad), piece.size);
    });
  });
}

}  // namespace GPTCORE_ISA
}  // namespace gptcore
