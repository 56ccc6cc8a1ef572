// gptcore._simt: the CUDA kernels in a GPU simulator that checks and counts their memory accesses.
#include "csrc/gpu/kernels.h"
#include "csrc/operations.h"
#include "csrc/simt/hopper_examples.h"
#include "csrc/simt/model.h"
#include "kernels/cuda/policy.h"

#include <pybind11/stl.h>

using namespace gptcore;

// In examples.cu.
namespace gptcore::GPTCORE_GPU {
std::vector<std::string> examples();
std::string rule_of(const std::string& example);
void run_example(const std::string& name, bool broken, const float* x, float* out);
void run_fragments(const std::string& op, const uint32_t* in, uint32_t* out);
}  // namespace gptcore::GPTCORE_GPU

const Kernels& gptcore::kernels_for(const TensorView& tensor, const Execution& execution) {
  if (tensor.device_type != Device::cpu) refuse("a tensor is on ", tensor.device(), ", expected cpu");
  if (!execution.allocate)
    refuse("execution is a number of threads, expected (stream, allocate, allow_tf32), as on a GPU");
  return GPTCORE_GPU::kernels;
}

namespace {

py::dict as_dict(const simt::KernelCounters& kernel) {
  const simt::Counters& c = kernel.total;
  py::dict d;
  d["launches"] = c.launches, d["blocks"] = c.blocks;
  d["barriers"] = c.barriers, d["warp_barriers"] = c.warp_barriers, d["shuffles"] = c.shuffles;
  d["mma"] = c.mma, d["load_matrix"] = c.load_matrix, d["copies"] = c.copies, d["special"] = c.special;
  d["global_read_bytes"] = c.global_read_bytes, d["global_write_bytes"] = c.global_write_bytes;
  d["global_read_sectors"] = c.global_read_sectors, d["global_write_sectors"] = c.global_write_sectors;
  d["global_distinct_read_bytes"] = c.global_distinct_read_bytes;
  d["global_distinct_write_bytes"] = c.global_distinct_write_bytes;
  d["shared_requests"] = c.shared_requests, d["shared_passes"] = c.shared_passes;
  d["bank_conflicts"] = c.bank_conflicts;
  d["wgmma_flops"] = c.wgmma_flops, d["wgmma_shared_bytes"] = c.wgmma_shared_bytes;
  d["bulk_bytes"] = c.bulk_bytes, d["mbarrier_waits"] = c.mbarrier_waits;
  return d;
}

void configure(const std::string& order, uint64_t seed, int threads, bool count, int compute_capability) {
  if (threads < 0 || threads > 4096) refuse("threads is ", threads, ", expected 0 (OpenMP's default) to 4096");
  simt::Options next;
  if (order == "forward") next.order = simt::Order::forward;
  else if (order == "reverse") next.order = simt::Order::reverse;
  else if (order == "random") next.order = simt::Order::random;
  else refuse("order is '", order, "', expected forward, reverse or random");
  if (compute_capability != 80 && compute_capability != 90)
    refuse("compute_capability is ", compute_capability, ", expected 80 or 90");
  next.seed = seed, next.threads = threads, next.count = count, next.compute_capability = compute_capability;
  simt::options = next;
}

// The map of all of a tensor of 16-bit elements: its last dimension is the first of the map.
TensorMapArgs map_args(const TensorView& t, const std::array<int, 4>& box, int swizzle_bytes) {
  check_dtype(t, "x", DType::bfloat16, "torch.bfloat16");
  TensorMapArgs args{t.data, 4, {}, {}, {box[0], box[1], box[2], box[3]}, swizzle_bytes};
  if (t.ndim != 4) refuse("x has ", t.ndim, " dimensions, expected 4");
  for (int i = 0; i < 4; ++i) {
    args.sizes[i] = t.shape[3 - i];
    if (i > 0) args.strides[i - 1] = t.strides[3 - i] * 2;
  }
  return args;
}

void bind_hopper(py::module_& m) {
  m.def("hopper_examples", [] { return py::dict(py::cast(GPTCORE_GPU::hopper_examples())); });
  m.def("run_hopper_example", [](const std::string& name, const TensorView& x, const TensorView& y,
                                 const TensorView& out) {
    for (const TensorView* t : {&x, &y}) check_dtype(*t, "x or y", DType::bfloat16, "torch.bfloat16");
    check_dtype(out, "out", DType::float32, "torch.float32");
    check_shape(x, "x", {250, 64});
    check_shape(y, "y", {256, 64});
    check_shape(out, "out", {128, 32});
    for (const TensorView* t : {&x, &y, &out}) check_contiguous(*t, "a tensor");
    const DeviceTensors tensors{{"x", x, Access::read}, {"y", y, Access::write}, {"out", out, Access::write}};
    py::gil_scoped_release release;
    GPTCORE_GPU::run_hopper_example(name, {x.as<uint16_t>(), y.as<uint16_t>(), out.as<float>()});
  }, py::arg("name"), py::arg("x"), py::arg("y"), py::arg("out"));
  m.def("run_product", [](const TensorView& image, const TensorView& a, const TensorView& out, uint64_t a_descriptor,
                          uint64_t b_descriptor, bool a_transposed, bool b_transposed, bool from_registers) {
    const bool is_float16 = image.dtype == DType::float16;
    if (!is_float16) check_dtype(image, "image", DType::bfloat16, "torch.bfloat16 or torch.float16");
    check_dtype(a, "a", DType::int32, "torch.int32");
    check_dtype(out, "out", DType::float32, "torch.float32");
    check_shape(a, "a", {128, 4});
    check_shape(image, "image", {image.size()});
    check_shape(out, "out", {128, out.size() / 128});
    for (const TensorView* t : {&image, &a, &out}) check_contiguous(*t, "a tensor");
    const DeviceTensors tensors{{"image", image, Access::read}, {"a", a, Access::read}, {"out", out, Access::write}};
    py::gil_scoped_release release;
    GPTCORE_GPU::run_product({image.as<uint16_t>(), a.as<uint32_t>(), out.as<float>(), int(image.size()),
                              int(out.shape[1] * 2), a_descriptor, b_descriptor, a_transposed, b_transposed,
                              from_registers, is_float16});
  }, py::arg("image"), py::arg("a"), py::arg("out"), py::arg("a_descriptor"), py::arg("b_descriptor"),
        py::arg("a_transposed") = false, py::arg("b_transposed") = false, py::arg("from_registers") = false);
  m.def("run_copy", [](const TensorView& x, const TensorView& out, std::array<int, 4> box, int swizzle_bytes,
                       std::array<int, 4> at, std::optional<std::array<int, 4>> at_out) {
    const TensorMapArgs from = map_args(x, box, swizzle_bytes);
    check_dtype(out, "out", DType::bfloat16, "torch.bfloat16");
    std::optional<TensorMapArgs> to;
    if (at_out) to = map_args(out, box, swizzle_bytes);
    else check_shape(out, "out", {int64_t{1} * box[0] * box[1] * box[2] * box[3]});
    const std::array<int, 4> last = at_out.value_or(at);
    const DeviceTensors tensors{{"x", x, Access::read}, {"out", out, Access::write}};
    py::gil_scoped_release release;
    GPTCORE_GPU::run_copy(from, to ? &*to : nullptr,
                          {at[0], at[1], at[2], at[3], last[0], last[1], last[2], last[3]}, out.as<uint16_t>());
  }, py::arg("x"), py::arg("out"), py::kw_only(), py::arg("box"), py::arg("swizzle_bytes"), py::arg("at"),
        py::arg("at_out") = py::none());
}

}  // namespace

PYBIND11_MODULE(_simt, m) {
  m.doc() = "The CUDA kernels in a GPU simulator. Use gptcore.ops with backend='simt'; see docs/simt.md.";
  py::register_exception<simt::SimtError>(m, "SimtError", PyExc_RuntimeError);
  bind_operations(m);
  bind_hopper(m);
  m.def("configure", &configure, py::kw_only(), py::arg("order") = "forward", py::arg("seed") = 0,
        py::arg("threads") = 0, py::arg("count") = false, py::arg("compute_capability") = 80);
  m.def("counters", [] {
    py::dict all;
    for (const auto& [name, kernel] : simt::counters()) all[py::str(name)] = as_dict(kernel);
    return all;
  });
  m.def("waste", [] {
    py::dict all;
    for (const auto& [name, kernel] : simt::counters()) {
      py::list lines;
      for (const auto& [pc, waste] : kernel.waste)
        lines.append(py::make_tuple(simt::source_line(pc), waste.bank_conflicts, waste.sectors));
      all[py::str(name)] = lines;
    }
    return all;
  });
  m.def("reset_counters", &simt::reset_counters);
  m.def("examples", [] {
    py::dict all;
    for (const std::string& name : GPTCORE_GPU::examples()) all[py::str(name)] = GPTCORE_GPU::rule_of(name);
    return all;
  });
  m.def("run_example", [](const std::string& name, bool broken, const TensorView& x, const TensorView& out) {
    check_dtype(x, "x", DType::float32, "torch.float32");
    check_dtype(out, "out", DType::float32, "torch.float32");
    check_shape(x, "x", {64, 4});
    check_shape(out, "out", {128, 4});
    check_contiguous(out, "out");
    if (x.strides[0] != 8 || x.strides[1] != 1) refuse("x has other strides than (8, 1)");
    const DeviceTensors tensors{{"x", x, Access::read}, {"out", out, Access::write}};
    py::gil_scoped_release release;
    GPTCORE_GPU::run_example(name, broken, x.as<float>(), out.as<float>());
  }, py::arg("name"), py::arg("broken"), py::arg("x"), py::arg("out"));
  m.def("run_fragments", [](const std::string& op, const TensorView& words, const TensorView& out) {
    check_dtype(words, "words", DType::int32, "torch.int32");
    check_dtype(out, "out", DType::int32, "torch.int32");
    check_shape(words, "words", {32, 10});
    check_shape(out, "out", {32, 4});
    check_contiguous(words, "words");
    check_contiguous(out, "out");
    const DeviceTensors tensors{{"words", words, Access::read}, {"out", out, Access::write}};
    py::gil_scoped_release release;
    GPTCORE_GPU::run_fragments(op, words.as<uint32_t>(), out.as<uint32_t>());
  }, py::arg("op"), py::arg("words"), py::arg("out"));
  m.def(
      "tiles",
      [](int head_dim, int element_size) {
        const int width = tile_width(head_dim, element_size);
        const ForwardTile forward = forward_tile(width, element_size, false);
        const BackwardTile backward = backward_tile(width, element_size, false, false);
        py::dict tiles;
        tiles["width"] = width;
        tiles["forward"] = py::make_tuple(forward.rows(), forward.keys);
        tiles["backward"] = py::make_tuple(backward.rows(), backward.columns);
        return tiles;
      },
      py::arg("head_dim"), py::arg("element_size"));
}
