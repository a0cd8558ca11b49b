// Which rows of x a call computes, and what is added to the scores of which of them.
//
// Rows are counted as they are computed, those of a sequence one behind the other: "row in x" says where one lies. Both
// are the same but where padding is skipped: there a sequence has the rows alone that its mask shows as keys, and
// longer sequences come first, so that threads end together.
#pragma once

#include <cstdint>

#include "block.h"

namespace pycompress::block {

struct Sequence {
  int64_t at;              // which of x's it is
  int64_t first, length;   // the rows of it that are computed
  int64_t keys;            // of these, how many attention looks at: masks hide all that lie behind
  const float* key_mask;   // [keys], what the masks below add up to; or null
  bool is_in_key_mask[2];  // of each of the call's masks: whether it is the same for all queries and heads
};

class Sequences {
 public:
  // Reads the masks; until the next one is made on this thread.
  explicit Sequences(const Problem& problem);

  int64_t count() const { return p_.batch; }
  int64_t rows() const { return rows_; }
  const Sequence& operator[](int64_t i) const { return all_[i]; }
  int64_t longest() const { return all_[0].length; }

  int64_t row_in_x(int64_t row) const { return rows_in_x_ == nullptr ? row : rows_in_x_[row]; }

  // How many of rows [row, row + rows), from the first one on, lie one behind the other in x.
  int64_t adjacent(int64_t row, int64_t rows) const {
    if (rows_in_x_ == nullptr) return rows;
    int64_t n = 1;
    while (n < rows && rows_in_x_[row + n] == rows_in_x_[row] + n) ++n;
    return n;
  }
  // f(row in x, which of these it is, how many that are adjacent) for rows [row, row + rows).
  template <class F>
  void for_adjacent(int64_t row, int64_t rows, F&& f) const {
    for (int64_t i = 0, n; i < rows; i += n) {
      n = adjacent(row + i, rows - i);
      f(row_in_x(row + i), i, n);
    }
  }

  // f(row in x, how many) for the rows of a sequence that are not computed.
  template <class F>
  void for_skipped(const Sequence& s, F&& f) const {
    int64_t next = s.at * p_.length;
    const int64_t end = next + p_.length;
    for (int64_t row = s.first; row < s.first + s.length; ++row) {
      if (row_in_x(row) > next) f(next, row_in_x(row) - next);
      next = row_in_x(row) + 1;
    }
    if (end > next) f(next, end - next);
  }

  // Fills scores with what the other masks add to them for some queries, and says whether there is anything. `rows`:
  // room for [queries][keys].
  bool start(const Kernel& kernel, const Sequence& s, int head, int64_t query, int queries, float* rows,
             float* scores) const;

 private:
  bool is_of_keys(const Mask& mask, int64_t at) const;
  float value_of_key(int mask, const Sequence& s, int64_t key) const;
  int64_t shown(const Sequence& s) const;
  void list_rows();
  void read_key_mask(Sequence* s, float* sum) const;
  int64_t position(const Sequence& s, int64_t row) const { return row_in_x(s.first + row) - s.at * p_.length; }

  const Problem& p_;
  int64_t rows_ = 0;
  Sequence* all_ = nullptr;
  int64_t* rows_in_x_ = nullptr;
};

}  // namespace pycompress::block
