// The arithmetic of the operators, with one implementation for each family of processors.
//
// Every function gives the same bits on every processor: integer sums are exact, and floating point follows the order
// of operations that is written here, with fused multiply-adds. Sources are compiled without contraction, so that the
// compiler fuses nothing else.
#pragma once

#include <cstddef>
#include <cstdint>

namespace edgelm {

// Columns of a matrix that are computed together, and the length to which rows of quantized values are padded.
constexpr int kBlock = 64;
// Up to so many rows are multiplied with a matrix as it stands. For more, `columns` arranges strips of it, at most so
// deep: the deeper, the fewer times are sums loaded and stored.
constexpr int kFewRows = 4, kDeepestStrip = 96;
// Lanes of the floating point functions. Lengths of float arrays are multiples of it.
constexpr int kLanes = 16;
// In attention, the integer weight of the largest score.
constexpr int kOne = 1 << 14;
// A value of a row that is quantized to 8 bits, as the bodies of the functions scale it.
constexpr float kStep = 1.0f / 127;

inline constexpr int padded(int size, int step) { return (size + step - 1) / step * step; }

// The step of the low plane of a row quantized to 16 bits, in steps of the high plane.
constexpr float kLowStep = 1.0f / 256;

// Where sums go. With p = float(sum - correction of the column) * scale of the column, y[row][column] = p * factor of
// the row. Where rows have two planes, each row of y takes two rows of sums, high and low: y = (p + low p * kLowStep) *
// factor. A column's bias, where there are biases, is added to that. There are corrections, scales and biases for whole
// blocks of columns; y has rows of `stride`.
struct Result {
  const int32_t* corrections;
  const float* scales;
  const float* factors;
  const float* biases;  // or null
  float* y;
  size_t stride;
  int planes;

  // row: of y.
  Result from(int row, int column) const {
    return {corrections + column,      scales + column, factors + row, biases == nullptr ? nullptr : biases + column,
            y + row * stride + column, stride,          planes};
  }
};

// Lines of memory that will be needed, `stride` bytes apart.
struct Ahead {
  const uint8_t* begin;
  size_t stride;
  int count;
};

// Weights of 4 bits: columns of a group, inputs of a block, bytes of 16 weights, and lines of 64 bytes for a group's
// weights in a block.
constexpr int kGroup = 16, kNibbleBlock = 32, kQuad = 16, kBlockLines = 4;

// A group of columns, with as many blocks as its depth has. values: for each block kBlockLines lines of nibbles, and
// `planes` lines, up to 2, of one bit more each; byte 4 c + i of line j of nibbles: of column c the inputs 8 j + i, in
// the lower half, and 8 j + 4 + i; bit b of byte 4 c + i of a plane: of the input 4 b + i. factors: for each block and
// column s + z * 2^(4 - planes); a weight is (its 4 + planes bits - z) * s. Groups lie one behind the other.
struct NibbleGroup {
  const uint8_t *values, *factors;
  int blocks, planes;
};

// In attention, the contribution of a chunk of positions to each row: the weighted sum of its values (rows, width), the
// scale of that sum, the sum of the weights, and the largest score. kLanes may be read behind the largest scores.
struct AttentionPart {
  int32_t* values;
  float *scales, *sums, *largest;
};
// The same for all chunks so far.
struct AttentionState {
  float *values, *sums, *largest;
};
// Rows of scores, `stride` apart as their weights are: each sees those in [begin, end), nothing where both are 0;
// a row no less at the end than those before it.
struct AttentionScores {
  float* values;         // overwritten
  const float* largest;  // of each row kLanes, of which the largest is that of `count` scores, a whole number of lanes
  int16_t* weights;
  size_t stride;
  const int *begin, *end;
  const float* factors;
};

struct Arithmetic {
  // Instruction sets, as Linux names them, joined by "+".
  const char* name;
  // The offset that `quantize` adds to each value; a product is sum(x * w) - offset * sum(w).
  int offset;
  // Rows that `panel` computes together; it is fastest with a multiple of them.
  int panel_rows;

  // Quantize a row x of `size` floats: the largest magnitude r is returned, and q = round(x / r / (1 / 127)) + offset
  // written, `padded(size, kBlock)` bytes; padding is 0. For a row with NaN or infinity, NaN is returned: the product
  // is multiplied by it, so it is NaN whatever q is, as it is 0 for a row of zeros. With two planes, the second one,
  // behind the first, is round((x / r - high * (1 / 127)) / (1 / 32512)) + offset, within the range of int8.
  float (*quantize)(const float* x, int size, int planes, uint8_t* q);

  // Of `size` floats; NaN if one of them is.
  float (*largest_magnitude)(const float* x, int size);

  // total = x + skip, y = total * (1 / sqrt(m + epsilon)) * weight, from left to right, where m is the mean of the
  // squares of total: their sum, of 16 partial sums by fused additions, lane by lane, added 8 lanes apart, then 4, 2,
  // 1, divided by their number. Rows of `size`; of y padded(size, kLanes) are written. What lies `next` values behind
  // x, skip and total is asked for meanwhile.
  void (*norm)(const float* x, const float* skip, const float* weight, float epsilon, int size, int next, float* total,
               float* y);
  // The same of x alone.
  void (*plain_norm)(const float* x, const float* weight, float epsilon, int size, float* y);
  // y = gate * s * up, from left to right, where s = (gate < 0 ? e : 1) / (1 + e), e = exp(-|gate|): silu.
  // Rows of `size`; of y padded(size, kLanes) are written. What lies `next` values behind gate and up is asked for.
  void (*gate)(const float* gate, const float* up, int size, int next, float* y);
  // The same with other shares s: that of sqrt(8 / pi) * (x + 0.044715 * x^3) for x, GELU as tanh has it, and GELU's
  // own, of the normal distribution below x. Their errors are a few units in the last place of gate * up.
  void (*tanh_gelu_gate)(const float* gate, const float* up, int size, int next, float* y);
  void (*gelu_gate)(const float* gate, const float* up, int size, int next, float* y);

  // sums[row][column] = sum over k of x[row][k] * w[k][column], added to what is there unless `first`. Blocks of
  // columns are in an order of their own, which `scale_parts` undoes. Asks for the memory of `next`, as much as w has,
  // which is read next; null: nothing is.
  // x: rows of `stride_x` bytes, of which padded(depth, 4) are read; w: depth rows of `width` values; sums: rows of
  // `stride_sums`, at least padded(width, kBlock), all of which may be written.
  void (*columns)(const uint8_t* x, int rows, size_t stride_x, const int8_t* w, int depth, size_t width, bool first,
                  const int8_t* next, int32_t* sums, size_t stride_sums);

  // sums[row][n] = sum over k of x[row][k] * w[n][k], for n in [0, count).
  // x: any number of rows of `stride_x` bytes; w: rows of `depth` values, a whole number of blocks. Some rows behind
  // the last one are asked for.
  void (*rows)(const uint8_t* x, int rows, size_t stride_x, const int8_t* w, int depth, int count, int32_t* sums,
               size_t stride_sums);

  // Arrange columns [column, column + kBlock) of w, depth rows of `width` values, as a panel of padded(depth, 4) *
  // kBlock bytes, in the order that `panel` reads. Missing columns are 0.
  void (*pack_columns)(const int8_t* w, int depth, size_t width, size_t column, int8_t* panel);
  // The same for the transposed matrix: w has `count` <= kBlock rows of `depth` values.
  void (*pack_rows)(const int8_t* w, int depth, int count, int8_t* panel);

  // The product of any number of rows, with all their planes, and the first `columns` of a panel of `depth` rows.
  // Meanwhile the lines of `ahead` are prefetched.
  void (*panel)(const uint8_t* x, int rows, size_t stride_x, const int8_t* panel, int depth, int columns, Ahead ahead,
                const Result& result);
  // The same of sums, rows of `stride_sums`, a whole number of blocks.
  void (*scale)(const int32_t* sums, size_t stride_sums, int rows, int columns, const Result& result);
  // The same of the sum of several sums that `columns` computed.
  void (*scale_parts)(const int32_t* const* sums, int parts, size_t stride_sums, int rows, int columns,
                      const Result& result);

  // Rotate the first 2 * half values of a head in place: value i with value half + i, by an angle's cosine and sine.
  void (*rotate)(float* x, const float* cosines, const float* sines, int half);
  // y[i] = x[i] * factors[i], rounded to even, within the range of int8.
  void (*to_int8)(const float* x, const float* factors, int size, int8_t* y);
  // y[i] = x[i] * factors[i] * (127 / r), from left to right, rounded to even; r, the largest magnitude of x[i] *
  // factors[i]. Returns r / 127. Where r is below 2^-100, y is 0, and so is what is returned.
  float (*to_scaled_int8)(const float* x, const float* factors, int size, int8_t* y);
  // q[i] = round(x[i] * (limit / r)), r the largest magnitude; what is behind them up to an even number is 0. Returns
  // r / limit.
  float (*to_int16)(const float* x, int size, int limit, int16_t* q);

  // Arrange keys and values (count, size), rows `stride` apart, as columns for `pairs`: the depth is a key's size, or
  // the number of positions. Missing ones are 0. Both prefetch `next`, as much memory as x has, which is read next.
  void (*key_pairs)(const int8_t* x, int count, int size, int stride, const int8_t* next, int16_t* columns);
  void (*value_pairs)(const int8_t* x, int count, int size, int stride, const int8_t* next, int16_t* columns);

  // The same of floats, each row rounded as by `to_int16` to integers; scales[row], padded(count, kLanes) of them with
  // 0, is what these are multiplied by.
  void (*float_key_pairs)(const float* x, int count, int size, int limit, const float* next, int16_t* columns,
                          float* scales);
  void (*float_value_pairs)(const float* x, int count, int size, int limit, const float* next, int16_t* columns,
                            float* scales);

  // sums[row][column] = sum over k of a[row][k] * columns[k][column], for k in [0, 2 * depth): as many pairs as depth.
  // columns: groups of kLanes columns, one behind the other, each with `stride` times their pairs.
  void (*pairs)(const int16_t* a, int rows, size_t stride_a, const int16_t* columns, int stride, int depth, int count,
                int32_t* sums, size_t stride_sums);

  // The same as scores: sums times key_scales[column], null for integers that are scores already. largest[row][lane] is
  // that of the columns lane, lane + kLanes, and so on.
  void (*scores)(const int16_t* a, int rows, size_t stride_a, const int16_t* columns, int depth, int count,
                 const float* key_scales, float* scores, size_t stride_scores, float* largest);

  // For each row of scores s: w[i] = round(kOne * 2^(s[i] * factor - largest)) for i in [begin, end), largest being
  // that of s[i], times factor; all others of `padded(count, 2 * kLanes)` are 0. part.sums gets the sum of w,
  // part.scales 1. A row that sees nothing has a sum of 0, and -infinity is its largest. 0 <= factor.
  void (*weights)(const AttentionScores& scores, int rows, int count, const AttentionPart& part);
  // The same for values of scales of their own: with p[i] = 2^(s[i] * factor - largest), by a fused addition, to 18
  // bits and at least 2^-100, whose sum (16 partial sums, added as in `norm`) part.sums gets, and v[i] = p[i] *
  // value_scales[i]: w[i] = round(v[i] * (1 / scale)), where scale, which part.scales gets, is the larger of max(v) *
  // (1 / 32767) and sum(v) * (1 / limit), a sum by fused additions: w fits into 16 bits, and its sum is at most limit
  // and a half of their number. Where scale is below 2^-126, w is 0.
  void (*scaled_weights)(const AttentionScores& scores, int rows, int count, const float* value_scales, float limit,
                         const AttentionPart& part);

  // What a chunk adds to rows, added to what is there of earlier ones. With the larger of the two largest scores, and p
  // and q = 2^(largest - that one), as `weights` computes it, 2^-100 below, of earlier chunks and of this one:
  // values = values * p + part values * (q * part scale), and the same of the sums, without a scale; by a product and
  // a fused addition. width: a multiple of kLanes. A part whose sum is 0 adds nothing.
  void (*merge)(const AttentionState& state, const AttentionPart& part, int rows, int width);
  // The same of a chunk whose values, in place of the part's, are still to be multiplied, as by `pairs`.
  void (*merge_values)(const AttentionState& state, const AttentionPart& part, const int16_t* weights, int rows,
                       size_t stride_weights, const int16_t* columns, int stride, int depth, int width);
  // y[i] = a[i] / divisor * factors[i].
  void (*divide)(const float* a, float divisor, const float* factors, int size, float* y);

  // sums[row][column] = sum over k of x[row][k] * w[k][column], for the columns of a group. Asks for the memory of
  // `next`, as much as the group's values have, which is read next; null: nothing is.
  // x: rows of `stride_x` bytes, of which blocks * kNibbleBlock are read; sums: rows of `stride_sums`, at least kGroup.
  void (*nibbles)(const uint8_t* x, int rows, size_t stride_x, const NibbleGroup& w, const uint8_t* next, int32_t* sums,
                  size_t stride_sums);
  // Arrange `groups` <= kBlock / kGroup groups as a panel of blocks * kNibbleBlock * kBlock bytes. Missing columns are
  // 0.
  void (*pack_nibbles)(const NibbleGroup& w, int groups, int8_t* panel);
};

// The fastest implementation for this processor, or null if there is none.
const Arithmetic* arithmetic();

extern const Arithmetic kAvx512;
extern const Arithmetic kAvxVnni;
extern const Arithmetic kAvx2;
extern const Arithmetic kNeonDot;
extern const Arithmetic kNeon;

}  // namespace edgelm
