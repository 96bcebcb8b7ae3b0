#include "rowwise_matmul.h"

#include <algorithm>
#include <atomic>
#include <functional>
#include <limits>
#include <numeric>

namespace edgelm {

namespace {

// Up to this number of quantized rows, the matrix is read from end to end. For more rows, it is worth reordering it
// into panels.
constexpr int kMostDirect = 16, kMostDirectNibbles = 8;
// The most sums of a thread that reads the matrix from end to end: 2 MiB, which the thread keeps.
constexpr int64_t kMostSums = 1 << 19;
// Like kMostDirect, for a transposed matrix. Its panels cost more: a transposition.
constexpr int kMostDirectTransposed = 24;
// Depth of a strip of the matrix, which a thread takes as a whole. Deeper ones are multiples of it.
constexpr int kStripDepth = 32;
// The least depth that a thread adds up, and the columns of a task if a product is divided by columns.
constexpr int kLeastDepth = 64;
constexpr int kTaskColumns = 256;
// Rows that a thread makes one after the other. Their factors take 64 bytes, the size of a cache line, so that two
// threads seldom write to the same line.
constexpr int kTaskRows = 16;
// The least number of rows that are multiplied by a panel at once. The fewer rows, the more evenly additions are mixed
// with prefetches of the next panel and with writes.
constexpr int kRowsAtOnce = 6;
// The greatest depth and number of columns of a matrix: sums of products, and of a column's weights times the offset,
// fit into 32 bits.
constexpr int kMostDepth = 1 << 16, kMostColumns = 1 << 28;

int pieces(int size, int piece) { return (size + piece - 1) / piece; }

int32_t* integers(float* memory) { return reinterpret_cast<int32_t*>(memory); }

}  // namespace

RowwiseMatMul::RowwiseMatMul(const Info& info, int threads, Form form, size_t weights, bool transposed)
    : arithmetic_(*arithmetic()), transposed_(transposed), threads_(threads), planes_(form.planes) {
  if (!form.nibbles) read_matrix(info, weights);
  const size_t behind = weights + (form.nibbles ? 2 : 1);
  const Tensor scales = info.constant(behind);
  if (form.nibbles) {
    require(scales.shape.size() == 1, "a matrix has a scale for each column");
    depth_ = within(info.integer("depth", 0), 1, kMostDepth, "the depth of a product");
    columns_ = within(scales.shape[0], 1, kMostColumns, "the columns of a product");
    nibbles_ = Nibbles(info, weights, depth_, columns_);
  }
  require(scales.shape == std::vector<int64_t>{columns_}, "a matrix has a scale for each column");
  scales_.assign(scales.values<float>(), scales.values<float>() + columns_);
  scales_.resize(padded(columns_, kBlock));
  // As MatMulIntegerToFloat scales: (1 / 127) * scale of the column, in float.
  for (float& scale : scales_) scale *= kStep;
  if (!form.biased) return;
  const Tensor biases = info.constant(behind + 1);
  require(biases.shape == std::vector<int64_t>{columns_}, "a matrix has a bias for each column");
  biases_.assign(biases.values<float>(), biases.values<float>() + columns_);
  biases_.resize(scales_.size());
}

void RowwiseMatMul::read_matrix(const Info& info, size_t weights) {
  const Tensor matrix = info.constant(weights);
  require(matrix.shape.size() == 2, "the weights of a product are a matrix");
  depth_ = within(matrix.shape[transposed_ ? 1 : 0], 1, kMostDepth, "the depth of a product");
  columns_ = within(matrix.shape[transposed_ ? 0 : 1], 1, kMostColumns, "the columns of a product");
  weights_ = matrix.values<int8_t>();
}

Nibbles::Nibbles(const Info& info, size_t input, int depth, int columns) : blocks_(pieces(depth, kNibbleBlock)) {
  const Tensor values = info.constant(input), factors = info.constant(input + 1);
  const int64_t groups = pieces(columns, kGroup);
  while (planes_ < kMostPlanes && values.shape != std::vector<int64_t>{groups, lines(), kCacheLine}) planes_++;
  require(values.shape == std::vector<int64_t>{groups, lines(), kCacheLine},
          "weights of 4 to 6 bits are groups of 16 columns, in lines of 64 bytes");
  require(factors.shape == std::vector<int64_t>{groups, blocks_, kGroup},
          "weights of 4 to 6 bits have a factor for each block and column");
  values_ = values.values<uint8_t>(), factors_ = factors.values<uint8_t>();
}

int Nibbles::value(int row, int column) const {
  const NibbleGroup of = group(column / kGroup);
  const int block = row / kNibbleBlock, inside = row % kNibbleBlock, byte = column % kGroup * 4 + row % 4;
  const uint8_t* const lines = of.values + static_cast<size_t>(block) * (kBlockLines + planes_) * kCacheLine + byte;
  int q = lines[inside / 8 * kCacheLine] >> (inside % 8 < 4 ? 0 : 4) & 15;
  for (int i = 0; i < planes_; i++) q |= (lines[(kBlockLines + i) * kCacheLine] >> inside / 4 & 1) << (4 + i);
  const int factor = of.factors[block * kGroup + column % kGroup], bits = 4 - planes_;
  return (q - (factor >> bits)) * (factor & ((1 << bits) - 1));
}

// A row of ones times the matrix.
void RowwiseMatMul::correct_nibbles() const {
  std::vector<uint8_t> ones(nibbles_.depth());
  std::fill_n(ones.begin(), depth_, uint8_t{1});
  for (int group = 0; group * kGroup < columns_; group++)
    arithmetic_.nibbles(ones.data(), 1, ones.size(), nibbles_.group(group), nullptr, &corrections_[group * kGroup], 0);
}

void RowwiseMatMul::correct() const {
  corrections_.assign(scales_.size(), 0);
  if (arithmetic_.offset == 0) return;
  if (nibbles_) correct_nibbles();
  for (int row = 0; row < (transposed_ ? columns_ : depth_) && !nibbles_; row++) {
    const int8_t* const values = weights_ + static_cast<size_t>(row) * (transposed_ ? depth_ : columns_);
    if (transposed_)
      corrections_[row] = std::accumulate(values, values + depth_, 0);
    else
      std::transform(values, values + columns_, corrections_.begin(), corrections_.begin(), std::plus<int32_t>());
  }
  for (int32_t& correction : corrections_) correction *= arithmetic_.offset;
}

bool RowwiseMatMul::is_direct(int rows) const {
  if (nibbles_) return rows <= kMostDirectNibbles;
  if (transposed_) return rows <= kMostDirectTransposed;
  return rows <= kMostDirect && static_cast<int64_t>(rows) * columns_ <= kMostSums;
}

template <typename Make>
void RowwiseMatMul::multiply(Call& call, const Tensor& x, int width, Make make) const {
  std::vector<int64_t> shape = x.shape;
  if (shape.empty() || shape.back() != width)
    throw std::runtime_error("rows of " + std::to_string(width) + " values are multiplied, found " +
                             (shape.empty() ? "none" : std::to_string(shape.back())));
  shape.back() = columns_;
  float* const y = call.output<float>(0, shape);
  const int64_t all = std::accumulate(shape.begin(), shape.end() - 1, int64_t{1}, std::multiplies());
  const int count = within(all, 0, std::numeric_limits<int>::max() / (2 * kBlock), "the rows of a product");
  if (count == 0) return;
  std::call_once(corrected_, [this] { correct(); });
  const size_t stride = padded(depth_, kBlock);
  float* const memory = scratch(0, threads_ * stride + count * (planes_ * stride / sizeof(float) + 1));
  float* const factors = memory + threads_ * stride;
  auto* const values = reinterpret_cast<uint8_t*>(factors + count);
  const Rows rows{values, count * planes_, stride};
  const Result result{
      corrections_.data(),           scales_.data(), factors, biases_.empty() ? nullptr : biases_.data(), y,
      static_cast<size_t>(columns_), planes_};
  const auto make_row = [&](int row, int next, int worker) {
    const float* const made = make(row, next, memory + worker * stride);
    factors[row] = arithmetic_.quantize(made, depth_, planes_, values + row * planes_ * stride);
  };
  const bool direct = is_direct(rows.count);
  if (direct && nibbles_) return by_groups(call, rows, make_row, result);
  if (direct && !transposed_) return by_depth(call, rows, make_row, result);
  call.share(pieces(count, kTaskRows), threads_, [&](int task, int worker) {
    const int end = std::min((task + 1) * kTaskRows, count);
    for (int row = task * kTaskRows; row < end; row++) make_row(row, row + 1 < end ? 1 : 0, worker);
  });
  if (direct && depth_ % kBlock == 0)
    by_columns(call, rows, result);
  else
    by_panels(call, rows, result);
}

void RowwiseMatMul::compute(Call& call) const {
  const Tensor x = call.input(0);
  multiply(call, x, depth_,
           [&](int row, int, float*) { return x.values<float>() + static_cast<size_t>(row) * depth_; });
}

NormedRowwiseMatMul::NormedRowwiseMatMul(const Info& info, int threads, Form form, size_t norm)
    : RowwiseMatMul(info, threads, form, norm + 1, false),
      epsilon_(info.number("epsilon", 0)),
      norm_(norm_weights(info, norm)) {}

const float* NormedRowwiseMatMul::norm_weights(const Info& info, size_t input) const {
  const Tensor weights = info.constant(input);
  require(weights.shape == std::vector<int64_t>{depth_}, "a norm has a weight for each value of a row");
  return weights.values<float>();
}

template <typename Add>
void NormedRowwiseMatMul::compute(Call& call, Add add) const {
  const Tensor x = call.input(0), skip = call.input(1);
  require(skip.shape == x.shape, "the sum of a norm is of two values of one shape");
  float* const total = call.output<float>(1, x.shape);
  multiply(call, x, depth_, [&](int row, int next, float* own) {
    const size_t place = static_cast<size_t>(row) * depth_;
    arithmetic_.norm(x.values<float>() + place, add(skip.values<float>() + place, own), norm_, epsilon_, depth_,
                     next * depth_, total + place, own);
    return own;
  });
}

void NormedRowwiseMatMul::compute(Call& call) const {
  compute(call, [](const float* skip, float*) { return skip; });
}

PostNormedRowwiseMatMul::PostNormedRowwiseMatMul(const Info& info, int threads, Form form)
    : NormedRowwiseMatMul(info, threads, form, 3), post_(norm_weights(info, 2)) {}

void PostNormedRowwiseMatMul::compute(Call& call) const {
  NormedRowwiseMatMul::compute(call, [&](const float* skip, float* own) {
    arithmetic_.plain_norm(skip, post_, epsilon_, depth_, own);
    return own;
  });
}

void GatedRowwiseMatMul::compute(Call& call) const {
  const Tensor x = call.input(0);
  multiply(call, x, 2 * depth_, [&](int row, int next, float* own) {
    const float* const halves = x.values<float>() + static_cast<size_t>(row) * 2 * depth_;
    gate_(halves, halves + depth_, depth_, next * 2 * depth_, own);
    return own;
  });
}

GeluGatedRowwiseMatMul::GeluGatedRowwiseMatMul(const Info& info, int threads, Form form)
    : GatedRowwiseMatMul(
          info, threads, form,
          info.text("approximate", "none") == "tanh" ? arithmetic()->tanh_gelu_gate : arithmetic()->gelu_gate) {}

NibbleEmbedding::NibbleEmbedding(const Info& info, int)
    : depth_(within(info.integer("depth", 0), 1, kMostDepth, "the depth of an embedding")) {
  const Tensor scales = info.constant(3);
  require(scales.shape.size() == 1, "an embedding has a scale for each token");
  columns_ = within(scales.shape[0], 1, kMostColumns, "the tokens of an embedding");
  nibbles_ = Nibbles(info, 1, depth_, columns_);
  scales_ = scales.values<float>();
}

void NibbleEmbedding::compute(Call& call) const {
  const Tensor ids = call.input(0);
  std::vector<int64_t> shape = ids.shape;
  const int64_t count = std::accumulate(shape.begin(), shape.end(), int64_t{1}, std::multiplies());
  shape.push_back(depth_);
  float* y = call.output<float>(0, shape);
  for (int64_t i = 0; i < count; i++, y += depth_) {
    const int token = within(ids.values<int64_t>()[i], 0, columns_ - 1, "a token of an embedding");
    for (int k = 0; k < depth_; k++) y[k] = static_cast<float>(nibbles_.value(k, token)) * scales_[token];
  }
}

}  // namespace edgelm

// Uses the constants and functions above.
#include "rowwise_ways.h"
