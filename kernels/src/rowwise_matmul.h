// edgelm::RowwiseMatMul and its variants with a norm or a gate in front of the product: a row of activations is
// computed, quantized by itself to 8 bits, or to 16 as two planes of 8, and multiplied with an int8 matrix, or one
// whose int8 values are stored in 4 to 6 bits (docs/bundle.md). Quantization and product have the bits of the
// functions' bodies.
#pragma once

#include <mutex>

#include "arithmetic.h"
#include "operator.h"

namespace edgelm {

// planes: how many a quantized row has, of 8 bits each. biased: the last input is a bias for each column. nibbles:
// weights have 4 to 6 bits and are two inputs, groups and the factors of their blocks.
struct Form {
  int planes = 1;
  bool biased = false, nibbles = false;
};

// A matrix (depth, columns) of weights of 4 to 6 bits, as two constant inputs: groups of columns (groups, lines, 64),
// where the number of lines determines the number of bits, and the factors of their blocks (groups, blocks, kGroup).
class Nibbles {
 public:
  Nibbles() = default;
  Nibbles(const Info& info, size_t input, int depth, int columns);

  explicit operator bool() const { return values_ != nullptr; }
  NibbleGroup group(int index) const {
    return {values_ + index * group_size(), factors_ + static_cast<size_t>(index) * blocks_ * kGroup, blocks_, planes_};
  }
  // The bytes of a group's values, and their number of 64-byte lines.
  size_t group_size() const { return static_cast<size_t>(lines()) * kCacheLine; }
  int lines() const { return blocks_ * (kBlockLines + planes_); }
  int depth() const { return blocks_ * kNibbleBlock; }
  // A weight, as int8.
  int value(int row, int column) const;

 private:
  static constexpr int kCacheLine = 64, kMostPlanes = 2;
  const uint8_t *values_ = nullptr, *factors_ = nullptr;
  int blocks_ = 0, planes_ = 0;
};

class RowwiseMatMul {
 public:
  // threads: the session's number of threads.
  RowwiseMatMul(const Info& info, int threads, Form form = {}) : RowwiseMatMul(info, threads, form, 1, false) {}

  void compute(Call& call) const;

 protected:
  // weights: the index of the input that is the matrix. Scales follow it, then biases. transposed: the matrix is
  // (columns, depth) instead of (depth, columns).
  RowwiseMatMul(const Info& info, int threads, Form form, size_t weights, bool transposed);

  // The product of rows that are made from rows of x, which have `width` values. make(row, next, own) returns the
  // `depth` values of a row. next: how many rows further the thread's next row is, 0 if there is none. own: memory for
  // the values.
  template <typename Make>
  void multiply(Call& call, const Tensor& x, int width, Make make) const;

  const Arithmetic& arithmetic_;
  int depth_, columns_;

 private:
  // Quantized rows. A row of x has one for each plane, one behind the other.
  struct Rows {
    const uint8_t* values;
    int count;
    size_t stride;
  };

  // Reads the int8 matrix and its shape.
  void read_matrix(const Info& info, size_t weights);
  void correct() const;
  void correct_nibbles() const;
  // Whether `rows` quantized rows are multiplied without panels.
  bool is_direct(int rows) const;
  // The depth of the strips in which `by_depth` reads the matrix, for `rows` quantized rows and `parts` threads.
  int strip_depth(int rows, int parts) const;
  template <typename MakeRow>
  void by_depth(Call& call, const Rows& x, MakeRow make_row, const Result& y) const;
  template <typename MakeRow>
  void by_groups(Call& call, const Rows& x, MakeRow make_row, const Result& y) const;
  void by_columns(Call& call, const Rows& x, const Result& y) const;
  void by_panels(Call& call, const Rows& x, const Result& y) const;

  // The lines of memory that are read for a block of columns. The lines of the next block are `block` bytes further on.
  struct Lines {
    const uint8_t* begin;
    size_t block, stride;
    int count;
  };
  Lines lines_of_blocks() const;
  // Reorders columns begin to end - 1 into a panel.
  void pack(int begin, int end, int8_t* panel) const;

  bool transposed_;
  int threads_, planes_;
  const int8_t* weights_ = nullptr;
  Nibbles nibbles_;  // in place of weights_
  // The offset times the sum of each column. Computed at the first call, so that loading a session touches no weights.
  mutable std::vector<int32_t> corrections_;
  mutable std::once_flag corrected_;
  std::vector<float> scales_, biases_;  // padded to whole blocks, like the corrections; no biases: empty
  std::shared_ptr<Successor> successor_ = std::make_shared<Successor>();
};

class RowwiseMatMulTransposed : public RowwiseMatMul {
 public:
  RowwiseMatMulTransposed(const Info& info, int threads, Form form = {})
      : RowwiseMatMul(info, threads, form, 1, true) {}
};

// The product of a residual sum's norm. The sum is an output, too.
class NormedRowwiseMatMul : public RowwiseMatMul {
 public:
  NormedRowwiseMatMul(const Info& info, int threads, Form form = {}) : NormedRowwiseMatMul(info, threads, form, 2) {}

  void compute(Call& call) const;

 protected:
  // norm: the index of the input that is the norm's weights. The matrix follows it.
  NormedRowwiseMatMul(const Info& info, int threads, Form form, size_t norm);

  const float* norm_weights(const Info& info, size_t input) const;
  // add(skip, own) returns the row that is added to a row of x, made from a row of skip. own: memory for a row.
  template <typename Add>
  void compute(Call& call, Add add) const;

  float epsilon_;

 private:
  const float* norm_;
};

// The same, where the residual sum is of x and another row's norm.
class PostNormedRowwiseMatMul : public NormedRowwiseMatMul {
 public:
  PostNormedRowwiseMatMul(const Info& info, int threads, Form form = {});

  void compute(Call& call) const;

 private:
  const float* post_;
};

// The product of silu(the first half of a row) * the second half.
class GatedRowwiseMatMul : public RowwiseMatMul {
 public:
  GatedRowwiseMatMul(const Info& info, int threads, Form form = {})
      : GatedRowwiseMatMul(info, threads, form, arithmetic()->gate) {}

  void compute(Call& call) const;

 protected:
  using Gate = decltype(Arithmetic::gate);
  GatedRowwiseMatMul(const Info& info, int threads, Form form, Gate gate)
      : RowwiseMatMul(info, threads, form), gate_(gate) {}

 private:
  Gate gate_;
};

// The same with GELU.
class GeluGatedRowwiseMatMul : public GatedRowwiseMatMul {
 public:
  GeluGatedRowwiseMatMul(const Info& info, int threads, Form form = {});
};

// One of the above in one form.
template <typename Product, int Planes, bool Biased, bool OfNibbles>
class Formed : public Product {
 public:
  Formed(const Info& info, int threads) : Product(info, threads, {Planes, Biased, OfNibbles}) {}
};

// The embeddings of tokens: the inputs of a token's column in a matrix of nibbles, times the column's scale.
class NibbleEmbedding {
 public:
  NibbleEmbedding(const Info& info, int threads);

  void compute(Call& call) const;

 private:
  int depth_, columns_;
  Nibbles nibbles_;
  const float* scales_;
};

}  // namespace edgelm
