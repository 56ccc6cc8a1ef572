// Included by every file of an operation; declares the functions that bind the operations in a module.
//
// csrc/<name>.cpp checks the tensors of the operation <name>, fills in the kernel's arguments, runs the kernel without
// the GIL, and binds the functions for Python. Outputs are allocated by the caller, on the device of the inputs.
// Functions throw std::invalid_argument or pybind11::value_error, which are ValueError in Python.
#pragma once

#include <pybind11/stl.h>

#include <optional>
#include <vector>

#include "csrc/checks.h"
#include "csrc/device_tensors.h"
#include "csrc/execution.h"
#include "csrc/pages.h"

namespace gptcore {

namespace py = pybind11;
using OptionalView = std::optional<TensorView>;

#define GPTCORE_DECLARE_BINDING(name, KERNELS) void bind_##name(pybind11::module_& m);
GPTCORE_OPERATIONS(GPTCORE_DECLARE_BINDING, GPTCORE_DECLARE_BINDING)

// Binds the operations in a module, which defines kernels_for. The simulator has only the operations with GPU kernels.
inline void bind_operations(pybind11::module_& m) {
#define GPTCORE_BIND(name, KERNELS) bind_##name(m);
#ifdef GPTCORE_SIMT
  GPTCORE_OPERATIONS(GPTCORE_BIND, GPTCORE_SKIP)
#else
  GPTCORE_OPERATIONS(GPTCORE_BIND, GPTCORE_BIND)
#endif
}

}  // namespace gptcore
