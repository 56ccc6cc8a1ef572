// The launch policy: the tile sizes of each kernel, by head_dim and element size. Plain constexpr C++, for the kernels,
// the host code and the tests.
//
// Every tile fits into 99 KiB of shared memory, the smallest maximum of the supported architectures (sm_86, sm_89 and
// sm_120), and into 255 registers, so one table covers all of them.
#pragma once

namespace gptcore {

// The tile width to which head_dim is padded in shared memory. A kernel is compiled for each width.
constexpr int tile_width(int head_dim, int element_size) {
  if (element_size == 2 && head_dim <= 32) return 32;
  if (head_dim <= 64) return 64;
  if (element_size == 2 && head_dim <= 96) return 96;
  return head_dim <= 128 ? 128 : 256;
}

// Most calls have no dropout, and rows of whole 16-byte vectors. Kernels for these alone have fewer instructions and
// registers. They are compiled where time matters most: for 16 bits and usual widths. Those for Hopper copy K and V in
// bulk (TMA), which needs positive strides, too.
enum class Calls { common, all, bulk };
constexpr bool has_common_kernel(int width, int element_size) { return element_size == 2 && width >= 64 && width <= 128; }

struct ForwardTile {
  int warps;    // in a block
  int m_tiles;  // 16-row tiles per warp
  int keys;     // in one tile of K and V; there are two stages
  int resident_warps = 8;  // on a multiprocessor: 8 warps of 255 registers fit

  constexpr int threads() const { return 32 * warps; }
  constexpr int rows() const { return 16 * m_tiles * warps; }
  constexpr int blocks() const { return resident_warps / warps; }
};

// `is_decode`: at most 16 rows. Reading K and V then takes most of the time, and many small blocks read fastest.
constexpr ForwardTile forward_tile(int width, int element_size, bool is_decode) {
  if (element_size == 4) {
    if (width <= 64) return is_decode ? ForwardTile{1, 1, 32} : ForwardTile{4, 1, 32};
    if (width <= 128) return is_decode ? ForwardTile{1, 1, 16} : ForwardTile{4, 1, 16};
    return is_decode ? ForwardTile{1, 1, 8} : ForwardTile{2, 1, 16};
  }
  if (is_decode) return {1, 1, width <= 64 ? 64 : width <= 128 ? 32 : 16};
  if (width <= 64) return {4, 2, 64};
  if (width <= 128) return {4, 2, 32};
  return {4, 1, 32};
}

// By wgmma, on sm_90: a product of a warpgroup has 64 rows.
constexpr bool has_warpgroup_kernel(int width, int element_size) { return element_size == 2 && width <= 128; }
constexpr ForwardTile warpgroup_forward_tile(int width) {
  return {4, 1, 64, width <= 64 ? 16 : width <= 96 ? 12 : 8};
}

// Decoding is compiled for fewer widths: it computes little, and the padding of head_dim is never read from memory.
constexpr int decode_width(int width) { return width <= 64 ? 64 : width <= 128 ? 128 : 256; }

// The number of splits of the keys, where one block per tile of rows would leave multiprocessors idle. Partial sums go
// through memory, so each split has enough keys that reading them dominates.
constexpr int kMaxSplits = 128;
constexpr int num_splits(ForwardTile tile, long long rows, long long blocks, long long keys, int multiprocessors) {
  const long long row_keys = 16 * (rows < tile.rows() ? rows : tile.rows());
  const long long least_keys = row_keys < 2 * tile.keys ? 2 * tile.keys : row_keys;
  const long long idle = blocks > 0 ? 1LL * tile.blocks() * multiprocessors / blocks : 1;
  const long long splits = idle < keys / least_keys ? idle : keys / least_keys;
  return splits < 1 ? 1 : splits > kMaxSplits ? kMaxSplits : static_cast<int>(splits);
}

// The heads of one wave of block_tile: their columns fit into a quarter of the L2 cache, since each half of it also
// caches lines of the other half. Waves have equal sizes, so that the last also keeps all multiprocessors busy.
constexpr int heads_per_wave(long long l2_bytes, long long head_bytes, int heads) {
  const long long fit = head_bytes > 0 ? l2_bytes / 4 / head_bytes : heads;
  const int waves = fit < 1 ? heads : static_cast<int>((heads + fit - 1) / fit);
  return waves < 1 ? 1 : (heads + waves - 1) / waves;
}

// A block owns rows (queries for dQ, keys for dK and dV) and iterates over tiles of columns (keys or queries), in two
// stages.
struct BackwardTile {
  int warps;    // in a block
  int m_tiles;  // 16-row tiles per warp
  int columns;  // in one stage
  int chunk;    // columns multiplied at a time: bounds the registers of P and dS
  int blocks;   // resident on a multiprocessor at least: bounds the registers of a thread
  bool paired = false;  // two warps have the same rows: one computes S, the other dP

  constexpr int threads() const { return 32 * warps; }
  constexpr int rows() const { return 16 * m_tiles * warps / (paired ? 2 : 1); }
};

// `keys`: the rows are keys, with two accumulators (dK and dV). `plain`: products without tensor cores.
constexpr BackwardTile backward_tile(int width, int element_size, bool keys, bool plain) {
  if (element_size == 4) {
    if (width <= 64) return {4, 1, 32, 32, 2};
    if (width <= 128) return {4, 1, 16, 16, 1};
    return plain ? BackwardTile{2, 1, 8, 8, 1} : BackwardTile{1, 1, 16, 16, 1};
  }
  if (width <= 32) return {4, 2, 64, 32, keys ? 2 : 3};
  if (width <= 64) return {4, 2, 64, keys ? 16 : 32, 2};
  if (width <= 96) return {8, 1, 64, 32, 1};
  if (width <= 128) return {8, 2, 32, 32, 1, true};
  return {4, 1, 16, 16, 1};
}

// By wgmma, for the widths of has_warpgroup_kernel: one warpgroup, or two that share their columns.
constexpr BackwardTile warpgroup_backward_tile(int width) {
  return width <= 64 ? BackwardTile{4, 1, 64, 64, 3} : BackwardTile{8, 1, 64, 64, 1};
}

}  // namespace gptcore
