#include <cmath>

#include "csrc/forward.h"

namespace pybind11::detail {

template <>
struct type_caster<gptcore::AttentionSettings> {
  PYBIND11_TYPE_CASTER(gptcore::AttentionSettings, const_name("AttentionSettings"));

  bool load(handle source, bool) {
    constexpr const char* kFields[] = {"cu_seqlens_q", "cu_seqlens_k", "seed",         "scale",
                                       "causal",       "window_left",  "window_right", "dropout_p"};
    constexpr size_t kCount = std::size(kFields);
    if (!isinstance<tuple>(source) || PyTuple_GET_SIZE(source.ptr()) != kCount)
      throw type_error("settings is not a tuple of " + std::to_string(kCount) + " fields");
    size_t i = 0;
    const auto read = [&](auto& field) {
      make_caster<std::decay_t<decltype(field)>> caster;
      handle given = PyTuple_GET_ITEM(source.ptr(), i);
      if (!caster.load(given, true))
        throw type_error(std::string(kFields[i]) + " is " + std::string(repr(given)) + ", which has the wrong type");
      field = cast_op<std::decay_t<decltype(field)>>(caster);
      ++i;
    };
    read(value.cu_seqlens_q), read(value.cu_seqlens_k), read(value.seed), read(value.scale), read(value.causal);
    read(value.window_left), read(value.window_right), read(value.dropout_p);
    return true;
  }
  static handle cast(const gptcore::AttentionSettings&, return_value_policy, handle) = delete;
};

}  // namespace pybind11::detail

namespace gptcore {
namespace {

// The boundaries of the documents as 64-bit numbers, of the whole batch or of one row for every row.
struct Boundaries {
  std::vector<int64_t> bounds;
  int64_t rows, length;  // how many rows repeat them, and the length of a row

  int64_t documents() const { return static_cast<int64_t>(bounds.size()) - 1; }  // of `bounds`
  int64_t size() const { return rows * documents() + 1; }
  int64_t begin(int64_t i) const { return i / documents() * length + bounds[i % documents()]; }
  int64_t end(int64_t i) const { return i / documents() * length + bounds[i % documents() + 1]; }
};

// Returns cu_seqlens, checked: never decreasing, from 0 to batch x length.
Boundaries read_boundaries(const TensorView& cu, const char* name, int64_t batch, int64_t length) {
  check_cpu(cu, name);
  if (cu.ndim != 1 || cu.shape[0] < 1 || cu.shape[0] > INT32_MAX)
    refuse(name, " has shape ", shape_text(cu.shape, cu.ndim), ", expected 1-D, of 1 to 2^31 - 1 boundaries");
  if (cu.dtype != DType::int32 && cu.dtype != DType::int64)
    refuse(name, " is ", cu.dtype_name(), ", expected torch.int32 or torch.int64");
  std::vector<int64_t> bounds(cu.shape[0]);
  for (size_t i = 0; i < bounds.size(); ++i) {
    int64_t at = static_cast<int64_t>(i) * cu.strides[0];
    bounds[i] = cu.dtype == DType::int32 ? cu.as<int32_t>()[at] : cu.as<int64_t>()[at];
    if (i && bounds[i] < bounds[i - 1])
      refuse(name, " decreases from ", bounds[i - 1], " to ", bounds[i], " at index ", i, "; boundaries must not");
  }
  if (bounds.front() != 0) refuse(name, " begins with ", bounds.front(), ", expected 0");
  const bool of_one_row = batch > 1 && bounds.back() == length;
  if (!of_one_row && bounds.back() != batch * length)
    refuse(name, " ends at ", bounds.back(), ", expected length = ", length, " or batch x length = ", batch, " x ",
           length, " = ", batch * length);
  return {std::move(bounds), of_one_row ? batch : 1, length};
}

// The stride of a dimension of one element is unused, but could fail the kernels' test for alignment: it becomes 0.
HeadsView heads(const TensorView& t) {
  auto stride = [&](int dim) { return t.shape[dim] == 1 ? 0 : t.strides[dim]; };
  return {t.data, stride(0), stride(1), stride(2)};
}

void check_heads(const TensorView& t, const char* name, const TensorView& query) {
  check_device(t, name, query);
  check_same_dtype(t, name, query);
  if (t.ndim != 4)
    refuse(name, " has shape ", shape_text(t.shape, t.ndim), ", expected (batch, heads, length, head_dim)");
  if (t.shape[3] > 1 && t.strides[3] != 1 && t.size() > 0)  // on an empty tensor, .contiguous() would not change it
    refuse(name, " has stride ", t.strides[3], " in head_dim, expected 1; call .contiguous() on it first");
}

void check_inputs(const TensorView& query, const TensorView& key, const TensorView& value) {
  check_float(query, "query");
  check_heads(query, "query", query);
  check_heads(key, "key", query);
  check_heads(value, "value", query);
  const int64_t batch = query.shape[0], query_heads = query.shape[1], head_dim = query.shape[3];
  const int64_t kv_heads = key.shape[1], kv_len = key.shape[2];
  check_shape(key, "key", {batch, kv_heads, kv_len, head_dim});
  check_shape(value, "value", {batch, kv_heads, kv_len, head_dim});
  if (head_dim < 1 || head_dim > 256) refuse("head_dim is ", head_dim, ", expected 1 to 256");
  if (kv_heads < 1 || query_heads % kv_heads)
    refuse("query has ", query_heads, " heads, which is not a multiple of the ", kv_heads, " heads of key and value");
}

uint64_t seed_of(const AttentionSettings& settings) {
  if (settings.seed.has_value() != (settings.dropout_p > 0)) refuse("dropout_p and seed must be given together");
  if (!settings.seed) return 0;
  check_cpu(*settings.seed, "seed");
  check_dtype(*settings.seed, "seed", DType::int64, "torch.int64");
  check_shape(*settings.seed, "seed", {1});
  return *settings.seed->as<uint64_t>();
}

// Checks and fills in the arguments that forward and backward share.
AttentionArgs common_args(const TensorView& query, const TensorView& key, const TensorView& value,
                          const TensorView& out, const TensorView& lse, const AttentionSettings& settings,
                          const Execution& execution) {
  check_inputs(query, key, value);
  check_heads(out, "out", query);
  int64_t batch = query.shape[0], query_heads = query.shape[1], query_len = query.shape[2], head_dim = query.shape[3];
  int64_t kv_heads = key.shape[1], kv_len = key.shape[2];
  check_shape(out, "out", {batch, query_heads, query_len, head_dim});
  // Kernels count heads, the rows of a group of heads, and the end of a tile of keys in 32 bits.
  for (int64_t size : {batch * query_heads, query_len * (query_heads / kv_heads), kv_len})
    if (size > INT32_MAX - 256)
      refuse("query has shape ", shape_text(query.shape, 4), " and key ", shape_text(key.shape, 4),
             ", expected batch x heads, query_len x heads / kv_heads and kv_len at most 2^31 - 257");
  const int64_t tiles = std::max(query_len, kv_len) / 16 + 1;
  if (execution.on_gpu() && batch * query_heads > INT32_MAX / tiles)
    refuse("query has shape ", shape_text(query.shape, 4), " and key ", shape_text(key.shape, 4), ", expected at most ",
           INT32_MAX / tiles, " heads in the batch at that length: a GPU starts at most 2^31 - 1 blocks");
  if (!(std::abs(settings.scale) <= 1e38))  // log2(e) times it is finite in float32
    refuse("scale is ", settings.scale, ", expected a finite number of at most 1e38");
  if (!(settings.dropout_p >= 0 && settings.dropout_p < 1))
    refuse("dropout_p is ", settings.dropout_p, ", expected 0 <= dropout_p < 1");

  AttentionArgs args{};
  args.dtype = query.dtype;
  args.query = heads(query), args.key = heads(key), args.value = heads(value), args.out = heads(out);
  args.lse = float_array(lse, "lse", query, {batch, query_heads, query_len});
  args.batch = batch, args.query_heads = query_heads, args.kv_heads = kv_heads;
  args.query_len = query_len, args.kv_len = kv_len, args.head_dim = head_dim;
  args.scale = static_cast<float>(settings.scale);
  args.causal = settings.causal;
  // Clamped to more keys than there can be, so that the kernels can add them to positions.
  args.window_left = std::min<int64_t>(settings.window_left, INT32_MAX);
  args.window_right = std::min<int64_t>(settings.window_right, INT32_MAX);
  args.dropout_p = settings.dropout_p;
  args.seed = seed_of(settings);
  args.num_threads = execution.num_threads, args.stream = execution.stream, args.allow_tf32 = execution.allow_tf32;
  return args;
}

// Returns whether these are tensors that attention's kernels can read, with shapes that fit. Never throws.
bool attention_takes(py::handle query, py::handle key, py::handle value) {
  try {
    for (py::handle tensor : {query, key, value})
      if (!py::detail::type_caster<TensorView>::is_plain(tensor)) return false;
    pybind11::detail::type_caster<TensorView> q, k, v;
    check_inputs(q.describe(query), k.describe(key), v.describe(value));
    return true;
  } catch (const py::builtin_exception&) {
  } catch (const py::error_already_set&) {
  }
  return false;
}

// Checks cu_seqlens (int32 or int64, on the CPU) and returns the segments; without cu_seqlens, one for each batch row.
std::vector<Segment> make_segments(const OptionalView& cu_seqlens_q, const OptionalView& cu_seqlens_k, int64_t batch,
                                   int64_t query_len, int64_t kv_len) {
  for (int64_t size : {batch, query_len, kv_len})
    if (size < 0 || size > INT32_MAX)
      refuse("batch is ", batch, ", query_len ", query_len, " and kv_len ", kv_len, ", expected 0 to 2^31 - 1");
  std::vector<Segment> segments;
  if (!cu_seqlens_q && !cu_seqlens_k) {
    if (query_len == 0 && kv_len == 0) return segments;
    for (int64_t b = 0; b < batch; ++b) segments.push_back({b, 0, query_len, 0, kv_len});
    return segments;
  }
  if (!cu_seqlens_q || !cu_seqlens_k) refuse("cu_seqlens_q and cu_seqlens_k must be given together");
  const Boundaries q = read_boundaries(*cu_seqlens_q, "cu_seqlens_q", batch, query_len);
  const Boundaries k = read_boundaries(*cu_seqlens_k, "cu_seqlens_k", batch, kv_len);
  if (q.size() != k.size())
    refuse("cu_seqlens_q has ", q.size(), " boundaries and cu_seqlens_k has ", k.size(), ", expected as many");
  std::vector<int64_t> with_queries;  // documents without queries are skipped here, once for all rows
  for (int64_t i = 0; i < q.documents(); ++i)
    if (q.bounds[i] < q.bounds[i + 1]) with_queries.push_back(i);
  for (int64_t copy = 0; copy < (with_queries.empty() ? 0 : q.rows); ++copy)
    for (int64_t document : with_queries) {
      const int64_t i = copy * q.documents() + document, q_begin = q.begin(i), q_end = q.end(i), k_begin = k.begin(i);
      const int64_t k_end = k.end(i), row = q_begin / query_len;
      if (q_end > (row + 1) * query_len)
        refuse("cu_seqlens_q: the segment from ", q_begin, " to ", q_end, " crosses the end of batch row ", row, " at ",
               (row + 1) * query_len, "; every row's end must be a boundary");
      if (k_begin < k_end && (k_begin < row * kv_len || k_end > (row + 1) * kv_len))
        refuse("cu_seqlens_k: the segment from ", k_begin, " to ", k_end, " is not inside batch row ", row,
               " of its queries, which holds keys ", row * kv_len, " to ", (row + 1) * kv_len);
      segments.push_back(
          {row, q_begin - row * query_len, q_end - q_begin, k_begin < k_end ? k_begin - row * kv_len : 0, k_end - k_begin});
    }
  return segments;
}

// The documents of a call. cu_seqlens on a GPU stay there; Python has checked a copy.
class Documents {
 public:
  Documents(AttentionArgs& args, const TensorView& query, const AttentionSettings& settings, const Execution& execution) {
    const OptionalView &q = settings.cu_seqlens_q, &k = settings.cu_seqlens_k;
    if (query.device_type == Device::cpu) {
      segments_ = make_segments(q, k, args.batch, args.query_len, args.kv_len);
      args.segments = segments_.data(), args.num_segments = static_cast<int64_t>(segments_.size());
    }
    if (q.has_value() != k.has_value()) refuse("cu_seqlens_q and cu_seqlens_k must be given together");
    if (!q || !execution.on_gpu()) return;
    args.cu_seqlens_q = boundaries(*q, "cu_seqlens_q", query);
    args.cu_seqlens_k = boundaries(*k, "cu_seqlens_k", query);
    if (q->shape[0] != k->shape[0])
      refuse("cu_seqlens_q has ", q->shape[0], " boundaries and cu_seqlens_k has ", k->shape[0], "; expected as many");
    args.num_boundaries = q->shape[0];
  }

 private:
  static const int64_t* boundaries(const TensorView& cu, const char* name, const TensorView& query) {
    check_device(cu, name, query);
    check_dtype(cu, name, DType::int64, "torch.int64");
    if (cu.ndim != 1 || cu.shape[0] < 1) refuse(name, " has shape ", shape_text(cu.shape, cu.ndim), ", expected 1-D");
    check_contiguous(cu, name);
    return cu.as<int64_t>();
  }
  std::vector<Segment> segments_;
};

void attention_forward(const TensorView& query, const TensorView& key, const TensorView& value, const TensorView& out,
                       const TensorView& lse, const AttentionSettings& settings, const Execution& execution) {
  const Kernels& kernels = kernels_for(query, execution);
  AttentionArgs args = attention_forward_args(query, key, value, out, lse, settings, execution);
  const Documents documents(args, query, settings, execution);
  if (execution.check_only) return;
  const Workspace workspace(execution, query, kernels.attention_forward_workspace(args));
  args.workspace = workspace.as();
  const DeviceTensors tensors{{"query", query, Access::read}, {"key", key, Access::read}, {"value", value, Access::read},
                              {"cu_seqlens_q", settings.cu_seqlens_q, Access::read},
                              {"cu_seqlens_k", settings.cu_seqlens_k, Access::read},
                              {"out", out, Access::write}, {"lse", lse, Access::write},
                              {"workspace", workspace.view(), Access::write}};
  py::gil_scoped_release release;
  prefer_huge_pages(out);
  kernels.attention_forward(args);
}

void attention_backward(const TensorView& grad_out, const OptionalView& grad_lse, const TensorView& query,
                        const TensorView& key, const TensorView& value, const TensorView& out, const TensorView& lse,
                        const TensorView& grad_query, const TensorView& grad_key, const TensorView& grad_value,
                        const AttentionSettings& settings, const Execution& execution) {
  const Kernels& kernels = kernels_for(query, execution);
  AttentionArgs args = common_args(query, key, value, out, lse, settings, execution);
  check_heads(grad_out, "grad_out", query);
  check_shape(grad_out, "grad_out", {query.shape[0], query.shape[1], query.shape[2], query.shape[3]});
  args.grad_lse = float_array(grad_lse, "grad_lse", query, {query.shape[0], query.shape[1], query.shape[2]});
  const std::pair<const TensorView*, const TensorView*> pairs[] = {
      {&grad_query, &query}, {&grad_key, &key}, {&grad_value, &value}};
  const char* names[] = {"grad_query", "grad_key", "grad_value"};
  for (int i = 0; i < 3; ++i) {
    const auto& [grad, like] = pairs[i];
    check_heads(*grad, names[i], query);
    check_distinct(*grad, names[i]);
    check_shape(*grad, names[i], {like->shape[0], like->shape[1], like->shape[2], like->shape[3]});
    for (const auto* in : {&grad_out, &query, &key, &value, &out}) check_apart(*grad, names[i], *in, "an input");
  }
  args.grad_out = heads(grad_out);
  args.grad_query = heads(grad_query), args.grad_key = heads(grad_key), args.grad_value = heads(grad_value);
  const Documents documents(args, query, settings, execution);
  if (execution.check_only) return;
  const Workspace workspace(execution, query, kernels.attention_backward_workspace(args));
  args.workspace = workspace.as();
  const DeviceTensors tensors{{"grad_out", grad_out, Access::read}, {"grad_lse", grad_lse, Access::read},
                              {"query", query, Access::read}, {"key", key, Access::read}, {"value", value, Access::read},
                              {"out", out, Access::read}, {"lse", lse, Access::read},
                              {"cu_seqlens_q", settings.cu_seqlens_q, Access::read},
                              {"cu_seqlens_k", settings.cu_seqlens_k, Access::read},
                              {"grad_query", grad_query, Access::write}, {"grad_key", grad_key, Access::write},
                              {"grad_value", grad_value, Access::write}, {"workspace", workspace.view(), Access::write}};
  py::gil_scoped_release release;
  for (const auto* grad : {&grad_query, &grad_key, &grad_value}) prefer_huge_pages(*grad);
  kernels.attention_backward(args);
}

py::list segments(const TensorView& cu_seqlens_q, const TensorView& cu_seqlens_k, int64_t batch, int64_t query_len,
                  int64_t kv_len) {
  py::list segments;
  for (const Segment& s : make_segments(cu_seqlens_q, cu_seqlens_k, batch, query_len, kv_len))
    segments.append(py::make_tuple(s.batch, s.query_begin, s.query_len, s.key_begin, s.key_len));
  return segments;
}

}  // namespace

AttentionArgs attention_forward_args(const TensorView& query, const TensorView& key, const TensorView& value,
                                     const TensorView& out, const TensorView& lse, const AttentionSettings& settings,
                                     const Execution& execution) {
  AttentionArgs args = common_args(query, key, value, out, lse, settings, execution);
  check_distinct(out, "out");
  for (const auto* in : {&query, &key, &value}) check_apart(out, "out", *in, "an input");
  return args;
}

void bind_attention(py::module_& m) {
  m.def("attention_forward", &attention_forward, py::arg("query"), py::arg("key"), py::arg("value"), py::arg("out"),
        py::arg("lse"), py::arg("settings"), py::arg("execution"));
  m.def("attention_backward", &attention_backward, py::arg("grad_out"), py::arg("grad_lse"), py::arg("query"),
        py::arg("key"), py::arg("value"), py::arg("out"), py::arg("lse"), py::arg("grad_query"), py::arg("grad_key"),
        py::arg("grad_value"), py::arg("settings"), py::arg("execution"));
  m.def("attention_takes", &attention_takes, py::arg("query"), py::arg("key"), py::arg("value"));
  m.def(
      "check_segments",
      [](const TensorView& cu_seqlens_q, const TensorView& cu_seqlens_k, int64_t batch, int64_t query_len,
         int64_t kv_len) { make_segments(cu_seqlens_q, cu_seqlens_k, batch, query_len, kv_len); },
      py::arg("cu_seqlens_q"), py::arg("cu_seqlens_k"), py::arg("batch"), py::arg("query_len"), py::arg("kv_len"));
  m.def("segments", &segments, py::arg("cu_seqlens_q"), py::arg("cu_seqlens_k"), py::arg("batch"), py::arg("query_len"),
        py::arg("kv_len"));
}

}  // namespace gptcore
