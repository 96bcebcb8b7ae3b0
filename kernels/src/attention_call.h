// Attention: the inputs of a call, checked before anything is computed. Part of attention.cc.
#pragma once

#include "attention.h"

namespace edgelm {

template <typename Cached>
Attention<Cached>::Step Attention<Cached>::read(Call& call) const {
  const Tensor query = call.input(0);
  require(query.shape.size() == 3, "queries have three axes: batch, positions, values");
  Step step{};
  step.batch = within(query.shape[0], 0, kMostPositions, "the batch");
  step.rows = within(query.shape[1], 0, kMostPositions, "the positions of a step");
  within(query.shape[0] * query.shape[1] * heads_, 0, kMostRows, "the heads of all rows");
  step.kept = kept(step.rows, call.input(kStart, true));
  for (const size_t unknown : kUnknown)
    require(!call.has(unknown), "attention with positions, a bias or a sink belongs to com.microsoft");
  read_heads(call, query, step);
  read_places(call, step);
  step.output = call.output<float>(0, {step.batch, step.kept, heads_ * size_});
  return step;
}

// Queries, keys and values: side by side if the last two inputs are missing or are weights of norms.
template <typename Cached>
void Attention<Cached>::read_heads(Call& call, const Tensor& query, Step& step) const {
  const int queries = heads_ * size_, others = groups_ * size_;
  const Tensor key = query_norm_ != nullptr ? Tensor{} : call.input(1, true);
  const Tensor value = query_norm_ != nullptr ? Tensor{} : call.input(2, true);
  const bool packed = key.shape.empty();
  step.stride_query = packed ? queries + 2 * others : queries;
  step.stride_key = packed ? step.stride_query : others;
  require(query.shape[2] == static_cast<int64_t>(step.stride_query), "the query has another size than its heads");
  const std::vector<int64_t> shape =
      packed ? std::vector<int64_t>{} : std::vector{query.shape[0], query.shape[1], int64_t{others}};
  require(key.shape == shape && value.shape == shape,
          "keys and values have another shape than the query and their heads");
  step.query = query.values<float>();
  if (step.query == nullptr) return;  // a batch of no rows
  step.key = packed ? step.query + queries : key.values<float>();
  step.value = packed ? step.key + others : value.values<float>();
}

// The positions of the step's rows in the cache, and their angles.
template <typename Cached>
void Attention<Cached>::read_places(Call& call, Step& step) const {
  const Tensor lengths = call.input(5), total = call.input(6);
  require(lengths.shape == std::vector<int64_t>{step.batch}, "each sequence of a batch has a length");
  require(total.shape.empty() || total.shape == std::vector<int64_t>{1}, "the number of positions is one number");
  step.lengths = lengths.values<int32_t>();
  const int positions = within(*total.values<int32_t>(), 0, kMostPositions, "the number of positions");
  step.first = positions == step.rows;
  if (rotary_) {
    const Tensor cosines = call.input(7), sines = call.input(8);
    require(cosines.shape.size() == 2 && sines.shape == cosines.shape && 2 * cosines.shape[1] <= size_,
            "cosines and sines are tables by positions, of at most half a head's values");
    step.cosines = cosines.values<float>(), step.sines = sines.values<float>();
    step.angles = static_cast<int>(std::min<int64_t>(cosines.shape[0], kMostPositions));
    step.half = static_cast<int>(cosines.shape[1]);
  }
  read_cache(call, positions, step);
  for (int i = 0; i < step.batch; i++) {
    const int64_t past = step.first ? 0 : int64_t{step.lengths[i]} + 1 - step.rows, end = past + step.rows;
    if (past < 0 || end > step.capacity || (rotary_ && end > step.angles))
      throw std::runtime_error("positions " + std::to_string(past) + " to " + std::to_string(end) +
                               " of a sequence in a cache of " + std::to_string(step.capacity) +
                               " are not there, or have no angles");
  }
}

// The cache, with its earlier contents.
template <typename Cached>
void Attention<Cached>::read_cache(Call& call, int positions, Step& step) const {
  const Tensor keys = call.input(3), values = call.input(4);
  require(keys.shape.size() == 4 && keys.shape[0] == step.batch && keys.shape[1] == groups_,
          "a cache has four axes: batch, groups, positions, values");
  require(values.shape == keys.shape, "the caches of keys and values have one shape");
  const int past = within(keys.shape[2], 0, kMostPositions, "the positions of a cache");
  step.capacity = std::max(past, positions);
  step.stride_cache = static_cast<int>(std::min<int64_t>(keys.shape[3], 2 * kMostSize));
  step.scaled = kRounded && step.stride_cache == size_ + kScaleBytes;
  require(step.scaled || step.stride_cache == size_,
          "a row of the cache has another length than a head, with or without a scale");
  const std::vector<int64_t> cache{step.batch, groups_, step.capacity, step.stride_cache};
  step.keys = call.output<Cached>(1, cache), step.values = call.output<Cached>(2, cache);
  const size_t row = static_cast<size_t>(past) * step.stride_cache;
  const size_t place = static_cast<size_t>(step.capacity) * step.stride_cache;
  for (auto [from, to] :
       {std::pair(keys.values<Cached>(), step.keys), std::pair(values.values<Cached>(), step.values)}) {
    if (from == nullptr || from == to) continue;  // nothing, or in place
    for (size_t i = 0; i < static_cast<size_t>(step.batch) * groups_; i++)
      std::copy_n(from + i * row, row, to + i * place);
  }
}

}  // namespace edgelm
