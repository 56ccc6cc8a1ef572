#include "csrc/cpu_isa.h"
#include "csrc/operations.h"

namespace gptcore {
namespace {

// Returns the sum over the rows. With `gradient`, overwrites the logits with softmax - onehot.
double cross_entropy(const TensorView& logits, const TensorView& targets, bool gradient, int64_t num_threads) {
  check_cpu(logits, "logits");
  check_float(logits, "logits");
  if (logits.ndim != 2) refuse("logits has shape ", shape_text(logits.shape, logits.ndim), ", expected (rows, vocab)");
  if (logits.shape[1] > 1 && logits.strides[1] != 1) refuse("the rows of logits are not dense; call .contiguous() first");
  check_distinct(logits, "logits");
  const int64_t rows = logits.shape[0], vocab = logits.shape[1];
  check_cpu(targets, "targets");
  check_dtype(targets, "targets", DType::int64, "torch.int64");
  check_shape(targets, "targets", {rows});
  check_contiguous(targets, "targets");
  check_apart(logits, "logits", targets, "targets");
  // A copy, so that another thread cannot change the targets after the check.
  const std::vector<int64_t> checked(targets.as<int64_t>(), targets.as<int64_t>() + rows);
  for (int64_t i = 0; i < rows; ++i)
    if (checked[i] < 0 || checked[i] >= vocab)
      refuse("target ", checked[i], " at index ", i, " is outside of the vocabulary of ", vocab, " tokens");

  const Workspace workspace(rows * sizeof(double));
  double* losses = workspace.as<double>();
  CrossEntropyArgs args{};
  args.dtype = logits.dtype;
  args.rows = rows, args.vocab = vocab;
  args.logits = logits.data;
  args.row_stride = logits.strides[0];
  args.targets = checked.data();
  args.losses = losses;
  args.gradient = gradient;
  args.num_threads = check_threads(num_threads);
  py::gil_scoped_release release;
  cpu_kernels().cross_entropy(args);
  double sum = 0;
  for (int64_t i = 0; i < rows; ++i) sum += losses[i];
  return sum;
}

}  // namespace

void bind_cross_entropy(py::module_& m) {
  m.def("cross_entropy", &cross_entropy, py::arg("logits"), py::arg("targets"), py::arg("gradient"),
        py::arg("num_threads"));
}

}  // namespace gptcore
