// State of the asynchronous units of a block: mbarriers, named barriers, products of warpgroups (wgmma), bulk copies
// (TMA). Semantics are those of the PTX ISA; docs/simt.md lists what is reported.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstdlib>
#include <functional>
#include <memory>
#include <numeric>
#include <vector>

#include "csrc/simt/clocks.h"
#include "csrc/simt/device.h"

namespace gptcore::simt {

constexpr int kWarpgroup = 128;

// ---- what a thread may wait for -------------------------------------------------------------------------------------

struct Wait {
  enum Kind : uint8_t { nothing, mbarrier, named_barrier, products, registers } kind = nothing;
  int object = 0;      // index of the mbarrier, id of the named barrier, warpgroup
  uint32_t value = 0;  // parity, generation, index of the first product not waited for, registers wanted
  uint32_t pc = 0;
};

struct Mbarrier {
  uint32_t offset = 0;  // in shared memory
  int expected = 0, pending = 0;
  int64_t tx = 0;      // bytes expected and not yet copied; negative if copied before they are expected
  uint32_t phase = 0;  // number of completed phases
  int entry = 0;       // of its bulk copies, in clocks
  Reader init{};       // by whom and when
  uint32_t phase_stamp = 0;   // of the last completed phase
  uint32_t copies_stamp = 0;  // of the last bulk copy that signals it; 0: none
  uint32_t pc = 0;            // of the last arrival
  Clock arrived, completed;
};

struct NamedBarrier {
  int threads = 0, arrived = 0;  // of this generation
  uint32_t generation = 0, warps = 0, waiting = 0;  // bit masks of warps that arrived, and that wait
  uint32_t pc = 0;
  Clock clock;
};

// ---- products of a warpgroup ----------------------------------------------------------------------------------------

struct Product {
  Mma kind;
  int n;
  uint64_t a, b;  // matrix descriptors
  bool a_shared, a_transposed, b_transposed, accumulate;
  bool same_as(const Product& o) const {
    return kind == o.kind && n == o.n && a == o.a && b == o.b && a_shared == o.a_shared &&
           a_transposed == o.a_transposed && b_transposed == o.b_transposed && accumulate == o.accumulate;
  }
};
// A product as one thread issues it, with the registers of its fragments.
struct Fragments {
  Product product;
  float* d;
  const uint32_t* a;  // null if A is in shared memory
};
struct IssuedProduct {
  Product product{};
  uint32_t warps = 0;  // a bit for each that has issued it
  uint32_t stamp = 0, pc = 0;
  Clock seen;  // by all threads that issued it
  std::array<float*, kWarpgroup> d{};
  std::array<const uint32_t*, kWarpgroup> a{};
};
struct Warpgroup {
  int entry = 0;  // of its reads of shared memory, in clocks
  std::vector<IssuedProduct> products;
  size_t performed = 0;                        // so many are done
  std::array<uint32_t, 4> issued{};            // by warp
  std::array<std::vector<uint32_t>, 4> groups;  // by warp: the number issued at each commit that is not waited for
  std::array<uint32_t, 4> waited{};             // by warp: so many it waits, or has waited for
  bool is_open = false;

  uint32_t ready() const { return *std::min_element(issued.begin(), issued.end()); }  // issued by all warps
};
// Registers of a thread that a product reads or writes until it is waited for.
struct InFlight {
  uintptr_t begin, end;
  uint32_t product;  // index
  bool is_accumulator;
};

// ---- bulk copies ----------------------------------------------------------------------------------------------------

// A box of a tensor in global memory, of a tensor map.
struct Box {
  char* data;
  int rank;
  std::array<int64_t, 5> sizes;
  std::array<int64_t, 4> strides;  // in bytes
  std::array<int, 5> box;
  int swizzle;  // chunks of 16 bytes that it permutes; 1: none

  int row_bytes() const { return box[0] * 2; }
  int rows() const { return std::accumulate(&box[1], &box[rank], 1, std::multiplies<>()); }
};
struct Transfer {
  Box box;
  const void* map;  // where box is copied from
  std::array<int, 5> at;  // coordinates of the box
  uint32_t offset;        // in shared memory
  int mbarrier;           // that is signalled, or -1: a store
  int thread;
  uint32_t stamp, pc;
};

// What a thread has in flight.
struct AsyncLane {
  Wait wait;
  Fragments fragments{};
  std::vector<uint32_t> fences, init_fences;  // stamps of its fence.proxy.async, fence.mbarrier_init
  std::vector<InFlight> in_flight;
  uint32_t register_fence = 0;                // identifies its last wgmma.fence; 0: none
  int store_entry = -1, visible_entry = -1;   // of its bulk stores, in clocks: source read, destination written
  uint32_t store_stamp = 0, store_pc = 0;     // of the last bulk store
  std::vector<uint32_t> store_groups;         // store_stamp at each commit
  uint32_t stores_read = 0;                   // stores up to this stamp have read their source
};

struct AsyncBlock {
  std::vector<AsyncLane> lanes;
  std::vector<Mbarrier> mbarriers;
  std::array<NamedBarrier, 16> named{};
  std::array<Warpgroup, 8> warpgroups{};
  std::vector<Transfer> transfers;  // not performed yet
  std::unique_ptr<uint32_t[], decltype(&std::free)> marks{nullptr, &std::free};
  int marked_threads = 0;  // marks has a word for each word of these stacks: the register_fence after which it was used
  uint32_t register_fences = 0;
  std::array<int, 32> registers{};  // of a thread, by warp
  int free_registers = 0;
  int waiting = 0;                  // threads with a Wait
};

}  // namespace gptcore::simt
