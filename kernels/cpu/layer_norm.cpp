// Layer normalisation (Ba et al. 2016, arXiv:1607.06450), with the residual addition before it fused in.
//
// Bound by memory bandwidth: each row is read from memory once and stays in the cache for the later passes.
#include "kernels/cpu/rows.h"

namespace gptcore {
namespace GPTCORE_ISA {
namespace {

// Calls body(begin, length) for blocks of a row. Blocks are summed in float32 and added in double, which bounds the
// rounding error of long rows.
template <class Body>
GPTCORE_INLINE void for_blocks(int64_t n, Body body) {
  constexpr int64_t kBlock = 4096;
  for (int64_t i = 0; i < n; i += kBlock) body(i, n - i < kBlock ? n - i : kBlock);
}

// Calls visit(v, j) for each vector of a row; j < 4 is the accumulator to use: four independent chains hide the latency
// of additions. Lanes past the end read `fill`, which must add nothing.
template <class T, class Visit>
GPTCORE_INLINE void visit_row(const T* row, int64_t n, float fill, Visit visit) {
  int64_t i = 0;
  for (; i + 4 * kLanes <= n; i += 4 * kLanes)
    for (int j = 0; j < 4; ++j) visit(load(row + i + j * kLanes), j);
  for (; i + kLanes <= n; i += kLanes) visit(load(row + i), 0);
  if (i < n) visit(load_partial(row + i, n - i, fill), 1);
}
GPTCORE_INLINE float total(const Vec* sums) { return sum_lanes((sums[0] + sums[1]) + (sums[2] + sums[3])); }

template <class X, class R>
GPTCORE_INLINE void add_residual(const X* x, const R* residual, R* residual_out, int64_t n) {
  for (int64_t i = 0; i < n; i += kLanes)
    store_up_to(residual_out + i, load_up_to(x + i, n - i) + load_up_to(residual + i, n - i), n - i);
}

// Two passes, since E[x^2] - mean^2 cancels. The second also computes `rest`, the rounding error of the mean. rstd is
// NaN if the sum of squares overflows float32: the overflow does not become a row of zeros.
template <class T, class O>
GPTCORE_INLINE void normalize_row(const LayerNormArgs& args, const T* row, O* out, float* mean_out, float* rstd_out) {
  const int64_t n = args.width;
  double sum = 0, sum_rest = 0, sum_square = 0;
  for_blocks(n, [&](int64_t begin, int64_t length) {
    Vec sums[4] = {};
    visit_row(row + begin, length, 0.0f, [&](Vec v, int j) { sums[j] += v; });
    sum += total(sums);
  });
  const float mean = sum / n;
  for_blocks(n, [&](int64_t begin, int64_t length) {
    Vec rests[4] = {}, squares[4] = {};
    visit_row(row + begin, length, mean, [&](Vec v, int j) {
      Vec difference = v - mean;
      rests[j] += difference;
      squares[j] += difference * difference;
    });
    sum_rest += total(rests), sum_square += total(squares);
  });
  const float rest = sum_rest / n, variance = sum_square / n - rest * rest, square = sum_square;
  const float rstd = 1.0f / __builtin_sqrtf(variance + args.eps + (square - square)), shift = rest * rstd;
  const float *weight = (const float*)args.weight, *bias = (const float*)args.bias;
  for (int64_t i = 0; i < n; i += kLanes) {
    const Vec added = bias ? load_up_to(bias + i, n - i) : Vec{};  // one expression: fused alike whatever O is
    store_up_to(out + i, ((load_up_to(row + i, n - i) - mean) * rstd - shift) * load_up_to(weight + i, n - i) + added,
                n - i);
  }
  *mean_out = mean, *rstd_out = rstd;
}

GPTCORE_INLINE int threads_for(const LayerNormArgs& args) {
  return args.rows * args.width < 16384 ? 1 : args.num_threads;
}

// X is the type of x, R that of residual and residual_out, O that of out.
template <class X, class R, class O = R>
void forward(const LayerNormArgs& args) {
  parallel_for(args.rows, threads_for(args), [&](int64_t r) {
    const int64_t begin = r * args.width;
    const R* row = (const R*)args.x + begin;
    if (args.residual) {  // statistics of the stored, rounded sum, which the backward pass reads
      R* residual_out = (R*)args.residual_out + begin;
      add_residual((const X*)args.x + begin, (const R*)args.residual + begin, residual_out, args.width);
      row = residual_out;
    }
    normalize_row(args, row, (O*)args.out + begin, args.mean + r, args.rstd + r);
  });
}

// With xhat = (x - mean) * rstd and g = weight * grad_out:  grad_x = rstd * (g - mean(g) - xhat * mean(g * xhat)). The
// row adds grad_out * xhat to grad_weight and grad_out to grad_bias. `shift` is the mean of xhat, not 0 since args.mean
// is rounded, and is subtracted from xhat. T is the type of x and grad_x, G that of grad_out.
template <class T, class G>
GPTCORE_INLINE void backward_row(const LayerNormArgs& args, int64_t r, float* weight_partial, float* bias_partial) {
  const int64_t n = args.width, begin = r * n;
  const T* x = (const T*)args.x + begin;
  const G* grad_out = (const G*)args.grad_out + begin;
  const T* grad_residual = args.grad_residual_out ? (const T*)args.grad_residual_out + begin : nullptr;
  T* grad_x = (T*)args.grad_x + begin;
  G* grad_narrow = args.grad_narrow ? (G*)args.grad_narrow + begin : nullptr;
  const float mean = args.mean[r], rstd = args.rstd[r], *weight = (const float*)args.weight;

  double sum_xhat = 0, sum_g = 0, sum_g_xhat = 0;
  for_blocks(n, [&](int64_t begin, int64_t length) {
    Vec xhats = {}, gs = {}, g_xhats = {};
    for (int64_t i = begin; i < begin + length; i += kLanes) {
      const int64_t left = n - i;
      Vec xhat = ((left >= kLanes ? load(x + i) : load_partial(x + i, left, mean)) - mean) * rstd;
      Vec g = load_up_to(weight + i, left) * load_up_to(grad_out + i, left);
      xhats += xhat;
      gs += g;
      g_xhats += g * xhat;
    }
    sum_xhat += sum_lanes(xhats), sum_g += sum_lanes(gs), sum_g_xhat += sum_lanes(g_xhats);
  });
  const float shift = sum_xhat / n, mean_g = sum_g / n, mean_g_xhat = sum_g_xhat / n - shift * mean_g;

  for (int64_t i = 0; i < n; i += kLanes) {
    const int64_t left = n - i;
    Vec xhat = (load_up_to(x + i, left) - mean) * rstd - shift, dy = load_up_to(grad_out + i, left);
    Vec g = rounded(load_up_to(weight + i, left) * dy);  // not fused: mean_g is the mean of rounded g
    Vec dx = (g - mean_g - xhat * mean_g_xhat) * rstd;
    if (grad_residual) dx += load_up_to(grad_residual + i, left);
    store_up_to(grad_x + i, dx, left);
    if (grad_narrow) store_up_to(grad_narrow + i, dx, left);
    store_up_to(weight_partial + i, load_up_to(weight_partial + i, left) + dy * xhat, left);
    store_up_to(bias_partial + i, load_up_to(bias_partial + i, left) + dy, left);
  }
}

template <class T, class G = T>
void backward(const LayerNormArgs& args) {
  const int64_t n = args.width, chunks = row_chunks(args.rows);
  parallel_for(chunks, threads_for(args), [&](int64_t chunk) {
    float *weight_partial = args.workspace + chunk * 2 * n, *bias_partial = weight_partial + n;
    memset(weight_partial, 0, 2 * n * sizeof(float));
    for (int64_t r = args.rows * chunk / chunks; r < args.rows * (chunk + 1) / chunks; ++r)
      backward_row<T, G>(args, r, weight_partial, bias_partial);
  });
  sum_chunks(args.workspace, chunks, 2 * n, n, (float*)args.grad_weight);
  if (args.grad_bias) sum_chunks(args.workspace + n, chunks, 2 * n, n, (float*)args.grad_bias);
}

}  // namespace

void layer_norm_forward(const LayerNormArgs& args) {
  with_type(args.dtype, [&](auto zero) {
    using X = decltype(zero);
    if (args.out_dtype != args.residual_dtype) {  // 16 bits of a float32 residual stream
      if constexpr (sizeof(X) == 2) forward<X, float, X>(args);
      else args.out_dtype == DType::bfloat16 ? forward<X, X, bfloat16>(args) : forward<X, X, float16>(args);
    } else {
      args.residual && args.residual_dtype == DType::float32 ? forward<X, float>(args) : forward<X, X>(args);
    }
  });
}

size_t layer_norm_backward_workspace(const LayerNormArgs& args) {
  return row_chunks(args.rows) * 2 * args.width * sizeof(float);
}

void layer_norm_backward(const LayerNormArgs& args) {
  if (args.out_dtype == args.dtype) with_type(args.dtype, [&](auto zero) { backward<decltype(zero)>(args); });
  else args.out_dtype == DType::bfloat16 ? backward<float, bfloat16>(args) : backward<float, float16>(args);
}

}  // namespace GPTCORE_ISA
}  // namespace gptcore
