// Attention: the weights of a chunk of positions, and the merging of chunks.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "attention_columns_impl.h"
#include "attention_pairs_impl.h"
#include "lanes.h"

namespace edgelm {
namespace {

// --- weights --------------------------------------------------------------------------------------------------------

// What a row sees of a chunk: the positions [begin, end), or the whole chunk, a multiple of 2 * kLanes.
struct Some {
  int begin, end;
};
struct All {
  int end;
};

// Lanes [i, i + kLanes): 1 where they are seen, 0 elsewhere.
inline Lanes seen_lanes(Some seen, int i) {
  static constexpr float kOnes[2 * kLanes] = {1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1};
  const auto first = [](int count) { return load(kOnes + kLanes - std::clamp(count, 0, kLanes)); };
  return sub(first(seen.end - i), first(seen.begin - i));
}
inline Lanes or_zero(Lanes x, All) { return x; }
inline Lanes or_zero(Lanes x, Lanes seen) { return where_at_least(seen, set(1), x); }
inline Lanes or_lowest(Lanes x, All) { return x; }
inline Lanes or_lowest(Lanes x, Lanes seen) {
  return add(or_zero(x, seen), mul(sub(seen, set(1)), set(std::numeric_limits<float>::max())));
}

// Calls step(i, seen) for lanes [i, i + kLanes) if some of them are seen. seen: All, or the result of `seen_lanes`.
template <typename Step>
inline void each_seen(All all, Step step) {
  for (int i = 0; i < all.end; i += kLanes) step(i, all);
}
template <typename Step>
inline void each_seen(Some some, Step step) {
  const int whole = some.end / kLanes * kLanes;
  for (int i = some.begin / kLanes * kLanes; i < some.end;) {
    if (i < some.begin || i >= whole) step(i, seen_lanes(some, i)), i += kLanes;
    for (; i < whole; i += kLanes) step(i, All{});
  }
}

// Sets those of `count` weights to 0 that `each_seen` does not reach.
inline void clear_unseen(All, int, int16_t*) {}
inline void clear_unseen(Some seen, int count, int16_t* w) {
  for (int i = 0; i + kLanes <= seen.begin; i += kLanes) store_words(w + i, zero());
  for (int i = padded(seen.end, kLanes); i < padded(count, 2 * kLanes); i += kLanes) store_words(w + i, zero());
}

// Rows that are weighted together: while one waits for its largest score or a sum, others are computed.
constexpr int kTogether = 32;

// The lanes of each row, reduced to one value.
struct ByRows {
  alignas(64) float lanes[kTogether][kLanes];

  // Reduces each row with `operation`. Then lanes[row / 4] holds the results of four rows.
  template <typename Operation>
  void fold_rows(int rows, Operation operation) {
    for (int row = rows; row % 4 != 0; row++) store(lanes[row], zero());
    for (int row = 0; row < rows; row += 4) {
      const Lanes four[4] = {load(lanes[row]), load(lanes[row + 1]), load(lanes[row + 2]), load(lanes[row + 3])};
      store(lanes[row / 4], fold(four, operation));
    }
  }
  void add_rows(int rows) {
    fold_rows(rows, [](Lanes a, Lanes b) { return add(a, b); });
  }
  void find_largest(int rows) {
    fold_rows(rows, [](Lanes a, Lanes b) { return max(a, b); });
  }
  float operator[](int row) const { return lanes[row / 4][row % 4 * 4]; }
};

inline Lanes largest_lanes(const AttentionScores& scores, int row, All) { return load(scores.largest + row * kLanes); }
inline Lanes largest_lanes(const AttentionScores& scores, int row, Some seen_by) {
  Lanes most = set(-std::numeric_limits<float>::max());
  each_seen(seen_by, [&](int i, auto seen) {
    most = max(most, or_lowest(load(scores.values + row * scores.stride + i), seen));
  });
  return most;
}

// The largest score of each row.
template <typename Seen>
inline ByRows largest_scores(const AttentionScores& scores, int rows, Seen seen_by) {
  ByRows high;
  for (int row = 0; row < rows; row++) store(high.lanes[row], largest_lanes(scores, row, seen_by(row)));
  high.find_largest(rows);
  return high;
}

// The largest score of one row; -infinity if it sees nothing.
inline float largest_score(const AttentionScores& scores, int row, const ByRows& high) {
  return scores.end[row] == 0 ? -std::numeric_limits<float>::infinity() : high[row] * scores.factors[row];
}

// Calls weigh(scores, rows, seen_by, part) for up to kTogether rows at a time. seen_by(row): what a row sees.
template <typename Weigh>
inline void together(AttentionScores scores, int all_rows, int count, AttentionPart part, Weigh weigh) {
  for (; all_rows > 0; all_rows -= kTogether) {
    const int rows = std::min(all_rows, kTogether);
    // If the first and the last row see the whole chunk, all rows do.
    const bool whole = count % (2 * kLanes) == 0 && scores.begin[rows - 1] == 0 && scores.end[rows - 1] == count &&
                       scores.end[0] == count;
    if (whole)
      weigh(scores, rows, [count](int) { return All{count}; }, part);
    else
      weigh(scores, rows, [&](int row) { return Some{scores.begin[row], scores.end[row]}; }, part);
    scores.values += kTogether * scores.stride, scores.weights += kTogether * scores.stride;
    scores.largest += kTogether * kLanes;
    scores.begin += kTogether, scores.end += kTogether, scores.factors += kTogether;
    part.scales += kTogether, part.sums += kTogether, part.largest += kTogether;
  }
}

void weights(const AttentionScores& all, int all_rows, int count, const AttentionPart& parts) {
  together(all, all_rows, count, parts, [count](auto scores, int rows, auto seen_by, auto part) {
    const ByRows high = largest_scores(scores, rows, seen_by);
    for (int row = 0; row < rows; row++) {
      const float* const s = scores.values + row * scores.stride;
      int16_t* const w = scores.weights + row * scores.stride;
      part.largest[row] = largest_score(scores, row, high);
      const Lanes factor = set(scores.factors[row]), shift = set(-part.largest[row]);
      each_seen(seen_by(row), [&](int i, auto seen) {
        store_words(w + i, or_zero(power_of_two(add(mul(load(s + i), factor), shift), kOne), seen));
      });
      clear_unseen(seen_by(row), count, w);
    }
    for (int row = 0; row < rows; row++) {
      const int16_t* const w = scores.weights + row * scores.stride;
      Ints sum = zero_ints();
      for (int i = 0; i < padded(count, 2 * kLanes); i += kBytes / 2)
        sum = dot_pairs(sum, load_bytes(w + i), broadcast_pair(0x00010001));
      part.sums[row] = static_cast<float>(total(sum)), part.scales[row] = 1;
    }
  });
}

// The factors that turn weights into integers.
inline ByRows inverses(const ByRows& scales, int rows) {
  ByRows y;
  for (int i = 0; i < (rows + 3) / 4; i++) {
    const Lanes scale = load(scales.lanes[i]);
    store(y.lanes[i], where_at_least(scale, set(0x1p-126f), div(set(1), scale)));
  }
  return y;
}

void scaled_weights(const AttentionScores& all, int all_rows, int count, const float* value_scales, float limit,
                    const AttentionPart& parts) {
  together(all, all_rows, count, parts, [=](auto scores, int rows, auto seen_by, auto part) {
    const auto values = [&](int row) { return scores.values + row * scores.stride; };
    const ByRows most = largest_scores(scores, rows, seen_by);
    ByRows sums, scaled_sums, scales;
    for (int row = 0; row < rows; row++) {
      float* const v = values(row);
      part.largest[row] = largest_score(scores, row, most);
      const Lanes factor = set(scores.factors[row]), shift = set(-part.largest[row]);
      Lanes sum = zero(), scaled_sum = zero(), high = zero();
      each_seen(seen_by(row), [&](int i, auto seen) {
        const Lanes p = or_zero(nearly_power_of_two(fma(load(v + i), factor, shift)), seen);
        const Lanes scale = load(value_scales + i), scaled = mul(p, scale);
        store(v + i, scaled);
        sum = add(sum, p), scaled_sum = fma(p, scale, scaled_sum), high = max(high, scaled);
      });
      store(sums.lanes[row], sum), store(scaled_sums.lanes[row], scaled_sum), store(scales.lanes[row], high);
    }
    sums.add_rows(rows), scaled_sums.add_rows(rows), scales.find_largest(rows);
    const Lanes to_words = set(1.0f / std::numeric_limits<int16_t>::max()), to_limit = set(1 / limit);
    for (int i = 0; i < (rows + 3) / 4; i++)
      store(scales.lanes[i], max(mul(load(scales.lanes[i]), to_words), mul(load(scaled_sums.lanes[i]), to_limit)));
    const ByRows inverse = inverses(scales, rows);
    for (int row = 0; row < rows; row++) {
      int16_t* const w = scores.weights + row * scores.stride;
      each_seen(seen_by(row), [&, v = values(row), factor = set(inverse[row])](int i, auto) {
        store_words(w + i, mul(load(v + i), factor));
      });
      clear_unseen(seen_by(row), count, w);
      part.sums[row] = sums[row], part.scales[row] = scales[row];
    }
  });
}

// --- chunks, merged -------------------------------------------------------------------------------------------------

// Rows that are merged together: a multiple of kLanes and of the rows of `pairs`.
constexpr int kMerged = 48;
static_assert(kMerged % kLanes == 0 && kMerged % kPairRows == 0);

// The factors of the values of earlier chunks (own) and of a chunk (other). The constructor merges the sums and the
// largest scores.
struct Merging {
  alignas(64) float own[kMerged], other[kMerged];

  Merging(const AttentionState& state, const AttentionPart& part, int rows) {
    for (int begin = 0; begin < rows; begin += kLanes) {
      const Lanes before = load(state.largest + begin), added = load(part.largest + begin), high = max(before, added);
      float largest[kLanes];
      store(largest, high);
      store(own + begin, power_of_two(sub(before, high), 1)), store(other + begin, power_of_two(sub(added, high), 1));
      for (int row = begin; row < std::min(begin + kLanes, rows); row++) {
        if (part.sums[row] == 0) continue;
        state.sums[row] = std::fma(part.sums[row], other[row], state.sums[row] * own[row]);
        state.largest[row] = largest[row - begin];
        other[row] *= part.scales[row];
      }
    }
  }
};

inline AttentionState from(const AttentionState& state, int row, int width) {
  return {state.values + row * static_cast<size_t>(width), state.sums + row, state.largest + row};
}
inline AttentionPart from(const AttentionPart& part, int row, int width) {
  return {part.values + row * static_cast<size_t>(width), part.scales + row, part.sums + row, part.largest + row};
}

void merge(const AttentionState& all, const AttentionPart& parts, int all_rows, int width) {
  for (int begin = 0; begin < all_rows; begin += kMerged) {
    const AttentionState state = from(all, begin, width);
    const AttentionPart part = from(parts, begin, width);
    const int rows = std::min(kMerged, all_rows - begin);
    const Merging merging(state, part, rows);
    for (int row = 0; row < rows; row++) {
      if (part.sums[row] == 0) continue;
      const Lanes own = set(merging.own[row]), other = set(merging.other[row]);
      float* const values = state.values + row * static_cast<size_t>(width);
      const int32_t* const more = part.values + row * static_cast<size_t>(width);
      for (int i = 0; i < width; i += kLanes) store(values + i, fma(load(more + i), other, mul(load(values + i), own)));
    }
  }
}

void divide(const float* a, float divisor, const float* factors, int size, float* y) {
  for (int i = 0; i < size; i++) y[i] = a[i] / divisor * factors[i];
}

struct ToValues {
  float* values;
  size_t width;
  const float* sums;
  const Merging& merging;

  template <int R, int V>
  void take(const Ints* tile, int row, int column) const {
#pragma GCC unroll 16
    for (int r = 0; r < R; r++) {
      if (sums[row + r] == 0) continue;
      const Lanes own = set(merging.own[row + r]), other = set(merging.other[row + r]);
      float* const y = values + (row + r) * width + column;
#pragma GCC unroll 16
      for (int v = 0; v < V; v++)
        store(y + v * kLanes, fma(lanes_of(tile + (r * V + v) * kIntsPerLanes), other, mul(load(y + v * kLanes), own)));
    }
  }
};

void merge_values(const AttentionState& all, const AttentionPart& parts, const int16_t* weights, int rows,
                  size_t stride_weights, const int16_t* columns, int stride, int depth, int width) {
  for (int begin = 0; begin < rows; begin += kMerged) {
    const AttentionState state = from(all, begin, width);
    const AttentionPart part = from(parts, begin, width);
    const int count = std::min(kMerged, rows - begin);
    const Merging merging(state, part, count);
    each_pairs(weights + begin * stride_weights, count, stride_weights, columns, stride, depth, width,
               ToValues{state.values, static_cast<size_t>(width), part.sums, merging});
  }
}

}  // namespace
}  // namespace edgelm
