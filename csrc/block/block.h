// A transformer block in one call: the contract of the op. x and y float [batch, length, d]; in between all is float32.
//
//   attention(h) = output( o(query(h), key(h), value(h)) )       o: see kernel.h, per head of head_size channels
//   mlp(h)       = down( act(up(h)) ),  gated: down( act(gate(h)) * up(h) )
//   post-norm      h = norm(x + attention(x)),    y = norm(h + mlp(h))
//   pre-norm       h = x + attention(norm(x)),    y = h + mlp(norm(h))
//
// The products are those of the layers' own ops (product.h): the same integers for the same input. y does not depend on
// the threads, nor on what other sequences there are.
//
// Floor: the products' own floors on these rows; attention's (kernel.h); and the bytes of x, of y and of each weight
// once. What lies between the products stays in the cache, because rows are split first. Where whole sequences make
// enough tasks there is one region of threads, and a task takes its sequences from x to y. Where there are fewer, rows
// are split for the products and heads for the attention: three regions. With a few rows only, each product is shared
// out by its channels, so that every thread reads a part of the weights alone.
#pragma once

#include <cstdint>

#include "kernel.h"
#include "product.h"

namespace pycompress::block {

enum Role : int { kQuery, kKey, kValue, kOutput, kUp, kGate, kDown, kProducts };
enum NormRole : int { kAttentionNorm, kMlpNorm, kNorms };

struct Shape {
  int heads, head_size;
  float scale;  // of the scores
  bool pre_norm, rms, causal;
  bool skips_padding;  // where the first mask is one of keys alone, 0 or hiding: y is 0 in rows that it hides
  float eps[kNorms];
  Activation activation;
  Weight weights[kProducts];
};

// A vector of any float type.
struct Values {
  const void* data = nullptr;  // or null
  Type type = Type::float32;
};

// What is added to the scores: [batch, heads, queries, keys] by its strides (elements), 0 where it is broadcast.
struct Mask {
  const void* data = nullptr;  // or null
  Type type = Type::float32;
  bool is_bool = false;  // bytes: 0 adds -inf
  int64_t stride[4] = {};
};

struct Problem {
  Shape shape;
  Product products[kProducts];  // their bias left out
  Values bias[kProducts];
  Values norm_weight[kNorms], norm_shift[kNorms];
  const void* x;
  Type type;  // of x and y
  int64_t batch, length, d;
  Mask masks[2];
  void* y;
  int threads;
};
void run(const Problem& problem);

}  // namespace pycompress::block
