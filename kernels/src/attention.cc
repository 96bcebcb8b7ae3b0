#include "attention.h"

#include <algorithm>
#include <atomic>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <numbers>
#include <tuple>

namespace edgelm {

namespace {

// Positions of the KV cache that are weighted together: their intermediate results stay in the first-level cache.
constexpr int kChunk = 128;
// Positions whose keys and values a thread writes to the KV cache at once.
constexpr int kAppended = 32;
// Rows of a tile: its scores and weights stay in the first-level cache. If a step has no more rows than this for a
// group of heads, it is divided among threads by chunks.
constexpr int kTileRows = 24;
// Bounds of a task's rows, on average, and the tasks for each thread within these bounds. With at least kTaskRows, the
// time to reorder a chunk is small beside the products. kMostTaskRows bounds the memory of a thread. With several tasks
// for each thread, all threads end together.
constexpr int kTaskRows = 96, kMostTaskRows = 768, kTasksPerThread = 3;
// Limits with which the products fit into 32 bits: of the integers to which float values are rounded, and of the sum of
// a chunk's weights before they are rounded.
constexpr int kValueLimit = 1 << 12;
constexpr float kWeightLimit = std::numeric_limits<int32_t>::max() / kValueLimit - kChunk;
constexpr float kByteWeightLimit = std::numeric_limits<int32_t>::max() / 128 - kChunk;
// The bytes by which a row of an 8-bit cache is longer if it has a scale of its own.
constexpr int kScaleBytes = sizeof(float);
// The input that holds the first of the rows that are kept; a negative number counts from the end.
constexpr size_t kStart = 14;
// The most heads of a query, and the most values of a head.
constexpr int kMostHeads = 1 << 12, kMostSize = 1 << 12;
// The most positions or sequences, and the most heads of all rows of a step.
constexpr int kMostPositions = 1 << 24, kMostRows = 1 << 26;
// Inputs of com.microsoft's operator that change what it computes. They are not supported here.
constexpr size_t kUnknown[] = {9, 10, 11};
constexpr const char* kNoNumbers =
    "queries, keys or values are NaN or infinite: export the bundle again, and check its source";

int kept(int rows, const Tensor& start) {
  if (start.data == nullptr) return rows;
  require(start.shape == std::vector<int64_t>{1}, "where the rows that are kept begin is one number");
  const int64_t given = *start.values<int64_t>(), first = given < 0 ? rows + given : given;
  return rows - static_cast<int>(std::clamp<int64_t>(first, 0, rows));
}

}  // namespace

template <typename Cached>
Attention<Cached>::Attention(const Info& info, int threads) : arithmetic_(*arithmetic()), threads_(threads) {
  heads_ = within(info.integer("num_heads", 0), 1, kMostHeads, "the number of heads");
  groups_ = within(info.integer("kv_num_heads", 0), 1, heads_, "the number of groups");
  require(heads_ % groups_ == 0, "heads must be a multiple of groups");
  if (info.integer("rotary_interleaved", 0) != 0 || info.number("softcap", 0) != 0 ||
      info.integer("smooth_softmax", 0) > 0)
    throw std::runtime_error("attention with these attributes belongs to com.microsoft");
  per_group_ = heads_ / groups_;
  size_ = head_size(info);
  width_ = padded(size_, kLanes);
  rotary_ = info.integer("do_rotary", 0) != 0;
  epsilon_ = info.number("epsilon", -1);
  if (epsilon_ >= 0) query_norm_ = head_norm(info, 1), key_norm_ = head_norm(info, 2);
  window_ = static_cast<int>(std::clamp<int64_t>(info.integer("local_window_size", -1), 0, kMostPositions));
  // As many bits for keys as for queries.
  key_limit_ = kRounded ? 128 : 1 << (31 - static_cast<int>(std::bit_width(size_ - 1u))) / 2;
  query_limit_ =
      std::min<int>(std::numeric_limits<int16_t>::max(), std::numeric_limits<int32_t>::max() / (key_limit_ * size_));
  float scale = info.number("scale", 0);
  if (scale == 0) scale = 1 / std::sqrt(static_cast<float>(size_));
  query_scales_.assign(groups_ * size_, scale * std::numbers::log2e_v<float>);
  value_scales_.assign(groups_ * size_, 1);
  if constexpr (kRounded) read_scales(info);
}

template <typename Cached>
int Attention<Cached>::head_size(const Info& info) const {
  const std::vector<int64_t> cache = info.shape(3);
  require(cache.size() == 4, "a cache has four axes: batch, groups, positions, values");
  // If the graph leaves the length of a row open, so that a row may end with a scale, the number of channels gives the
  // size.
  if (!kRounded || cache[3] >= 1) return within(cache[3], 1, kMostSize, "the size of a head, which the graph fixes,");
  const std::vector<int64_t> channels = info.constant(12).shape;
  require(channels.size() == 1, "the scales of channels have one axis");
  return within(channels[0] / groups_, 1, kMostSize, "the size of a head");
}

template <typename Cached>
const float* Attention<Cached>::head_norm(const Info& info, size_t input) const {
  const Tensor weights = info.constant(input);
  require(weights.shape == std::vector<int64_t>{size_}, "a norm of heads has a weight for each value of a head");
  return weights.values<float>();
}

template <typename Cached>
void Attention<Cached>::read_scales(const Info& info) {
  const std::string by_channel = "PER_CHANNEL";
  if (info.text("k_quant_type", "NONE") != by_channel || info.text("v_quant_type", "NONE") != by_channel ||
      info.integer("kv_cache_bit_width", 0) != 8)
    throw std::runtime_error("a cache of integers has 8 bits and a scale for each channel");
  const Tensor keys = info.constant(12), values = info.constant(13);
  for (const Tensor& scales : {keys, values})
    require(scales.shape == std::vector<int64_t>{groups_ * size_},
            "keys and values must be of one size, with a scale for each channel");
  for (int i = 0; i < groups_ * size_; i++) {
    const float key = keys.values<float>()[i], value = values.values<float>()[i];
    query_scales_[i] = key * query_scales_[i], value_scales_[i] = value;
    key_factors_.push_back(1 / key), value_factors_.push_back(1 / value);
  }
}

template <typename Cached>
void Attention<Cached>::compute(Call& call) const {
  const Step step = read(call);
  const int rows = step.batch * step.rows;
  call.share((rows + kAppended - 1) / kAppended, threads_, [&](int part, int) {
    for (int row = part * kAppended; row < std::min((part + 1) * kAppended, rows); row++)
      append(step, row / step.rows, row % step.rows);
  });
  if (rows == 0 || step.kept == 0) return;
  if (step.kept * per_group_ <= kTileRows)
    by_chunks(call, step);
  else
    by_rows(call, step);
}

// Norm a head of a query or key, and rotate it for its position. `head` has memory for whole lanes.
template <typename Cached>
void Attention<Cached>::place_head(const Step& step, int position, const float* norm, float* head) const {
  const size_t place = static_cast<size_t>(position) * step.half;
  if (norm != nullptr) arithmetic_.plain_norm(head, norm, epsilon_, size_, head);
  if (rotary_) arithmetic_.rotate(head, step.cosines + place, step.sines + place, step.half);
}

// Write the keys and values of a row to the KV cache.
template <typename Cached>
void Attention<Cached>::append(const Step& step, int sequence, int row) const {
  const int position = step.past(sequence) + row;
  const size_t place = (static_cast<size_t>(sequence) * step.rows + row) * step.stride_key;
  float* const key = scratch(0, width_);
  for (int group = 0; group < groups_; group++) {
    const size_t head = static_cast<size_t>(sequence) * groups_ + group;
    const size_t to = (head * step.capacity + position) * step.stride_cache;
    const int channel = group * size_;
    std::copy_n(step.key + place + channel, size_, key);
    place_head(step, position, key_norm_, key);
    const float* const value = step.value + place + channel;
    for (const float* x : {static_cast<const float*>(key), value})
      require(std::isfinite(arithmetic_.largest_magnitude(x, size_)), kNoNumbers);
    if constexpr (kRounded) {
      store_row(key, key_factors_.data() + channel, step.scaled, step.keys + to);
      store_row(value, value_factors_.data() + channel, step.scaled, step.values + to);
    } else {
      std::copy_n(key, size_, step.keys + to);
      std::copy_n(value, size_, step.values + to);
    }
  }
}

// Write a row of an 8-bit cache, with its scale if it has one.
template <typename Cached>
void Attention<Cached>::store_row(const float* x, const float* factors, bool scaled, Cached* row) const {
  if constexpr (kRounded) {
    if (!scaled) return arithmetic_.to_int8(x, factors, size_, row);
    const float scale = arithmetic_.to_scaled_int8(x, factors, size_, row);
    std::memcpy(row + size_, &scale, kScaleBytes);
  }
}

// Read the scales at the ends of a cache's rows, padded to a whole number of lanes.
template <typename Cached>
void Attention<Cached>::read_row_scales(const Step& step, const Cached* rows, int count, float* scales) const {
  for (int i = 0; i < count; i++)
    std::memcpy(scales + i, rows + static_cast<size_t>(i) * step.stride_cache + size_, kScaleBytes);
  std::fill(scales + count, scales + padded(count, kLanes), 0.0f);
}

template <typename Cached>
Attention<Cached>::Queries Attention<Cached>::queries(Memory& memory, int rows) const {
  return {memory.take<int16_t>(static_cast<size_t>(rows) * width_), memory.take<float>(rows)};
}

template <typename Cached>
Attention<Cached>::Part Attention<Cached>::part(Memory& memory, int rows) const {
  return {memory.take<int32_t>(static_cast<size_t>(rows) * width_), memory.take<float>(rows), memory.take<float>(rows),
          memory.take<float>(rows + kLanes)};
}

template <typename Cached>
Attention<Cached>::State Attention<Cached>::state(Memory& memory, int rows) const {
  return {memory.take<float>(static_cast<size_t>(rows) * width_), memory.take<float>(rows),
          memory.take<float>(rows + kLanes)};
}

template <typename Cached>
Attention<Cached>::Chunk Attention<Cached>::chunk(Memory& memory) const {
  const size_t size = static_cast<size_t>(kChunk) * width_;
  return {memory.take<int16_t>(size), memory.take<int16_t>(size), memory.take<float>(kChunk),
          memory.take<float>(kChunk), 0};
}

template <typename Cached>
Attention<Cached>::Scores Attention<Cached>::scores(Memory& memory, int rows) const {
  const size_t size = static_cast<size_t>(rows) * kChunk;
  return {memory.take<float>(size), memory.take<float>(static_cast<size_t>(rows) * kLanes), memory.take<int16_t>(size),
          memory.take<int>(rows), memory.take<int>(rows)};
}

template <typename Cached>
Attention<Cached>::Queries Attention<Cached>::from(const Queries& queries, size_t row) const {
  return {queries.values + row * width_, queries.factors + row};
}

template <typename Cached>
Attention<Cached>::Part Attention<Cached>::from(const Part& part, size_t row) const {
  return {part.values + row * width_, part.scales + row, part.sums + row, part.largest + row};
}

template <typename Cached>
Attention<Cached>::State Attention<Cached>::from(const State& state, size_t row) const {
  return {state.values + row * width_, state.sums + row, state.largest + row};
}

}  // namespace edgelm

// These headers use the constants and functions above.
#include "attention_call.h"
#include "attention_tiles.h"

namespace edgelm {

template class Attention<int8_t>;
template class Attention<float>;

}  // namespace edgelm
