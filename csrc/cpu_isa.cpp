#include "csrc/cpu_isa.h"

#if defined(GPTCORE_AMX)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <atomic>
#include <cstdlib>
#include <stdexcept>

namespace gptcore {

// Each file of kernels/cpu is compiled once for each instruction set, into a namespace of that name. The dispatch table
// is filled in that namespace, so the kernels' names resolve to those of the instruction set.
#define GPTCORE_ISA_KERNELS(isa)                                             \
  namespace isa {                                                            \
  GPTCORE_OPERATIONS(GPTCORE_DECLARE_KERNELS, GPTCORE_DECLARE_KERNELS)       \
  static Kernels all_kernels() {                                             \
    Kernels kernels{#isa};                                                   \
    GPTCORE_OPERATIONS(GPTCORE_SET_KERNELS, GPTCORE_SET_KERNELS)             \
    return kernels;                                                          \
  }                                                                          \
  }

GPTCORE_ISA_KERNELS(baseline)
#if defined(__x86_64__) && !defined(GPTCORE_BASELINE_ONLY)
GPTCORE_ISA_KERNELS(avx2)
GPTCORE_ISA_KERNELS(avx512)
GPTCORE_ISA_KERNELS(avx512_bf16)
#if defined(GPTCORE_AMX)
namespace amx_bf16 {
GPTCORE_ATTENTION(GPTCORE_DECLARE_KERNEL)
static Kernels all_kernels() {  // attention uses AMX; all others are those of avx512_bf16
  Kernels kernels = avx512_bf16::all_kernels();
  kernels.name = "amx_bf16";
  GPTCORE_ATTENTION(GPTCORE_SET_KERNEL)
  return kernels;
}
}  // namespace amx_bf16
#endif
#endif

namespace {

struct Isa {
  Kernels kernels;
  bool supported;
};

#if defined(GPTCORE_AMX)
// Requests permission to use AMX, which Linux grants per process (arch_prctl).
bool may_use_amx() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  constexpr unsigned kAmxBf16 = 1u << 22, kAmxTile = 1u << 24;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d & kAmxBf16) || !(d & kAmxTile)) return false;
  constexpr int kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM of <asm/prctl.h>
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}
#endif

const std::vector<Isa>& isas() {
  static const std::vector<Isa> all = [] {
    std::vector<Isa> found = {{baseline::all_kernels(), true}};
#if defined(__x86_64__) && !defined(GPTCORE_BASELINE_ONLY)
    __builtin_cpu_init();  // __builtin_cpu_supports also checks that the operating system saves the registers
    bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                  __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    found.push_back({avx2::all_kernels(), avx2});
    found.push_back({avx512::all_kernels(), avx512});
    bool avx512_bf16 = avx512 && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni");
    found.push_back({avx512_bf16::all_kernels(), avx512_bf16});
#if defined(GPTCORE_AMX)
    found.push_back({amx_bf16::all_kernels(), avx512_bf16 && may_use_amx()});
#endif
#endif
    return found;
  }();
  return all;
}

std::atomic<const Kernels*> in_use{nullptr};

}  // namespace

std::vector<std::string> compiled_isas() {
  std::vector<std::string> names;
  for (const Isa& isa : isas()) names.push_back(isa.kernels.name);
  return names;
}

std::vector<std::string> supported_isas() {
  std::vector<std::string> names;
  for (const Isa& isa : isas())
    if (isa.supported) names.push_back(isa.kernels.name);
  return names;
}

void use_isa(const std::string& name) {
  std::string known;
  for (const Isa& isa : isas()) {
    if (isa.kernels.name == name) {
      if (!isa.supported) throw std::invalid_argument("this CPU does not have the instruction set " + name);
      in_use = &isa.kernels;
      return;
    }
    known += (known.empty() ? "" : ", ") + std::string(isa.kernels.name);
  }
  throw std::invalid_argument("unknown CPU instruction set '" + name + "', expected one of: " + known);
}

const Kernels& cpu_kernels() {
  if (!in_use) use_isa(supported_isas().back());
  return *in_use;
}

}  // namespace gptcore
