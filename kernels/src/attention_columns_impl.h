// Attention: write keys and values to the KV cache, and reorder them for the products.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "lanes.h"

namespace edgelm {
namespace {

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
  // An infinite scale would turn everything that it scales into NaN, even for positions that do not see this row.
  const float r = std::min(std::numeric_limits<float>::max(), largest(most));
  // For the smallest r, 127 / r is infinite, and infinity times 0 is NaN.
  const bool none = r < 0x1p-100f;
  const Lanes factor = set(none ? 0 : static_cast<float>(kLimit) / r);
  each_lanes(size, [&](int i, int count) {
    uint8_t bytes[kLanes];
    store_bytes(bytes, mul(scaled(i, count), factor), 0);
    std::memcpy(y + i, bytes, count);
  });
  return none ? 0 : r / static_cast<float>(kLimit);
}

// Prefetch a row of the data that is read next, a line at a time. Prefetching all at once, or leaving it to the
// processor, is slower: a step over 1,900 positions took 1.5 times as long.
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

// The scales of rows, and the factors of their values. Missing rows, up to kSquare, have scale and factor 0.
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

}  // namespace
}  // namespace edgelm
