#include "csrc/simt/clocks.h"

#include <algorithm>

namespace gptcore::simt {

void join(Clock& into, const Clock& from) {
  for (size_t i = 0; i < into.size(); ++i) into[i] = std::max(into[i], from[i]);
}

void Clocks::release(int thread, Clock& into, uint32_t next_stamp) {
  const uint32_t mine = std::max(into[thread], next_stamp);
  join(into, rows_[thread]);
  into[thread] = mine;
  stamps_[thread] = next_stamp;
}

void Clocks::acquire(int thread, const Clock& from) {
  join(rows_[thread], from);
  rows_[thread][thread] = UINT32_MAX;
}

void Clocks::acquire(int thread, int entry, uint32_t stamp) {
  rows_[thread][entry] = std::max(rows_[thread][entry], stamp);
}

void Clocks::barrier(int first, int count, uint32_t next_stamp) {
  Clock all = empty();
  for (int t = first; t < first + count; ++t) release(t, all, next_stamp);
  for (int t = first; t < first + count; ++t) acquire(t, all);
}

uint32_t ReaderSets::pair(Reader a, Reader b) {
  const std::tuple key{a.code, a.stamp, b.code, b.stamp};
  if (key == last_pair_) return last_pair_set_;
  const auto [found, is_new] = of_pair_.try_emplace(key, static_cast<uint32_t>(sets_.size()));
  if (is_new) sets_.push_back({a, b});
  last_pair_ = key;
  return last_pair_set_ = found->second;
}

uint32_t ReaderSets::with(uint32_t set, Reader reader) {
  const std::tuple key{set, reader.code, reader.stamp};
  if (key == last_extended_) return last_extended_set_;
  const auto [found, is_new] = extended_.try_emplace(key, static_cast<uint32_t>(sets_.size()));
  if (is_new) {
    std::vector<Reader> readers{reader};
    bool contained = false;
    for (const Reader& other : sets_[set]) {
      if (other.code != reader.code) readers.push_back(other);
      else contained = other.stamp == reader.stamp;
    }
    if (contained) found->second = set;
    else sets_.push_back(std::move(readers));
  }
  last_extended_ = key;
  return last_extended_set_ = found->second;
}

}  // namespace gptcore::simt
