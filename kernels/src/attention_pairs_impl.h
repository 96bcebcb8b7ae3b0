// Attention: products of queries with keys, and of weights with values, a pair of integers at a time.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "lanes.h"

namespace edgelm {
namespace {

// finish.take<R, V>(tile, row, column) receives the sums of R rows and V groups of columns, from `row` and `column` on.
template <int R, int V, typename Finish>
inline void pairs_tile(const int16_t* a, size_t stride_a, const int16_t* columns, int stride, int depth, int row,
                       int column, const Finish& finish) {
  constexpr int kParts = kIntsPerLanes;
  // Loops over sums are unrolled early. Otherwise GCC 12 keeps the sums on the stack before and behind the loop over
  // depth.
  Ints tile[R * V * kParts];
#pragma GCC unroll 64
  for (int i = 0; i < R * V * kParts; i++) tile[i] = zero_ints();
  for (int k = 0; k < 2 * depth; k += 2) {
    Bytes pairs[V * kParts];
#pragma GCC unroll 16
    for (int v = 0; v < V; v++)
#pragma GCC unroll 16
      for (int i = 0; i < kParts; i++)
        pairs[v * kParts + i] = load_bytes(columns + (v * 2 * stride + k) * kLanes + i * 2 * kSumsPerInts);
#pragma GCC unroll 16
    for (int r = 0; r < R; r++) {
      const Bytes factors = broadcast_pair(four(a + r * stride_a + k));
#pragma GCC unroll 16
      for (int i = 0; i < V * kParts; i++)
        tile[r * V * kParts + i] = dot_pairs(tile[r * V * kParts + i], pairs[i], factors);
    }
  }
  finish.template take<R, V>(tile, row, column);
}

// V groups of columns at once; for the remaining columns, half as many.
template <int R, int V, typename Finish>
inline void pairs_rows(const int16_t* a, size_t stride_a, const int16_t* columns, int stride, int depth, int count,
                       int row, int column, const Finish& finish) {
  constexpr int kStep = V * kLanes;
  for (; count >= kStep; count -= kStep, columns += kStep * 2 * stride, column += kStep)
    pairs_tile<R, V>(a, stride_a, columns, stride, depth, row, column, finish);
  if constexpr (V > 1) pairs_rows<R, V / 2>(a, stride_a, columns, stride, depth, count, row, column, finish);
}

template <typename Finish>
void each_pairs(const int16_t* a, int rows, size_t stride_a, const int16_t* columns, int stride, int depth, int count,
                const Finish& finish) {
  int row = 0;
  const auto next = [&]<int R>() {
    pairs_rows<R, kPairVectors>(a + row * stride_a, stride_a, columns, stride, depth, count, row, 0, finish);
    row += R;
  };
  while (rows - row >= kPairRows) next.template operator()<kPairRows>();
  while (rows - row >= 3) next.template operator()<3>();
  while (row < rows) next.template operator()<1>();
}

struct ToMemory {
  int32_t* sums;
  size_t stride;

  template <int R, int V>
  void take(const Ints* tile, int row, int column) const {
#pragma GCC unroll 16
    for (int r = 0; r < R; r++)
#pragma GCC unroll 16
      for (int i = 0; i < V * kIntsPerLanes; i++)
        store_ints(sums + (row + r) * stride + column + i * kSumsPerInts, tile[r * V * kIntsPerLanes + i]);
  }
};

void pairs(const int16_t* a, int rows, size_t stride_a, const int16_t* columns, int stride, int depth, int count,
           int32_t* sums, size_t stride_sums) {
  each_pairs(a, rows, stride_a, columns, stride, depth, count, ToMemory{sums, stride_sums});
}

template <bool scaled>
struct ToScores {
  const float* key_scales;
  float *scores, *largest;
  size_t stride;

  template <int R, int V>
  void take(const Ints* tile, int row, int column) const {
    Lanes factors[V];
    if constexpr (scaled) {
#pragma GCC unroll 16
      for (int v = 0; v < V; v++) factors[v] = load(key_scales + column + v * kLanes);
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; r++) {
      float* const most = largest + (row + r) * kLanes;
      Lanes high = column == 0 ? set(-std::numeric_limits<float>::max()) : load(most);
#pragma GCC unroll 16
      for (int v = 0; v < V; v++) {
        Lanes score = lanes_of(tile + (r * V + v) * kIntsPerLanes);
        if constexpr (scaled) score = mul(score, factors[v]);
        store(scores + (row + r) * stride + column + v * kLanes, score);
        high = max(high, score);
      }
      store(most, high);
    }
  }
};

void scores(const int16_t* a, int rows, size_t stride_a, const int16_t* columns, int depth, int count,
            const float* key_scales, float* scores, size_t stride_scores, float* largest) {
  if (key_scales == nullptr)
    each_pairs(a, rows, stride_a, columns, depth, depth, count,
               ToScores<false>{nullptr, scores, largest, stride_scores});
  else
    each_pairs(a, rows, stride_a, columns, depth, depth, count,
               ToScores<true>{key_scales, scores, largest, stride_scores});
}

}  // namespace
}  // namespace edgelm
