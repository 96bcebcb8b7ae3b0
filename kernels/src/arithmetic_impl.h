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

template <typename Operation>
inline float reduce(Lanes x, Operation operation) {
  float lanes[kLanes];
  store(lanes, x);
  for (int half = kLanes / 2; half > 0; half /= 2)
    for (int i = 0; i < half; i++) lanes[i] = operation(lanes[i], lanes[i + half]);
  return lanes[0];
}
inline float largest(Lanes x) {
  return reduce(x, [](float a, float b) { return a > b ? a : b; });
}
inline float sum(Lanes x) {
  return reduce(x, [](float a, float b) { return a + b; });
}

float quantize(const float* x, int size, uint8_t* q) {
  const int whole = size / kLanes * kLanes;
  Lanes most = zero();
  for (int i = 0; i < whole; i += kLanes) most = max(most, abs(load(x + i)));
  if (whole < size) most = max(most, abs(load_tail(x + whole, size - whole)));
  const float r = largest(most);
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

// Cephes' expf (S. Moshier): x = n ln 2 + r, a polynomial in r, times 2^n. 0 below 2^-126.
inline Lanes exp_of(Lanes x) {
  const Lanes lowest = set(-87.33654f);
  const Lanes bounded = max(x, lowest);
  const Lanes n = round(mul(bounded, set(1.44269504f)));
  const Lanes r = fma(n, set(2.12194440e-4f), fma(n, set(-0.693359375f), bounded));
  Lanes y = set(1.9875691500e-4f);
  for (float coefficient : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f})
    y = fma(y, r, set(coefficient));
  y = add(fma(y, mul(r, r), r), set(1));
  return where_at_least(x, lowest, mul(y, power(n)));
}

float exponential(float x) {
  float lanes[kLanes];
  store(lanes, exp_of(set(x)));
  return lanes[0];
}

float exponentials(float* s, int begin, int end, int count, float* most) {
  const int length = padded(count, kLanes);
  std::fill(s, s + begin, -std::numeric_limits<float>::infinity());
  std::fill(s + end, s + length, -std::numeric_limits<float>::infinity());
  Lanes high = load(s);
  for (int i = kLanes; i < length; i += kLanes) high = max(high, load(s + i));
  *most = largest(high);
  const Lanes shift = set(-*most);
  Lanes sums = zero();
  for (int i = 0; i < length; i += kLanes) {
    const Lanes p = exp_of(add(load(s + i), shift));
    store(s + i, p);
    sums = add(sums, p);
  }
  return sum(sums);
}

void merge(float* a, float p, const float* b, float q, int count) {
  for (int i = 0; i < count; i += kLanes) store(a + i, fma(load(b + i), set(q), mul(load(a + i), set(p))));
}

template <int R, int V>
inline void product_tile(const float* a, size_t stride_a, int depth, const float* b, size_t stride_b, float* c,
                         size_t stride_c) {
  Lanes sums[R][V];
  for (int r = 0; r < R; r++)
    for (int v = 0; v < V; v++) sums[r][v] = zero();
  for (int k = 0; k < depth; k++) {
    Lanes row[V];
    for (int v = 0; v < V; v++) row[v] = load(b + k * stride_b + v * kLanes);
    for (int r = 0; r < R; r++) {
      const Lanes factor = set(a[r * stride_a + k]);
      for (int v = 0; v < V; v++) sums[r][v] = fma(factor, row[v], sums[r][v]);
    }
  }
  for (int r = 0; r < R; r++)
    for (int v = 0; v < V; v++) store(c + r * stride_c + v * kLanes, sums[r][v]);
}

template <int R>
inline void product_rows(const float* a, size_t stride_a, int depth, const float* b, size_t stride_b, int columns,
                         float* c, size_t stride_c) {
  constexpr int kStep = kProductVectors * kLanes;
  int column = 0;
  for (; column + kStep <= columns; column += kStep)
    product_tile<R, kProductVectors>(a, stride_a, depth, b + column, stride_b, c + column, stride_c);
  for (; column < columns; column += kLanes)
    product_tile<R, 1>(a, stride_a, depth, b + column, stride_b, c + column, stride_c);
}

void product(const float* a, size_t stride_a, int rows, int depth, const float* b, size_t stride_b, int columns,
             float* c, size_t stride_c) {
  int row = 0;
  for (; row + kProductRows <= rows; row += kProductRows)
    product_rows<kProductRows>(a + row * stride_a, stride_a, depth, b, stride_b, columns, c + row * stride_c, stride_c);
  for (; row + 3 <= rows; row += 3)
    product_rows<3>(a + row * stride_a, stride_a, depth, b, stride_b, columns, c + row * stride_c, stride_c);
  for (; row < rows; row++)
    product_rows<1>(a + row * stride_a, stride_a, depth, b, stride_b, columns, c + row * stride_c, stride_c);
}

// --- int8 keys and values ---------------------------------------------------------------------------------------

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

// Four rounds of interleaving rows i and i + 8 transpose 16 rows of 16 bytes.
inline void transpose(Square rows[kSquare]) {
  for (int round = 0; round < 4; round++) {
    Square next[kSquare];
    for (int i = 0; i < kSquare / 2; i++) {
      const Square a = rows[i], b = rows[i + kSquare / 2];
      next[2 * i] = __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
      next[2 * i + 1] = __builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
    }
    std::copy_n(next, kSquare, rows);
  }
}

#if !defined(EDGELM_OWN_TRANSPOSITION)
inline void widen_square(const int8_t* x, size_t stride_x, float* y, size_t stride_y) {
  Square square[kSquare];
  for (int i = 0; i < kSquare; i++) std::memcpy(&square[i], x + i * stride_x, kSquare);
  transpose(square);
  for (int i = 0; i < kSquare; i++) store(y + i * stride_y, load(reinterpret_cast<const int8_t*>(&square[i])));
}
#endif

// Asks for the memory that follows `count` values as far as x is from its end: a chunk ahead, a line at a time. Asked
// for all at once, or found out by the processor, it comes later: a step over 1,900 positions took 1.5 times as long.
inline void prefetch_next(const int8_t* x, int count, int size) {
  __builtin_prefetch(x + static_cast<size_t>(count) * size);
}

void widen_transposed(const int8_t* x, int count, int size, float* y, size_t stride) {
  for (int row = 0; row < count; row += kSquare) {
    for (int i = 0; i < kSquare; i++) prefetch_next(x + (row + i) * static_cast<size_t>(size), count, size);
    for (int column = 0; column < size; column += kSquare) {
      if (row + kSquare <= count && column + kSquare <= size) {
        widen_square(x + row * static_cast<size_t>(size) + column, size, y + column * stride + row, stride);
        continue;
      }
      const int rows = std::min(kSquare, count - row), columns = std::min(kSquare, size - column);
      Square square[kSquare] = {};
      for (int i = 0; i < rows; i++)
        std::memcpy(&square[i], x + (row + i) * static_cast<size_t>(size) + column, columns);
      transpose(square);
      for (int i = 0; i < columns; i++)
        store(y + (column + i) * stride + row, load(reinterpret_cast<const int8_t*>(&square[i])));
    }
  }
}

void widen(const int8_t* x, int count, int size, float* y, size_t stride) {
  const int whole = size / kLanes * kLanes;
  for (int row = 0; row < count; row++, x += size, y += stride) {
    prefetch_next(x, count, size);
    for (int column = 0; column < whole; column += kLanes) store(y + column, load(x + column));
    if (whole == size) continue;
    int8_t bytes[kLanes] = {};
    std::memcpy(bytes, x + whole, size - whole);
    store(y + whole, load(bytes));
  }
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

void columns(const uint8_t* x, int rows, size_t stride_x, const int8_t* w, int depth, size_t width, int32_t* sums,
             size_t stride_sums) {
  // While a strip is in the cache, all rows take it.
  for (int k = 0; k < depth; k += kDepthStep) {
    int row = 0;
    for (; row + 4 <= rows; row += 4)
      add_strip<4>(x + row * stride_x, stride_x, w, k, depth, width, sums + row * stride_sums, stride_sums);
    for (; row < rows; row++)
      add_strip<1>(x + row * stride_x, stride_x, w, k, depth, width, sums + row * stride_sums, stride_sums);
  }
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
  return {name,  kOffset, kPanelRows, quantize, columns,          rows,  pack_columns, pack_rows,   panel,
          scale, product, rotate,     to_int8,  widen_transposed, widen, exponentials, exponential, merge};
}

}  // namespace
}  // namespace edgelm
