// The GPU kernels of this module (or of the simulator), and the GPUs that can run them.
#pragma once

#include <string>
#include <vector>

#include "kernels/kernels.h"

namespace gptcore {
namespace GPTCORE_GPU {

extern const Kernels kernels;

GPTCORE_OPERATIONS(GPTCORE_DECLARE_KERNELS, GPTCORE_SKIP)

}  // namespace GPTCORE_GPU

// The reason why no kernel can run on this machine; empty if one can. Needs no driver.
std::string cuda_problem();

}  // namespace gptcore
