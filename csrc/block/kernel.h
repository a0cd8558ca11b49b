// What a transformer block does between its products: attention, sums with the residual, norms. The contract;
// scalar.cpp is its specification, which the others equal within the bounds below (they add up in another order).
//
// Attention of a tile of queries i of one head, over the keys j = 0 .. keys - 1:
//
//   s[j, i] = scale * sum_c q[i, c] k[j, c]  (+ start[j, i] + key_mask[j]; -inf where causal and j > first_query + i)
//   p[j, i] = exp(s[j, i] - max_j s[j, i])
//   o[i, c] = sum_j p[j, i] v[j, c] / sum_j p[j, i]        0 for a query that sees no key; NaN where a score is NaN or
//   +inf
//
// Queries lie side by side: a tile of scores is [keys][tile], so that softmax runs down the columns without a
// horizontal sum, the keys and the values are read where the products left them (broadcast, and by rows), and only the
// queries of a tile are turned. Sums run in ascending c and j, one chain of fma each: o does not depend on how queries
// are tiled.
//
// With u = 2^-24, d = head_size, A = |scale| sum_c |q k|, M = |start + key_mask| and e the largest of u (d + 5) (A + M)
// over the keys that are seen, a share p is within 1 + s = exp(2 e + 90 u) (1 + 8 u) of its own, and
//     |o - o64| <= ((1 + s) / (1 - s) (1 + gamma(2 keys + 4)) - 1) sum_j p |v| / sum_j p.
//
// Norms of a row of n: mean and variance in two passes; tests/native/block.cpp derives the bound of y from those of the
// two.
//
// Floor of attention: 4 head_size multiply-adds a query and key at the fp32 FMA peak, and one exponential (16
// operations a vector).
#pragma once

#include <cstddef>
#include <cstdint>

#include "../common/isa.h"
#include "../common/types.h"

namespace pycompress::block {

constexpr int kMaxTile = 32;   // queries of a tile, at most
constexpr int kOverread = 16;  // floats behind the last row of v that must be readable

struct Attention {
  const float *q, *k, *v;  // of the head's first channel, the tile's first query; row strides
  ptrdiff_t ldq, ldk, ldv;
  int queries, keys, head_size;  // queries <= tile
  float scale;
  int64_t first_query;  // of the sequence's, for a causal mask
  bool causal;
  const float* key_mask;  // [keys], added; or null
  bool started;           // scores hold what is added to them
  float* scores;          // [keys][tile_for(queries)]
  float* turned;          // [head_size][kMaxTile], room
  float* o;
  ptrdiff_t ldo;
};
using Attend = void (*)(const Attention& attention);

// out[column][tile] (+)= rows[queries][columns], row stride ld: a tile of what is added to scores, turned.
using Turn = void (*)(const float* rows, ptrdiff_t ld, int queries, int columns, int tile, bool add, float* out);

struct Norm {
  bool rms;  // x / sqrt(mean x^2 + eps) * weight; else (x - mean) / sqrt(var + eps) * weight + shift
  float eps;
  const float *weight, *shift;  // [n] or null
};

// sum[rows][n] += residual[rows][n], where there is one; y[rows][n] = norm(sum), where there is a norm. y may be sum.
using AddNorm = void (*)(float* sum, const float* residual, int rows, int n, const Norm* norm, float* y);

// x[count] *= y[count]
using Multiply = void (*)(float* x, const float* y, int64_t count);

struct Kernel {
  const char* name;
  Isa isa;
  int mr, nr, kr;  // queries of the widest and of the narrower tile; 1
  Attend attend;
  Turn turn;
  AddNorm add_norm;
  Multiply multiply;

  int tile_for(int queries) const { return queries <= nr ? nr : mr; }
};
Kernels<Kernel>& kernels();

}  // namespace pycompress::block
