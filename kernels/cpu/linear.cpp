// A linear layer, y = x W^T + b, and its gradients dx = dy W, dW = dy^T x, db = the sum of the rows of dy.
//
// Each is a product C = A B. All of B is packed first, in panels of few columns. Then each thread takes one band of
// rows of C after the other: what it reads of A stays in the cache while B passes by, panel after panel. Results leave
// the registers once, as what they are to be, with the bias added.
#include <omp.h>

#include "kernels/cpu/rows.h"
#include "kernels/cpu/tiles.h"

namespace gptcore {
namespace GPTCORE_ISA {
namespace {

// A tile of C in registers: 12 x 2 vectors read less of B than 6 x 4, and B comes from the second level of the cache.
constexpr int kRows = kLanes == 16 ? 12 : 6, kVectors = 2;
constexpr int kWidth = kVectors * kLanes;  // columns of a panel of B
constexpr int64_t kSteps = 256;            // whose terms are added up on their own, as those of kDepth in attention
constexpr int64_t kStretch = 64;           // rows or columns that are packed in one go
constexpr int64_t kMostTiles = 2;          // of a band, one above the other

template <class T>
struct Product {
  int64_t rows, columns, depth;  // of C, and of the sum
  Matrix a, b, c;
  bool turned;       // `a` holds A^T and `b` holds B, instead of A and B
  bool b_turned;     // `b` holds B^T
  const void* bias;  // (columns,), may be null
  DType bias_dtype;

  int64_t steps() const { return (depth + kStep<T> - 1) / kStep<T>; }
  int64_t panels() const { return (columns + kWidth - 1) / kWidth; }
  int64_t panel_size() const { return steps() * kWidth; }  // Wide<T>s
  // A can be read as it lies. Rows at this distance would share the few places of one set of the cache.
  bool ready() const {
    const DType dtype = kStep<T> == 2 ? DType::bfloat16 : DType::float32;
    return !turned && depth % kStep<T> == 0 && a.dtype == dtype && a.stride * (int64_t)sizeof(T) % 4096 != 0;
  }
  // Else a band of it is packed, in rows or, turned, in panels of kRows like B's.
  int64_t left_row() const { return round_up(depth, 128) + 64; }  // never of such a distance
  int64_t left_panel() const { return round_up(steps() * kRows + kLanes, kLanes); }
  size_t left_bytes() const {  // of a thread
    if (ready()) return 0;
    return kMostTiles * (turned ? left_panel() * sizeof(Wide<T>) : kRows * left_row() * sizeof(T));
  }
  // Rows of A from `row` on, which in the packed band are those from `at` on.
  Left<T> left(const char* band, int64_t row, int64_t at, int64_t tile_rows) const {
    if (ready()) return by_rows((const T*)a.data + row * a.stride, a.stride);
    if (!turned) return by_rows((const T*)band + at * left_row(), left_row());
    const Wide<T>* panel = (const Wide<T>*)band + at / tile_rows * left_panel();
    return {(const T*)panel, kStep<T>, kStep<T> * kRows};
  }
  size_t right_bytes() const { return panels() * panel_size() * sizeof(Wide<T>); }
  size_t workspace(int num_threads) const { return right_bytes() + num_threads * left_bytes(); }
};

// What T keeps of these numbers.
template <class T>
GPTCORE_INLINE Vec rounded_to(Vec v) {
  if constexpr (kStep<T> == 2) return bit_cast<Vec>(__builtin_convertvector(to_bfloat16(v), UintVec) << 16);
  return v;
}

// Two numbers side by side that bfloat16 can hold, or one.
GPTCORE_INLINE void store_exactly(float* p, const Vec* v) { store(p, v[0]); }
GPTCORE_INLINE void store_exactly(uint32_t* p, const Vec* v) {
  store((float*)p, bit_cast<Vec>(bit_cast<UintVec>(v[0]) >> 16 | bit_cast<UintVec>(v[1])));
}

// Rows of a source that follow each other in depth: Width columns of each, of which `columns` are there. The last
// vector may be written beyond Width, where the next row goes.
template <int Width, class S, class T>
void pack_from_rows(Wide<T>* to, const S* source, int64_t stride, int64_t rows, int64_t columns) {
  auto pack = [&](int64_t count, auto load_at) {
    for (int64_t j = 0; j < Width; j += kLanes) {
      Vec v[kStep<T>] = {};
      for (int s = 0; s < count; ++s) {
        v[s] = load_at(source + s * stride + j, j);
        if (sizeof(S) > sizeof(T)) v[s] = rounded_to<T>(v[s]);
      }
      store_exactly(to + j, v);
    }
    source += count * stride, to += Width;
  };
  auto some = [&](const S* p, int64_t j) { return j < columns ? load_up_to(p, columns - j) : Vec{}; };
  auto all = [](const S* p, int64_t) { return load(p); };
  const bool whole = columns >= (Width + kLanes - 1) / kLanes * kLanes;
  int64_t k = 0;
  for (; whole && k + kStep<T> <= rows; k += kStep<T>) pack(kStep<T>, all);
  for (; k < rows; k += kStep<T>) pack(smaller(kStep<T>, rows - k), some);
}

// Rows of a source side by side, up to kWidth: depth runs along its columns.
template <class S, class T>
void pack_from_columns(Wide<T>* to, const S* source, int64_t stride, int64_t rows, int64_t columns) {
  if constexpr (sizeof(S) > sizeof(T)) {
    for (int64_t k = 0; k < columns; k += kStretch, source += kStretch, to += kStretch / kStep<T> * kWidth) {
      T narrow[kWidth * kStretch];
      const int64_t here = smaller(kStretch, columns - k);
      pack_rows(narrow, kStretch, source, stride, rows, here);
      pack_panel_columns<T, T, kWidth>(to, narrow, kStretch, rows, round_up(here, kStep<T>), 1.0f);
    }
  } else {
    pack_panel_columns<S, T, kWidth>(to, source, stride, rows, columns, 1.0f);
  }
}

template <class T>
void pack_right(const Product<T>& p, int64_t column, Wide<T>* to) {
  const int64_t columns = smaller(kWidth, p.columns - column);
  with_type(p.b.dtype, [&](auto zero) {
    using S = decltype(zero);
    const S* source = (const S*)p.b.data;
    if (p.b_turned) pack_from_columns<S, T>(to, source + column * p.b.stride, p.b.stride, columns, p.depth);
    else pack_from_rows<kWidth, S, T>(to, source + column, p.b.stride, p.depth, p.columns - column);
  });
}

template <class T>
void pack_left(const Product<T>& p, int64_t row, int64_t rows, int64_t tile_rows, void* to) {
  with_type(p.a.dtype, [&](auto zero) {
    using S = decltype(zero);
    const S* source = (const S*)p.a.data;
    if (!p.turned) {
      source += row * p.a.stride;
      return pack_rows((T*)to, round_up(p.depth, kStep<T>), source, p.a.stride, rows, p.depth, p.left_row());
    }
    for (int64_t k = 0; k < p.depth; k += kStretch)  // whose rows stay in the cache, while each panel takes its columns
      for (int64_t r = 0; r < rows; r += tile_rows)
        pack_from_rows<kRows, S, T>((Wide<T>*)to + r / tile_rows * p.left_panel() + k / kStep<T> * kRows,
                                    source + k * p.a.stride + row + r, p.a.stride, smaller(kStretch, p.depth - k),
                                    p.rows - row - r);
  });
}

// Rows x Vectors of C from the registers to memory, of which `columns` are left.
template <int Rows, int Vectors, class S>
GPTCORE_INLINE void store_tile(S* to, int64_t stride, const Vec (&acc)[Rows][Vectors], int64_t columns) {
  if (columns >= Vectors * kLanes) {
    GPTCORE_UNROLL for (int r = 0; r < Rows; ++r)
      GPTCORE_UNROLL for (int v = 0; v < Vectors; ++v) store(to + r * stride + v * kLanes, acc[r][v]);
  } else {
    GPTCORE_UNROLL for (int r = 0; r < Rows; ++r)
      GPTCORE_UNROLL for (int v = 0; v < Vectors; ++v)
        if (columns > v * kLanes) store_up_to(to + r * stride + v * kLanes, acc[r][v], columns - v * kLanes);
  }
}

template <int Rows, int Vectors, class T>
void multiply_tile(Left<T> a, const Wide<T>* b, int64_t steps, const Vec* bias, void* c, DType dtype, int64_t stride,
                   int64_t columns) {
  Vec acc[Rows][Vectors];
  GPTCORE_UNROLL for (int r = 0; r < Rows; ++r)
    GPTCORE_UNROLL for (int v = 0; v < Vectors; ++v) acc[r][v] = bias[v];
  if (kStep<T> == 2) {  // the rounding of A and B drowns that of the sum
    add_products<Rows, Vectors, kWidth>(acc, a, b, steps);
  } else {
    for (; steps > 0; steps -= kSteps, a = a.from_step(kSteps), b += kSteps * kWidth) {
      Vec sum[Rows][Vectors] = {};
      add_products<Rows, Vectors, kWidth>(sum, a, b, smaller(steps, kSteps));
      GPTCORE_UNROLL for (int r = 0; r < Rows; ++r)
        GPTCORE_UNROLL for (int v = 0; v < Vectors; ++v) acc[r][v] += sum[r][v];
    }
  }
  with_type(dtype, [&](auto zero) { store_tile((decltype(zero)*)c, stride, acc, columns); });
}

// The same for `rows` rows, of which there are not more than Rows.
template <int Rows, class T>
GPTCORE_INLINE void multiply_some(int64_t rows, Left<T> a, const Wide<T>* b, int64_t steps, const Vec* bias,
                                  const Matrix& c, int64_t row, int64_t column, int64_t columns) {
  if constexpr (Rows > 1)
    if (rows < Rows) return multiply_some<Rows - 1>(rows, a, b, steps, bias, c, row, column, columns);
  void* to = (char*)c.data + (row * c.stride + column) * (c.dtype == DType::float32 ? 4 : 2);
  if (columns > kLanes) multiply_tile<Rows, kVectors>(a, b, steps, bias, to, c.dtype, c.stride, columns);
  else multiply_tile<Rows, 1>(a, b, steps, bias, to, c.dtype, c.stride, columns);
}

template <class T>
void load_bias(const Product<T>& p, int64_t column, int64_t columns, Vec* bias) {
  with_type(p.bias_dtype, [&](auto zero) {
    const auto* from = (const decltype(zero)*)p.bias + column;
    for (int64_t v = 0; v * kLanes < columns; ++v) bias[v] = load_up_to(from + v * kLanes, columns - v * kLanes);
  });
}

template <class T>
void multiply_all(const Product<T>& p, char* workspace, int num_threads) {
  // All threads get as many tiles of about the same size, in as many bands.
  const int64_t tiles = larger(1, (p.rows + kRows * num_threads - 1) / (kRows * num_threads));  // of a thread
  const int64_t tile_rows = larger(1, (p.rows + tiles * num_threads - 1) / (tiles * num_threads));
  const int64_t bands = (tiles + kMostTiles - 1) / kMostTiles, band = (tiles + bands - 1) / bands * tile_rows;
  Wide<T>* right = (Wide<T>*)workspace;
#pragma omp parallel num_threads(num_threads) if (num_threads > 1)
  {
    char* left = workspace + p.right_bytes() + omp_get_thread_num() * p.left_bytes();
#pragma omp for schedule(dynamic, 1)
    for (int64_t panel = 0; panel < p.panels(); ++panel)
      pack_right(p, panel * kWidth, right + panel * p.panel_size());
#pragma omp for schedule(dynamic, 1)
    for (int64_t begin = 0; begin < p.rows; begin += band) {
      const int64_t end = smaller(begin + band, p.rows);
      if (!p.ready()) pack_left(p, begin, end - begin, tile_rows, left);
      for (int64_t panel = 0; panel < p.panels(); ++panel) {
        const int64_t column = panel * kWidth, columns = smaller(kWidth, p.columns - column);
        Vec bias[kVectors] = {};
        if (p.bias) load_bias(p, column, columns, bias);
        for (int64_t row = begin; row < end; row += tile_rows)
          multiply_some<kRows>(smaller(tile_rows, end - row), p.left(left, row, row - begin, tile_rows),
                               right + panel * p.panel_size(), p.steps(), bias, p.c, row, column, columns);
      }
    }
  }
}

// The sums of the rows of a matrix, in blocks of rows: the fewer float32 additions follow one another, the more exact
// they are.
void sum_rows(const Matrix& m, int64_t rows, int64_t columns, void* to, DType to_dtype, int num_threads) {
  constexpr int kSome = 8, kBlock = 16;  // vectors and rows
  parallel_for((columns + kSome * kLanes - 1) / (kSome * kLanes), num_threads, [&](int64_t some) {
    const int64_t column = some * kSome * kLanes, left = columns - column;
    Vec total[kSome] = {};
    with_type(m.dtype, [&](auto zero) {
      using S = decltype(zero);
      const S* source = (const S*)m.data + column;
      for (int64_t row = 0; row < rows;) {
        Vec sum[kSome] = {};
        for (int64_t end = smaller(row + kBlock, rows); row < end; ++row)
          for (int v = 0; v < kSome; ++v)
            if (v * kLanes < left) sum[v] += load_up_to(source + row * m.stride + v * kLanes, left - v * kLanes);
        for (int v = 0; v < kSome; ++v) total[v] += sum[v];
      }
    });
    with_type(to_dtype, [&](auto zero) {
      using S = decltype(zero);
      for (int v = 0; v < kSome; ++v)
        if (v * kLanes < left) store_up_to((S*)to + column + v * kLanes, total[v], left - v * kLanes);
    });
  });
}

template <class T>
Product<T> output(const LinearArgs& args) {
  return {args.rows, args.out_features, args.in_features, args.x, args.weight, args.out, false, true,
          args.bias, args.bias_dtype};
}
template <class T>
Product<T> input_gradient(const LinearArgs& args) {
  return {args.rows, args.in_features, args.out_features, args.grad_out, args.weight, args.grad_x, false, false,
          nullptr, DType::float32};
}
template <class T>
Product<T> weight_gradient(const LinearArgs& args) {
  return {args.out_features, args.in_features, args.rows, args.grad_out, args.x, args.grad_weight, true, false,
          nullptr, DType::float32};
}

// body(T()) for the type T in which products of `dtype` are made.
template <class Body>
GPTCORE_INLINE void with_operand(DType dtype, Body body) {
  if (dtype == DType::bfloat16) body(Bfloat16Operand());
  else body(float());
}

}  // namespace

size_t linear_workspace(const LinearArgs& args) {
  size_t bytes = 0;
  with_operand(args.dtype, [&](auto zero) {
    using T = decltype(zero);
    const int threads = args.num_threads;
    if (args.out.data) bytes = output<T>(args).workspace(threads);
    if (args.grad_x.data) bytes = larger(bytes, input_gradient<T>(args).workspace(threads));
    if (args.grad_weight.data) bytes = larger(bytes, weight_gradient<T>(args).workspace(threads));
  });
  return bytes;
}

void linear(const LinearArgs& args) {
  with_operand(args.dtype, [&](auto zero) {
    using T = decltype(zero);
    if (args.out.data) multiply_all(output<T>(args), args.workspace, args.num_threads);
    if (args.grad_x.data) multiply_all(input_gradient<T>(args), args.workspace, args.num_threads);
    if (args.grad_weight.data) multiply_all(weight_gradient<T>(args), args.workspace, args.num_threads);
  });
  if (args.grad_bias)
    sum_rows(args.grad_out, args.rows, args.out_features, args.grad_bias, args.bias_dtype, args.num_threads);
}

}  // namespace GPTCORE_ISA
}  // namespace gptcore
