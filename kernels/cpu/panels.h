// Reading a matrix of weights once, at the rate of memory.
//
// A product that has a row of weights in each lane reads kLanes rows at a time, more than the prefetchers of CPUs follow.
// Each thread therefore prefetches what it reads next, in the order of addresses, into the second level of the cache; in
// the first level it would evict what is being multiplied.
#pragma once

#include "kernels/cpu/tiles.h"

namespace gptcore {
namespace GPTCORE_ISA {
namespace {

constexpr int64_t kAhead = 1 << 17;  // bytes

// A panel of rows is multiplied in pieces: some bytes of each row. Fetches the pieces after the first one, and then the
// first piece of the next panel; nothing by default.
class Prefetch {
 public:
  Prefetch() = default;
  // `rows` rows of `size` bytes, at a distance of `stride` bytes. `next` may be null.
  Prefetch(const char* panel, const char* next, int64_t rows, int64_t size, int64_t stride)
      : panel_(panel), next_(next), rows_(rows), size_(size), stride_(stride), pieces_((rows * size + kAhead - 1) / kAhead) {
    if (stride == size && pieces_ == 1) size_ = stride_ = rows * size, rows_ = 1;
    width_ = ((size_ + pieces_ - 1) / larger(pieces_, 1) + 63) / 64 * 64;
  }
  // Fetches as many bytes as are multiplied meanwhile.
  template <int64_t kBytes>
  __attribute__((always_inline)) void fetch() {
    if (left_ < kBytes) return fetch_some(kBytes);
    GPTCORE_UNROLL for (int64_t i = 0; i < kBytes; i += 64) __builtin_prefetch((const void*)(at_ + i), 0, 2);
    at_ += kBytes, left_ -= kBytes;
  }
  __attribute__((noinline)) void fetch_some(int64_t bytes) {
    while (bytes > 0) {
      if (left_ <= 0 && !begin_row()) return;
      const int64_t here = smaller(bytes, left_);
      for (int64_t i = 0; i < here; i += 64) __builtin_prefetch((const void*)(at_ + i), 0, 2);
      at_ += here, left_ -= here, bytes -= here;
    }
  }

 private:
  bool begin_row() {
    if (row_ == rows_) row_ = 0, ++piece_;
    const char* panel = piece_ < pieces_ ? panel_ : piece_ == pieces_ ? next_ : nullptr;
    if (!panel) return false;
    const int64_t column = piece_ < pieces_ ? piece_ * width_ : 0;
    at_ = (uintptr_t)panel + row_++ * stride_ + column, left_ = smaller(width_, size_ - column);
    return true;
  }

  const char *panel_ = nullptr, *next_ = nullptr;
  int64_t rows_ = 0, size_ = 0, stride_ = 0, pieces_ = 0, width_ = 0;
  int64_t piece_ = 1, row_ = 0, left_ = 0;
  uintptr_t at_ = 0;
};

// Takes panels in a parallel region: long runs first, which are read faster, and then shorter ones, so that all threads
// end at the same time. Calls body(panel, next panel of this thread); `taken` is shared, at first 0.
// After the last one, next panel is at least `panels`.
template <class Body>
GPTCORE_INLINE void take_panels(int64_t& taken, int64_t panels, int num_threads, Body body) {
  int64_t end = 0;
  const auto take = [&] {  // the first panel of a run
    int64_t begin = __atomic_load_n(&taken, __ATOMIC_RELAXED);
    do end = begin + 1 + (panels - begin) / (4 * num_threads);
    while (!__atomic_compare_exchange_n(&taken, &begin, end, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED));
    return begin;
  };
  for (int64_t panel = take(), next; panel < panels; panel = next) {
    next = panel + 1 < end ? panel + 1 : take();
    body(panel, next);
  }
}

}  // namespace
}  // namespace GPTCORE_ISA
}  // namespace gptcore
