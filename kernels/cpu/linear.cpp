// A linear layer, y = x W^T + b, and its gradients dx = dy W, dW = dy^T x, db = the sum of the rows of dy.
//
// Each is a product C = A B. An element of C is the bias plus sums over blocks of kSteps, in order, whatever the number
// of rows and of threads: a row of C has the same bits alone and among others.
//
// With many rows, all of B is packed first, in panels of kWidth columns. Each thread then takes one band of rows of C
// after the other, and multiplies it by panel after panel. With few rows, packing would take longer than multiplying:
// each thread takes panels, and packs each block of it into the first-level cache just before it is multiplied. The rate
// at which B is read from memory is then the limit; panels.h has the order.
#include <omp.h>

#include "kernels/cpu/linear_pack.h"
#include "kernels/cpu/panels.h"

namespace gptcore {
namespace GPTCORE_ISA {
namespace {

constexpr int64_t kSteps = 256;      // of a block: the fewer terms in a float32 sum, the more exact it is
constexpr int64_t kMostTiles = 8;    // of a band, one above the other: a block of a panel stays in the cache for them
constexpr int64_t kFewRows = 64;     // with up to so many, B is packed block by block
constexpr int64_t kFused = kLanes == 16 ? 16 : 8;  // with up to so many, it is not even packed
constexpr int64_t kSerial = 1 << 17;  // multiplications that take less time than waking a thread

// The vectors of columns that are multiplied at once: accumulators of all rows, and B, stay in registers. Splitting
// float16 takes registers, too.
template <class S, class T>
constexpr int fused_vectors(int rows) {
  const int most = kLanes == 16 ? (kStep<T> == 2 ? 7 : 3) : kSame<S, float16> ? 3 : 4;
  return rows <= most ? kVectors : 1;
}

template <class T>
struct Product {
  int64_t rows, columns, depth;  // of C, and of the sum
  Matrix a, b, c;
  bool a_transposed;   // `a` holds A^T, and `b` holds B
  bool b_transposed;   // `b` holds B^T, and `a` holds A
  const void* bias;    // (columns,), may be null
  DType bias_dtype;
  bool accumulate;     // C += alpha A B instead of C = A B
  float alpha;

  int64_t steps() const { return (depth + kStep<T> - 1) / kStep<T>; }
  int64_t panels() const { return (columns + kWidth - 1) / kWidth; }
  int64_t panel_size() const { return steps() * kWidth; }  // Wide<T>s
  bool few_rows() const { return b_transposed && rows <= kFewRows; }
  // B can be multiplied as it is transposed, in units of 32 bits.
  bool fused() const {
    const int64_t numbers = b.dtype == DType::float32 ? 1 : 2;
    return rows <= kFused && depth % numbers == 0 && b.stride % numbers == 0 && numbers >= kStep<T>;
  }
  Prefetch prefetch(int64_t panel, int64_t next) const {
    const int64_t number = b.dtype == DType::float32 ? 4 : 2;
    const auto at = [&](int64_t i) { return i < panels() ? (const char*)b.data + i * kWidth * b.stride * number : nullptr; };
    return {at(panel), at(next), kWidth, depth * number, b.stride * number};
  }
  int threads(int most) const { return rows * columns * depth < kSerial ? 1 : most; }
  // A can be read in place. Rows at such a stride would share the few ways of one set of the cache.
  bool ready() const {
    const DType dtype = kStep<T> == 2 ? DType::bfloat16 : DType::float32;
    return !a_transposed && depth % kStep<T> == 0 && a.dtype == dtype && a.stride * (int64_t)sizeof(T) % 4096 != 0;
  }
  // Else a band of it is packed, in rows or, transposed, in panels of kRows like B's.
  int64_t left_row() const { return round_up(depth, 128) + 64; }  // never such a stride
  int64_t left_panel() const { return round_up(steps() * kRows + kLanes, kLanes); }
  bool stepwise() const { return few_rows() && fused() && !(rows == 1 && ready()); }  // A is packed step by step
  size_t left_bytes() const {  // of a thread, or of all with few rows
    if (stepwise()) return rows * steps() * sizeof(Wide<T>);
    if (ready()) return 0;
    if (few_rows()) return rows * left_row() * sizeof(T);
    return kMostTiles * (a_transposed ? left_panel() * sizeof(Wide<T>) : kRows * left_row() * sizeof(T));
  }
  // Rows of A from `row` on, which in the packed band are those from `at` on.
  Left<T> left(const char* band, int64_t row, int64_t at, int64_t tile_rows) const {
    if (ready()) return by_rows((const T*)a.data + row * a.stride, a.stride);
    if (!a_transposed) return by_rows((const T*)band + at * left_row(), left_row());
    const Wide<T>* panel = (const Wide<T>*)band + at / tile_rows * left_panel();
    return {(const T*)panel, kStep<T>, kStep<T> * kRows};
  }
  size_t right_bytes(int num_threads) const {  // all panels, or a block of a thread
    return sizeof(Wide<T>) * (few_rows() ? num_threads * kSteps * kWidth : panels() * panel_size());
  }
  size_t workspace(int num_threads) const {
    return right_bytes(num_threads) + (few_rows() ? 1 : num_threads) * left_bytes();
  }
};

// Packs the steps [step, end) of a panel.
template <class T>
void pack_right(const Product<T>& p, int64_t column, int64_t step, int64_t end, Wide<T>* to, Prefetch& next) {
  const int64_t columns = smaller(kWidth, p.columns - column), k = step * kStep<T>;
  const int64_t depth = smaller(end * kStep<T>, p.depth) - k;
  with_type(p.b.dtype, [&](auto zero) {
    using S = decltype(zero);
    const S* source = (const S*)p.b.data;
    if (p.b_transposed)
      pack_from_columns<S, T>(to, source + column * p.b.stride + k, p.b.stride, columns, depth, next);
    else pack_from_rows<kWidth, S, T>(to, source + k * p.b.stride + column, p.b.stride, depth, p.columns - column);
  });
}

template <class T>
void pack_left(const Product<T>& p, int64_t row, int64_t rows, int64_t tile_rows, void* to) {
  with_type(p.a.dtype, [&](auto zero) {
    using S = decltype(zero);
    const S* source = (const S*)p.a.data;
    if (!p.a_transposed) {
      source += row * p.a.stride;
      return pack_rows((T*)to, round_up(p.depth, kStep<T>), source, p.a.stride, rows, p.depth, p.left_row());
    }
    for (int64_t k = 0; k < p.depth; k += kStretch)  // whose rows stay in the cache while each panel takes its columns
      for (int64_t r = 0; r < rows; r += tile_rows)
        pack_from_rows<kRows, S, T>((Wide<T>*)to + r / tile_rows * p.left_panel() + k / kStep<T> * kRows,
                                    source + k * p.a.stride + row + r, p.a.stride, smaller(kStretch, p.depth - k),
                                    p.rows - row - r);
  });
}

// Packs one row of A for steps that hold a number of each row.
template <class T>
void pack_steps(const Product<T>& p, int64_t row, Wide<T>* to) {
  with_type(p.a.dtype, [&](auto zero) {
    const auto* source = (const decltype(zero)*)p.a.data + row * p.a.stride;
    for (int64_t k = 0; k < p.depth; k += kStretch) {
      alignas(Wide<T>) T narrow[kStretch];
      const int64_t here = smaller(kStretch, p.depth - k);
      pack_rows(narrow, here, source + k, 0, 1, here);
      for (int64_t i = 0; i < here; i += kStep<T>) memcpy(to + ((k + i) / kStep<T>)*p.rows + row, narrow + i, sizeof *to);
    }
  });
}

// Stores Rows x Vectors of C, of which `columns` exist.
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

// One block of the sum, for one panel.
template <class T>
struct Block {
  const Wide<T>* b;
  int64_t steps;
  const Vec* bias;        // which the sum begins with, or null: with the partial sums
  void* c;                // row 0 of the result, or null: the partial sums are kept
  DType dtype;
  int64_t stride, columns;
};

template <int Rows, int Vectors, class T>
void multiply_tile(const Block<T>& block, Left<T> a, int64_t row, float* partial) {
  Vec acc[Rows][Vectors], sum[Rows][Vectors] = {};
  auto begin = [&] {
    GPTCORE_UNROLL for (int r = 0; r < Rows; ++r)
      GPTCORE_UNROLL for (int v = 0; v < Vectors; ++v)
        acc[r][v] = block.bias ? block.bias[v] : load(partial + r * kWidth + v * kLanes);
  };
  if (kStep<T> == 2) {  // the error of rounding A and B is far above that of the sum
    begin();
    add_products<Rows, Vectors, kWidth>(acc, a, block.b, block.steps);
  } else {
    add_products<Rows, Vectors, kWidth>(sum, a, block.b, block.steps);
    begin();
    GPTCORE_UNROLL for (int r = 0; r < Rows; ++r)
      GPTCORE_UNROLL for (int v = 0; v < Vectors; ++v) acc[r][v] += sum[r][v];
  }
  if (!block.c) return store_tile(partial, kWidth, acc, Vectors * kLanes);
  with_type(block.dtype, [&](auto zero) {
    using S = decltype(zero);
    store_tile((S*)block.c + row * block.stride, block.stride, acc, block.columns);
  });
}

// The same for `rows` rows, at most Rows.
template <int Rows, class T>
GPTCORE_INLINE void multiply_some(int64_t rows, const Block<T>& block, Left<T> a, int64_t row, float* partial) {
  if constexpr (Rows > 1)
    if (rows < Rows) return multiply_some<Rows - 1>(rows, block, a, row, partial);
  if (block.columns > kLanes) multiply_tile<Rows, kVectors>(block, a, row, partial);
  else multiply_tile<Rows, 1>(block, a, row, partial);
}

template <class T>
void load_bias(const Product<T>& p, int64_t column, int64_t columns, Vec* bias) {
  with_type(p.bias_dtype, [&](auto zero) {
    const auto* from = (const decltype(zero)*)p.bias + column;
    for (int64_t v = 0; v * kLanes < columns; ++v) bias[v] = load_up_to(from + v * kLanes, columns - v * kLanes);
  });
}

// Computes rows [begin, end) of one panel of C. right(step, end) returns a packed block of the panel; `left` is the
// packed band of these rows.
template <class T, class Right>
GPTCORE_INLINE void multiply_panel(const Product<T>& p, const char* left, int64_t begin, int64_t end,
                                   int64_t tile_rows, int64_t panel, Right right) {
  float partial[larger(kMostTiles * kRows, kFewRows) * kWidth];
  Vec bias[kVectors] = {};
  const int64_t column = panel * kWidth, columns = smaller(kWidth, p.columns - column);
  const bool widened = p.c.dtype == DType::float32;
  char* c = (char*)p.c.data + column * (widened ? sizeof(float) : 2);
  if (p.bias) load_bias(p, column, columns, bias);
  for (int64_t step = 0; step < p.steps() || step == 0; step += kSteps) {
    const int64_t stop = smaller(step + kSteps, p.steps());
    const bool last = stop == p.steps() && !p.accumulate;
    const Block<T> block{right(step, stop), stop - step, step ? nullptr : bias, last ? c : nullptr,
                         p.c.dtype, p.c.stride, columns};
    for (int64_t row = begin; row < end; row += tile_rows)
      multiply_some<kRows>(smaller(tile_rows, end - row), block,
                           p.left(left, row, row - begin, tile_rows).from_step(step), row,
                           partial + (row - begin) * kWidth);
  }
  if (!p.accumulate) return;
  for (int64_t row = begin; row < end; ++row)
    for (int64_t j = 0; j < columns; j += kLanes) {
      float* to = (float*)c + row * p.c.stride + j;
      store_up_to(to, load_up_to(to, columns - j) + load(partial + (row - begin) * kWidth + j) * p.alpha, columns - j);
    }
}

// Some columns of C for up to kFused rows: B is multiplied as it is transposed, without a copy in memory. `a` holds the
// numbers of all rows step by step. noinline: GCC inlined it for one row into the parallel region, which was far slower.
template <int Rows, class S, class T>
__attribute__((noinline)) void multiply_fused(const Product<T>& p, const Wide<T>* a, int64_t column, Prefetch& next) {
  constexpr int kSome = fused_vectors<S, T>(Rows);
  constexpr int64_t kNumbers = 4 / sizeof(S), kStepsOfUnit = kNumbers / kStep<T>, kBlock = kSteps / kStepsOfUnit;
  const int64_t columns = smaller(kSome * kLanes, p.columns - column), units = p.depth / kNumbers;
  const float* source = (const float*)((const S*)p.b.data + column * p.b.stride);
  Vec bias[kSome] = {}, acc[Rows][kSome], sum[Rows][kSome];
  if (p.bias) load_bias(p, column, columns, bias);
  for (int r = 0; r < Rows; ++r)
    for (int v = 0; v < kSome; ++v) acc[r][v] = bias[v];
  for (int64_t k = 0; k < units; k += kBlock) {
    GPTCORE_UNROLL for (int r = 0; r < Rows; ++r)
      GPTCORE_UNROLL for (int v = 0; v < kSome; ++v) sum[r][v] = kStep<T> == 2 ? acc[r][v] : Vec{};
    transpose_units<kSome>(source + k, p.b.stride / kNumbers, columns, smaller(kBlock, units - k), next,
                           [&](int64_t unit, const Vec (&b)[kSome]) {
      const Wide<T>* at = a + (k + unit) * kStepsOfUnit * Rows;
      if constexpr (kStepsOfUnit == 2) {
        Vec both[kSome][2];
        GPTCORE_UNROLL for (int v = 0; v < kSome; ++v) split(b[v], both[v], S());
        GPTCORE_UNROLL for (int s = 0; s < 2; ++s)
          GPTCORE_UNROLL for (int r = 0; r < Rows; ++r) {
            const Vec number = splat(at[s * Rows + r]);
            GPTCORE_UNROLL for (int v = 0; v < kSome; ++v) sum[r][v] += number * both[v][s];
          }
      } else {
        GPTCORE_UNROLL for (int r = 0; r < Rows; ++r) {
          auto number = splat_wide((const T*)(at + r));
          GPTCORE_UNROLL for (int v = 0; v < kSome; ++v) multiply_add(sum[r][v], number, bit_cast<decltype(number)>(b[v]));
        }
      }
    });
    GPTCORE_UNROLL for (int r = 0; r < Rows; ++r)
      GPTCORE_UNROLL for (int v = 0; v < kSome; ++v) acc[r][v] = kStep<T> == 2 ? sum[r][v] : acc[r][v] + sum[r][v];
  }
  with_type(p.c.dtype, [&](auto zero) {
    using C = decltype(zero);
    store_tile((C*)p.c.data + column, p.c.stride, acc, columns);
  });
}

// The same for the number of rows that there are, at most Rows.
template <int Rows, class S, class T>
GPTCORE_INLINE void multiply_fused_some(const Product<T>& p, const Wide<T>* a, int64_t column, Prefetch& next) {
  if constexpr (Rows > 1)
    if (p.rows < Rows) return multiply_fused_some<Rows - 1, S>(p, a, column, next);
  const int64_t end = smaller(column + kWidth, p.columns);
  for (; column < end; column += fused_vectors<S, T>(Rows) * kLanes) multiply_fused<Rows, S>(p, a, column, next);
}

template <class T>
void multiply_few(const Product<T>& p, char* workspace, int num_threads) {
  const int64_t tiles = larger(1, (p.rows + kRows - 1) / kRows), tile_rows = larger(1, (p.rows + tiles - 1) / tiles);
  char* left = workspace + p.right_bytes(num_threads);
  int64_t taken = 0;
#pragma omp parallel num_threads(num_threads) if (num_threads > 1)
  {
    Wide<T>* packed = (Wide<T>*)workspace + omp_get_thread_num() * kSteps * kWidth;
    if (p.stepwise()) {
#pragma omp for schedule(static)
      for (int64_t row = 0; row < p.rows; ++row) pack_steps(p, row, (Wide<T>*)left);
    } else if (!p.ready()) {
#pragma omp for schedule(static)
      for (int64_t row = 0; row < p.rows; ++row) pack_left(p, row, 1, 1, left + row * p.left_row() * sizeof(T));
    }
    const Wide<T>* a = (const Wide<T>*)(p.stepwise() ? left : p.a.data);
    take_panels(taken, p.panels(), num_threads, [&](int64_t panel, int64_t next_panel) {
      Prefetch next = p.prefetch(panel, next_panel);
      if (!p.fused())
        return multiply_panel(p, left, 0, p.rows, tile_rows, panel, [&](int64_t step, int64_t end) {
          pack_right(p, panel * kWidth, step, end, packed, next);
          return packed;
        });
      with_type(p.b.dtype, [&](auto zero) {
        using S = decltype(zero);
        if constexpr (sizeof(S) <= sizeof(T) && (kStep<T> == 1 || kSame<S, T>))
          multiply_fused_some<kFused, S>(p, a, panel * kWidth, next);
      });
    });
  }
}

template <class T>
void multiply_many(const Product<T>& p, char* workspace, int num_threads) {
  // All threads get as many tiles of about the same size, in as many bands.
  const int64_t tiles = larger(1, (p.rows + kRows * num_threads - 1) / (kRows * num_threads));  // of a thread
  const int64_t tile_rows = larger(1, (p.rows + tiles * num_threads - 1) / (tiles * num_threads));
  const int64_t bands = (tiles + kMostTiles - 1) / kMostTiles, band = (tiles + bands - 1) / bands * tile_rows;
  Wide<T>* right = (Wide<T>*)workspace;
#pragma omp parallel num_threads(num_threads) if (num_threads > 1)
  {
    char* left = workspace + p.right_bytes(num_threads) + omp_get_thread_num() * p.left_bytes();
    Prefetch none;
#pragma omp for schedule(dynamic, 1)
    for (int64_t panel = 0; panel < p.panels(); ++panel)
      pack_right(p, panel * kWidth, 0, p.steps(), right + panel * p.panel_size(), none);
#pragma omp for schedule(dynamic, 1)
    for (int64_t begin = 0; begin < p.rows; begin += band) {
      const int64_t end = smaller(begin + band, p.rows);
      if (!p.ready()) pack_left(p, begin, end - begin, tile_rows, left);
      for (int64_t panel = 0; panel < p.panels(); ++panel)
        multiply_panel(p, left, begin, end, tile_rows, panel, [&](int64_t step, int64_t) {
          return right + panel * p.panel_size() + step * kWidth;
        });
    }
  }
}

template <class T>
void multiply_all(const Product<T>& p, char* workspace, int num_threads) {
  if (p.rows == 0) return;
  if (p.few_rows()) multiply_few(p, workspace, p.threads(num_threads));
  else multiply_many(p, workspace, p.threads(num_threads));
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
          args.bias, args.bias_dtype, false, 1.0f};
}
template <class T>
Product<T> input_gradient(const LinearArgs& args) {
  return {args.rows, args.in_features, args.out_features, args.grad_out, args.weight, args.grad_x, false, false,
          nullptr, DType::float32, false, 1.0f};
}
template <class T>
Product<T> weight_gradient(const LinearArgs& args) {
  return {args.out_features, args.in_features, args.rows, args.grad_out, args.x, args.grad_weight, true, false,
          nullptr, DType::float32, args.accumulate, args.scale};
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
