// 16 floats, and 64 bytes with their sums of products, in AVX-512 with VNNI.
#pragma once

#include <immintrin.h>

#include <cstring>

#include "arithmetic.h"

namespace edgelm {
namespace {

using Lanes = __m512;
inline Lanes zero() { return _mm512_setzero_ps(); }
inline Lanes set(float x) { return _mm512_set1_ps(x); }
inline Lanes load(const float* x) { return _mm512_loadu_ps(x); }
inline Lanes load(const int32_t* x) { return _mm512_cvtepi32_ps(_mm512_loadu_si512(x)); }
inline void store(float* y, Lanes x) { _mm512_storeu_ps(y, x); }
inline Lanes fma(Lanes a, Lanes b, Lanes c) { return _mm512_fmadd_ps(a, b, c); }
inline Lanes mul(Lanes a, Lanes b) { return _mm512_mul_ps(a, b); }
inline Lanes add(Lanes a, Lanes b) { return _mm512_add_ps(a, b); }
inline Lanes sub(Lanes a, Lanes b) { return _mm512_sub_ps(a, b); }
inline Lanes div(Lanes a, Lanes b) { return _mm512_div_ps(a, b); }
inline Lanes max(Lanes a, Lanes b) { return _mm512_max_ps(a, b); }
inline Lanes min(Lanes a, Lanes b) { return _mm512_min_ps(a, b); }
inline Lanes abs(Lanes a) { return _mm512_abs_ps(a); }
// The larger of two magnitudes; NaN where one of them is NaN. They are compared as integers: their bits have the same
// order, with NaN above all numbers.
inline Lanes larger(Lanes a, Lanes b) {
  return _mm512_castsi512_ps(_mm512_max_epi32(_mm512_castps_si512(a), _mm512_castps_si512(b)));
}
// The largest of the magnitudes; NaN if one of them is NaN.
inline float largest(Lanes x) {
  return _mm_cvtss_f32(_mm_castsi128_ps(_mm_cvtsi32_si128(_mm512_reduce_max_epi32(_mm512_castps_si512(x)))));
}
// Reduces the lanes of four rows: lanes 4 i to 4 i + 3 hold the result of row i. Lanes 8 apart are combined first, then
// 4, 2 and 1 apart.
template <typename Operation>
inline Lanes fold(const Lanes (&rows)[4], Operation operation) {
  const auto eight = [&](Lanes a, Lanes b) {
    return operation(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xee));
  };
  const Lanes a = eight(rows[0], rows[1]), b = eight(rows[2], rows[3]);
  const Lanes four = operation(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
  const Lanes two = operation(four, _mm512_shuffle_ps(four, four, 0x4e));
  return operation(two, _mm512_shuffle_ps(two, two, 0xb1));
}
inline Lanes round(Lanes a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
// y * 2^n for whole numbers n, where neither y nor the result is subnormal.
inline Lanes times_power(Lanes y, Lanes n) { return _mm512_scalef_ps(y, n); }
// y where x >= bound, else 0.
inline Lanes where_at_least(Lanes x, Lanes bound, Lanes y) {
  return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x, bound, _CMP_GE_OQ), y);
}
// Whether x < bound in all lanes; false if a lane is NaN.
inline bool all_below(Lanes x, Lanes bound) { return _mm512_cmp_ps_mask(x, bound, _CMP_NLT_UQ) == 0; }
// Rounded to even, within the range of int16.
inline void store_words(int16_t* y, Lanes x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(y), _mm512_cvtsepi32_epi16(_mm512_cvtps_epi32(x)));
}
inline void store_bytes(uint8_t* y, Lanes whole, int offset) {
  const __m512i values = _mm512_add_epi32(_mm512_cvtps_epi32(whole), _mm512_set1_epi32(offset));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(y), _mm512_cvtepi32_epi8(values));
}

using Bytes = __m512i;
using Ints = __m512i;
constexpr int kOffset = 128;
constexpr int kPanelRows = 6;
constexpr int kPairRows = 6, kPairVectors = 4;

inline Bytes load_bytes(const void* x) { return _mm512_loadu_si512(x); }
inline void store_bytes(void* y, Bytes x) { _mm512_storeu_si512(y, x); }
inline Bytes broadcast(uint32_t x) { return _mm512_set1_epi32(static_cast<int>(x)); }
inline Ints zero_ints() { return _mm512_setzero_si512(); }
inline Ints load_ints(const int32_t* x) { return _mm512_loadu_si512(x); }
inline void store_ints(int32_t* y, Ints x) { _mm512_storeu_si512(y, x); }
inline Lanes lanes_of(const Ints* x) { return _mm512_cvtepi32_ps(*x); }
inline Lanes difference(const Ints* a, const Ints* b) { return _mm512_cvtepi32_ps(_mm512_sub_epi32(*a, *b)); }
// _mm512_dpbusd_epi32 as assembly: around the intrinsic, GCC moves all sums through memory.
inline Ints dot(Ints sums, Bytes w, Bytes x) {
  asm("vpdpbusd %2, %1, %0" : "+v"(sums) : "v"(x), "v"(w));
  return sums;
}
inline Bytes broadcast_pair(uint32_t x) { return broadcast(x); }
// Adds the products of 16 pairs of int16: _mm512_dpwssd_epi32 as assembly.
inline Ints dot_pairs(Ints sums, Bytes a, Bytes b) {
  asm("vpdpwssd %2, %1, %0" : "+v"(sums) : "v"(a), "v"(b));
  return sums;
}
inline Ints add_ints(Ints a, Ints b) { return _mm512_add_epi32(a, b); }
inline int32_t total(Ints x) { return _mm512_reduce_add_epi32(x); }
// The totals of four vectors.
inline void store_totals(int32_t* y, const Ints (&x)[4]) {
  const auto twos = [](Ints a, Ints b) {
    return _mm512_add_epi32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
  };
  const __m512i a = twos(x[0], x[1]), b = twos(x[2], x[3]);
  const __m512i parts = _mm512_add_epi32(_mm512_unpacklo_epi64(a, b), _mm512_unpackhi_epi64(a, b));
  const __m256i half = _mm256_add_epi32(_mm512_castsi512_si256(parts), _mm512_extracti64x4_epi64(parts, 1));
  const __m128i sums = _mm_add_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(y), sums);
}

inline void interleave(Bytes row0, Bytes row1, Bytes row2, Bytes row3, Bytes quads[4]) {
  const __m512i a = _mm512_unpacklo_epi8(row0, row1), b = _mm512_unpackhi_epi8(row0, row1);
  const __m512i c = _mm512_unpacklo_epi8(row2, row3), d = _mm512_unpackhi_epi8(row2, row3);
  quads[0] = _mm512_unpacklo_epi16(a, c), quads[1] = _mm512_unpackhi_epi16(a, c);
  quads[2] = _mm512_unpacklo_epi16(b, d), quads[3] = _mm512_unpackhi_epi16(b, d);
}

// Puts sums into the order of columns. `interleave` works in parts of 128 bits, so this is a 4 x 4 transposition of
// those parts.
inline void in_order(Ints sums[4]) {
  const __m512i a = _mm512_shuffle_i32x4(sums[0], sums[1], 0x44), b = _mm512_shuffle_i32x4(sums[0], sums[1], 0xee);
  const __m512i c = _mm512_shuffle_i32x4(sums[2], sums[3], 0x44), d = _mm512_shuffle_i32x4(sums[2], sums[3], 0xee);
  sums[0] = _mm512_shuffle_i32x4(a, c, 0x88), sums[1] = _mm512_shuffle_i32x4(a, c, 0xdd);
  sums[2] = _mm512_shuffle_i32x4(b, d, 0x88), sums[3] = _mm512_shuffle_i32x4(b, d, 0xdd);
}

// From here on, what `nibbles` needs. widened: values of columns, a byte each, as integers. low_halves and high_halves:
// the lower and the upper 4 bits of each byte.
inline Ints widened(const uint8_t* x) {
  return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x)));
}
inline __m512i low_halves(__m512i x) { return _mm512_and_si512(x, _mm512_set1_epi8(15)); }
inline __m512i high_halves(__m512i x) { return low_halves(_mm512_srli_epi16(x, 4)); }
template <int Bits>
inline Ints lower_bits(Ints x) {
  return _mm512_and_si512(x, _mm512_set1_epi32((1 << Bits) - 1));
}
template <int Bits>
inline Ints upper_bits(Ints x) {
  return _mm512_srli_epi32(x, Bits);
}
inline Bytes or_bytes(Bytes a, Bytes b) { return _mm512_or_si512(a, b); }
// `value` in the bytes where x has this bit, else 0.
inline Bytes where_bits(Bytes x, int bit, int value) {
  const __mmask64 there = _mm512_test_epi8_mask(x, _mm512_set1_epi8(static_cast<char>(bit)));
  return _mm512_maskz_mov_epi8(there, _mm512_set1_epi8(static_cast<char>(value)));
}
inline Bytes in_each_byte(Ints x) { return _mm512_mullo_epi32(x, _mm512_set1_epi32(0x01010101)); }
inline Bytes sub_bytes(Bytes a, Bytes b) { return _mm512_sub_epi8(a, b); }
// The four bytes of each integer of x times its factor; the lower 8 bits of each product stay.
inline Bytes times_bytes(Bytes x, Ints factors) {
  const __m512i pairs = _mm512_or_si512(factors, _mm512_slli_epi32(factors, 16));
  const __m512i even = _mm512_mullo_epi16(x, pairs), odd = _mm512_mullo_epi16(_mm512_srli_epi16(x, 8), pairs);
  return _mm512_mask_mov_epi8(even, 0xaaaaaaaaaaaaaaaa, _mm512_slli_epi16(odd, 8));
}
using BlockSum = Ints;
inline BlockSum no_sum() { return zero_ints(); }
inline BlockSum add_products(BlockSum sum, Bytes w, Bytes x) { return dot(sum, w, x); }
inline Ints add_times(Ints total, BlockSum sum, Ints factors) {
  return _mm512_add_epi32(total, _mm512_mullo_epi32(sum, factors));
}
inline void store_quad(int8_t* y, const int8_t* x) { std::memcpy(y, x, kQuad); }

// Pairs of a[i] and b[i], as int16, for 16 values of i.
inline void store_pairs(int16_t* y, const int8_t* a, const int8_t* b) {
  const __m128i first = _mm_loadu_si128(reinterpret_cast<const __m128i*>(a));
  const __m128i second = _mm_loadu_si128(reinterpret_cast<const __m128i*>(b));
  const __m256i low = _mm256_castsi128_si256(_mm_unpacklo_epi8(first, second));
  _mm512_storeu_si512(y, _mm512_cvtepi8_epi16(_mm256_inserti128_si256(low, _mm_unpackhi_epi8(first, second), 1)));
}

inline void store_pairs(int16_t* y, const int16_t* a, const int16_t* b) {
  const auto widened = [](const int16_t* x) {
    return _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x)));
  };
  _mm512_storeu_si512(y, _mm512_or_si512(widened(a), _mm512_slli_epi32(widened(b), 16)));
}

// Columns 2 i and 2 i + 1 of 16 rows of 16 int8 values as pairs, for each i.
#define EDGELM_OWN_TRANSPOSITION
inline void square_pairs(const int8_t* x, size_t stride, int16_t* y) {
  __m512i rows[4];  // four rows each, of four words of four values
  for (int i = 0; i < 4; i++) {
    const auto row = [&](int j) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(x + (4 * i + j) * stride)); };
    const __m256i low = _mm256_inserti128_si256(_mm256_castsi128_si256(row(0)), row(1), 1);
    const __m256i high = _mm256_inserti128_si256(_mm256_castsi128_si256(row(2)), row(3), 1);
    rows[i] = _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
  }
  const __m512i first = _mm512_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28, 0, 4, 8, 12, 16, 20, 24, 28);
  // The bytes of a word's first half become the upper bytes of int16. `later` has the second half in its place.
  const __m512i upper = _mm512_set4_epi32(0x0d800c80, 0x09800880, 0x05800480, 0x01800080);
  for (int word = 0; word < 4; word++, y += 4 * kLanes) {
    const __m512i order = _mm512_add_epi32(first, _mm512_set1_epi32(word));
    const __m512i low = _mm512_permutex2var_epi32(rows[0], order, rows[1]);
    const __m512i high = _mm512_permutex2var_epi32(rows[2], order, rows[3]);
    const __m512i words = _mm512_shuffle_i64x2(low, high, 0x44);
    const __m512i later = _mm512_srli_epi32(words, 16);
    _mm512_storeu_si512(y, _mm512_srai_epi16(_mm512_shuffle_epi8(words, upper), 8));
    _mm512_storeu_si512(y + 2 * kLanes, _mm512_srai_epi16(_mm512_shuffle_epi8(later, upper), 8));
  }
}

}  // namespace
}  // namespace edgelm
