// The arithmetic of the operators, with one implementation for each family of processors.
//
// Every function gives the same bits on every processor: integer sums are exact, and floating point follows the order
// of operations that is written here, with fused multiply-adds. Sources are compiled without contraction, so that the
// compiler fuses nothing else.
#pragma once

#include <cstddef>
#include <cstdint>

namespace edgelm {

// Columns of a matrix that are computed together. Rows of quantized values are padded to a multiple of kBlock.
constexpr int kBlock = 64;
// Up to kFewRows rows are multiplied with a matrix in its own order. For more rows, `columns` reorders strips of the
// matrix, at most kDeepestStrip deep. The deeper the strips, the less often sums are loaded and stored.
constexpr int kFewRows = 4, kDeepestStrip = 96;
// Lanes of the floating point functions. Lengths of float arrays are multiples of it.
constexpr int kLanes = 16;
// In attention, the integer weight of the largest score.
constexpr int kOne = 1 << 14;
// The step of a row quantized to 8 bits, in units of its largest magnitude. The bodies of the functions use it, too.
constexpr float kStep = 1.0f / 127;

inline constexpr int padded(int size, int step) { return (size + step - 1) / step * step; }

// The step of the low plane of a row quantized to 16 bits, in steps of the high plane.
constexpr float kLowStep = 1.0f / 256;

// How sums become results, and where these are written. p = float(sum - the column's correction) * the column's scale.
// With one plane, y[row][column] = p * the row's factor. With two planes, a row of y takes two rows of sums, high and
// low: y = (high p + low p * kLowStep) * the row's factor. If there are biases, the column's bias is added.
// Corrections, scales and biases are padded to whole blocks of columns. Rows of y are `stride` apart.
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

// Lines of memory to prefetch, `stride` bytes apart.
struct Ahead {
  const uint8_t* begin;
  size_t stride;
  int count;
};

// Weights of 4 bits: columns of a group; inputs of a block; bytes of a quad, which is 4 inputs of 4 columns, widened to
// int8; and lines of 64 bytes for the nibbles of a group in a block.
constexpr int kGroup = 16, kNibbleBlock = 32, kQuad = 16, kBlockLines = 4;

// A group of columns, cut into blocks along its depth.
// values: a block has kBlockLines lines of nibbles, then `planes` lines (at most 2) with one more bit of each weight.
// - Byte 4 c + i of nibble line j: input 8 j + i of column c in the lower half, input 8 j + 4 + i in the upper half.
// - Bit b of byte 4 c + i of a plane: input 4 b + i of column c.
// factors: s + z * 2^(4 - planes) for each block and column. A weight is (its 4 + planes bits - z) * s.
// Groups follow one another in memory.
struct NibbleGroup {
  const uint8_t *values, *factors;
  int blocks, planes;
};

// In attention, the contribution of a chunk of positions to each row: the weighted sum of its values (rows, width), the
// scale of that sum, the sum of the weights, and the largest score. Up to kLanes floats behind the largest scores may
// be read.
struct AttentionPart {
  int32_t* values;
  float *scales, *sums, *largest;
};
// The same for all chunks so far.
struct AttentionState {
  float *values, *sums, *largest;
};
// Rows of scores; rows of `values` and of `weights` are `stride` apart. A row sees the scores in [begin, end), and
// nothing if both are 0. Among rows that see something, `end` never decreases from one row to the next.
struct AttentionScores {
  float* values;         // overwritten
  const float* largest;  // kLanes for each row; the largest of them is that of `count` scores, a whole number of lanes
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

  // Quantize a row x of `size` floats, whose largest magnitude is r. Returns r, and writes q, `padded(size, kBlock)`
  // bytes: round(x / r / (1 / 127)) + offset, then 0 as padding. With two planes, the second one follows the first:
  // round((x / r - high * (1 / 127)) / (1 / 32512)) + offset, within the range of int8. For a row with NaN or infinity,
  // NaN is returned. The product is multiplied by the returned value, so it is NaN whatever q is. In the same way it is
  // 0 for a row of zeros.
  float (*quantize)(const float* x, int size, int planes, uint8_t* q);

  // The largest magnitude of `size` floats; NaN if one of them is NaN.
  float (*largest_magnitude)(const float* x, int size);

  // total = x + skip, y = total * (1 / sqrt(m + epsilon)) * weight, from left to right. m is the mean of the squares of
  // total. Their sum has 16 partial sums, one for each lane, by fused multiply-adds; lanes 8 apart are added first,
  // then 4, 2 and 1 apart; the result is divided by the number of values. Rows have `size` values; padded(size, kLanes)
  // values of y are written. Meanwhile, the memory `next` values behind x, skip and total is prefetched.
  void (*norm)(const float* x, const float* skip, const float* weight, float epsilon, int size, int next, float* total,
               float* y);
  // The same for x alone, without skip.
  void (*plain_norm)(const float* x, const float* weight, float epsilon, int size, float* y);
  // y = gate * s * up, from left to right, where s = (gate < 0 ? e : 1) / (1 + e), e = exp(-|gate|): silu.
  // Rows have `size` values; padded(size, kLanes) values of y are written. The memory `next` values behind gate and up
  // is prefetched.
  void (*gate)(const float* gate, const float* up, int size, int next, float* y);
  // The same with the factors s of GELU, where x = gate. In the exact form, s is the cumulative normal distribution at
  // x; in the tanh form, it is the s of silu for
  // sqrt(8 / pi) * (x + 0.044715 * x^3) in place of x. The errors are a few units in the last place of gate * up.
  void (*tanh_gelu_gate)(const float* gate, const float* up, int size, int next, float* y);
  void (*gelu_gate)(const float* gate, const float* up, int size, int next, float* y);

  // sums[row][column] = sum over k of x[row][k] * w[k][column], added to the earlier sums unless `first`. The columns
  // of a block are in the implementation's own order, which `scale_parts` undoes. Prefetches `next`, which is read next
  // and as large as w; null: nothing.
  // x: rows of `stride_x` bytes, of which padded(depth, 4) are read; w: depth rows of `width` values; sums: rows of
  // `stride_sums`, at least padded(width, kBlock), all of which may be written.
  void (*columns)(const uint8_t* x, int rows, size_t stride_x, const int8_t* w, int depth, size_t width, bool first,
                  const int8_t* next, int32_t* sums, size_t stride_sums);

  // sums[row][n] = sum over k of x[row][k] * w[n][k], for n in [0, count).
  // x: any number of rows of `stride_x` bytes; w: rows of `depth` values, a whole number of blocks. Some rows of w
  // behind the last one are prefetched.
  void (*rows)(const uint8_t* x, int rows, size_t stride_x, const int8_t* w, int depth, int count, int32_t* sums,
               size_t stride_sums);

  // Reorder columns [column, column + kBlock) of w, depth rows of `width` values, into a panel of padded(depth, 4) *
  // kBlock bytes, in the order that `panel` reads. Missing columns are 0.
  void (*pack_columns)(const int8_t* w, int depth, size_t width, size_t column, int8_t* panel);
  // The same for the transposed matrix: w has `count` <= kBlock rows of `depth` values.
  void (*pack_rows)(const int8_t* w, int depth, int count, int8_t* panel);

  // The product of any number of rows, with all their planes, and the first `columns` columns of a panel of `depth`
  // rows. Meanwhile the lines of `ahead` are prefetched.
  void (*panel)(const uint8_t* x, int rows, size_t stride_x, const int8_t* panel, int depth, int columns, Ahead ahead,
                const Result& result);
  // The same, from sums that are already computed; their rows are `stride_sums` apart, a whole number of lanes.
  void (*scale)(const int32_t* sums, size_t stride_sums, int rows, int columns, const Result& result);
  // The same, from the sum of several arrays of sums that `columns` computed.
  void (*scale_parts)(const int32_t* const* sums, int parts, size_t stride_sums, int rows, int columns,
                      const Result& result);

  // Rotate the first 2 * half values of a head in place: value i with value half + i, by an angle's cosine and sine.
  void (*rotate)(float* x, const float* cosines, const float* sines, int half);
  // y[i] = x[i] * factors[i], rounded to even, within the range of int8.
  void (*to_int8)(const float* x, const float* factors, int size, int8_t* y);
  // y[i] = x[i] * factors[i] * (127 / r), from left to right, rounded to even; r is the largest magnitude of x[i] *
  // factors[i]. Returns r / 127. If r is below 2^-100, y and the returned value are 0.
  float (*to_scaled_int8)(const float* x, const float* factors, int size, int8_t* y);
  // q[i] = round(x[i] * (limit / r)), where r is the largest magnitude. Returns r / limit. If `size` is odd, a 0
  // follows.
  float (*to_int16)(const float* x, int size, int limit, int16_t* q);

  // Reorder keys or values (count, size), rows `stride` apart, into columns for `pairs`. The depth of a column is the
  // size of a key, or for values the number of positions. Missing entries are 0. Both functions prefetch `next`, which
  // is read next and as large as x.
  void (*key_pairs)(const int8_t* x, int count, int size, int stride, const int8_t* next, int16_t* columns);
  void (*value_pairs)(const int8_t* x, int count, int size, int stride, const int8_t* next, int16_t* columns);

  // The same for floats. Each row is rounded to integers as by `to_int16`, and scales[row] is the scale of these
  // integers. padded(count, kLanes) scales are written, with 0 as padding.
  void (*float_key_pairs)(const float* x, int count, int size, int limit, const float* next, int16_t* columns,
                          float* scales);
  void (*float_value_pairs)(const float* x, int count, int size, int limit, const float* next, int16_t* columns,
                            float* scales);

  // sums[row][column] = sum over k of a[row][k] * columns[k][column], for k in [0, 2 * depth): `depth` pairs. columns:
  // groups of kLanes columns, one behind the other; a group has `stride` pairs of each of its columns.
  void (*pairs)(const int16_t* a, int rows, size_t stride_a, const int16_t* columns, int stride, int depth, int count,
                int32_t* sums, size_t stride_sums);

  // The same, written as scores: sums times key_scales[column], or the sums themselves if key_scales is null.
  // largest[row][lane] is the largest score of the columns lane, lane + kLanes, and so on.
  void (*scores)(const int16_t* a, int rows, size_t stride_a, const int16_t* columns, int depth, int count,
                 const float* key_scales, float* scores, size_t stride_scores, float* largest);

  // For each row of scores s, where `largest` is the largest s[i] times factor:
  // w[i] = round(kOne * 2^(s[i] * factor - largest)) for i in [begin, end). All others of the `padded(count, 2 *
  // kLanes)` weights are 0. part.sums gets the sum of w, part.scales 1. A row that sees nothing has the sum 0 and the
  // largest score -infinity. factor is at least 0.
  void (*weights)(const AttentionScores& scores, int rows, int count, const AttentionPart& part);
  // The same for values that have scales of their own:
  // - p[i] = 2^(s[i] * factor - largest), with a fused multiply-add, accurate to 18 bits and at least 2^-100. part.sums
  //   gets the sum of p: 16 partial sums, added as in `norm`.
  // - v[i] = p[i] * value_scales[i].
  // - scale, which part.scales gets, is the larger of max(v) * (1 / 32767) and sum(v) * (1 / limit). This sum is
  //   computed with fused multiply-adds.
  // - w[i] = round(v[i] * (1 / scale)). So a weight fits into 16 bits, and the sum of the weights is at most limit plus
  //   half their number. If scale is below 2^-126, w is 0.
  void (*scaled_weights)(const AttentionScores& scores, int rows, int count, const float* value_scales, float limit,
                         const AttentionPart& part);

  // Merge a chunk's part into the state of the earlier chunks. m is the larger of their two largest scores; p = 2^(the
  // state's largest - m) and q = 2^(the part's largest - m), computed as in `weights` and at least 2^-100.
  // values = values * p + part values * (q * part scale), and the same for the sums, without a scale; both with a
  // product and a fused multiply-add. width: a multiple of kLanes. A part whose sum is 0 adds nothing.
  void (*merge)(const AttentionState& state, const AttentionPart& part, int rows, int width);
  // The same for a chunk whose weighted sum is not yet computed: it is computed here, as by `pairs`, in place of
  // part.values.
  void (*merge_values)(const AttentionState& state, const AttentionPart& part, const int16_t* weights, int rows,
                       size_t stride_weights, const int16_t* columns, int stride, int depth, int width);
  // y[i] = a[i] / divisor * factors[i].
  void (*divide)(const float* a, float divisor, const float* factors, int size, float* y);

  // sums[row][column] = sum over k of x[row][k] * w[k][column], for the columns of a group. Prefetches `next`, which is
  // read next and as large as the group's values; null: nothing.
  // x: rows of `stride_x` bytes, of which blocks * kNibbleBlock are read; sums: rows of `stride_sums`, at least kGroup.
  void (*nibbles)(const uint8_t* x, int rows, size_t stride_x, const NibbleGroup& w, const uint8_t* next, int32_t* sums,
                  size_t stride_sums);
  // Reorder `groups` <= kBlock / kGroup groups into a panel of blocks * kNibbleBlock * kBlock bytes. Missing columns
  // are 0.
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
