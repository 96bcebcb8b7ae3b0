// Rows of activations: norms, gates, and their rounding to 8 or 16 bits.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "lanes.h"

namespace edgelm {
namespace {

void quantize_8(const float* x, int size, float r, uint8_t* q) {
  // QuantizeLinear computes two divisions, then rounds to even. A product differs from the divisions by five roundings
  // of values up to 127, together 4e-5. So it is rounded to the same integer, unless it is that close to halfway
  // between two integers, or the row has nothing to divide by.
  const Lanes divisor = set(r), step = set(kStep), factor = set(127 / r), almost_half = set(0.4999f);
  each_lanes(size, [&](int i, int count) {
    const Lanes values = load_some(x + i, count), scaled = mul(values, factor);
    Lanes whole = round(scaled);
    if (!all_below(abs(sub(scaled, whole)), almost_half)) whole = round(div(div(values, divisor), step));
    store_bytes(q + i, whole, kOffset);
  });
}

// x / divisor, rounded as by `div`, but faster: a product with the inverse, and a correction by the exact remainder (P.
// Markstein). For quotients of 1 or less, and divisors whose inverse is far from the limits of float. Quotients below
// 2^-30 may be off.
class Quotient {
 public:
  explicit Quotient(float divisor) : negative_(set(-divisor)), inverse_(set(1 / divisor)) {}

  Lanes operator()(Lanes x) const {
    const Lanes nearly = mul(x, inverse_);
    return fma(fma(nearly, negative_, x), inverse_, nearly);
  }

 private:
  Lanes negative_, inverse_;
};

void quantize_16(const float* x, int size, float r, uint8_t* high, uint8_t* low) {
  const Quotient in_steps(kStep), in_low_steps(kStep * kLowStep);
  const auto store_planes = [&](auto share) {
    each_lanes(size, [&](int i, int count) {
      const Lanes shares = share(load_some(x + i, count)), whole = round(in_steps(shares));
      const Lanes rest = sub(shares, mul(whole, set(kStep)));
      store_bytes(high + i, whole, kOffset);
      // The order of the operands matters: for a row of zeros the rest is NaN. Then x86 returns the second operand,
      // which is NaN, as on Arm.
      store_bytes(low + i, min(set(127), round(in_low_steps(rest))), kOffset);
    });
  };
  constexpr float kLeast = 0x1p-60f, kMost = 0x1p60f;
  if (kLeast < r && r < kMost)
    store_planes(Quotient(r));
  else
    store_planes([divisor = set(r)](Lanes values) { return div(values, divisor); });
}

float quantize(const float* x, int size, int planes, uint8_t* q) {
  const float r = largest_magnitude(x, size);
  const int stride = padded(size, kBlock);
  if (planes == 1)
    quantize_8(x, size, r, q);
  else
    quantize_16(x, size, r, q, q + stride);
  for (int plane = 0; plane < planes; plane++)
    std::fill(q + plane * stride + size, q + (plane + 1) * stride, uint8_t{0});
  // NaN is lost in integers, so the row's factor carries it.
  return std::isfinite(r) ? r : std::numeric_limits<float>::quiet_NaN();
}

inline float inverse_root(Lanes squares, int size, float epsilon) {
  return 1 / std::sqrt(sum(squares) / static_cast<float>(size) + epsilon);
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
  const Lanes inverse = set(inverse_root(squares, size, epsilon));
  each_lanes(size, [&](int i, int count) {
    store(y + i, mul(mul(load_some(total + i, count), inverse), load_some(weight + i, count)));
  });
}

void plain_norm(const float* x, const float* weight, float epsilon, int size, float* y) {
  Lanes squares = zero();
  each_lanes(size, [&](int i, int count) {
    const Lanes values = load_some(x + i, count);
    squares = fma(values, values, squares);
  });
  const Lanes inverse = set(inverse_root(squares, size, epsilon));
  each_lanes(size, [&](int i, int count) {
    store(y + i, mul(mul(load_some(x + i, count), inverse), load_some(weight + i, count)));
  });
}

// y = gate * opening(gate) * up.
template <typename Opening>
inline void open(const float* gate, const float* up, int size, int next, float* y, Opening opening) {
  each_lanes(size, [&](int i, int count) {
    for (const float* ahead : {gate + i + next, up + i + next}) __builtin_prefetch(ahead);
    const Lanes x = load_some(gate + i, count);
    store(y + i, mul(mul(x, opening(x)), load_some(up + i, count)));
  });
}

inline Lanes sigmoid(Lanes x) {
  // e is at most 1, so it does not overflow, and the sum loses no digits.
  const Lanes e = exp_of(mul(abs(x), set(-1)));
  return div(max(e, where_at_least(x, zero(), set(1))), add(e, set(1)));
}

void gate(const float* gate, const float* up, int size, int next, float* y) {
  open(gate, up, size, next, y, [](Lanes x) { return sigmoid(x); });
}

void tanh_gelu_gate(const float* gate, const float* up, int size, int next, float* y) {
  // (1 + tanh(u)) / 2 = sigmoid(2 u), where u = sqrt(2 / pi) * (x + 0.044715 * x^3).
  open(gate, up, size, next, y,
       [](Lanes x) { return sigmoid(mul(x, fma(mul(x, x), set(7.135481627e-2f), set(1.595769122f)))); });
}

void gelu_gate(const float* gate, const float* up, int size, int next, float* y) {
  open(gate, up, size, next, y, [](Lanes x) { return normal_distribution(x); });
}

}  // namespace
}  // namespace edgelm
