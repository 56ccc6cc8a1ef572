// Checks every access of a kernel, which the compiler's ThreadSanitizer instrumentation passes to the functions at the
// end of this file, and counts the cost of the accesses of a warp.
#include <algorithm>
#include <cstring>

#include "csrc/simt/model.h"

namespace gptcore::simt {
namespace {

constexpr uint32_t kForever = UINT32_MAX;  // the stamp of reads of several blocks: no barrier orders them

std::atomic_flag locks[1024];  // for the cells of global memory, by address

std::string bytes_text(unsigned width) { return std::to_string(width) + (width == 1 ? " byte" : " bytes"); }

}  // namespace

std::string Block::describe_address(uintptr_t address) const {
  const uintptr_t offset = address - reinterpret_cast<uintptr_t>(shared_);
  if (offset < kMaxSharedBytes) return "byte " + std::to_string(offset) + " of shared memory";
  if (const Region* region = state_->tensors->find(address))
    for (const Tensor* t : region->tensors)
      if (t->contains(address, 1)) return t->element(address);
  return "an address that is " + state_->tensors->describe_outside(address);
}

std::string Block::describe_accessor(uint16_t code, uint32_t run) const {
  std::string text;
  if (code == kSeveral || code == kReaderSet) text = "several threads";
  else if (code & kWholeWarp) text = "warp " + std::to_string(code & ~kWholeWarp);
  else if (code & kAgent) text = run == run_ ? describe_agent(code) : "an asynchronous unit";
  else text = "thread " + std::to_string((code & ~kPendingCopy) - 1);
  if (run == run_) return text;
  const int64_t block = run - state_->first_run, x = state_->at.grid_x, y = state_->at.grid_y;
  return text + " of block (" + std::to_string(block % x) + ", " + std::to_string(block / x % y) + ", " +
         std::to_string(block / x / y) + ")";
}

// Returns whether an access of this block happens before one that has seen these clocks.
bool Block::happened(uint16_t code, uint32_t stamp, const Clock& seen) const {
  const auto all = [&](int first, int count) {
    return std::all_of(seen.begin() + first, seen.begin() + first + count, [=](uint32_t s) { return s > stamp; });
  };
  if (code == kSeveral) return all(0, threads_);
  if (code == kReaderSet) {
    const auto& readers = readers_.readers(stamp);
    return std::all_of(readers.begin(), readers.end(),
                       [&](const Reader& r) { return happened(r.code, r.stamp, seen); });
  }
  if (code & kWholeWarp) return all((code & ~kWholeWarp) * kLanes, kLanes);
  if (code & kAgent) return seen[threads_ + (code & ~kAgent)] > stamp;
  return seen[(code & ~kPendingCopy) - 1] > stamp;
}

bool Block::before(uint16_t code, uint32_t stamp) const {
  return happened(code, stamp, actor_ ? *actor_->seen : clocks_.seen(thread_));
}

// Returns whether the thread that wrote executed a fence afterwards, which has been seen, so that asynchronous units
// see the write.
bool Block::fenced(uint16_t code, uint32_t stamp, const Clock& seen, bool of_mbarrier) const {
  const int thread = code - 1;
  const auto has = [&](const std::vector<uint32_t>& fences) {
    const auto next = std::upper_bound(fences.begin(), fences.end(), stamp);
    return next != fences.end() && *next < seen[thread];
  };
  const AsyncLane& lane = async_.lanes[thread];
  return has(lane.fences) || (of_mbarrier && has(lane.init_fences));
}

void Block::add_reader(Cell& cell, Reader reader) {
  if (cell.read_run == run_ && cell.reader != reader.code && !before(cell.reader, cell.read_stamp)) {
    if (cell.reader == kSeveral) {
      cell.read_stamp = std::max(cell.read_stamp, reader.stamp);
      return;
    }
    cell.read_stamp = cell.reader == kReaderSet
                          ? readers_.with(cell.read_stamp, reader)
                          : readers_.pair({cell.reader, cell.read_stamp, cell.read_pc}, reader);
    cell.reader = kReaderSet;
    return;
  }
  cell.read_run = run_, cell.reader = reader.code, cell.read_stamp = reader.stamp, cell.read_pc = reader.pc;
}

std::string Block::describe(const Access& access) const {
  const char* does = access.writes() ? "writes " : "reads ";
  return (actor_ ? std::string(actor_->does) + " " : "") + does + bytes_text(access.width) + " at " +
         describe_address(access.address);
}

void Block::report_race(const Access& access, const char* did, uint16_t code, uint32_t run, uint32_t stamp,
                        uint32_t other_pc) {
  if (code == kReaderSet)
    for (const Reader& reader : readers_.readers(stamp))
      if (!before(reader.code, reader.stamp)) code = reader.code, other_pc = reader.pc;
  const bool is_copy = run == run_ && code & kAgent && code < kWholeWarp && did[0] == 'w';
  fail(is_copy ? "unfinished copy" : "data race", access.pc,
       [=, text = describe(access), other = describe_accessor(code, run), same_run = run == run_,
        precise = precise_] {
         return text + ", which " + other + " " + did + " at " + source_line(other_pc) +
                (!same_run ? ", and blocks are not ordered"
                 : is_copy ? " and which has not been waited for"
                 : precise ? ", and nothing orders them"
                           : ", with no barrier between");
       });
}

// An access of this run happens before the present one if it is of the same thread, is older than the last barrier of
// the block, or is of the same warp and older than the last barrier of the warp. Where other things order accesses,
// clocks_ tell.
template <bool kPrecise>
void Block::check_cell(Cell& cell, const Access& access, bool shared) {
  const int w = thread_ / kLanes;
  const uint32_t warp_stamp = warp_[w].stamp, pc = access.pc;
  const Actor* const actor = kPrecise ? actor_ : nullptr;
  const uint32_t now = actor ? actor->stamp : kPrecise ? clocks_.stamp(thread_) : warp_stamp;
  const uint16_t me = actor ? actor->code
                            : static_cast<uint16_t>(access.kind == Kind::warp_read ? kWholeWarp + w : thread_ + 1);
  const bool written_here = cell.write_run == run_;

  if (access.kind == Kind::finish_copy) {
    cell.writer = me, cell.write_stamp = now;
    return;
  }
  const auto unordered = [&](uint16_t code, uint32_t stamp) {
    if (kPrecise) return !before(code, stamp);
    if (stamp < block_stamp_ || code == me) return false;
    if (code == kSeveral) return true;
    const int other = code & kWholeWarp ? code & ~kWholeWarp : (code - 1) / kLanes;
    return other != w || stamp >= warp_stamp;
  };

  if (written_here && cell.writer == kMbarrier)
    fail("mbarrier", pc, [text = describe(access)] { return text + ", where an mbarrier lies"; });
  if (written_here && (cell.writer & kPendingCopy))
    fail("unfinished copy", pc, [text = describe(access), other = describe_accessor(cell.writer, run_),
                                 copy_pc = cell.write_pc] {
      return text + ", the destination of an asynchronous copy of " + other + " at " + source_line(copy_pc) +
             " that has not been waited for";
    });
  if (written_here ? unordered(cell.writer, cell.write_stamp) : !shared && cell.write_run >= state_->first_run)
    report_race(access, "wrote", cell.writer, cell.write_run, cell.write_stamp, cell.write_pc);
  if (actor && written_here && !(cell.writer & kAgent) && !fenced(cell.writer, cell.write_stamp, *actor->seen))
    fail("missing fence", pc, [text = describe(access), other = describe_accessor(cell.writer, run_),
                               other_pc = cell.write_pc] {
      return text + ", which " + other + " wrote at " + source_line(other_pc) +
             " with no fence_proxy_async of that thread afterwards that is ordered before";
    });

  if (access.writes()) {
    const bool read_here = cell.read_run == run_;
    if (read_here ? unordered(cell.reader, cell.read_stamp) : !shared && cell.read_run >= state_->first_run)
      report_race(access, "read", cell.reader, cell.read_run, cell.read_stamp, cell.read_pc);
    cell.write_run = run_, cell.write_stamp = now, cell.write_pc = pc;
    cell.writer = access.kind == Kind::start_copy ? me | kPendingCopy : me;
    return;
  }

  if (shared ? !written_here : cell.write_run == 0)
    fail("uninitialised read", pc, [text = describe(access)] { return text + ", which was never written"; });
  if (kPrecise && shared) return add_reader(cell, {me, now, pc});
  auto set_reader = [&](uint16_t code, uint32_t stamp) {
    cell.read_run = run_, cell.reader = code, cell.read_stamp = stamp, cell.read_pc = pc;
  };
  if (cell.read_run != run_) {
    if (!shared && cell.read_run >= state_->first_run) set_reader(kSeveral, kForever);
    else set_reader(me, now);
  } else if (kPrecise ? before(cell.reader, cell.read_stamp) : cell.read_stamp < block_stamp_ || cell.reader == me) {
    set_reader(me, now);
  } else if (cell.reader != kSeveral) {
    const int other = cell.reader & kWholeWarp ? cell.reader & ~kWholeWarp : (cell.reader - 1) / kLanes;
    if (other != w || kPrecise) set_reader(kSeveral, now);
    else set_reader(cell.read_stamp < warp_stamp ? me : static_cast<uint16_t>(kWholeWarp + w), now);
  }
}

// Reduces the granule of shared memory.
void Block::refine_shared(int granule) {
  const int parts = granule_ / granule;
  for (int64_t i = static_cast<int64_t>(state_->at.shared_bytes) / granule_; i >= 0; --i)
    for (int part = parts - 1; part >= 0; --part)
      if (i * parts + part < static_cast<int64_t>(kMaxSharedBytes)) shared_cells_[i * parts + part] = shared_cells_[i];
  granule_ = granule;
}

void Block::shared_access(uintptr_t address, unsigned width, Kind kind, uint32_t pc) {
  const size_t offset = address - reinterpret_cast<uintptr_t>(shared_);
  if (offset + width > state_->at.shared_bytes)
    fail("out of bounds", pc, [=, bytes = state_->at.shared_bytes] {
      return std::string(kind == Kind::write || kind == Kind::start_copy ? "writes " : "reads ") + bytes_text(width) +
             " at byte " + std::to_string(offset) + " of shared memory, but the launch has " + std::to_string(bytes) +
             " bytes";
    });
  const int alignment = static_cast<int>((offset | width) & -(offset | width));
  if (alignment < granule_) refine_shared(alignment);
  const int shift = __builtin_ctz(granule_);  // a division is slower than all checks
  const Access access{kind, address, width, pc};
  for (size_t i = offset >> shift, end = (offset + width) >> shift; i < end; ++i)
    if (precise_) check_cell<true>(shared_cells_[i], access, true);
    else check_cell<false>(shared_cells_[i], access, true);
}

void Block::global_access(uintptr_t address, unsigned width, bool write, uint32_t pc) {
  if (!last_region_ || address < last_region_->begin || address >= last_region_->end)
    last_region_ = state_->tensors->find(address);
  Region* region = last_region_;
  const Tensor *tensor = nullptr, *unwritable = nullptr;
  if (region)
    for (const Tensor* t : region->tensors) {
      if (!t->contains(address, width)) continue;
      if (write && !t->written) unwritable = t;
      else tensor = t;
      if (tensor) break;
    }
  if (!tensor)
    fail(unwritable ? "write to an input" : "out of bounds", pc, [=, tensors = state_->tensors] {
      return std::string(write ? "writes " : "reads ") + bytes_text(width) + " at " +
             (unwritable ? unwritable->element(address) : "an address " + tensors->describe_outside(address));
    });
  if (!tensor->written) return;  // an input
  const int shift = __builtin_ctz(region->granule);
  const Access access{write ? Kind::write : Kind::read, address, width, pc};
  const size_t first = (address - region->begin) >> shift, last = (address + width - 1 - region->begin) >> shift;
  for (size_t i = first; i <= last; ++i) {
    lock_ = &locks[(reinterpret_cast<uintptr_t>(&region->cells[i]) >> 6) % 1024];
    while (lock_->test_and_set(std::memory_order_acquire)) {}
    if (precise_) check_cell<true>(region->cells[i], access, false);
    else check_cell<false>(region->cells[i], access, false);
    lock_->clear(std::memory_order_release);
    lock_ = nullptr;
  }
}

void Block::access(uintptr_t address, unsigned width, bool write, uint32_t pc, bool check_alignment) {
  if (on_stack(address)) {
    if (tracks_registers_) touch_registers(address, width, write, pc);
    return;
  }
  const bool shared = address - reinterpret_cast<uintptr_t>(shared_) < kMaxSharedBytes;
  if (!shared && !write && in_module(address)) return;  // a constant table
  if (check_alignment && address % width)
    fail("misaligned", pc, [=, name = describe_address(address)] {
      return std::string(write ? "writes " : "reads ") + bytes_text(width) + " at " + name +
             ", whose address is not a multiple of " + std::to_string(width);
    });
  if (shared) shared_access(address, width, write ? Kind::write : Kind::read, pc);
  else global_access(address, width, write, pc);
  if (state_->options.count) log(address, width, write, shared, pc);
}

void Block::matrix_row_access(uintptr_t address, uint32_t pc) {
  if (address - reinterpret_cast<uintptr_t>(shared_) >= kMaxSharedBytes)
    fail("out of bounds", pc,
         [=, name = describe_address(address)] { return "load_matrix reads " + name + ", not shared memory"; });
  if (address % 16)
    fail("misaligned", pc, [=, name = describe_address(address)] {
      return "load_matrix reads 16 bytes at " + name + ", which is not a multiple of 16";
    });
  shared_access(address, 16, Kind::warp_read, pc);
  if (state_->options.count) log(address, 16, false, true, pc);
}

void Block::copy_async(void* to, const void* from, int bytes, bool valid, uint32_t pc) {
  ++count.copies;
  const uintptr_t target = reinterpret_cast<uintptr_t>(to), source = reinterpret_cast<uintptr_t>(from);
  if (target - reinterpret_cast<uintptr_t>(shared_) >= kMaxSharedBytes)
    fail("out of bounds", pc,
         [=, name = describe_address(target)] { return "copy_async writes " + name + ", not shared memory"; });
  if (target % bytes || (valid && source % bytes))
    fail("misaligned", pc, [=, name = describe_address(target % bytes ? target : source)] {
      return "copy_async of " + bytes_text(bytes) + (target % bytes ? " to " : " from ") + name +
             ", whose address is not a multiple of " + std::to_string(bytes);
    });
  if (valid) global_access(source, bytes, false, pc);
  shared_access(target, bytes, Kind::start_copy, pc);
  Lane& mine = lane();
  mine.copies.push_back({static_cast<char*>(to), static_cast<const char*>(from), bytes, valid, pc});
  ++mine.uncommitted;
  if (state_->options.count) {
    if (valid) log(source, bytes, false, false, pc);
    log(target, bytes, true, true, pc ^ 0x80000000);  // the same instruction's other half
  }
}

void Block::copy_wait(int groups) {
  Lane& mine = lane();
  size_t done = 0, finished_groups = 0;
  while (mine.groups.size() - finished_groups > static_cast<size_t>(groups)) done += mine.groups[finished_groups++];
  for (size_t i = 0; i < done; ++i) {
    const Copy& copy = mine.copies[i];
    if (copy.valid) std::memcpy(copy.to, copy.from, copy.bytes);
    else std::memset(copy.to, 0, copy.bytes);
    shared_access(reinterpret_cast<uintptr_t>(copy.to), copy.bytes, Kind::finish_copy, copy.pc);
  }
  mine.copies.erase(mine.copies.begin(), mine.copies.begin() + static_cast<std::ptrdiff_t>(done));
  mine.groups.erase(mine.groups.begin(), mine.groups.begin() + static_cast<std::ptrdiff_t>(finished_groups));
}

void Block::log(uintptr_t address, unsigned width, bool write, bool shared, uint32_t pc) {
  if (!shared)
    for (uintptr_t word = address / 4; word <= (address + width - 1) / 4; ++word)
      last_region_->touched[word - last_region_->begin / 4].fetch_or(write ? kWritten : kRead,
                                                                     std::memory_order_relaxed);
  Instruction& instruction = log_[thread_ / kLanes][pc];
  const int lane = thread_ % kLanes;
  instruction.shared = shared, instruction.write = write, instruction.width = static_cast<int>(width);
  const uint32_t nth = instruction.count[lane]++;
  if (instruction.requests.size() <= nth) instruction.requests.resize(nth + 1);
  instruction.requests[nth].lanes |= 1u << lane;
  instruction.requests[nth].address[lane] = address;
}

// Shared memory has 32 banks of 4 bytes. A request of a warp is processed 128 bytes at a time: all lanes, or half or
// a quarter of them. One pass accesses each bank once; lanes that read the same word share the access.
int64_t Block::shared_passes(const Request& request, int width, int64_t* least) const {
  const int lanes_a_phase = width <= 4 ? 32 : width == 8 ? 16 : 8;
  int64_t passes = 0;
  *least = 0;
  for (int begin = 0; begin < kLanes; begin += lanes_a_phase) {
    std::array<std::vector<uintptr_t>, 32> words;
    size_t most = 0;
    for (int lane = begin; lane < begin + lanes_a_phase; ++lane) {
      if (!(request.lanes >> lane & 1)) continue;
      for (uintptr_t word = request.address[lane] / 4; word <= (request.address[lane] + width - 1) / 4; ++word) {
        auto& bank = words[word % 32];
        if (std::find(bank.begin(), bank.end(), word) == bank.end()) bank.push_back(word);
        most = std::max(most, bank.size());
      }
    }
    passes += static_cast<int64_t>(most), *least += most > 0;
  }
  return passes;
}

void Block::flush_log(int w) {
  if (!state_->options.count) return;
  for (auto& [pc, instruction] : log_[w]) {
    Waste waste{};
    for (const Request& request : instruction.requests) {
      if (instruction.shared) {
        int64_t least;
        const int64_t passes = shared_passes(request, instruction.width, &least);
        ++count.shared_requests;
        count.shared_passes += passes;
        waste.bank_conflicts += passes - least;
        continue;
      }
      std::vector<uintptr_t> sectors;
      int64_t bytes = 0;
      for (int lane = 0; lane < kLanes; ++lane) {
        if (!(request.lanes >> lane & 1)) continue;
        bytes += instruction.width;
        for (uintptr_t s = request.address[lane] / 32; s <= (request.address[lane] + instruction.width - 1) / 32; ++s)
          sectors.push_back(s);
      }
      std::sort(sectors.begin(), sectors.end());
      const int64_t distinct = std::unique(sectors.begin(), sectors.end()) - sectors.begin();
      (instruction.write ? count.global_write_bytes : count.global_read_bytes) += bytes;
      (instruction.write ? count.global_write_sectors : count.global_read_sectors) += distinct;
      waste.sectors += std::max<int64_t>(0, distinct - (bytes + 31) / 32);
    }
    count.bank_conflicts += waste.bank_conflicts;
    if (waste.bank_conflicts || waste.sectors) {
      Waste& total = counters_->waste[pc & 0x7fffffff];
      total.bank_conflicts += waste.bank_conflicts, total.sectors += waste.sectors;
    }
  }
  log_[w].clear();
}

}  // namespace gptcore::simt

// Hooks that g++ -fsanitize=thread calls before each access to memory that threads may share. The sanitizer's runtime
// is neither used nor linked.
using gptcore::simt::module_offset;
using gptcore::simt::running;

#define GPTCORE_ACCESS(width, write, aligned)                                                                \
  {                                                                                                          \
    if (gptcore::simt::Block* block = running)                                                               \
      block->access(reinterpret_cast<uintptr_t>(p), width, write, module_offset(__builtin_return_address(0)), \
                    aligned);                                                                                \
  }
#define GPTCORE_CALLBACKS(width)                                                   \
  void __tsan_read##width(void* p) GPTCORE_ACCESS(width, false, true)              \
  void __tsan_write##width(void* p) GPTCORE_ACCESS(width, true, true)              \
  void __tsan_unaligned_read##width(void* p) GPTCORE_ACCESS(width, false, false)   \
  void __tsan_unaligned_write##width(void* p) GPTCORE_ACCESS(width, true, false)

extern "C" {
GPTCORE_CALLBACKS(1)
GPTCORE_CALLBACKS(2)
GPTCORE_CALLBACKS(4)
GPTCORE_CALLBACKS(8)
GPTCORE_CALLBACKS(16)
void __tsan_read_range(void* p, size_t bytes) GPTCORE_ACCESS(static_cast<unsigned>(bytes), false, false)
void __tsan_write_range(void* p, size_t bytes) GPTCORE_ACCESS(static_cast<unsigned>(bytes), true, false)
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}
}
