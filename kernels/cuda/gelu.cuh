// GELU (Hendrycks & Gimpel 2016, arXiv:1606.08415): x * Phi(x), with Phi the normal distribution function or the
// paper's approximation of it by tanh, which is what GPT-2 was trained with.
//
// Bound by memory bandwidth as long as an element takes at most some 30 instructions. The formulas are those of the CPU
// kernel, with exp2 as one instruction. A warp covers 256 columns of a row, and a thread the same eight columns of
// every row: it reads their bias once and accumulates their gradients in registers.
#pragma once

#include "kernels/cuda/rows.cuh"
#include "kernels/normal_tail.h"

namespace gptcore {
namespace GPTCORE_GPU {

constexpr int kGeluWarps = 8, kGeluColumns = 32 * kChunk;  // of a block
constexpr int kGeluStride = 36;  // of sums in shared memory: free of bank conflicts by lane and by column
constexpr int kGeluSharedBytes = kGeluWarps * kChunk * kGeluStride * sizeof(float);

// The work of each block. Without a bias the width is arbitrary, and the last row may be partial.
struct GeluPlan {
  int64_t rows, width, size;
  int64_t rows_per_block;
  unsigned column_blocks;
  bool vectors;  // every row of every tensor is whole 16-byte vectors
};

// gelu(x) = x * cdf and gelu'(x) = cdf + x_pdf, where x_pdf is x times the derivative of cdf.
struct Normal {
  float cdf, x_pdf;
};

constexpr float kLog2e = 1.4426950409f;

// Beyond +-32 cdf is 0 or 1: inputs of the formulas are clamped, and infinities do not become NaN.
constexpr float kSaturated = 32.0f;
GPTCORE_DEVICE float clamp_below(float x) { return x < -kSaturated ? -kSaturated : x; }  // NaN stays NaN
GPTCORE_DEVICE float clamp_gelu(float x) { return x > kSaturated ? kSaturated : clamp_below(x); }

// Accurate for float32, approximate for 16 bits.
template <class T>
GPTCORE_DEVICE float reciprocal_for(float x) { return sizeof(T) == 2 ? rcp_approx(x) : 1.0f / x; }

// (1 + tanh(u)) / 2 = 1 / (1 + exp(-2u)), which does not cancel for negative u, with u = sqrt(2/pi) (x + 0.044715 x^3).
template <class T>
GPTCORE_DEVICE Normal tanh_form(float x) {
  constexpr float kSlope = 1.5957691216f, kCube = 0.044715f;  // 2 sqrt(2/pi)
  const float square = x * x;
  const float e = exp2_approx(x * (square * (-kSlope * kCube * kLog2e) - kSlope * kLog2e));
  const float cdf = reciprocal_for<T>(1.0f + e);
  float upper = e * cdf;  // 1 - cdf without cancelling
  upper = upper < 1.0f ? upper : 1.0f;  // inf * 0 = NaN becomes 1
  return {cdf, (upper * cdf * x) * (square * (3 * kSlope * kCube) + kSlope)};
}

// Phi(-a) = exp(-a^2 / 2) R(a) for a = |x|: kernels/normal_tail.h.
template <class T>
GPTCORE_DEVICE Normal erf_form(float x) {
  const float a = x < 0.0f ? -x : x;
  const float gauss = exp2_approx((a * a) * (-0.5f * kLog2e));
  const float v = a * reciprocal_for<T>(a + 3.0f);
  float r = GPTCORE_TAIL_FIRST;
#define GPTCORE_NEXT(c) r = r * v + c;
  GPTCORE_TAIL(GPTCORE_NEXT)
#undef GPTCORE_NEXT
  const float tail = gauss * r;
  return {x < 0.0f ? tail : 1.0f - tail, x * (gauss * 0.3989422804f)};  // 1 / sqrt(2 pi)
}

template <class T, bool kTanh>
GPTCORE_DEVICE Normal normal(float x) {
  if constexpr (kTanh) return tanh_form<T>(clamp_gelu(x));
  else return erf_form<T>(clamp_gelu(x));
}

// The rows and columns of one thread.
struct GeluThread {
  int64_t slice, block_column, column, first, last;  // every kGeluWarps-th row from `first` on
  GPTCORE_DEVICE explicit GeluThread(const GeluPlan& plan) {
    const unsigned row_block = blockIdx.x / plan.column_blocks;
    slice = row_block;
    block_column = int64_t(blockIdx.x - row_block * plan.column_blocks) * kGeluColumns;
    column = block_column + threadIdx.x % 32 * kChunk;
    first = slice * plan.rows_per_block + threadIdx.x / 32;
    last = (slice + 1) * plan.rows_per_block;
    if (last > plan.rows) last = plan.rows;
  }
  static GPTCORE_DEVICE int clamp(int64_t n) { return n > kChunk ? kChunk : int(n); }
  // How many elements of the chunk are there in a row of the bias, and in a row of the tensor.
  GPTCORE_DEVICE int columns(const GeluPlan& plan) const { return clamp(plan.width - column); }
  GPTCORE_DEVICE int left(const GeluPlan& plan, int64_t row) const {
    if (row >= last) return 0;
    const int there = columns(plan), elements = clamp(plan.size - (row * plan.width + column));
    return there < elements ? there : elements;
  }
  GPTCORE_DEVICE void load_bias(const GeluArgs& args, const GeluPlan& plan, float (&bias)[kChunk]) const {
#pragma unroll
    for (int i = 0; i < kChunk; ++i) bias[i] = -0.0f;  // x + -0 is x, also for x = -0
    if (args.bias) load_chunk(args.bias + column, columns(plan), plan.vectors, bias);
  }
};

template <class T, bool kTanh>
__global__ void __launch_bounds__(32 * kGeluWarps) gelu_forward_kernel(GeluArgs args, GeluPlan plan) {
  constexpr int kRows = 4;  // in flight
  const GeluThread lane(plan);
  float bias[kChunk];
  lane.load_bias(args, plan, bias);
  for (int64_t row = lane.first; row < lane.last; row += kRows * kGeluWarps) {
    Chunk<T> x[kRows];
#pragma unroll
    for (int j = 0; j < kRows; ++j) {
      const int64_t r = row + j * kGeluWarps;
      x[j].load(static_cast<const T*>(args.x) + r * plan.width + lane.column, lane.left(plan, r), plan.vectors);
    }
#pragma unroll
    for (int j = 0; j < kRows; ++j) {
      const int64_t r = row + j * kGeluWarps;
      float v[kChunk];
      x[j].get(v);
#pragma unroll
      for (int i = 0; i < kChunk; ++i) {
        const float biased = v[i] + bias[i];
        v[i] = clamp_below(biased) * normal<T, kTanh>(biased).cdf;
      }
      store_chunk(static_cast<T*>(args.out) + r * plan.width + lane.column, lane.left(plan, r), plan.vectors, v);
    }
  }
}

// With a bias, slice s of the rows writes row s of args.workspace: (slices, width). Dynamic shared memory:
// kGeluSharedBytes then.
template <class T, bool kTanh>
__global__ void __launch_bounds__(32 * kGeluWarps) gelu_backward_kernel(GeluArgs args, GeluPlan plan) {
  constexpr int kRows = 2;
  const GeluThread lane(plan);
  float bias[kChunk], sum[kChunk] = {};
  lane.load_bias(args, plan, bias);
  for (int64_t row = lane.first; row < lane.last; row += kRows * kGeluWarps) {
    Chunk<T> x[kRows], grad_out[kRows];
#pragma unroll
    for (int j = 0; j < kRows; ++j) {
      const int64_t r = row + j * kGeluWarps, begin = r * plan.width + lane.column;
      x[j].load(static_cast<const T*>(args.x) + begin, lane.left(plan, r), plan.vectors);
      grad_out[j].load(static_cast<const T*>(args.grad_out) + begin, lane.left(plan, r), plan.vectors);
    }
#pragma unroll
    for (int j = 0; j < kRows; ++j) {
      const int64_t r = row + j * kGeluWarps, begin = r * plan.width + lane.column;
      float v[kChunk], grad[kChunk];
      x[j].get(v), grad_out[j].get(grad);
#pragma unroll
      for (int i = 0; i < kChunk; ++i) {  // missing elements have a gradient of 0
        const Normal gelu = normal<T, kTanh>(v[i] + bias[i]);
        grad[i] *= gelu.cdf + gelu.x_pdf;
        sum[i] += grad[i];
      }
      store_chunk(static_cast<T*>(args.grad_x) + begin, lane.left(plan, r), plan.vectors, grad);
    }
  }
  if (!args.grad_bias) return;

  float* shared = reinterpret_cast<float*>(shared_memory());
  const int warp = threadIdx.x / 32;
#pragma unroll
  for (int i = 0; i < kChunk; ++i) shared[(warp * kChunk + i) * kGeluStride + threadIdx.x % 32] = sum[i];
  barrier();  // sums of every warp written
  const int64_t column = lane.block_column + threadIdx.x;
  if (column >= plan.width) return;
  float total = 0.0f;
#pragma unroll
  for (int other = 0; other < kGeluWarps; ++other)
    total += shared[(other * kChunk + threadIdx.x % kChunk) * kGeluStride + threadIdx.x / kChunk];
  args.workspace[lane.slice * plan.width + column] = total;
}

}  // namespace GPTCORE_GPU
}  // namespace gptcore
