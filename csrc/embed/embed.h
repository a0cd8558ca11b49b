// The embeddings of a text encoder: rows that ids choose from tables, their sum, and its LayerNorm. The contract;
// `scalar.cpp` is its specification, and every kernel gives its bits.
//
//   s[b, l, :] = (table_0[id_0[b, l]] + table_1[id_1[b, l]]) + table_2[id_2[b, l]]           in float32
//   rows of int8 times their scale first
//   y[b, l, :] = s, or ((s - mean) * (1 / sqrt(var + eps))) * weight + shift, rounded once to the type of y
//
// mean = sum s / d; then var = sum (s - mean)^2 / d; both sums as common/partials.h has them, products and sums apart.
// Ids that are counted are positions as RoBERTa has them: those of tokens other than `padding`, from padding + 1 on in
// each sequence; padding where there is none.
//
// Floor: the rows at the read bandwidth, and y at the write bandwidth.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../common/isa.h"
#include "../common/types.h"

namespace pycompress {
template <class Kernel>
class Kernels;
}

namespace pycompress::embed {

constexpr int kMaxTables = 3;

struct Table {
  const void* data;  // [rows, d], rows `stride` elements apart
  Type type;         // of floats
  int64_t rows;
  ptrdiff_t stride;
  const float* scale;  // null; or [rows]: the rows are int8, and stand for themselves times their scale
};

// [batch, length], a stride of 0 where one stands for all.
struct Ids {
  const void* data;  // null: counted
  bool wide;         // int64, else int32
  ptrdiff_t of_batch, of_position;
};

struct Channels {    // [d]
  const void* data;  // or null: ones, or zeros
  Type type;
};

struct Problem {
  int tables;
  Table table[kMaxTables];
  Ids ids[kMaxTables];
  bool counts;  // some ids are counted: of those of table 0
  int64_t padding;
  int64_t batch, length, d;
  bool norm;
  Channels weight, shift;
  float eps;
  void* y;  // [batch, length, d]
  Type type;
  int threads;
};

// Throws std::out_of_range where an id chooses no row, and names it.
void embed(const Problem& problem);

// One row of y.
struct Row {
  const void* part[kMaxTables];  // where the chosen rows begin
  Type type[kMaxTables];
  const float* scale[kMaxTables];  // of the row, which is int8 then; or null
  int parts;
  int64_t d;
  const float *weight, *shift;  // padded as `sums`, or null: no norm
  float eps;
  float* sums;  // scratch, padded with zeros to a multiple of kPartials
  void* y;
  Type y_type;
};

struct Kernel {
  const char* name;
  Isa isa;
  int mr, nr, kr;
  void (*run)(const Row& row);
};
Kernels<Kernel>& kernels();

}  // namespace pycompress::embed
