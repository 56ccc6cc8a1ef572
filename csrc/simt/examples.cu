// Small kernels that each violate one rule, which the simulator must report, and correct twins, which it must accept.
// Also a kernel of a single warp-wide instruction, which shows the layouts of its operands.
//
// Two blocks of 64 threads run on x, 64 rows of 4 floats with a stride of 8, and out, 128 rows of 4 floats.
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "csrc/launch.h"
#include "kernels/cuda/ptx.cuh"
#include "kernels/kernels.h"

namespace gptcore {
namespace GPTCORE_GPU {
namespace {

constexpr unsigned kThreads = 64, kBlocks = 2, kSharedBytes = 4096;

struct Params {
  const float* x;
  float* out;
};

// One thread of an example.
struct Thread {
  const float* x = nullptr;  // this thread's row of x, the same for both blocks
  float* out = nullptr;      // this thread's row of out
  float* shared = nullptr;
  int id = 0, lane = 0;

  GPTCORE_DEVICE explicit Thread(Params p)
      : x(p.x + threadIdx.x * 8), out(p.out + (blockIdx.x * kThreads + threadIdx.x) * 4),
        shared(reinterpret_cast<float*>(shared_memory())), id(threadIdx.x), lane(id % 32) {}
};
GPTCORE_DEVICE int other_warp(int id) { return id ^ 32; }
GPTCORE_DEVICE int other_lane(int id) { return id ^ 1; }

#define EXAMPLE(name)   \
  template <bool Broken> \
  __global__ void name(Params p)

// ---- data race

EXAMPLE(no_barrier_before_read) {
  Thread t(p);
  t.shared[t.id] = t.x[0];
  t.shared[kThreads + t.id] = 0;
  if (!Broken) barrier();
  t.out[0] = t.shared[other_warp(t.id)];
}
EXAMPLE(no_barrier_before_overwrite) {
  Thread t(p);
  t.shared[t.id] = t.x[0];
  barrier();
  t.out[0] = t.shared[other_warp(t.id)];
  if (!Broken) barrier();
  t.shared[t.id] = 1;
}
EXAMPLE(warp_barrier_between_warps) {
  Thread t(p);
  t.shared[t.id] = t.x[0];
  if (Broken) warp_barrier();
  else barrier();
  t.out[0] = t.shared[other_warp(t.id)];
}
EXAMPLE(no_warp_barrier) {
  Thread t(p);
  t.shared[t.id] = t.x[0];
  if (!Broken) warp_barrier();
  t.out[0] = t.shared[other_lane(t.id)];
}
EXAMPLE(shuffle_as_barrier) {
  Thread t(p);
  t.shared[t.id] = t.x[0];
  t.out[1] = shuffle_xor(t.x[1], 1);
  if (!Broken) warp_barrier();
  t.out[0] = t.shared[other_lane(t.id)];
}
EXAMPLE(overwrite_within_warp) {
  Thread t(p);
  t.shared[t.id] = t.x[0];
  warp_barrier();
  t.out[0] = t.shared[other_lane(t.id)];
  if (!Broken) warp_barrier();
  t.shared[t.id] = 1;
}
EXAMPLE(two_threads_write_one_address) {
  Thread t(p);
  if (t.lane == 0 || (Broken && t.lane == 7)) t.shared[t.id / 32] = 1;
}
EXAMPLE(two_halves_of_a_word) {  // no race if each thread writes its half
  Thread t(p);
  reinterpret_cast<uint16_t*>(t.shared)[Broken ? t.id & ~1 : t.id] = 1;
}
EXAMPLE(load_matrix_without_barrier) {
  Thread t(p);
  for (int i = 0; i < 4; ++i) t.shared[t.id * 4 + i] = t.x[i];
  if (!Broken) warp_barrier();
  uint32_t r[4];
  load_matrix(r, t.shared + t.id * 4);
  t.out[0] = float_of(r[0]);
}
EXAMPLE(blocks_write_one_address) {
  Thread t(p);
  if (t.id == 0) *(Broken ? p.out : t.out) = 1;
}
EXAMPLE(block_reads_output_of_another) {
  Thread t(p);
  t.out[0] = 1;
  t.out[1] = p.out[((Broken ? 0 : blockIdx.x) * kThreads + t.id) * 4];
}
EXAMPLE(threads_exchange_through_global_memory) {
  Thread t(p);
  t.out[0] = t.x[0];
  if (!Broken) barrier();
  t.out[1] = (t.out + (other_warp(t.id) - t.id) * 4)[0];
}

// ---- uninitialised read

EXAMPLE(shared_never_written) {
  Thread t(p);
  if (!Broken || t.id < 63) t.shared[t.id] = t.x[0];
  barrier();
  t.out[0] = t.shared[63 - t.id];
}
EXAMPLE(output_never_written) {
  Thread t(p);
  if (!Broken) t.out[0] = 0;
  t.out[0] += t.x[0];
}

// ---- out of bounds, write to an input

EXAMPLE(after_the_end) {
  Thread t(p);
  t.out[0] = t.id + 1 < (Broken ? 65 : 64) ? t.x[8] : 0;
}
EXAMPLE(before_the_begin) {
  Thread t(p);
  t.out[0] = t.id > (Broken ? -1 : 0) ? t.x[-8] : 0;
}
EXAMPLE(between_the_rows_of_a_view) {
  Thread t(p);
  t.out[0] = t.x[Broken ? 4 : 3];
}
EXAMPLE(vector_beyond_a_row) {
  Thread t(p);
  store_vec(t.out, load_vec(t.x + (Broken ? 4 : 0)));
}
EXAMPLE(write_after_the_end) {
  Thread t(p);
  if (Broken || blockIdx.x == 0) t.out[kThreads * 4] = 1;
}
EXAMPLE(shared_beyond_the_launch) {
  Thread t(p);
  t.shared[kSharedBytes / sizeof(float) - (Broken ? 63 : 64) + t.id] = 1;
}
EXAMPLE(copy_from_outside) {
  Thread t(p);
  copy_async<16>(t.shared + t.id * 4, p.x + (t.id + 1) * 8, Broken || t.id < 63);
  copy_commit();
  copy_wait<0>();
  store_vec(t.out, load_vec(t.shared + t.id * 4));
}
EXAMPLE(input_written) {
  Thread t(p);
  if (t.id == 0 && blockIdx.x == 0) *(Broken ? const_cast<float*>(t.x) : t.out) = 1;
}

// ---- misaligned

EXAMPLE(vector_off_by_one_float) {
  Thread t(p);
  store_vec(t.out, load_vec(t.x + (Broken ? 1 : 0)));
}
EXAMPLE(pair_off_by_one_float) {
  Thread t(p);
  *reinterpret_cast<uint64_t*>(t.out + (Broken ? 1 : 2)) = 0;
}
EXAMPLE(matrix_row_off_by_one_float) {
  Thread t(p);
  for (int i = 0; i < 8; ++i) t.shared[t.id * 8 + i] = t.x[i % 4];
  barrier();
  uint32_t r[4];
  load_matrix_trans(r, t.shared + t.id * 8 + (Broken ? 1 : 4));
  t.out[0] = float_of(r[0]);
}

// ---- divergent barrier, divergent warp

EXAMPLE(barrier_in_two_branches) {
  Thread t(p);
  if (Broken) {
    if (t.id < 32) barrier();
    else barrier();
  }
}
EXAMPLE(barrier_after_return) {
  Thread t(p);
  if (Broken && t.id >= 32) return;
  barrier();
}
EXAMPLE(barrier_of_half_a_warp) {
  Thread t(p);
  if (!Broken || t.lane < 16) barrier();
  warp_barrier();
}
EXAMPLE(shuffle_of_half_a_warp) {
  Thread t(p);
  if (!Broken || t.lane < 16) t.out[0] = shuffle_xor(t.x[0], 1);
}
EXAMPLE(shuffle_in_two_branches) {
  Thread t(p);
  const bool other = Broken && t.lane >= 16;
  if (other) t.out[0] = shuffle_xor(t.x[0], 1);
  else t.out[0] = shuffle_xor(t.x[1], 1);
}
EXAMPLE(mma_while_others_wait) {
  Thread t(p);
  float d[4] = {};
  const uint32_t a[4] = {}, b[2] = {};
  if (!Broken || t.lane > 0) mma_16816<bfloat16>(d, a, b);
  warp_barrier();
  t.out[0] = d[0];
}

// ---- unfinished copy, and races of copies

GPTCORE_DEVICE void start_copy(Thread t, int stage) {
  copy_async<16>(t.shared + stage * kThreads * 4 + t.id * 4, t.x, true);
}
GPTCORE_DEVICE void use_copy(Thread t, int stage, int from) {
  store_vec(t.out, load_vec(t.shared + stage * kThreads * 4 + from * 4));
}
EXAMPLE(copy_without_wait) {
  Thread t(p);
  start_copy(t, 0);
  copy_commit();
  if (!Broken) copy_wait<0>();
  use_copy(t, 0, t.id);
}
EXAMPLE(copy_without_commit) {
  Thread t(p);
  start_copy(t, 0);
  if (!Broken) copy_commit();
  copy_wait<0>();
  use_copy(t, 0, t.id);
}
EXAMPLE(wait_for_too_few) {
  Thread t(p);
  start_copy(t, 0);
  copy_commit();
  start_copy(t, 1);
  copy_commit();
  if (Broken) copy_wait<1>();
  else copy_wait<0>();
  use_copy(t, 1, t.id);
}
EXAMPLE(copy_without_barrier) {
  Thread t(p);
  start_copy(t, 0);
  copy_commit();
  copy_wait<0>();
  if (!Broken) barrier();
  use_copy(t, 0, other_warp(t.id));
}
EXAMPLE(barrier_before_wait) {
  Thread t(p);
  start_copy(t, 0);
  copy_commit();
  if (Broken) barrier();
  copy_wait<0>();
  if (!Broken) barrier();
  use_copy(t, 0, other_lane(t.id));
}
EXAMPLE(stage_overwritten_in_use) {
  Thread t(p);
  start_copy(t, 0);
  copy_commit();
  copy_wait<0>();
  barrier();
  use_copy(t, 0, other_warp(t.id));
  if (!Broken) barrier();
  start_copy(t, 0);
  copy_commit();
}

struct Example {
  const char *name, *rule;
  void (*broken)(Params);
  void (*correct)(Params);
};
#define ROW(rule, name) {#name, rule, name<true>, name<false>}
const Example kExamples[] = {
    ROW("data race", no_barrier_before_read),
    ROW("data race", no_barrier_before_overwrite),
    ROW("data race", warp_barrier_between_warps),
    ROW("data race", no_warp_barrier),
    ROW("data race", shuffle_as_barrier),
    ROW("data race", overwrite_within_warp),
    ROW("data race", two_threads_write_one_address),
    ROW("data race", two_halves_of_a_word),
    ROW("data race", load_matrix_without_barrier),
    ROW("data race", blocks_write_one_address),
    ROW("data race", block_reads_output_of_another),
    ROW("data race", threads_exchange_through_global_memory),
    ROW("uninitialised read", shared_never_written),
    ROW("uninitialised read", output_never_written),
    ROW("out of bounds", after_the_end),
    ROW("out of bounds", before_the_begin),
    ROW("out of bounds", between_the_rows_of_a_view),
    ROW("out of bounds", vector_beyond_a_row),
    ROW("out of bounds", write_after_the_end),
    ROW("out of bounds", shared_beyond_the_launch),
    ROW("out of bounds", copy_from_outside),
    ROW("write to an input", input_written),
    ROW("misaligned", vector_off_by_one_float),
    ROW("misaligned", pair_off_by_one_float),
    ROW("misaligned", matrix_row_off_by_one_float),
    ROW("divergent barrier", barrier_in_two_branches),
    ROW("divergent barrier", barrier_after_return),
    ROW("divergent warp", barrier_of_half_a_warp),
    ROW("divergent warp", shuffle_of_half_a_warp),
    ROW("divergent warp", shuffle_in_two_branches),
    ROW("divergent warp", mma_while_others_wait),
    ROW("unfinished copy", copy_without_wait),
    ROW("unfinished copy", copy_without_commit),
    ROW("unfinished copy", wait_for_too_few),
    ROW("data race", copy_without_barrier),
    ROW("data race", barrier_before_wait),
    ROW("data race", stage_overwritten_in_use),
};

const Example& find(const std::string& name) {
  for (const Example& example : kExamples)
    if (name == example.name) return example;
  throw std::invalid_argument("there is no example '" + name + "'");
}

enum class FragmentOp { mma_bfloat16, mma_float16, mma_tf32, load_matrix, load_matrix_trans };
const char* const kFragmentOps[] = {"mma_bfloat16", "mma_float16", "mma_tf32", "load_matrix", "load_matrix_trans"};

// Each lane has ten words: for an mma a (4), b (2) and d (4); for a load_matrix the first four are row l % 8 of matrix
// l / 8.
__global__ void fragments(FragmentOp op, const uint32_t* in, uint32_t* out) {
  const uint32_t* mine = in + threadIdx.x * 10;
  const uint32_t a[4] = {mine[0], mine[1], mine[2], mine[3]}, b[2] = {mine[4], mine[5]};
  float d[4] = {float_of(mine[6]), float_of(mine[7]), float_of(mine[8]), float_of(mine[9])};
  uint32_t r[4];
  uint32_t* row = reinterpret_cast<uint32_t*>(shared_memory()) + threadIdx.x * 4;
  for (int i = 0; i < 4; ++i) row[i] = a[i];
  barrier();
  if (op == FragmentOp::mma_bfloat16) mma_16816<bfloat16>(d, a, b);
  else if (op == FragmentOp::mma_float16) mma_16816<float16>(d, a, b);
  else if (op == FragmentOp::mma_tf32) mma_1688_tf32(d, a, b);
  else if (op == FragmentOp::load_matrix) load_matrix(r, row);
  else load_matrix_trans(r, row);
  for (int i = 0; i < 4; ++i) out[threadIdx.x * 4 + i] = op <= FragmentOp::mma_tf32 ? bits_of(d[i]) : r[i];
}

}  // namespace

std::vector<std::string> examples() {
  std::vector<std::string> names;
  for (const Example& example : kExamples) names.push_back(example.name);
  return names;
}

std::string rule_of(const std::string& example) { return find(example).rule; }

void run_example(const std::string& name, bool broken, const float* x, float* out) {
  const Example& example = find(name);
  launch({example.name, kBlocks, 1, 1, kThreads, kSharedBytes, nullptr}, broken ? example.broken : example.correct,
         Params{x, out});
}

void run_fragments(const std::string& op, const uint32_t* in, uint32_t* out) {
  for (int i = 0; i < 5; ++i)
    if (op == kFragmentOps[i])
      return launch({"fragments", 1, 1, 1, 32, 512, nullptr}, fragments, static_cast<FragmentOp>(i), in, out);
  throw std::invalid_argument("there is no fragment operation '" + op + "'");
}

}  // namespace GPTCORE_GPU
}  // namespace gptcore
