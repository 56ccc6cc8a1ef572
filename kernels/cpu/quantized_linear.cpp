// A linear layer whose weights are in GGUF's blocks of 32 numbers: q8_0 (a float16 scale, 32 x 8 bits) or q4_0 (a
// float16 scale, 32 x 4 bits; 16 low halves first).
//
// Each row of x is rounded to 8 bits in blocks of 32, as in llama.cpp, but with float32 scales. Products within a block
// are summed in integers, which is exact in any order. The sums of blocks are added in float32, in the order of the
// blocks, whatever the number of rows and of threads: a row of the result has the same bits alone and among others.
//
// A thread takes panels of kWidth outputs. It packs kChunk blocks of a panel into the first-level cache, transposed so
// that a lane is an output, and multiplies them by up to kBand rows of x. For few rows, packing takes longer than adding
// up the products of each output afterwards.
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
constexpr int64_t kChunk = 8;                    // blocks that are packed at once
constexpr int64_t kBand = 256;                   // rows
constexpr int64_t kSerial = 1 << 18;             // multiplications: below, one thread is faster

constexpr int kUnits = kBlock / 4;  // vectors of a block: a lane holds four numbers
constexpr int kPacked = kUnits + 1;  // and its scale
#if defined(__AVX512VNNI__)
constexpr bool kUnsigned = true;  // weights are stored with an offset
#else
constexpr bool kUnsigned = false;
#endif
#if defined(__AVX2__)
constexpr int64_t kFused = 4;  // with up to so many rows of x, weights are not packed
#else
constexpr int64_t kFused = 0;
#endif

// Adds the products of the four numbers of each lane. With kUnsigned, weights are unsigned.
GPTCORE_INLINE void add_products(IntVec& sum, IntVec weights, IntVec x) {
#if defined(__AVX512VNNI__)
  sum = (IntVec)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)weights, (__m512i)x);
#elif defined(__AVX512BW__)
  const __m512i w = (__m512i)weights;
  const __m512i signed_x = _mm512_mask_sub_epi8((__m512i)x, _mm512_movepi8_mask(w), _mm512_setzero_si512(), (__m512i)x);
  sum += (IntVec)_mm512_madd_epi16(_mm512_maddubs_epi16(_mm512_abs_epi8(w), signed_x), _mm512_set1_epi16(1));
#elif defined(__AVX2__)
  const __m256i w = (__m256i)weights, signed_x = _mm256_sign_epi8((__m256i)x, w);
  sum += (IntVec)_mm256_madd_epi16(_mm256_maddubs_epi16(_mm256_abs_epi8(w), signed_x), _mm256_set1_epi16(1));
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
constexpr int offset_of(BlockType type) { return !kUnsigned ? 0 : type == BlockType::q8_0 ? 128 : 8; }

// Loads a block of kLanes rows: v[i] holds numbers 0 to 15 of rows i, i + 4, i + 8 and so on, v[4 + i] the other ones.
template <BlockType Type>
GPTCORE_INLINE void load_numbers(IntVec (&v)[kUnits], const uint8_t* block, int64_t stride) {
  GPTCORE_UNROLL for (int i = 0; i < 4; ++i) {
    const uint8_t* numbers = block + i * stride + 2;
    v[i] = bit_cast<IntVec>(load_quads(numbers, stride));
    if constexpr (Type == BlockType::q8_0) {
      v[i + 4] = bit_cast<IntVec>(load_quads(numbers + 16, stride));
      if (kUnsigned) v[i] ^= (int32_t)0x80808080, v[i + 4] ^= (int32_t)0x80808080;
    } else {
      typedef int8_t Bytes __attribute__((vector_size(kLanes * 4)));
      const IntVec low = v[i] & 0x0f0f0f0f, high = v[i] >> 4 & 0x0f0f0f0f;
      v[i] = kUnsigned ? low : bit_cast<IntVec>(bit_cast<Bytes>(low) - 8);
      v[i + 4] = kUnsigned ? high : bit_cast<IntVec>(bit_cast<Bytes>(high) - 8);
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
  memcpy(&scales, eights, sizeof scales);
#else
  for (int i = 0; i < kLanes; ++i) memcpy((uint16_t*)&scales + i, block + i * stride, sizeof(uint16_t));
#endif
  return load((const float16*)&scales);
}

// Returns 16 bytes in each lane of 128 bits.
GPTCORE_INLINE IntVec splat_quad(const int8_t* p) {
#if defined(__AVX512F__)
  return (IntVec)_mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i*)p));
#elif defined(__AVX2__)
  return (IntVec)_mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i*)p));
#else
  return bit_cast<IntVec>(load((const float*)p));
#endif
}

// Calls body(source, stride) for blocks [begin, end) of kLanes rows. Rows beyond the last are copies of it.
template <BlockType Type, class Body>
GPTCORE_INLINE void with_rows(const QuantizedLinearArgs& args, int64_t column, int64_t begin, int64_t end, Body body) {
  constexpr int64_t kBytes = block_bytes(Type), kStep = kChunk * kBytes;
  const int64_t stride = args.in_features / kBlock * kBytes, rows = args.out_features - column;
  const uint8_t* source = args.weight + column * stride + begin * kBytes;
  if (rows >= kLanes) return body(source, stride);
  uint8_t copies[kLanes * kStep];
  for (int64_t i = 0; i < kLanes; ++i)
    memcpy(copies + i * kStep, source + smaller(i, rows - 1) * stride, (end - begin) * kBytes);
  body(copies, kStep);
}

// Packs blocks [begin, end) of a panel, vectors of a block side by side.
template <BlockType Type>
void pack_panel(const QuantizedLinearArgs& args, int64_t column, int64_t begin, int64_t end, IntVec* to) {
  for (int v = 0; v < kVectors && column + v * kLanes < args.out_features; ++v)
    with_rows<Type>(args, column + v * kLanes, begin, end, [&](const uint8_t* source, int64_t stride) {
      for (int64_t b = 0; b < end - begin; ++b) {
        const uint8_t* block = source + b * block_bytes(Type);
        IntVec numbers[kUnits], *packed = to + (b * kVectors + v) * kPacked;
        load_numbers<Type>(numbers, block, stride);
        for (int half = 0; half < kUnits; half += 4) {
          Vec quads[4];
          for (int i = 0; i < 4; ++i) quads[i] = bit_cast<Vec>(numbers[half + i]);
          transpose_quads(quads);
          for (int i = 0; i < 4; ++i) packed[half + i] = bit_cast<IntVec>(quads[i]);
        }
        packed[kUnits] = bit_cast<IntVec>(load_scales(block, stride));
      }
    });
}

// ---- activations ---------------------------------------------------------------------------------------------------

struct Activations {
  int8_t* numbers;   // (rows, in_features)
  float* scales;     // (rows, blocks)
  int32_t* offsets;  // (rows, blocks), minus what the offset of the weights adds to the sum of a block
};

// Rounds a row to 8 bits, a scale for each block; the scale is NaN where the block is not finite.
template <class S>
void round_row(const S* x, int64_t blocks, int weight_offset, int8_t* numbers, float* scales, int32_t* offsets) {
  for (int64_t b = 0; b < blocks; ++b, x += kBlock, numbers += kBlock) {
    Vec maxima = {}, not_finite = {};  // x * 0 is NaN for infinity and NaN
    for (int j = 0; j < kBlock; j += kLanes) {
      const Vec v = load(x + j);
      maxima = max(maxima, max(v, -v));
      not_finite += v * 0.0f;
    }
    float largest = 0.0f;
    for (int i = 0; i < kLanes; ++i) largest = maxima[i] > largest ? maxima[i] : largest;
    const bool is_zero = largest < 1e-36f;  // below, the inverse would overflow
    const float inverse = is_zero ? 0.0f : 127.0f / largest;
    scales[b] = (is_zero ? 0.0f : largest / 127.0f) + sum_lanes(not_finite);
    IntVec sums = {};
    for (int j = 0; j < kBlock; j += kLanes) {
      const Vec whole = rounded(load(x + j) * inverse) + 0x1.8p23f;  // the integer in the low bits of the mantissa
      const IntVec n = bit_cast<IntVec>(whole) - 0x4b400000;
      sums += n;
      for (int i = 0; i < kLanes; ++i) numbers[j + i] = n[i];
    }
    int32_t sum = 0;
    for (int i = 0; i < kLanes; ++i) sum += sums[i];
    offsets[b] = -weight_offset * sum;
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

template <int Rows>
void multiply_tile(const QuantizedLinearArgs& args, const Chunk& chunk, const Activations& x, int64_t row,
                   float* partial) {
  Vec acc[Rows][kVectors];
  GPTCORE_UNROLL for (int r = 0; r < Rows; ++r)
    GPTCORE_UNROLL for (int v = 0; v < kVectors; ++v)
      acc[r][v] = chunk.bias ? chunk.bias[v] : load(partial + r * kWidth + v * kLanes);
  const IntVec* packed = chunk.packed;
  for (int64_t b = chunk.begin; b < chunk.end; ++b, packed += kVectors * kPacked) {
    const int8_t* numbers = x.numbers + (row * chunk.blocks + b) * kBlock;
    IntVec sum[Rows][kVectors];
    GPTCORE_UNROLL for (int r = 0; r < Rows; ++r)
      GPTCORE_UNROLL for (int v = 0; v < kVectors; ++v) sum[r][v] = IntVec{} + x.offsets[(row + r) * chunk.blocks + b];
    GPTCORE_UNROLL for (int u = 0; u < kUnits; ++u)
      GPTCORE_UNROLL for (int r = 0; r < Rows; ++r) {
        int32_t group;
        memcpy(&group, numbers + r * chunk.blocks * kBlock + u * 4, sizeof group);
        GPTCORE_UNROLL for (int v = 0; v < kVectors; ++v)
          add_products(sum[r][v], packed[v * kPacked + u], IntVec{} + group);
      }
    GPTCORE_UNROLL for (int r = 0; r < Rows; ++r) {
      const Vec scale = splat(x.scales[(row + r) * chunk.blocks + b]);
      GPTCORE_UNROLL for (int v = 0; v < kVectors; ++v) {
        const Vec scales = bit_cast<Vec>(packed[v * kPacked + kUnits]) * scale;
        acc[r][v] += __builtin_convertvector(sum[r][v], Vec) * scales;
      }
    }
  }
  if (!chunk.last) {
    GPTCORE_UNROLL for (int r = 0; r < Rows; ++r)
      GPTCORE_UNROLL for (int v = 0; v < kVectors; ++v) store(partial + r * kWidth + v * kLanes, acc[r][v]);
    return;
  }
  store_sums(args, row, chunk.column, chunk.columns, acc);
}

template <int Rows>
GPTCORE_INLINE void multiply_rows(int64_t rows, const QuantizedLinearArgs& args, const Chunk& chunk,
                                  const Activations& x, int64_t row, float* partial) {
  if constexpr (Rows > 1)
    if (rows < Rows) return multiply_rows<Rows - 1>(rows, args, chunk, x, row, partial);
  multiply_tile<Rows>(args, chunk, x, row, partial);
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
    pack_panel<Type>(args, column, b, stop, packed);
    const Chunk chunk{packed, b, stop, blocks, b ? nullptr : bias, stop == blocks, column, columns};
    for (int64_t row = begin; row < end; row += tile_rows) {
      multiply_rows<kRows>(smaller(tile_rows, end - row), args, chunk, x, row, partial + (row - begin) * kWidth);
      next.fetch((stop - b) * block_bytes(Type) * kWidth / tiles);
    }
  }
}

// The sums of the four lanes of each quad, of numbers that load_numbers has ordered.
GPTCORE_INLINE IntVec sum_quads(const IntVec (&v)[4]) {
  Vec quads[4];
  for (int i = 0; i < 4; ++i) quads[i] = bit_cast<Vec>(v[i]);
  transpose_quads(quads);
  return (bit_cast<IntVec>(quads[0]) + bit_cast<IntVec>(quads[1])) +
         (bit_cast<IntVec>(quads[2]) + bit_cast<IntVec>(quads[3]));
}

// kLanes columns for few rows of x: products of 16 numbers of each output are summed in the end.
template <int Rows, BlockType Type>
void multiply_fused(const QuantizedLinearArgs& args, const Activations& x, int64_t column, Prefetch& next) {
  const int64_t blocks = args.in_features / kBlock, columns = smaller(kLanes, args.out_features - column);
  Vec acc[Rows][1] = {};
  load_bias(args, column, columns, acc[0]);
  GPTCORE_UNROLL for (int r = 1; r < Rows; ++r) acc[r][0] = acc[0][0];
  for (int64_t begin = 0; begin < blocks; begin += kChunk) {
    const int64_t end = smaller(begin + kChunk, blocks);
    with_rows<Type>(args, column, begin, end, [&](const uint8_t* source, int64_t stride) {
      for (int64_t b = begin; b < end; ++b, source += block_bytes(Type)) {
        IntVec weights[kUnits];
        load_numbers<Type>(weights, source, stride);
        const Vec scale = load_scales(source, stride);
        next.fetch(kLanes * block_bytes(Type));
        GPTCORE_UNROLL for (int r = 0; r < Rows; ++r) {
          const int64_t at = r * blocks + b;
          const IntVec low = splat_quad(x.numbers + at * kBlock), high = splat_quad(x.numbers + at * kBlock + 16);
          IntVec sums[4] = {};
          GPTCORE_UNROLL for (int i = 0; i < 4; ++i) add_products(sums[i], weights[i], low);
          GPTCORE_UNROLL for (int i = 0; i < 4; ++i) add_products(sums[i], weights[i + 4], high);
          const IntVec sum = sum_quads(sums) + x.offsets[at];
          acc[r][0] += __builtin_convertvector(sum, Vec) * (scale * splat(x.scales[at]));
        }
      }
    });
  }
  store_sums(args, 0, column, columns, acc);
}

// The same for the number of rows that there are, at most Rows.
template <int Rows, BlockType Type>
GPTCORE_INLINE void multiply_fused_rows(const QuantizedLinearArgs& args, const Activations& x, int64_t column,
                                        Prefetch& next) {
  if constexpr (Rows > 1)
    if (args.rows < Rows) return multiply_fused_rows<Rows - 1, Type>(args, x, column, next);
  if constexpr (Rows > 0)
    for (int64_t end = smaller(column + kWidth, args.out_features); column < end; column += kLanes)
      multiply_fused<Rows, Type>(args, x, column, next);
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
  const int64_t panels = (args.out_features + kWidth - 1) / kWidth, tasks = bands * panels;
  const int num_threads = args.rows * args.in_features * args.out_features < kSerial ? 1 : args.num_threads;
  int64_t taken = 0;
#pragma omp parallel num_threads(num_threads) if (num_threads > 1)
  {
    char* scratch = memory + layout.shared() + omp_get_thread_num() * layout.of_thread();
#pragma omp for schedule(static)
    for (int64_t row = 0; row < args.rows; ++row)
      with_type(args.x.dtype, [&](auto zero) {
        round_row((const decltype(zero)*)args.x.data + row * args.x.stride, blocks, offset_of(Type),
                  x.numbers + row * args.in_features, x.scales + row * blocks, x.offsets + row * blocks);
      });
    const auto panel_of = [&](int64_t task) {
      return task < tasks ? (const char*)args.weight + task % panels * kWidth * row_bytes : nullptr;
    };
    take_panels(taken, tasks, num_threads, [&](int64_t task, int64_t next_task) {
      Prefetch next(panel_of(task), panel_of(next_task), kWidth, row_bytes, row_bytes);
      const int64_t begin = task / panels * band, column = task % panels * kWidth;
      if (args.rows <= kFused) return multiply_fused_rows<kFused, Type>(args, x, column, next);
      multiply_panel<Type>(args, x, begin, smaller(begin + band, args.rows), column, (IntVec*)scratch,
                           (float*)(scratch + layout.packed), next);
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
