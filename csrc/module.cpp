// gptcore._C: the operations of csrc/operations.h, the choice of the instruction set, and information about the build.
#include <omp.h>
#include <pybind11/pybind11.h>

#include <cstdlib>
#include <sstream>

#include "csrc/cpu_isa.h"
#include "csrc/operations.h"
#ifdef GPTCORE_CUDA_ARCHS
#include "csrc/gpu/kernels.h"
#endif

using namespace gptcore;

const Kernels& gptcore::kernels_for(const TensorView& tensor, const Execution& execution) {
  if (execution.check_only) return cpu_kernels();  // not run
#ifdef GPTCORE_CUDA_ARCHS
  if (tensor.device_type == Device::cuda) {
    if (!execution.allocate)
      refuse("execution is a number of threads, expected (stream, allocate, allow_tf32) for tensors on a GPU");
    return cuda::kernels;
  }
#endif
  if (tensor.device_type != Device::cpu) refuse("a tensor is on ", tensor.device(), ", expected cpu");
  if (execution.allocate) refuse("execution is a tuple for a GPU, expected a number of threads for tensors on the CPU");
  return cpu_kernels();
}

// Returns the architectures that the CUDA kernels are compiled for.
static std::vector<std::string> cuda_archs() {
  std::vector<std::string> archs;
#ifdef GPTCORE_CUDA_ARCHS
  std::istringstream names(GPTCORE_CUDA_ARCHS);
  for (std::string name; std::getline(names, name, ',');) archs.push_back(name);
#endif
  return archs;
}
// Returns why no CUDA kernel can run here, or nullopt.
static std::optional<std::string> why_no_cuda() {
#ifdef GPTCORE_CUDA_ARCHS
  const std::string problem = cuda_problem();
  if (problem.empty()) return std::nullopt;
  std::string archs;
  for (const std::string& arch : cuda_archs()) archs += (archs.empty() ? "" : ", ") + arch;
  return "built for " + archs + "; " + problem;
#else
  return "not built: " GPTCORE_CUDA_PROBLEM;
#endif
}

// Checks the tensors among these objects, and in lists and tuples of them.
static void check_storage(py::handle objects) {
  for (py::handle object : objects) {
    if (py::isinstance<py::tuple>(object) || py::isinstance<py::list>(object)) check_storage(object);
    else py::detail::type_caster<TensorView>::check_storage(object);
  }
}

PYBIND11_MODULE(_C, m, py::mod_gil_not_used()) {
  m.doc() = "The native kernels of gptcore. Use gptcore.ops, which checks, differentiates and chooses among backends.";
  if (const char* isa = std::getenv("GPTCORE_CPU_ISA")) {
    try {
      use_isa(isa);
    } catch (const std::invalid_argument& error) {
      throw py::import_error("GPTCORE_CPU_ISA: " + std::string(error.what()));
    }
  }

  bind_operations(m);
  m.def("check_storage", &check_storage, py::arg("objects"));
  m.def("compiled_isas", &compiled_isas,
        "Return the CPU instruction sets that the kernels are compiled for, lowest first.");
  m.def("supported_isas", &supported_isas,
        "Return the compiled instruction sets that this CPU supports, lowest first.");
  m.def("cpu_isa", [] { return std::string(cpu_kernels().name); }, "Return the instruction set in use.");
  m.def("use_cpu_isa", &use_isa, py::arg("name"), "Use this instruction set from now on. Raises ValueError.");
  m.def("cuda_archs", &cuda_archs, "Return the architectures of the CUDA kernels, such as sm_80; empty if not built.");
  m.def("cuda_problem", &why_no_cuda, "Return why no CUDA kernel can run on this machine, or None. Needs no driver.");
  m.def("build_info", [] {
    py::dict info;
    info["version"] = GPTCORE_VERSION;
    info["compiler"] = GPTCORE_COMPILER;
    info["openmp"] = _OPENMP;
#ifdef GPTCORE_CUDA_ARCHS
    info["nvcc"] = GPTCORE_NVCC_VERSION;
#endif
    return info;
  });
}
