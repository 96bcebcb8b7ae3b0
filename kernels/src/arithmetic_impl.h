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
constexpr int kSumsPerInts = sizeof(Ints) / sizeof(int32_t);
// Rows of a matrix that are read side by side: so many streams a processor prefetches, and the sums that stand in the
// first cache meanwhile are loaded and stored once for 16 products.
constexpr int kDepthStep = 16;

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
  Lanes most = zero();
  each_lanes(size, [&](int i, int count) { most = max(most, abs(load_some(x + i, count))); });
  return largest(most);
}

// What a row is multiplied by to be integers of magnitudes up to `limit`.
inline float rounding(float largest, int limit) { return largest == 0 ? 0 : static_cast<float>(limit) / largest; }

float quantize(const float* x, int size, uint8_t* q) {
  const int whole = size / kLanes * kLanes;
  const float r = largest_magnitude(x, size);
  // The order of QuantizeLinear: two divisions, then rounding to even.
  const Lanes divisor = set(r), step = set(1.0f / 127);
  for (int i = 0; i < whole; i += kLanes) store_bytes(q + i, round(div(div(load(x + i), divisor), step)), kOffset);
  const int length = padded(size, kBlock);
  if (whole < size) store_bytes(q + whole, round(div(div(load_tail(x + whole, size - whole), divisor), step)), kOffset);
  std::fill(q + size, q + length, uint8_t{0});
  return r;
}

void scale(const int32_t* sums, size_t stride_sums, const int32_t* corrections, const float* scales,
           const float* factors, int rows, int columns, float* y, size_t stride_y) {
  for (int row = 0; row < rows; row++, sums += stride_sums, y += stride_y) {
    const Lanes factor = set(factors[row]);
    int i = 0;
    for (; i + kLanes <= columns; i += kLanes)
      store(y + i, mul(mul(difference(sums + i, corrections + i), load(scales + i)), factor));
    for (; i < columns; i++) y[i] = static_cast<float>(sums[i] - corrections[i]) * scales[i] * factors[row];
  }
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

void norm(const float* x, const float* skip, const float* weight, float epsilon, int size, float* total, float* y) {
  Lanes squares = zero();
  each_lanes(size, [&](int i, int count) {
    const Lanes both = add(load_some(x + i, count), load_some(skip + i, count));
    store_some(total + i, both, count);
    squares = fma(both, both, squares);
  });
  const Lanes inverse = set(1 / std::sqrt(sum(squares) / static_cast<float>(size) + epsilon));
  each_lanes(size, [&](int i, int count) {
    store(y + i, mul(mul(load_some(total + i, count), inverse), load_some(weight + i, count)));
  });
}

void gate(const float* gate, const float* up, int size, float* y) {
  each_lanes(size, [&](int i, int count) {
    // e is at most 1: it neither overflows nor takes digits from the sum.
    const Lanes x = load_some(gate + i, count), e = exp_of(mul(abs(x), set(-1)));
    const Lanes opening = div(max(e, where_at_least(x, zero(), set(1))), add(e, set(1)));
    store(y + i, mul(mul(x, opening), load_some(up + i, count)));
  });
}

void merge(const AttentionState& state, const AttentionPart& part, int rows, int width) {
  each_lanes(rows, [&](int begin, int count) {
    const Lanes before = load_some(state.largest + begin, count), added = load_some(part.largest + begin, count);
    const Lanes most = max(before, added);
    store_some(state.largest + begin, most, count);
    float p[kLanes], q[kLanes];
    store(p, power_of_two(sub(before, most), 1)), store(q, power_of_two(sub(added, most), 1));
    for (int i = 0; i < count; i++) {
      const int row = begin + i;
      if (part.sums[row] == 0) continue;
      const Lanes own = set(p[i]), other = set(q[i] * part.scales[row]);
      float* const values = state.values + row * static_cast<size_t>(width);
      const int32_t* const more = part.values + row * static_cast<size_t>(width);
      for (int j = 0; j < width; j += kLanes)
        store(values + j, fma(load(more + j), other, mul(load(values + j), own)));
      state.sums[row] = std::fma(part.sums[row], q[i], state.sums[row] * p[i]);
    }
  });
}

void divide(const float* a, float divisor, const float* factors, int size, float* y) {
  for (int i = 0; i < size; i++) y[i] = a[i] / divisor * factors[i];
}

int32_t weights(int32_t* s, int begin, int end, int count, float factor, int16_t* w, float* most) {
  const int length = padded(count, kLanes);
  std::fill(s, s + begin, std::numeric_limits<int32_t>::min());
  std::fill(s + end, s + length, std::numeric_limits<int32_t>::min());
  Lanes high = load(s);
  for (int i = kLanes; i < length; i += kLanes) high = max(high, load(s + i));
  // Rounding keeps the order: the largest score has the largest product.
  *most = largest(high) * factor;
  const Lanes scale = set(factor), shift = set(-*most);
  for (int i = 0; i < length; i += kLanes) store_words(w + i, power_of_two(add(mul(load(s + i), scale), shift), kOne));
  // Where the factor is 0, all scores are the same.
  std::fill(w, w + begin, int16_t{0});
  std::fill(w + end, w + padded(count, 2 * kLanes), int16_t{0});
  Ints sums = zero_ints();
  for (int i = 0; i < length; i += kBytes / 2) sums = dot_pairs(sums, load_bytes(w + i), broadcast_pair(0x00010001));
  return total(sums);
}

float scaled_weights(int32_t* s, int begin, int end, int count, float factor, const float* key_scales,
                     const float* value_scales, float limit, int16_t* w, float* most, float* w_scale) {
  const int length = padded(count, kLanes);
  float* const t = reinterpret_cast<float*>(s);
  for (int i = 0; i < length; i += kLanes) store(t + i, mul(mul(load(s + i), load(key_scales + i)), set(factor)));
  std::fill(t, t + begin, -std::numeric_limits<float>::infinity());
  std::fill(t + end, t + length, -std::numeric_limits<float>::infinity());
  Lanes high = load(t);
  for (int i = kLanes; i < length; i += kLanes) high = max(high, load(t + i));
  *most = largest(high);
  const Lanes shift = set(-*most), lowest = set(-100);
  Lanes sums = zero(), scaled_sums = zero();
  high = zero();
  for (int i = 0; i < length; i += kLanes) {
    const Lanes x = add(load(t + i), shift), p = where_at_least(x, lowest, power_of_two(x, 1));
    const Lanes scaled = mul(p, load(value_scales + i));
    store(t + i, scaled);
    sums = add(sums, p), scaled_sums = add(scaled_sums, scaled), high = max(high, scaled);
  }
  const float r = largest(high);
  const float parts = r == 0 ? 0 : std::min(std::numeric_limits<int16_t>::max() / r, limit / sum(scaled_sums));
  for (int i = 0; i < length; i += kLanes) store_words(w + i, mul(load(t + i), set(parts)));
  std::fill(w + length, w + padded(count, 2 * kLanes), int16_t{0});
  *w_scale = r == 0 ? 0 : 1 / parts;
  return sum(sums);
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
  constexpr int kParts = kLanes / kSumsPerInts;
  Ints tile[R][V * kParts];
  for (auto& row : tile)
    for (auto& part : row) part = zero_ints();
  for (int k = 0; k < 2 * depth; k += 2) {
    Bytes pairs[V * kParts];
    for (int v = 0; v < V; v++)
      for (int i = 0; i < kParts; i++)
        pairs[v * kParts + i] = load_bytes(columns + (v * 2 * stride + k) * kLanes + i * 2 * kSumsPerInts);
    for (int r = 0; r < R; r++) {
      const Bytes factors = broadcast_pair(four(a + r * stride_a + k));
      for (int i = 0; i < V * kParts; i++) tile[r][i] = dot_pairs(tile[r][i], pairs[i], factors);
    }
  }
  for (int r = 0; r < R; r++)
    for (int i = 0; i < V * kParts; i++) store_ints(sums + r * stride_sums + i * kSumsPerInts, tile[r][i]);
}

template <int R>
inline void pairs_rows(const int16_t* a, size_t stride_a, const int16_t* columns, int stride, int depth, int count,
                       int32_t* sums, size_t stride_sums) {
  constexpr int kStep = kPairVectors * kLanes;
  int column = 0;
  for (; column + kStep <= count; column += kStep)
    pairs_tile<R, kPairVectors>(a, stride_a, columns + column * 2 * stride, stride, depth, sums + column, stride_sums);
  for (; column < count; column += kLanes)
    pairs_tile<R, 1>(a, stride_a, columns + column * 2 * stride, stride, depth, sums + column, stride_sums);
}

void pairs(const int16_t* a, int rows, size_t stride_a, const int16_t* columns, int stride, int depth, int count,
           int32_t* sums, size_t stride_sums) {
  const auto next = [&]<int R>() {
    pairs_rows<R>(a, stride_a, columns, stride, depth, count, sums, stride_sums);
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
  void add(const Bytes quads[4], const uint8_t* x, size_t stride_x) {
    for (int m = 0; m < M; m++) {
      const Bytes factor = broadcast(four(x + m * stride_x));
      for (int i = 0; i < 4; i++) values[m][i] = dot(values[m][i], quads[i], factor);
    }
  }
  void order() {
    for (auto& row : values) in_order(row);
  }
};

// Adds the products with kDepthStep rows of w, the first of them row k of the matrix.
template <int M>
void add_strip(const uint8_t* x, size_t stride_x, const int8_t* w, int k, int depth, size_t width, int32_t* sums,
               size_t stride_sums) {
  for (size_t column = 0; column < width; column += kBytes) {
    Sums<M> tile;
    if (k == 0)
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
    if (k + kDepthStep >= depth) tile.order();
    tile.store(sums + column, stride_sums);
  }
}

// The same for any number of rows, M of them at once.
template <int M>
void add_strips(const uint8_t* x, int rows, size_t stride_x, const int8_t* w, int k, int depth, size_t width,
                int32_t* sums, size_t stride_sums) {
  for (; rows >= M; rows -= M, x += M * stride_x, sums += M * stride_sums)
    add_strip<M>(x, stride_x, w, k, depth, width, sums, stride_sums);
  if constexpr (M > 1)
    if (rows > 0) add_strips<M - 1>(x, rows, stride_x, w, k, depth, width, sums, stride_sums);
}

void columns(const uint8_t* x, int rows, size_t stride_x, const int8_t* w, int depth, size_t width, int32_t* sums,
             size_t stride_sums) {
  // While a strip is in the cache, all rows take it.
  for (int k = 0; k < depth; k += kDepthStep) add_strips<4>(x, rows, stride_x, w, k, depth, width, sums, stride_sums);
}

template <int M, int N>
inline void rows_tile(const uint8_t* x, size_t stride_x, const int8_t* w, int depth, int32_t* sums,
                      size_t stride_sums) {
  Ints tile[M][N];
  for (int m = 0; m < M; m++)
    for (int n = 0; n < N; n++) tile[m][n] = zero_ints();
  for (int k = 0; k < depth; k += kBytes)
    for (int n = 0; n < N; n++) {
      const Bytes weights = load_bytes(w + n * static_cast<size_t>(depth) + k);
      for (int m = 0; m < M; m++) tile[m][n] = dot(tile[m][n], weights, load_bytes(x + m * stride_x + k));
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
inline void panel_tile(const uint8_t* x, size_t stride_x, const int8_t* panel, int depth, int32_t* sums,
                       size_t stride_sums) {
  for (int part = 0; part < kBlock; part += kBytes) {
    Sums<M> tile;
    tile.clear();
    const int8_t* w = panel + part * 4;
    for (int k = 0; k < depth; k += 4, w += 4 * kBlock) {
      const Bytes quads[4] = {load_bytes(w), load_bytes(w + kBytes), load_bytes(w + 2 * kBytes),
                              load_bytes(w + 3 * kBytes)};
      tile.add(quads, x + k, stride_x);
    }
    tile.order();
    tile.store(sums + part, stride_sums);
  }
}

template <int M>
void panel_rows(const uint8_t* x, int rows, size_t stride_x, const int8_t* panel, int depth, int32_t* sums,
                size_t stride_sums) {
  for (; rows >= M; rows -= M, x += M * stride_x, sums += M * stride_sums)
    panel_tile<M>(x, stride_x, panel, depth, sums, stride_sums);
  if constexpr (M > 1)
    if (rows > 0) panel_rows<M - 1>(x, rows, stride_x, panel, depth, sums, stride_sums);
}

void panel(const uint8_t* x, int rows, size_t stride_x, const int8_t* panel, int depth, int32_t* sums,
           size_t stride_sums) {
  panel_rows<kPanelRows>(x, rows, stride_x, panel, depth, sums, stride_sums);
}

constexpr Arithmetic implementation(const char* name) {
  return {name,
          kOffset,
          kPanelRows,
          quantize,
          norm,
          gate,
          columns,
          rows,
          pack_columns,
          pack_rows,
          panel,
          scale,
          rotate,
          to_int8,
          to_int16,
          key_pairs,
          value_pairs,
          float_key_pairs,
          float_value_pairs,
          pairs,
          weights,
          scaled_weights,
          merge,
          divide};
}

}  // namespace
}  // namespace edgelm
