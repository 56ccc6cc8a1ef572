// The instruction sets that the CPU kernels are compiled for, and the choice among them at run time.
#pragma once

#include <string>
#include <vector>

#include "kernels/kernels.h"

namespace gptcore {

std::vector<std::string> compiled_isas();   // lowest first
std::vector<std::string> supported_isas();  // the compiled ones that this CPU supports, lowest first
void use_isa(const std::string& name);      // throws std::invalid_argument
const Kernels& cpu_kernels();               // of the instruction set in use; the highest supported by default

}  // namespace gptcore
