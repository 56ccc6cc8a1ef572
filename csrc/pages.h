// Fresh memory in pages of 2 MB. The first touch of a page of 4 KB costs more than the kernel's work on it: 18 ms instead
// of 6 ms to fill 50 MB on the development machine.
#pragma once

#include <sys/mman.h>

#include <optional>

#include "csrc/tensor_view.h"

namespace gptcore {

// For an output that is about to be written for the first time. A hint: where the system has no such pages, no harm.
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
