// The simulator: blocks of fibers, and the state with which their accesses are checked and counted.
#pragma once

#include <array>
#include <atomic>
#include <functional>
#include <map>
#include <mutex>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <vector>

#include "csrc/launch.h"
#include "csrc/simt/async.h"
#include "csrc/simt/clocks.h"
#include "csrc/simt/device.h"
#include "csrc/simt/fiber.h"
#include "csrc/simt/tensors.h"

namespace gptcore::simt {

constexpr int kLanes = 32;
constexpr int kMaxThreads = 1024;
constexpr size_t kMaxSharedBytes = 227 * 1024;  // sm_90 and sm_100; others have less, see kernels/cuda/policy.h

// A rule is broken. RuntimeError in Python.
struct SimtError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// Counters of one kernel, summed over the threads of its launches. Traffic is counted only if Options::count.
struct Counters {
  int64_t launches, blocks, barriers, warp_barriers, shuffles, mma, load_matrix, copies, special;
  int64_t wgmma_flops, wgmma_shared_bytes, bulk_bytes, mbarrier_waits;  // bytes: operands once a product; of all boxes
  int64_t global_read_bytes, global_write_bytes;        // requested by threads
  int64_t global_read_sectors, global_write_sectors;    // of 32 bytes, different ones in each warp's request
  int64_t global_distinct_read_bytes, global_distinct_write_bytes;  // each once a launch: what DRAM must move
  int64_t shared_requests, shared_passes, bank_conflicts;  // passes of 32 banks; conflicts: passes beyond the minimum
  void add(const Counters& other);
};
// Bank conflicts and sectors beyond the minimum of one instruction of a kernel.
struct Waste { int64_t bank_conflicts, sectors; };

enum class Order { forward, reverse, random };
struct Options {
  Order order = Order::forward;
  uint64_t seed = 0;
  int threads = 0;  // 0: OpenMP's default
  bool count = false;
  int compute_capability = 80;
};
extern Options options;

struct KernelCounters {
  Counters total{};
  std::unordered_map<uint32_t, Waste> waste;  // by instruction
};
std::map<std::string, KernelCounters> counters();
int compute_capability();  // of options
void reset_counters();

// Source lines of an instruction of this module, innermost first: "kernels/cuda/gelu.cuh:40 < kernels/...:61".
std::string source_line(uint32_t pc);
uint32_t module_offset(const void* address);
bool in_module(uintptr_t address);

struct LaunchState {
  Launch at;
  void (*thread)(void*);
  void* call;
  Tensors* tensors;
  Options options;
  int64_t blocks;
  uint32_t first_run;       // of block 0
  std::atomic<int64_t> failed;  // the lowest block that broke a rule
  std::function<std::string()> report;
  KernelCounters counters;
  std::mutex mutex;
};

enum class Op : uint8_t {
  none, barrier, warp_barrier, shuffle, load_matrix, mma, elect, named_sync, named_arrive, register_fence, wgmma,
  wgmma_commit, wgmma_wait, registers
};
const char* name_of(Op op);

struct Copy { char* to; const char* from; int bytes; bool valid; uint32_t pc; };

struct Lane {
  Fiber fiber;
  uint32_t in[10];     // operands of the warp-wide operation at which it waits
  uint32_t out[4];     // and its result
  const char* row;
  std::vector<Copy> copies;  // not waited for, oldest first
  std::vector<int> groups;   // how many of them each committed group has
  int uncommitted;
};

struct Warp {
  uint32_t ready, waiting, done;  // positions in the order of the schedule, a bit each
  Op op;                          // at which `waiting` wait
  Site site;
  uint32_t pc;
  int first;                      // lane that came first
  int argument;
  uint32_t stamp;                 // of its last barrier
};

// The accesses of a warp since it last synchronised, by instruction: what a GPU would do as one request.
struct Request { uint32_t lanes; std::array<uintptr_t, kLanes> address; };
struct Instruction {
  bool shared, write;
  int width;
  std::array<uint32_t, kLanes> count;
  std::vector<Request> requests;
};

class Block {
 public:
  static Block& of_this_thread();
  void run(LaunchState& state, int64_t index, KernelCounters& counters);

  // Called by its threads.
  void synchronise(Op op, int argument, Site site, uint32_t pc);  // waits for all lanes of the warp, or of the block
  void access(uintptr_t address, unsigned width, bool write, uint32_t pc, bool check_alignment);
  void copy_async(void* to, const void* from, int bytes, bool valid, uint32_t pc);
  void copy_wait(int groups);

  // In mbarrier.cpp.
  void mbarrier_init(const void* address, int count, uint32_t pc);
  void mbarrier_arrive(const void* address, int64_t bytes, uint32_t pc);
  bool mbarrier_try_wait(const void* address, int parity, uint32_t pc);
  void proxy_fence(bool only_mbarriers);
  void wait_until(Wait wait);
  void wait_named(int id, uint32_t pc);
  void take_registers(int wanted, uint32_t pc);
  // In wgmma.cpp.
  void wgmma_wait(int groups, Site site, uint32_t pc);
  // In bulk.cpp.
  void bulk_load(const void* map, void* to, const void* mbarrier, std::array<int, 5> at, uint32_t pc);
  void bulk_store(const void* map, const void* from, std::array<int, 5> at, uint32_t pc);
  void bulk_commit();
  void bulk_wait(int groups, bool only_read);

  AsyncLane& async_lane() { return async_.lanes[thread_]; }
  Lane& lane() { return lanes_[thread_]; }
  int thread() const { return thread_; }
  const std::array<unsigned, 3>& index() const { return index_; }
  LaunchState& state() const { return *state_; }
  char* shared() const { return shared_; }
  bool on_stack(uintptr_t address) const { return address - stack_ < Stacks::kBytes; }
  Counters count{};

 private:
  static void fiber_main();
  void resume_next();            // to the next thread that can run, or back to run()
  void switch_to(int warp);
  void release_barrier();
  void do_op(Warp& warp, int w);
  void do_shuffle(int w);
  void do_load_matrix(Warp& warp, int w);
  void do_mma(Warp& warp, int w);

  // An asynchronous unit that accesses memory in place of a thread.
  struct Actor {
    uint16_t code;
    uint32_t stamp;
    const Clock* seen;
    const char* does;  // "a product reads"
  };

  // In mbarrier.cpp.
  void become_precise();
  void end_async();
  Mbarrier& find_mbarrier(const void* address, bool by_copy, uint32_t pc);
  void complete_phase(Mbarrier& barrier);
  void complete_tx(Mbarrier& barrier, int64_t bytes, uint32_t pc);
  bool satisfied(const Wait& wait) const;
  void wake();
  bool advance_async();  // lets an asynchronous unit do something
  [[noreturn]] void report_deadlock();
  std::string describe_mbarrier(const Mbarrier& barrier) const;
  std::string describe_wait(const Wait& wait) const;
  void do_named(Warp& warp, int w);
  void do_elect(int w);
  void do_registers(Warp& warp, int w);

  // In wgmma.cpp.
  Warpgroup& warpgroup_of(int w, uint32_t pc);
  void do_register_fence(Warp& warp, int w);
  void do_wgmma(Warp& warp, int w);
  void check_registers(const void* registers, size_t bytes, bool is_accumulator, uint32_t index, uint32_t pc);
  void touch_registers(uintptr_t address, unsigned width, bool write, uint32_t pc);
  void check_operands(Warpgroup& group, IssuedProduct& issued);
  void perform(IssuedProduct& issued);
  void perform_until(Warpgroup& group, size_t end);
  void do_wgmma_wait(Warp& warp, int w);

  // In bulk.cpp.
  void start(Transfer transfer, const void* shared, const Actor& in_shared, const Actor& in_global);
  void perform(const Transfer& transfer);

  // In access.cpp.
  enum class Kind { read, write, warp_read, start_copy, finish_copy };
  struct Access {
    Kind kind;
    uintptr_t address;
    unsigned width;
    uint32_t pc;
    bool writes() const { return kind == Kind::write || kind == Kind::start_copy; }
  };
  bool happened(uint16_t code, uint32_t stamp, const Clock& seen) const;
  bool fenced(uint16_t code, uint32_t stamp, const Clock& seen, bool of_mbarrier = false) const;
  bool before(uint16_t code, uint32_t stamp) const;  // the present access
  void add_reader(Cell& cell, Reader reader);
  void shared_access(uintptr_t address, unsigned width, Kind kind, uint32_t pc);
  void global_access(uintptr_t address, unsigned width, bool write, uint32_t pc);
  std::string describe(const Access& access) const;
  [[noreturn]] void report_race(const Access& access, const char* did, uint16_t code, uint32_t run, uint32_t stamp,
                                uint32_t other_pc);
  template <bool kPrecise>
  void check_cell(Cell& cell, const Access& access, bool shared);
  void matrix_row_access(uintptr_t address, uint32_t pc);
  void refine_shared(int granule);
  void log(uintptr_t address, unsigned width, bool write, bool shared, uint32_t pc);
  void flush_log(int w);
  int64_t shared_passes(const Request& request, int width, int64_t* least) const;

  [[noreturn]] void fail(const char* rule, uint32_t pc, std::function<std::string()> detail, int thread = -1);
  std::string describe_address(uintptr_t address) const;  // the name of a piece of memory
  std::string describe_accessor(uint16_t code, uint32_t run) const;
  std::string describe_agent(uint16_t code) const;
  int random(int below);

  LaunchState* state_ = nullptr;
  std::array<unsigned, 3> index_{};
  int64_t block_ = 0;
  int threads_ = 0, warps_ = 0;
  int thread_ = 0;
  uintptr_t stack_ = 0;
  Fiber main_{};
  Stacks stacks_;
  std::vector<Lane> lanes_;
  std::array<Warp, kMaxThreads / kLanes> warp_{};
  std::array<uint8_t, kLanes> lane_at_{}, position_of_{};  // the schedule's order of lanes
  std::array<uint8_t, kMaxThreads / kLanes> warp_at_{};
  uint32_t stamp_ = 0, run_ = 0;
  uint32_t block_stamp_ = 0;  // of the last block barrier
  uint64_t random_ = 0;
  std::vector<char> shared_storage_;
  char* shared_ = nullptr;
  int granule_ = 4;
  std::unique_ptr<Cell[], decltype(&std::free)> shared_cells_{nullptr, &std::free};
  bool precise_ = false;  // accesses are ordered by clocks_, not by stamps alone
  bool tracks_registers_ = false;
  Clocks clocks_;
  ReaderSets readers_;
  AsyncBlock async_;
  const Actor* actor_ = nullptr;  // for whom memory is accessed, if not for the present thread
  Region* last_region_ = nullptr;
  std::atomic_flag* lock_ = nullptr;  // held while a cell of global memory is checked
  std::unordered_map<uint32_t, Instruction> log_[kMaxThreads / kLanes];
  KernelCounters* counters_ = nullptr;
};

extern thread_local Block* running __attribute__((tls_model("initial-exec")));

}  // namespace gptcore::simt
