// Products of float32 rows with panels of float32 channels: what ops are made of whose weights are floats, or become
// floats on the way. The contract; `scalar.cpp` is its specification.
//
//   c[m, n] = start[m, n] + sum_k a[m, k] w[n, k]      chains of fma in ascending k
//
// `few` runs several chains a result, which are added at the end: its sums are those of `many` but for the order.
//
// Floor: 2 m n k operations at the fp32 FMA peak, or the panels at the read bandwidth.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../common/isa.h"
#include "../common/types.h"

namespace pycompress::dense {

constexpr int kPanel = 16;   // channels of one panel: float [panels][k][kPanel], zero padded (pack.h)
constexpr int kFewRows = 3;  // up to here `few` runs

// c[rows][panels * kPanel] = start + a[rows][k] . panels, row stride ldc. start: null for zeros; else float
// [panels * kPanel] with row stride lds, 0 where all rows start alike. It may be c.
struct Product {
  const float* a;
  ptrdiff_t lda;
  int rows;
  const float* panels;  // those of one matrix, `stride` floats apart
  ptrdiff_t stride;
  int panel_count;
  int64_t k;
  const float* start;
  ptrdiff_t lds;
  float* c;
  ptrdiff_t ldc;
};
using Multiply = void (*)(const Product& product);

// x[rows, k] (row stride ldx) as float32, row stride ldo.
using Load = void (*)(const void* x, Type type, ptrdiff_t ldx, int rows, int64_t k, float* out, ptrdiff_t ldo);

// y[rows, columns] (row stride ldy) = act(c[rows][columns]), rounded to type.
using Finish = void (*)(const float* c, ptrdiff_t ldc, int rows, int columns, Activation activation, Type type, void* y,
                        ptrdiff_t ldy);

// rows[rows][length] of floats, row stride ld -> a panel float [length][kPanel], zeros behind the last row.
using Turn = void (*)(const void* rows, Type type, ptrdiff_t ld, int count, int64_t length, float* panel);

struct Kernel {
  const char* name;
  Isa isa;
  int mr, nr, kr;
  Multiply many;  // one chain of fma a result
  Multiply few;   // rows <= kFewRows, phases
  Load load;
  Finish finish;
  Turn turn;
};
Kernels<Kernel>& kernels();

}  // namespace pycompress::dense
