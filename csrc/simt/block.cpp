// The life of a block: its threads as fibers, the order in which they run, and where they wait for each other.
#include <omp.h>

#include <algorithm>
#include <cstring>
#include <numeric>

#include "csrc/simt/model.h"

namespace gptcore::simt {

thread_local Block* running = nullptr;
Options options;

namespace {

constexpr uint32_t kAllLanes = ~0u;

uint64_t mix(uint64_t x) {  // splitmix64
  x += 0x9e3779b97f4a7c15;
  x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9;
  x = (x ^ x >> 27) * 0x94d049bb133111eb;
  return x ^ x >> 31;
}

bool same(Site a, Site b) { return a.line == b.line && (a.file == b.file || !std::strcmp(a.file, b.file)); }

}  // namespace

const char* name_of(Op op) {
  static const char* const names[] = {"nothing", "barrier", "warp_barrier", "shuffle", "load_matrix", "mma", "elect",
    "named_barrier_sync", "named_barrier_arrive", "wgmma_fence", "wgmma", "wgmma_commit", "wgmma_wait",
    "set_max_registers"};
  return names[static_cast<int>(op)];
}

Block& Block::of_this_thread() {
  // A pointer, since a module that is loaded at run time has little thread-local memory.
  thread_local std::unique_ptr<Block> block(new Block);
  return *block;
}

int Block::random(int below) { return static_cast<int>((random_ = mix(random_)) >> 33) % below; }

void Block::run(LaunchState& state, int64_t index, KernelCounters& counters) {
  state_ = &state;
  counters_ = &counters;
  block_ = index;
  const Launch& at = state.at;
  index_ = {static_cast<unsigned>(index % at.grid_x), static_cast<unsigned>(index / at.grid_x % at.grid_y),
            static_cast<unsigned>(index / at.grid_x / at.grid_y)};
  run_ = state.first_run + static_cast<uint32_t>(index);
  threads_ = static_cast<int>(at.threads), warps_ = threads_ / kLanes;
  stamp_ = block_stamp_ = 1;
  last_region_ = nullptr;
  precise_ = tracks_registers_ = false;
  actor_ = nullptr;
  count = {};

  if (!shared_) {
    shared_storage_.resize(kMaxSharedBytes + 1024);
    shared_ = reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(shared_storage_.data()) + 1023) & ~uintptr_t{1023});
    shared_cells_.reset(static_cast<Cell*>(std::calloc(kMaxSharedBytes, sizeof(Cell))));  // touched as far as used
    if (!shared_cells_) throw std::bad_alloc();
  }
  std::memset(shared_, 0xff, at.shared_bytes);  // NaN in every type

  random_ = mix(state.options.seed ^ mix(static_cast<uint64_t>(index)));
  std::iota(lane_at_.begin(), lane_at_.end(), uint8_t{0});
  std::iota(warp_at_.begin(), warp_at_.end(), uint8_t{0});
  if (state.options.order == Order::reverse) {
    std::reverse(lane_at_.begin(), lane_at_.end());
    std::reverse(warp_at_.begin(), warp_at_.begin() + warps_);
  } else if (state.options.order == Order::random) {
    for (int i = kLanes - 1; i > 0; --i) std::swap(lane_at_[i], lane_at_[random(i + 1)]);
    for (int i = warps_ - 1; i > 0; --i) std::swap(warp_at_[i], warp_at_[random(i + 1)]);
  }
  for (int i = 0; i < kLanes; ++i) position_of_[lane_at_[i]] = static_cast<uint8_t>(i);

  stacks_.reserve(threads_);
  if (static_cast<int>(lanes_.size()) < threads_) lanes_.resize(threads_);
  for (int i = 0; i < threads_; ++i) {
    lanes_[i].copies.clear(), lanes_[i].groups.clear(), lanes_[i].uncommitted = 0;
    stacks_.start(lanes_[i].fiber, i, &Block::fiber_main);
  }
  for (int w = 0; w < warps_; ++w) warp_[w] = {kAllLanes, 0, 0, Op::none, {}, 0, 0, 0, stamp_};

  running = this;
  thread_ = warp_at_[0] * kLanes + lane_at_[0];
  warp_[warp_at_[0]].ready &= ~1u;
  stack_ = reinterpret_cast<uintptr_t>(stacks_.begin(thread_));
  switch_fiber(main_, lanes_[thread_].fiber);
  running = nullptr;
  for (int w = 0; w < warps_; ++w) flush_log(w);
}

void Block::fiber_main() {
  Block& block = *running;
  block.state_->thread(block.state_->call);
  Warp& warp = block.warp_[block.thread_ / kLanes];
  warp.done |= 1u << block.position_of_[block.thread_ % kLanes];
  if (warp.waiting) {
    const int waiter = warp.first;
    const Op op = warp.op;
    const uint32_t pc = warp.pc;
    block.fail("divergent warp", pc, [=, thread = block.thread_] {
      return std::string("it waits at ") + name_of(op) + ", but thread " + std::to_string(thread) +
             " of its warp has returned";
    }, waiter);
  }
  block.resume_next();
  __builtin_unreachable();
}

// Switches to the next thread that can run. The caller has recorded what this thread waits for.
void Block::resume_next() {
  int w = thread_ / kLanes;
  if (precise_ && state_->options.order == Order::random && random(8) == 0) advance_async();
  while (!warp_[w].ready) {
    const int start = state_->options.order == Order::random ? random(warps_) : 0;
    int next = -1;
    for (int i = 0; i < warps_ && next < 0; ++i) {
      const int candidate = warp_at_[(start + i) % warps_];
      if (warp_[candidate].ready) next = candidate;
    }
    w = next < 0 ? warp_at_[start] : next;
    if (next >= 0) break;
    // Every thread waits for something or has returned.
    if (precise_ && advance_async()) continue;
    bool all_done = true;
    for (int i = 0; i < warps_; ++i) all_done &= warp_[i].done == kAllLanes;
    if (all_done) {
      end_async();
      switch_fiber(lane().fiber, main_);
    }
    if (precise_ && async_.waiting > 0) report_deadlock();
    release_barrier();
  }
  switch_to(w);
}

void Block::switch_to(int w) {
  Fiber& from = lane().fiber;
  const int position = __builtin_ctz(warp_[w].ready);
  warp_[w].ready &= ~(1u << position);
  const int next = w * kLanes + lane_at_[position];
  if (next == thread_) return;
  thread_ = next;
  stack_ = reinterpret_cast<uintptr_t>(stacks_.begin(next));
  switch_fiber(from, lanes_[next].fiber);
}

void Block::release_barrier() {
  const Warp* reference = nullptr;
  for (int w = 0; w < warps_; ++w)
    if (warp_[w].waiting && !reference) reference = &warp_[w];
  for (int w = 0; w < warps_; ++w) {
    const Warp& warp = warp_[w];
    const Warp first = *reference;
    if (warp.done)
      fail("divergent barrier", first.pc, [=] {
        return "it waits at barrier, but thread " + std::to_string(w * kLanes) + " has returned";
      }, first.first);
    if (!same(warp.site, first.site))
      fail("divergent barrier", first.pc, [=, other = warp.first, pc = warp.pc] {
        return "it waits at this barrier, but thread " + std::to_string(other) + " waits at the one at " +
               source_line(pc);
      }, first.first);
  }
  ++count.barriers;
  block_stamp_ = ++stamp_;
  if (precise_) clocks_.barrier(0, threads_, stamp_);
  for (int w = 0; w < warps_; ++w) {
    flush_log(w);
    warp_[w].stamp = stamp_, warp_[w].waiting = 0, warp_[w].ready = kAllLanes;
  }
}

void Block::synchronise(Op op, int argument, Site site, uint32_t pc) {
  const int w = thread_ / kLanes;
  Warp& warp = warp_[w];
  const uint32_t bit = 1u << position_of_[thread_ % kLanes];
  if (warp.done)
    fail("divergent warp", pc, [=, lane = lane_at_[__builtin_ctz(warp.done)]] {
      return std::string("it waits at ") + name_of(op) + ", but thread " + std::to_string(w * kLanes + lane) +
             " of its warp has returned";
    });
  if (!warp.waiting) {
    warp.op = op, warp.argument = argument, warp.site = site, warp.pc = pc, warp.first = thread_;
  } else if (warp.op != op || warp.argument != argument || !same(warp.site, site)) {
    fail(op == Op::barrier ? "divergent barrier" : "divergent warp", pc,
         [=, other = warp.first, other_op = warp.op, other_pc = warp.pc] {
           return std::string("it is at ") + name_of(op) + ", but thread " + std::to_string(other) +
                  " of its warp waits at " + name_of(other_op) + " at " + source_line(other_pc);
         });
  }
  warp.waiting |= bit;
  if (warp.waiting != kAllLanes || op == Op::barrier) return resume_next();
  do_op(warp, w);
  flush_log(w);
  warp.waiting = 0;
  warp.ready = kAllLanes & ~bit;
  if (state_->options.order == Order::random && warps_ > 1 && random(4) == 0) {  // switch to another warp
    warp.ready |= bit;
    const int start = random(warps_);
    for (int i = 0; i < warps_; ++i)
      if (const int other = warp_at_[(start + i) % warps_]; warp_[other].ready) return switch_to(other);
  }
}

void Block::fail(const char* rule, uint32_t pc, std::function<std::string()> detail, int thread) {
  LaunchState& state = *state_;
  {
    std::lock_guard<std::mutex> guard(state.mutex);
    if (block_ < state.failed) {
      state.failed = block_;
      state.report = [=, this_thread = thread < 0 ? thread_ : thread, index = index_, kernel = state.at.kernel,
                      text = std::move(detail)] {
        return std::string(rule) + " in kernel " + kernel + " at " + source_line(pc) + ", block (" +
               std::to_string(index[0]) + ", " + std::to_string(index[1]) + ", " + std::to_string(index[2]) +
               "), thread " + std::to_string(this_thread) + ": " + text();
      };
    }
  }
  if (lock_) lock_->clear(std::memory_order_release), lock_ = nullptr;
  switch_fiber(lane().fiber, main_);  // never resumed
  __builtin_unreachable();
}

namespace {

std::mutex counters_mutex;
std::map<std::string, KernelCounters> all_counters;
std::atomic<uint32_t> next_run{1};

void merge(KernelCounters& into, const KernelCounters& from) {
  into.total.add(from.total);
  for (const auto& [pc, waste] : from.waste) {
    into.waste[pc].bank_conflicts += waste.bank_conflicts;
    into.waste[pc].sectors += waste.sectors;
  }
}

}  // namespace

void Counters::add(const Counters& other) {
  // All members are int64_t.
  static_assert(sizeof(Counters) % sizeof(int64_t) == 0);
  auto* to = reinterpret_cast<int64_t*>(this);
  const auto* from = reinterpret_cast<const int64_t*>(&other);
  for (size_t i = 0; i < sizeof(Counters) / sizeof(int64_t); ++i) to[i] += from[i];
}

std::map<std::string, KernelCounters> counters() {
  std::lock_guard<std::mutex> guard(counters_mutex);
  return all_counters;
}

int compute_capability() { return options.compute_capability; }

void reset_counters() {
  std::lock_guard<std::mutex> guard(counters_mutex);
  all_counters.clear();
}

void run(const Launch& at, void (*thread)(void*), void* call) {
  const char* wrong = nullptr;
  if (!at.grid_x || !at.grid_y || !at.grid_z) wrong = "the grid is empty";
  if (at.grid_x > 0x7fffffff || at.grid_y > 65535 || at.grid_z > 65535)
    wrong = "the grid is larger than (2^31 - 1, 65535, 65535)";
  if (at.threads % kLanes || at.threads == 0 || at.threads > kMaxThreads)
    wrong = "threads must be a multiple of 32, at most 1024";
  if (at.shared_bytes > kMaxSharedBytes) wrong = "a block has at most 227 KiB of shared memory";
  if (!Tensors::current()) wrong = "no tensors are registered";
  if (wrong) throw std::runtime_error("cannot launch " + describe(at) + ": " + wrong);

  LaunchState state{};
  state.at = at, state.thread = thread, state.call = call;
  state.tensors = Tensors::current();
  state.options = options;
  state.blocks = static_cast<int64_t>(at.grid_x) * at.grid_y * at.grid_z;
  state.first_run = next_run.fetch_add(static_cast<uint32_t>(state.blocks));
  state.failed = INT64_MAX;
  if (options.count) state.tensors->forget_touched();

  std::vector<uint32_t> order;
  if (options.order == Order::random) {
    order.resize(state.blocks);
    std::iota(order.begin(), order.end(), 0u);
    uint64_t seed = options.seed;
    for (size_t i = order.size() - 1; i > 0; --i) std::swap(order[i], order[(seed = mix(seed)) % (i + 1)]);
  }
  const int wanted = options.threads > 0 ? options.threads : omp_get_max_threads();
  const int workers = static_cast<int>(std::min<int64_t>(wanted, state.blocks));
  std::atomic<int64_t> next{0};
  std::exception_ptr error;
#pragma omp parallel num_threads(workers)
  try {
    Block& block = Block::of_this_thread();
    KernelCounters mine;
    for (int64_t i; (i = next++) < state.blocks;) {
      const int64_t index = options.order == Order::forward   ? i
                            : options.order == Order::reverse ? state.blocks - 1 - i
                                                              : order[i];
      if (index > state.failed) continue;
      block.run(state, index, mine);
      ++block.count.blocks;
      mine.total.add(block.count);
    }
    std::lock_guard<std::mutex> guard(state.mutex);
    merge(state.counters, mine);
  } catch (...) {  // out of memory
    std::lock_guard<std::mutex> guard(state.mutex);
    error = std::current_exception();
  }
  if (error) std::rethrow_exception(error);
  state.counters.total.launches = 1;
  if (options.count) {
    state.counters.total.global_distinct_read_bytes = state.tensors->touched_bytes(kRead);
    state.counters.total.global_distinct_write_bytes = state.tensors->touched_bytes(kWritten);
  }
  {
    std::lock_guard<std::mutex> guard(counters_mutex);
    merge(all_counters[at.kernel], state.counters);
  }
  if (state.report) throw SimtError(state.report());
}

}  // namespace gptcore::simt
