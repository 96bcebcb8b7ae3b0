// 16 floats, and 32 bytes with their sums of products, in AVX2 with FMA, and with AVX-VNNI if compiled for it.
#pragma once

#include <immintrin.h>

#include <cstring>

#include "arithmetic.h"

namespace edgelm {
namespace {

struct Lanes {
  __m256 low, high;
};
inline Lanes zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
inline Lanes set(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
inline Lanes load(const float* x) { return {_mm256_loadu_ps(x), _mm256_loadu_ps(x + 8)}; }
inline __m256 floats(const int32_t* x) {
  return _mm256_cvtepi32_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x)));
}
inline Lanes load(const int32_t* x) { return {floats(x), floats(x + 8)}; }
inline void store(float* y, Lanes x) { _mm256_storeu_ps(y, x.low), _mm256_storeu_ps(y + 8, x.high); }
inline Lanes fma(Lanes a, Lanes b, Lanes c) {
  return {_mm256_fmadd_ps(a.low, b.low, c.low), _mm256_fmadd_ps(a.high, b.high, c.high)};
}
inline Lanes mul(Lanes a, Lanes b) { return {_mm256_mul_ps(a.low, b.low), _mm256_mul_ps(a.high, b.high)}; }
inline Lanes add(Lanes a, Lanes b) { return {_mm256_add_ps(a.low, b.low), _mm256_add_ps(a.high, b.high)}; }
inline Lanes sub(Lanes a, Lanes b) { return {_mm256_sub_ps(a.low, b.low), _mm256_sub_ps(a.high, b.high)}; }
inline Lanes div(Lanes a, Lanes b) { return {_mm256_div_ps(a.low, b.low), _mm256_div_ps(a.high, b.high)}; }
inline Lanes max(Lanes a, Lanes b) { return {_mm256_max_ps(a.low, b.low), _mm256_max_ps(a.high, b.high)}; }
inline Lanes min(Lanes a, Lanes b) { return {_mm256_min_ps(a.low, b.low), _mm256_min_ps(a.high, b.high)}; }
inline Lanes abs(Lanes a) {
  const __m256 sign = _mm256_set1_ps(-0.0f);
  return {_mm256_andnot_ps(sign, a.low), _mm256_andnot_ps(sign, a.high)};
}
inline __m256 larger(__m256 a, __m256 b) {
  return _mm256_castsi256_ps(_mm256_max_epi32(_mm256_castps_si256(a), _mm256_castps_si256(b)));
}
inline Lanes larger(Lanes a, Lanes b) { return {larger(a.low, b.low), larger(a.high, b.high)}; }
inline float largest(Lanes x) {
  const __m256i eight = _mm256_castps_si256(larger(x.low, x.high));
  __m128i four = _mm_max_epi32(_mm256_castsi256_si128(eight), _mm256_extracti128_si256(eight, 1));
  four = _mm_max_epi32(four, _mm_shuffle_epi32(four, 0x4e));
  return _mm_cvtss_f32(_mm_castsi128_ps(_mm_max_epi32(four, _mm_shuffle_epi32(four, 0xb1))));
}
template <typename Operation>
inline Lanes fold(const Lanes (&rows)[4], Operation operation) {
  const auto halves = [](__m256 a, __m256 b, __m256 c, __m256 d, auto one) { return Lanes{one(a, b), one(c, d)}; };
  const auto lower = [](__m256 a, __m256 b) { return _mm256_permute2f128_ps(a, b, 0x20); };
  const auto upper = [](__m256 a, __m256 b) { return _mm256_permute2f128_ps(a, b, 0x31); };
  const Lanes a = operation(Lanes{rows[0].low, rows[1].low}, Lanes{rows[0].high, rows[1].high});
  const Lanes b = operation(Lanes{rows[2].low, rows[3].low}, Lanes{rows[2].high, rows[3].high});
  const Lanes four =
      operation(halves(a.low, a.high, b.low, b.high, lower), halves(a.low, a.high, b.low, b.high, upper));
  const auto twos = [](__m256 x) { return _mm256_shuffle_ps(x, x, 0x4e); };
  const auto ones = [](__m256 x) { return _mm256_shuffle_ps(x, x, 0xb1); };
  const Lanes two = operation(four, Lanes{twos(four.low), twos(four.high)});
  return operation(two, Lanes{ones(two.low), ones(two.high)});
}
inline Lanes round(Lanes a) {
  constexpr int kNearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  return {_mm256_round_ps(a.low, kNearest), _mm256_round_ps(a.high, kNearest)};
}
inline __m256 times_powers(__m256 y, __m256 n) {
  return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(y), _mm256_slli_epi32(_mm256_cvtps_epi32(n), 23)));
}
inline Lanes times_power(Lanes y, Lanes n) { return {times_powers(y.low, n.low), times_powers(y.high, n.high)}; }
inline Lanes where_at_least(Lanes x, Lanes bound, Lanes y) {
  return {_mm256_and_ps(_mm256_cmp_ps(x.low, bound.low, _CMP_GE_OQ), y.low),
          _mm256_and_ps(_mm256_cmp_ps(x.high, bound.high, _CMP_GE_OQ), y.high)};
}
inline bool all_below(Lanes x, Lanes bound) {
  const __m256 low = _mm256_cmp_ps(x.low, bound.low, _CMP_LT_OQ), high = _mm256_cmp_ps(x.high, bound.high, _CMP_LT_OQ);
  return _mm256_movemask_ps(_mm256_and_ps(low, high)) == 0xff;
}
inline void store_words(int16_t* y, Lanes x) {
  const __m256i words = _mm256_packs_epi32(_mm256_cvtps_epi32(x.low), _mm256_cvtps_epi32(x.high));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(y), _mm256_permute4x64_epi64(words, 0xd8));
}
inline void store_bytes(uint8_t* y, Lanes whole, int offset) {
  const __m256i add = _mm256_set1_epi32(offset), low = _mm256_set1_epi32(255);
  const __m256i a = _mm256_and_si256(_mm256_add_epi32(_mm256_cvtps_epi32(whole.low), add), low);
  const __m256i b = _mm256_and_si256(_mm256_add_epi32(_mm256_cvtps_epi32(whole.high), add), low);
  const __m256i words = _mm256_permute4x64_epi64(_mm256_packus_epi32(a, b), 0xd8);
  const __m128i bytes = _mm_packus_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(y), bytes);
}

using Bytes = __m256i;
using Ints = __m256i;
constexpr int kPanelRows = 2;
constexpr int kPairRows = 4, kPairVectors = 1;

inline Bytes load_bytes(const void* x) { return _mm256_loadu_si256(static_cast<const __m256i*>(x)); }
inline void store_bytes(void* y, Bytes x) { _mm256_storeu_si256(static_cast<__m256i*>(y), x); }
inline Bytes broadcast(uint32_t x) { return _mm256_set1_epi32(static_cast<int>(x)); }
inline Ints zero_ints() { return _mm256_setzero_si256(); }
inline Ints load_ints(const int32_t* x) { return load_bytes(x); }
inline void store_ints(int32_t* y, Ints x) { store_bytes(static_cast<void*>(y), x); }
inline Lanes lanes_of(const Ints* x) { return {_mm256_cvtepi32_ps(x[0]), _mm256_cvtepi32_ps(x[1])}; }
inline Lanes difference(const Ints* a, const Ints* b) {
  return {_mm256_cvtepi32_ps(_mm256_sub_epi32(a[0], b[0])), _mm256_cvtepi32_ps(_mm256_sub_epi32(a[1], b[1]))};
}

#if defined(__AVXVNNI__)
constexpr int kOffset = 128;
// _mm256_dpbusd_avx_epi32 as assembly: around the intrinsic, GCC moves all sums through memory.
inline Ints dot(Ints sums, Bytes w, Bytes x) {
  asm("%{vex%} vpdpbusd %2, %1, %0" : "+x"(sums) : "x"(x), "x"(w));
  return sums;
}
#else
constexpr int kOffset = 0;
// Pairs of products are summed in 16 bits. Weights are at most 127 in magnitude and values 128: 2 * 128 * 127 < 2^15,
// so nothing saturates. Weights take the signs of the values, not the other way round: a value of -128 cannot change
// its sign, because int8 has no 128.
inline Ints dot(Ints sums, Bytes w, Bytes x) {
  const __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(x), _mm256_sign_epi8(w, x));
  return _mm256_add_epi32(sums, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}
#endif

inline Bytes broadcast_pair(uint32_t x) { return broadcast(x); }
inline Ints dot_pairs(Ints sums, Bytes a, Bytes b) { return _mm256_add_epi32(sums, _mm256_madd_epi16(a, b)); }

inline Ints add_ints(Ints a, Ints b) { return _mm256_add_epi32(a, b); }
inline int32_t total(Ints x) {
  __m128i sum = _mm_add_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
  sum = _mm_add_epi32(sum, _mm_shuffle_epi32(sum, 0x4e));
  return _mm_cvtsi128_si32(_mm_add_epi32(sum, _mm_shuffle_epi32(sum, 0xb1)));
}
inline void store_totals(int32_t* y, const Ints (&x)[4]) {
  const __m256i parts = _mm256_hadd_epi32(_mm256_hadd_epi32(x[0], x[1]), _mm256_hadd_epi32(x[2], x[3]));
  const __m128i sums = _mm_add_epi32(_mm256_castsi256_si128(parts), _mm256_extracti128_si256(parts, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(y), sums);
}

inline void interleave(Bytes row0, Bytes row1, Bytes row2, Bytes row3, Bytes quads[4]) {
  const __m256i a = _mm256_unpacklo_epi8(row0, row1), b = _mm256_unpackhi_epi8(row0, row1);
  const __m256i c = _mm256_unpacklo_epi8(row2, row3), d = _mm256_unpackhi_epi8(row2, row3);
  quads[0] = _mm256_unpacklo_epi16(a, c), quads[1] = _mm256_unpackhi_epi16(a, c);
  quads[2] = _mm256_unpacklo_epi16(b, d), quads[3] = _mm256_unpackhi_epi16(b, d);
}

inline void in_order(Ints sums[4]) {
  const __m256i a = _mm256_permute2x128_si256(sums[0], sums[1], 0x20);
  const __m256i b = _mm256_permute2x128_si256(sums[2], sums[3], 0x20);
  const __m256i c = _mm256_permute2x128_si256(sums[0], sums[1], 0x31);
  const __m256i d = _mm256_permute2x128_si256(sums[2], sums[3], 0x31);
  sums[0] = a, sums[1] = b, sums[2] = c, sums[3] = d;
}

inline Ints widened(const uint8_t* x) {
  return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(x)));
}
inline __m256i low_halves(__m256i x) { return _mm256_and_si256(x, _mm256_set1_epi8(15)); }
inline __m256i high_halves(__m256i x) { return low_halves(_mm256_srli_epi16(x, 4)); }
template <int Bits>
inline Ints lower_bits(Ints x) {
  return _mm256_and_si256(x, _mm256_set1_epi32((1 << Bits) - 1));
}
template <int Bits>
inline Ints upper_bits(Ints x) {
  return _mm256_srli_epi32(x, Bits);
}
inline Bytes or_bytes(Bytes a, Bytes b) { return _mm256_or_si256(a, b); }
inline Bytes where_bits(Bytes x, int bit, int value) {
  const __m256i bits = _mm256_set1_epi8(static_cast<char>(bit));
  const __m256i there = _mm256_cmpeq_epi8(_mm256_and_si256(x, bits), bits);
  return _mm256_and_si256(there, _mm256_set1_epi8(static_cast<char>(value)));
}
inline Bytes in_each_byte(Ints x) { return _mm256_mullo_epi32(x, _mm256_set1_epi32(0x01010101)); }
inline Bytes sub_bytes(Bytes a, Bytes b) { return _mm256_sub_epi8(a, b); }
inline __m256i in_pairs(Ints x) { return _mm256_or_si256(x, _mm256_slli_epi32(x, 16)); }
inline Bytes times_bytes(Bytes x, Ints factors) {
  const __m256i pairs = in_pairs(factors), low = _mm256_set1_epi16(255);
  const __m256i even = _mm256_mullo_epi16(x, pairs), odd = _mm256_mullo_epi16(_mm256_srli_epi16(x, 8), pairs);
  return _mm256_or_si256(_mm256_and_si256(even, low), _mm256_slli_epi16(odd, 8));
}
using BlockSum = __m256i;
inline BlockSum no_sum() { return zero_ints(); }
#if defined(__AVXVNNI__)
inline BlockSum add_products(BlockSum sum, Bytes w, Bytes x) { return dot(sum, w, x); }
inline Ints add_times(Ints total, BlockSum sum, Ints factors) {
  return _mm256_add_epi32(total, _mm256_mullo_epi32(sum, factors));
}
#else
// Sums stay in 16 bits, two for each column. A sum has at most 16 products of magnitudes 15 and 128, or 4 of 63 and
// 128.
inline BlockSum add_products(BlockSum sum, Bytes w, Bytes x) {
  return _mm256_add_epi16(sum, _mm256_maddubs_epi16(_mm256_abs_epi8(x), _mm256_sign_epi8(w, x)));
}
inline Ints add_times(Ints total, BlockSum sum, Ints factors) {
  return _mm256_add_epi32(total, _mm256_madd_epi16(sum, in_pairs(factors)));
}
#endif
inline void store_quad(int8_t* y, const int8_t* x) { std::memcpy(y, x, kQuad); }

inline void store_pairs(int16_t* y, const int8_t* a, const int8_t* b) {
  const __m128i first = _mm_loadu_si128(reinterpret_cast<const __m128i*>(a));
  const __m128i second = _mm_loadu_si128(reinterpret_cast<const __m128i*>(b));
  store_bytes(y, _mm256_cvtepi8_epi16(_mm_unpacklo_epi8(first, second)));
  store_bytes(y + 16, _mm256_cvtepi8_epi16(_mm_unpackhi_epi8(first, second)));
}

inline void store_pairs(int16_t* y, const int16_t* a, const int16_t* b) {
  for (int i = 0; i < kLanes; i += 8) {
    const __m128i first = _mm_loadu_si128(reinterpret_cast<const __m128i*>(a + i));
    const __m128i second = _mm_loadu_si128(reinterpret_cast<const __m128i*>(b + i));
    const __m256i low = _mm256_castsi128_si256(_mm_unpacklo_epi16(first, second));
    store_bytes(y + 2 * i, _mm256_inserti128_si256(low, _mm_unpackhi_epi16(first, second), 1));
  }
}

}  // namespace
}  // namespace edgelm
