// The tensors that a launch may access, and the state of each piece of their memory.
#pragma once

#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <string>
#include <vector>

namespace gptcore::simt {

// Shadow state of a piece of memory: its last write and the reads since. A code identifies the accessor: thread + 1, a
// whole warp, or several. A run is one execution of one block; a stamp is the time of a warp's last barrier.
struct Cell {
  uint32_t write_run, read_run;
  uint32_t write_stamp, read_stamp;
  uint16_t writer, reader;
  uint32_t write_pc, read_pc;
};
constexpr uint16_t kSeveral = 0xffff;     // threads of several warps, or of several blocks
constexpr uint16_t kReaderSet = 0xfffe;   // several readers; the stamp identifies the set
constexpr uint16_t kMbarrier = 0x1000;    // an mbarrier lies there
constexpr uint16_t kAgent = 0x2000;       // + index: an asynchronous unit
constexpr uint16_t kWholeWarp = 0x4000;   // + warp
constexpr uint16_t kPendingCopy = 0x8000; // + thread + 1: an asynchronous copy that is not waited for yet

struct Tensor {
  std::string name;
  uintptr_t begin, end;  // the bytes between its first and its last element
  int item;              // bytes
  std::vector<int64_t> shape, strides;
  bool written;

  Tensor(std::string name, const void* data, int item, std::vector<int64_t> shape, std::vector<int64_t> strides,
         bool written);
  bool contains(uintptr_t address, int64_t bytes) const;  // all bytes are of elements
  std::string element(uintptr_t address) const;           // "out[0, 3, 1]"

 private:
  struct Dim { int64_t size, stride; };
  std::vector<Dim> dims_;  // in bytes, the furthest apart first, without those that need no step
  int64_t run_;            // bytes that lie together in the last dimensions
};

// Overlapping tensors, such as slices of one buffer, share shadow state.
struct Region {
  uintptr_t begin, end;
  std::vector<const Tensor*> tensors;
  int granule;  // bytes of a cell
  std::unique_ptr<Cell[], decltype(&std::free)> cells{nullptr, &std::free};  // null if it is read only
  std::vector<std::atomic<uint8_t>> touched;  // by the launch, where it is counted: kRead | kWritten for each 4 bytes
};
constexpr uint8_t kRead = 1, kWritten = 2;

// Registers tensors for the launches of this thread, until it is destroyed. Later launches may read what earlier ones
// wrote.
class Tensors {
 public:
  explicit Tensors(std::vector<Tensor> tensors);
  ~Tensors();
  Tensors(const Tensors&) = delete;

  static Tensors* current();
  Region* find(uintptr_t address) const;
  void forget_touched() const;
  int64_t touched_bytes(uint8_t how) const;
  std::string describe_outside(uintptr_t address) const;  // of an address outside of all tensors

 private:
  std::vector<Tensor> tensors_;
  mutable std::vector<Region> regions_;
  Tensors* previous_;
};

}  // namespace gptcore::simt
