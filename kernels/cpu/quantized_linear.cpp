// A linear layer whose weights are in GGUF's blocks of 32 numbers: q8_0 (a float16 scale, 32 x 8 bits) or q4_0 (a
// float16 scale, 32 x 4 bits; 16 low halves first).
//
// Each row of x is rounded to 8 bits in blocks of 32, as in llama.cpp, but with float32 scales. Products within a block
// are summed in integers, which is exact in any order. The sums of blocks are added in float32, in the order of the
// blocks, whatever the number of rows and of threads: a row of the result has the same bits alone and among others.
//
// A thread takes panels of kWidth outputs. It packs kChunk blocks of a panel into the first-level cache, transposed so
// that a lane is an output, and multiplies them by up to kBand rows of x.
#include <omp.h>

#include "kernels/cpu/rows.h"
#include "kernels/cpu/tiles.h"

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

typedef int16_t ShortVec __attribute__((vector_size(kLanes * 4)));

#if defined(__AVX512VNNI__)
using Activation = uint8_t;       // x + 128, four of a lane in one instruction
constexpr int kPerLane = 4;
#else
using Activation = int16_t;       // x in the order 0 2 1 3 of each four, two of a lane in one instruction
constexpr int kPerLane = 2;
#endif
constexpr int kUnits = kBlock / kPerLane;
constexpr int kPacked = kUnits + 2;  // vectors of a packed block: weights, scales, initial values of the sums

// sum += the products of the numbers of each lane
GPTCORE_INLINE void add_products(IntVec& sum, IntVec weights, IntVec x) {
#if defined(__AVX512VNNI__)
  sum = (IntVec)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)x, (__m512i)weights);
#elif defined(__AVX512BW__)
  sum += (IntVec)_mm512_madd_epi16((__m512i)weights, (__m512i)x);
#elif defined(__AVX2__)
  sum += (IntVec)_mm256_madd_epi16((__m256i)weights, (__m256i)x);
#elif defined(__SSE2__)
  sum += (IntVec)_mm_madd_epi16((__m128i)weights, (__m128i)x);
#else
  sum += (weights << 16 >> 16) * (x << 16 >> 16) + (weights >> 16) * (x >> 16);
#endif
}

// ---- weights -------------------------------------------------------------------------------------------------------

constexpr int64_t block_bytes(BlockType type) { return type == BlockType::q8_0 ? 34 : 18; }

// The 32 numbers of a block, without the scale.
struct Numbers { int8_t at[kBlock]; };
template <BlockType Type>
GPTCORE_INLINE Numbers numbers_of(const uint8_t* block) {
  Numbers numbers;
  if constexpr (Type == BlockType::q8_0) {
    memcpy(&numbers, block + 2, sizeof numbers);
  } else {
    typedef uint8_t Bytes __attribute__((vector_size(16)));
    Bytes bytes;
    memcpy(&bytes, block + 2, sizeof bytes);
    const Bytes low = (bytes & 15) - 8, high = (bytes >> 4) - 8;
    memcpy(numbers.at, &low, sizeof low);
    memcpy(numbers.at + 16, &high, sizeof high);
  }
  return numbers;
}

#if defined(__AVX2__)
template <BlockType Type>
GPTCORE_INLINE __m256i load_numbers(const uint8_t* block) {
  if constexpr (Type == BlockType::q8_0) return _mm256_loadu_si256((const __m256i*)(block + 2));
  const __m128i bytes = _mm_loadu_si128((const __m128i*)(block + 2));
  const __m256i halves = _mm256_set_m128i(_mm_srli_epi16(bytes, 4), bytes);
  return _mm256_sub_epi8(_mm256_and_si256(halves, _mm256_set1_epi8(15)), _mm256_set1_epi8(8));
}
#endif

// Exchanges blocks of Half x Half between vectors, down to 1 x 1: transposes each group of 2 * Half vectors and lanes.
template <int Half>
GPTCORE_INLINE void exchange_down(IntVec (&v)[8]) {
  const IntVec lane = lane_index();
  const IntVec low = (lane & Half) ? lane - Half + kLanes : lane, high = (lane & Half) ? lane + kLanes : lane + Half;
  for (int i = 0; i < 8; ++i)
    if (!(i & Half)) {
      const IntVec a = v[i], b = v[i + Half];
      v[i] = __builtin_shuffle(a, b, low);
      v[i + Half] = __builtin_shuffle(a, b, high);
    }
  if constexpr (Half > 1) exchange_down<Half / 2>(v);
}

// v[u] = the numbers 4 u to 4 u + 3 of a block of kLanes rows of weights, a row in a lane.
template <BlockType Type>
GPTCORE_INLINE void load_quads(IntVec (&v)[8], const uint8_t* block, int64_t stride) {
#if defined(__AVX512F__)
  for (int i = 0; i < 8; ++i)
    v[i] = (IntVec)_mm512_inserti64x4(_mm512_castsi256_si512(load_numbers<Type>(block + i * stride)),
                                      load_numbers<Type>(block + (i + 8) * stride), 1);
#elif defined(__AVX2__)
  for (int i = 0; i < 8; ++i) v[i] = (IntVec)load_numbers<Type>(block + i * stride);
#else
  for (int i = 0; i < 4; ++i) {
    const Numbers numbers = numbers_of<Type>(block + i * stride);
    memcpy(&v[i], numbers.at, sizeof v[i]);
    memcpy(&v[i + 4], numbers.at + 16, sizeof v[i]);
  }
#endif
  exchange_down<(kLanes < 8 ? 2 : 4)>(v);
}

// Packs one block of kLanes rows of weights, and prefetches the bytes at a distance of `ahead`, which are read next.
template <BlockType Type>
GPTCORE_INLINE void pack_block(IntVec* to, const uint8_t* block, int64_t stride, int64_t ahead) {
  IntVec v[8];
  HalfBits scales;
  for (int i = 0; i < kLanes; ++i) {
    uint16_t scale;
    memcpy(&scale, block + i * stride, sizeof scale);
    scales[i] = scale;
    __builtin_prefetch((const void*)((uintptr_t)(block + i * stride) + ahead));
  }
  load_quads<Type>(v, block, stride);
  to[kUnits] = bit_cast<IntVec>(load((const float16*)&scales));
#if defined(__AVX512VNNI__)
  IntVec start = {};
  for (int u = 0; u < 8; ++u) {
    to[u] = v[u];
    add_products(start, v[u], IntVec{} + (int32_t)0x80808080);  // 128 x the sum of the weights
  }
  to[kUnits + 1] = -start;
#else
  for (int u = 0; u < 8; ++u) {
    const ShortVec pairs = bit_cast<ShortVec>(v[u]);
    to[2 * u] = bit_cast<IntVec>((ShortVec)(pairs << 8) >> 8);  // numbers 0 and 2 of the quad
    to[2 * u + 1] = bit_cast<IntVec>(pairs >> 8);               // 1 and 3
  }
  to[kUnits + 1] = IntVec{};
#endif
}

// Packs blocks [begin, end) of a panel, vectors of a block side by side. Rows beyond the last are copies of it.
template <BlockType Type>
void pack_panel(const QuantizedLinearArgs& args, int64_t column, int64_t begin, int64_t end, IntVec* to) {
  constexpr int64_t kBytes = block_bytes(Type);
  const int64_t stride = args.in_features / kBlock * kBytes;
  const int64_t ahead = end * kBlock < args.in_features ? kChunk * kBytes : kWidth * stride - begin * kBytes;
  for (int v = 0; v < kVectors; ++v) {
    const int64_t first = column + v * kLanes, rows = args.out_features - first;
    if (rows <= 0) break;
    const uint8_t* source = args.weight + first * stride;
    uint8_t copies[kLanes * kChunk * kBytes];
    int64_t step = stride;
    if (rows < kLanes) {
      step = kChunk * kBytes;
      for (int64_t i = 0; i < kLanes; ++i)
        memcpy(copies + i * step, source + smaller(i, rows - 1) * stride + begin * kBytes, (end - begin) * kBytes);
      source = copies - begin * kBytes;
    }
    for (int64_t b = begin; b < end; ++b)
      pack_block<Type>(to + ((b - begin) * kVectors + v) * kPacked, source + b * kBytes, step, ahead);
  }
}

// ---- activations ---------------------------------------------------------------------------------------------------

struct Activations {
  Activation* numbers;  // (rows, in_features)
  float* scales;        // (rows, blocks)
};

// Rounds a row to 8 bits, a scale for each block; the scale is NaN where the block is not finite.
template <class S>
void round_row(const S* x, int64_t blocks, Activation* numbers, float* scales) {
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
    int32_t integers[kBlock];
    for (int j = 0; j < kBlock; j += kLanes) {
      const Vec whole = rounded(load(x + j) * inverse) + 0x1.8p23f;  // the integer in the low bits of the mantissa
      const IntVec n = bit_cast<IntVec>(whole) - 0x4b400000;
      memcpy(integers + j, &n, sizeof n);
    }
#if defined(__AVX512VNNI__)
    for (int j = 0; j < kBlock; ++j) numbers[j] = integers[j] + 128;
#else
    for (int j = 0; j < kBlock; ++j) numbers[(j & ~3) | (j & 1) << 1 | (j & 2) >> 1] = integers[j];
#endif
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

template <int Rows>
void multiply_tile(const QuantizedLinearArgs& args, const Chunk& chunk, const Activations& x, int64_t row,
                   float* partial) {
  Vec acc[Rows][kVectors];
  GPTCORE_UNROLL for (int r = 0; r < Rows; ++r)
    GPTCORE_UNROLL for (int v = 0; v < kVectors; ++v)
      acc[r][v] = chunk.bias ? chunk.bias[v] : load(partial + r * kWidth + v * kLanes);
  const IntVec* packed = chunk.packed;
  for (int64_t b = chunk.begin; b < chunk.end; ++b, packed += kVectors * kPacked) {
    const Activation* numbers = x.numbers + (row * chunk.blocks + b) * kBlock;
    IntVec sum[Rows][kVectors];
    GPTCORE_UNROLL for (int r = 0; r < Rows; ++r)
      GPTCORE_UNROLL for (int v = 0; v < kVectors; ++v) sum[r][v] = packed[v * kPacked + kUnits + 1];
    GPTCORE_UNROLL for (int u = 0; u < kUnits; ++u)
      GPTCORE_UNROLL for (int r = 0; r < Rows; ++r) {
        int32_t group;
        memcpy(&group, numbers + r * chunk.blocks * kBlock + u * kPerLane, sizeof group);
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
  with_type(args.out.dtype, [&](auto zero) {
    using S = decltype(zero);
    for (int r = 0; r < Rows; ++r)
      for (int v = 0; v < kVectors; ++v)
        if (v * kLanes < chunk.columns)
          store_up_to((S*)args.out.data + (row + r) * args.out.stride + chunk.column + v * kLanes, acc[r][v],
                      chunk.columns - v * kLanes);
  });
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
                    IntVec* packed, float* partial) {
  const int64_t blocks = args.in_features / kBlock, columns = smaller(kWidth, args.out_features - column);
  Vec bias[kVectors] = {};
  if (args.bias)
    with_type(args.bias_dtype, [&](auto zero) {
      const auto* from = (const decltype(zero)*)args.bias + column;
      for (int64_t v = 0; v * kLanes < columns; ++v) bias[v] = load_up_to(from + v * kLanes, columns - v * kLanes);
    });
  const int64_t tiles = (end - begin + kRows - 1) / kRows, tile_rows = (end - begin + tiles - 1) / tiles;
  for (int64_t b = 0; b < blocks || b == 0; b += kChunk) {
    const int64_t stop = smaller(b + kChunk, blocks);
    pack_panel<Type>(args, column, b, stop, packed);
    const Chunk chunk{packed, b, stop, blocks, b ? nullptr : bias, stop == blocks, column, columns};
    for (int64_t row = begin; row < end; row += tile_rows)
      multiply_rows<kRows>(smaller(tile_rows, end - row), args, chunk, x, row, partial + (row - begin) * kWidth);
  }
}

// Scratch memory: the rounded x, then for each thread a packed chunk and the partial sums of a band.
struct Layout {
  size_t numbers, scales, packed, partial;  // bytes
  explicit Layout(const QuantizedLinearArgs& args)
      : numbers(round_up(args.rows * args.in_features * sizeof(Activation), 64)),
        scales(round_up(args.rows * (args.in_features / kBlock) * sizeof(float), 64)),
        packed(kChunk * kVectors * kPacked * sizeof(IntVec)),
        partial(smaller(args.rows, kBand) * kWidth * sizeof(float)) {}
  size_t of_thread() const { return packed + round_up(partial, 64); }
};

template <BlockType Type>
void multiply_all(const QuantizedLinearArgs& args) {
  const Layout layout(args);
  const Activations x{(Activation*)args.workspace, (float*)(args.workspace + layout.numbers)};
  const int64_t blocks = args.in_features / kBlock;
  const int64_t bands = (args.rows + kBand - 1) / kBand, band = bands ? (args.rows + bands - 1) / bands : 0;
  const int64_t panels = (args.out_features + kWidth - 1) / kWidth;
  const int num_threads = args.rows * args.in_features * args.out_features < kSerial ? 1 : args.num_threads;
#pragma omp parallel num_threads(num_threads) if (num_threads > 1)
  {
    char* scratch = args.workspace + layout.numbers + layout.scales + omp_get_thread_num() * layout.of_thread();
#pragma omp for schedule(static)
    for (int64_t row = 0; row < args.rows; ++row)
      with_type(args.x.dtype, [&](auto zero) {
        round_row((const decltype(zero)*)args.x.data + row * args.x.stride, blocks,
                  x.numbers + row * args.in_features, x.scales + row * blocks);
      });
#pragma omp for schedule(dynamic, 1)
    for (int64_t task = 0; task < bands * panels; ++task) {
      const int64_t begin = task / panels * band;
      multiply_panel<Type>(args, x, begin, smaller(begin + band, args.rows), task % panels * kWidth, (IntVec*)scratch,
                           (float*)(scratch + layout.packed));
    }
  }
}

}  // namespace

size_t quantized_linear_workspace(const QuantizedLinearArgs& args) {
  const Layout layout(args);
  return layout.numbers + layout.scales + args.num_threads * layout.of_thread();
}

void quantized_linear(const QuantizedLinearArgs& args) {
  if (args.type == BlockType::q8_0) multiply_all<BlockType::q8_0>(args);
  else multiply_all<BlockType::q4_0>(args);
}

}  // namespace GPTCORE_ISA
}  // namespace gptcore
