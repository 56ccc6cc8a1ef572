// The matrix products of attention, which skip the parts of a block of scores that no query attends to.
#pragma once

#include "kernels/cpu/tiles.h"

namespace gptcore {
namespace GPTCORE_ISA {
namespace {

// The number of keys of a block that each vector of a panel's queries attends to. It does not decrease from vector to
// vector.
struct KeyCounts {
  int vectors;
  int64_t count[kPanelVectors];
};

// S^T = K Q^T or dP^T = V dO^T: rows are keys, columns queries, depth is head_dim.
template <class T>
void multiply_keys_queries(Left<T> a, const Wide<T>* b, const KeyCounts& counts, int64_t steps, float* c) {
  constexpr int64_t kSteps = kDepth / kStep<T>;
  for (int64_t done = 0; done < steps; done += kSteps, a = a.from_step(kSteps), b += kSteps * kPanel)
    for (int64_t v = 0, key = 0; v < counts.vectors; key = counts.count[v++])
      multiply<T>(a.from_row(key), b + v * kLanes, counts.count[v] - key, smaller(kSteps, steps - done),
                  (counts.vectors - v) * kLanes, c + key * kPanel + v * kLanes, done > 0);
}

// O = P V or O += P V, dQ += dS K: rows are queries, columns head_dim, depth is the block of keys.
template <class T>
void multiply_queries(const Wide<T>* a, const Wide<T>* b, const KeyCounts& counts, int64_t queries, int64_t head_dim,
                      float* c, bool accumulate) {
  for (int64_t d = 0; d < head_dim; d += kPanel)
    for (int64_t v = 0, end; v < counts.vectors; v = end) {
      for (end = v + 1; end < counts.vectors && counts.count[end] == counts.count[v];) ++end;
      multiply<T>(by_columns<T>(a + v * kLanes), b + d * (kBlockN / kStep<T>),
                  smaller(queries, end * kLanes) - v * kLanes, (counts.count[v] + kStep<T> - 1) / kStep<T>,
                  smaller(kPanel, head_dim - d), c + (d + v * kLanes) * kPanel, accumulate);
    }
}

// dV += P^T dO, dK += dS^T Q: rows are keys, columns head_dim, depth is the panel of queries. Panels of C are `keys`
// long.
template <class T>
void add_keys(const T* a, const Wide<T>* b, const KeyCounts& counts, int64_t keys, int64_t head_dim, float* c) {
  for (int64_t d = 0; d < head_dim; d += kPanel)
    for (int64_t v = 0, key = 0; v < counts.vectors; key = counts.count[v++])
      multiply<T>(by_rows(a + key * kPanel + v * kLanes, kPanel), b + (d + v * kLanes) / kStep<T> * kPanel,
                  counts.count[v] - key, (counts.vectors - v) * kLanes / kStep<T>, smaller(kPanel, head_dim - d),
                  c + d * keys + key * kPanel, true);
}

}  // namespace
}  // namespace GPTCORE_ISA
}  // namespace gptcore
