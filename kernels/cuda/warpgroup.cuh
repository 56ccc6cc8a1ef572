// Products of a warpgroup (four warps) by wgmma, for the attention kernels on Hopper: tiles in shared memory that wgmma
// reads, and products that are started here and waited for by the caller. Accumulators have the layout of tile.cuh: warp
// w has rows 16 w to 16 w + 15, which is one 16-row tile (m = 0).
#pragma once

#include "kernels/cuda/hopper.cuh"
#include "kernels/cuda/tile.cuh"

namespace gptcore {

template <class T> struct Warpgroup {};  // Math: T, multiplied by wgmma
template <class T> struct StorageOf<Warpgroup<T>> { using Type = T; };
template <class Math> constexpr bool kWarpgroup = false;
template <class T> constexpr bool kWarpgroup<Warpgroup<T>> = true;

// The operand this many bytes further. The address is in the lower word: one addition.
GPTCORE_DEVICE MatrixDescriptor advance(MatrixDescriptor first, int bytes) {
  return {first.bits >> 32 << 32 | (uint32_t(first.bits) + uint32_t(bytes) / 16)};
}

// kRows rows of kWidth 16-bit elements, in blocks of 64 columns, or of 32 if kWidth is not a multiple of 64. A row of a
// block is one period of the 128-byte or 64-byte swizzle, which is that of SharedTile. Begins at a multiple of 1024 bytes.
template <class T, int kWidth, int kTileRows>
struct WarpgroupTile {
  using Element = T;
  static constexpr int kRows = kTileRows;
  using Block = SharedTile<T, kWidth % 64 == 0 ? 64 : 32>;
  static constexpr int kPerChunk = 8, kChunks = kWidth / kPerChunk;
  static constexpr int kBlockWidth = Block::kChunks * kPerChunk;
  static constexpr int kRowBytes = Block::kChunks * 16, kBlockBytes = kRows * kRowBytes;
  static constexpr Swizzle kSwizzle = Block::kChunks == 8 ? Swizzle::bytes128 : Swizzle::bytes64;
  static_assert(sizeof(T) == 2 && kWidth % 32 == 0 && kBlockBytes % 1024 == 0, "blocks are whole periods");
  char* data;

  GPTCORE_DEVICE char* chunk(unsigned row, unsigned index) const {
    return Block{data + index / Block::kChunks * kBlockBytes}.chunk(row, index % Block::kChunks);
  }
  GPTCORE_DEVICE T* pair(int row, int column) const {  // two adjacent elements, from an even column
    return reinterpret_cast<T*>(chunk(row, column / kPerChunk)) + column % kPerChunk;
  }
  // The operand that begins at a row, from lane 0: so the compiler knows that all lanes have the same.
  GPTCORE_DEVICE MatrixDescriptor descriptor(int row) const {
    const uint64_t bits = matrix_descriptor(data + row * kRowBytes, kBlockBytes, 8 * kRowBytes, kSwizzle).bits;
    return {bits >> 32 << 32 | shuffle(uint32_t(bits), 0)};
  }
  // Where columns 16 k to 16 k + 15 are, of an operand whose rows (of A) or columns (of B) are the rows of the tile.
  static GPTCORE_DEVICE constexpr int columns(int k) {
    constexpr int kSteps = Block::kChunks / 2;
    return k / kSteps * kBlockBytes + k % kSteps * 32;
  }
  // Where rows 16 k to 16 k + 15 are, of a transposed operand B: its columns are those of the tile.
  static GPTCORE_DEVICE constexpr int rows(int k) { return k * 16 * kRowBytes; }
};

// The tiles of a Math's kernels.
template <class Math, int kWidth, int kRows>
struct TileFor { using Type = SharedTile<Storage<Math>, kWidth>; };
template <class T, int kWidth, int kRows>
struct TileFor<Warpgroup<T>, kWidth, kRows> { using Type = WarpgroupTile<T, kWidth, kRows>; };
template <class Math, int kWidth, int kRows>
using TileOf = typename TileFor<Math, kWidth, kRows>::Type;

// One thread starts the copy of rows from `row` on, of one head: a box for each block of columns, 64 or 32 wide. What is
// beyond the tensor becomes zeros. The phase of `full` ends when the whole tile is there.
template <class T, int kWidth, int kRows>
GPTCORE_DEVICE void load_bulk(WarpgroupTile<T, kWidth, kRows> to, const TensorMap* map, uint64_t* full, int row, int head,
                              int batch) {
  using Tile = WarpgroupTile<T, kWidth, kRows>;
  constexpr int kBytes = kRows * kWidth * sizeof(T);
  mbarrier_arrive_expect(full, kBytes);
#pragma unroll
  for (int column = 0; column < kWidth; column += Tile::kBlockWidth)
    bulk_load(to.data + column / Tile::kBlockWidth * Tile::kBlockBytes, map, full, column, row, head, batch);
}

// `keep` of accumulators, before their products start and after the wait; of operands, after it.
template <int kN>
GPTCORE_DEVICE void keep(float (&acc)[1][kN][4]) { keep<kN * 4>(&acc[0][0][0]); }
template <int kSteps>
GPTCORE_DEVICE void keep(uint32_t (&a)[kSteps][4]) { keep<kSteps * 4>(&a[0][0]); }

// Starts S = A B^T over the width of the tiles: 64 rows of A, from `row` on, times 8 kN rows of B.
template <class T, int kN, int kWidth, int kRowsA, int kRowsB>
GPTCORE_DEVICE void start_transposed(float (&s)[1][kN][4], WarpgroupTile<T, kWidth, kRowsA> a, int row,
                                     WarpgroupTile<T, kWidth, kRowsB> b) {
  static_assert(kRowsB == kN * 8, "all rows of B");
  const MatrixDescriptor first_a = a.descriptor(row), first_b = b.descriptor(0);
#pragma unroll
  for (int k = 0; k < kWidth / 16; ++k)
    wgmma<T, kRowsB>(&s[0][0][0], advance(first_a, a.columns(k)), advance(first_b, b.columns(k)), k > 0);
}

// Starts acc += P B: P in registers, 16 kSteps columns wide, times the rows of B.
template <class T, int kSteps, int kO, int kWidth, int kRows>
GPTCORE_DEVICE void start_add(float (&acc)[1][kO][4], const uint32_t (&p)[kSteps][4], WarpgroupTile<T, kWidth, kRows> b) {
  static_assert(kRows == kSteps * 16 && kWidth == kO * 8, "all of B");
  const MatrixDescriptor first = b.descriptor(0);
#pragma unroll
  for (int k = 0; k < kSteps; ++k) wgmma<T, kWidth, true>(&acc[0][0][0], p[k], advance(first, b.rows(k)), true);
}

// Accumulators as the operand A of the next product.
template <class T, int kSteps>
GPTCORE_DEVICE void to_operand(uint32_t (&a)[kSteps][4], const float (&p)[1][2 * kSteps][4]) {
#pragma unroll
  for (int k = 0; k < kSteps; ++k)
#pragma unroll
    for (int i = 0; i < 4; ++i)
      a[k][i] = pack<T>(p[0][2 * k + i / 2][i % 2 * 2], p[0][2 * k + i / 2][i % 2 * 2 + 1]);
}

}  // namespace gptcore
