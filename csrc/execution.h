// Execution (threads or stream) of a call, the choice of its kernels, and their scratch memory.
#pragma once

#include <cstdlib>
#include <new>
#include <optional>
#include <utility>

#include "csrc/checks.h"

namespace gptcore {

// In Python: the number of threads on the CPU; on a GPU a tuple (stream, allocate, allow_tf32): the handle of a CUDA
// stream, a function from a number of bytes to a uint8 tensor, and torch.backends.cuda.matmul.allow_tf32. Or None: the
// arguments are checked as for a GPU, and nothing is run.
struct Execution {
  int num_threads = 1;
  void* stream = nullptr;
  pybind11::object allocate;  // null on the CPU
  bool allow_tf32 = false;
  bool check_only = false;

  bool on_gpu() const { return allocate || check_only; }
};

// Returns the kernels for the device of a tensor. Throws ValueError if this module has no kernels for it.
const Kernels& kernels_for(const TensorView& tensor, const Execution& execution);

// Scratch memory on the CPU, aligned to a cache line. Each thread keeps its largest buffer for the next call: the page
// faults of fresh memory take longer than a small kernel.
class Scratch {
 public:
  Scratch() = default;
  explicit Scratch(size_t bytes) {
    bytes = bytes ? (bytes + 63) / 64 * 64 : 64;
    if (kept().bytes_ >= bytes) {
      swap(kept());
      return;
    }
    memory_ = static_cast<char*>(std::aligned_alloc(64, bytes));
    if (!memory_) throw std::bad_alloc();  // MemoryError in Python
    bytes_ = bytes;
  }
  ~Scratch() {
    if (bytes_ > kept().bytes_ && bytes_ <= kMostKept) swap(kept());
    std::free(memory_);
  }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  void swap(Scratch& other) { std::swap(memory_, other.memory_), std::swap(bytes_, other.bytes_); }
  char* data() const { return memory_; }

 private:
#ifdef __SANITIZE_ADDRESS__
  static constexpr size_t kMostKept = 0;  // so that AddressSanitizer reports any access beyond the requested bytes
#else
  static constexpr size_t kMostKept = 32 << 20;
#endif
  static Scratch& kept() {
    static thread_local Scratch last;
    return last;
  }
  char* memory_ = nullptr;
  size_t bytes_ = 0;
};

// Scratch memory of one call. On a GPU it is from PyTorch's caching allocator, which reuses it only on the same stream,
// after this call.
class Workspace {
 public:
  explicit Workspace(size_t bytes) { Scratch(bytes).swap(scratch_); }
  Workspace(const Execution& execution, const TensorView& like, size_t bytes) {
    if (!execution.allocate) {
      Scratch(bytes).swap(scratch_);
      return;
    }
    if (bytes == 0) return;
    tensor_ = execution.allocate(bytes);
    view_ = tensor_.cast<TensorView>();
    check_device(*view_, "workspace", like);
    check_contiguous(*view_, "workspace");
    if (view_->bytes() < static_cast<int64_t>(bytes))
      refuse("the workspace has ", view_->bytes(), " bytes, expected ", bytes);
  }
  template <class T = char>
  T* as() const { return view_ ? view_->as<T>() : reinterpret_cast<T*>(scratch_.data()); }
  const std::optional<TensorView>& view() const { return view_; }

 private:
  Scratch scratch_;
  pybind11::object tensor_;
  std::optional<TensorView> view_;
};

}  // namespace gptcore

namespace pybind11::detail {

template <>
struct type_caster<gptcore::Execution> {
  PYBIND11_TYPE_CASTER(gptcore::Execution, const_name("Execution"));

  bool load(handle source, bool) {
    if (source.is_none()) {
      value.check_only = true;
      return true;
    }
    if (!isinstance<tuple>(source)) {
      if (!PyLong_Check(source.ptr())) throw type_error("execution is neither a number of threads, nor a tuple, nor None");
      value.num_threads = gptcore::check_threads(source.cast<int64_t>());
      return true;
    }
    auto parts = reinterpret_borrow<tuple>(source);
    if (parts.size() != 3) throw type_error("execution has " + std::to_string(parts.size()) + " parts, expected 3");
    value.stream = reinterpret_cast<void*>(parts[0].cast<uintptr_t>());
    value.allocate = parts[1];
    value.allow_tf32 = parts[2].cast<bool>();
    return true;
  }
  static handle cast(const gptcore::Execution&, return_value_policy, handle) = delete;
};

}  // namespace pybind11::detail
