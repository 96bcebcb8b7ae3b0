// edgelm::GroupQueryAttention: com.microsoft's operator of that name on a cache of 8 bits, scaled by channel, or of
// floats. edgelm::KeptGroupQueryAttention, with one more input, computes only the last rows; the two functions with
// Normed in their names norm the heads of queries and keys first.
//
// The length of a row of an 8-bit cache shows how it is scaled. A row as long as a head has only the scales of its
// channels, which the graph fixes: larger values are clipped. A row that is longer by a float also has a scale of its
// own in that float: it is computed from the row's largest value when the row is written, so nothing is clipped.
//
// Products are integer products. Values of an 8-bit cache are used as they are; a query is rounded to 16 bits, relative
// to its largest value, and the weights of a chunk's values to 15, relative to the largest of them. In a float cache,
// keys and values are rounded to 12 to 14 bits for each position, depending on the size of a head, and queries and
// weights to the bits that remain of 32. The sums are exact in any order.
//
// The other additions for a position have one order, whatever other positions a step computes: the cache is cut into
// chunks of kChunk positions, counted from its beginning. In a chunk, scores are weighted relative to the largest of
// them; chunks are merged in order by online softmax (Milakov and Gimelshein, arXiv 1805.02867). Many rows are divided
// among threads by rows, few rows by chunks (flash-decoding), with the same bits. Keys and values are reordered for the
// products once for all rows of a task, and multiplied with these rows tile by tile.
#pragma once

#include <type_traits>

#include "arithmetic.h"
#include "operator.h"

namespace edgelm {

// Cached: int8_t or float.
template <typename Cached>
class Attention {
 public:
  Attention(const Info& info, int threads);

  void compute(Call& call) const;

 private:
  static constexpr bool kRounded = std::is_same_v<Cached, int8_t>;

  // The inputs of a call. Positions are counted within a sequence of the batch.
  struct Step {
    int batch, rows, capacity;
    int kept;                         // the last rows of each sequence, whose results are requested
    int stride_cache;                 // from one position's keys or values to the next
    bool scaled;                      // rows of the cache end with a scale of their own
    size_t stride_query, stride_key;  // from one position to the next
    const float *query, *key, *value;
    const int32_t* lengths;  // of each sequence, with this step's rows, minus 1
    bool first;              // nothing was cached before
    const float *cosines, *sines;
    int angles, half;  // positions that have angles, and half of a head's rotated values
    Cached *keys, *values;
    float* output;

    int past(int sequence) const { return first ? 0 : lengths[sequence] + 1 - rows; }
    int left_out() const { return rows - kept; }
  };
  // Rows that attend together: the heads of a group, side by side, at positions [begin, begin + positions) of a step.
  // The tile of a task is cut into smaller tiles.
  struct Tile {
    int sequence, group, begin, positions;
  };

  // Queries (rows, width) as integers, and for each row the factor that turns its scores into exponents of two.
  struct Queries {
    int16_t* values;
    float* factors;
  };
  using Part = AttentionPart;
  using State = AttentionState;
  // A reordered chunk: keys and values of `count` positions as columns, and their scale at each position; null if they
  // have no scales.
  struct Chunk {
    int16_t *keys, *values;
    float *key_scales, *value_scales;
    int count;
  };
  // Scores and weights of a tile (rows, kChunk).
  struct Scores {
    float *values, *largest;
    int16_t* weights;
    int *begin, *end;  // the positions that each row sees
  };

  Queries queries(Memory& memory, int rows) const;
  Part part(Memory& memory, int rows) const;
  State state(Memory& memory, int rows) const;
  Chunk chunk(Memory& memory) const;
  Scores scores(Memory& memory, int rows) const;
  Queries from(const Queries& queries, size_t row) const;
  Part from(const Part& part, size_t row) const;
  State from(const State& state, size_t row) const;

  void read_scales(const Info& info);
  Step read(Call& call) const;
  void read_heads(Call& call, const Tensor& query, Step& step) const;
  void read_places(Call& call, Step& step) const;
  void read_cache(Call& call, int positions, Step& step) const;
  int head_size(const Info& info) const;
  const float* head_norm(const Info& info, size_t input) const;
  void place_head(const Step& step, int position, const float* norm, float* head) const;
  void append(const Step& step, int sequence, int row) const;
  void store_row(const float* x, const float* factors, bool scaled, Cached* row) const;
  void read_row_scales(const Step& step, const Cached* rows, int count, float* scales) const;
  void prepare(const Step& step, const Tile& tile, const Queries& queries) const;
  size_t place(const Step& step, const Tile& tile, int index) const;
  Chunk arranged(const Step& step, const Tile& tile, int index, size_t next, Chunk chunk) const;
  void weigh(const Step& step, const Tile& tile, int index, const Queries& queries, const Chunk& chunk,
             const Scores& scores, const Part& part) const;
  int seen_pairs(const Step& step, const Tile& tile, int index) const;
  void clear(int rows, const State& state) const;
  void gather(const Step& step, const Tile& tile, const Part& parts, const State& result) const;
  void write(const Step& step, const Tile& tile, const State& state) const;
  void by_rows(Call& call, const Step& step) const;
  void by_chunks(Call& call, const Step& step) const;
  int first_chunk(const Step& step, const Tile& tile) const;
  int last_chunk(const Step& step, const Tile& tile) const;
  int parts_of(const Step& step) const;
  int cut(const Step& step, int sequence, int nth, int parts) const;
  int rows_of(const Tile& tile) const { return tile.positions * per_group_; }

  const Arithmetic& arithmetic_;
  int threads_;
  int heads_, groups_, per_group_, size_;
  int width_;   // size, padded to lanes
  int window_;  // positions that a position sees, itself included; 0: all
  bool rotary_;
  float epsilon_;  // of the norms of queries and keys; below 0: there are none
  const float *query_norm_ = nullptr, *key_norm_ = nullptr;
  int key_limit_, query_limit_;  // largest integers, with which a score fits into 32 bits
  // For each channel of all groups: the scale of a query, which includes the scale of scores for powers of two, and the
  // scale of a value.
  std::vector<float> query_scales_, value_scales_;
  std::vector<float> key_factors_, value_factors_;  // inverses of the scales of a cache of 8 bits
  std::shared_ptr<Successor> successor_ = std::make_shared<Successor>();
};

}  // namespace edgelm
