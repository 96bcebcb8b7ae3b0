// 16 floats, and 16 bytes with their sums of products, in Arm's Neon, and with its dot product if compiled for it.
#pragma once

#include <arm_neon.h>

#include <cstring>

#include "arithmetic.h"

namespace edgelm {
namespace {

struct Lanes {
  float32x4_t part[4];
};
template <typename Function>
inline Lanes each(Function function) {
  return {{function(0), function(1), function(2), function(3)}};
}
inline Lanes set(float x) {
  return each([&](int) { return vdupq_n_f32(x); });
}
inline Lanes zero() { return set(0); }
inline Lanes load(const float* x) {
  return each([&](int i) { return vld1q_f32(x + 4 * i); });
}
inline Lanes load(const int32_t* x) {
  return each([&](int i) { return vcvtq_f32_s32(vld1q_s32(x + 4 * i)); });
}
inline void store(float* y, Lanes x) {
  for (int i = 0; i < 4; i++) vst1q_f32(y + 4 * i, x.part[i]);
}
inline Lanes fma(Lanes a, Lanes b, Lanes c) {
  return each([&](int i) { return vfmaq_f32(c.part[i], a.part[i], b.part[i]); });
}
inline Lanes mul(Lanes a, Lanes b) {
  return each([&](int i) { return vmulq_f32(a.part[i], b.part[i]); });
}
inline Lanes add(Lanes a, Lanes b) {
  return each([&](int i) { return vaddq_f32(a.part[i], b.part[i]); });
}
inline Lanes sub(Lanes a, Lanes b) {
  return each([&](int i) { return vsubq_f32(a.part[i], b.part[i]); });
}
inline Lanes div(Lanes a, Lanes b) {
  return each([&](int i) { return vdivq_f32(a.part[i], b.part[i]); });
}
inline Lanes max(Lanes a, Lanes b) {
  return each([&](int i) { return vmaxq_f32(a.part[i], b.part[i]); });
}
inline Lanes min(Lanes a, Lanes b) {
  return each([&](int i) { return vminq_f32(a.part[i], b.part[i]); });
}
inline Lanes abs(Lanes a) {
  return each([&](int i) { return vabsq_f32(a.part[i]); });
}
// Neon's maximum of a number and NaN is NaN.
inline Lanes larger(Lanes a, Lanes b) { return max(a, b); }
inline float largest(Lanes x) {
  return vmaxvq_f32(vmaxq_f32(vmaxq_f32(x.part[0], x.part[1]), vmaxq_f32(x.part[2], x.part[3])));
}
template <typename Operation>
inline Lanes fold(const Lanes (&rows)[4], Operation operation) {
  const auto eight = [&](const float32x4_t* a, const float32x4_t* b) {
    return operation(Lanes{a[0], a[1], b[0], b[1]}, Lanes{a[2], a[3], b[2], b[3]});
  };
  const Lanes a = eight(rows[0].part, rows[1].part), b = eight(rows[2].part, rows[3].part);
  const Lanes four =
      operation(Lanes{a.part[0], a.part[2], b.part[0], b.part[2]}, Lanes{a.part[1], a.part[3], b.part[1], b.part[3]});
  const Lanes two = operation(four, each([&](int i) { return vextq_f32(four.part[i], four.part[i], 2); }));
  return operation(two, each([&](int i) { return vrev64q_f32(two.part[i]); }));
}
inline Lanes round(Lanes a) {
  return each([&](int i) { return vrndnq_f32(a.part[i]); });
}
inline Lanes times_power(Lanes y, Lanes n) {
  return each([&](int i) {
    const int32x4_t shift = vshlq_n_s32(vcvtnq_s32_f32(n.part[i]), 23);
    return vreinterpretq_f32_s32(vaddq_s32(vreinterpretq_s32_f32(y.part[i]), shift));
  });
}
inline Lanes where_at_least(Lanes x, Lanes bound, Lanes y) {
  return each([&](int i) {
    return vreinterpretq_f32_u32(vandq_u32(vcgeq_f32(x.part[i], bound.part[i]), vreinterpretq_u32_f32(y.part[i])));
  });
}
inline bool all_below(Lanes x, Lanes bound) {
  uint32x4_t below = vcltq_f32(x.part[0], bound.part[0]);
  for (int i = 1; i < 4; i++) below = vandq_u32(below, vcltq_f32(x.part[i], bound.part[i]));
  return vminvq_u32(below) != 0;
}
inline void store_words(int16_t* y, Lanes x) {
  for (int i = 0; i < 4; i++) vst1_s16(y + 4 * i, vqmovn_s32(vcvtnq_s32_f32(x.part[i])));
}
inline void store_bytes(uint8_t* y, Lanes whole, int offset) {
  const int32x4_t add = vdupq_n_s32(offset);
  int16x4_t words[4];
  for (int i = 0; i < 4; i++) words[i] = vmovn_s32(vaddq_s32(vcvtnq_s32_f32(whole.part[i]), add));
  const int8x8_t low = vmovn_s16(vcombine_s16(words[0], words[1]));
  const int8x8_t high = vmovn_s16(vcombine_s16(words[2], words[3]));
  vst1q_u8(y, vreinterpretq_u8_s8(vcombine_s8(low, high)));
}

using Bytes = int8x16_t;
using Ints = int32x4_t;
constexpr int kOffset = 0;
constexpr int kPanelRows = 4;
constexpr int kPairRows = 4, kPairVectors = 1;

inline Bytes load_bytes(const void* x) { return vld1q_s8(static_cast<const int8_t*>(x)); }
inline void store_bytes(void* y, Bytes x) { vst1q_s8(static_cast<int8_t*>(y), x); }
inline Ints zero_ints() { return vdupq_n_s32(0); }
inline Ints load_ints(const int32_t* x) { return vld1q_s32(x); }
inline void store_ints(int32_t* y, Ints x) { vst1q_s32(y, x); }
inline Lanes lanes_of(const Ints* x) {
  return each([&](int i) { return vcvtq_f32_s32(x[i]); });
}
inline Lanes difference(const Ints* a, const Ints* b) {
  return each([&](int i) { return vcvtq_f32_s32(vsubq_s32(a[i], b[i])); });
}

#if defined(__ARM_FEATURE_DOTPROD)
inline Bytes broadcast(uint32_t x) { return vreinterpretq_s8_u32(vdupq_n_u32(x)); }
inline Ints dot(Ints sums, Bytes w, Bytes x) { return vdotq_s32(sums, w, x); }
#else
// Without dot product, the quads of four columns hold their first two values, then their last two. So the products of
// all take three instructions: magnitudes are at most 127 and 128, and a sum of two products fits into 16 bits.
inline Bytes broadcast(uint32_t x) {
  const uint8x16_t order = {0, 1, 0, 1, 0, 1, 0, 1, 2, 3, 2, 3, 2, 3, 2, 3};
  return vreinterpretq_s8_u8(vqtbl1q_u8(vreinterpretq_u8_u32(vdupq_n_u32(x)), order));
}
inline Ints dot(Ints sums, Bytes w, Bytes x) {
  return vpadalq_s16(sums, vmlal_high_s8(vmull_s8(vget_low_s8(w), vget_low_s8(x)), w, x));
}
#endif

inline Bytes broadcast_pair(uint32_t x) { return vreinterpretq_s8_u32(vdupq_n_u32(x)); }
// a holds the first values of four columns, then their second values, so nothing is added across a register.
inline Ints dot_pairs(Ints sums, Bytes a, Bytes b) {
  const int16x8_t columns = vreinterpretq_s16_s8(a);
  const int16x4_t factors = vget_low_s16(vreinterpretq_s16_s8(b));
  return vmlal_high_lane_s16(vmlal_lane_s16(sums, vget_low_s16(columns), factors, 0), columns, factors, 1);
}

inline Ints add_ints(Ints a, Ints b) { return vaddq_s32(a, b); }
inline int32_t total(Ints x) { return vaddvq_s32(x); }
inline void store_totals(int32_t* y, const Ints (&x)[4]) {
  vst1q_s32(y, vpaddq_s32(vpaddq_s32(x[0], x[1]), vpaddq_s32(x[2], x[3])));
}

inline void interleave(Bytes row0, Bytes row1, Bytes row2, Bytes row3, Bytes quads[4]) {
  const Bytes a = vzip1q_s8(row0, row1), b = vzip2q_s8(row0, row1);
  const Bytes c = vzip1q_s8(row2, row3), d = vzip2q_s8(row2, row3);
#if defined(__ARM_FEATURE_DOTPROD)
  const auto zip = [](Bytes x, Bytes y, Bytes* both) {
    const int16x8_t left = vreinterpretq_s16_s8(x), right = vreinterpretq_s16_s8(y);
    both[0] = vreinterpretq_s8_s16(vzip1q_s16(left, right)), both[1] = vreinterpretq_s8_s16(vzip2q_s16(left, right));
  };
#else
  const auto zip = [](Bytes x, Bytes y, Bytes* both) {
    both[0] = vcombine_s8(vget_low_s8(x), vget_low_s8(y)), both[1] = vcombine_s8(vget_high_s8(x), vget_high_s8(y));
  };
#endif
  zip(a, c, quads), zip(b, d, quads + 2);
}

inline void in_order(Ints*) {}

inline Ints widened(const uint8_t* x) {
  uint32_t four;
  std::memcpy(&four, x, sizeof four);
  return vreinterpretq_s32_u32(vmovl_u16(vget_low_u16(vmovl_u8(vcreate_u8(four)))));
}
inline Bytes low_halves(Bytes x) { return vandq_s8(x, vdupq_n_s8(15)); }
inline Bytes high_halves(Bytes x) { return vreinterpretq_s8_u8(vshrq_n_u8(vreinterpretq_u8_s8(x), 4)); }
template <int Bits>
inline Ints lower_bits(Ints x) {
  return vandq_s32(x, vdupq_n_s32((1 << Bits) - 1));
}
template <int Bits>
inline Ints upper_bits(Ints x) {
  return vshrq_n_s32(x, Bits);
}
inline Bytes or_bytes(Bytes a, Bytes b) { return vorrq_s8(a, b); }
inline Bytes where_bits(Bytes x, int bit, int value) {
  const uint8x16_t there = vtstq_s8(x, vdupq_n_s8(static_cast<int8_t>(bit)));
  return vandq_s8(vreinterpretq_s8_u8(there), vdupq_n_s8(static_cast<int8_t>(value)));
}
inline Bytes in_each_byte(Ints x) { return vreinterpretq_s8_s32(vmulq_n_s32(x, 0x01010101)); }
inline Bytes sub_bytes(Bytes a, Bytes b) { return vsubq_s8(a, b); }
inline Bytes times_bytes(Bytes x, Ints factors) { return vmulq_s8(x, in_each_byte(factors)); }
#if defined(__ARM_FEATURE_DOTPROD)
using BlockSum = Ints;
inline BlockSum no_sum() { return zero_ints(); }
inline BlockSum add_products(BlockSum sum, Bytes w, Bytes x) { return dot(sum, w, x); }
inline Ints add_times(Ints total, BlockSum sum, Ints factors) { return vmlaq_s32(total, sum, factors); }
inline void store_quad(int8_t* y, const int8_t* x) { std::memcpy(y, x, kQuad); }
#else
// Sums stay in 16 bits, four for each column. A sum has at most 8 products of magnitudes 15 and 128, or 2 of 63 and
// 128, so that the sum of two also fits.
struct BlockSum {
  int16x8_t low, high;
};
inline BlockSum no_sum() { return {vdupq_n_s16(0), vdupq_n_s16(0)}; }
inline BlockSum add_products(BlockSum sum, Bytes w, Bytes x) {
  return {vmlal_s8(sum.low, vget_low_s8(w), vget_low_s8(x)), vmlal_high_s8(sum.high, w, x)};
}
inline Ints add_times(Ints total, BlockSum sum, Ints factors) {
  return vmlaq_s32(total, vpaddlq_s16(vpaddq_s16(sum.low, sum.high)), factors);
}
// Stores a quad in the order that `dot` reads.
inline void store_quad(int8_t* y, const int8_t* x) {
  const int16x8_t pairs = vreinterpretq_s16_s8(vld1q_s8(x));
  vst1q_s16(reinterpret_cast<int16_t*>(y), vuzp1q_s16(pairs, vdupq_n_s16(0)));
  vst1_s16(reinterpret_cast<int16_t*>(y) + 4, vget_low_s16(vuzp2q_s16(pairs, pairs)));
}
#endif

inline void store_pairs(int16_t* y, const int8_t* a, const int8_t* b) {
  const int8x16_t first = vld1q_s8(a), second = vld1q_s8(b);
  const int16x8_t low[2] = {vmovl_s8(vget_low_s8(first)), vmovl_s8(vget_low_s8(second))};
  const int16x8_t high[2] = {vmovl_high_s8(first), vmovl_high_s8(second)};
  vst1q_s16(y, vcombine_s16(vget_low_s16(low[0]), vget_low_s16(low[1])));
  vst1q_s16(y + 8, vcombine_s16(vget_high_s16(low[0]), vget_high_s16(low[1])));
  vst1q_s16(y + 16, vcombine_s16(vget_low_s16(high[0]), vget_low_s16(high[1])));
  vst1q_s16(y + 24, vcombine_s16(vget_high_s16(high[0]), vget_high_s16(high[1])));
}

inline void store_pairs(int16_t* y, const int16_t* a, const int16_t* b) {
  for (int i = 0; i < kLanes; i += 4) vst1q_s16(y + 2 * i, vcombine_s16(vld1_s16(a + i), vld1_s16(b + i)));
}

}  // namespace
}  // namespace edgelm
