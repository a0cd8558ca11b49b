// Weight-only linear on CUDA, for few rows: the contract of the op there.
//
//   int8   y[m, n] = act(scale[n] * sum_k x[m, k] v[n, k] + bias[n])       v int8 in [-127, 127]
//   int4   y[m, n] = act(sum_g scale[n, g] * sum_{k in g} x[m, k] (v[n, k] - zero_point[n, g]) + bias[n])
//          v and zero points 0 .. 15, scales bfloat16, groups of 32, 64 or 128 positions (weights/int4.py)
//
// x and y are float16 or bfloat16, of one type. The integers (of int4: less their zero point) are exact in both types,
// so the tensor cores multiply what is stored and nothing is rounded on the way to them; scales are applied in float32,
// a bfloat16 one exactly. What is left is the order of float32 additions. PTX leaves open how mma.sync rounds its
// sums; measured, every addend is cut to the 24 bits of the largest (Fasi et al. 2021, PeerJ CS 7:e330), so a step of
// 16 products costs at most 17 * 2^-23 of the largest addend, and with c = k / 16 such steps
//     |y - y64| <= 2^-23 (17 (c + 1) + g + s + 8) * sum_k |x w| + eps (|y| + |bias|)    before the activation,
// g: groups of 32 (int4: one fma each), s: parts of k that are summed at the end (at most kMaxSplits, and a warp each).
// Rows are apart: NaN and Inf show where they are. The order is fixed: the same bits at every call on one kind of
// device, whatever else runs there.
//
// Any m runs: rows beyond kMaxRows come in slabs that read the weights again, from the L2 where they fit. The kernels
// are made for m <= kMaxRows.
//
// The floor of the op: the packed bytes at the memory's bandwidth (8 bits a weight; 4.625 for int4 in groups of 32 with
// zero points, 4.5 without, 4.16 in groups of 128), and a launch.
//
// No CUDA header is needed here: the bindings are compiled by the host compiler alone.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../common/types.h"
#include "shuffle.h"

struct CUstream_st;

namespace pycompress::weight_only::cuda {

using Stream = CUstream_st*;  // cudaStream_t

constexpr int kMaxRows = 64;    // in one pass over the weights
constexpr int kMaxSplits = 16;  // parts of k in different blocks

struct Problem {
  const void* x;
  Type type;       // of x and y: float16 or bfloat16
  int64_t m, ldx;  // ldx: the row stride, elements
  const uint8_t* packed;
  Packed shape;               // n, k and what else the packed weight is (shuffle.h)
  const float* weight_scale;  // [n] of int8, null for int4
  const float* bias;          // [n] or null
  Activation activation;
  void* y;          // [m, n], dense
  void* workspace;  // as many bytes as the plan says, aligned to 4
  Stream stream;
};

// `tiles` x 16 channels and `columns` x 8 rows of x a block. `warps` share its part of k.
struct Kernel {
  const char* name;
  Bits bits;
  Type type;
  int tiles, columns, warps, stages;
  void (*run)(const Problem& problem, int splits);
};
const Kernel* kernels(int* count);

// What runs for m rows. Parts of k in different blocks are added in a workspace: the sums of each, and a counter for
// each tile of y, which linear() clears by a launch of its own. (Counters that outlive a call would be shared by
// whoever runs the layer on another stream, or replays a graph.)
struct Plan {
  const Kernel* kernel;
  int splits;
  int64_t blocks;     // of one part of k: slabs of x times tiles of channels
  int64_t workspace;  // bytes
};
Plan plan(const Packed& shape, Type type, int64_t m, int multiprocessors);
Plan plan(const Kernel& kernel, const Packed& shape, int64_t m, int splits);

void linear(const Problem& problem);                    // as plan() says for the current device
void linear(const Problem& problem, const Plan& plan);  // forced: benchmarks and tests

// Canonical tensors on the device -> packed [shape.bytes()], and back. values: int8 [n, k] (a -128 counts in *refused,
// which the caller set to 0 and reads), or for int4 as weights/int4.py has them, with scale bfloat16 [n, groups] and
// zero_point uint8 [n, ceil(groups / 2)], null where symmetric.
struct Canonical {
  const uint8_t* values;
  const uint16_t* scale;
  const uint8_t* zero_point;
};
void pack(const Canonical& from, const Packed& shape, uint8_t* packed, int32_t* refused, Stream stream);

struct CanonicalOut {
  uint8_t* values;
  uint16_t* scale;
  uint8_t* zero_point;
};
void unpack(const uint8_t* packed, const Packed& shape, const CanonicalOut& to, Stream stream);

}  // namespace pycompress::weight_only::cuda
