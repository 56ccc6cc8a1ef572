// The mask and the dropout of attention.
#pragma once

#include "kernels/kernels.h"
#include "kernels/cpu/attention_tiles.h"

namespace gptcore {
namespace GPTCORE_ISA {
namespace {

// ---- masks ----------------------------------------------------------------------------------------------------------

// The keys [begin, end) of its segment that a query attends to. Both ends increase with the query.
struct Range {
  int64_t begin, end;
};
Range attended(const AttentionArgs& args, const Segment& segment, int64_t query) {
  int64_t position = query + segment.key_len - segment.query_len;  // the last query is at the last key
  int64_t begin = args.window_left < 0 ? 0 : position - args.window_left, end = segment.key_len;
  if (args.causal) end = smaller(end, position + 1);
  if (args.window_right >= 0) end = smaller(end, position + args.window_right + 1);
  end = larger(end, 0);
  return {smaller(larger(begin, 0), end), end};
}

// kPanel queries of one head, with the range of keys of each lane.
struct Panel {
  int64_t first, rows;  // queries [first, first + rows) of the segment; the other lanes are idle
  int64_t key_begin, key_end;      // the keys that any of them attends to
  alignas(64) int32_t begin[kPanel], end[kPanel];

  Panel(const AttentionArgs& args, const Segment& segment, int64_t first_query)
      : first(first_query), rows(smaller(kPanel, segment.query_len - first_query)) {
    for (int i = 0; i < kPanel; ++i) {
      Range range = attended(args, segment, first + smaller(i, rows - 1));
      begin[i] = (int32_t)range.begin, end[i] = (int32_t)range.end;
    }
    key_begin = begin[0], key_end = end[rows - 1];
  }
  int vectors() const { return (int)((rows + kLanes - 1) / kLanes); }
  // The keys of a block of `count` from `key` that each vector of queries attends to.
  template <class T>
  KeyCounts key_counts(int64_t key, int64_t count) const {
    KeyCounts counts{vectors(), {}};
    for (int v = 0; v < counts.vectors; ++v)
      counts.count[v] = smaller(count, round_up(larger(0, end[(v + 1) * kLanes - 1] - key), kStep<T>));
    // An AMX tile is as deep as two vectors are long, and partial tiles cost more than masked elements of whole ones.
    for (int v = 0; v + 1 < counts.vectors && kInTiles<T>; v += 2) counts.count[v] = counts.count[v + 1];
    return counts;
  }
  // The number of keys from `key` on that all queries of a vector attend to: these need no mask.
  int64_t unmasked(int vector, int64_t key, int64_t count) const {
    return key < begin[(vector + 1) * kLanes - 1] ? 0 : smaller(count, larger(0, end[vector * kLanes] - key));
  }

  // All ones in the lanes that attend to this key.
  IntVec attends(int vector, int64_t key) const {
    IntVec from, to;
    memcpy(&from, begin + vector * kLanes, sizeof from);
    memcpy(&to, end + vector * kLanes, sizeof to);
    return ((int32_t)key >= from) & ((int32_t)key < to);
  }
};

// ---- dropout --------------------------------------------------------------------------------------------------------

// Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"). Whether a weight is kept depends
// only on (seed, head, query, key): the backward and every other backend draw the same. One call covers four adjacent
// keys: counter = (key / 4, query, batch x heads + head, 0).
class Dropout {
 public:
  Dropout(const AttentionArgs& args, const Segment& segment, int64_t head, int64_t first_query)
      : seed_(args.seed), threshold_((uint32_t)(args.dropout_p * 4294967296.0)),
        head_((uint32_t)(segment.batch * args.query_heads + head)),
        first_query_((uint32_t)(segment.query_begin + first_query)), first_key_(segment.key_begin) {
    for (uint64_t& group : group_) group = ~0ull;
  }

  // All ones in the lanes that keep this key of the segment.
  IntVec keeps(int vector, int64_t key) {
    uint64_t index = (uint64_t)(first_key_ + key);
    if (index / 4 != group_[vector]) generate(vector, group_[vector] = index / 4);
    return words_[vector][index % 4] >= threshold_;
  }

 private:
  void generate(int vector, uint64_t group) {
    typedef uint64_t Long __attribute__((vector_size(kLanes * 8)));
    UintVec c0 = UintVec{} + (uint32_t)group, c2 = UintVec{} + head_, c3 = UintVec{};
    UintVec c1 = bit_cast<UintVec>(lane_index()) + (first_query_ + (uint32_t)(vector * kLanes));
    uint32_t k0 = (uint32_t)seed_, k1 = (uint32_t)(seed_ >> 32);
    for (int round = 0; round < 10; ++round, k0 += 0x9E3779B9u, k1 += 0xBB67AE85u) {
      Long product0 = __builtin_convertvector(c0, Long) * 0xD2511F53ull;
      Long product1 = __builtin_convertvector(c2, Long) * 0xCD9E8D57ull;
      c0 = __builtin_convertvector(product1 >> 32, UintVec) ^ c1 ^ k0;
      c2 = __builtin_convertvector(product0 >> 32, UintVec) ^ c3 ^ k1;
      c1 = __builtin_convertvector(product1, UintVec);
      c3 = __builtin_convertvector(product0, UintVec);
    }
    words_[vector][0] = c0, words_[vector][1] = c1, words_[vector][2] = c2, words_[vector][3] = c3;
  }

  uint64_t seed_;
  uint32_t threshold_, head_, first_query_;
  int64_t first_key_;
  uint64_t group_[kPanelVectors];  // of four keys, whose words are in words_
  UintVec words_[kPanelVectors][4];
};

}  // namespace
}  // namespace GPTCORE_ISA
}  // namespace gptcore
