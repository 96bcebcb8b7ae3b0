// Panels: parts of a matrix, reordered for the multiplication with many rows.
#pragma once

#include <algorithm>
#include <cstring>

#include "lanes.h"
#include "products_impl.h"

namespace edgelm {
namespace {

// For each four rows, a panel holds kBlock / kBytes times four `Bytes`, in the order of `interleave`.
void pack_columns(const int8_t* w, int depth, size_t width, size_t column, int8_t* panel) {
  for (int k = 0; k < depth; k += 4)
    for (size_t part = column; part < column + kBlock; part += kBytes, panel += 4 * kBytes) {
      Bytes quads[4];
      load_quads(w, k, depth, width, part, quads);
      for (int i = 0; i < 4; i++) store_bytes(panel + i * kBytes, quads[i]);
    }
}

// The transposition of (count, depth) values from column k on, as kSquare rows of kBlock columns; missing values are 0.
inline void transpose_block(const int8_t* w, int depth, int k, int count, int8_t (&columns)[kSquare * kBlock]) {
  for (int row = 0; row < kBlock; row += kSquare) {
    Square square[kSquare] = {};
    for (int i = 0; i < std::min(kSquare, count - row); i++)
      std::memcpy(&square[i], w + (row + i) * static_cast<size_t>(depth) + k, std::min(kSquare, depth - k));
    transpose(square);
    for (int i = 0; i < kSquare; i++) std::memcpy(columns + i * kBlock + row, &square[i], kSquare);
  }
}

void pack_rows(const int8_t* w, int depth, int count, int8_t* panel) {
  for (int k = 0; k < depth; k += kSquare) {
    int8_t columns[kSquare * kBlock];
    transpose_block(w, depth, k, count, columns);
    for (int j = 0; j < std::min(kSquare, padded(depth - k, 4)); j += 4)
      for (int part = 0; part < kBlock; part += kBytes, panel += 4 * kBytes) {
        Bytes quads[4];
        load_quads(columns + j * kBlock + part, kBlock, quads);
        for (int i = 0; i < 4; i++) store_bytes(panel + i * kBytes, quads[i]);
      }
  }
}

template <int M, int Planes>
inline void panel_tile(const uint8_t* x, size_t stride_x, const int8_t* panel, int depth, int columns, Evenly& ahead,
                       const Result& result) {
  for (int part = 0; part < columns; part += kBytes) {
    // Prefetch the output: y is larger than the caches, and only few stores can wait at the same time.
    for (int m = 0; m < M / Planes; m++)
      for (int i = 0; i < kBytes; i += kLanes) __builtin_prefetch(result.y + m * result.stride + part + i, 1);
    Sums<M> tile;
    tile.clear();
    const int8_t* w = panel + part * 4;
    for (int k = 0; k < depth; k += 4, w += 4 * kBlock) {
      const Bytes quads[4] = {load_bytes(w), load_bytes(w + kBytes), load_bytes(w + 2 * kBytes),
                              load_bytes(w + 3 * kBytes)};
      tile.add(quads, x + k, stride_x);
      ahead.step();
    }
    tile.template finish<Planes>(columns - part, result.from(0, part));
  }
}

template <int M, int Planes>
void panel_rows(const uint8_t* x, int rows, size_t stride_x, const int8_t* panel, int depth, int columns, Evenly& ahead,
                const Result& result) {
  int row = 0;
  for (; row + M <= rows; row += M)
    panel_tile<M, Planes>(x + row * stride_x, stride_x, panel, depth, columns, ahead, result.from(row / Planes, 0));
  if constexpr (M > Planes)
    if (row < rows)
      panel_rows<M - Planes, Planes>(x + row * stride_x, rows - row, stride_x, panel, depth, columns, ahead,
                                     result.from(row / Planes, 0));
}

void panel(const uint8_t* x, int rows, size_t stride_x, const int8_t* panel, int depth, int columns, Ahead lines,
           const Result& result) {
  static_assert(kPanelRows % 2 == 0, "rows of two planes go together");
  const int tiles = (rows + kPanelRows - 1) / kPanelRows * ((columns + kBytes - 1) / kBytes);
  Evenly ahead(lines, tiles * (depth / 4));
  by_planes(result.planes, [&]<int Planes>() {
    panel_rows<kPanelRows, Planes>(x, rows, stride_x, panel, depth, columns, ahead, result);
  });
}

}  // namespace
}  // namespace edgelm
