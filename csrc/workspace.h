// Scratch memory of one call, aligned to a cache line and freed with it.
#pragma once

#include <cstdlib>
#include <memory>
#include <new>

namespace gptcore {

template <class T = char>
std::unique_ptr<T[], decltype(&std::free)> workspace(size_t count) {
  size_t bytes = (count * sizeof(T) + 63) / 64 * 64;
  void* memory = std::aligned_alloc(64, bytes ? bytes : 64);
  if (!memory) throw std::bad_alloc();  // MemoryError in Python
  return {static_cast<T*>(memory), &std::free};
}

}  // namespace gptcore
