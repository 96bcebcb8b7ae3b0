// edgelm::GroupQueryAttention: com.microsoft's operator of that name on a cache of 8 bits, scaled by channel.
//
// A position's result is one order of additions, whatever other positions a step computes: the cache is cut into chunks
// of kChunk positions, counted from its beginning. In a chunk the scores of all keys are exponentiated against the
// largest of them, and the values added in their order; chunks are merged in their order, by the rule of online softmax
// (Milakov and Gimelshein, arXiv 1805.02867). Work is shared out by rows where there are many, by chunks where there
// are few (flash-decoding), and both give the same bits. Keys and values are widened to float once for all rows of a
// tile.
#pragma once

#include "arithmetic.h"
#include "operator.h"

namespace edgelm {

class Attention {
 public:
  Attention(const Info& info, int threads);

  void compute(Call& call) const;

 private:
  // What a call is given. Positions are counted within a sequence of the batch.
  struct Step {
    int batch, rows, capacity;
    size_t stride_query, stride_key;  // from one position to the next
    const float *query, *key, *value;
    const int32_t* lengths;  // of each sequence, with this step's rows, less 1
    bool first;              // nothing was cached before
    const float *cosines, *sines;
    int angles, half;  // positions that have angles, and half of a head's rotated values
    int8_t *keys, *values;
    float* output;

    int past(int sequence) const { return first ? 0 : lengths[sequence] + 1 - rows; }
  };
  // Rows that attend together: the heads of a group, side by side, at positions [begin, begin + positions) of a step.
  struct Tile {
    int sequence, group, begin, positions;
  };

  Step read(Call& call) const;
  void rotated(const Step& step, int position, float* head) const;
  void append(const Step& step, int sequence, int row) const;
  void queries(const Step& step, const Tile& tile, float* q) const;
  void attend(const Step& step, const Tile& tile, int chunk, const float* q, float* memory, float* state) const;
  void merge(int rows, float* state, const float* next) const;
  void write(const Step& step, const Tile& tile, const float* state) const;
  void by_rows(Call& call, const Step& step) const;
  void by_chunks(Call& call, const Step& step) const;
  int first_chunk(const Step& step, const Tile& tile) const;
  int last_chunk(const Step& step, const Tile& tile) const;
  int rows_of(const Tile& tile) const { return tile.positions * per_group_; }
  size_t state_floats(int rows) const;
  size_t chunk_floats(int rows) const;

  const Arithmetic& arithmetic_;
  int threads_;
  int heads_, groups_, per_group_, size_;
  int width_;   // size, padded to lanes
  int window_;  // positions that a position sees, itself included; 0: all
  bool rotary_;
  float scale_;
  std::vector<float> key_scales_, value_scales_;
  std::vector<float> key_factors_, value_factors_;  // their inverses
};

}  // namespace edgelm
