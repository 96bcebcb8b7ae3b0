// What the operators compute with, one implementation for each family of processors.
//
// Every function gives the same bits on every processor: integer sums are exact, and floating point follows one order
// of operations, written down here, whose multiply-adds are fused. Sources are compiled without contraction, so that a
// compiler adds no fusing of its own.
#pragma once

#include <cstddef>
#include <cstdint>

namespace edgelm {

// Columns of a matrix that are computed together, and the length to which rows of quantized values are padded.
constexpr int kBlock = 64;
// Rows that `rows` takes at most.
constexpr int kFewRows = 4;
// Lanes of the floating point functions: lengths of float arrays are multiples of it.
constexpr int kLanes = 16;

inline constexpr int padded(int size, int step) { return (size + step - 1) / step * step; }

struct Arithmetic {
  // Instruction sets, as Linux names them, joined by "+".
  const char* name;
  // What `quantize` adds to each value, so that a product is sum(x * w) - offset * sum(w).
  int offset;
  // Rows that `panel` takes together: of a multiple of them it makes the most.
  int panel_rows;

  // Quantize a row x of `size` floats: the largest magnitude r is returned, and q = round(x / r / (1 / 127)) + offset
  // written, `padded(size, kBlock)` bytes; padding is 0. A row of zeros, or with a value that is no number, gives what
  // the product multiplies by r, whatever q is.
  float (*quantize)(const float* x, int size, uint8_t* q);

  // sums[row][column] = sum over k of x[row][k] * w[k][column].
  // x: rows of `stride_x` bytes, of which padded(depth, 4) are read; w: depth rows of `width` values; sums: rows of
  // `stride_sums`, at least padded(width, kBlock), all of which may be written.
  void (*columns)(const uint8_t* x, int rows, size_t stride_x, const int8_t* w, int depth, size_t width, int32_t* sums,
                  size_t stride_sums);

  // sums[row][n] = sum over k of x[row][k] * w[n][k], for n in [0, count).
  // x: at most kFewRows rows; w: rows of `depth` values, a whole number of
  // blocks.
  void (*rows)(const uint8_t* x, int rows, size_t stride_x, const int8_t* w, int depth, int count, int32_t* sums,
               size_t stride_sums);

  // Arrange columns [column, column + kBlock) of w, depth rows of `width` values, as a panel of padded(depth, 4) *
  // kBlock bytes, in the order that `panel` reads. What is missing is 0.
  void (*pack_columns)(const int8_t* w, int depth, size_t width, size_t column, int8_t* panel);
  // The same of the transposition of w, `count` <= kBlock rows of `depth` values.
  void (*pack_rows)(const int8_t* w, int depth, int count, int8_t* panel);

  // sums[row][column] of kBlock columns, for any number of rows, from a panel of `depth` rows.
  void (*panel)(const uint8_t* x, int rows, size_t stride_x, const int8_t* panel, int depth, int32_t* sums,
                size_t stride_sums);

  // y[row][column] = (float(sum - correction of the column) * scale of the column) * factor of the row.
  void (*scale)(const int32_t* sums, size_t stride_sums, const int32_t* corrections, const float* scales,
                const float* factors, int rows, int columns, float* y, size_t stride_y);

  // c[row][column] = a[row][0] * b[0][column], then fused additions of a[row][k] * b[k][column] for k = 1, 2, ...
  // columns: a multiple of kLanes.
  void (*product)(const float* a, size_t stride_a, int rows, int depth, const float* b, size_t stride_b, int columns,
                  float* c, size_t stride_c);

  // Rotate the first 2 * half values of a head in place: value i with value half + i, by an angle's cosine and sine.
  void (*rotate)(float* x, const float* cosines, const float* sines, int half);
  // y[i] = x[i] * factors[i], rounded to even, within the range of int8.
  void (*to_int8)(const float* x, const float* factors, int size, int8_t* y);
  // Both ask for the memory behind x, as much as x is, which is read next.
  // int8 (count, size) to float (size, padded(count)): transposed. Columns beyond count are 0. stride: of the result.
  void (*widen_transposed)(const int8_t* x, int count, int size, float* y, size_t stride);
  // int8 (count, size) to float (count, stride); columns beyond size are 0.
  void (*widen)(const int8_t* x, int count, int size, float* y, size_t stride);

  // Turn scores s[begin, end) into exp(s - largest), all others of `padded(count, kLanes)` into 0. Returns their sum:
  // that of 16 partial sums, lane by lane, added pairwise (8 apart, 4, 2, 1). begin < end.
  float (*exponentials)(float* s, int begin, int end, int count, float* largest);
  // exp(x) as above, for one number.
  float (*exponential)(float x);

  // a = a * p + b * q, by a product and a fused addition, `count` of them, a multiple of kLanes.
  void (*merge)(float* a, float p, const float* b, float q, int count);
};

// The fastest implementation for this processor, or null if there is none.
const Arithmetic* arithmetic();

extern const Arithmetic kAvx512;
extern const Arithmetic kAvxVnni;
extern const Arithmetic kAvx2;
extern const Arithmetic kNeonDot;
extern const Arithmetic kNeon;

}  // namespace edgelm
