#include "csrc/simt/fiber.h"

#include <sys/mman.h>
#include <unistd.h>

#include <new>

#ifdef GPTCORE_SIMT_SWITCH
asm(R"(
.text
.globl gptcore_simt_switch
.hidden gptcore_simt_switch
.type gptcore_simt_switch, @function
gptcore_simt_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size gptcore_simt_switch, . - gptcore_simt_switch
)");
#endif

namespace gptcore::simt {

Stacks::~Stacks() {
  if (memory_) munmap(memory_, count_ * kBytes);
}

void Stacks::reserve(int count) {
  if (count <= count_) return;
  if (memory_) munmap(memory_, count_ * kBytes);
  void* memory =
      mmap(nullptr, count * kBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  memory_ = memory == MAP_FAILED ? nullptr : static_cast<char*>(memory);
  count_ = memory_ ? count : 0;
  if (!memory_) throw std::bad_alloc();
  for (int i = 0; i < count; ++i) mprotect(begin(i), sysconf(_SC_PAGESIZE), PROT_NONE);
}

}  // namespace gptcore::simt
