// For a decoding step, csrc/decode.cpp: the 16-bit weights of a layer norm, whose kernel reads float32.
#include "kernels/cpu/rows.h"

namespace gptcore {
namespace GPTCORE_ISA {

void widen(const WidenArgs& args) {
  with_type(args.dtype, [&](auto zero) {
    const auto* from = (const decltype(zero)*)args.from;
    for (int64_t i = 0; i < args.size; i += kLanes)
      store_up_to(args.to + i, load_up_to(from + i, args.size - i), args.size - i);
  });
}

}  // namespace GPTCORE_ISA
}  // namespace gptcore
