// Attention: keys and values in order, their products, the weights of a chunk, and what chunks come to.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "lanes.h"

namespace edgelm {
namespace {

// --- keys and values ------------------------------------------------------------------------------------------------

void rotate(float* x, const float* cosines, const float* sines, int half) {
  for (int i = 0; i < half; i++) {
    const float a = x[i], b = x[half + i];
    x[i] = std::fma(a, cosines[i], -(b * sines[i]));
    x[half + i] = std::fma(b, cosines[i], a * sines[i]);
  }
}

void to_int8(const float* x, const float* factors, int size, int8_t* y) {
  for (int i = 0; i < size; i++) {
    const float value = std::nearbyint(x[i] * factors[i]);
    y[i] = static_cast<int8_t>(static_cast<int32_t>(value < -128 ? -128 : value > 127 ? 127 : value));
  }
}

float to_scaled_int8(const float* x, const float* factors, int size, int8_t* y) {
  const auto scaled = [&](int i, int count) { return mul(load_some(x + i, count), load_some(factors + i, count)); };
  Lanes most = zero();
  each_lanes(size, [&](int i, int count) { most = max(most, abs(scaled(i, count))); });
  constexpr int kLimit = 127;
  // Infinity would make what it scales no numbers, of positions too that do not see it.
  const float r = std::min(std::numeric_limits<float>::max(), largest(most));
  // Below, 127 / r is infinite, and times 0 no number.
  const bool none = r < 0x1p-100f;
  const Lanes factor = set(none ? 0 : static_cast<float>(kLimit) / r);
  each_lanes(size, [&](int i, int count) {
    uint8_t bytes[kLanes];
    store_bytes(bytes, mul(scaled(i, count), factor), 0);
    std::memcpy(y + i, bytes, count);
  });
  return none ? 0 : r / static_cast<float>(kLimit);
}

// Asks for a row of what is read next, a line at a time. Asked for all at once, or found out by the processor, it comes
// later: a step over 1,900 positions took 1.5 times as long.
inline void prefetch(const int8_t* x, int row, int stride) {
  __builtin_prefetch(x + row * static_cast<size_t>(stride));
}

float to_int16(const float* x, int size, int limit, int16_t* q) {
  const float r = largest_magnitude(x, size);
  const Lanes factor = set(rounding(r, limit));
  each_lanes(size, [&](int i, int count) {
    int16_t words[kLanes];
    store_words(words, mul(load_some(x + i, count), factor));
    std::copy_n(words, padded(count, 2), q + i);
  });
  return r / static_cast<float>(limit);
}

#if !defined(EDGELM_OWN_TRANSPOSITION)
inline void square_pairs(const int8_t* x, size_t stride, int16_t* y) {
  Square square[kSquare];
  for (int i = 0; i < kSquare; i++) std::memcpy(&square[i], x + i * stride, kSquare);
  transpose(square);
  for (int i = 0; i < kSquare; i += 2, y += 2 * kLanes)
    store_pairs(y, reinterpret_cast<const int8_t*>(&square[i]), reinterpret_cast<const int8_t*>(&square[i + 1]));
}
#endif

void key_pairs(const int8_t* x, int count, int size, int stride, const int8_t* next, int16_t* columns) {
  const size_t depth = padded(size, 2) * kLanes;
  for (int row = 0; row < count; row += kSquare, columns += depth) {
    for (int i = 0; i < kSquare; i++) prefetch(next, row + i, stride);
    for (int column = 0; column < size; column += kSquare) {
      const int8_t* const corner = x + row * static_cast<size_t>(stride) + column;
      int16_t* const y = columns + column * kLanes;
      if (row + kSquare <= count && column + kSquare <= size) {
        square_pairs(corner, stride, y);
        continue;
      }
      int8_t square[kSquare][kSquare] = {};
      int16_t pairs[kSquare * kLanes];
      const int rows = std::min(kSquare, count - row), length = std::min(kSquare, size - column);
      for (int i = 0; i < rows; i++) std::memcpy(square[i], corner + i * static_cast<size_t>(stride), length);
      square_pairs(square[0], kSquare, pairs);
      std::copy_n(pairs, padded(length, 2) * kLanes, y);
    }
  }
}

void value_pairs(const int8_t* x, int count, int size, int stride, const int8_t* next, int16_t* columns) {
  static constexpr int8_t kNone[kLanes] = {};
  const size_t depth = padded(count, 2) * kLanes;
  for (int row = 0; row < count; row += 2, x += 2 * stride, columns += 2 * kLanes) {
    const bool both = row + 1 < count;
    prefetch(next, row, stride), prefetch(next, row + 1, stride);
    for (int column = 0; column < size; column += kLanes) {
      int16_t* const y = columns + column / kLanes * depth;
      const int length = size - column;
      if (length >= kLanes) {
        store_pairs(y, x + column, both ? x + stride + column : kNone);
        continue;
      }
      int8_t rows[2][kLanes] = {};
      std::memcpy(rows[0], x + column, length);
      if (both) std::memcpy(rows[1], x + stride + column, length);
      store_pairs(y, rows[0], rows[1]);
    }
  }
}

inline void prefetch(const float* x, int row, int size) {
  for (int i = 0; i < size; i += kLanes) __builtin_prefetch(x + row * static_cast<size_t>(size) + i);
}

// The scales of rows, and what their values are multiplied by; 0 for those that are missing of `kSquare`.
inline void round_rows(const float* x, int count, int size, int limit, float* scales, float* factors) {
  for (int i = 0; i < kSquare; i++) {
    const float r = i < count ? largest_magnitude(x + i * static_cast<size_t>(size), size) : 0;
    scales[i] = r / static_cast<float>(limit), factors[i] = rounding(r, limit);
  }
}

void float_key_pairs(const float* x, int count, int size, int limit, const float* next, int16_t* columns,
                     float* scales) {
  using Words = int16_t __attribute__((vector_size(2 * kSquare)));
  const size_t depth = padded(size, 2) * kLanes;
  for (int row = 0; row < count; row += kSquare, columns += depth) {
    const float* const rows = x + row * static_cast<size_t>(size);
    const int there = std::min(kSquare, count - row);
    float factors[kSquare];
    round_rows(rows, there, size, limit, scales + row, factors);
    for (int i = 0; i < there; i++) prefetch(next, row + i, size);
    each_lanes(size, [&](int column, int length) {
      Words square[kSquare] = {};
      for (int i = 0; i < there; i++)
        store_words(reinterpret_cast<int16_t*>(&square[i]),
                    mul(load_some(rows + i * static_cast<size_t>(size) + column, length), set(factors[i])));
      transpose(square);
      for (int i = 0; i < padded(length, 2); i += 2)
        store_pairs(columns + (column + i) * kLanes, reinterpret_cast<const int16_t*>(&square[i]),
                    reinterpret_cast<const int16_t*>(&square[i + 1]));
    });
  }
}

void float_value_pairs(const float* x, int count, int size, int limit, const float* next, int16_t* columns,
                       float* scales) {
  const size_t depth = padded(count, 2) * kLanes;
  float factors[kSquare];
  for (int row = 0; row < count; row += 2, columns += 2 * kLanes) {
    if (row % kSquare == 0)
      round_rows(x + row * static_cast<size_t>(size), count - row, size, limit, scales + row, factors);
    prefetch(next, row, size), prefetch(next, row + 1, size);
    each_lanes(size, [&](int column, int length) {
      int16_t words[2][kLanes] = {};
      for (int i = 0; i < std::min(2, count - row); i++)
        store_words(words[i], mul(load_some(x + (row + i) * static_cast<size_t>(size) + column, length),
                                  set(factors[row % kSquare + i])));
      store_pairs(columns + column / kLanes * depth, words[0], words[1]);
    });
  }
}

// --- products of pairs ----------------------------------------------------------------------------------------------

// finish.take<R, V>(tile, row, column) takes the sums of R rows and V groups of columns, from these on.
template <int R, int V, typename Finish>
inline void pairs_tile(const int16_t* a, size_t stride_a, const int16_t* columns, int stride, int depth, int row,
                       int column, const Finish& finish) {
  constexpr int kParts = kIntsPerLanes;
  // Loops over sums are unrolled early: GCC 12 would keep them on the stack before and behind the loop over depth.
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

// V groups of columns at once, of what is left half as many.
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

// --- weights --------------------------------------------------------------------------------------------------------

// The positions [begin, end) of a chunk, which a row sees, and all of a chunk, a multiple of 2 * kLanes.
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

// step(i, seen) for the lanes of which some are seen: All, or those of `seen_lanes`.
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

// Zeros around what `each_seen` reaches of `count` weights.
inline void clear_unseen(All, int, int16_t*) {}
inline void clear_unseen(Some seen, int count, int16_t* w) {
  for (int i = 0; i + kLanes <= seen.begin; i += kLanes) store_words(w + i, zero());
  for (int i = padded(seen.end, kLanes); i < padded(count, 2 * kLanes); i += kLanes) store_words(w + i, zero());
}

// Rows that are weighed together: while one waits for its largest score or a sum, others are computed.
constexpr int kTogether = 32;

// What all lanes of each row give.
struct ByRows {
  alignas(64) float lanes[kTogether][kLanes];

  // From the lanes on, those of row / 4 are what row gives, for four rows.
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

// That of a row, and -infinity where it sees nothing.
inline float largest_score(const AttentionScores& scores, int row, const ByRows& high) {
  return scores.end[row] == 0 ? -std::numeric_limits<float>::infinity() : high[row] * scores.factors[row];
}

// weigh(scores, rows, seen_by, part) for so many rows of them, of which row sees seen_by(row).
template <typename Weigh>
inline void together(AttentionScores scores, int all_rows, int count, AttentionPart part, Weigh weigh) {
  for (; all_rows > 0; all_rows -= kTogether) {
    const int rows = std::min(all_rows, kTogether);
    // Between two rows that see all of it, all do.
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

// What weights are multiplied by, so that they are integers times these scales.
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

// Rows that are merged together: a whole number of lanes, and of the rows of `pairs`.
constexpr int kMerged = 48;
static_assert(kMerged % kLanes == 0 && kMerged % kPairRows == 0);

// What the values of earlier chunks and those of a chunk are multiplied by. Sums and largest scores are merged already.
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
