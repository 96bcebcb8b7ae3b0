// edgelm::RowwiseMatMul and edgelm::RowwiseMatMulTransposed: a row of activations is quantized by itself to 8 bits and
// multiplied with an int8 matrix. Bit for bit what the functions' bodies compute (docs/bundle.md).
#pragma once

#include <mutex>

#include "arithmetic.h"
#include "operator.h"

namespace edgelm {

class RowwiseMatMul {
 public:
  // transposed: the matrix is (columns, depth) instead of (depth, columns). threads: of the session.
  RowwiseMatMul(const Info& info, bool transposed, int threads);

  void compute(Call& call) const;

 private:
  struct Rows {
    const uint8_t* values;
    const float* factors;
    int count;
    size_t stride;
  };

  void correct() const;
  void by_depth(Call& call, const Rows& x, float* y) const;
  void by_columns(Call& call, const Rows& x, float* y) const;
  void by_panels(Call& call, const Rows& x, float* y) const;
  void finish(const Rows& x, int row, int count, const int32_t* sums, size_t stride, int begin, int end,
              float* y) const;

  const Arithmetic& arithmetic_;
  bool transposed_;
  int threads_;
  int depth_, columns_;
  const int8_t* weights_;
  // Offset * the sum of each column, summed up at the first call: a session that loads touches no weights.
  mutable std::vector<int32_t> corrections_;
  mutable std::once_flag corrected_;
  std::vector<float> scales_;
};

}  // namespace edgelm
