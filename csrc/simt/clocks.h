// Vector clocks: which accesses of a block happen before the present one, where more than the barriers of the block and
// of its warps order them (mbarriers, named barriers, asynchronous copies and products).
//
// Each thread has a clock with one entry for each thread and for each agent, that is, each asynchronous unit: accesses
// of u with a stamp below clock[u] happen before the present. A release copies the clock of a thread into that of a
// barrier, and later accesses of this thread get a higher stamp; an acquire joins the clock of the barrier.
#pragma once

#include <cstdint>
#include <map>
#include <tuple>
#include <vector>

namespace gptcore::simt {

constexpr int kMaxAgents = 192;
using Clock = std::vector<uint32_t>;

void join(Clock& into, const Clock& from);  // the later of each entry

class Clocks {
 public:
  // Every thread has seen what was before `before`, and the accesses of its own warp before warp_stamp(warp).
  template <class WarpStamp>
  void start(int threads, uint32_t before, WarpStamp warp_stamp) {
    threads_ = threads, agents_ = 0;
    rows_.assign(threads, Clock(threads + kMaxAgents, 0));
    stamps_.resize(threads);
    for (int t = 0; t < threads; ++t) {
      stamps_[t] = warp_stamp(t / 32);
      for (int u = 0; u < threads; ++u) rows_[t][u] = u / 32 == t / 32 ? stamps_[t] : before;
      rows_[t][t] = UINT32_MAX;  // its own accesses happen in order
    }
  }
  Clock empty() const { return Clock(threads_ + kMaxAgents, 0); }
  int threads() const { return threads_; }
  int new_agent() { return threads_ + agents_++; }  // its entry
  bool has_agents_left() const { return agents_ < kMaxAgents; }

  uint32_t stamp(int thread) const { return stamps_[thread]; }  // of its accesses now
  const Clock& seen(int thread) const { return rows_[thread]; }
  void release(int thread, Clock& into, uint32_t next_stamp);
  void acquire(int thread, const Clock& from);
  void acquire(int thread, int entry, uint32_t stamp);
  void barrier(int first, int count, uint32_t next_stamp);  // of these threads
  void advance(int thread, uint32_t next_stamp) { stamps_[thread] = next_stamp; }

 private:
  int threads_ = 0, agents_ = 0;
  std::vector<Clock> rows_;
  std::vector<uint32_t> stamps_;
};

// Several accesses of one place that nothing orders. Sets are shared by all places that were read alike.
struct Reader {
  uint16_t code;
  uint32_t stamp, pc;
};
class ReaderSets {
 public:
  void clear() {
    sets_.clear(), of_pair_.clear(), extended_.clear();
    last_pair_ = {}, last_extended_ = {};  // no code is 0
  }
  uint32_t pair(Reader a, Reader b);
  uint32_t with(uint32_t set, Reader reader);  // the set with this reader, whose earlier accesses it replaces
  const std::vector<Reader>& readers(uint32_t set) const { return sets_[set]; }

 private:
  std::vector<std::vector<Reader>> sets_;
  std::map<std::tuple<uint16_t, uint32_t, uint16_t, uint32_t>, uint32_t> of_pair_;
  std::map<std::tuple<uint32_t, uint16_t, uint32_t>, uint32_t> extended_;
  // The last result: a tile's places are read one after the other, all alike.
  std::tuple<uint16_t, uint32_t, uint16_t, uint32_t> last_pair_{};
  std::tuple<uint32_t, uint16_t, uint32_t> last_extended_{};
  uint32_t last_pair_set_ = 0, last_extended_set_ = 0;
};

}  // namespace gptcore::simt
