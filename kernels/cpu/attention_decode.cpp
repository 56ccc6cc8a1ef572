// Attention forward for few queries: decoding.
//
// Reading K and V once from memory takes most of the time, and packing would read and write them again. Keys are used
// in their original layout: dot products along head_dim, kLanes keys at a time, are summed over lanes to a vector of
// scores. Each query iterates over its own range of keys, so a NaN in K or V cannot reach a query that does not attend
// to it.
#include "kernels/cpu/attention_decode.h"

namespace gptcore {
namespace GPTCORE_ISA {
namespace {

constexpr int kDecodeRows = 8;  // query heads of the group x queries

template <class S>
struct DecodeScratch {
  DecodeQuery<S>* query;   // (kDecodeRows x width)
  float *out, *scores;  // (kDecodeRows x width), (kBlockN)
  int64_t width;
  size_t bytes;

  DecodeScratch(const AttentionArgs& args, char* base) : width(round_up(args.head_dim, 2 * kLanes)) {
    Arena arena{base};
    query = arena.take<DecodeQuery<S>>(kDecodeRows * width);
    out = arena.take<float>(kDecodeRows * width);
    scores = arena.take<float>(kBlockN);
    bytes = arena.used;
  }
};

// out = out x rescale + sum over j < count of probs[j] x value j.
template <class S>
void add_values(const float* probs, const S* values, int64_t stride, int64_t count, int64_t head_dim, float rescale,
                float* out) {
  constexpr int kVectors = 4;
  for (int64_t d = 0; d < head_dim; d += kVectors * kLanes) {
    Vec sum[kVectors];
    for (int v = 0; v < kVectors; ++v)
      sum[v] = d + v * kLanes < head_dim ? load(out + d + v * kLanes) * rescale : Vec{};
    for (int64_t j = 0; j < count; ++j)
      for (int v = 0; v < kVectors; ++v)
        if (d + v * kLanes < head_dim)
          sum[v] += splat(probs[j]) * load_up_to(values + j * stride + d + v * kLanes, head_dim - d - v * kLanes);
    for (int v = 0; v < kVectors; ++v)
      if (d + v * kLanes < head_dim) store(out + d + v * kLanes, sum[v]);
  }
}

#if defined(__AVX512BF16__)
// Two keys at a time: their values are interleaved to the pairs of the dot product. Probabilities are rounded to
// bfloat16, as in the forward of many queries.
void add_values(const float* probs, const bfloat16* values, int64_t stride, int64_t count, int64_t head_dim,
                float rescale, float* out) {
  uint32_t pairs[kBlockN / 2];
  for (int64_t j = 0; j < count; j += kLanes) store((bfloat16*)pairs + j, load_up_to(probs + j, count - j));
  // Interleaving is by groups of four: lanes 4g to 4g + 3 of `low` are elements 8g to 8g + 3, of `high` the next four.
  const IntVec lane = lane_index(), swapped = (lane & 3) + (lane & 4) * (kLanes / 4);
  const IntVec first = swapped + (lane >> 3) * 4, second = first + kLanes / 2;
  const IntVec low = (lane & 3) + (lane >> 2) * 8, high = low + 4;
  constexpr int kParts = 2;
  for (int64_t d = 0; d < head_dim; d += kParts * 2 * kLanes) {
    Vec sum[kParts][2] = {};
    for (int p = 0; p < kParts; ++p)
      if (const float* acc = out + d + p * 2 * kLanes; d + p * 2 * kLanes < head_dim) {
        sum[p][0] = __builtin_shuffle(load(acc), load(acc + kLanes), low) * rescale;
        sum[p][1] = __builtin_shuffle(load(acc), load(acc + kLanes), high) * rescale;
      }
    for (int64_t j = 0; j < count; j += 2) {
      const UintVec pair = UintVec{} + pairs[j / 2];
      for (int p = 0; p < kParts; ++p) {
        const int64_t column = d + p * 2 * kLanes;
        if (column >= head_dim) continue;
        const bfloat16* value = values + j * stride + column;
        const __m512i even = (__m512i)load_pairs(value, head_dim - column);
        const __m512i odd = (__m512i)load_pairs(value + stride, j + 1 < count ? head_dim - column : 0);
        multiply_add(sum[p][0], pair, (UintVec)_mm512_unpacklo_epi16(even, odd));
        multiply_add(sum[p][1], pair, (UintVec)_mm512_unpackhi_epi16(even, odd));
      }
    }
    for (int p = 0; p < kParts; ++p)
      if (float* acc = out + d + p * 2 * kLanes; d + p * 2 * kLanes < head_dim) {
        store(acc, __builtin_shuffle(sum[p][0], sum[p][1], first));
        store(acc + kLanes, __builtin_shuffle(sum[p][0], sum[p][1], second));
      }
  }
}
#endif

// A task is a key-value head of a segment with all of its queries.
template <class S>
void decode(const AttentionArgs& args) {
  const size_t bytes = DecodeScratch<S>(args, nullptr).bytes;
  const int64_t pairs = args.num_segments * args.kv_heads, group = args.query_heads / args.kv_heads;
  const Scale scale(args.scale);
#pragma omp parallel num_threads(args.num_threads) if (args.num_threads > 1 && pairs > 1)
  {
    const DecodeScratch<S> scratch(args, args.workspace + bytes * omp_get_thread_num());
#pragma omp for schedule(dynamic, 1)
    for (int64_t task = 0; task < pairs; ++task) {
      const Segment& segment = args.segments[task / args.kv_heads];
      if (!is_decode(args, segment)) continue;
      const int64_t kv_head = task % args.kv_heads, rows = segment.query_len * group;
      float row_max[kDecodeRows], row_sum[kDecodeRows];
      for (int64_t r = 0; r < rows; ++r) {  // row r: head r / query_len of the group, query r % query_len
        const int64_t head = kv_head * group + r / segment.query_len, query = r % segment.query_len;
        load_query(scratch.query + r * scratch.width,
                   row<S>(args.query, segment.batch, head, segment.query_begin + query), args.head_dim, scale.sign);
        memset(scratch.out + r * scratch.width, 0, scratch.width * sizeof(float));
        row_max[r] = -kInfinity, row_sum[r] = 0.0f;
      }
      for (int64_t block = 0; block < segment.key_len; block += kBlockN)
        for (int64_t r = 0; r < rows; ++r) {
          Range range = attended(args, segment, r % segment.query_len);
          const int64_t begin = larger(block, range.begin), count = smaller(block + kBlockN, range.end) - begin;
          if (count <= 0) continue;
          const int64_t first = segment.key_begin + begin;
          dot_keys(scratch.query + r * scratch.width, row<S>(args.key, segment.batch, kv_head, first),
                   args.key.row_stride, count, args.head_dim, scratch.scores);
          Vec block_max = splat(-kInfinity), block_sum = Vec{};
          for (int64_t j = 0; j < count; j += kLanes)
            block_max = max(block_max, load(scratch.scores + j));
          float new_max = row_max[r];
          for (int i = 0; i < kLanes; ++i) new_max = block_max[i] > new_max ? block_max[i] : new_max;
          const float shift = new_max == -kInfinity ? 0.0f : new_max;
          for (int64_t j = 0; j < count; j += kLanes) {
            Vec p = exp2((load(scratch.scores + j) - shift) * scale.size_log2);
            block_sum += lane_index() < (int32_t)(count - j) ? p : Vec{};
            store(scratch.scores + j, p);
          }
          const float rescale = exp2f((row_max[r] - shift) * scale.size_log2);
          row_sum[r] = row_sum[r] * rescale + sum_lanes(block_sum), row_max[r] = new_max;
          add_values(scratch.scores, row<S>(args.value, segment.batch, kv_head, first), args.value.row_stride, count,
                     args.head_dim, rescale, scratch.out + r * scratch.width);
        }
      for (int64_t r = 0; r < rows; ++r) {
        const int64_t head = kv_head * group + r / segment.query_len;
        const int64_t query = segment.query_begin + r % segment.query_len;
        unpack_row(row<S>(args.out, segment.batch, head, query), scratch.out + r * scratch.width, 1, args.head_dim,
                   row_sum[r] == 0 ? 0.0f : 1.0f / row_sum[r]);
        const int64_t lse_row = (segment.batch * args.query_heads + head) * args.query_len + query;
        args.lse[lse_row] = scale.lse(row_max[r], row_sum[r]);
      }
    }
  }
}

}  // namespace

bool is_decode(const AttentionArgs& args, const Segment& segment) {
  return args.dropout_p == 0 && segment.query_len * (args.query_heads / args.kv_heads) <= kDecodeRows;
}

size_t attention_decode_workspace(const AttentionArgs& args) {
  return args.num_threads * (args.dtype == DType::bfloat16 ? DecodeScratch<bfloat16>(args, nullptr).bytes
                                                           : DecodeScratch<float>(args, nullptr).bytes);
}

void attention_decode(const AttentionArgs& args) {
  switch (args.dtype) {
    case DType::bfloat16: return decode<bfloat16>(args);
    case DType::float16: return decode<float16>(args);
    default: return decode<float>(args);
  }
}

}  // namespace GPTCORE_ISA
}  // namespace gptcore
