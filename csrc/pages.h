// Asks for huge pages (2 MB) in fresh memory. Page faults of 4 KB pages cost more than the kernel's work on them.
#pragma once

#include <sys/mman.h>

#include <optional>

#include "csrc/tensor_view.h"

namespace gptcore {

// For an output that is about to be written for the first time. A hint, which the system may ignore.
inline void prefer_huge_pages(const TensorView& out) {
#ifdef MADV_HUGEPAGE
  constexpr uintptr_t kPage = 2 << 20;
  if (out.device_type != Device::cpu || out.bytes() < static_cast<int64_t>(2 * kPage)) return;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(out.data) + kPage - 1) / kPage * kPage;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(out.data) + out.bytes()) / kPage * kPage;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}
inline void prefer_huge_pages(const std::optional<TensorView>& out) {
  if (out) prefer_huge_pages(*out);
}

}  // namespace gptcore
