// A linear layer whose weights are in GGUF's blocks of 32 numbers: q8_0 (a float16 scale, 32 x 8 bits) or q4_0 (a
// float16 scale, 32 x 4 bits; 16 low halves first).
//
// Each row of x is rounded to 8 bits in blocks of 32, as in llama.cpp, but with float32 scales. Products within a block
// are summed in integers, which is exact in any order. The sums of blocks are added in float32, in the order of the
// blocks, whatever the number of rows and of threads: a row of the result has the same bits alone and among others.
//
// A thread takes panels of kWidth outputs, some at once. It packs kChunk blocks of a panel into the first-level cache,
// transposed so that a lane is an output, and multiplies them by up to kBand rows of x. For few rows, packing takes longer
// than adding up the products of each output afterwards.
#include <omp.h>

#include "kernels/cpu/panels.h"
#include "kernels/cpu/rows.h"

namespace gptcore {
namespace GPTCORE_ISA {
namespace {

constexpr int kBlock = 32;                       // numbers that share a scale
constexpr int kVectors = kLanes == 16 ? 2 : 1;   // a tile of sums in registers is kRows x kVectors
constexpr int kRows = kLanes == 16 ? 6 : 4;
constexpr int kWidth = kVectors * kLanes;
constexpr int kRead = 32;                        // outputs of a task: with fewer, weights are prefetched too late
static_assert(kRead % kWidth == 0, "a task is whole panels");
constexpr int64_t kChunk = 8;                    // blocks that are packed at once
constexpr int64_t kBand = 256;                   // rows
constexpr int64_t kSerial = 1 << 18;             // multiplications: below, one thread is faster

constexpr int kUnits = kBlock / 4;  // vectors of a block: a lane holds four numbers
constexpr int kPacked = kUnits + 1;  // and its scale
#if defined(__AVX512VNNI__)
constexpr bool kDots = true;  // an instruction multiplies and adds four numbers
#else
constexpr bool kDots = false;
#endif
#if defined(__AVX2__)
constexpr bool kPairs = true;  // an instruction multiplies and adds two numbers, in 16 bits
#else
constexpr bool kPairs = false;
#endif
// Both take weights without sign: an offset is added to them. In 16 bits, the sum of a block with this offset fits for q4_0.
template <BlockType Type> constexpr bool kShorts = kPairs && !kDots && Type == BlockType::q4_0;
template <BlockType Type> constexpr int kOffset = Type == BlockType::q4_0 ? (kPairs || kDots ? 8 : 0) : kDots ? 128 : 0;

// With up to so many rows of x, weights are not packed.
constexpr int64_t kFused = 64;
constexpr int kTogether = kLanes == 16 ? 4 : 2;  // rows of x, whose sums are in registers beside the weights

#if defined(__AVX2__)
#if defined(__AVX512BW__)
GPTCORE_INLINE IntVec multiply_pairs(IntVec weights, IntVec x) {
  return (IntVec)_mm512_maddubs_epi16((__m512i)weights, (__m512i)x);
}
GPTCORE_INLINE IntVec add_shorts(IntVec a, IntVec b) { return (IntVec)_mm512_add_epi16((__m512i)a, (__m512i)b); }
GPTCORE_INLINE IntVec sum_pairs(IntVec v) { return (IntVec)_mm512_madd_epi16((__m512i)v, _mm512_set1_epi16(1)); }
#else
GPTCORE_INLINE IntVec multiply_pairs(IntVec weights, IntVec x) {
  return (IntVec)_mm256_maddubs_epi16((__m256i)weights, (__m256i)x);
}
GPTCORE_INLINE IntVec add_shorts(IntVec a, IntVec b) { return (IntVec)_mm256_add_epi16((__m256i)a, (__m256i)b); }
GPTCORE_INLINE IntVec sum_pairs(IntVec v) { return (IntVec)_mm256_madd_epi16((__m256i)v, _mm256_set1_epi16(1)); }
#endif
#endif

// Adds the products of the four numbers of each lane, or with kShorts of pairs of them in 16 bits.
template <BlockType Type>
GPTCORE_INLINE void add_products(IntVec& sum, IntVec weights, IntVec x) {
#if defined(__AVX512VNNI__)
  sum = (IntVec)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)weights, (__m512i)x);
#elif defined(__AVX2__)
  if (kShorts<Type>) {
    sum = add_shorts(sum, multiply_pairs(weights, x));
    return;
  }
#if defined(__AVX512BW__)
  const __m512i w = (__m512i)weights, absolute = _mm512_abs_epi8(w);
  const __m512i signed_x = _mm512_mask_sub_epi8((__m512i)x, _mm512_movepi8_mask(w), _mm512_setzero_si512(), (__m512i)x);
#else
  const __m256i w = (__m256i)weights, absolute = _mm256_abs_epi8(w), signed_x = _mm256_sign_epi8((__m256i)x, w);
#endif
  sum += sum_pairs(multiply_pairs((IntVec)absolute, (IntVec)signed_x));
#elif defined(__SSE2__)
  const auto even = [](IntVec v) { return _mm_srai_epi16(_mm_slli_epi16((__m128i)v, 8), 8); };
  const auto odd = [](IntVec v) { return _mm_srai_epi16((__m128i)v, 8); };
  sum += (IntVec)_mm_madd_epi16(even(weights), even(x)) + (IntVec)_mm_madd_epi16(odd(weights), odd(x));
#else
  for (int shift = 24; shift >= 0; shift -= 8) sum += (weights << shift >> 24) * (x << shift >> 24);
#endif
}

// ---- weights -------------------------------------------------------------------------------------------------------

constexpr int64_t block_bytes(BlockType type) { return type == BlockType::q8_0 ? 34 : 18; }

// Loads a block of kLanes rows, transposed: v[i] holds four numbers of each row.
template <BlockType Type>
GPTCORE_INLINE void load_units(IntVec* v, const uint8_t* block, int64_t stride) {
  Vec quads[kUnits];
  GPTCORE_UNROLL for (int i = 0; i < 4; ++i) {
    const uint8_t* numbers = block + i * stride + 2;
    quads[i] = load_quads(numbers, stride);
    if (Type == BlockType::q8_0) quads[i + 4] = load_quads(numbers + 16, stride);
  }
  transpose_quads(quads);
  if (Type == BlockType::q8_0) transpose_quads(quads + 4);
  GPTCORE_UNROLL for (int i = 0; i < 4; ++i) {
    v[i] = bit_cast<IntVec>(quads[i]);
    if constexpr (Type == BlockType::q8_0) {
      v[i + 4] = bit_cast<IntVec>(quads[i + 4]);
      if (kOffset<Type>) v[i] ^= (int32_t)0x80808080, v[i + 4] ^= (int32_t)0x80808080;
    } else {
      typedef int8_t Bytes __attribute__((vector_size(kLanes * 4)));
      const IntVec low = v[i] & 0x0f0f0f0f, high = v[i] >> 4 & 0x0f0f0f0f;
      v[i] = kOffset<Type> ? low : bit_cast<IntVec>(bit_cast<Bytes>(low) - 8);
      v[i + 4] = kOffset<Type> ? high : bit_cast<IntVec>(bit_cast<Bytes>(high) - 8);
    }
  }
}

// Returns the scales of a block of kLanes rows, without a copy in memory: that would wait for 2-byte stores.
GPTCORE_INLINE Vec load_scales(const uint8_t* block, int64_t stride) {
  HalfBits scales;
#if defined(__AVX2__)
  __m128i eights[kLanes / 8];
  GPTCORE_UNROLL for (int i = 0; i < kLanes / 8; ++i) {
    const auto at = [&](int64_t row) {
      uint16_t scale;
      memcpy(&scale, block + (8 * i + row) * stride, sizeof scale);
      return scale;
    };
    __m128i v = _mm_cvtsi32_si128(at(0));
    v = _mm_insert_epi16(v, at(1), 1), v = _mm_insert_epi16(v, at(2), 2), v = _mm_insert_epi16(v, at(3), 3);
    v = _mm_insert_epi16(v, at(4), 4), v = _mm_insert_epi16(v, at(5), 5), v = _mm_insert_epi16(v, at(6), 6);
    eights[i] = _mm_insert_epi16(v, at(7), 7);
  }
#if defined(__AVX512F__)
  scales = (HalfBits)_mm256_set_m128i(eights[1], eights[0]);
#else
  scales = (HalfBits)eights[0];
#endif
#else
  for (int i = 0; i < kLanes; ++i) memcpy((uint16_t*)&scales + i, block + i * stride, sizeof(uint16_t));
#endif
  return load((const float16*)&scales);
}

// Blocks of consecutive rows.
struct Blocks {
  const uint8_t* first;
  int64_t stride;
};

// Returns blocks [begin, end) of kLanes rows, end - begin <= kChunk. Rows beyond the last are copies of it.
template <BlockType Type>
GPTCORE_INLINE Blocks rows_at(const QuantizedLinearArgs& args, int64_t column, int64_t begin, int64_t end,
                              uint8_t (&copies)[kLanes * kChunk * block_bytes(Type)]) {
  constexpr int64_t kBytes = block_bytes(Type), kStep = kChunk * kBytes;
  const int64_t stride = args.in_features / kBlock * kBytes, rows = args.out_features - column;
  const uint8_t* source = args.weight + column * stride + begin * kBytes;
  if (rows >= kLanes) return {source, stride};
  for (int64_t i = 0; i < kLanes; ++i)
    memcpy(copies + i * kStep, source + smaller(i, rows - 1) * stride, (end - begin) * kBytes);
  return {copies, kStep};
}

// Loads block b of a panel of Vectors * kLanes rows: numbers, then scales, of each vector of rows.
template <BlockType Type, int Vectors>
GPTCORE_INLINE void load_panel(IntVec* to, const Blocks (&panel)[Vectors], int64_t b) {
  GPTCORE_UNROLL for (int v = 0; v < Vectors; ++v) {
    const uint8_t* block = panel[v].first + b * block_bytes(Type);
    load_units<Type>(to + v * kPacked, block, panel[v].stride);
    to[v * kPacked + kUnits] = bit_cast<IntVec>(load_scales(block, panel[v].stride));
  }
}

// Packs blocks [begin, end) of a panel.
template <BlockType Type, int Vectors>
void pack_panel(const QuantizedLinearArgs& args, int64_t column, int64_t begin, int64_t end, IntVec* to) {
  uint8_t copies[kLanes * kChunk * block_bytes(Type)];
  Blocks panel[Vectors];
  for (int v = 0; v < Vectors; ++v) panel[v] = rows_at<Type>(args, column + v * kLanes, begin, end, copies);
  for (int64_t b = 0; b < end - begin; ++b) load_panel<Type, Vectors>(to + b * kVectors * kPacked, panel, b);
}

// ---- activations ---------------------------------------------------------------------------------------------------

struct Activations {
  int8_t* numbers;   // (blocks, rows, kBlock)
  float* scales;     // (blocks, rows)
  int32_t* offsets;  // (blocks, rows), minus what the offset of the weights adds to the sum of a block
};

// Stores integers from -127 to 127 as bytes.
GPTCORE_INLINE void store_bytes(int8_t* to, IntVec n) {
#if defined(__AVX512F__)
  _mm_storeu_si128((__m128i*)to, _mm512_cvtepi32_epi8((__m512i)n));
#elif defined(__AVX2__)
  const __m256i whole = (__m256i)n;
  const __m128i shorts = _mm_packs_epi32(_mm256_castsi256_si128(whole), _mm256_extracti128_si256(whole, 1));
  _mm_storel_epi64((__m128i*)to, _mm_packs_epi16(shorts, shorts));
#else
  for (int i = 0; i < kLanes; ++i) to[i] = n[i];
#endif
}

GPTCORE_INLINE float max_lanes(Vec v) {
  const IntVec lane = lane_index();
  GPTCORE_UNROLL for (int half = kLanes / 2; half > 0; half /= 2) v = max(v, __builtin_shuffle(v, lane ^ half));
  return v[0];
}

// Rounds a row to 8 bits, a scale for each block; the scale is NaN where the block is not finite.
template <class S>
void round_row(const S* x, int64_t blocks, int64_t rows, int weight_offset, int8_t* numbers, float* scales,
               int32_t* offsets) {
  for (int64_t b = 0; b < blocks; ++b, x += kBlock, numbers += rows * kBlock, scales += rows, offsets += rows) {
    Vec maxima = {}, not_finite = {};  // x * 0 is NaN for infinity and NaN
    for (int j = 0; j < kBlock; j += kLanes) {
      const Vec v = load(x + j);
      maxima = max(maxima, max(v, -v));
      not_finite += v * 0.0f;
    }
    const float largest = max_lanes(maxima);
    const bool is_zero = largest < 1e-36f;  // below, the inverse would overflow
    const float inverse = is_zero ? 0.0f : 127.0f / largest;
    *scales = (is_zero ? 0.0f : largest / 127.0f) + sum_lanes(not_finite);
    Vec sum = {};  // of integers, which is exact
    for (int j = 0; j < kBlock; j += kLanes) {
      const Vec whole = rounded(load(x + j) * inverse) + 0x1.8p23f;  // the integer in the low bits of the mantissa
      sum += whole - 0x1.8p23f;
      store_bytes(numbers + j, bit_cast<IntVec>(whole) - 0x4b400000);
    }
    *offsets = -weight_offset * (int32_t)sum_lanes(sum);
  }
}

// ---- the product ---------------------------------------------------------------------------------------------------

// Consecutive blocks of a panel.
struct Chunk {
  const IntVec* packed;
  int64_t begin, end;
  int64_t blocks;  // of a row
  const Vec* bias;  // the initial value of the sums; null: the partial sums of the previous chunk
  bool last;
  int64_t column, columns;
};

template <int Rows, int Vectors>
GPTCORE_INLINE void store_sums(const QuantizedLinearArgs& args, int64_t row, int64_t column, int64_t columns,
                               const Vec (&acc)[Rows][Vectors]) {
  with_type(args.out.dtype, [&](auto zero) {
    using S = decltype(zero);
    for (int r = 0; r < Rows; ++r)
      for (int v = 0; v < Vectors; ++v)
        if (v * kLanes < columns)
          store_up_to((S*)args.out.data + (row + r) * args.out.stride + column + v * kLanes, acc[r][v],
                      columns - v * kLanes);
  });
}

GPTCORE_INLINE void load_bias(const QuantizedLinearArgs& args, int64_t column, int64_t columns, Vec* bias) {
  if (args.bias)
    with_type(args.bias_dtype, [&](auto zero) {
      const auto* from = (const decltype(zero)*)args.bias + column;
      for (int64_t v = 0; v * kLanes < columns; ++v) bias[v] = load_up_to(from + v * kLanes, columns - v * kLanes);
    });
}

// Adds the product of a block of each vector of columns: kUnits vectors of numbers and one of scales.
template <BlockType Type, int Rows, int Vectors>
GPTCORE_INLINE void add_block(Vec (&acc)[Rows][Vectors], const IntVec* weights, const Activations& x, int64_t at) {
  IntVec sum[Rows][Vectors];
  GPTCORE_UNROLL for (int r = 0; r < Rows; ++r)
    GPTCORE_UNROLL for (int v = 0; v < Vectors; ++v) sum[r][v] = IntVec{} + (kShorts<Type> ? 0 : x.offsets[at + r]);
  GPTCORE_UNROLL for (int u = 0; u < kUnits; ++u)
    GPTCORE_UNROLL for (int r = 0; r < Rows; ++r) {
      int32_t group;
      memcpy(&group, x.numbers + (at + r) * kBlock + u * 4, sizeof group);
      GPTCORE_UNROLL for (int v = 0; v < Vectors; ++v) 
        add_products<Type>(sum[r][v], weights[v * kPacked + u], IntVec{} + group);
    }
  GPTCORE_UNROLL for (int r = 0; r < Rows; ++r)
    GPTCORE_UNROLL for (int v = 0; v < Vectors; ++v) {
#if defined(__AVX2__)
      if (kShorts<Type>) sum[r][v] = sum_pairs(sum[r][v]) + x.offsets[at + r];
#endif
      acc[r][v] += __builtin_convertvector(sum[r][v], Vec) *
                   (bit_cast<Vec>(weights[v * kPacked + kUnits]) * splat(x.scales[at + r]));
    }
}

template <BlockType Type, int Rows>
void multiply_tile(const QuantizedLinearArgs& args, const Chunk& chunk, const Activations& x, int64_t row,
                   float* partial) {
  Vec acc[Rows][kVectors];
  GPTCORE_UNROLL for (int r = 0; r < Rows; ++r)
    GPTCORE_UNROLL for (int v = 0; v < kVectors; ++v)
      acc[r][v] = chunk.bias ? chunk.bias[v] : load(partial + r * kWidth + v * kLanes);
  const IntVec* packed = chunk.packed;
  for (int64_t b = chunk.begin; b < chunk.end; ++b, packed += kVectors * kPacked)
    add_block<Type>(acc, packed, x, b * args.rows + row);
  if (!chunk.last) {
    GPTCORE_UNROLL for (int r = 0; r < Rows; ++r)
      GPTCORE_UNROLL for (int v = 0; v < kVectors; ++v) store(partial + r * kWidth + v * kLanes, acc[r][v]);
    return;
  }
  store_sums(args, row, chunk.column, chunk.columns, acc);
}

template <BlockType Type, int Rows>
GPTCORE_INLINE void multiply_rows(int64_t rows, const QuantizedLinearArgs& args, const Chunk& chunk,
                                  const Activations& x, int64_t row, float* partial) {
  if constexpr (Rows > 1)
    if (rows < Rows) return multiply_rows<Type, Rows - 1>(rows, args, chunk, x, row, partial);
  multiply_tile<Type, Rows>(args, chunk, x, row, partial);
}

// Computes rows [begin, end) of one panel.
template <BlockType Type>
void multiply_panel(const QuantizedLinearArgs& args, const Activations& x, int64_t begin, int64_t end, int64_t column,
                    IntVec* packed, float* partial, Prefetch& next) {
  const int64_t blocks = args.in_features / kBlock, columns = smaller(kWidth, args.out_features - column);
  Vec bias[kVectors] = {};
  load_bias(args, column, columns, bias);
  const int64_t tiles = (end - begin + kRows - 1) / kRows, tile_rows = (end - begin + tiles - 1) / tiles;
  for (int64_t b = 0; b < blocks || b == 0; b += kChunk) {
    const int64_t stop = smaller(b + kChunk, blocks);
    if (columns > kLanes) pack_panel<Type, kVectors>(args, column, b, stop, packed);
    else pack_panel<Type, 1>(args, column, b, stop, packed);
    const Chunk chunk{packed, b, stop, blocks, b ? nullptr : bias, stop == blocks, column, columns};
    for (int64_t row = begin; row < end; row += tile_rows) {
      multiply_rows<Type, kRows>(smaller(tile_rows, end - row), args, chunk, x, row, partial + (row - begin) * kWidth);
      next.fetch_some((stop - b) * block_bytes(Type) * kWidth / tiles);
    }
  }
}

// Some columns for few rows of x: a block of weights stays in registers for all of them.
template <BlockType Type, int Vectors>
void multiply_fused(const QuantizedLinearArgs& args, const Activations& x, int64_t column, Prefetch& next) {
  const int64_t blocks = args.in_features / kBlock, columns = smaller(Vectors * kLanes, args.out_features - column);
  Vec bias[Vectors] = {}, acc[kFused][Vectors];
  load_bias(args, column, columns, bias);
  for (int64_t r = 0; r < args.rows; ++r)
    for (int v = 0; v < Vectors; ++v) acc[r][v] = bias[v];
  for (int64_t begin = 0; begin < blocks; begin += kChunk) {
    const int64_t end = smaller(begin + kChunk, blocks);
    uint8_t copies[kLanes * kChunk * block_bytes(Type)];
    Blocks panel[Vectors];
    for (int v = 0; v < Vectors; ++v) panel[v] = rows_at<Type>(args, column + v * kLanes, begin, end, copies);
    for (int64_t b = begin; b < end; ++b) {
      IntVec weights[Vectors * kPacked];
      load_panel<Type, Vectors>(weights, panel, b - begin);
      next.fetch<Vectors * kLanes * block_bytes(Type)>();
      const int64_t at = b * args.rows;
      int64_t r = 0;
      for (; r + kTogether <= args.rows; r += kTogether)
        add_block<Type, kTogether, Vectors>(*(Vec(*)[kTogether][Vectors])(acc + r), weights, x, at + r);
      for (; r < args.rows; ++r) add_block<Type, 1, Vectors>(*(Vec(*)[1][Vectors])(acc + r), weights, x, at + r);
    }
  }
  for (int64_t r = 0; r < args.rows; ++r)
    store_sums<1, Vectors>(args, r, column, columns, *(Vec(*)[1][Vectors])(acc + r));
}

// Scratch memory: the rounded x, then for each thread a packed chunk and the partial sums of a band.
struct Layout {
  size_t numbers, scales, packed, partial;  // bytes
  explicit Layout(const QuantizedLinearArgs& args)
      : numbers(round_up(args.rows * args.in_features, 64)),
        scales(round_up(args.rows * (args.in_features / kBlock) * sizeof(float), 64)),
        packed(kChunk * kVectors * kPacked * sizeof(IntVec)),
        partial(round_up(smaller(args.rows, kBand) * kWidth * sizeof(float), 64)) {}
  size_t of_thread() const { return packed + partial; }
  size_t shared() const { return numbers + 2 * scales; }
};

template <BlockType Type>
void multiply_all(const QuantizedLinearArgs& args) {
  const Layout layout(args);
  char* memory = args.workspace;
  const Activations x{(int8_t*)memory, (float*)(memory + layout.numbers),
                      (int32_t*)(memory + layout.numbers + layout.scales)};
  const int64_t blocks = args.in_features / kBlock, row_bytes = blocks * block_bytes(Type);
  const int64_t bands = (args.rows + kBand - 1) / kBand, band = bands ? (args.rows + bands - 1) / bands : 0;
  const int64_t panels = (args.out_features + kRead - 1) / kRead, tasks = bands * panels;
  const int num_threads = args.rows * args.in_features * args.out_features < kSerial ? 1 : args.num_threads;
  int64_t taken = 0;
#pragma omp parallel num_threads(num_threads) if (num_threads > 1)
  {
    char* scratch = memory + layout.shared() + omp_get_thread_num() * layout.of_thread();
#pragma omp for schedule(static)
    for (int64_t row = 0; row < args.rows; ++row)
      with_type(args.x.dtype, [&](auto zero) {
        round_row((const decltype(zero)*)args.x.data + row * args.x.stride, blocks, args.rows, kOffset<Type>,
                  x.numbers + row * kBlock, x.scales + row, x.offsets + row);
      });
    const auto panel_of = [&](int64_t task) {
      return task < tasks ? (const char*)args.weight + task % panels * kRead * row_bytes : nullptr;
    };
    take_panels(taken, tasks, num_threads, [&](int64_t task, int64_t next_task) {
      Prefetch next(panel_of(task), panel_of(next_task), kRead, row_bytes, row_bytes);
      const int64_t begin = task / panels * band, first = task % panels * kRead;
      for (int64_t column = first; column < smaller(first + kRead, args.out_features); column += kWidth)
        if (args.rows > kFused)
          multiply_panel<Type>(args, x, begin, smaller(begin + band, args.rows), column, (IntVec*)scratch,
                               (float*)(scratch + layout.packed), next);
        else if (args.out_features - column > kLanes) multiply_fused<Type, kVectors>(args, x, column, next);
        else multiply_fused<Type, 1>(args, x, column, next);
    });
  }
}

}  // namespace

size_t quantized_linear_workspace(const QuantizedLinearArgs& args) {
  const Layout layout(args);
  return layout.shared() + args.num_threads * layout.of_thread();
}

void quantized_linear(const QuantizedLinearArgs& args) {
  if (args.type == BlockType::q8_0) multiply_all<BlockType::q8_0>(args);
  else multiply_all<BlockType::q4_0>(args);
}

}  // namespace GPTCORE_ISA
}  // namespace gptcore
