// GELU (Hendrycks & Gimpel 2016, arXiv:1606.08415): x * Phi(x), with Phi the normal distribution function or the
// paper's approximation of it by tanh, which is what GPT-2 was trained with.
#include "kernels/cpu/rows.h"
#include "kernels/normal_tail.h"

namespace gptcore {
namespace GPTCORE_ISA {
namespace {

// gelu(x) = x * cdf and gelu'(x) = cdf + x_pdf, where x_pdf is x times the derivative of cdf.
struct Normal {
  Vec cdf, x_pdf;
};

// The accuracy for results of type T: full for float32; for 16 bits, with rounding errors of 2^-9 and 2^-12, reduced at
// about half the instructions.
template <class T> constexpr int kExpDegree = 6;
template <> constexpr int kExpDegree<bfloat16> = 3;
template <> constexpr int kExpDegree<float16> = 4;
template <class T>
GPTCORE_INLINE Vec exp2_for(Vec x) { return exp2<kExpDegree<T>>(x); }
template <class T>
GPTCORE_INLINE Vec reciprocal_for(Vec x) {
#if defined(__AVX512F__)
  if (sizeof(T) == 2) return (Vec)_mm512_rcp14_ps((__m512)x);  // relative error 2^-14
#endif
  return 1.0f / x;
}

// Beyond +-32 cdf is 0 or 1: inputs of the formulas are clamped, and infinities do not become NaN.
constexpr float kSaturated = 32.0f;
GPTCORE_INLINE Vec clamp_below(Vec x) { return max(splat(-kSaturated), x); }  // NaN stays NaN
GPTCORE_INLINE Vec clamp_gelu(Vec x) { return clamp_below(min(splat(kSaturated), x)); }

// (1 + tanh(u)) / 2 = 1 / (1 + exp(-2u)), which does not cancel for negative u, with u = sqrt(2/pi) (x + 0.044715 x^3).
template <class T>
GPTCORE_INLINE Normal tanh_form(Vec x) {
  constexpr float kSlope = 1.5957691216f, kCube = 0.044715f;  // 2 sqrt(2/pi)
  Vec square = x * x;
  Vec e = exp2_for<T>(x * (square * (-kSlope * kCube * kLog2e) - kSlope * kLog2e));
  Vec cdf = reciprocal_for<T>(1.0f + e);
  Vec upper = min(e * cdf, splat(1.0f));  // 1 - cdf without cancelling; inf * 0 = NaN becomes 1
  return {cdf, (upper * cdf * x) * (square * (3 * kSlope * kCube) + kSlope)};
}

// Phi(-a) = exp(-a^2 / 2) R(a) for a = |x|: kernels/normal_tail.h.
template <class T>
GPTCORE_INLINE Normal erf_form(Vec x) {
  Vec a = x < 0.0f ? -x : x;
  Vec gauss = exp2_for<T>((a * a) * (-0.5f * kLog2e));
  Vec v = a * reciprocal_for<T>(a + 3.0f);
  Vec r = splat(GPTCORE_TAIL_FIRST);
#define GPTCORE_NEXT(c) r = r * v + c;
  GPTCORE_TAIL(GPTCORE_NEXT)
#undef GPTCORE_NEXT
  Vec tail = gauss * r;
  return {x < 0.0f ? tail : 1.0f - tail, x * (gauss * 0.3989422804f)};  // 1 / sqrt(2 pi)
}

template <class T, bool kTanh>
GPTCORE_INLINE Normal normal(Vec x) { return kTanh ? tanh_form<T>(clamp_gelu(x)) : erf_form<T>(clamp_gelu(x)); }

// The work is divided into lines: rows if there is a bias, otherwise ranges of 4096 elements.
struct Lines {
  int64_t count, length, size;
  explicit Lines(const GeluArgs& args) : length(args.bias ? args.width : 4096), size(args.rows * args.width) {
    count = length ? (size + length - 1) / length : 0;
  }
  int64_t begin(int64_t line) const { return line * length; }
  int64_t end(int64_t line) const { return size < (line + 1) * length ? size : (line + 1) * length; }
  int threads(int num_threads) const { return size < 32768 ? 1 : num_threads; }
};

template <class T, bool kTanh>
void forward(const GeluArgs& args) {
  const Lines lines(args);
  parallel_for(lines.count, lines.threads(args.num_threads), [&](int64_t line) {
    int64_t begin = lines.begin(line), n = lines.end(line) - begin;
    const T* x = (const T*)args.x + begin;
    T* out = (T*)args.out + begin;
    for (int64_t i = 0; i < n; i += kLanes) {
      Vec v = load_up_to(x + i, n - i);
      if (args.bias) v += load_up_to(args.bias + i, n - i);
      store_up_to(out + i, clamp_below(v) * normal<T, kTanh>(v).cdf, n - i);
    }
  });
}

// n elements from `begin` on; with a bias, their gradients are also added to sum[0..n).
template <class T, bool kTanh>
GPTCORE_INLINE void backward_line(const GeluArgs& args, int64_t begin, int64_t n, const float* bias, float* sum) {
  const T *x = (const T*)args.x + begin, *grad_out = (const T*)args.grad_out + begin;
  T* grad_x = (T*)args.grad_x + begin;
  for (int64_t i = 0; i < n; i += kLanes) {
    const int64_t left = n - i;
    Vec v = load_up_to(x + i, left);
    if (bias) v += load_up_to(bias + i, left);
    Normal gelu = normal<T, kTanh>(v);
    Vec grad = load_up_to(grad_out + i, left) * (gelu.cdf + gelu.x_pdf);
    store_up_to(grad_x + i, grad, left);
    if (bias) store_up_to(sum + i, load_up_to(sum + i, left) + grad, left);
  }
}

// A chunk of rows and its part of grad_bias. Short blocks of rows are summed first, which reduces the rounding error.
template <class T, bool kTanh>
GPTCORE_INLINE void backward_chunk(const GeluArgs& args, int64_t row_begin, int64_t row_end, float* partial) {
  constexpr int64_t kColumns = 4096, kRows = 16;
  float block[kColumns];
  memset(partial, 0, args.width * sizeof(float));
  for (int64_t column = 0; column < args.width; column += kColumns) {
    const int64_t n = args.width - column < kColumns ? args.width - column : kColumns;
    for (int64_t row = row_begin; row < row_end;) {
      memset(block, 0, n * sizeof(float));
      for (int64_t end = row + kRows < row_end ? row + kRows : row_end; row < end; ++row)
        backward_line<T, kTanh>(args, row * args.width + column, n, args.bias + column, block);
      for (int64_t i = 0; i < n; ++i) partial[column + i] += block[i];
    }
  }
}

template <class T, bool kTanh>
void backward(const GeluArgs& args) {
  const Lines lines(args);
  const int threads = lines.threads(args.num_threads);
  if (!args.bias) {
    parallel_for(lines.count, threads, [&](int64_t line) {
      const int64_t begin = lines.begin(line), n = lines.end(line) - begin;
      backward_line<T, kTanh>(args, begin, n, nullptr, nullptr);
    });
    return;
  }
  const int64_t chunks = row_chunks(args.rows);
  parallel_for(chunks, threads, [&](int64_t chunk) {
    backward_chunk<T, kTanh>(args, args.rows * chunk / chunks, args.rows * (chunk + 1) / chunks,
                             args.workspace + chunk * args.width);
  });
  sum_chunks(args.workspace, chunks, args.width, args.width, args.grad_bias);
}

}  // namespace

void gelu_forward(const GeluArgs& args) {
  with_type(args.dtype, [&](auto zero) {
    using T = decltype(zero);
    args.tanh_form ? forward<T, true>(args) : forward<T, false>(args);
  });
}

size_t gelu_backward_workspace(const GeluArgs& args) {
  return args.bias ? row_chunks(args.rows) * args.width * sizeof(float) : 0;
}

void gelu_backward(const GeluArgs& args) {
  with_type(args.dtype, [&](auto zero) {
    using T = decltype(zero);
    args.tanh_form ? backward<T, true>(args) : backward<T, false>(args);
  });
}

}  // namespace GPTCORE_ISA
}  // namespace gptcore
