// `Arithmetic` over the lanes and bytes of the header that was included before this one.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "arithmetic.h"

namespace edgelm {
namespace {

constexpr int kBytes = sizeof(Bytes);
constexpr int kLine = 64;
constexpr int kSumsPerInts = sizeof(Ints) / sizeof(int32_t);
constexpr int kIntsPerLanes = kLanes / kSumsPerInts;
// Rows of a matrix that are read side by side: so many streams a processor prefetches, and the sums that stand in the
// first cache meanwhile are loaded and stored once for 16 products.
constexpr int kDepthStep = 16;
// Of a transposed matrix's tiles, how many further on is asked for.
constexpr int kTilesAhead = 4;

template <typename T>
inline uint32_t four(const T* bytes) {
  uint32_t word;
  std::memcpy(&word, bytes, sizeof word);
  return word;
}

// --- floating point ---------------------------------------------------------------------------------------------

// The last, incomplete lanes of an array, filled up with 0.
inline Lanes load_tail(const float* x, int count) {
  float lanes[kLanes] = {};
  std::copy_n(x, count, lanes);
  return load(lanes);
}

inline Lanes load_some(const float* x, int count) { return count < kLanes ? load_tail(x, count) : load(x); }

inline void store_some(float* y, Lanes x, int count) {
  if (count >= kLanes) return store(y, x);
  float lanes[kLanes];
  store(lanes, x);
  std::copy_n(lanes, count, y);
}

// step(i, count) for lanes [i, i + count) of a row: all but the last ones are whole, which is known when compiling.
template <typename Step>
inline void each_lanes(int size, Step step) {
  const int whole = size / kLanes * kLanes;
  for (int i = 0; i < whole; i += kLanes) step(i, kLanes);
  if (whole < size) step(whole, size - whole);
}

// 8 lanes apart are added first, then 4, 2, 1.
inline float sum(Lanes x) {
  float lanes[kLanes];
  store(lanes, x);
  for (int half = kLanes / 2; half > 0; half /= 2)
    for (int i = 0; i < half; i++) lanes[i] += lanes[i + half];
  return lanes[0];
}

inline float largest_magnitude(const float* x, int size) {
  // Several at once: one alone would wait for itself.
  constexpr int kAtOnce = 4;
  Lanes most[kAtOnce] = {zero(), zero(), zero(), zero()};
  const int whole = size / (kAtOnce * kLanes) * (kAtOnce * kLanes);
  for (int i = 0; i < whole; i += kAtOnce * kLanes)
    for (int j = 0; j < kAtOnce; j++) most[j] = max(most[j], abs(load(x + i + j * kLanes)));
  each_lanes(size - whole, [&](int i, int count) { most[0] = max(most[0], abs(load_some(x + whole + i, count))); });
  return largest(max(max(most[0], most[1]), max(most[2], most[3])));
}

// What a row is multiplied by to be integers of magnitudes up to `limit`.
inline float rounding(float largest, int limit) { return largest == 0 ? 0 : static_cast<float>(limit) / largest; }

float quantize(const float* x, int size, uint8_t* q) {
  const float r = largest_magnitude(x, size);
  // The order of QuantizeLinear: two divisions, then rounding to even. A product differs from them by five roundings of
  // at most 127, 4e-5 together, so that it is rounded to the same unless it is as near to halfway between two, or a row
  // has no values to divide by.
  const Lanes divisor = set(r), step = set(1.0f / 127), factor = set(127 / r), almost_half = set(0.4999f);
  each_lanes(size, [&](int i, int count) {
    const Lanes values = load_some(x + i, count), scaled = mul(values, factor);
    Lanes whole = round(scaled);
    if (!all_below(abs(sub(scaled, whole)), almost_half)) whole = round(div(div(values, divisor), step));
    store_bytes(q + i, whole, kOffset);
  });
  std::fill(q + size, q + padded(size, kBlock), uint8_t{0});
  return r;
}

// What kLanes columns' sums are turned into values with. It is loaded before anything is written, which a compiler
// cannot know to be elsewhere.
struct Scaling {
  Ints corrections[kIntsPerLanes];
  Lanes scales;

  Scaling(const Result& result, int column) : scales(load(result.scales + column)) {
    for (int i = 0; i < kIntsPerLanes; i++) corrections[i] = load_ints(result.corrections + column + i * kSumsPerInts);
  }
  Lanes apply(const Ints* sums, float factor) const {
    return mul(mul(difference(sums, corrections), scales), set(factor));
  }
};

void scale(const int32_t* sums, size_t stride_sums, int rows, int columns, const Result& result) {
  each_lanes(columns, [&](int column, int count) {
    const Scaling scaling(result, column);
    for (int row = 0; row < rows; row++) {
      Ints parts[kIntsPerLanes];
      for (int i = 0; i < kIntsPerLanes; i++)
        parts[i] = load_ints(sums + row * stride_sums + column + i * kSumsPerInts);
      store_some(result.y + row * result.stride + column, scaling.apply(parts, result.factors[row]), count);
    }
  });
}

// one * 2^x for x <= 0 and a power of two, as Cephes' exp2f (S. Moshier): x = n + r, a polynomial in r, times 2^n.
inline Lanes power_of_two(Lanes x, float one) {
  const Lanes bounded = max(x, set(-100));
  const Lanes n = round(bounded), r = sub(bounded, n);
  Lanes y = set(1.535336188319500e-4f * one);
  for (float coefficient : {1.339887440266574e-3f, 9.618437357674640e-3f, 5.550332471162809e-2f, 2.402264791363012e-1f,
                            6.931472028550421e-1f, 1.0f})
    y = fma(y, r, set(coefficient * one));
  return times_power(y, n);
}

// The same with a polynomial of 18 bits.
inline Lanes nearly_power_of_two(Lanes x) {
  const Lanes bounded = max(x, set(-100));
  const Lanes n = round(bounded), r = sub(bounded, n);
  Lanes y = set(9.582852944731712e-3f);
  for (float coefficient : {5.5906426161527634e-2f, 2.4024099111557007e-1f, 6.931241750717163e-1f, 1.0f})
    y = fma(y, r, set(coefficient));
  return times_power(y, n);
}

// Cephes' expf, in the same manner: 0 below 2^-126.
inline Lanes exp_of(Lanes x) {
  const Lanes lowest = set(-87.33654f);
  const Lanes bounded = max(x, lowest);
  const Lanes n = round(mul(bounded, set(1.44269504f)));
  const Lanes r = fma(n, set(2.12194440e-4f), fma(n, set(-0.693359375f), bounded));
  Lanes y = set(1.9875691500e-4f);
  for (float coefficient : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f})
    y = fma(y, r, set(coefficient));
  y = add(fma(y, mul(r, r), r), set(1));
  return where_at_least(x, lowest, times_power(y, n));
}

void norm(const float* x, const float* skip, const float* weight, float epsilon, int size, int next, float* total,
          float* y) {
  Lanes squares = zero();
  each_lanes(size, [&](int i, int count) {
    for (const float* ahead : {x + i + next, skip + i + next}) __builtin_prefetch(ahead);
    __builtin_prefetch(total + i + next, 1);
    const Lanes both = add(load_some(x + i, count), load_some(skip + i, count));
    store_some(total + i, both, count);
    squares = fma(both, both, squares);
  });
  const Lanes inverse = set(1 / std::sqrt(sum(squares) / static_cast<float>(size) + epsilon));
  each_lanes(size, [&](int i, int count) {
    store(y + i, mul(mul(load_some(total + i, count), inverse), load_some(weight + i, count)));
  });
}

void gate(const float* gate, const float* up, int size, int next, float* y) {
  each_lanes(size, [&](int i, int count) {
    for (const float* ahead : {gate + i + next, up + i + next}) __builtin_prefetch(ahead);
    // e is at most 1: it neither overflows nor takes digits from the sum.
    const Lanes x = load_some(gate + i, count), e = exp_of(mul(abs(x), set(-1)));
    const Lanes opening = div(max(e, where_at_least(x, zero(), set(1))), add(e, set(1)));
    store(y + i, mul(mul(x, opening), load_some(up + i, count)));
  });
}

void merge(const AttentionState& state, const AttentionPart& part, int rows, int width) {
  for (int begin = 0; begin < rows; begin += kLanes) {
    const Lanes before = load(state.largest + begin), added = load(part.largest + begin), high = max(before, added);
    float largest[kLanes], p[kLanes], q[kLanes];
    store(largest, high);
    store(p, power_of_two(sub(before, high), 1)), store(q, power_of_two(sub(added, high), 1));
    for (int row = begin; row < std::min(begin + kLanes, rows); row++) {
      if (part.sums[row] == 0) continue;
      const Lanes own = set(p[row - begin]), other = set(q[row - begin] * part.scales[row]);
      float* const values = state.values + row * static_cast<size_t>(width);
      const int32_t* const more = part.values + row * static_cast<size_t>(width);
      for (int i = 0; i < width; i += kLanes) store(values + i, fma(load(more + i), other, mul(load(values + i), own)));
      state.sums[row] = std::fma(part.sums[row], q[row - begin], state.sums[row] * p[row - begin]);
      state.largest[row] = largest[row - begin];
    }
  }
}

void divide(const float* a, float divisor, const float* factors, int size, float* y) {
  for (int i = 0; i < size; i++) y[i] = a[i] / divisor * factors[i];
}

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

// The largest of score(row, i, seen) of each row.
template <typename Seen, typename Score>
inline ByRows largest_scores(int rows, Seen seen_by, Score score) {
  ByRows high;
  for (int row = 0; row < rows; row++) {
    Lanes most = set(-std::numeric_limits<float>::max());
    each_seen(seen_by(row), [&](int i, auto seen) { most = max(most, score(row, i, seen)); });
    store(high.lanes[row], most);
  }
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
    scores.begin += kTogether, scores.end += kTogether, scores.factors += kTogether;
    part.scales += kTogether, part.sums += kTogether, part.largest += kTogether;
  }
}

void weights(const AttentionScores& all, int all_rows, int count, const AttentionPart& parts) {
  together(all, all_rows, count, parts, [count](auto scores, int rows, auto seen_by, auto part) {
    const ByRows high = largest_scores(rows, seen_by, [&](int row, int i, auto seen) {
      return or_lowest(load(scores.values + row * scores.stride + i), seen);
    });
    for (int row = 0; row < rows; row++) {
      const int32_t* const s = scores.values + row * scores.stride;
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

void scaled_weights(const AttentionScores& all, int all_rows, int count, const float* key_scales,
                    const float* value_scales, float limit, const AttentionPart& parts) {
  together(all, all_rows, count, parts, [=](auto scores, int rows, auto seen_by, auto part) {
    const auto values = [&](int row) { return reinterpret_cast<float*>(scores.values + row * scores.stride); };
    const ByRows most = largest_scores(rows, seen_by, [&](int row, int i, auto seen) {
      float* const v = values(row) + i;
      const Lanes score = or_lowest(mul(load(reinterpret_cast<int32_t*>(v)), load(key_scales + i)), seen);
      store(v, score);
      return score;
    });
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

// --- keys and values ---------------------------------------------------------------------------------------

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

constexpr int kSquare = 16;
using Square = int8_t __attribute__((vector_size(kSquare)));

// Four rounds of interleaving rows i and i + 8 transpose 16 rows of 16 values.
template <typename Row>
inline void transpose(Row rows[kSquare]) {
  for (int round = 0; round < 4; round++) {
    Row next[kSquare];
    for (int i = 0; i < kSquare / 2; i++) {
      const Row a = rows[i], b = rows[i + kSquare / 2];
      next[2 * i] = __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
      next[2 * i + 1] = __builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
    }
    std::copy_n(next, kSquare, rows);
  }
}

// Asks for a row of what is read next, a line at a time. Asked for all at once, or found out by the processor, it comes
// later: a step over 1,900 positions took 1.5 times as long.
inline void prefetch(const int8_t* x, int row, int size) { __builtin_prefetch(x + row * static_cast<size_t>(size)); }

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

void key_pairs(const int8_t* x, int count, int size, const int8_t* next, int16_t* columns) {
  const size_t depth = padded(size, 2) * kLanes;
  for (int row = 0; row < count; row += kSquare, columns += depth) {
    for (int i = 0; i < kSquare; i++) prefetch(next, row + i, size);
    for (int column = 0; column < size; column += kSquare) {
      const int8_t* const corner = x + row * static_cast<size_t>(size) + column;
      int16_t* const y = columns + column * kLanes;
      if (row + kSquare <= count && column + kSquare <= size) {
        square_pairs(corner, size, y);
        continue;
      }
      int8_t square[kSquare][kSquare] = {};
      int16_t pairs[kSquare * kLanes];
      const int rows = std::min(kSquare, count - row), length = std::min(kSquare, size - column);
      for (int i = 0; i < rows; i++) std::memcpy(square[i], corner + i * static_cast<size_t>(size), length);
      square_pairs(square[0], kSquare, pairs);
      std::copy_n(pairs, padded(length, 2) * kLanes, y);
    }
  }
}

void value_pairs(const int8_t* x, int count, int size, const int8_t* next, int16_t* columns) {
  static constexpr int8_t kNone[kLanes] = {};
  const size_t depth = padded(count, 2) * kLanes;
  for (int row = 0; row < count; row += 2, x += 2 * size, columns += 2 * kLanes) {
    const bool both = row + 1 < count;
    prefetch(next, row, size), prefetch(next, row + 1, size);
    for (int column = 0; column < size; column += kLanes) {
      int16_t* const y = columns + column / kLanes * depth;
      const int length = size - column;
      if (length >= kLanes) {
        store_pairs(y, x + column, both ? x + size + column : kNone);
        continue;
      }
      int8_t rows[2][kLanes] = {};
      std::memcpy(rows[0], x + column, length);
      if (both) std::memcpy(rows[1], x + size + column, length);
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

template <int R, int V>
inline void pairs_tile(const int16_t* a, size_t stride_a, const int16_t* columns, int stride, int depth, int32_t* sums,
                       size_t stride_sums) {
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
#pragma GCC unroll 16
  for (int r = 0; r < R; r++)
#pragma GCC unroll 16
    for (int i = 0; i < V * kParts; i++)
      store_ints(sums + r * stride_sums + i * kSumsPerInts, tile[r * V * kParts + i]);
}

// V groups of columns at once, of what is left half as many.
template <int R, int V>
inline void pairs_rows(const int16_t* a, size_t stride_a, const int16_t* columns, int stride, int depth, int count,
                       int32_t* sums, size_t stride_sums) {
  constexpr int kStep = V * kLanes;
  for (; count >= kStep; count -= kStep, columns += kStep * 2 * stride, sums += kStep)
    pairs_tile<R, V>(a, stride_a, columns, stride, depth, sums, stride_sums);
  if constexpr (V > 1) pairs_rows<R, V / 2>(a, stride_a, columns, stride, depth, count, sums, stride_sums);
}

void pairs(const int16_t* a, int rows, size_t stride_a, const int16_t* columns, int stride, int depth, int count,
           int32_t* sums, size_t stride_sums) {
  const auto next = [&]<int R>() {
    pairs_rows<R, kPairVectors>(a, stride_a, columns, stride, depth, count, sums, stride_sums);
    rows -= R, a += R * stride_a, sums += R * stride_sums;
  };
  while (rows >= kPairRows) next.template operator()<kPairRows>();
  while (rows >= 3) next.template operator()<3>();
  while (rows > 0) next.template operator()<1>();
}

// --- integer products -------------------------------------------------------------------------------------------

// kBytes columns of four rows of a matrix.
inline void load_quads(const int8_t* w, size_t width, Bytes quads[4]) {
  interleave(load_bytes(w), load_bytes(w + width), load_bytes(w + 2 * width), load_bytes(w + 3 * width), quads);
}

// The same at the edges of a matrix (depth, width): rows and columns that it does not have are 0.
[[gnu::noinline]] void load_edge(const int8_t* w, int k, int depth, size_t width, size_t column, Bytes quads[4]) {
  int8_t rows[4][kBytes] = {};
  if (column < width)
    for (int i = 0; i < std::min(4, depth - k); i++)
      std::memcpy(rows[i], w + (k + i) * width + column, std::min<size_t>(width - column, kBytes));
  load_quads(rows[0], kBytes, quads);
}

inline void load_quads(const int8_t* w, int k, int depth, size_t width, size_t column, Bytes quads[4]) {
  if (k + 4 <= depth && column + kBytes <= width)
    load_quads(w + k * width + column, width, quads);
  else
    load_edge(w, k, depth, width, column, quads);
}

// The sums of M rows of x in kBytes columns.
template <int M>
struct Sums {
  Ints values[M][4];

  void clear() {
    for (auto& row : values)
      for (auto& part : row) part = zero_ints();
  }
  void load(const int32_t* place, size_t stride) {
    for (int m = 0; m < M; m++)
      for (int i = 0; i < 4; i++) values[m][i] = load_ints(place + m * stride + i * kSumsPerInts);
  }
  void store(int32_t* place, size_t stride) const {
    for (int m = 0; m < M; m++)
      for (int i = 0; i < 4; i++) store_ints(place + m * stride + i * kSumsPerInts, values[m][i]);
  }
  // Unrolled: an index that is computed would put the sums into memory.
  void store(const Result& result) const {
#pragma GCC unroll 4
    for (int i = 0; i < 4; i += kIntsPerLanes) {
      const Scaling scaling(result, i * kSumsPerInts);
      float* y = result.y + i * kSumsPerInts;
#pragma GCC unroll 8
      for (int m = 0; m < M; m++, y += result.stride) edgelm::store(y, scaling.apply(values[m] + i, result.factors[m]));
    }
  }
  void add(const Bytes quads[4], const uint8_t* x, size_t stride_x) {
    for (int m = 0; m < M; m++) {
      const Bytes factor = broadcast(four(x + m * stride_x));
      for (int i = 0; i < 4; i++) values[m][i] = dot(values[m][i], quads[i], factor);
    }
  }
  void add(const int32_t* place) {
    for (int i = 0; i < 4; i++) values[0][i] = add_ints(values[0][i], load_ints(place + i * kSumsPerInts));
  }
  // Put in order and scaled; of less than kBytes columns so many.
  void finish(int columns, const Result& result) {
    for (auto& row : values) in_order(row);
    if (columns >= kBytes) return store(result);
    int32_t sums[M * kBytes];
    store(sums, kBytes);
    scale(sums, kBytes, M, columns, result);
  }
};

// Adds the products with kDepthStep rows of w, the first of them row k of the matrix.
template <int M>
void add_strip(const uint8_t* x, size_t stride_x, const int8_t* w, int k, int depth, size_t width, bool first,
               const int8_t* next, int32_t* sums, size_t stride_sums) {
  for (size_t column = 0; column < width; column += kBytes) {
    if (next != nullptr)
      for (int i = 0; i < kDepthStep * kBytes; i += kLine) __builtin_prefetch(next + column * kDepthStep + i);
    Sums<M> tile;
    if (first)
      tile.clear();
    else
      tile.load(sums + column, stride_sums);
    Bytes quads[4];
    if (k + kDepthStep <= depth && column + kBytes <= width) {
      const int8_t* const corner = w + k * width + column;
#pragma GCC unroll 4
      for (int j = 0; j < kDepthStep; j += 4) {
        load_quads(corner + j * width, width, quads);
        tile.add(quads, x + k + j, stride_x);
      }
    } else {
      for (int j = k; j < std::min(k + kDepthStep, depth); j += 4) {
        load_edge(w, j, depth, width, column, quads);
        tile.add(quads, x + j, stride_x);
      }
    }
    tile.store(sums + column, stride_sums);
  }
}

// The same for any number of rows, M of them at once.
template <int M>
void add_strips(const uint8_t* x, int rows, size_t stride_x, const int8_t* w, int k, int depth, size_t width,
                bool first, const int8_t* next, int32_t* sums, size_t stride_sums) {
  for (; rows >= M; rows -= M, x += M * stride_x, sums += M * stride_sums, next = nullptr)
    add_strip<M>(x, stride_x, w, k, depth, width, first, next, sums, stride_sums);
  if constexpr (M > 1)
    if (rows > 0) add_strips<M - 1>(x, rows, stride_x, w, k, depth, width, first, next, sums, stride_sums);
}

void columns(const uint8_t* x, int rows, size_t stride_x, const int8_t* w, int depth, size_t width, bool first,
             const int8_t* next, int32_t* sums, size_t stride_sums) {
  // While a strip is in the cache, all rows take it.
  for (int k = 0; k < depth; k += kDepthStep)
    add_strips<4>(x, rows, stride_x, w, k, depth, width, first && k == 0,
                  k + kDepthStep < depth ? w + (k + kDepthStep) * width : next, sums, stride_sums);
}

void scale_parts(const int32_t* const* sums, int parts, size_t stride_sums, int rows, int columns,
                 const Result& result) {
  for (int row = 0; row < rows; row++)
    for (int column = 0; column < columns; column += kBytes) {
      const size_t place = row * stride_sums + column;
      Sums<1> tile;
      tile.load(sums[0] + place, 0);
      for (int part = 1; part < parts; part++) tile.add(sums[part] + place);
      tile.finish(columns - column, result.from(row, column));
    }
}

template <int M, int N>
inline void rows_tile(const uint8_t* x, size_t stride_x, const int8_t* w, int depth, int32_t* sums,
                      size_t stride_sums) {
  Ints tile[M][N];
  for (int m = 0; m < M; m++)
    for (int n = 0; n < N; n++) tile[m][n] = zero_ints();
  for (int k = 0; k < depth; k += kBytes) {
    for (int i = 0; i < N * kBytes; i += kLine)
      __builtin_prefetch(w + kTilesAhead * N * static_cast<size_t>(depth) + k * N + i);
    for (int n = 0; n < N; n++) {
      const Bytes weights = load_bytes(w + n * static_cast<size_t>(depth) + k);
      for (int m = 0; m < M; m++) tile[m][n] = dot(tile[m][n], weights, load_bytes(x + m * stride_x + k));
    }
  }
  for (int m = 0; m < M; m++)
    for (int n = 0; n < N; n++) sums[m * stride_sums + n] = total(tile[m][n]);
}

template <int M>
void rows_of(const uint8_t* x, size_t stride_x, const int8_t* w, int depth, int count, int32_t* sums,
             size_t stride_sums) {
  int n = 0;
  for (; n + 4 <= count; n += 4)
    rows_tile<M, 4>(x, stride_x, w + n * static_cast<size_t>(depth), depth, sums + n, stride_sums);
  for (; n < count; n++) rows_tile<M, 1>(x, stride_x, w + n * static_cast<size_t>(depth), depth, sums + n, stride_sums);
}

void rows(const uint8_t* x, int rows, size_t stride_x, const int8_t* w, int depth, int count, int32_t* sums,
          size_t stride_sums) {
  static constexpr decltype(&rows_of<1>) kByRows[kFewRows] = {rows_of<1>, rows_of<2>, rows_of<3>, rows_of<4>};
  kByRows[rows - 1](x, stride_x, w, depth, count, sums, stride_sums);
}

// A panel holds, for each four rows, kBlock / kBytes times four `Bytes`, as `interleave` gives them.
void pack_columns(const int8_t* w, int depth, size_t width, size_t column, int8_t* panel) {
  for (int k = 0; k < depth; k += 4)
    for (size_t part = column; part < column + kBlock; part += kBytes, panel += 4 * kBytes) {
      Bytes quads[4];
      load_quads(w, k, depth, width, part, quads);
      for (int i = 0; i < 4; i++) store_bytes(panel + i * kBytes, quads[i]);
    }
}

// The transposition of (count, depth) values at column k, as kSquare rows of kBlock columns; what is missing is 0.
inline void transpose_block(const int8_t* w, int depth, int k, int count, int8_t (&columns)[kSquare][kBlock]) {
  for (int row = 0; row < kBlock; row += kSquare) {
    Square square[kSquare] = {};
    for (int i = 0; i < std::min(kSquare, count - row); i++)
      std::memcpy(&square[i], w + (row + i) * static_cast<size_t>(depth) + k, std::min(kSquare, depth - k));
    transpose(square);
    for (int i = 0; i < kSquare; i++) std::memcpy(&columns[i][row], &square[i], kSquare);
  }
}

void pack_rows(const int8_t* w, int depth, int count, int8_t* panel) {
  for (int k = 0; k < depth; k += kSquare) {
    int8_t columns[kSquare][kBlock];
    transpose_block(w, depth, k, count, columns);
    for (int j = 0; j < std::min(kSquare, padded(depth - k, 4)); j += 4)
      for (int part = 0; part < kBlock; part += kBytes, panel += 4 * kBytes) {
        Bytes quads[4];
        load_quads(&columns[j][part], kBlock, quads);
        for (int i = 0; i < 4; i++) store_bytes(panel + i * kBytes, quads[i]);
      }
  }
}

template <int M>
inline void panel_tile(const uint8_t* x, size_t stride_x, const int8_t* panel, int depth, int columns,
                       const Result& result) {
  for (int part = 0; part < columns; part += kBytes) {
    // What is written is on its way meanwhile: y is larger than the caches, and few stores wait side by side.
    for (int m = 0; m < M; m++)
      for (int i = 0; i < kBytes; i += kLanes) __builtin_prefetch(result.y + m * result.stride + part + i, 1);
    Sums<M> tile;
    tile.clear();
    const int8_t* w = panel + part * 4;
    for (int k = 0; k < depth; k += 4, w += 4 * kBlock) {
      const Bytes quads[4] = {load_bytes(w), load_bytes(w + kBytes), load_bytes(w + 2 * kBytes),
                              load_bytes(w + 3 * kBytes)};
      tile.add(quads, x + k, stride_x);
    }
    tile.finish(columns - part, result.from(0, part));
  }
}

template <int M>
void panel_rows(const uint8_t* x, int rows, size_t stride_x, const int8_t* panel, int depth, int columns,
                const Result& result) {
  int row = 0;
  for (; row + M <= rows; row += M)
    panel_tile<M>(x + row * stride_x, stride_x, panel, depth, columns, result.from(row, 0));
  if constexpr (M > 1)
    if (row < rows)
      panel_rows<M - 1>(x + row * stride_x, rows - row, stride_x, panel, depth, columns, result.from(row, 0));
}

void panel(const uint8_t* x, int rows, size_t stride_x, const int8_t* panel, int depth, int columns,
           const Result& result) {
  panel_rows<kPanelRows>(x, rows, stride_x, panel, depth, columns, result);
}

constexpr Arithmetic implementation(const char* name) {
  return {name,     kOffset,   kPanelRows,     quantize,        norm,
          gate,     columns,   rows,           pack_columns,    pack_rows,
          panel,    scale,     scale_parts,    rotate,          to_int8,
          to_int16, key_pairs, value_pairs,    float_key_pairs, float_value_pairs,
          pairs,    weights,   scaled_weights, merge,           divide};
}

}  // namespace
}  // namespace edgelm
