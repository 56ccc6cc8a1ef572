// Collective operations of a warp, and the functions by which a kernel calls them.
#include <cstring>

#include "csrc/simt/model.h"

namespace gptcore::simt {
namespace {

// d (16, 8) += a (16, depth) b (depth, 8): products exact, sums in float32, in the order of the depth.
#if defined(__x86_64__)
__attribute__((target_clones("avx2", "default")))
#endif
void multiply(float (&d)[16][8], const float (&a)[16][16], const float (&b)[16][8], int depth) {
  for (int i = 0; i < 16; ++i)
    for (int k = 0; k < depth; ++k)
      for (int j = 0; j < 8; ++j) d[i][j] += a[i][k] * b[k][j];
}

float as_float(uint32_t bits) { return __builtin_bit_cast(float, bits); }
uint32_t as_bits(float x) { return __builtin_bit_cast(uint32_t, x); }

}  // namespace

void Block::do_op(Warp& warp, int w) {
  switch (warp.op) {
    case Op::warp_barrier:
      ++count.warp_barriers;
      warp.stamp = ++stamp_;
      if (precise_) clocks_.barrier(w * kLanes, kLanes, stamp_);
      return;
    case Op::shuffle: return do_shuffle(w);
    case Op::load_matrix: return do_load_matrix(warp, w);
    case Op::elect: return do_elect(w);
    case Op::named_sync:
    case Op::named_arrive: return do_named(warp, w);
    case Op::register_fence: return do_register_fence(warp, w);
    case Op::wgmma: return do_wgmma(warp, w);
    case Op::wgmma_commit: {
      Warpgroup& group = warpgroup_of(w, warp.pc);
      return group.groups[w % 4].push_back(group.issued[w % 4]);
    }
    case Op::wgmma_wait: return do_wgmma_wait(warp, w);
    case Op::registers: return do_registers(warp, w);
    default: return do_mma(warp, w);
  }
}

void Block::do_shuffle(int w) {
  ++count.shuffles;
  Lane* lanes = &lanes_[w * kLanes];
  for (int l = 0; l < kLanes; ++l) lanes[l].out[0] = lanes[lanes[l].in[1] % kLanes].in[0];
}

void Block::do_load_matrix(Warp& warp, int w) {
  ++count.load_matrix;
  Lane* lanes = &lanes_[w * kLanes];
  const int caller = thread_;
  ++stamp_;
  for (int l = 0; precise_ && l < kLanes; ++l) clocks_.advance(w * kLanes + l, stamp_);  // one stamp for the warp
  for (int l = 0; l < kLanes; ++l) {  // reported as of the lane that gave the address
    thread_ = w * kLanes + l;
    matrix_row_access(reinterpret_cast<uintptr_t>(lanes[l].row), warp.pc);
  }
  thread_ = caller;
  for (int matrix = 0; matrix < 4; ++matrix) {
    uint16_t rows[8][8];
    for (int r = 0; r < 8; ++r) std::memcpy(rows[r], lanes[matrix * 8 + r].row, 16);
    for (int l = 0; l < kLanes; ++l) {
      const int row = l / 4, column = l % 4 * 2;
      const uint32_t low = warp.argument ? rows[column][row] : rows[row][column];
      const uint32_t high = warp.argument ? rows[column + 1][row] : rows[row][column + 1];
      lanes[l].out[matrix] = low | high << 16;
    }
  }
}

// The layouts of the PTX ISA: lane = 4 group + member; see tests/test_fragments.py.
void Block::do_mma(Warp& warp, int w) {
  ++count.mma;
  Lane* lanes = &lanes_[w * kLanes];
  const Mma kind = static_cast<Mma>(warp.argument);
  float a[16][16], b[16][8], d[16][8];
  for (int l = 0; l < kLanes; ++l) {
    const uint32_t* in = lanes[l].in;
    const int group = l / 4, member = l % 4;
    for (int i = 0; i < 4; ++i) {
      const int row = group + i % 2 * 8;
      d[group + i / 2 * 8][member * 2 + i % 2] = as_float(in[6 + i]);
      if (kind == Mma::tf32) {
        a[row][member + i / 2 * 4] = as_float(in[i] & ~0x1fffu);
        if (i < 2) b[member + i * 4][group] = as_float(in[4 + i] & ~0x1fffu);
        continue;
      }
      const auto value = kind == Mma::bfloat16 ? bfloat16_value : float16_value;
      for (int half = 0; half < 2; ++half) {
        a[row][member * 2 + half + i / 2 * 8] = value(static_cast<uint16_t>(in[i] >> 16 * half));
        if (i < 2) b[member * 2 + half + i * 8][group] = value(static_cast<uint16_t>(in[4 + i] >> 16 * half));
      }
    }
  }
  multiply(d, a, b, kind == Mma::tf32 ? 8 : 16);
  for (int l = 0; l < kLanes; ++l)
    for (int i = 0; i < 4; ++i) lanes[l].out[i] = as_bits(d[l / 4 + i / 2 * 8][l % 4 * 2 + i % 2]);
}

#define GPTCORE_PC module_offset(__builtin_return_address(0))

void barrier(Site site) { running->synchronise(Op::barrier, 0, site, GPTCORE_PC); }
void warp_barrier(Site site) { running->synchronise(Op::warp_barrier, 0, site, GPTCORE_PC); }

static uint32_t exchange(uint32_t value, int from, Site site, uint32_t pc) {
  Block& block = *running;
  Lane& lane = block.lane();
  lane.in[0] = value, lane.in[1] = static_cast<uint32_t>(from);
  block.synchronise(Op::shuffle, 0, site, pc);
  return lane.out[0];
}
uint32_t shuffle(uint32_t value, int lane, Site site) { return exchange(value, lane, site, GPTCORE_PC); }
uint32_t shuffle_xor(uint32_t value, int lane_mask, Site site) {
  const int lane = running->thread() % kLanes, from = lane ^ lane_mask;
  return exchange(value, from < kLanes ? from : lane, site, GPTCORE_PC);
}

Words4 load_matrix(const void* row, bool transposed, Site site) {
  Block& block = *running;
  Lane& lane = block.lane();
  lane.row = static_cast<const char*>(row);
  block.synchronise(Op::load_matrix, transposed, site, GPTCORE_PC);
  return {{lane.out[0], lane.out[1], lane.out[2], lane.out[3]}};
}

Float4 mma(Mma kind, Float4 d, uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1,
           Site site) {
  Block& block = *running;
  Lane& lane = block.lane();
  const uint32_t in[10] = {a0, a1, a2, a3, b0, b1, as_bits(d.x[0]), as_bits(d.x[1]), as_bits(d.x[2]), as_bits(d.x[3])};
  std::memcpy(lane.in, in, sizeof in);
  block.synchronise(Op::mma, static_cast<int>(kind), site, GPTCORE_PC);
  return {{as_float(lane.out[0]), as_float(lane.out[1]), as_float(lane.out[2]), as_float(lane.out[3])}};
}

char* shared_memory() { return running->shared(); }
void count_special() { ++running->count.special; }

void copy_async(void* shared, const void* global, int bytes, bool valid, Site) {
  running->copy_async(shared, global, bytes, valid, GPTCORE_PC);
}
void copy_commit() {
  Lane& lane = running->lane();
  lane.groups.push_back(lane.uncommitted);
  lane.uncommitted = 0;
}
void copy_wait(int groups) { running->copy_wait(groups); }

Words4 load_vec(const void* from) {
  running->access(reinterpret_cast<uintptr_t>(from), 16, false, GPTCORE_PC, true);
  Words4 value;
  std::memcpy(&value, from, 16);
  return value;
}
void store_vec(void* to, Words4 value) {
  running->access(reinterpret_cast<uintptr_t>(to), 16, true, GPTCORE_PC, true);
  std::memcpy(to, &value, 16);
}

unsigned thread_index() { return static_cast<unsigned>(running->thread()); }
unsigned block_index(int axis) { return running->index()[axis]; }
unsigned block_size() { return running->state().at.threads; }
unsigned grid_size(int axis) {
  const Launch& at = running->state().at;
  return axis == 0 ? at.grid_x : axis == 1 ? at.grid_y : at.grid_z;
}

}  // namespace gptcore::simt
