// Small Hopper kernels, and the classic mistakes in them, each of which the simulator must report. Also kernels of a
// single product and of a single bulk copy, which show the layouts of their operands.
#include <stdexcept>
#include <string>
#include <vector>

#include "csrc/launch.h"
#include "csrc/simt/hopper_examples.h"
#include "kernels/cuda/hopper.cuh"
#include "kernels/cuda/tile.cuh"

namespace gptcore {
namespace GPTCORE_GPU {
namespace {

constexpr int kRows = 64, kWidth = 64, kTileBytes = kRows * kWidth * 2, kTiles = 4;

enum class Mistake {
  none,
  // of pipeline()
  init_without_fence, init_without_barrier, tile_not_waited_for, consumer_parity, stage_not_waited_for,
  producer_parity, issued_by_all_lanes, too_few_bytes, too_many_bytes, released_before_wait, never_released,
  released_by_too_many, released_by_one_lane, registers_not_decreased, mbarrier_as_memory, accumulators_in_flight,
  no_commit, waits_for_too_few, no_register_fence, block_barrier_after_return,
  // of product()
  no_proxy_fence, proxy_fence_before_copies, proxy_fence_after_barrier, proxy_fence_by_one_thread, no_barrier,
  a_changed_in_flight, a_changed_after_fence, tile_overwritten_in_flight, descriptors_differ, never_waited_for,
  accumulators_overlap, warp_without_group,
  // of exchange()
  no_sync, two_generations, threads_differ, sync_after_exit, barrier_0, half_a_warp,
  // of store()
  store_without_fence, store_not_waited_for, waited_for_by_another, overwritten_before_read, not_committed,
  read_waited_for_result,
  // of column_sums()
  sums_without_init_fence, sums_without_wait, sums_of_half_the_bytes,
};

// ---- a producer thread copies tiles, a warpgroup multiplies them ----------------------------------------------------

struct PipelineShared {
  static constexpr int kBarriers = 2 * kTileBytes, kBytes = kBarriers + 4 * 8;
};

// out (128, 32) = the accumulators of sum over tiles of X X^T.
template <Mistake kMistake>
__global__ void pipeline(const __grid_constant__ TensorMap x, float* out) {
  constexpr auto is = [](Mistake mistake) { return kMistake == mistake; };
  char* const shared = shared_memory();
  uint64_t* const full = reinterpret_cast<uint64_t*>(shared + PipelineShared::kBarriers);
  uint64_t* const empty = full + 2;
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < 2; ++stage) {
      mbarrier_init(full + stage, 1);
      const int one_lane = is(Mistake::released_by_one_lane), too_many = is(Mistake::released_by_too_many);
      mbarrier_init(empty + stage, one_lane ? 4 : too_many ? 64 : 128);
    }
    if (!is(Mistake::init_without_fence)) fence_mbarrier_init();
    if (is(Mistake::mbarrier_as_memory)) full[0] = 1;
  }
  if (!is(Mistake::init_without_barrier)) barrier();

  if (threadIdx.x < 128) {
    if (!is(Mistake::registers_not_decreased)) decrease_registers<40>();
    if (threadIdx.x != 0 && !(is(Mistake::issued_by_all_lanes) && threadIdx.x < 32)) return;
    for (int tile = 0; tile < kTiles; ++tile) {
      const int stage = tile % 2, parity = tile / 2 % 2;
      if (!is(Mistake::stage_not_waited_for)) mbarrier_wait(empty + stage, parity ^ !is(Mistake::producer_parity));
      const int bytes = is(Mistake::too_few_bytes) ? kTileBytes / 2 : kTileBytes * (1 + is(Mistake::too_many_bytes));
      if (threadIdx.x == 0) mbarrier_arrive_expect(full + stage, bytes);
      bulk_load(shared + stage * kTileBytes, &x, full + stage, 0, tile * kRows, 0, 0);
    }
    return;
  }
  increase_registers<256>();
  if (is(Mistake::block_barrier_after_return)) barrier();
  float sum[32];
  for (int tile = 0; tile < kTiles; ++tile) {
    const int stage = tile % 2, parity = tile / 2 % 2;
    if (!is(Mistake::tile_not_waited_for)) mbarrier_wait(full + stage, parity ^ is(Mistake::consumer_parity));
    if (!is(Mistake::no_register_fence)) wgmma_fence();
    for (int k = 0; k < kWidth / 16; ++k) {
      const char* const begin = shared + stage * kTileBytes + k * 32;
      const MatrixDescriptor rows = matrix_descriptor(begin, 16, 1024, Swizzle::bytes128);
      wgmma<bfloat16, 64>(sum, rows, rows, tile + k > 0);
    }
    if (!is(Mistake::no_commit)) wgmma_commit();
    const bool releases = !is(Mistake::released_by_one_lane) || threadIdx.x % 32 == 0;
    if (is(Mistake::released_before_wait)) mbarrier_arrive(empty + stage);
    if (is(Mistake::accumulators_in_flight)) sum[5] *= 2;
    if (is(Mistake::waits_for_too_few)) wgmma_wait<1>();
    else wgmma_wait<0>();
    if (is(Mistake::released_by_one_lane) && tile < kTiles - 1)  // reads what one lane of each warp releases
      sum[0] += *reinterpret_cast<const uint16_t*>(shared + stage * kTileBytes + threadIdx.x * 2);
    if (!is(Mistake::released_before_wait) && !is(Mistake::never_released) && releases) mbarrier_arrive(empty + stage);
  }
  for (int i = 0; i < 32; ++i) out[(threadIdx.x - 128) * 32 + i] = sum[i];
}

// ---- a warpgroup copies a tile and multiplies it, with A from registers ---------------------------------------------

// out (128, 32) = the accumulators of A X, A = 2 in every element.
template <Mistake kMistake>
__global__ void product(const bfloat16* x, float* out) {
  constexpr auto is = [](Mistake mistake) { return kMistake == mistake; };
  const SharedTile<bfloat16, kWidth> tile{shared_memory()};
  load_tile<kRows, 128>(tile, x, kWidth, kRows, kWidth, true);
  copy_commit();
  if (is(Mistake::proxy_fence_before_copies)) fence_proxy_async();
  copy_wait<0>();
  const bool fences = !is(Mistake::no_proxy_fence) && !is(Mistake::proxy_fence_before_copies) &&
                      !is(Mistake::proxy_fence_after_barrier) &&
                      (!is(Mistake::proxy_fence_by_one_thread) || threadIdx.x == 0);
  if (fences) fence_proxy_async();
  if (!is(Mistake::no_barrier)) barrier();
  if (is(Mistake::proxy_fence_after_barrier)) fence_proxy_async();
  if (is(Mistake::warp_without_group) && threadIdx.x >= 96) return;

  float sum[36];
  uint32_t a[kRows / 16][4];
  for (int k = 0; k < kRows / 16; ++k)
    for (int i = 0; i < 4; ++i) a[k][i] = pack<bfloat16>(2, 2);
  wgmma_fence();
  if (is(Mistake::a_changed_after_fence)) a[1][2] = 0;
  for (int k = 0; k < kRows / 16; ++k) {
    const bool differs = is(Mistake::descriptors_differ) && threadIdx.x >= 64 && k == 2;
    float* const to = sum + (is(Mistake::accumulators_overlap) && k == 1 ? 4 : 0);
    const char* const begin = tile.data + (differs ? 1 : k) * 2048;
    wgmma<bfloat16, 64, true>(to, a[k], matrix_descriptor(begin, 16, 1024, Swizzle::bytes128), k > 0);
  }
  wgmma_commit();
  if (is(Mistake::a_changed_in_flight)) a[0][0] = 0;
  if (is(Mistake::tile_overwritten_in_flight)) *tile.pair(threadIdx.x / 2, 0) = {};
  if (is(Mistake::never_waited_for)) return;
  wgmma_wait<0>();
  for (int i = 0; i < 32; ++i) out[threadIdx.x * 32 + i] = sum[i];
}

// ---- two warpgroups take turns, by named barriers -------------------------------------------------------------------

// out[t] (of 128) = 10: the turns of thread t of both warpgroups.
template <Mistake kMistake>
__global__ void exchange(float* out) {
  constexpr auto is = [](Mistake mistake) { return kMistake == mistake; };
  constexpr int kTurns = 5;
  float* const shared = reinterpret_cast<float*>(shared_memory());
  const int group = threadIdx.x / 128, mine = threadIdx.x % 128;
  if (group == 0) shared[mine] = 0;
  if (group == 1) named_barrier_arrive(1, 256);  // it is the turn of group 0
  if (is(Mistake::sync_after_exit) && group == 1) return;
  for (int turn = 0; turn < kTurns; ++turn) {
    if (!is(Mistake::no_sync) || turn == 0) {
      if (is(Mistake::barrier_0)) named_barrier_sync(0, 256);
      else if (!is(Mistake::half_a_warp) || mine % 32 < 16) named_barrier_sync(1 + group, 256);
    }
    shared[mine] += 1;
    if (group == 1 && turn == kTurns - 1) break;
    named_barrier_arrive(2 - group, is(Mistake::threads_differ) && group == 1 ? 128 : 256);
    if (is(Mistake::two_generations)) named_barrier_arrive(2 - group, 256);
  }
  if (group == 1) out[mine] = shared[mine];
}

// ---- a tile is written and stored -----------------------------------------------------------------------------------

// Rows 0 to 63 of y (256, 64): 1.0 in every element; rows 64 to 127: 2.0.
template <Mistake kMistake>
__global__ void store(const __grid_constant__ TensorMap y, const bfloat16* result, float* out) {
  constexpr auto is = [](Mistake mistake) { return kMistake == mistake; };
  const SharedTile<bfloat16, kWidth> tile{shared_memory()};
  for (int i = 0; i < 2; ++i) {
    for (int chunk = threadIdx.x; chunk < kRows * 8; chunk += 128)
      for (int j = 0; j < 8; j += 2)
        *reinterpret_cast<uint32_t*>(tile.pair(chunk / 8, chunk % 8 * 8 + j)) = pack<bfloat16>(i + 1, i + 1);
    if (!is(Mistake::store_without_fence)) fence_proxy_async();
    barrier();
    const int waits = is(Mistake::waited_for_by_another) ? 32 : 0;
    if (threadIdx.x == 0) {
      bulk_store(&y, tile.data, 0, i * kRows, 0, 0);
      if (!is(Mistake::not_committed)) bulk_commit();
    }
    if (threadIdx.x == waits && !is(Mistake::overwritten_before_read) && !(is(Mistake::store_not_waited_for) && i == 1))
      bulk_wait_read<0>();
    barrier();
  }
  if (threadIdx.x == 0 && is(Mistake::overwritten_before_read)) bulk_wait<0>();
  if (threadIdx.x == 0 && is(Mistake::read_waited_for_result)) out[0] = to_float(result[0]);
  else if (threadIdx.x == 0) out[0] = 1;
}

// ---- the example of docs/simt.md ------------------------------------------------------------------------------------

// out (64 floats) = the sums of the columns of x, of which 32 threads add tiles that another copies, in two stages.
template <Mistake kMistake>
__global__ void column_sums(const __grid_constant__ TensorMap x, int tiles, float* out) {
  constexpr auto is = [](Mistake mistake) { return kMistake == mistake; };
  char* const shared = shared_memory();
  uint64_t* const full = reinterpret_cast<uint64_t*>(shared + 2 * kTileBytes);
  uint64_t* const empty = full + 2;
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < 2; ++stage) mbarrier_init(full + stage, 1), mbarrier_init(empty + stage, 32);
    if (!is(Mistake::sums_without_init_fence)) fence_mbarrier_init();
  }
  barrier();
  if (threadIdx.x == 32) {
    for (int tile = 0; tile < tiles; ++tile) {
      const int stage = tile % 2, parity = tile / 2 % 2;
      if (!is(Mistake::sums_without_wait)) mbarrier_wait(empty + stage, parity ^ 1);
      mbarrier_arrive_expect(full + stage, is(Mistake::sums_of_half_the_bytes) ? kTileBytes / 2 : kTileBytes);
      bulk_load(shared + stage * kTileBytes, &x, full + stage, 0, tile * kRows, 0, 0);
    }
  } else if (threadIdx.x < 32) {
    float sum[2] = {};
    for (int tile = 0; tile < tiles; ++tile) {
      const int stage = tile % 2, parity = tile / 2 % 2;
      mbarrier_wait(full + stage, parity);
      const SharedTile<bfloat16, kWidth> rows{shared + stage * kTileBytes};  // its swizzle is that of 128 bytes
      for (int row = 0; row < kRows; ++row) {
        float lo, hi;
        unpack<bfloat16>(*reinterpret_cast<const uint32_t*>(rows.pair(row, threadIdx.x * 2)), lo, hi);
        sum[0] += lo, sum[1] += hi;
      }
      mbarrier_arrive(empty + stage);
    }
    out[threadIdx.x * 2] = sum[0], out[threadIdx.x * 2 + 1] = sum[1];
  }
}

// ---- layouts --------------------------------------------------------------------------------------------------------

// One product of operands that lie anywhere in `image`. In `a` a thread has 4 words, read if `from_registers`.
struct ProductCase {
  const uint16_t* image;
  const uint32_t* a;
  float* out;  // (128, n / 2)
  int elements;
  MatrixDescriptor a_bits, b_bits;
  bool from_registers;
};
template <class T, int kN, bool kTransposeA, bool kTransposeB>
__global__ void one_product(ProductCase p) {
  uint16_t* const shared = reinterpret_cast<uint16_t*>(shared_memory());
  for (int i = threadIdx.x; i < p.elements; i += 128) shared[i] = p.image[i];
  fence_proxy_async();
  barrier();
  float d[kN / 2];
  uint32_t a[4];
  for (int i = 0; i < 4; ++i) a[i] = p.a[threadIdx.x * 4 + i];
  for (int i = 0; i < kN / 2; ++i) d[i] = 1;
  wgmma_fence();
  if (p.from_registers) wgmma<T, kN, kTransposeB>(d, a, p.b_bits, true);
  else wgmma<T, kN, kTransposeA, kTransposeB>(d, p.a_bits, p.b_bits, true);
  wgmma_commit();
  wgmma_wait<0>();
  for (int i = 0; i < kN / 2; ++i) p.out[threadIdx.x * (kN / 2) + i] = d[i];
}

struct At { int x, y, z, w; };
// Copies a box to shared memory, and shows it, or, of `to`, copies it on to there.
__global__ void one_copy(const __grid_constant__ TensorMap from, const __grid_constant__ TensorMap to, At at,
                         At at_to, int bytes, uint16_t* out, bool stores) {
  uint16_t* const shared = reinterpret_cast<uint16_t*>(shared_memory());
  uint64_t* const bar = reinterpret_cast<uint64_t*>(shared_memory() + bytes);
  if (threadIdx.x == 0) {
    mbarrier_init(bar, 1);
    fence_mbarrier_init();
    mbarrier_arrive_expect(bar, bytes);
    bulk_load(shared, &from, bar, at.x, at.y, at.z, at.w);
  }
  barrier();
  mbarrier_wait(bar, 0);
  if (!stores) {
    for (int i = threadIdx.x; i < bytes / 2; i += 128) out[i] = shared[i];
  } else if (threadIdx.x == 0) {
    bulk_store(&to, shared, at_to.x, at_to.y, at_to.z, at_to.w);
    bulk_commit();
    bulk_wait_read<0>();
  }
}

// ---- the table ------------------------------------------------------------------------------------------------------

using Run = void (*)(const HopperTensors&);

template <Mistake kMistake>
void run_pipeline(const HopperTensors& t) {
  launch({"pipeline", 1, 1, 1, 256, PipelineShared::kBytes, nullptr}, pipeline<kMistake>, t.x_map(), t.out);
}
template <Mistake kMistake>
void run_product(const HopperTensors& t) {
  const auto* const x = reinterpret_cast<const bfloat16*>(t.x);
  launch({"product", 1, 1, 1, 128, kTileBytes, nullptr}, product<kMistake>, x, t.out);
}
template <Mistake kMistake>
void run_exchange(const HopperTensors& t) {
  launch({"exchange", 1, 1, 1, 256, 512, nullptr}, exchange<kMistake>, t.out);
}
template <Mistake kMistake>
void run_store(const HopperTensors& t) {
  launch({"store", 1, 1, 1, 128, kTileBytes, nullptr}, store<kMistake>, t.y_map(),
         reinterpret_cast<const bfloat16*>(t.y), t.out);
}

template <Mistake kMistake>
void run_column_sums(const HopperTensors& t) {
  launch({"column_sums", 1, 1, 1, 64, PipelineShared::kBytes, nullptr}, column_sums<kMistake>, t.x_map(), kTiles,
         t.out);
}

struct Example { const char *name, *rules; Run run; };
#define ROW(kernel, name, rules) {#kernel ": " #name, rules, run_##kernel<Mistake::name>}
const Example kExamples[] = {
    ROW(pipeline, none, ""),
    ROW(pipeline, init_without_fence, "missing fence"),
    ROW(pipeline, init_without_barrier, "data race, mbarrier"),
    ROW(pipeline, tile_not_waited_for, "unfinished copy, uninitialised read"),
    ROW(pipeline, consumer_parity, "unfinished copy, uninitialised read, deadlock"),
    ROW(pipeline, stage_not_waited_for, "data race, unfinished copy, mbarrier"),
    ROW(pipeline, producer_parity, "deadlock"),
    ROW(pipeline, issued_by_all_lanes, "unfinished copy, mbarrier"),
    ROW(pipeline, too_few_bytes, "mbarrier, unfinished copy, deadlock"),
    ROW(pipeline, too_many_bytes, "deadlock"),
    ROW(pipeline, released_before_wait, "data race"),
    ROW(pipeline, never_released, "deadlock"),
    ROW(pipeline, released_by_too_many, "mbarrier, data race"),
    ROW(pipeline, released_by_one_lane, "data race, missing fence"),
    ROW(pipeline, registers_not_decreased, "deadlock"),
    ROW(pipeline, mbarrier_as_memory, "mbarrier"),
    ROW(pipeline, accumulators_in_flight, "unfinished product"),
    ROW(pipeline, no_commit, "unfinished product, data race"),
    ROW(pipeline, waits_for_too_few, "unfinished product, data race"),
    ROW(pipeline, no_register_fence, "missing fence"),
    ROW(pipeline, block_barrier_after_return, "divergent barrier, deadlock"),
    ROW(product, none, ""),
    ROW(product, no_proxy_fence, "missing fence"),
    ROW(product, proxy_fence_before_copies, "missing fence"),
    ROW(product, proxy_fence_after_barrier, "missing fence"),
    ROW(product, proxy_fence_by_one_thread, "missing fence"),
    ROW(product, no_barrier, "data race, uninitialised read, unfinished copy"),
    ROW(product, a_changed_in_flight, "unfinished product"),
    ROW(product, a_changed_after_fence, "missing fence"),
    ROW(product, tile_overwritten_in_flight, "data race, missing fence"),
    ROW(product, descriptors_differ, "divergent warpgroup"),
    ROW(product, never_waited_for, "unfinished product"),
    ROW(product, accumulators_overlap, "unfinished product"),
    ROW(product, warp_without_group, "deadlock"),
    ROW(exchange, none, ""),
    ROW(exchange, no_sync, "data race, named barrier, deadlock"),
    ROW(exchange, two_generations, "named barrier"),
    ROW(exchange, threads_differ, "named barrier"),
    ROW(exchange, sync_after_exit, "deadlock"),
    ROW(exchange, barrier_0, "named barrier"),
    ROW(exchange, half_a_warp, "divergent warp, data race, uninitialised read"),
    ROW(store, none, ""),
    ROW(store, store_without_fence, "missing fence"),
    ROW(store, store_not_waited_for, "unfinished copy"),
    ROW(store, waited_for_by_another, "data race"),
    ROW(store, overwritten_before_read, "data race"),
    ROW(store, not_committed, "data race, unfinished copy"),
    ROW(store, read_waited_for_result, "unfinished copy"),
    ROW(column_sums, none, ""),
    ROW(column_sums, sums_without_init_fence, "missing fence"),
    ROW(column_sums, sums_without_wait, "data race, unfinished copy, mbarrier"),
    ROW(column_sums, sums_of_half_the_bytes, "mbarrier, unfinished copy, deadlock"),
};

template <class T, int kN>
void launch_product(const ProductCase& p, bool a_transposed, bool b_transposed) {
  const auto kernel = a_transposed ? (b_transposed ? one_product<T, kN, true, true> : one_product<T, kN, true, false>)
                                   : b_transposed ? one_product<T, kN, false, true> : one_product<T, kN, false, false>;
  launch({"one_product", 1, 1, 1, 128, size_t(p.elements) * 2, nullptr}, kernel, p);
}

}  // namespace

std::vector<std::pair<std::string, std::string>> hopper_examples() {
  std::vector<std::pair<std::string, std::string>> all;
  for (const Example& example : kExamples) all.emplace_back(example.name, example.rules);
  return all;
}

void run_hopper_example(const std::string& name, const HopperTensors& tensors) {
  for (const Example& example : kExamples)
    if (name == example.name) return example.run(tensors);
  throw std::invalid_argument("there is no example '" + name + "'");
}

void run_product(const HopperProduct& p) {
  const ProductCase c{p.image, p.a, p.out, p.elements, {p.a_descriptor}, {p.b_descriptor}, p.from_registers};
  const auto of_type = [&](auto type) {
    using T = decltype(type);
    if (p.n == 32) return launch_product<T, 32>(c, p.a_transposed, p.b_transposed);
    if (p.n == 128) return launch_product<T, 128>(c, p.a_transposed, p.b_transposed);
    throw std::invalid_argument("n is " + std::to_string(p.n) + ", expected 32 or 128");
  };
  if (p.is_float16) of_type(float16());
  else of_type(bfloat16());
}

void run_copy(const TensorMapArgs& from, const TensorMapArgs* to, const std::array<int, 8>& at, uint16_t* out) {
  const int bytes = from.box[0] * from.box[1] * from.box[2] * from.box[3] * 2;
  const TensorMap map = *encode_tensor_map(from);
  launch({"one_copy", 1, 1, 1, 128, size_t(bytes) + 8, nullptr}, one_copy, map, to ? *encode_tensor_map(*to) : map,
         At{at[0], at[1], at[2], at[3]}, At{at[4], at[5], at[6], at[7]}, bytes, out, to != nullptr);
}

}  // namespace GPTCORE_GPU
}  // namespace gptcore
