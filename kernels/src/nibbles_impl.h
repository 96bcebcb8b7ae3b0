// Products with weights of 4 bits, over the lanes and bytes of the header that was included before this one.
//
// A weight is (q - z) * s, an int8 value: q is its 4 bits, s and z are those of its block, kNibbleBlock inputs of a
// column. So sums are what they are of int8 weights, in whatever order: here a block's sum of x * (q - z) is multiplied
// by s.
#pragma once

#include "lanes.h"

namespace edgelm {
namespace {

constexpr int kColumns = kBytes / 4;  // of one `Bytes`

// What the blocks of kColumns columns have.
struct BlockFactors {
  Ints steps;
  Bytes zeros;

  explicit BlockFactors(const uint8_t* blocks) {
    const Ints both = widened(blocks);
    steps = low_halves(both);
    zeros = in_each_byte(high_halves(both));
  }
};

// The sums of M rows of x in kColumns columns of a group, at `column` of it.
template <int M>
void nibble_tile(const uint8_t* x, size_t stride_x, const NibbleGroup& w, int column, const uint8_t* next,
                 int32_t* sums, size_t stride_sums) {
  Ints totals[M];
  for (int m = 0; m < M; m++) totals[m] = zero_ints();
  for (int block = 0; block < w.blocks; block++) {
    const BlockFactors factors(w.factors + block * kGroup + column);
    BlockSum part[M];
    for (int m = 0; m < M; m++) part[m] = no_sum();
    const uint8_t* const lines = w.values + block * kBlockLines * kLine;
    if (next != nullptr)
      for (int i = column / kColumns; i < kBlockLines; i += kGroup / kColumns)
        __builtin_prefetch(next + (block * kBlockLines + i) * kLine);
#pragma GCC unroll 4
    for (int line = 0; line < kBlockLines; line++) {
      const Bytes both = load_bytes(lines + line * kLine + column * 4);
      const Bytes low = sub_bytes(low_halves(both), factors.zeros);
      const Bytes high = sub_bytes(high_halves(both), factors.zeros);
      for (int m = 0; m < M; m++) {
        const uint8_t* const values = x + m * stride_x + block * kNibbleBlock + line * 8;
        part[m] = add_products(part[m], low, broadcast_pair(four(values)));
        part[m] = add_products(part[m], high, broadcast_pair(four(values + 4)));
      }
    }
    for (int m = 0; m < M; m++) totals[m] = add_times(totals[m], part[m], factors.steps);
  }
  for (int m = 0; m < M; m++) store_ints(sums + m * stride_sums + column, totals[m]);
}

template <int M>
void nibble_rows(const uint8_t* x, int rows, size_t stride_x, const NibbleGroup& w, const uint8_t* next, int32_t* sums,
                 size_t stride_sums) {
  for (; rows >= M; rows -= M, x += M * stride_x, sums += M * stride_sums, next = nullptr)
    for (int column = 0; column < kGroup; column += kColumns)
      nibble_tile<M>(x, stride_x, w, column, next, sums, stride_sums);
  if constexpr (M > 1)
    if (rows > 0) nibble_rows<M - 1>(x, rows, stride_x, w, next, sums, stride_sums);
}

void nibbles(const uint8_t* x, int rows, size_t stride_x, const NibbleGroup& w, const uint8_t* next, int32_t* sums,
             size_t stride_sums) {
  nibble_rows<kFewRows>(x, rows, stride_x, w, next, sums, stride_sums);
}

// Where a panel has the four values of four columns, of the kBlock / 4 such places of a quad: `interleave` works in
// parts of 128 bits.
constexpr int panel_place(int columns) {
  constexpr int kParts = kBytes / kQuad;
  const int vectors = columns / (4 * kParts) * 4 + columns % 4, part = columns / 4 % kParts;
  return vectors * kBytes + part * kQuad;
}

void pack_nibbles(const NibbleGroup& w, int groups, int8_t* panel) {
  const size_t depth = static_cast<size_t>(w.blocks) * kNibbleBlock;
  if (groups < kBlock / kGroup) std::memset(panel, 0, depth * kBlock);
  for (int group = 0; group < groups; group++) {
    const uint8_t* line = w.values + group * depth * (kGroup / 2);
    int8_t* quads = panel;
    for (int block = 0; block < w.blocks; block++)
      for (int i = 0; i < kBlockLines; i++, line += kLine, quads += 8 * kBlock) {
        int8_t halves[2][kLine];
        for (int column = 0; column < kGroup; column += kColumns) {
          const BlockFactors factors(w.factors + (group * w.blocks + block) * kGroup + column);
          const Bytes both = load_bytes(line + column * 4);
          const auto value = [&](Bytes q) { return times_bytes(sub_bytes(q, factors.zeros), factors.steps); };
          store_bytes(halves[0] + column * 4, value(low_halves(both)));
          store_bytes(halves[1] + column * 4, value(high_halves(both)));
        }
        for (int half = 0; half < 2; half++)
          for (int part = 0; part < kGroup / 4; part++)
            store_quad(quads + half * 4 * kBlock + panel_place(group * (kGroup / 4) + part),
                       halves[half] + part * kQuad);
      }
  }
}

}  // namespace
}  // namespace edgelm
