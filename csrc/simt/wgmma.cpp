// Products of warpgroups (wgmma): operands of shared memory through matrix descriptors, fragments in registers that
// are in flight until they are waited for.
#include <algorithm>
#include <cstring>

#include "csrc/simt/model.h"

namespace gptcore::simt {
namespace {

constexpr int kDepth = 16;  // k of one product of 16-bit elements
constexpr uint64_t kUnusedBits = 0x3ff1'c000'c000'c000;  // of a descriptor

// A matrix in shared memory as wgmma reads it: "Strides" and "Matrix descriptor" of the PTX ISA.
struct Operand {
  uint32_t start, leading, stride, phase;  // bytes; phase: that of the pattern's begin
  Swizzle swizzle;
  bool transposed;  // M or N is contiguous, not K

  Operand(uint64_t descriptor, bool transposed)
      : start((descriptor & 0x3fff) << 4), leading((descriptor >> 16 & 0x3fff) << 4),
        stride((descriptor >> 32 & 0x3fff) << 4), phase(descriptor >> 49 & 7),
        swizzle(static_cast<Swizzle>(descriptor >> 62)), transposed(transposed) {}

  uint32_t chunks() const { return swizzle == Swizzle::none ? 1 : 16 >> static_cast<int>(swizzle); }  // of a row

  // Eight elements that lie together: elements 8 chunk to 8 chunk + 7 along K of row `row`, or of column `row` of K
  // along M or N.
  uint32_t address(uint32_t row, uint32_t chunk) const {
    const uint32_t in_repeat = row / 8 * stride + row % 8 * chunks() * 16;
    uint32_t at = start;
    if (swizzle != Swizzle::none) at += in_repeat + chunk / chunks() * leading + chunk % chunks() * 16;
    else if (transposed) at += row / 8 * leading + row % 8 * 16 + chunk * stride;
    else at += in_repeat + chunk * leading;
    return (at ^ ((at >> 7) - phase) % chunks() * 16) & 0x3ffff;
  }
  // Calls body(row, chunk, address) for a matrix that is `extent` long in M or N.
  template <class Body>
  void for_each(int extent, Body body) const {
    const int rows = transposed ? kDepth : extent, chunks = transposed ? extent / 8 : kDepth / 8;
    for (int row = 0; row < rows; ++row)
      for (int chunk = 0; chunk < chunks; ++chunk) body(row, chunk, address(row, chunk));
  }
};

#if defined(__x86_64__)
__attribute__((target_clones("avx2", "default")))
#endif
void multiply(float* d, const float (&a)[64][kDepth], const float* b, int n) {
  for (int i = 0; i < 64; ++i)
    for (int k = 0; k < kDepth; ++k)
      for (int j = 0; j < n; ++j) d[i * n + j] += a[i][k] * b[k * n + j];
}

}  // namespace

Warpgroup& Block::warpgroup_of(int w, uint32_t pc) {
  become_precise();
  if (w / 4 * 4 + 4 > warps_ || w / 4 >= static_cast<int>(async_.warpgroups.size()))
    fail("divergent warpgroup", pc, [] { return "its warp is not one of four, in the first 1024 threads"; });
  Warpgroup& group = async_.warpgroups[w / 4];
  if (!group.is_open) group.is_open = true, group.entry = clocks_.new_agent();
  return group;
}

// ---- registers ------------------------------------------------------------------------------------------------------

void Block::do_register_fence(Warp& warp, int w) {
  warpgroup_of(w, warp.pc);
  tracks_registers_ = true;
  if (async_.marked_threads < threads_) {
    async_.marks.reset(static_cast<uint32_t*>(std::calloc(threads_, Stacks::kBytes)));  // touched as far as used
    if (!async_.marks) throw std::bad_alloc();
    async_.marked_threads = threads_;
  }
  for (int l = 0; l < kLanes; ++l) async_.lanes[w * kLanes + l].register_fence = ++async_.register_fences;
}

// A thread accesses its stack. The arrays of fragments are there, since wgmma takes their addresses.
void Block::touch_registers(uintptr_t address, unsigned width, bool write, uint32_t pc) {
  const AsyncLane& lane = async_lane();
  for (const InFlight& registers : lane.in_flight) {
    if (address >= registers.end || address + width <= registers.begin) continue;
    const Warpgroup& group = async_.warpgroups[thread_ / kWarpgroup];
    const auto& groups = group.groups[thread_ / kLanes % 4];
    const bool committed = !groups.empty() && groups.back() > registers.product;
    fail("unfinished product", pc, [=, is_accumulator = registers.is_accumulator,
                                    product_pc = group.products[registers.product].pc] {
      return std::string(write ? "writes" : "reads") + (is_accumulator ? " accumulators" : " registers of A") +
             " of the product at " + source_line(product_pc) +
             (committed ? ", whose group has not been waited for" : ", which no wgmma_commit has put into a group");
    });
  }
  const uintptr_t first = reinterpret_cast<uintptr_t>(stacks_.begin(0));
  for (uintptr_t word = (address - first) / 4; word <= (address + width - 1 - first) / 4; ++word)
    async_.marks[word] = lane.register_fence;
}

void Block::check_registers(const void* registers, size_t bytes, bool is_accumulator, uint32_t index, uint32_t pc) {
  AsyncLane& lane = async_lane();
  const uintptr_t begin = reinterpret_cast<uintptr_t>(registers), end = begin + bytes;
  const char* name = is_accumulator ? "accumulators" : "registers of A";
  const Warpgroup& group = async_.warpgroups[thread_ / kWarpgroup];
  if (begin - reinterpret_cast<uintptr_t>(stacks_.begin(thread_)) >= Stacks::kBytes)
    fail("out of bounds", pc, [=] { return std::string(name) + " are not a local array"; });
  if (!lane.register_fence) fail("missing fence", pc, [] { return "no wgmma_fence before the first product"; });
  bool is_known = false;
  for (InFlight& other : lane.in_flight) {
    if (begin >= other.end || end <= other.begin) continue;
    const bool is_same = begin == other.begin && end == other.end;
    if (is_accumulator != other.is_accumulator || (is_accumulator && !is_same))
      fail("unfinished product", pc, [=, product_pc = group.products[other.product].pc] {
        return std::string(name) + " overlap registers of the product at " + source_line(product_pc) +
               ", which has not been waited for";
      });
    if (is_same) other.product = index, is_known = true;
  }
  if (!is_known) lane.in_flight.push_back({begin, end, index, is_accumulator});
  const uintptr_t first = reinterpret_cast<uintptr_t>(stacks_.begin(0));
  for (uintptr_t word = (begin - first) / 4; word < (end - first) / 4; ++word)
    if (async_.marks[word] == lane.register_fence)
      fail("missing fence", pc,
           [=] { return std::string(name) + " have been accessed since the last wgmma_fence of this thread"; });
}

// ---- issue ----------------------------------------------------------------------------------------------------------

void Block::do_wgmma(Warp& warp, int w) {
  Warpgroup& group = warpgroup_of(w, warp.pc);
  const int caller = thread_;
  const uint32_t index = group.issued[w % 4]++;
  if (index == group.products.size()) {
    group.products.emplace_back();
    group.products[index].product = async_.lanes[w * kLanes].fragments.product;
    group.products[index].pc = warp.pc;
    group.products[index].seen = clocks_.seen(w * kLanes);
  }
  IssuedProduct& issued = group.products[index];
  const Product& product = issued.product;
  for (int l = 0; l < kLanes; ++l) {
    thread_ = w * kLanes + l;
    const Fragments& mine = async_lane().fragments;
    if (!mine.product.same_as(product))
      fail("divergent warpgroup", warp.pc, [other = issued.pc] {
        return "its product differs from that of another thread of its warpgroup at " + source_line(other);
      });
    check_registers(mine.d, product.n / 2 * sizeof(float), true, index, warp.pc);
    if (!product.a_shared) check_registers(mine.a, 4 * sizeof(uint32_t), false, index, warp.pc);
    issued.d[w % 4 * kLanes + l] = mine.d, issued.a[w % 4 * kLanes + l] = mine.a;
    const Clock& seen = clocks_.seen(thread_);
    for (size_t i = 0; i < seen.size(); ++i) issued.seen[i] = std::min(issued.seen[i], seen[i]);
  }
  thread_ = caller;
  issued.warps |= 1u << w % 4;
  if (issued.warps != 15) return;
  issued.stamp = ++stamp_;
  check_operands(group, issued);
  count.wgmma_flops += 2 * 64 * product.n * kDepth;
  count.wgmma_shared_bytes += (product.n + (product.a_shared ? 64 : 0)) * kDepth * 2;
  const Order order = state_->options.order;
  if (order == Order::forward || (order == Order::random && random(2))) perform_until(group, index + 1);
  wake();
}

// The product may read its operands at any time from now until it is waited for.
void Block::check_operands(Warpgroup& group, IssuedProduct& issued) {
  const Product& product = issued.product;
  const Actor actor{static_cast<uint16_t>(kAgent + group.entry - threads_), issued.stamp, &issued.seen, "a product"};
  const auto check = [&](uint64_t descriptor, bool transposed, int extent) {
    if (descriptor & kUnusedBits)
      fail("matrix descriptor", issued.pc, [] { return "bits are set that have no meaning"; });
    Operand(descriptor, transposed).for_each(extent, [&](int, int, uint32_t address) {
      shared_access(reinterpret_cast<uintptr_t>(shared_) + address, 16, Kind::read, issued.pc);
    });
  };
  actor_ = &actor;
  if (product.a_shared) check(product.a, product.a_transposed, 64);
  check(product.b, product.b_transposed, product.n);
  actor_ = nullptr;
}

// ---- execution ------------------------------------------------------------------------------------------------------

// Fragments are laid out as those of mma: a lane of warp w holds rows 16 w + lane / 4 and that + 8.
void Block::perform(IssuedProduct& issued) {
  const Product& product = issued.product;
  const int n = product.n;
  const auto value = product.kind == Mma::bfloat16 ? bfloat16_value : float16_value;
  std::vector<float> b(kDepth * n), d(64 * n, 0.0f);
  float a[64][kDepth];
  const auto load = [&](uint64_t descriptor, bool transposed, int extent, auto store) {
    Operand(descriptor, transposed).for_each(extent, [&](int row, int chunk, uint32_t address) {
      uint16_t bits[8];
      std::memcpy(bits, shared_ + address, 16);
      for (int i = 0; i < 8; ++i)
        if (transposed) store(chunk * 8 + i, row, value(bits[i]));
        else store(row, chunk * 8 + i, value(bits[i]));
    });
  };
  load(product.b, product.b_transposed, n, [&](int column, int k, float x) { b[k * n + column] = x; });
  if (product.a_shared) load(product.a, product.a_transposed, 64, [&](int row, int k, float x) { a[row][k] = x; });
  const auto for_each_accumulator = [&](auto body) {
    for (int t = 0; t < kWarpgroup; ++t)
      for (int v = 0; v < n / 2; ++v) {
        const int row = t / kLanes * 16 + t % kLanes / 4 + v / 2 % 2 * 8, column = v / 4 * 8 + t % 4 * 2 + v % 2;
        body(issued.d[t][v], d[row * n + column]);
      }
  };
  for (int t = 0; t < kWarpgroup && !product.a_shared; ++t)
    for (int v = 0; v < 8; ++v)
      a[t / kLanes * 16 + t % kLanes / 4 + v / 2 % 2 * 8][t % 4 * 2 + v % 2 + v / 4 * 8] =
          value(static_cast<uint16_t>(issued.a[t][v / 2] >> 16 * (v % 2)));
  if (product.accumulate) for_each_accumulator([](float held, float& sum) { sum = held; });
  multiply(d.data(), a, b.data(), n);
  for_each_accumulator([](float& held, float sum) { held = sum; });
  issued.seen = {};
}

void Block::perform_until(Warpgroup& group, size_t end) {
  while (group.performed < end) perform(group.products[group.performed++]);
}

void Block::wgmma_wait(int groups, Site site, uint32_t pc) {
  synchronise(Op::wgmma_wait, groups, site, pc);
  const int w = thread_ / kLanes;
  Warpgroup& group = async_.warpgroups[w / 4];
  const uint32_t end = group.waited[w % 4];
  if (end == 0) return;
  wait_until({Wait::products, w / 4, end, pc});
  perform_until(group, end);
  clocks_.acquire(thread_, group.entry, group.products[end - 1].stamp + 1);
  auto& in_flight = async_lane().in_flight;
  const auto is_done = [=](const InFlight& registers) { return registers.product < end; };
  in_flight.erase(std::remove_if(in_flight.begin(), in_flight.end(), is_done), in_flight.end());
}

void Block::do_wgmma_wait(Warp& warp, int w) {
  Warpgroup& group = warpgroup_of(w, warp.pc);
  std::vector<uint32_t>& groups = group.groups[w % 4];
  const int done = static_cast<int>(groups.size()) - warp.argument;
  if (done <= 0) return;
  group.waited[w % 4] = groups[done - 1];
  groups.erase(groups.begin(), groups.begin() + done);
}

}  // namespace gptcore::simt
