// Products with weights of 4, 5 and 6 bits, with the lanes and bytes of the header that is included before this one.
//
// A weight is (q - z) * s, an int8 value: q is its bits, s and z belong to its block, kNibbleBlock inputs of a column.
// So sums are the same as with int8 weights, in any order of additions: here, a block's sum of x * (q - z) is
// multiplied by s.
#pragma once

#include "lanes.h"

namespace edgelm {
namespace {

constexpr int kColumns = kBytes / 4;  // of one `Bytes`

// Steps, zeros and planes of the blocks of kColumns columns. A weight has Planes bits beside its nibble.
template <int Planes>
struct BlockFactors {
  Ints steps;
  Bytes zeros, planes[2];

  // lines: the lines of the block, from the first of the columns on.
  BlockFactors(const uint8_t* factors, const uint8_t* lines) {
    const Ints both = widened(factors);
    steps = lower_bits<4 - Planes>(both);
    zeros = in_each_byte(upper_bits<4 - Planes>(both));
    for (int i = 0; i < Planes; i++) planes[i] = load_bytes(lines + (kBlockLines + i) * kLine);
  }

  // q - z of a line's lower or upper nibbles. half: the number of this half line, counted from the begin of the block.
  Bytes levels(Bytes nibbles, int half) const {
    for (int i = 0; i < Planes; i++) nibbles = or_bytes(nibbles, where_bits(planes[i], 1 << half, 16 << i));
    return sub_bytes(nibbles, zeros);
  }
};

// The sums of M rows of x in kColumns columns of a group, from its column `column` on.
template <int Planes, int M>
void nibble_tile(const uint8_t* x, size_t stride_x, const NibbleGroup& w, int column, const uint8_t* next,
                 int32_t* sums, size_t stride_sums) {
  constexpr int kLines = kBlockLines + Planes;
  Ints totals[M];
  for (int m = 0; m < M; m++) totals[m] = zero_ints();
  for (int block = 0; block < w.blocks; block++) {
    const uint8_t* const lines = w.values + block * kLines * kLine + column * 4;
    const BlockFactors<Planes> factors(w.factors + block * kGroup + column, lines);
    BlockSum part[M];
    for (int m = 0; m < M; m++) part[m] = no_sum();
    if (next != nullptr)
      for (int i = column / kColumns; i < kLines; i += kGroup / kColumns)
        __builtin_prefetch(next + (block * kLines + i) * kLine, 0, 2);
#pragma GCC unroll 4
    for (int line = 0; line < kBlockLines; line++) {
      const Bytes both = load_bytes(lines + line * kLine);
      const Bytes low = factors.levels(low_halves(both), 2 * line);
      const Bytes high = factors.levels(high_halves(both), 2 * line + 1);
      for (int m = 0; m < M; m++) {
        const uint8_t* const values = x + m * stride_x + block * kNibbleBlock + line * 8;
        part[m] = add_products(part[m], low, broadcast_pair(four(values)));
        part[m] = add_products(part[m], high, broadcast_pair(four(values + 4)));
      }
      // With more than 4 bits, the products of only one line fit into sums of 16 bits, which some implementations use.
      if (Planes == 0 && line + 1 < kBlockLines) continue;
      for (int m = 0; m < M; m++) {
        totals[m] = add_times(totals[m], part[m], factors.steps);
        part[m] = no_sum();
      }
    }
  }
  for (int m = 0; m < M; m++) store_ints(sums + m * stride_sums + column, totals[m]);
}

template <int Planes, int M>
void nibble_rows(const uint8_t* x, int rows, size_t stride_x, const NibbleGroup& w, const uint8_t* next, int32_t* sums,
                 size_t stride_sums) {
  for (; rows >= M; rows -= M, x += M * stride_x, sums += M * stride_sums, next = nullptr)
    for (int column = 0; column < kGroup; column += kColumns)
      nibble_tile<Planes, M>(x, stride_x, w, column, next, sums, stride_sums);
  if constexpr (M > 1)
    if (rows > 0) nibble_rows<Planes, M - 1>(x, rows, stride_x, w, next, sums, stride_sums);
}

// function<planes>(): compiled for each number of planes.
template <typename Function>
inline void by_extra_planes(int planes, Function function) {
  if (planes == 0) return function.template operator()<0>();
  planes == 1 ? function.template operator()<1>() : function.template operator()<2>();
}

void nibbles(const uint8_t* x, int rows, size_t stride_x, const NibbleGroup& w, const uint8_t* next, int32_t* sums,
             size_t stride_sums) {
  by_extra_planes(w.planes,
                  [&]<int Planes>() { nibble_rows<Planes, kFewRows>(x, rows, stride_x, w, next, sums, stride_sums); });
}

// The offset of a quad in four rows of a panel, which have kBlock / 4 quads. columns: the number of the quad. The order
// is that of `interleave`, which works in parts of 128 bits.
constexpr int panel_place(int columns) {
  constexpr int kParts = kBytes / kQuad;
  const int vectors = columns / (4 * kParts) * 4 + columns % 4, part = columns / 4 % kParts;
  return vectors * kBytes + part * kQuad;
}

template <int Planes>
void pack_groups(const NibbleGroup& w, int groups, int8_t* panel) {
  constexpr int kLines = kBlockLines + Planes;
  for (int group = 0; group < groups; group++)
    for (int block = 0; block < w.blocks; block++) {
      const size_t place = static_cast<size_t>(group) * w.blocks + block;
      for (int line = 0; line < kBlockLines; line++) {
        int8_t halves[2][kLine];
        for (int column = 0; column < kGroup; column += kColumns) {
          const uint8_t* const lines = w.values + place * kLines * kLine + column * 4;
          const BlockFactors<Planes> factors(w.factors + place * kGroup + column, lines);
          const Bytes both = load_bytes(lines + line * kLine);
          const Bytes low = factors.levels(low_halves(both), 2 * line);
          const Bytes high = factors.levels(high_halves(both), 2 * line + 1);
          store_bytes(halves[0] + column * 4, times_bytes(low, factors.steps));
          store_bytes(halves[1] + column * 4, times_bytes(high, factors.steps));
        }
        int8_t* const quads = panel + (block * kBlockLines + line) * 8 * kBlock;
        for (int half = 0; half < 2; half++)
          for (int part = 0; part < kGroup / 4; part++)
            store_quad(quads + half * 4 * kBlock + panel_place(group * (kGroup / 4) + part),
                       halves[half] + part * kQuad);
      }
    }
}

void pack_nibbles(const NibbleGroup& w, int groups, int8_t* panel) {
  if (groups < kBlock / kGroup) std::memset(panel, 0, static_cast<size_t>(w.blocks) * kNibbleBlock * kBlock);
  by_extra_planes(w.planes, [&]<int Planes>() { pack_groups<Planes>(w, groups, panel); });
}

}  // namespace
}  // namespace edgelm
