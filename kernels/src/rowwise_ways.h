// The ways to divide a product among threads: by depth, groups, columns or panels. Part of rowwise_matmul.cc.
#pragma once

#include "rowwise_matmul.h"

namespace edgelm {

// For many rows, the greatest depth with which the thread that reads most reads no more than with shallow strips.
int RowwiseMatMul::strip_depth(int rows, int parts) const {
  const auto most_read = [&](int depth) { return pieces(pieces(depth_, depth), parts) * depth; };
  int depth = rows > kFewRows ? kDeepestStrip : kStripDepth;
  while (depth > kStripDepth && most_read(depth) > most_read(kStripDepth)) depth -= kStripDepth;
  return depth;
}

// Each thread reads a part of the matrix's depth: memory is read fastest from one end to the other. When all of it is
// read, the threads add up their integer sums and scale them, by columns. A thread that has taken a strip must not
// throw: the others wait for it.
template <typename MakeRow>
void RowwiseMatMul::by_depth(Call& call, const Rows& x, MakeRow make_row, const Result& y) const {
  const int parts = std::min(threads_, pieces(depth_, kLeastDepth)), rows = x.count / planes_;
  const int strip_size = strip_depth(x.count, parts), strips = pieces(depth_, strip_size);
  const size_t stride = padded(columns_, kBlock), own = stride * x.count;
  int32_t* const sums = integers(scratch(1, own * parts));
  const int32_t* used[kMostWorkers] = {};
  std::atomic<int> next_row{0}, made{0}, read{0}, next_columns{0};
  Runs runs(strips, parts);
  const auto begin = [&](int strip) { return weights_ + static_cast<size_t>(strip) * strip_size * columns_; };
  const auto add = [&](int part) {
    int count = 0;
    for (int strip = runs.take(part); strip >= 0; strip = runs.take(part), count++) {
      const int from = strip * strip_size, last = runs.last(part);
      const int8_t* next = strip < last ? begin(strip + 1) : nullptr;
      if (strip == last) next = reinterpret_cast<const int8_t*>(successor_->begin(part));
      arithmetic_.columns(x.values + from, x.count, x.stride, begin(strip), std::min(strip_size, depth_ - from),
                          columns_, count == 0, next, sums + part * own, stride);
      used[part] = sums + part * own;
    }
    read += count;
  };
  const auto scale = [&](int column) {
    const int32_t* terms[kMostWorkers];
    int count = 0;
    for (int part = 0; part < parts; part++)
      if (used[part] != nullptr) terms[count++] = used[part] + column;
    arithmetic_.scale_parts(terms, count, stride, x.count, std::min(kTaskColumns, columns_ - column),
                            y.from(0, column));
  };
  const auto work = [&](int part) {
    for (int row = next_row++; row < rows; row = next_row++) make_row(row, 0, part), made++;
    wait_until([&] { return made >= rows; });
    add(part);
    wait_until([&] { return read >= strips; });
    for (int task = next_columns++; task * kTaskColumns < columns_; task = next_columns++) scale(task * kTaskColumns);
  };
  call.parallel(parts, work, {weights_, static_cast<size_t>(begin(strips / parts) - weights_)}, successor_);
}

// The threads make the rows; then each reads consecutive groups of columns.
template <typename MakeRow>
void RowwiseMatMul::by_groups(Call& call, const Rows& x, MakeRow make_row, const Result& y) const {
  const int groups = pieces(columns_, kGroup), workers = std::min(threads_, groups), rows = x.count / planes_;
  std::atomic<int> next_row{0}, made{0};
  Runs runs(groups, workers);
  const auto work = [&](int worker) {
    for (int row = next_row++; row < rows; row = next_row++) make_row(row, 0, worker), made++;
    wait_until([&] { return made >= rows; });
    int32_t sums[kMostDirectNibbles * kGroup];
    for (int group = runs.take(worker); group >= 0; group = runs.take(worker)) {
      const auto* next = reinterpret_cast<const uint8_t*>(successor_->begin(worker));
      if (group < runs.last(worker)) next = nibbles_.group(group + 1).values;
      arithmetic_.nibbles(x.values, x.count, x.stride, nibbles_.group(group), next, sums, kGroup);
      const int column = group * kGroup;
      arithmetic_.scale(sums, kGroup, x.count, std::min(kGroup, columns_ - column), y.from(0, column));
    }
  };
  call.parallel(workers, work, {nibbles_.group(0).values, groups / workers * nibbles_.group_size()}, successor_);
}

void RowwiseMatMul::by_columns(Call& call, const Rows& x, const Result& y) const {
  const int tasks = pieces(columns_, kTaskColumns), workers = std::min(threads_, tasks);
  const size_t task_size = static_cast<size_t>(kTaskColumns) * depth_;
  int32_t* const sums = integers(scratch(1, static_cast<size_t>(workers) * kTaskColumns * x.count));
  Runs runs(tasks, workers);
  const auto work = [&](int worker) {
    int32_t* const own = sums + static_cast<size_t>(worker) * kTaskColumns * x.count;
    for (int task = runs.take(worker); task >= 0; task = runs.take(worker)) {
      const int begin = task * kTaskColumns, end = std::min(begin + kTaskColumns, columns_);
      arithmetic_.rows(x.values, x.count, x.stride, weights_ + task * task_size, depth_, end - begin, own,
                       kTaskColumns);
      arithmetic_.scale(own, kTaskColumns, x.count, end - begin, y.from(0, begin));
    }
  };
  call.parallel(workers, work, {weights_, tasks / workers * task_size}, successor_);
}

RowwiseMatMul::Lines RowwiseMatMul::lines_of_blocks() const {
  if (nibbles_)
    return {nibbles_.group(0).values, kBlock / kGroup * nibbles_.group_size(), 64, kBlock / kGroup * nibbles_.lines()};
  const auto* const begin = reinterpret_cast<const uint8_t*>(weights_);
  if (transposed_) return {begin, static_cast<size_t>(kBlock) * depth_, kBlock, depth_};
  return {begin, kBlock, static_cast<size_t>(columns_), depth_};
}

void RowwiseMatMul::pack(int begin, int end, int8_t* panel) const {
  if (nibbles_)
    arithmetic_.pack_nibbles(nibbles_.group(begin / kGroup), pieces(end - begin, kGroup), panel);
  else if (transposed_)
    arithmetic_.pack_rows(weights_ + static_cast<size_t>(begin) * depth_, depth_, end - begin, panel);
  else
    arithmetic_.pack_columns(weights_, depth_, columns_, begin, panel);
}

// A task reorders a block of columns into a panel and multiplies rows by it while it is in the caches. Meanwhile it
// prefetches the block that its thread is likely to take next. If the last blocks are too few for all threads, they are
// divided by rows.
void RowwiseMatMul::by_panels(Call& call, const Rows& x, const Result& y) const {
  const int at_once = padded(kRowsAtOnce, arithmetic_.panel_rows);
  const int blocks = pieces(columns_, kBlock), groups = pieces(x.count, at_once);
  const int left = blocks % threads_, whole = blocks - left, parts = left == 0 ? 1 : threads_ / left;
  const int depth = nibbles_ ? nibbles_.depth() : padded(depth_, 4);
  const size_t own = static_cast<size_t>(depth) * kBlock;
  const Lines lines = lines_of_blocks();
  auto* const panels = Memory::laid_out(1, [&](Memory& memory) { return memory.take<int8_t>(threads_ * own); });
  call.share(whole + left * parts, threads_, [&](int task, int worker) {
    const int block = task < whole ? task : whole + (task - whole) / parts;
    const int part = task < whole ? 0 : (task - whole) % parts, of = task < whole ? 1 : parts;
    const int begin = block * kBlock, end = std::min(begin + kBlock, columns_), next = block + threads_;
    int8_t* const panel = panels + worker * own;
    pack(begin, end, panel);
    for (int group = groups * part / of; group < groups * (part + 1) / of; group++) {
      const int line = lines.count * group / groups, last = lines.count * (group + 1) / groups;
      Ahead ahead{};
      if (next < blocks) ahead = {lines.begin + next * lines.block + line * lines.stride, lines.stride, last - line};
      const int row = group * at_once, count = std::min(at_once, x.count - row);
      arithmetic_.panel(x.values + row * x.stride, count, x.stride, panel, depth, end - begin, ahead,
                        y.from(row / planes_, begin));
    }
  });
}

}  // namespace edgelm
