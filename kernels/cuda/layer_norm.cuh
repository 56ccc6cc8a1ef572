// Layer normalisation (Ba et al. 2016, arXiv:1607.06450), with the residual addition before it fused in.
//
// The kernels are bound by memory bandwidth. A row is read once, kept in registers while its statistics are computed,
// and written once. Weight and bias are read once per block, which loops over many rows; a thread has the same columns
// of each row. Rows too wide for registers use the *_wide kernels, which read them once per pass, mostly from the L2
// cache.
#pragma once

#include <type_traits>

#include "kernels/cuda/rows.cuh"

namespace gptcore {
namespace GPTCORE_GPU {

// The work of a block.
struct RowPlan {
  int warps;     // per row
  int groups;    // of `warps` warps in a block; a group processes one row at a time
  bool vectors;  // every row of every tensor is whole 16-byte vectors
};

// kForwardSharing and kBackwardSharing are the maximum number of warps per row if a block has several groups.
//
// Forward: 512 threads of 128 registers hold three chunks of x, weight and bias: 12288 columns per block, the width of
// GPT-3. Backward: 384 threads of 168 registers hold four chunks of x and dy in their storage type, weight and two
// sums.
constexpr int kForwardThreads = 512, kForwardWarps = kForwardThreads / 32, kForwardChunks = 3, kForwardSharing = 2;
constexpr int kBackwardThreads = 384, kBackwardWarps = kBackwardThreads / 32, kBackwardSharing = kBackwardWarps / 2;
template <class T>
constexpr int kBackwardChunks = sizeof(T) == 2 ? 4 : 3;

// The row and the columns of a thread.
struct RowThread {
  int threads, group, thread;  // threads per row, index of the group in the block, index of the thread in the row
  GPTCORE_DEVICE explicit RowThread(const RowPlan& plan)
      : threads(32 * plan.warps), group(threadIdx.x / threads), thread(threadIdx.x % threads) {}
  GPTCORE_DEVICE int column(int chunk) const { return (chunk * threads + thread) * kChunk; }
};

// Chunks of the threads of a row (at most kWarps warps) in shared memory, interleaved by 16 bytes per thread, which
// avoids bank conflicts.
template <int kWarps>
struct SharedChunks {
  static constexpr int kParts = Chunk<float>::kParts, kThreads = 32 * kWarps;
  static constexpr int floats(int chunks) { return chunks * kChunk * kThreads; }
  Vec16* base;

  GPTCORE_DEVICE SharedChunks(float* shared, int thread) : base(reinterpret_cast<Vec16*>(shared) + thread) {}
  GPTCORE_DEVICE void put(int index, const float (&v)[kChunk]) const {
    Chunk<float> chunk;
    chunk.set(v);
#pragma unroll
    for (int k = 0; k < kParts; ++k) store_vec(base + (index * kParts + k) * kThreads, chunk.parts[k]);
  }
  GPTCORE_DEVICE void get(int index, float (&v)[kChunk]) const {
    Chunk<float> chunk;
#pragma unroll
    for (int k = 0; k < kParts; ++k) chunk.parts[k] = load_vec(base + (index * kParts + k) * kThreads);
    chunk.get(v);
  }
  GPTCORE_DEVICE void add_to(float (&v)[kChunk], int index) const {
    float before[kChunk];
    get(index, before);
#pragma unroll
    for (int i = 0; i < kChunk; ++i) v[i] += before[i];
  }
};

// Copies parameters from the first group of the block to the others, through chunks from `index` on in shared memory.
template <int kWarps, int kChunks, class W>
GPTCORE_DEVICE void share(Chunk<W> (&parameters)[kChunks], SharedChunks<kWarps> shared, int index, int group) {
  float v[kChunk];
#pragma unroll
  for (int j = 0; j < kChunks; ++j) {
    parameters[j].get(v);
    if (group == 0) shared.put(index + j, v);
  }
  barrier();  // chunks written
#pragma unroll
  for (int j = 0; j < kChunks; ++j)
    if (group > 0) shared.get(index + j, v), parameters[j].set(v);
}

struct Statistics {
  float mean, rest, rstd;  // the exact mean is mean + rest; rest is the rounding error of mean
};

// Computes the statistics from the sums of x - mean and of (x - mean)^2, because E[x^2] - mean^2 suffers from
// cancellation. rstd is NaN if the sum of squares is not finite, so that an overflow does not give a row of zeros.
GPTCORE_DEVICE Statistics statistics(float mean, const float (&sums)[2], float width, float eps) {
  const float rest = sums[0] / width, variance = sums[1] / width - rest * rest;
  return {mean, rest, rsqrt_of((variance > 0.0f ? variance : 0.0f) + eps + (sums[1] - sums[1]))};
}

// X is the type of x, R that of residual and residual_out, W that of weight and bias, O that of out. Dynamic shared
// memory: kForwardSums floats, and if the block has several groups, kForwardShared floats for weight and bias.
constexpr int kForwardSums = 3 * kForwardWarps;
constexpr int kForwardShared = SharedChunks<kForwardSharing>::floats(2 * kForwardChunks);
template <class X, class R, class W, class O>
__global__ void __launch_bounds__(kForwardThreads) layer_norm_forward_kernel(LayerNormArgs args, RowPlan plan) {
  // The next row loads while this one is summed. Other types leave no registers; float16 is widened ahead of the loop
  constexpr bool kAhead = std::is_same_v<R, bfloat16> && std::is_same_v<W, bfloat16>;
  float* shared = reinterpret_cast<float*>(shared_memory());
  const RowThread lane(plan);
  const int width = args.width, first_warp = lane.group * plan.warps;
  const int parameters = lane.group == 0 ? width : 0;  // the first group loads weight and bias for all groups
  Chunk<W> weight[kForwardChunks], bias[kForwardChunks];
#pragma unroll
  for (int j = 0; j < kForwardChunks; ++j) {
    const int column = lane.column(j);
    weight[j].load(static_cast<const W*>(args.weight) + column, parameters - column, plan.vectors);
    bias[j].load(static_cast<const W*>(args.bias) + column, args.bias ? parameters - column : 0, plan.vectors);
  }

  // Groups beyond the last row load and store nothing, but take part in the barriers.
  const int64_t begin_rows = int64_t(blockIdx.x) * plan.groups, stride = int64_t(gridDim.x) * plan.groups;
  Chunk<X> x[kForwardChunks];
  Chunk<R> residual[kForwardChunks];
  const auto load = [&](int64_t row) {
    const int64_t begin = row * width;
    const int end = row < args.rows ? width : 0;
#pragma unroll
    for (int j = 0; j < kForwardChunks; ++j) {
      const int column = lane.column(j);
      x[j].load(static_cast<const X*>(args.x) + begin + column, end - column, plan.vectors);
      if (kAhead && args.residual)
        residual[j].load(static_cast<const R*>(args.residual) + begin + column, end - column, plan.vectors);
    }
  };
  if (kAhead) load(begin_rows + lane.group);
  for (int64_t first = begin_rows; first < args.rows; first += stride) {
    const int64_t row = first + lane.group, begin = row * width;
    const int end = row < args.rows ? width : 0;
    if (!kAhead) load(row);
    if (plan.groups > 1 && first == begin_rows) {  // overlaps the loads of the first rows
      const SharedChunks<kForwardSharing> chunks(shared + kForwardSums, lane.thread);
      share(weight, chunks, 0, lane.group);
      share(bias, chunks, kForwardChunks, lane.group);
    }
    Chunk<R> values[kForwardChunks];  // statistics of the rounded residual_out, because the backward reads it
    float v[kChunk], sum[1] = {};
#pragma unroll
    for (int j = 0; j < kForwardChunks; ++j) {
      x[j].get(v);
      if (args.residual) {
        float term[kChunk];
        if (!kAhead)
          residual[j].load(static_cast<const R*>(args.residual) + begin + lane.column(j), end - lane.column(j),
                           plan.vectors);
        residual[j].get(term);
#pragma unroll
        for (int i = 0; i < kChunk; ++i) v[i] += term[i];
      }
      values[j].set(v);
    }
    if (kAhead) load(row + stride);
    if (args.residual) {
#pragma unroll
      for (int j = 0; j < kForwardChunks; ++j)
        values[j].store(static_cast<R*>(args.residual_out) + begin + lane.column(j), end - lane.column(j),
                        plan.vectors);
    }

#pragma unroll
    for (int j = 0; j < kForwardChunks; ++j) {
      values[j].get(v);
#pragma unroll
      for (int i = 0; i < kChunk; ++i) sum[0] += v[i];
    }
    sum_over_row(sum, plan.warps, first_warp, shared);
    const float mean = sum[0] / width;
    float sums[2] = {};
#pragma unroll
    for (int j = 0; j < kForwardChunks; ++j) {
      values[j].get(v);
      fill_chunk(end - lane.column(j), mean, v);
#pragma unroll
      for (int i = 0; i < kChunk; ++i) {
        const float difference = v[i] - mean;
        sums[0] += difference;
        sums[1] += difference * difference;
      }
    }
    sum_over_row(sums, plan.warps, first_warp, shared + kForwardWarps);  // warps may still read the first sum
    const Statistics stats = statistics(mean, sums, width, args.eps);

    const float shift = stats.rest * stats.rstd;
#pragma unroll
    for (int j = 0; j < kForwardChunks; ++j) {
      float scale[kChunk], offset[kChunk];
      values[j].get(v), weight[j].get(scale), bias[j].get(offset);
#pragma unroll
      for (int i = 0; i < kChunk; ++i) v[i] = ((v[i] - mean) * stats.rstd - shift) * scale[i] + offset[i];
      store_chunk(static_cast<O*>(args.out) + begin + lane.column(j), end - lane.column(j), plan.vectors, v);
    }
    if (lane.thread == 0 && end > 0) args.mean[row] = mean + stats.rest, args.rstd[row] = stats.rstd;
  }
}

GPTCORE_DEVICE int left(int64_t n) { return n < kChunk ? int(n) : kChunk; }

// One block per row, which it reads in three passes.
template <class X, class R, class W, class O>
__global__ void __launch_bounds__(kForwardThreads) layer_norm_forward_wide(LayerNormArgs args, bool vectors) {
  float* shared = reinterpret_cast<float*>(shared_memory());
  const int64_t row = blockIdx.x, width = args.width, begin = row * width;
  constexpr int kStride = kForwardThreads * kChunk;
  const R* source = static_cast<const R*>(args.residual ? args.residual_out : args.x);
  float v[kChunk], sum[1] = {};
  for (int64_t c = threadIdx.x * kChunk; c < width; c += kStride) {
    load_chunk(static_cast<const X*>(args.x) + begin + c, left(width - c), vectors, v);
    if (args.residual) {
      float residual[kChunk];
      load_chunk(static_cast<const R*>(args.residual) + begin + c, left(width - c), vectors, residual);
#pragma unroll
      for (int i = 0; i < kChunk; ++i) v[i] += residual[i];
      Chunk<R> stored;
      stored.set(v);
      stored.get(v);
      stored.store(static_cast<R*>(args.residual_out) + begin + c, left(width - c), vectors);
    }
    float chunk = 0.0f;
#pragma unroll
    for (int i = 0; i < kChunk; ++i) chunk += v[i];
    sum[0] += chunk;
  }
  sum_over_row(sum, kForwardWarps, 0, shared);
  const float mean = sum[0] / width;
  float sums[2] = {};
  for (int64_t c = threadIdx.x * kChunk; c < width; c += kStride) {
    load_chunk(source + begin + c, left(width - c), vectors, v);
    float chunk[2] = {};
    fill_chunk(left(width - c), mean, v);
#pragma unroll
    for (int i = 0; i < kChunk; ++i) {
      const float difference = v[i] - mean;
      chunk[0] += difference;
      chunk[1] += difference * difference;
    }
    sums[0] += chunk[0], sums[1] += chunk[1];
  }
  sum_over_row(sums, kForwardWarps, 0, shared + kForwardWarps);
  const Statistics stats = statistics(mean, sums, width, args.eps);
  const float shift = stats.rest * stats.rstd;
  for (int64_t c = threadIdx.x * kChunk; c < width; c += kStride) {
    float weight[kChunk], bias[kChunk];
    load_chunk(source + begin + c, left(width - c), vectors, v);
    load_chunk(static_cast<const W*>(args.weight) + c, left(width - c), vectors, weight);
    load_chunk(static_cast<const W*>(args.bias) + c, args.bias ? left(width - c) : 0, vectors, bias);
#pragma unroll
    for (int i = 0; i < kChunk; ++i) v[i] = ((v[i] - mean) * stats.rstd - shift) * weight[i] + bias[i];
    store_chunk(static_cast<O*>(args.out) + begin + c, left(width - c), vectors, v);
  }
  if (threadIdx.x == 0) args.mean[row] = mean + stats.rest, args.rstd[row] = stats.rstd;
}

// ---- backward -------------------------------------------------------------------------------------------------------
//
// With xhat = (x - mean) * rstd and g = weight * dy:  dx = rstd * (g - mean(g) - xhat * mean(g * xhat)). A row adds
// dy * xhat to dweight and dy to dbias. `shift` is the mean of xhat, which is not 0 because args.mean is rounded; it is
// subtracted from xhat. T is the type of x and dx, G that of dy. g is rounded (mul_rn) before mean(g) is subtracted, so
// that the difference is 0 in a row of one element. The sums use weight * (dy * xhat) rather than g * xhat, so that the
// compiler does not keep g in registers.
struct RowMeans {
  float shift, g, g_xhat;
};
GPTCORE_DEVICE RowMeans row_means(const float (&sums)[3], float width) {
  const float shift = sums[0] / width, g = sums[1] / width;
  return {shift, g, sums[2] / width - shift * g};
}

// A row is read once. The sums over rows stay in registers until the end. Then the groups of the block add theirs in
// order, and the last group writes partial row blockIdx.x of args.workspace: (gridDim.x, 2, width). Dynamic shared
// memory: kBackwardSums floats, and if the block has several groups, kBackwardShared floats for weight, then for two
// sums.
constexpr int kBackwardSums = 6 * kBackwardWarps;
template <class T>
constexpr int kBackwardShared = SharedChunks<kBackwardSharing>::floats(2 * kBackwardChunks<T>);
template <class T, class W, class G>
__global__ void __launch_bounds__(kBackwardThreads) layer_norm_backward_kernel(LayerNormArgs args, RowPlan plan) {
  constexpr int kChunks = kBackwardChunks<T>;
  float* shared = reinterpret_cast<float*>(shared_memory());
  const RowThread lane(plan);
  const int width = args.width, first_warp = lane.group * plan.warps;
  const int parameters = lane.group == 0 ? width : 0;  // as in the forward
  Chunk<W> weights[kChunks];
  float weight_sum[kChunks][kChunk] = {}, bias_sum[kChunks][kChunk] = {};
#pragma unroll
  for (int j = 0; j < kChunks; ++j)
    weights[j].load(static_cast<const W*>(args.weight) + lane.column(j), parameters - lane.column(j), plan.vectors);

  const SharedChunks<kBackwardSharing> chunks(shared + kBackwardSums, lane.thread);
  int parity = 0;  // selects a buffer of the row sums: a warp may write the next sums while others read these
  const int64_t begin_rows = int64_t(blockIdx.x) * plan.groups;
  for (int64_t first = begin_rows; first < args.rows; first += gridDim.x * plan.groups, parity ^= 1) {
    const int64_t row = first + lane.group, begin = row * width;
    const int end = row < args.rows ? width : 0;
    float mean = 0.0f, rstd = 0.0f;
    if (threadIdx.x % 32 == 0 && end > 0) mean = args.mean[row], rstd = args.rstd[row];
    Chunk<T> x[kChunks];
    Chunk<G> dy[kChunks];
#pragma unroll
    for (int j = 0; j < kChunks; ++j) {
      x[j].load(static_cast<const T*>(args.x) + begin + lane.column(j), end - lane.column(j), plan.vectors);
      dy[j].load(static_cast<const G*>(args.grad_out) + begin + lane.column(j), end - lane.column(j), plan.vectors);
    }
    mean = shuffle(mean, 0), rstd = shuffle(rstd, 0);
    if (plan.groups > 1 && first == begin_rows) share(weights, chunks, 0, lane.group);
    float sums[3] = {};
#pragma unroll
    for (int j = 0; j < kChunks; ++j) {
      float x_row[kChunk], dy_row[kChunk], weight[kChunk];
      x[j].get(x_row), dy[j].get(dy_row), weights[j].get(weight);
      fill_chunk(end - lane.column(j), mean, x_row);
#pragma unroll
      for (int i = 0; i < kChunk; ++i) {
        const float xhat = (x_row[i] - mean) * rstd;
        sums[0] += xhat;
        sums[1] += weight[i] * dy_row[i];
        sums[2] += weight[i] * (dy_row[i] * xhat);
      }
    }
    sum_over_row(sums, plan.warps, first_warp, shared + parity * (kBackwardWarps * 3));
    const RowMeans means = row_means(sums, width);
#pragma unroll
    for (int j = 0; j < kChunks; ++j) {
      float x_row[kChunk], dy_row[kChunk], weight[kChunk], dx[kChunk];
      x[j].get(x_row), dy[j].get(dy_row), weights[j].get(weight);
      const int more = args.grad_residual_out ? end - lane.column(j) : 0;
      load_chunk(static_cast<const T*>(args.grad_residual_out) + begin + lane.column(j), more, plan.vectors, dx);
#pragma unroll
      for (int i = 0; i < kChunk; ++i) {  // past the end of the row dy is 0, and dx is not stored
        const float xhat = (x_row[i] - mean) * rstd - means.shift;
        dx[i] += (mul_rn(weight[i], dy_row[i]) - means.g - xhat * means.g_xhat) * rstd;
        weight_sum[j][i] += dy_row[i] * xhat;
        bias_sum[j][i] += dy_row[i];
      }
      store_chunk(static_cast<T*>(args.grad_x) + begin + lane.column(j), end - lane.column(j), plan.vectors, dx);
      if constexpr (sizeof(G) < sizeof(T)) {
        const int narrow = args.grad_narrow ? end - lane.column(j) : 0;
        store_chunk(static_cast<G*>(args.grad_narrow) + begin + lane.column(j), narrow, plan.vectors, dx);
      }
    }
  }

  float* partial = args.workspace + int64_t(blockIdx.x) * 2 * width;
  for (int group = 0; group < plan.groups; ++group) {
    if (plan.groups > 1) barrier();  // shared memory is unused (first group), or has the sums of the previous group
    if (group != lane.group) continue;
#pragma unroll
    for (int j = 0; j < kChunks; ++j) {
      if (group > 0) chunks.add_to(weight_sum[j], 2 * j), chunks.add_to(bias_sum[j], 2 * j + 1);
      if (group + 1 < plan.groups) {
        chunks.put(2 * j, weight_sum[j]), chunks.put(2 * j + 1, bias_sum[j]);
      } else {
        store_chunk(partial + lane.column(j), width - lane.column(j), plan.vectors, weight_sum[j]);
        store_chunk(partial + width + lane.column(j), width - lane.column(j), plan.vectors, bias_sum[j]);
      }
    }
  }
}

// A block processes every gridDim.x-th row, in two passes, and accumulates the sums over rows in its row of
// args.workspace.
template <class T, class W, class G>
__global__ void __launch_bounds__(kBackwardThreads) layer_norm_backward_wide(LayerNormArgs args, bool vectors) {
  float* shared = reinterpret_cast<float*>(shared_memory());
  const int64_t width = args.width;
  constexpr int kStride = kBackwardThreads * kChunk;
  float *weight_sum = args.workspace + int64_t(blockIdx.x) * 2 * width, *bias_sum = weight_sum + width;
  int parity = 0;  // as in the kernel above
  for (int64_t row = blockIdx.x; row < args.rows; row += gridDim.x, parity ^= 1) {
    const T* x_row = static_cast<const T*>(args.x) + row * width;
    const G* dy_row = static_cast<const G*>(args.grad_out) + row * width;
    const float mean = args.mean[row], rstd = args.rstd[row];
    float x[kChunk], dy[kChunk], weight[kChunk], sums[3] = {};
    for (int64_t c = threadIdx.x * kChunk; c < width; c += kStride) {
      load_chunk(x_row + c, left(width - c), vectors, x);
      load_chunk(dy_row + c, left(width - c), vectors, dy);
      load_chunk(static_cast<const W*>(args.weight) + c, left(width - c), vectors, weight);
      float chunk[3] = {};
      fill_chunk(left(width - c), mean, x);
#pragma unroll
      for (int i = 0; i < kChunk; ++i) {
        const float xhat = (x[i] - mean) * rstd;
        chunk[0] += xhat;
        chunk[1] += weight[i] * dy[i];
        chunk[2] += weight[i] * (dy[i] * xhat);
      }
#pragma unroll
      for (int i = 0; i < 3; ++i) sums[i] += chunk[i];
    }
    sum_over_row(sums, kBackwardWarps, 0, shared + parity * (kBackwardWarps * 3));
    const RowMeans means = row_means(sums, width);
    const bool first = row == blockIdx.x;
    for (int64_t c = threadIdx.x * kChunk; c < width; c += kStride) {
      float dx[kChunk], dweight[kChunk], dbias[kChunk];
      load_chunk(x_row + c, left(width - c), vectors, x);
      load_chunk(dy_row + c, left(width - c), vectors, dy);
      load_chunk(static_cast<const W*>(args.weight) + c, left(width - c), vectors, weight);
      const T* grad_residual = static_cast<const T*>(args.grad_residual_out) + row * width + c;
      load_chunk(grad_residual, args.grad_residual_out ? left(width - c) : 0, vectors, dx);
      load_chunk(weight_sum + c, first ? 0 : left(width - c), vectors, dweight);
      load_chunk(bias_sum + c, first ? 0 : left(width - c), vectors, dbias);
#pragma unroll
      for (int i = 0; i < kChunk; ++i) {
        const float xhat = (x[i] - mean) * rstd - means.shift;
        dx[i] += (mul_rn(weight[i], dy[i]) - means.g - xhat * means.g_xhat) * rstd;
        dweight[i] += dy[i] * xhat;
        dbias[i] += dy[i];
      }
      store_chunk(static_cast<T*>(args.grad_x) + row * width + c, left(width - c), vectors, dx);
      if constexpr (sizeof(G) < sizeof(T))
        store_chunk(static_cast<G*>(args.grad_narrow) + row * width + c, args.grad_narrow ? left(width - c) : 0,
                    vectors, dx);
      store_chunk(weight_sum + c, left(width - c), vectors, dweight);
      store_chunk(bias_sum + c, left(width - c), vectors, dbias);
    }
  }
}

}  // namespace GPTCORE_GPU
}  // namespace gptcore
