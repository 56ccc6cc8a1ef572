// The launch policy: how large the tiles of a kernel are, by head_dim and size of an element. Plain constexpr C++, for
// the kernels, the host, and whoever checks or draws them.
//
// Every tile fits into 99 KiB of shared memory, the least that a block may have on the supported architectures (sm_86,
// sm_89 and sm_120), and into 255 registers; so one table serves all of them.
#pragma once

namespace gptcore {

// The width of the tile that head_dim is padded to in shared memory. Few widths, for each is compiled.
constexpr int tile_width(int head_dim, int element_size) {
  if (element_size == 2 && head_dim <= 32) return 32;
  if (head_dim <= 64) return 64;
  if (element_size == 2 && head_dim <= 96) return 96;
  return head_dim <= 128 ? 128 : 256;
}

struct ForwardTile {
  int warps;    // in a block
  int m_tiles;  // 16-row tiles of a warp
  int keys;     // in one tile of K and V, of which there are two stages

  constexpr int threads() const { return 32 * warps; }
  constexpr int rows() const { return 16 * m_tiles * warps; }
  constexpr int blocks() const { return 8 / warps; }  // of a multiprocessor at a time: 8 warps of 255 registers fit
};

// `few`: at most 16 rows, as in decoding. Then the time is that of reading K and V, and many small blocks read best.
constexpr ForwardTile forward_tile(int width, int element_size, bool few) {
  if (element_size == 4) {
    if (width <= 64) return few ? ForwardTile{1, 1, 32} : ForwardTile{4, 1, 32};
    if (width <= 128) return few ? ForwardTile{1, 1, 16} : ForwardTile{4, 1, 16};
    return few ? ForwardTile{1, 1, 8} : ForwardTile{2, 1, 16};
  }
  if (few) return {1, 1, width <= 64 ? 64 : width <= 128 ? 32 : 16};
  if (width <= 64) return {4, 2, 64};
  if (width <= 128) return {4, 2, 32};
  return {4, 1, 32};
}

// Decoding is compiled for fewer widths, since it computes little and head_dim's padding is never read from memory.
constexpr int few_width(int width) { return width <= 64 ? 64 : width <= 128 ? 128 : 256; }

// Into how many parts the keys of a tile of rows are split, for blocks that would otherwise leave multiprocessors idle.
// The parts' sums go through memory: each has keys enough that reading them is most of the work.
constexpr int kMaxSplits = 128;
constexpr int forward_splits(ForwardTile tile, long long rows, long long blocks, long long keys, int multiprocessors) {
  const long long row_keys = 16 * (rows < tile.rows() ? rows : tile.rows());
  const long long least_keys = row_keys < 2 * tile.keys ? 2 * tile.keys : row_keys;
  const long long idle = blocks > 0 ? 1LL * tile.blocks() * multiprocessors / blocks : 1;
  const long long splits = idle < keys / least_keys ? idle : keys / least_keys;
  return splits < 1 ? 1 : splits > kMaxSplits ? kMaxSplits : static_cast<int>(splits);
}

// The heads whose blocks take turns (block_tile) are those whose columns fit into a quarter of the L2 cache: half of an
// H200's was too much, whose every half has copies of what the other holds. In sections of one size, as the last has to
// keep all multiprocessors busy, too.
constexpr int heads_together(long long l2_bytes, long long head_bytes, int heads) {
  const long long fit = head_bytes > 0 ? l2_bytes / 4 / head_bytes : heads;
  const int sections = fit < 1 ? heads : static_cast<int>((heads + fit - 1) / fit);
  return sections < 1 ? 1 : (heads + sections - 1) / sections;
}

// A block owns rows (of queries for dQ, of keys for dK and dV), by which columns (of the other) pass, in two stages.
struct BackwardTile {
  int warps;    // in a block
  int m_tiles;  // 16-row tiles of a warp
  int columns;  // in one stage
  int chunk;    // columns that are multiplied at a time: what P and dS take of the registers
  int blocks;   // on a multiprocessor at least, as far as registers go

  constexpr int threads() const { return 32 * warps; }
  constexpr int rows() const { return 16 * m_tiles * warps; }
};

// `keys`: the rows are keys, with two sums to keep in registers. `plain`: products without tensor cores.
constexpr BackwardTile backward_tile(int width, int element_size, bool keys, bool plain) {
  if (element_size == 4) {
    if (width <= 64) return {4, 1, 32, 32, 2};
    if (width <= 128) return {4, 1, 16, 16, 1};
    return plain ? BackwardTile{2, 1, 8, 8, 1} : BackwardTile{1, 1, 16, 16, 1};
  }
  if (width <= 32) return {4, 2, 64, 32, 2};
  if (width <= 64) return {4, 2, 64, keys ? 16 : 32, 2};
  if (width <= 96) return {8, 1, 64, 32, 1};
  if (width <= 128) return {8, 1, 32, 32, 1};
  return {4, 1, 16, 16, 1};
}

}  // namespace gptcore
