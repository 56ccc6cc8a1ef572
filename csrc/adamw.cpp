#include <cmath>

#include "csrc/cpu_isa.h"
#include "csrc/operations.h"

namespace gptcore {
namespace {

// Tensors are split into pieces of this many elements, which are distributed over the threads. Sums are taken over
// pieces in order, so they do not depend on the number of threads.
constexpr int64_t kPiece = 65536;

std::string at(const char* name, size_t i) { return std::string(name) + "[" + std::to_string(i) + "]"; }

void append_pieces(std::vector<ParameterPiece>& pieces, ParameterPiece tensor, int64_t size) {
  for (int64_t begin = 0; begin < size; begin += kPiece) {
    ParameterPiece piece = tensor;
    piece.size = std::min(kPiece, size - begin);
    const int64_t offset = begin * item_size(piece.dtype);
    piece.grad = static_cast<const char*>(piece.grad) + offset;
    if (piece.copy) piece.copy = static_cast<char*>(piece.copy) + offset;
    if (piece.param) piece.param += begin, piece.exp_avg += begin, piece.exp_avg_sq += begin;
    pieces.push_back(piece);
  }
}

int threads_for(const std::vector<ParameterPiece>& pieces, int64_t num_threads) {
  int64_t size = 0;
  for (const ParameterPiece& piece : pieces) size += piece.size;
  const int threads = check_threads(num_threads);
  return size < 32768 ? 1 : threads;
}

// Lists of tensors, one entry per parameter; see gptcore/training/optim.py.
using Views = std::vector<TensorView>;

double grad_norm(const Views& grads, int64_t num_threads) {
  std::vector<ParameterPiece> pieces;
  for (size_t i = 0; i < grads.size(); ++i) {
    const std::string name = at("grads", i);
    check_cpu(grads[i], name.c_str());
    check_float(grads[i], name.c_str());
    check_contiguous(grads[i], name.c_str());
    ParameterPiece tensor{};
    tensor.dtype = grads[i].dtype, tensor.grad = grads[i].data;
    append_pieces(pieces, tensor, grads[i].size());
  }
  const Workspace workspace(pieces.size() * sizeof(double));
  double* sums = workspace.as<double>();
  GradNormArgs args{};
  args.pieces = pieces.data(), args.num_pieces = static_cast<int64_t>(pieces.size());
  args.sums = sums;
  args.num_threads = threads_for(pieces, num_threads);
  py::gil_scoped_release release;
  cpu_kernels().grad_norm(args);
  double sum = 0;
  for (size_t i = 0; i < pieces.size(); ++i) sum += sums[i];
  return std::sqrt(sum);
}

void adamw(const Views& params, const Views& copies, const Views& grads, const Views& exp_avgs,
           const Views& exp_avg_sqs, const Views& steps, double lr, double beta1, double beta2, double eps,
           double weight_decay, double grad_scale, int64_t num_threads, bool check_only) {
  const size_t count = params.size();
  for (const Views* views : {&copies, &grads, &exp_avgs, &exp_avg_sqs, &steps})
    if (views->size() != count && !(views == &copies && copies.empty()))
      refuse("a list of ", views->size(), " tensors for ", count, " params; expected one for each");
  for (const double value : {lr, beta1, beta2, eps, weight_decay, grad_scale})
    if (!std::isfinite(value)) refuse("a setting is ", value, ", expected a finite number");

  std::vector<ParameterPiece> pieces;
  for (size_t i = 0; i < count; ++i) {
    const TensorView &param = params[i], &model = copies.empty() ? param : copies[i];
    const std::string param_name = at("params", i), copy_name = at("copies", i);
    const std::string& model_name = copies.empty() ? param_name : copy_name;
    check_cpu(param, param_name.c_str());
    check_dtype(param, param_name.c_str(), DType::float32, "torch.float32");
    check_contiguous(param, param_name.c_str());
    if (!copies.empty()) {
      check_float(model, copy_name.c_str());
      if (model.dtype == DType::float32) refuse(copy_name, " is torch.float32, expected 16 bits");
      check_dense_like(model, copy_name.c_str(), param);
      check_apart(param, param_name.c_str(), model, copy_name.c_str());
    }
    check_like(grads[i], at("grads", i).c_str(), model);
    check_apart(model, model_name.c_str(), grads[i], at("grads", i).c_str());
    check_apart(param, param_name.c_str(), grads[i], at("grads", i).c_str());
    const std::pair<const TensorView*, const char*> moments[] = {{&exp_avgs[i], "exp_avgs"},
                                                                 {&exp_avg_sqs[i], "exp_avg_sqs"}};
    for (const auto& [view, name] : moments) {
      check_like(*view, at(name, i).c_str(), param);
      check_apart(param, param_name.c_str(), *view, at(name, i).c_str());
      check_apart(model, model_name.c_str(), *view, at(name, i).c_str());
    }
    check_apart(exp_avgs[i], at("exp_avgs", i).c_str(), exp_avg_sqs[i], at("exp_avg_sqs", i).c_str());
    ParameterPiece tensor{};
    tensor.dtype = grads[i].dtype, tensor.grad = grads[i].data;
    tensor.param = param.as<float>(), tensor.copy = copies.empty() ? nullptr : model.data;
    tensor.exp_avg = exp_avgs[i].as<float>(), tensor.exp_avg_sq = exp_avg_sqs[i].as<float>();
    const double step = 1 + *float_array(steps[i], at("steps", i).c_str(), params[i], {});
    tensor.step_size = static_cast<float>(lr / (1 - std::pow(beta1, step)));
    tensor.inv_sqrt_bias_correction2 = static_cast<float>(1 / std::sqrt(1 - std::pow(beta2, step)));
    append_pieces(pieces, tensor, params[i].size());
  }
  AdamWArgs args{};
  args.pieces = pieces.data(), args.num_pieces = static_cast<int64_t>(pieces.size());
  args.one_minus_beta1 = static_cast<float>(1 - beta1);
  args.beta2 = static_cast<float>(beta2), args.one_minus_beta2 = static_cast<float>(1 - beta2);
  args.eps = static_cast<float>(eps);
  args.decay = static_cast<float>(1 - lr * weight_decay);
  args.grad_scale = static_cast<float>(grad_scale);
  args.num_threads = threads_for(pieces, num_threads);
  if (check_only) return;
  for (const TensorView& step : steps) *step.as<float>() += 1;  // all checks have passed
  py::gil_scoped_release release;
  cpu_kernels().adamw(args);
}

}  // namespace

void bind_adamw(py::module_& m) {
  m.def("grad_norm", &grad_norm, py::arg("grads"), py::arg("num_threads"));
  m.def("adamw", &adamw, py::arg("params"), py::arg("copies"), py::arg("grads"), py::arg("exp_avgs"),
        py::arg("exp_avg_sqs"), py::arg("steps"), py::arg("lr"), py::arg("beta1"), py::arg("beta2"), py::arg("eps"),
        py::arg("weight_decay"), py::arg("grad_scale"), py::arg("num_threads"), py::arg("check_only") = false);
}

}  // namespace gptcore
