// One layer and direction of an LSTM or a GRU whose weights are int8. The contract; `scalar.cpp` is the specification
// of the gates, and every kernel gives its bits.
//
//   gx[r, :] = int8 linear of x[r, :] with W_ih and b_ih         int8/gemm.h, all rows of many steps at once
//   gh[b, :] = int8 linear of h[b, :] with W_hh and b_hh         int8/gemm.h, one product a step: h is quantized by
//   rows
//
//   lstm (gates i f g o):  i = s(gx + gh), f, o alike, g = t(gx + gh)
//                          c = f * c + i * g,  h = o * t(c)
//   gru (gates r z n):     r = s(gx + gh), z alike, n = t(gx + r * gh)
//                          h = (h - n) * z + n
//
// in float32, each operation rounded by itself, no fma. With e = exp(-|u|) of common/activation.h
//
//   s(u) = 1 / (1 + e), for u < 0 times e;      t(u) = (1 - e) / (1 + e) of e = exp(-2|u|), with the sign of u
//
// Both lie within 5 * 2^-24 of the exact function, and have its limits at +-Inf. NaN stays NaN: a row of x or h that
// holds NaN or Inf gives NaN from there on, as a row of the int8 linear does, in its own sequence alone.
//
// x has the rows of step 0, then those of step 1...: batch_sizes[t] of them, never more than at the step before, so
// that sequence b has the row b of each of its steps (what torch calls a packed sequence). In reverse the steps are
// walked from the last one on; a sequence that is shorter begins later.
//
// The floor of a step: W_hh at the read bandwidth, which is n * k bytes (1 MB at 512 hidden units of an LSTM); with
// many sequences 2 * batch * n * k operations at the integer peak. A step waits for the one before, so a step is all
// that threads can share: the int8 linear splits its channels from 1.5e6 operations on, and the gates are split by
// rows.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../common/isa.h"
#include "../common/types.h"

namespace pycompress::recurrent {

enum class Cell : int { lstm = 0, gru = 1 };
constexpr int gates_of(Cell cell) { return cell == Cell::lstm ? 4 : 3; }

// A packed int8 weight with its scale, and a bias or null.
struct Matrix {
  const uint8_t* packed;
  int64_t packed_bytes;
  const float* scale;
  const float* bias;
};

struct Problem {
  Cell cell;
  const void* x;  // [rows, k], row stride ldx (elements)
  Type x_type;
  int64_t rows, k, ldx;
  Matrix input, hidden;        // [gates * size, k], [gates * size, size]
  const int64_t* batch_sizes;  // [steps], their sum is rows
  int64_t steps, batch, size;  // batch: of step 0
  bool reverse;
  float* h;  // [batch, size]: before the first step, and after the last one of each sequence
  float* c;  // the same of an LSTM; null
  float* y;  // [rows, size], row stride ldy: h after each step
  int64_t ldy;
  int threads;
};

void run(const Problem& problem);

// A row of `size` units, gates one behind another: c and h become those of the next step, y a copy of h.
struct Kernel {
  const char* name;
  Isa isa;
  int mr, nr, kr;
  void (*lstm)(const float* gx, const float* gh, int64_t size, float* c, float* h, float* y);
  void (*gru)(const float* gx, const float* gh, int64_t size, float* h, float* y);
};
Kernels<Kernel>& kernels();

}  // namespace pycompress::recurrent
