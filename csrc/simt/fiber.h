// A fiber: its own stack and saved registers. The only operation is a switch to another fiber.
#pragma once

#include <cstddef>

#if defined(__x86_64__) && !defined(GPTCORE_SIMT_UCONTEXT)
#define GPTCORE_SIMT_SWITCH 1
#else
#include <ucontext.h>
#endif

namespace gptcore::simt {

#ifdef GPTCORE_SIMT_SWITCH
struct Fiber { void* stack_pointer; };
// Pushes the registers that a function must keep, changes stacks, pops those of the other.
extern "C" __attribute__((visibility("hidden"))) void gptcore_simt_switch(void** save, void* load);
inline void switch_fiber(Fiber& from, Fiber& to) { gptcore_simt_switch(&from.stack_pointer, to.stack_pointer); }

inline void start_fiber(Fiber& fiber, char* stack_end, void (*entry)()) {
  void** top = reinterpret_cast<void**>(stack_end) - 2;  // 16-byte aligned, as the ABI requires at the call of `entry`
  top[1] = nullptr;                                      // the address to which `entry` never returns
  top[0] = reinterpret_cast<void*>(entry);
  for (int i = 1; i <= 6; ++i) top[-i] = nullptr;
  fiber.stack_pointer = top - 6;
}
#else
struct Fiber { ucontext_t context; };
inline void switch_fiber(Fiber& from, Fiber& to) { swapcontext(&from.context, &to.context); }
inline void start_fiber(Fiber& fiber, char* stack_begin, size_t stack_bytes, void (*entry)()) {
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = stack_begin;
  fiber.context.uc_stack.ss_size = stack_bytes;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, entry, 0);
}
#endif

// Stacks for `count` fibers, with an unmapped page below each.
class Stacks {
 public:
  static constexpr size_t kBytes = 256 * 1024;  // a kernel's local variables are registers on a GPU: they are few
  ~Stacks();
  void reserve(int count);
  char* begin(int i) const { return memory_ + i * kBytes; }
  void start(Fiber& fiber, int i, void (*entry)()) const {
    // Stack tops that differ in their low bits do not compete for the same sets of the cache.
    const size_t used = kBytes - (i % 64) * 64;
#ifdef GPTCORE_SIMT_SWITCH
    start_fiber(fiber, begin(i) + used, entry);
#else
    start_fiber(fiber, begin(i) + 4096, used - 4096, entry);
#endif
  }

 private:
  char* memory_ = nullptr;
  int count_ = 0;
};

}  // namespace gptcore::simt
