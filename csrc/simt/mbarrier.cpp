// mbarriers, named barriers and register counts; what threads wait for, and the report if none can go on.
#include <algorithm>

#include "csrc/simt/model.h"

namespace gptcore::simt {
namespace {

constexpr int kRegisters = 65536;    // of a multiprocessor
constexpr int kMaxCount = (1 << 20) - 1;  // of an mbarrier: arrivals, and bytes

std::string of(int64_t count, int64_t all) { return std::to_string(count) + " of " + std::to_string(all); }

}  // namespace

// From now on clocks_ order the accesses of this block.
void Block::become_precise() {
  if (precise_) return;
  precise_ = true;
  clocks_.start(threads_, block_stamp_, [&](int w) { return std::max(warp_[w].stamp, block_stamp_); });
  readers_.clear();
  async_.lanes.assign(threads_, {});
  async_.mbarriers.clear(), async_.transfers.clear();
  async_.named.fill({}), async_.warpgroups.fill({});
  async_.waiting = 0;
  const int registers = std::min(kRegisters / threads_ / 8 * 8, 248);
  async_.registers.fill(registers), async_.free_registers = 0;  // warps exchange those of the launch
}

// ---- waiting --------------------------------------------------------------------------------------------------------

bool Block::satisfied(const Wait& wait) const {
  switch (wait.kind) {
    case Wait::mbarrier: return (async_.mbarriers[wait.object].phase & 1) != wait.value;
    case Wait::named_barrier: return async_.named[wait.object].generation != wait.value;
    case Wait::products: return async_.warpgroups[wait.object].ready() >= wait.value;
    case Wait::registers: return async_.free_registers >= static_cast<int>(wait.value);
    default: return true;
  }
}

void Block::wait_until(Wait wait) {
  while (!satisfied(wait)) {
    async_lane().wait = wait;
    ++async_.waiting;
    resume_next();
  }
}

// Lets the threads go on whose condition has come true.
void Block::wake() {
  if (!async_.waiting) return;
  for (int t = 0; t < threads_; ++t) {
    Wait& wait = async_.lanes[t].wait;
    if (wait.kind == Wait::nothing || !satisfied(wait)) continue;
    wait.kind = Wait::nothing;
    --async_.waiting;
    warp_[t / kLanes].ready |= 1u << position_of_[t % kLanes];
  }
}

bool Block::advance_async() {
  if (state_->options.order == Order::random && random(2))
    for (Warpgroup& group : async_.warpgroups)
      if (group.performed < group.ready()) return perform_until(group, group.performed + 1), true;
  std::vector<Transfer>& transfers = async_.transfers;
  if (transfers.empty()) return false;
  const size_t which = state_->options.order == Order::random ? random(static_cast<int>(transfers.size())) : 0;
  const Transfer transfer = transfers[which];
  transfers.erase(transfers.begin() + static_cast<std::ptrdiff_t>(which));
  perform(transfer);
  return true;
}

std::string Block::describe_mbarrier(const Mbarrier& barrier) const {
  return "the mbarrier at byte " + std::to_string(barrier.offset) + " of shared memory (phase " +
         std::to_string(barrier.phase) + ": " + of(barrier.expected - barrier.pending, barrier.expected) +
         " arrivals, " + std::to_string(barrier.tx) + " bytes outstanding)";
}

std::string Block::describe_wait(const Wait& wait) const {
  switch (wait.kind) {
    case Wait::mbarrier:
      return "waits for parity " + std::to_string(wait.value) + " of " +
             describe_mbarrier(async_.mbarriers[wait.object]);
    case Wait::named_barrier:
      return "waits at named barrier " + std::to_string(wait.object) + " (" +
             of(async_.named[wait.object].arrived, async_.named[wait.object].threads) + " threads)";
    case Wait::products: return "waits for products that not all warps of its warpgroup have issued";
    case Wait::registers: return "waits for " + std::to_string(wait.value) + " registers";
    default: return "waits at " + std::string(name_of(warp_[thread_ / kLanes].op));
  }
}

void Block::report_deadlock() {
  std::string text;
  int first = -1, listed = 0;
  uint32_t first_pc = 0, last_pc = 0;
  for (int t = 0; t < threads_; ++t) {
    const Warp& warp = warp_[t / kLanes];
    const Wait& wait = async_.lanes[t].wait;
    const bool in_warp = warp.waiting >> position_of_[t % kLanes] & 1;
    if (wait.kind == Wait::nothing && !in_warp) continue;
    const uint32_t pc = wait.kind == Wait::nothing ? warp.pc : wait.pc;
    thread_ = t;  // for describe_wait
    if (first < 0) first = t, first_pc = pc;
    else if (pc == last_pc) continue;  // one line for each place
    else if (++listed > 6) break;
    last_pc = pc;
    text += (first == t ? "" : "; thread " + std::to_string(t) + " ") + describe_wait(wait) +
            (first == t ? "" : " at " + source_line(pc));
  }
  fail("deadlock", first_pc, [=] { return text + "; no thread can go on"; }, first);
}

// Runs when all threads have returned.
void Block::end_async() {
  if (!precise_) return;
  while (advance_async()) {}
  for (const Mbarrier& barrier : async_.mbarriers) {
    if (barrier.tx == 0 && barrier.pending == barrier.expected) continue;
    fail("mbarrier", barrier.pc, [text = describe_mbarrier(barrier)] { return text + " ends in an unfinished phase"; });
  }
  for (size_t i = 0; i < async_.mbarriers.size(); ++i) {
    const Mbarrier& barrier = async_.mbarriers[i];
    if (barrier.copies_stamp == 0) continue;
    const auto waited = [&](int t) { return clocks_.seen(t)[barrier.entry] > barrier.copies_stamp; };
    bool any = false;
    for (int t = 0; t < threads_; ++t) any |= waited(t);
    if (!any)
      fail("unfinished copy", barrier.pc, [text = describe_mbarrier(barrier)] {
        return "the block ends, and no thread has waited for the last bulk copy on " + text;
      });
  }
  for (int t = 0; t < threads_; ++t)
    for (const InFlight& registers : async_.lanes[t].in_flight)
      fail("unfinished product", async_.warpgroups[t / kWarpgroup].products[registers.product].pc,
           [] { return "the thread returns before the product is waited for"; }, t);
  for (int t = 0; t < threads_; ++t)
    if (async_.lanes[t].stores_read < async_.lanes[t].store_stamp)
      fail("unfinished copy", async_.lanes[t].store_pc, [] {
        return "the thread returns before its bulk store has read shared memory: no bulk_wait_read covers it";
      }, t);
}

// ---- mbarriers ------------------------------------------------------------------------------------------------------

void Block::mbarrier_init(const void* address, int count, uint32_t pc) {
  become_precise();
  const uintptr_t at = reinterpret_cast<uintptr_t>(address);
  if (at % 8) fail("misaligned", pc, [] { return "an mbarrier is not at a multiple of 8 bytes"; });
  if (count < 1 || count > kMaxCount)
    fail("mbarrier", pc, [=] { return "init with a count of " + std::to_string(count) + ", expected 1 to 1048575"; });
  shared_access(at, 8, Kind::write, pc);  // also: it is no mbarrier yet, and nothing else is going on there
  const auto offset = static_cast<uint32_t>(at - reinterpret_cast<uintptr_t>(shared_));
  for (uint32_t i = 0; i < 8; i += granule_) shared_cells_[(offset + i) / granule_].writer = kMbarrier;
  if (!clocks_.has_agents_left())
    fail("mbarrier", pc, [] { return "too many mbarriers for the simulator"; });
  Mbarrier barrier;
  barrier.offset = offset;
  barrier.expected = barrier.pending = count;
  barrier.entry = clocks_.new_agent();
  barrier.init = {static_cast<uint16_t>(thread_ + 1), clocks_.stamp(thread_), pc};
  barrier.pc = pc;
  barrier.arrived = barrier.completed = clocks_.empty();
  async_.mbarriers.push_back(std::move(barrier));
}

Mbarrier& Block::find_mbarrier(const void* address, bool by_copy, uint32_t pc) {
  const auto offset = static_cast<uint32_t>(static_cast<const char*>(address) - shared_);
  for (Mbarrier& barrier : async_.mbarriers) {
    if (barrier.offset != offset) continue;
    const Clock& seen = clocks_.seen(thread_);
    if (!happened(barrier.init.code, barrier.init.stamp, seen))
      fail("data race", pc, [=, init = barrier.init] {
        return "uses the mbarrier at byte " + std::to_string(offset) + " of shared memory, which thread " +
               std::to_string(init.code - 1) + " initialised at " + source_line(init.pc) + ", and nothing orders them";
      });
    if (by_copy && !fenced(barrier.init.code, barrier.init.stamp, seen, true))
      fail("missing fence", pc, [=, init = barrier.init] {
        return "a bulk copy uses the mbarrier at byte " + std::to_string(offset) +
               " of shared memory, which was initialised at " + source_line(init.pc) +
               " with no fence_mbarrier_init afterwards that is ordered before";
      });
    return barrier;
  }
  fail("mbarrier", pc, [=, name = describe_address(reinterpret_cast<uintptr_t>(address))] {
    return "no mbarrier has been initialised at " + name;
  });
}

void Block::complete_phase(Mbarrier& barrier) {
  if (barrier.pending != 0 || barrier.tx != 0) return;
  const auto is_late = [&](const Transfer& t) { return t.mbarrier == &barrier - async_.mbarriers.data(); };
  const auto late = std::find_if(async_.transfers.begin(), async_.transfers.end(), is_late);
  if (late != async_.transfers.end())
    fail("mbarrier", late->pc, [text = describe_mbarrier(barrier)] {
      return "a phase ends before the bytes of this bulk copy have arrived, since fewer were expected: " + text;
    });
  barrier.phase_stamp = stamp_++;
  barrier.arrived[barrier.entry] = stamp_;  // all its copies so far, and this phase
  join(barrier.completed, barrier.arrived);
  barrier.pending = barrier.expected;
  ++barrier.phase;
  wake();
}

void Block::complete_tx(Mbarrier& barrier, int64_t bytes, uint32_t pc) {
  barrier.tx -= bytes;
  if (barrier.tx < -kMaxCount || barrier.tx > kMaxCount)
    fail("mbarrier", pc, [text = describe_mbarrier(barrier)] { return "more bytes than it can count: " + text; });
  complete_phase(barrier);
}

// Arrives, and expects `bytes` more to be copied before the phase ends.
void Block::mbarrier_arrive(const void* address, int64_t bytes, uint32_t pc) {
  become_precise();
  Mbarrier& barrier = find_mbarrier(address, false, pc);
  if (barrier.phase > 0 && clocks_.seen(thread_)[barrier.entry] <= barrier.phase_stamp)
    fail("mbarrier", pc, [text = describe_mbarrier(barrier)] {
      return "arrives, but has not seen the end of the phase before, which no wait orders before this: " + text;
    });
  if (barrier.pending == 0)
    fail("mbarrier", pc, [text = describe_mbarrier(barrier)] { return "arrives more often than expected: " + text; });
  barrier.pc = pc;
  complete_tx(barrier, -bytes, pc);
  clocks_.release(thread_, barrier.arrived, ++stamp_);
  --barrier.pending;
  complete_phase(barrier);
}

bool Block::mbarrier_try_wait(const void* address, int parity, uint32_t pc) {
  become_precise();
  Mbarrier& barrier = find_mbarrier(address, false, pc);
  if (parity != 0 && parity != 1)
    fail("mbarrier", pc, [=] { return "the parity is " + std::to_string(parity) + ", expected 0 or 1"; });
  ++count.mbarrier_waits;
  if (state_->options.order == Order::random && random(4) == 0) {
    if (random(2)) advance_async();
    return false;  // as on a GPU, at any time
  }
  const int index = static_cast<int>(&barrier - async_.mbarriers.data());
  wait_until({Wait::mbarrier, index, static_cast<uint32_t>(parity), pc});
  clocks_.acquire(thread_, async_.mbarriers[index].completed);
  return true;
}

// The accesses of this thread so far are seen by asynchronous units (or, of it, the mbarriers that it initialised).
void Block::proxy_fence(bool only_mbarriers) {
  become_precise();
  clocks_.advance(thread_, ++stamp_);
  (only_mbarriers ? async_lane().init_fences : async_lane().fences).push_back(stamp_);
}

std::string Block::describe_agent(uint16_t code) const {
  const int entry = threads_ + (code & ~kAgent);
  for (size_t i = 0; i < async_.warpgroups.size(); ++i)
    if (async_.warpgroups[i].is_open && async_.warpgroups[i].entry == entry)
      return "a product of warpgroup " + std::to_string(i);
  for (const Mbarrier& barrier : async_.mbarriers)
    if (barrier.entry == entry)
      return "a bulk copy on the mbarrier at byte " + std::to_string(barrier.offset) + " of shared memory";
  for (int t = 0; t < threads_; ++t)
    if (async_.lanes[t].store_entry == entry || async_.lanes[t].visible_entry == entry)
      return "a bulk store of thread " + std::to_string(t);
  return "an asynchronous unit";
}

// ---- named barriers, elect, registers: operations of a warp ---------------------------------------------------------

void Block::do_named(Warp& warp, int w) {
  become_precise();
  const int id = warp.argument >> 16, threads = warp.argument & 0xffff;
  if (id < 1 || id > 15 || threads % kLanes || threads < kLanes || threads > threads_)
    fail("named barrier", warp.pc, [=, most = threads_] {
      return "barrier " + std::to_string(id) + " of " + std::to_string(threads) +
             " threads, expected 1 to 15 (0 is that of the block), and a multiple of 32 of at most " +
             std::to_string(most);
    });
  NamedBarrier& barrier = async_.named[id];
  if (barrier.arrived == 0) barrier.threads = threads, barrier.clock = clocks_.empty();
  const uint32_t bit = 1u << w;
  if (barrier.threads != threads || barrier.warps & bit)
    fail("named barrier", warp.pc, [=, text = barrier.warps & bit
                                               ? "warp " + std::to_string(w) + " arrives twice in one generation"
                                               : std::to_string(threads) + " threads are expected here, but " +
                                                     std::to_string(barrier.threads) + " were",
                                    other = barrier.pc] {
      return "barrier " + std::to_string(id) + ": " + text + ", after the arrival at " + source_line(other);
    });
  barrier.pc = warp.pc;
  barrier.warps |= bit, barrier.arrived += kLanes;
  if (warp.op == Op::named_sync) barrier.waiting |= bit;
  ++stamp_;
  for (int t = w * kLanes; t < (w + 1) * kLanes; ++t) clocks_.release(t, barrier.clock, stamp_);
  if (barrier.arrived < barrier.threads) return;
  for (int t = 0; t < threads_; ++t)
    if (barrier.waiting >> t / kLanes & 1) clocks_.acquire(t, barrier.clock);
  ++barrier.generation;
  barrier.arrived = 0, barrier.warps = barrier.waiting = 0;
  wake();
}

// After do_named: waits for the generation at which this warp has arrived.
void Block::wait_named(int id, uint32_t pc) {
  const uint32_t bit = 1u << thread_ / kLanes;
  if (!(async_.named[id].waiting & bit)) return;
  wait_until({Wait::named_barrier, id, async_.named[id].generation, pc});
}

// Lane 0 on today's GPUs, which PTX does not promise.
void Block::do_elect(int w) {
  const Order order = state_->options.order;
  const int chosen = order == Order::forward ? 0 : order == Order::reverse ? kLanes - 1 : random(kLanes);
  for (int l = 0; l < kLanes; ++l) lanes_[w * kLanes + l].out[0] = l == chosen;
}

void Block::do_registers(Warp& warp, int w) {
  become_precise();
  const int wanted = warp.argument >> 1, before = async_.registers[w];
  const bool increase = warp.argument & 1;
  if (wanted < 24 || wanted > 256 || wanted % 8 || (increase ? wanted < before : wanted > before))
    fail("registers", warp.pc, [=] {
      return "setmaxnreg to " + std::to_string(wanted) + ", expected a multiple of 8 from 24 to 256, " +
             (increase ? "at least " : "at most ") + std::to_string(before) + " as the warp has now";
    });
  if (increase) return;  // take_registers
  async_.free_registers += (before - wanted) * kLanes;
  async_.registers[w] = wanted;
  wake();
}

// Waits until the block has as many registers left; the first of the warp takes them.
void Block::take_registers(int wanted, uint32_t pc) {
  int& mine = async_.registers[thread_ / kLanes];
  while (mine < wanted) {
    const int more = (wanted - mine) * kLanes;
    wait_until({Wait::registers, 0, static_cast<uint32_t>(more), pc});
    if (mine < wanted && async_.free_registers >= more) async_.free_registers -= more, mine = wanted;
  }
}

}  // namespace gptcore::simt
