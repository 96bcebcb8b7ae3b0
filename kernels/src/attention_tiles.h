// Attention: divide a step among tiles, chunks and threads. Part of attention.cc.
#pragma once

#include "attention.h"

namespace edgelm {

// The queries of a tile as integers: put at their positions by `place_head`, then multiplied by the scale of scores and
// the scales of the keys' channels.
template <typename Cached>
void Attention<Cached>::prepare(const Step& step, const Tile& tile, const Queries& queries) const {
  const float* const scales = query_scales_.data() + tile.group * size_;
  std::vector<float> query(width_);
  for (int row = 0; row < rows_of(tile); row++) {
    const int index = tile.begin + row / per_group_, head = tile.group * per_group_ + row % per_group_;
    const size_t place = (static_cast<size_t>(tile.sequence) * step.rows + index) * step.stride_query + head * size_;
    std::copy_n(step.query + place, size_, query.data());
    place_head(step, step.past(tile.sequence) + index, query_norm_, query.data());
    for (int i = 0; i < size_; i++) query[i] *= scales[i];
    queries.factors[row] = arithmetic_.to_int16(query.data(), size_, query_limit_, queries.values + row * width_);
    require(std::isfinite(queries.factors[row]), kNoNumbers);
  }
}

template <typename Cached>
int Attention<Cached>::first_chunk(const Step& step, const Tile& tile) const {
  const int position = step.past(tile.sequence) + tile.begin;
  return window_ == 0 ? 0 : std::max(0, position - window_ + 1) / kChunk;
}

template <typename Cached>
int Attention<Cached>::last_chunk(const Step& step, const Tile& tile) const {
  return (step.past(tile.sequence) + tile.begin + tile.positions - 1) / kChunk;
}

// Where a chunk begins in the cache.
template <typename Cached>
size_t Attention<Cached>::place(const Step& step, const Tile& tile, int index) const {
  const size_t row = (static_cast<size_t>(tile.sequence) * groups_ + tile.group) * step.capacity;
  return (row + static_cast<size_t>(index) * kChunk) * step.stride_cache;
}

// Reorder a chunk up to the last position that a tile sees. next: where the following chunk begins.
template <typename Cached>
Attention<Cached>::Chunk Attention<Cached>::arranged(const Step& step, const Tile& tile, int index, size_t next,
                                                     Chunk chunk) const {
  const size_t from = place(step, tile, index);
  chunk.count = std::min(kChunk, step.past(tile.sequence) + tile.begin + tile.positions - index * kChunk);
  if constexpr (kRounded) {
    const int stride = step.stride_cache;
    arithmetic_.key_pairs(step.keys + from, chunk.count, size_, stride, step.keys + next, chunk.keys);
    arithmetic_.value_pairs(step.values + from, chunk.count, size_, stride, step.values + next, chunk.values);
    if (step.scaled) {
      read_row_scales(step, step.keys + from, chunk.count, chunk.key_scales);
      read_row_scales(step, step.values + from, chunk.count, chunk.value_scales);
    } else {
      chunk.key_scales = chunk.value_scales = nullptr;
    }
  } else {
    arithmetic_.float_key_pairs(step.keys + from, chunk.count, size_, key_limit_, step.keys + next, chunk.keys,
                                chunk.key_scales);
    arithmetic_.float_value_pairs(step.values + from, chunk.count, size_, kValueLimit, step.values + next, chunk.values,
                                  chunk.value_scales);
  }
  return chunk;
}

// The weights of a chunk's positions for a tile's rows.
template <typename Cached>
void Attention<Cached>::weigh(const Step& step, const Tile& tile, int index, const Queries& queries, const Chunk& chunk,
                              const Scores& scores, const Part& part) const {
  const int rows = rows_of(tile), begin = index * kChunk, first = step.past(tile.sequence) + tile.begin;
  const int count = std::min(kChunk, first + tile.positions - begin), depth = padded(size_, 2) / 2;
  arithmetic_.scores(queries.values, rows, width_, chunk.keys, depth, padded(count, kLanes), chunk.key_scales,
                     scores.values, kChunk, scores.largest);
  for (int i = 0; i < tile.positions; i++) {
    const int end = std::min(count, first + i + 1 - begin);
    const int start = window_ == 0 ? 0 : std::max(0, first + i + 1 - window_ - begin);
    std::fill_n(scores.begin + i * per_group_, per_group_, start < end ? start : 0);
    std::fill_n(scores.end + i * per_group_, per_group_, start < end ? end : 0);
  }
  const AttentionScores all{scores.values, scores.largest, scores.weights, kChunk,
                            scores.begin,  scores.end,     queries.factors};
  if (chunk.value_scales == nullptr)
    arithmetic_.weights(all, rows, count, part);
  else
    arithmetic_.scaled_weights(all, rows, count, chunk.value_scales, kRounded ? kByteWeightLimit : kWeightLimit, part);
}

// Pairs of a chunk's positions that some row of a tile sees.
template <typename Cached>
int Attention<Cached>::seen_pairs(const Step& step, const Tile& tile, int index) const {
  const int end = step.past(tile.sequence) + tile.begin + tile.positions;
  return padded(std::min(kChunk, end - index * kChunk), 2) / 2;
}

template <typename Cached>
void Attention<Cached>::clear(int rows, const State& state) const {
  std::fill_n(state.values, static_cast<size_t>(rows) * width_, 0.0f);
  std::fill_n(state.sums, rows, 0.0f);
  std::fill_n(state.largest, rows, -std::numeric_limits<float>::infinity());
}

template <typename Cached>
void Attention<Cached>::write(const Step& step, const Tile& tile, const State& state) const {
  const float* const scales = value_scales_.data() + tile.group * size_;
  for (int row = 0; row < rows_of(tile); row++) {
    const int index = tile.begin + row / per_group_, head = tile.group * per_group_ + row % per_group_;
    const size_t place = static_cast<size_t>(tile.sequence) * step.kept + index - step.left_out();
    float* const y = step.output + (place * heads_ + head) * size_;
    arithmetic_.divide(state.values + row * width_, state.sums[row], scales, size_, y);
  }
}

// The number of parts into which a sequence's rows are cut, for each group of heads.
template <typename Cached>
int Attention<Cached>::parts_of(const Step& step) const {
  const auto parts = [&](int rows) { return (step.kept * per_group_ + rows - 1) / rows; };
  const int groups = step.batch * groups_, enough = (kTasksPerThread * threads_ + groups - 1) / groups;
  return std::clamp(enough, parts(kMostTaskRows), parts(kTaskRows));
}

// The first row of part `nth`, where the parts before it end. All parts cost the same; the cost of a row is the number
// of positions that it sees.
template <typename Cached>
int Attention<Cached>::cut(const Step& step, int sequence, int nth, int parts) const {
  if (nth == parts) return step.rows;
  const double share = static_cast<double>(nth) / parts, first = step.past(sequence) + step.left_out();
  // Beyond a window's length all rows see the same number of positions.
  const double row = window_ > 0 && first >= window_
                         ? share * step.kept
                         : std::sqrt(first * first + share * step.kept * (2 * first + step.kept)) - first;
  const int tile = std::max(1, kTileRows / per_group_);
  return step.left_out() + static_cast<int>(row) / tile * tile;
}

template <typename Cached>
void Attention<Cached>::by_rows(Call& call, const Step& step) const {
  const int parts = parts_of(step), groups = step.batch * groups_;
  const int tile_positions = std::max(1, kTileRows / per_group_), tile_rows = tile_positions * per_group_;
  call.share(groups * parts, threads_, [&](int task, int) {
    const int sequence = task % step.batch, group = task / step.batch % groups_, nth = parts - 1 - task / groups;
    const int begin = cut(step, sequence, nth, parts), end = cut(step, sequence, nth + 1, parts);
    if (begin == end) return;
    const Tile whole{sequence, group, begin, end - begin};
    const int rows = rows_of(whole);
    const auto [own, state_so_far, memory, work, next] = Memory::laid_out(0, [&](Memory& memory) {
      return std::tuple(queries(memory, rows), state(memory, rows), chunk(memory), scores(memory, tile_rows),
                        part(memory, tile_rows));
    });
    prepare(step, whole, own);
    clear(rows, state_so_far);
    for (int index = first_chunk(step, whole); index <= last_chunk(step, whole); index++) {
      const Chunk chunk = arranged(step, whole, index, place(step, whole, index + 1), memory);
      for (int done = 0; done < whole.positions; done += tile_positions) {
        Tile tile = whole;
        tile.begin += done, tile.positions = std::min(tile_positions, whole.positions - done);
        if (index < first_chunk(step, tile) || index > last_chunk(step, tile)) continue;
        const size_t row = static_cast<size_t>(done) * per_group_;
        weigh(step, tile, index, from(own, row), chunk, work, next);
        arithmetic_.merge_values(from(state_so_far, row), next, work.weights, rows_of(tile), kChunk, chunk.values,
                                 padded(chunk.count, 2) / 2, seen_pairs(step, tile, index), width_);
      }
    }
    write(step, whole, state_so_far);
  });
}

template <typename Cached>
void Attention<Cached>::by_chunks(Call& call, const Step& step) const {
  const int rows = step.kept * per_group_, tiles = step.batch * groups_;
  const auto tile_of = [&](int index) { return Tile{index / groups_, index % groups_, step.left_out(), step.kept}; };
  int most = 0;
  for (int i = 0; i < tiles; i++) most = std::max(most, last_chunk(step, tile_of(i)) + 1);
  const auto [all, parts] = Memory::laid_out(
      1, [&](Memory& memory) { return std::tuple(queries(memory, tiles * rows), part(memory, tiles * most * rows)); });
  for (int i = 0; i < tiles; i++) prepare(step, tile_of(i), from(all, static_cast<size_t>(i) * rows));
  const int tasks = tiles * most, workers = std::min(threads_, tasks);
  Runs runs(tasks, workers);
  std::vector<std::atomic<int>> left(tiles);  // chunks of each tile
  for (auto& chunks : left) chunks.store(most, std::memory_order_relaxed);
  const auto place_of = [&](int task) { return place(step, tile_of(task / most), task % most); };
  const auto work = [&](int worker) {
    const auto [memory, weighed, result] =
        Memory::laid_out(0, [&](Memory& own) { return std::tuple(chunk(own), scores(own, rows), state(own, rows)); });
    for (int task = runs.take(worker); task >= 0; task = runs.take(worker)) {
      const int index = task % most, i = task / most;
      const Tile tile = tile_of(i);
      // A thread's chunks follow one another: while one is reordered, the next one is prefetched.
      if (index >= first_chunk(step, tile) && index <= last_chunk(step, tile)) {
        const Chunk chunk = arranged(step, tile, index, place_of(std::min(task + 1, tasks - 1)), memory);
        const Part part = from(parts, static_cast<size_t>(task) * rows);
        weigh(step, tile, index, from(all, static_cast<size_t>(i) * rows), chunk, weighed, part);
        const int pairs = seen_pairs(step, tile, index);
        arithmetic_.pairs(weighed.weights, rows, kChunk, chunk.values, padded(chunk.count, 2) / 2, pairs, width_,
                          part.values, width_);
      }
      if (--left[i] == 0) gather(step, tile, from(parts, static_cast<size_t>(i) * most * rows), result);
    }
  };
  const size_t apart = (place_of(tasks / workers) - place_of(0)) * sizeof(Cached);
  call.parallel(workers, work, {step.keys + place_of(0), apart}, successor_);
}

// The output of a tile from the parts of its chunks.
template <typename Cached>
void Attention<Cached>::gather(const Step& step, const Tile& tile, const Part& parts, const State& result) const {
  const int rows = rows_of(tile);
  clear(rows, result);
  for (int index = first_chunk(step, tile); index <= last_chunk(step, tile); index++)
    arithmetic_.merge(result, from(parts, static_cast<size_t>(index) * rows), rows, width_);
  write(step, tile, result);
}

}  // namespace edgelm
