// int4 linear: the contract of the op. `scalar.cpp` is its specification; every other kernel equals it to the bit.
//
//   y[m, n]      = act(u * sx[m] + bias[n])                      two roundings, no fma
//   u[m, n]      = fma(-zp[m], offset[n], v)                     zp as float
//   v[m, n]      = fma(dot, scale[n, g], v) over the groups g in ascending order, starting at 0; dot as float, exact
//   dot[m, n, g] = sum of q[m, k] * (w[n, k] - zero[n, g]) over the positions k of group g, exact int32, below 2^24
//   offset[n]    = v of a row of ones
//
//   w   4-bit integers 0 .. 15 [n, k]; scale bfloat16 and zero point 0 .. 15 per channel and group of 32, 64 or 128
//   q   uint8 [m, k], sx and zp: the rows of x quantized to 8 bits exactly as int8_linear does (csrc/int8/gemm.h)
//   A row of x that holds NaN or Inf gives a row of NaN.
//
// The lane budget of `vpmaddubsw` (csrc/int8/pack.h): a 16-bit lane that adds up four of its results holds eight
// products of at most 255 * 15, which fit whatever the weights are. Eight results fit where 255 times the positive ones
// of 16 weights, and 255 times the negative ones, do; that is checked as the weight is packed, panel by panel, and
// holds for ordinary weights, whose zero point lies in the middle. So a chain has depth 8 (a panel is `deep`) or 4.
//
// Floors. Many rows, on Zen 3: 32 positions x 8 channels take 8 maddubs, 7 adds, a widening, a conversion and an FMA:
// 18 operations on four pipes, 57 products a cycle beside 16 of fp32 FMA, 3.5 x its peak (depth 4: 3.2 x). Few rows:
// the packed bytes, 4.75 bits a weight (group 32 with zero points, as packed; 4.5 without; 4.19 for group 128), at the
// read bandwidth.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../int8/gemm.h"

namespace pycompress::int4 {

constexpr int kUnit = 32;        // positions of k that are unpacked together
constexpr int kPanel = 16;       // channels that lie together
constexpr int kUnitBytes = 256;  // of one unit of one panel
constexpr int kSymmetricZero = 8;

// Some units of a panel of a packed weight (pack.h), the first of which begins a group.
struct Panel {
  const uint8_t* nibbles;  // [units][kUnitBytes]
  const uint16_t* scale;   // bfloat16 [groups][kPanel]
  const uint8_t* zero;  // [groups][kPanel / 2]: channel c in the low nibble of byte c, c + 8 in the high one; or null
  int units, group_units;  // of all units; of a group: 1, 2 or 4. The last group may have fewer
  bool deep;               // chains of depth 8 fit
};

// The same for the multiplication: w - zero as int8 [units][kUnit / 4][kPanel][4], float32 scales [groups][kPanel].
struct Expanded {
  int8_t* weights;
  float* scale;
};
using Expand = void (*)(const Panel& panel, const Expanded& to);

// v[rows][kPanel] (+)= q . panel; q has row stride ldq, rows <= mr.
using Tile = void (*)(const uint8_t* q, ptrdiff_t ldq, int rows, const Panel& panel, const Expanded& from, float* v,
                      bool accumulate);

// The same for all of a panel and rows <= mr, without the detour: what few rows need once is not worth expanding. Or
// null.
using Stream = void (*)(const uint8_t* q, ptrdiff_t ldq, int rows, const Panel& panel, float* v);

// Columns [0, columns) of one panel: y (row stride ldy) = act(fma(-zp, offset, v) * sx + bias).
struct Epilogue {
  const float* offset;        // [kPanel]
  const float* bias;          // [columns] or null; of row i at bias + i * bias_stride
  ptrdiff_t bias_stride;      // 0, or what lets 16 floats be read from each row
  const float* row_scale;     // [rows]
  const int32_t* zero_point;  // [rows]
  Activation activation;
  Type type;
};
using Finish = void (*)(const float* v, int rows, int columns, const Epilogue& epilogue, void* y, ptrdiff_t ldy);

struct Kernel {
  const char* name;
  Isa isa;
  int mr, nr, kr;
  Expand expand;
  Tile tile;
  Stream stream;
  Finish finish;
};

Kernels<Kernel>& kernels();

// y[m, n] for x[m, k] with row stride ldx (elements). `packed` is what pack() made. y is dense, row stride n.
struct Problem {
  const void* x;
  Type x_type;
  int64_t m, k, ldx;
  const uint8_t* packed;
  int64_t packed_bytes, n;
  const float* bias;
  Activation activation;
  void* y;
  Type y_type;
  int threads;
  const int8::Quantized* quantized = nullptr;  // instead of quantizing x, where it is of the shape that is needed
  const int8::Addend* addend = nullptr;        // instead of the bias
};
void linear(const Problem& problem);
void linear(const Problem& problem, const Kernel& kernel);

}  // namespace pycompress::int4
