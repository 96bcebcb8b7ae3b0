// Products of quantized rows with int8 matrices.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "lanes.h"
#include "rows_impl.h"

namespace edgelm {
namespace {

// Rows of a matrix that are read together if x has few rows. A processor prefetches this number of streams, and the
// sums, in the first-level cache, are loaded and stored once for 16 products.
constexpr int kDepthStep = 16;
// Prefetch distance in a transposed matrix, in tiles.
constexpr int kTilesAhead = 4;

// Prefetches a line that is read only a strip, a panel or some tiles later, so not into the first-level cache: there it
// would be evicted before it is read, and would evict data that is in use.
inline void prefetch_later(const void* line) { __builtin_prefetch(line, 0, 2); }

// Prefetches lines, spread evenly over steps of the arithmetic. A processor can wait for some 50 lines at a time; if
// more are requested at once, it stalls.
class Evenly {
 public:
  Evenly(Ahead ahead, int steps) : ahead_(ahead), each_((ahead.count + steps - 1) / std::max(steps, 1)) {}

  void step() {
    for (int i = std::min(each_, ahead_.count); i > 0; i--, ahead_.count--, ahead_.begin += ahead_.stride)
      prefetch_later(ahead_.begin);
  }

 private:
  Ahead ahead_;
  int each_;
};

// Turns the sums of kLanes columns into values. Its members are loaded before any result is written, because a compiler
// cannot know that results are written elsewhere.
struct Scaling {
  Ints corrections[kIntsPerLanes];
  Lanes scales, biases;
  // Without biases nothing is added: adding zeros would turn -0 into 0.
  bool biased;

  Scaling(const Result& result, int column)
      : scales(load(result.scales + column)),
        biases(result.biases == nullptr ? zero() : load(result.biases + column)),
        biased(result.biases != nullptr) {
    for (int i = 0; i < kIntsPerLanes; i++) corrections[i] = load_ints(result.corrections + column + i * kSumsPerInts);
  }
  // high, low: the sums of a row's planes. With one plane, `low` is not read.
  template <int Planes>
  Lanes apply(const Ints* high, const Ints* low, float factor) const {
    Lanes whole = product(high);
    if constexpr (Planes == 2) whole = add(whole, mul(product(low), set(kLowStep)));
    const Lanes y = mul(whole, set(factor));
    return biased ? add(y, biases) : y;
  }

 private:
  Lanes product(const Ints* sums) const { return mul(difference(sums, corrections), scales); }
};

// function<planes>(): compiled for each number of planes.
template <typename Function>
inline void by_planes(int planes, Function function) {
  planes == 1 ? function.template operator()<1>() : function.template operator()<2>();
}

template <int Planes>
void scale_rows(const int32_t* sums, size_t stride_sums, int rows, int columns, const Result& result) {
  each_lanes(columns, [&](int column, int count) {
    const Scaling scaling(result, column);
    const int32_t* next = sums + column;
    for (int row = 0; row < rows / Planes; row++) {
      Ints parts[Planes * kIntsPerLanes];
      for (int plane = 0; plane < Planes; plane++, next += stride_sums)
        for (int i = 0; i < kIntsPerLanes; i++) parts[plane * kIntsPerLanes + i] = load_ints(next + i * kSumsPerInts);
      const Lanes y = scaling.apply<Planes>(parts, parts + (Planes - 1) * kIntsPerLanes, result.factors[row]);
      store_some(result.y + row * result.stride + column, y, count);
    }
  });
}

void scale(const int32_t* sums, size_t stride_sums, int rows, int columns, const Result& result) {
  by_planes(result.planes, [&]<int Planes>() { scale_rows<Planes>(sums, stride_sums, rows, columns, result); });
}

// kBytes columns of four rows of a matrix.
inline void load_quads(const int8_t* w, size_t width, Bytes quads[4]) {
  interleave(load_bytes(w), load_bytes(w + width), load_bytes(w + 2 * width), load_bytes(w + 3 * width), quads);
}

// The same at the edges of a matrix (depth, width): missing rows and columns are 0.
[[gnu::noinline]] void load_edge(const int8_t* w, int k, int depth, size_t width, size_t column, Bytes quads[4]) {
  int8_t rows[4 * kBytes] = {};
  if (column < width)
    for (int i = 0; i < std::min(4, depth - k); i++)
      std::memcpy(rows + i * kBytes, w + (k + i) * width + column, std::min<size_t>(width - column, kBytes));
  load_quads(rows, kBytes, quads);
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

  // Loops over rows are unrolled: with an index computed at run time, the sums would be in memory, not in registers.
  void clear() {
#pragma GCC unroll 8
    for (auto& row : values)
      for (auto& part : row) part = zero_ints();
  }
  void load(const int32_t* place, size_t stride) {
#pragma GCC unroll 8
    for (int m = 0; m < M; m++)
      for (int i = 0; i < 4; i++) values[m][i] = load_ints(place + m * stride + i * kSumsPerInts);
  }
  void store(int32_t* place, size_t stride) const {
#pragma GCC unroll 8
    for (int m = 0; m < M; m++)
      for (int i = 0; i < 4; i++) store_ints(place + m * stride + i * kSumsPerInts, values[m][i]);
  }
  template <int Planes>
  void store(const Result& result) const {
#pragma GCC unroll 4
    for (int i = 0; i < 4; i += kIntsPerLanes) {
      const Scaling scaling(result, i * kSumsPerInts);
      float* y = result.y + i * kSumsPerInts;
#pragma GCC unroll 8
      for (int m = 0; m < M; m += Planes, y += result.stride)
        // Not values[m] + 4 + i: beyond a row of an array the behaviour is undefined.
        edgelm::store(y, scaling.apply<Planes>(values[m] + i, values[m + Planes - 1] + i, result.factors[m / Planes]));
    }
  }
  void add(const Bytes quads[4], const uint8_t* x, size_t stride_x) {
#pragma GCC unroll 8
    for (int m = 0; m < M; m++) {
      const Bytes factor = broadcast(four(x + m * stride_x));
      for (int i = 0; i < 4; i++) values[m][i] = dot(values[m][i], quads[i], factor);
    }
  }
  void add(const int32_t* place, size_t stride) {
#pragma GCC unroll 8
    for (int m = 0; m < M; m++)
      for (int i = 0; i < 4; i++)
        values[m][i] = add_ints(values[m][i], load_ints(place + m * stride + i * kSumsPerInts));
  }
  // Puts the sums in order and scales them. If `columns` is less than kBytes, only so many columns are written.
  template <int Planes>
  void finish(int columns, const Result& result) {
#pragma GCC unroll 8
    for (auto& row : values) in_order(row);
    if (columns >= kBytes) return store<Planes>(result);
    int32_t sums[M * kBytes];
    store(sums, kBytes);
    scale_rows<Planes>(sums, kBytes, M, columns, result);
  }
};

// Adds the products with kDepthStep rows of w, from row k on.
template <int M>
void add_strip(const uint8_t* x, size_t stride_x, const int8_t* w, int k, int depth, size_t width, bool first,
               const int8_t* next, int32_t* sums, size_t stride_sums) {
  for (size_t column = 0; column < width; column += kBytes) {
    if (next != nullptr)
      for (int i = 0; i < kDepthStep * kBytes; i += kLine) prefetch_later(next + column * kDepthStep + i);
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

// Rows that are multiplied at once with a reordered strip. Their sums are loaded and stored each time, so four rows
// take less time than two, even if some sums do not fit into registers.
constexpr int kArrangedRows = std::max(kPanelRows, kFewRows);

// kBlock columns of a strip, reordered to quads, by vectors of columns.
using Arranged = Bytes[kBlock / kBytes][kDeepestStrip / 4][4];

// Whole lines are read at once, so that none leaves the first-level cache between two of its parts.
inline void arrange(const int8_t* w, int k, int depth, size_t width, size_t column, Arranged& quads) {
  for (int i = 0; k + 4 * i < depth; i++)
    for (int part = 0; part < kBlock / kBytes; part++)
      load_quads(w, k + 4 * i, depth, width, column + part * kBytes, quads[part][i]);
}

// Adds the products with kBytes columns of a strip, M rows at once.
template <int M>
void add_arranged(const uint8_t* x, int rows, size_t stride_x, const Bytes (*quads)[4], int steps, bool first,
                  Evenly& ahead, int32_t* sums, size_t stride_sums) {
  for (; rows >= M; rows -= M, x += M * stride_x, sums += M * stride_sums) {
    Sums<M> tile;
    if (first)
      tile.clear();
    else
      tile.load(sums, stride_sums);
    for (int i = 0; i < steps; i++) {
      tile.add(quads[i], x + 4 * i, stride_x);
      ahead.step();
    }
    tile.store(sums, stride_sums);
  }
  if constexpr (M > 1)
    if (rows > 0) add_arranged<M - 1>(x, rows, stride_x, quads, steps, first, ahead, sums, stride_sums);
}

// Adds the products with the rows of w from k to depth - 1, at most kDeepestStrip. kBlock columns are reordered once
// for all rows of x.
void add_deep_strip(const uint8_t* x, int rows, size_t stride_x, const int8_t* w, int k, int depth, size_t width,
                    bool first, const int8_t* next, int32_t* sums, size_t stride_sums) {
  const int steps = (depth - k + 3) / 4, tiles = (rows + kArrangedRows - 1) / kArrangedRows * (kBlock / kBytes);
  for (size_t column = 0; column < width; column += kBlock) {
    Arranged quads;
    arrange(w, k, depth, width, column, quads);
    Ahead lines{};
    if (next != nullptr)
      lines = {reinterpret_cast<const uint8_t*>(next) + column * 4 * steps, kLine, 4 * steps * kBlock / kLine};
    Evenly ahead(lines, tiles * steps);
    for (int part = 0; part < kBlock / kBytes; part++)
      add_arranged<kArrangedRows>(x + k, rows, stride_x, quads[part], steps, first, ahead,
                                  sums + column + part * kBytes, stride_sums);
  }
}

void columns(const uint8_t* x, int rows, size_t stride_x, const int8_t* w, int depth, size_t width, bool first,
             const int8_t* next, int32_t* sums, size_t stride_sums) {
  // All rows use a strip while it is in the cache.
  const bool few = rows <= kFewRows;
  const int step = few ? kDepthStep : kDeepestStrip;
  for (int k = 0; k < depth; k += step) {
    const int8_t* const ahead = k + step < depth ? w + (k + step) * width : next;
    if (few)
      add_strips<kFewRows>(x, rows, stride_x, w, k, depth, width, first && k == 0, ahead, sums, stride_sums);
    else
      add_deep_strip(x, rows, stride_x, w, k, std::min(k + step, depth), width, first && k == 0, ahead, sums,
                     stride_sums);
  }
}

void scale_parts(const int32_t* const* sums, int parts, size_t stride_sums, int rows, int columns,
                 const Result& result) {
  by_planes(result.planes, [&]<int Planes>() {
    for (int row = 0; row < rows; row += Planes)
      for (int column = 0; column < columns; column += kBytes) {
        const size_t place = row * stride_sums + column;
        Sums<Planes> tile;
        tile.load(sums[0] + place, stride_sums);
        for (int part = 1; part < parts; part++) tile.add(sums[part] + place, stride_sums);
        tile.template finish<Planes>(columns - column, result.from(row / Planes, column));
      }
  });
}

// The products of M rows of x with N rows of w.
template <int M, int N>
inline void rows_tile(const uint8_t* x, size_t stride_x, const int8_t* w, int depth, Evenly& ahead, int32_t* sums,
                      size_t stride_sums) {
  Ints tile[M][N];
  for (int m = 0; m < M; m++)
    for (int n = 0; n < N; n++) tile[m][n] = zero_ints();
  for (int k = 0; k < depth; k += kBytes) {
    for (int n = 0; n < N; n++) {
      const Bytes weights = load_bytes(w + n * static_cast<size_t>(depth) + k);
      for (int m = 0; m < M; m++) tile[m][n] = dot(tile[m][n], weights, load_bytes(x + m * stride_x + k));
    }
    ahead.step();
  }
  for (int m = 0; m < M; m++)
    if constexpr (N == 4)
      store_totals(sums + m * stride_sums, tile[m]);
    else
      sums[m * stride_sums] = total(tile[m][0]);
}

template <int M, int N>
void rows_of(const uint8_t* x, int rows, size_t stride_x, const int8_t* w, int depth, Evenly& ahead, int32_t* sums,
             size_t stride_sums) {
  for (; rows >= M; rows -= M, x += M * stride_x, sums += M * stride_sums)
    rows_tile<M, N>(x, stride_x, w, depth, ahead, sums, stride_sums);
  if constexpr (M > 1)
    if (rows > 0) rows_of<M - 1, N>(x, rows, stride_x, w, depth, ahead, sums, stride_sums);
}

void rows(const uint8_t* x, int rows, size_t stride_x, const int8_t* w, int depth, int count, int32_t* sums,
          size_t stride_sums) {
  const int steps = (rows + kFewRows - 1) / kFewRows * (depth / kBytes);
  const auto tile = [&]<int N>(int n) {
    const auto* const own = w + n * static_cast<size_t>(depth);
    const auto* const later = reinterpret_cast<const uint8_t*>(own) + kTilesAhead * 4 * static_cast<size_t>(depth);
    Evenly ahead({later, kLine, N * depth / kLine}, steps);
    rows_of<kFewRows, N>(x, rows, stride_x, own, depth, ahead, sums + n, stride_sums);
  };
  int n = 0;
  for (; n + 4 <= count; n += 4) tile.template operator()<4>(n);
  for (; n < count; n++) tile.template operator()<1>(n);
}

}  // namespace
}  // namespace edgelm
