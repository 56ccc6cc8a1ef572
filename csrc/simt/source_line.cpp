// Finds the source lines of an instruction, by addr2line of binutils.
#include <dlfcn.h>
#include <link.h>

#include <cstdio>
#include <cstring>

#include "csrc/simt/model.h"

namespace gptcore::simt {
namespace {

#ifndef GPTCORE_SOURCE_DIR
#define GPTCORE_SOURCE_DIR ""
#endif
constexpr const char* kSourceFolder = GPTCORE_SOURCE_DIR;  // reports name files within it

struct Module {
  std::string path;
  uintptr_t base = 0, begin = UINTPTR_MAX, end = 0;

  Module() {
    dl_iterate_phdr([](dl_phdr_info* info, size_t, void* self) { return static_cast<Module*>(self)->find_in(*info); },
                    this);
    Dl_info info;
    if (dladdr(reinterpret_cast<void*>(&source_line), &info)) path = info.dli_fname;
  }
  int find_in(const dl_phdr_info& info) {
    const uintptr_t here = reinterpret_cast<uintptr_t>(&source_line);
    uintptr_t first = UINTPTR_MAX, last = 0;
    for (int i = 0; i < info.dlpi_phnum; ++i) {
      const auto& segment = info.dlpi_phdr[i];
      if (segment.p_type != PT_LOAD) continue;
      first = std::min<uintptr_t>(first, info.dlpi_addr + segment.p_vaddr);
      last = std::max<uintptr_t>(last, info.dlpi_addr + segment.p_vaddr + segment.p_memsz);
    }
    if (here < first || here >= last) return 0;
    base = info.dlpi_addr, begin = first, end = last;
    return 1;
  }
};
const Module module;

}  // namespace

uint32_t module_offset(const void* address) {
  return static_cast<uint32_t>(reinterpret_cast<uintptr_t>(address) - module.base);
}
bool in_module(uintptr_t address) { return address >= module.begin && address < module.end; }

std::string source_line(uint32_t pc) {
  char offset[32];
  std::snprintf(offset, sizeof offset, "0x%x", (pc & 0x7fffffff) - 1);  // pc is where the call returns to
  std::string quoted;
  for (char c : module.path) quoted += c == '\'' ? std::string("'\\''") : std::string(1, c);
  std::string lines;
  if (FILE* pipe = popen(("addr2line -i -e '" + quoted + "' " + offset + " 2>/dev/null").c_str(), "r")) {
    char line[4096];
    while (std::fgets(line, sizeof line, pipe)) {
      line[std::strcspn(line, " \n")] = 0;  // without "(discriminator 2)"
      if (line[0] == '?' || std::strstr(line, "ptx.cuh:") || std::strstr(line, "csrc/launch.h:")) continue;
      const bool ours = !std::strncmp(line, kSourceFolder, std::strlen(kSourceFolder));
      lines += (lines.empty() ? "" : " < ") + std::string(line + (ours ? std::strlen(kSourceFolder) : 0));
    }
    pclose(pipe);
  }
  if (!lines.empty()) return lines;
  return module.path + "+" + offset + " (addr2line of binutils would name the line)";
}

}  // namespace gptcore::simt
