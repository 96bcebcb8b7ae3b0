// Helpers of `Arithmetic`, with the lanes and bytes of the header that is included before this one.
#pragma once

#include <algorithm>
#include <cstring>

#include "arithmetic.h"

namespace edgelm {
namespace {

constexpr int kBytes = sizeof(Bytes);
constexpr int kLine = 64;
constexpr int kSumsPerInts = sizeof(Ints) / sizeof(int32_t);
constexpr int kIntsPerLanes = kLanes / kSumsPerInts;

template <typename T>
inline uint32_t four(const T* bytes) {
  uint32_t word;
  std::memcpy(&word, bytes, sizeof word);
  return word;
}

// The last, incomplete lanes of an array, padded with 0.
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

// Calls step(i, count) for lanes [i, i + count) of a row. count is a compile-time constant, kLanes, except for
// incomplete last lanes.
template <typename Step>
inline void each_lanes(int size, Step step) {
  const int whole = size / kLanes * kLanes;
  for (int i = 0; i < whole; i += kLanes) step(i, kLanes);
  if (whole < size) step(whole, size - whole);
}

// Lanes 8 apart are added first, then 4, 2 and 1 apart.
inline float sum(Lanes x) {
  float lanes[kLanes];
  store(lanes, x);
  for (int half = kLanes / 2; half > 0; half /= 2)
    for (int i = 0; i < half; i++) lanes[i] += lanes[i + half];
  return lanes[0];
}

// NaN if one of the values is NaN.
inline float largest_magnitude(const float* x, int size) {
  // Several maxima at once: a single one would wait for its own previous result.
  constexpr int kAtOnce = 4;
  Lanes most[kAtOnce] = {zero(), zero(), zero(), zero()};
  const int whole = size / (kAtOnce * kLanes) * (kAtOnce * kLanes);
  for (int i = 0; i < whole; i += kAtOnce * kLanes)
    for (int j = 0; j < kAtOnce; j++) most[j] = larger(most[j], abs(load(x + i + j * kLanes)));
  each_lanes(size - whole, [&](int i, int count) { most[0] = larger(most[0], abs(load_some(x + whole + i, count))); });
  return largest(larger(larger(most[0], most[1]), larger(most[2], most[3])));
}

// The factor that scales a row to integers of magnitudes up to `limit`.
inline float rounding(float largest, int limit) { return largest == 0 ? 0 : static_cast<float>(limit) / largest; }

// one * 2^x for x <= 0, where `one` is a power of two. As in Cephes' exp2f (S. Moshier): x = n + r, and a polynomial in
// r is multiplied by 2^n.
inline Lanes power_of_two(Lanes x, float one) {
  const Lanes bounded = max(x, set(-100));
  const Lanes n = round(bounded), r = sub(bounded, n);
  Lanes y = set(1.535336188319500e-4f * one);
  for (float coefficient : {1.339887440266574e-3f, 9.618437357674640e-3f, 5.550332471162809e-2f, 2.402264791363012e-1f,
                            6.931472028550421e-1f, 1.0f})
    y = fma(y, r, set(coefficient * one));
  return times_power(y, n);
}

// The same for one = 1, with a polynomial accurate to 18 bits.
inline Lanes nearly_power_of_two(Lanes x) {
  const Lanes bounded = max(x, set(-100));
  const Lanes n = round(bounded), r = sub(bounded, n);
  Lanes y = set(9.582852944731712e-3f);
  for (float coefficient : {5.5906426161527634e-2f, 2.4024099111557007e-1f, 6.931241750717163e-1f, 1.0f})
    y = fma(y, r, set(coefficient));
  return times_power(y, n);
}

// Cephes' expf, in the same way. Results below 2^-126 are 0.
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

// The cumulative normal distribution at x. At -|x| it is exp(-x^2 / 2) times a polynomial in 1 / (1 + 0.24 |x|). The
// relative error of the polynomial is 3e-9 (fitted in double precision, for |x| up to 13.3; beyond that, the result is
// subnormal).
inline Lanes normal_distribution(Lanes x) {
  const Lanes size = abs(x), t = div(set(1), fma(size, set(0.24f), set(1)));
  Lanes y = set(2.538313727e-02f);
  for (float coefficient : {-1.238177233e-01f, 2.034345455e-01f, -1.413586368e-01f, 1.388488363e-01f, 2.966611149e-02f,
                            8.719302203e-02f, 8.906811479e-02f, 9.583950780e-02f, 9.574308634e-02f})
    y = fma(y, t, set(coefficient));
  const Lanes below = mul(mul(y, t), exp_of(mul(mul(size, size), set(-0.5f))));
  // For x < 0 the result is `below` itself: 1 minus the value at |x| would have lost its digits.
  return add(where_at_least(x, zero(), sub(set(1), add(below, below))), below);
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

}  // namespace
}  // namespace edgelm
