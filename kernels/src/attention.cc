#include "attention.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <iterator>
#include <limits>

namespace edgelm {

namespace {

// Positions of the cache that are widened and merged together: their keys and values are half of a second cache.
constexpr int kChunk = 128;
// Rows of a tile, where there are many: widening a chunk is small beside them, and their scores stay in the cache.
constexpr int kTileRows = 48;
// Up to so many rows of a group of heads work is shared out by chunks: there are too few tiles for all threads.
constexpr int kFewTileRows = 24;

}  // namespace

Attention::Attention(const Info& info, int threads) : arithmetic_(*arithmetic()), threads_(threads) {
  heads_ = static_cast<int>(info.integer("num_heads", 0));
  groups_ = static_cast<int>(info.integer("kv_num_heads", 0));
  const std::string by_channel = "PER_CHANNEL";
  if (groups_ < 1 || heads_ % groups_ != 0) throw std::runtime_error("heads must be a multiple of groups");
  if (info.text("k_quant_type", "NONE") != by_channel || info.text("v_quant_type", "NONE") != by_channel ||
      info.integer("kv_cache_bit_width", 0) != 8 || info.integer("rotary_interleaved", 0) != 0 ||
      info.number("softcap", 0) != 0 || info.integer("smooth_softmax", 0) > 0)
    throw std::runtime_error("attention with these attributes belongs to com.microsoft");
  const Tensor keys = info.constant(12), values = info.constant(13);
  key_scales_.assign(keys.values<float>(), keys.values<float>() + keys.shape.at(0));
  value_scales_.assign(values.values<float>(), values.values<float>() + values.shape.at(0));
  const auto inverse = [](float scale) { return 1 / scale; };
  std::transform(key_scales_.begin(), key_scales_.end(), std::back_inserter(key_factors_), inverse);
  std::transform(value_scales_.begin(), value_scales_.end(), std::back_inserter(value_factors_), inverse);
  per_group_ = heads_ / groups_;
  size_ = static_cast<int>(key_scales_.size()) / groups_;
  width_ = padded(size_, kLanes);
  if (key_scales_.size() != value_scales_.size() || size_ * groups_ != static_cast<int>(key_scales_.size()))
    throw std::runtime_error("keys and values must be of one size, with a scale for each channel");
  rotary_ = info.integer("do_rotary", 0) != 0;
  window_ = static_cast<int>(std::max<int64_t>(0, info.integer("local_window_size", -1)));
  scale_ = info.number("scale", 0);
  if (scale_ == 0) scale_ = 1 / std::sqrt(static_cast<float>(size_));
}

Attention::Step Attention::read(Call& call) const {
  const Tensor query = call.input(0), key = call.input(1), value = call.input(2);
  const Tensor past_key = call.input(3), past_value = call.input(4);
  const Tensor lengths = call.input(5), total = call.input(6);
  Step step{};
  step.batch = static_cast<int>(query.shape.at(0)), step.rows = static_cast<int>(query.shape.at(1));
  step.query = query.values<float>();
  step.lengths = lengths.values<int32_t>();
  if (rotary_) {
    const Tensor cosines = call.input(7), sines = call.input(8);
    step.cosines = cosines.values<float>(), step.sines = sines.values<float>();
    step.angles = static_cast<int>(cosines.shape.at(0)), step.half = static_cast<int>(cosines.shape.at(1));
  }
  const int positions = *total.values<int32_t>();
  step.first = positions == step.rows;
  const int past = past_key.data == nullptr ? 0 : static_cast<int>(past_key.shape.at(2));
  step.capacity = std::max(past, positions);
  const bool packed = key.data == nullptr;
  step.stride_query = packed ? (heads_ + 2 * groups_) * size_ : heads_ * size_;
  step.stride_key = packed ? step.stride_query : groups_ * size_;
  step.key = packed ? step.query + heads_ * size_ : key.values<float>();
  step.value = packed ? step.key + groups_ * size_ : value.values<float>();
  if (query.shape.at(2) != static_cast<int64_t>(step.stride_query))
    throw std::runtime_error("the query has another size than its heads");
  for (int i = 0; i < step.batch; i++) {
    const int past = step.past(i), end = past + step.rows;
    if (past < 0 || end > step.capacity || (rotary_ && end > step.angles))
      throw std::runtime_error("positions " + std::to_string(past) + " to " + std::to_string(end) +
                               " of a sequence in a cache of " + std::to_string(step.capacity) +
                               " are not there, or have no angles");
  }
  step.output = call.output<float>(0, {step.batch, step.rows, heads_ * size_});
  const std::vector<int64_t> cache{step.batch, groups_, step.capacity, size_};
  step.keys = call.output<int8_t>(1, cache), step.values = call.output<int8_t>(2, cache);
  for (auto [from, to] : {std::pair(past_key, step.keys), std::pair(past_value, step.values)}) {
    if (from.data == nullptr || from.data == to) continue;  // in place
    const size_t row = static_cast<size_t>(past) * size_, place = static_cast<size_t>(step.capacity) * size_;
    for (int i = 0; i < step.batch * groups_; i++) std::memcpy(to + i * place, from.values<int8_t>() + i * row, row);
  }
  return step;
}

void Attention::compute(Call& call) const {
  const Step step = read(call);
  const int rows = step.batch * step.rows;
  call.share(rows, rows <= kFewTileRows ? 1 : threads_,
             [&](int row, int) { append(step, row / step.rows, row % step.rows); });
  if (step.rows * per_group_ <= kFewTileRows)
    by_chunks(call, step);
  else
    by_rows(call, step);
}

void Attention::rotated(const Step& step, int position, float* head) const {
  const size_t place = static_cast<size_t>(position) * step.half;
  if (rotary_) arithmetic_.rotate(head, step.cosines + place, step.sines + place, step.half);
}

// Put the keys and values of a row into the cache.
void Attention::append(const Step& step, int sequence, int row) const {
  const int position = step.past(sequence) + row;
  const size_t place = (static_cast<size_t>(sequence) * step.rows + row) * step.stride_key;
  std::vector<float> key(step.key + place, step.key + place + groups_ * size_);
  for (int group = 0; group < groups_; group++) {
    const size_t to = ((static_cast<size_t>(sequence) * groups_ + group) * step.capacity + position) * size_;
    const int channel = group * size_;
    rotated(step, position, key.data() + channel);
    arithmetic_.to_int8(key.data() + channel, key_factors_.data() + channel, size_, step.keys + to);
    arithmetic_.to_int8(step.value + place + channel, value_factors_.data() + channel, size_, step.values + to);
  }
}

// The queries of a tile (rows, width), rotated, times the scale of scores and those of the keys' channels.
void Attention::queries(const Step& step, const Tile& tile, float* q) const {
  const float* const scales = key_scales_.data() + tile.group * size_;
  for (int row = 0; row < rows_of(tile); row++, q += width_) {
    const int index = tile.begin + row / per_group_, head = tile.group * per_group_ + row % per_group_;
    std::copy_n(
        step.query + (static_cast<size_t>(tile.sequence) * step.rows + index) * step.stride_query + head * size_, size_,
        q);
    rotated(step, step.past(tile.sequence) + index, q);
    for (int i = 0; i < size_; i++) q[i] = q[i] * scale_ * scales[i];
  }
}

// A state: for each row the sum of its values, weighted (width), the sum of the weights and the largest score.
size_t Attention::state_floats(int rows) const { return static_cast<size_t>(rows) * (width_ + 2); }

// Keys (size, kChunk), values (kChunk, width) and scores (rows, kChunk).
size_t Attention::chunk_floats(int rows) const { return static_cast<size_t>(kChunk) * (size_ + width_ + rows); }

int Attention::first_chunk(const Step& step, const Tile& tile) const {
  const int position = step.past(tile.sequence) + tile.begin;
  return window_ == 0 ? 0 : std::max(0, position - window_ + 1) / kChunk;
}

int Attention::last_chunk(const Step& step, const Tile& tile) const {
  return (step.past(tile.sequence) + tile.begin + tile.positions - 1) / kChunk;
}

// The state of a tile's rows over the positions of one chunk.
void Attention::attend(const Step& step, const Tile& tile, int chunk, const float* q, float* memory,
                       float* state) const {
  const int rows = rows_of(tile), begin = chunk * kChunk, first = step.past(tile.sequence) + tile.begin;
  const int count = std::min(kChunk, first + tile.positions - begin);
  float *const keys = memory, *const values = keys + kChunk * size_, *const scores = values + kChunk * width_;
  const size_t place = ((static_cast<size_t>(tile.sequence) * groups_ + tile.group) * step.capacity + begin) * size_;
  arithmetic_.widen_transposed(step.keys + place, count, size_, keys, kChunk);
  arithmetic_.widen(step.values + place, count, size_, values, width_);
  arithmetic_.product(q, width_, rows, size_, keys, kChunk, padded(count, kLanes), scores, kChunk);
  float *const sums = state + static_cast<size_t>(rows) * width_, *const largest = sums + rows;
  for (int row = 0; row < rows; row++) {
    const int position = first + row / per_group_, end = std::min(count, position + 1 - begin);
    const int start = window_ == 0 ? 0 : std::max(0, position + 1 - window_ - begin);
    float* const weights = scores + row * kChunk;
    if (start < end) {
      sums[row] = arithmetic_.exponentials(weights, start, end, count, &largest[row]);
    } else {
      std::fill_n(weights, count, 0.0f);
      sums[row] = 0, largest[row] = -std::numeric_limits<float>::infinity();
    }
  }
  arithmetic_.product(scores, kChunk, rows, count, values, width_, width_, state, width_);
}

// state = state and the next chunk's.
void Attention::merge(int rows, float* state, const float* next) const {
  float *const sums = state + static_cast<size_t>(rows) * width_, *const largest = sums + rows;
  const float *const next_sums = next + static_cast<size_t>(rows) * width_, *const next_largest = next_sums + rows;
  for (int row = 0; row < rows; row++) {
    if (next_sums[row] == 0) continue;  // none of its positions is there
    const float most = std::max(largest[row], next_largest[row]);
    const float before = arithmetic_.exponential(largest[row] - most);
    const float after = arithmetic_.exponential(next_largest[row] - most);
    arithmetic_.merge(state + row * width_, before, next + row * width_, after, width_);
    sums[row] = std::fma(next_sums[row], after, sums[row] * before);
    largest[row] = most;
  }
}

void Attention::write(const Step& step, const Tile& tile, const float* state) const {
  const int rows = rows_of(tile);
  const float* const sums = state + static_cast<size_t>(rows) * width_;
  const float* const scales = value_scales_.data() + tile.group * size_;
  for (int row = 0; row < rows; row++) {
    const int index = tile.begin + row / per_group_, head = tile.group * per_group_ + row % per_group_;
    float* const y = step.output + ((static_cast<size_t>(tile.sequence) * step.rows + index) * heads_ + head) * size_;
    for (int i = 0; i < size_; i++) y[i] = state[row * width_ + i] / sums[row] * scales[i];
  }
}

void Attention::by_rows(Call& call, const Step& step) const {
  const int positions = std::max(1, kTileRows / per_group_), tiles = (step.rows + positions - 1) / positions;
  const int most = positions * per_group_;
  const size_t own = static_cast<size_t>(most) * width_ + 2 * state_floats(most) + chunk_floats(most);
  float* const memory = scratch(1, own * threads_);
  // The longest tiles first: what is left at the end is short.
  call.share(step.batch * groups_ * tiles, threads_, [&](int task, int worker) {
    const int begin = (tiles - 1 - task / (step.batch * groups_)) * positions;
    const Tile tile{task % step.batch, task / step.batch % groups_, begin, std::min(positions, step.rows - begin)};
    float *const q = memory + worker * own, *const state = q + static_cast<size_t>(most) * width_;
    float *const next = state + state_floats(most), *const rest = next + state_floats(most);
    queries(step, tile, q);
    int chunk = first_chunk(step, tile);
    attend(step, tile, chunk, q, rest, state);
    for (chunk++; chunk <= last_chunk(step, tile); chunk++) {
      attend(step, tile, chunk, q, rest, next);
      merge(rows_of(tile), state, next);
    }
    write(step, tile, state);
  });
}

void Attention::by_chunks(Call& call, const Step& step) const {
  const int rows = step.rows * per_group_, tiles = step.batch * groups_;
  const auto tile_of = [&](int index) { return Tile{index / groups_, index % groups_, 0, step.rows}; };
  int most = 0;
  for (int i = 0; i < tiles; i++) most = std::max(most, last_chunk(step, tile_of(i)) + 1);
  const size_t query = static_cast<size_t>(rows) * width_, own = query + most * state_floats(rows);
  float* const memory = scratch(1, tiles * own + threads_ * chunk_floats(rows));
  for (int i = 0; i < tiles; i++) queries(step, tile_of(i), memory + i * own);
  // A thread's chunks follow one another: while one is widened, the next one is on its way from memory.
  const int tasks = tiles * most, workers = std::min(threads_, tasks);
  call.parallel(workers, [&](int worker) {
    for (int task = tasks * worker / workers; task < tasks * (worker + 1) / workers; task++) {
      const Tile tile = tile_of(task / most);
      const int chunk = task % most;
      float *const q = memory + task / most * own, *const states = q + query;
      if (chunk >= first_chunk(step, tile) && chunk <= last_chunk(step, tile))
        attend(step, tile, chunk, q, memory + tiles * own + worker * chunk_floats(rows),
               states + chunk * state_floats(rows));
    }
  });
  for (int i = 0; i < tiles; i++) {
    const Tile tile = tile_of(i);
    const int begin = first_chunk(step, tile);
    float *const states = memory + i * own + query, *const state = states + begin * state_floats(rows);
    for (int chunk = begin + 1; chunk <= last_chunk(step, tile); chunk++)
      merge(rows, state, states + chunk * state_floats(rows));
    write(step, tile, state);
  }
}

}  // namespace edgelm
