// A decoding step: tokens of any rows through all layers of a GPT, in the order of gptcore/model.py.
//
// A row may have several tokens in a step: a part of a prompt. They attend in groups of kQueries, as many as the decoding
// kernel takes, so that a token has the same bits whatever is beside it in the step.
//
// The layers are passed twice. The first time checks every tensor and counts scratch memory, with pointers that are not
// read. The second time runs the kernels, without the GIL.
#include <cstring>

#include "csrc/cpu_isa.h"
#include "csrc/forward.h"

namespace gptcore {
namespace {

using Views = std::vector<TensorView>;

constexpr size_t kWeights = 12;  // of a layer: weight and bias of ln_1, c_attn, c_proj, ln_2, c_fc, c_proj
constexpr size_t kInner = 8;     // the index of c_fc's weight, (n_inner, width)
constexpr int64_t kQueries = 8;  // of a row that attend together

// The numbers of a layer: the scale and the window (negative: no limit) of its attention, the eps of both norms, and
// the form of GELU.
using LayerSettings = std::tuple<double, int64_t, double, double, bool>;

struct Inputs {
  const std::vector<int64_t>& tokens;   // indices of `embeddings`
  const TensorView& embeddings;         // (vocabulary, width)
  const OptionalView& positions;        // (positions, width), added at the index of the token's place
  const Views &weights, &caches;        // a cache of each layer: keys and values, (2, rows, heads, capacity, head_dim)
  const std::vector<int64_t>& rows;     // of the caches, for each token
  const std::vector<int64_t>& places;   // of each token in its row; those before it are in the caches or in this step
  const std::vector<int64_t>& kept;     // the tokens whose logits are computed
  const std::vector<LayerSettings>& layers;
  std::optional<double> final_eps;      // of the norm after the last layer; without one, norms come after attention and MLP
  const TensorView& logits;
  Execution execution;
};

std::string element(const char* name, size_t i) { return std::string(name) + "[" + std::to_string(i) + "]"; }

// Checks a table (entries, width) and the indices of its entries.
void check_table(const TensorView& table, const char* name, const TensorView& logits, int64_t width,
                 const std::vector<int64_t>& indices) {
  check_cpu(table, name);
  check_same_dtype(table, name, logits);
  if (table.ndim != 2 || table.shape[1] != width || width < 1)
    refuse(name, " has shape ", shape_text(table.shape, table.ndim), ", expected (entries, ", width, ")");
  check_contiguous(table, name);
  for (const int64_t index : indices)
    if (index < 0 || index >= table.shape[0])
      refuse(name, " has ", table.shape[0], " entries, but an index is ", index);
}

// Checks the numbers and shapes from which scratch memory is allocated, and that no output shares memory with an input.
// The arguments of each kernel are checked where they are made.
void check_inputs(const Inputs& in) {
  const size_t layers = in.caches.size(), expected = kWeights * layers + (in.final_eps ? 2 : 0) + 1;
  if (layers == 0 || in.layers.size() != layers || in.weights.size() != expected)
    refuse("got ", in.weights.size(), " weights, ", in.layers.size(), " settings and ", layers, " caches, expected ",
           expected, " weights for these caches, and as many settings as caches, at least one");
  const int64_t tokens = in.tokens.size();
  if (tokens == 0 || tokens > 1 << 20 || in.rows.size() != in.tokens.size() || in.places.size() != in.tokens.size())
    refuse("got ", tokens, " tokens, ", in.rows.size(), " rows and ", in.places.size(), " places, expected as many, 1 to "
           "2^20");
  for (const int64_t index : in.kept)
    if (index < 0 || index >= tokens) refuse("kept has ", index, ", expected 0 to ", tokens - 1);
  check_float(in.logits, "logits");
  check_cpu(in.logits, "logits");
  check_contiguous(in.logits, "logits");
  check_table(in.embeddings, "embeddings", in.logits, in.embeddings.shape[1], in.tokens);
  const int64_t width = in.embeddings.shape[1];
  if (in.positions) check_table(*in.positions, "positions", in.logits, width, in.places);
  for (size_t i = 0; i < layers; ++i) {
    const TensorView &inner = in.weights[i * kWeights + kInner], &cache = in.caches[i];
    if (inner.ndim != 2 || inner.shape[0] > INT32_MAX)
      refuse("layer ", i, ": the weight of c_fc has shape ", shape_text(inner.shape, inner.ndim), ", expected (n_inner, ",
             width, ")");
    const std::string name = element("caches", i);
    check_cpu(cache, name.c_str());
    check_same_dtype(cache, name.c_str(), in.logits);
    if (cache.ndim != 5 || cache.shape[0] != 2 || cache.shape[2] < 1 || cache.shape[3] < 1 ||
        cache.shape[4] < 1 || cache.shape[4] > 256 || width % cache.shape[4] != 0 ||
        cache.shape[2] != width / cache.shape[4])
      refuse(name, " has shape ", shape_text(cache.shape, cache.ndim), ", expected (2, rows, heads, "
             "capacity, head_dim) with heads x head_dim = ", width);
    check_contiguous(cache, name.c_str());
    for (const int64_t row : in.rows)
      if (row < 0 || row >= cache.shape[1])
        refuse("a token is in row ", row, ", expected 0 to ", cache.shape[1] - 1, ": ", name, " has ", cache.shape[1]);
    for (const int64_t place : in.places)
      if (place < 0 || place >= cache.shape[3])
        refuse("a row has ", place, " tokens, expected 0 to ", cache.shape[3] - 1, ": ", name, " has room for ",
               cache.shape[3]);
  }
  for (size_t i = 0; i <= layers; ++i) {
    const TensorView& out = i < layers ? in.caches[i] : in.logits;
    const std::string name = i < layers ? element("caches", i) : "logits";
    check_apart(out, name.c_str(), in.embeddings, "embeddings");
    if (in.positions) check_apart(out, name.c_str(), *in.positions, "positions");
    for (const TensorView& weight : in.weights) check_apart(out, name.c_str(), weight, "a weight");
    for (size_t j = 0; j < i; ++j) check_apart(out, name.c_str(), in.caches[j], "another cache");
  }
}

class Step {
 public:
  // With memory of `bytes()` bytes, as counted by a step without it that was run, kernels are run; else they are checked.
  explicit Step(const Inputs& in, char* memory = nullptr)
      : in_(in), rows_(in.tokens.size()), width_(in.embeddings.shape[1]), runs_(memory != nullptr),
        memory_(runs_ ? reinterpret_cast<uintptr_t>(memory) : uintptr_t{1} << 62) {  // an address that no tensor has
    int64_t inner = 0, heads = 0;
    for (size_t i = 0; i < in.caches.size(); ++i) {
      inner = std::max(inner, in.weights[i * kWeights + kInner].shape[0]);
      heads = std::max(heads, in.caches[i].shape[2]);
    }
    for (TensorView* view : {&update_, &normed_, &hidden_, &residual_, &heads_}) *view = take({rows_, width_});
    qkv_ = take({rows_, 3 * width_});
    inner_ = take({rows_, inner}), activated_ = take({rows_, inner});
    mean_ = take({rows_}, DType::float32), rstd_ = take({rows_}, DType::float32);
    kept_ = take({static_cast<int64_t>(in.kept.size()), width_});
    lse_ = take({rows_, heads}, DType::float32);
    wide_weight_ = take({width_}, DType::float32), wide_bias_ = take({width_}, DType::float32);
    for (int64_t i = 0, begin = 0; i < rows_; begin = i) {
      while (++i < rows_ && i - begin < kQueries && in.rows[i] == in.rows[begin] && in.places[i] == in.places[i - 1] + 1) {}
      segments_.push_back({0, begin, i - begin, 0, in.places[i - 1] + 1});
    }
  }

  size_t bytes() const { return used_ + workspace_; }

  void run() {
    TensorView hidden = hidden_;
    OptionalView residual;
    look_up(in_.embeddings, in_.tokens, hidden_);
    if (in_.positions) look_up(*in_.positions, in_.places, residual_), residual = residual_;
    if (residual && !in_.final_eps) norm(hidden, residual, in_.weights.data(), 0.0, normed_), hidden = residual_;  // adds
    for (size_t i = 0; i < in_.caches.size(); ++i) try {
      const TensorView* weights = &in_.weights[i * kWeights];
      const auto& [scale, window, eps_1, eps_2, tanh_form] = in_.layers[i];
      if (in_.final_eps) {
        norm(hidden, residual, weights, eps_1, normed_);
        residual = residual ? residual_ : hidden;
        attend(normed_, weights + 2, in_.caches[i], scale, window);
        norm(update_, residual, weights + 6, eps_2, normed_);
        residual = residual_;
        mlp(normed_, weights + 8, tanh_form);
        hidden = update_;
      } else {
        attend(hidden, weights + 2, in_.caches[i], scale, window);
        norm(update_, hidden, weights, eps_1, normed_);
        mlp(normed_, weights + 8, tanh_form);
        norm(update_, normed_, weights + 6, eps_2, hidden_);
        hidden = hidden_;
      }
    } catch (const py::value_error& error) {
      refuse("layer ", std::to_string(i), ": ", error.what());
    }
    if (in_.final_eps) {
      norm(hidden, residual, &in_.weights.back() - 2, *in_.final_eps, normed_);
      hidden = normed_;
    }
    if (in_.kept.empty()) return;
    look_up(hidden, in_.kept, kept_);
    linear(kept_, in_.weights.back(), std::nullopt, in_.logits);
  }

 private:
  TensorView view(void* data, DType dtype, std::initializer_list<int64_t> shape) const {
    TensorView t;
    t.data = data, t.dtype = dtype, t.device_type = Device::cpu, t.tensor = in_.logits.tensor;
    t.ndim = static_cast<int>(shape.size());
    std::copy(shape.begin(), shape.end(), t.shape);
    for (int64_t i = t.ndim - 1, stride = 1; i >= 0; stride *= t.shape[i--]) t.strides[i] = stride;
    return t;
  }
  // (rows, heads, length, head_dim), whose head_dim is dense.
  TensorView heads_view(void* data, std::initializer_list<int64_t> shape, std::initializer_list<int64_t> strides) const {
    TensorView t = view(data, in_.logits.dtype, shape);
    std::copy(strides.begin(), strides.end(), t.strides);
    return t;
  }
  TensorView take(std::initializer_list<int64_t> shape, std::optional<DType> dtype = std::nullopt) {
    const TensorView t = view(reinterpret_cast<void*>(memory_ + used_), dtype.value_or(in_.logits.dtype), shape);
    used_ += (t.bytes() + 63) / 64 * 64;
    return t;
  }
  template <class Args>
  void run_with_workspace(Args args, size_t (*bytes)(const Args&), void (*kernel)(const Args&)) {
    if (!runs_) workspace_ = std::max(workspace_, bytes(args));
    else args.workspace = reinterpret_cast<char*>(memory_ + used_), kernel(args);
  }

  void look_up(const TensorView& table, const std::vector<int64_t>& indices, const TensorView& out) const {
    const int64_t bytes = width_ * item_size(table.dtype);
    if (runs_)
      for (size_t i = 0; i < indices.size(); ++i)
        std::memcpy(out.as<char>() + i * bytes, table.as<char>() + indices[i] * bytes, bytes);
  }
  // Returns a weight of a norm in float32.
  TensorView widened(const TensorView& weight, const char* name, const TensorView& wide) const {
    if (weight.dtype == DType::float32) return weight;
    check_like(weight, name, view(weight.data, in_.logits.dtype, {width_}));
    if (runs_) kernels_.widen({weight.dtype, weight.data, wide.as<float>(), width_});
    return wide;
  }
  void norm(const TensorView& x, const OptionalView& residual, const TensorView* weights, double eps,
            const TensorView& out) {
    const OptionalView residual_out = residual ? OptionalView(residual_) : std::nullopt;
    const LayerNormArgs args = layer_norm_forward_args(
        x, residual, widened(weights[0], "weight", wide_weight_), widened(weights[1], "bias", wide_bias_), out,
        residual_out, mean_, rstd_, eps, in_.execution);
    if (runs_) kernels_.layer_norm_forward(args);
  }
  // A weight of bytes is quantized; the number of bytes of a row shows the kind.
  void linear(const TensorView& x, const TensorView& weight, const OptionalView& bias, const TensorView& out) {
    if (weight.dtype == DType::uint8 && weight.ndim == 2) {
      const char* kind = weight.shape[1] == x.shape[1] / 32 * 34 ? "q8_0" : "q4_0";
      return run_with_workspace(quantized_linear_forward_args(x, weight, kind, bias, out, in_.execution),
                                kernels_.quantized_linear_workspace, kernels_.quantized_linear);
    }
    run_with_workspace(linear_forward_args(x, weight, bias, out, in_.execution.num_threads), kernels_.linear_workspace,
                       kernels_.linear);
  }
  void mlp(const TensorView& x, const TensorView* weights, bool tanh_form) {
    const int64_t size = weights[0].shape[0];
    const TensorView inner = view(inner_.data, x.dtype, {rows_, size});
    const TensorView activated = view(activated_.data, x.dtype, {rows_, size});
    linear(x, weights[0], weights[1], inner);
    const GeluArgs args = gelu_forward_args(inner, std::nullopt, activated, tanh_form, in_.execution);
    if (runs_) kernels_.gelu_forward(args);
    linear(activated, weights[2], weights[3], update_);
  }
  void attend(const TensorView& x, const TensorView* weights, const TensorView& cache, double scale, int64_t window) {
    const int64_t heads = cache.shape[2], capacity = cache.shape[3], head_dim = cache.shape[4];
    const int64_t row_size = width_ * capacity, end = 1 + *std::max_element(in_.places.begin(), in_.places.end());
    linear(x, weights[0], weights[1], qkv_);
    const size_t bytes = item_size(x.dtype), values = cache.bytes() / 2;
    if (runs_)
      for (int64_t i = 0; i < rows_; ++i)
        for (int64_t head = 0; head < heads; ++head) {
          const char* from = qkv_.as<char>() + (i * 3 * width_ + width_ + head * head_dim) * bytes;
          char* to = cache.as<char>() + (in_.rows[i] * row_size + (head * capacity + in_.places[i]) * head_dim) * bytes;
          std::memcpy(to, from, head_dim * bytes);
          std::memcpy(to + values, from + width_ * bytes, head_dim * bytes);
        }
    // Of row 0; those of others are at an index beyond, for which the length must be at least 2: one key has no stride.
    const auto keys = [&](size_t offset) {
      return heads_view(cache.as<char>() + offset, {1, heads, std::min(capacity, std::max<int64_t>(end, 2)), head_dim},
                        {0, capacity * head_dim, head_dim, 1});
    };
    const AttentionSettings settings{{}, {}, {}, scale, true, window, window < 0 ? -1 : 0, 0.0};
    AttentionArgs args = attention_forward_args(
        heads_view(qkv_.data, {1, heads, rows_, head_dim}, {0, head_dim, 3 * width_, 1}), keys(0), keys(values),
        heads_view(heads_.data, {1, heads, rows_, head_dim}, {0, head_dim, width_, 1}),
        view(lse_.data, DType::float32, {1, heads, rows_}), settings, in_.execution);
    for (Segment& segment : segments_) segment.key_begin = in_.rows[segment.query_begin] * heads * capacity;
    args.segments = segments_.data(), args.num_segments = segments_.size();
    run_with_workspace(args, kernels_.attention_forward_workspace, kernels_.attention_forward);
    linear(heads_, weights[2], weights[3], update_);
  }

  const Inputs& in_;
  const int64_t rows_, width_;
  const Kernels& kernels_ = cpu_kernels();
  const bool runs_;
  const uintptr_t memory_;
  size_t used_ = 0, workspace_ = 0;
  // update_ is the output of attention or of the MLP, heads_ that of the attention kernel, kept_ rows of the last norm
  TensorView kept_, update_, normed_, hidden_, residual_, heads_, qkv_, inner_, activated_;
  TensorView mean_, rstd_, lse_, wide_weight_, wide_bias_;
  std::vector<Segment> segments_;
};

void decode(const std::vector<int64_t>& tokens, const TensorView& embeddings, const OptionalView& positions,
            const Views& weights, const Views& caches, const std::vector<int64_t>& rows,
            const std::vector<int64_t>& places, const std::vector<int64_t>& kept,
            const std::vector<LayerSettings>& layers, std::optional<double> final_eps, const TensorView& logits,
            int64_t num_threads) {
  Inputs in{tokens, embeddings, positions, weights, caches, rows, places, kept, layers, final_eps, logits, {}};
  in.execution.num_threads = check_threads(num_threads);
  check_inputs(in);
  Step checks(in);
  checks.run();
  const Workspace memory(checks.bytes());
  py::gil_scoped_release release;
  Step(in, memory.as()).run();
}

}  // namespace

void bind_decode(py::module_& m) {
  m.def("decode", &decode, py::arg("tokens"), py::arg("embeddings"), py::arg("positions"), py::arg("weights"),
        py::arg("caches"), py::arg("rows"), py::arg("places"), py::arg("kept"), py::arg("layers"), py::arg("final_eps"),
        py::arg("logits"), py::arg("num_threads"));
}

}  // namespace gptcore
