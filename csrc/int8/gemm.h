// int8 linear: the contract of the op. `scalar.cpp` is its specification; every other kernel equals it to the bit.
//
//   y[m, n]   = act((float(acc[m, n]) * sx[m]) * sw[n] + bias[n])      each step rounded to float32, no fma
//   acc[m, n] = sum_k (q[m, k] - zp[m]) * w[n, k]                      exact int32; k <= kMaxK rules out overflow
//
//   w   int8  [n, k]   weights in [-127, 127], one scale sw per output channel
//   q   uint8 [m, k]   activations in [0, amax], amax = 2^bits - 1 (127 or 255), quantized per row inside the op:
//       lo = min(0, min x), hi = max(0, max x), half = hi/2 - lo/2   (never overflows)
//       sx = half / (amax/2), inv = (amax/2) / half                  (both 0 where half < 2^-100)
//       zp = clamp(rint(-lo * inv)), q = clamp(rint(x * inv) + zp)   to [0, amax], half to even
//   Or, for a weight that was packed with the range of its input ("static"), with the sx and zp that it has, the same
//   for all rows, so that nobody looks for the ends of a row:
//       inv = 1 / sx, q = clamp(rint(clamp(x * inv, -kBeyond, kBeyond)) + zp)
//       what lies outside of the range gives its ends; the inner clamp only keeps what is far outside in an int
//   A row of x that holds NaN or Inf gives a row of NaN: sx = NaN, q and zp are those of a row of zeros.
//
// The floor of the op: 2mnk operations at the machine's integer peak, or the packed bytes at its read bandwidth.
// On AVX2 the peak depends on the lane budget, see pack.h.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../common/isa.h"
#include "../common/types.h"

namespace pycompress::int8 {

constexpr float kBeyond = 1024;  // in units of sx: far outside of every range
constexpr int kBlockK = 1024;    // positions of k whose panel stays in a 32 KiB L1 beside four rows of activations

// How the weights of one panel (nr output channels) lie in memory.
//   rows:   int8 [nr][k]                     read by the scalar kernel
//   dot4:   int8 [ceil(k/4)][nr][4]          read by the VNNI kernels; k is padded with zero weights
//   chains: see pack.h                       read by the AVX2 kernels, which need the lane budget
//   windows: see windows.h                   for weights of which many are zero
enum class Layout : uint32_t { rows = 0, dot4 = 1, chains = 2, windows = 3 };

// Four positions can share their two 16-bit lanes in three ways; the chains layout picks one per group.
// Version v of the activations stores position kOrder[v][j] of each group of four at byte j.
constexpr int kVersions = 3;
constexpr uint8_t kOrder[kVersions][4] = {{0, 1, 2, 3}, {0, 2, 1, 3}, {0, 3, 1, 2}};

// Quantized activations of some rows: row-major bytes, cut along k into blocks of kBlockK positions.
// A block of `length` positions (the last one is padded up to 32) holds `versions` reorderings of itself:
//   byte(row, position) of version v in block b = data[row * stride + b * versions * kBlockK + v * length(b) + ...]
struct ActivationShape {
  int k, versions;
  int blocks() const { return (k + kBlockK - 1) / kBlockK; }
  int length(int block) const {
    const int rest = k - block * kBlockK;
    return rest >= kBlockK ? kBlockK : (rest + 31) / 32 * 32;
  }
  ptrdiff_t offset(int block) const { return static_cast<ptrdiff_t>(block) * versions * kBlockK; }
  // One cache line longer than it need be: rows that lie a multiple of 4 KiB apart would fall into the same L1 sets.
  ptrdiff_t stride() const {
    return offset(blocks() - 1) + static_cast<ptrdiff_t>(versions) * length(blocks() - 1) + 64;
  }
};

// A range of x that is known before x is: x is about (q - zero_point) * scale.
struct Range {
  float scale;  // normal, and so is 1 / scale; 0 where there is none and each row has its own
  int32_t zero_point;
  const Range* or_null() const { return scale == 0 ? nullptr : this; }
  bool operator==(const Range& other) const { return scale == other.scale && zero_point == other.zero_point; }
};

// Quantizes `rows` rows of x [rows, shape.k] (row stride ldx elements) into `data`, with sx and zp per row: those of
// `range`, or each row's own where that is null.
using Quantize = void (*)(const void* x, Type type, ptrdiff_t ldx, int rows, ActivationShape shape, int amax,
                          const Range* range, uint8_t* data, float* scale, int32_t* zero_point);

// c[rows, nr] (+)= activations . panel over one block of k; rows <= mr; `c` has row stride nr.
// a: the rows' bytes of this block, row stride `lda`; panel: the packed block; length: positions in it.
using Tile = void (*)(const uint8_t* a, ptrdiff_t lda, int rows, const void* panel, int length, int32_t* c,
                      bool accumulate);

// What y becomes where it is bytes for a layer whose range is known: q = rint(clamp(y * inverse, low, high)) +
// zero_point.
// With the bounds of `requantize` that is clamp(rint(y * inverse) + zero_point, 0, amax), half to even.
struct Requantize {
  float inverse, low, high;
  int32_t zero_point;
};
constexpr Requantize requantize(float scale, int32_t zero_point, int amax) {
  return {1 / scale, static_cast<float>(-zero_point), static_cast<float>(amax - zero_point), zero_point};
}

// Columns [0, columns) of one panel: y = act((c - zp * colsum) * sx * sw + bias + addend), or c - zp * colsum for
// Type::int32, or for Type::uint8 what the next layer would make of y.
struct Epilogue {
  const int32_t* column_sum;  // [nr], zero padded
  const float* weight_scale;  // [columns]
  const float* bias;          // [columns] or null; of row i at bias + i * bias_stride
  ptrdiff_t bias_stride;      // 0, or what lets 16 floats be read from each row
  const float* row_scale;     // [rows]
  const int32_t* zero_point;  // [rows]
  Activation activation;
  Type type;
  Requantize to{};
  const float* addend = nullptr;  // [rows, columns] or null, row stride ldy
  uint8_t* beside = nullptr;      // or null: for y of float32 what it is as bytes, row stride ldy
  bool* finite = nullptr;         // with one of these two, and bytes: set to false where a y is not
};
using Finish = void (*)(const int32_t* c, int nr, int rows, int columns, const Epilogue& epilogue, void* y,
                        ptrdiff_t ldy);

// Rows of activations whose positions of k lie in pieces: those of row i at a + i * lda + piece * distance. Behind the
// last one of a row up to 63 bytes are read, which may be any.
struct Strip {
  const uint8_t* a;
  ptrdiff_t lda, distance;
  int pieces, length;  // positions of a piece: a multiple of 64, or where there is one piece of 32
  int rows;
  const void* panels[2];  // of `pieces` * `length` positions each; the second one may be null
  int32_t* sums;          // [2 * mr, 2 * nr], where they lie until they are finished
  int slice;              // rows of them that are finished at once
  // Called with c [rows, columns of the panels], row stride 2 * nr, of the rows from `first` on: all of them, in order.
  void (*finished)(const void* context, const int32_t* c, int first, int rows);
  const void* context;
};

struct Kernel {
  const char* name;
  Isa isa;
  int mr, nr, kr;
  Layout layout;
  Quantize quantize;
  Tile tile;
  Finish finish;
  void (*begin)() = nullptr;  // on a thread before it calls tile, and after; or null
  void (*end)() = nullptr;
  void (*strip)(const Strip& strip) = nullptr;  // products and what is to be made of them in turns; or null
};

Kernels<Kernel>& kernels();
const Kernel& best_kernel();
const Kernel& kernel_named(const char* name);  // throws where there is none, or the processor cannot run it
const Kernel* kernel_for(Layout layout);       // the first that reads it and runs here, or null

// Rows that were quantized before the call: what Quantize made of all m.
struct Quantized {
  ActivationShape shape;
  int activation_bits;
  const uint8_t* data;
  const float* scale;
  const int32_t* zero_point;
  Range range{0, 0};
  bool fits(ActivationShape wanted, int bits, const Range& of) const {
    return shape.k == wanted.k && shape.versions == wanted.versions && activation_bits == bits && range == of;
  }
};

// Where a thread quantizes its rows.
struct RowRoom {
  uint8_t* data;
  float* scale;
  int32_t* zero_point;
};

// Rows [row, row + rows) of a problem as an op multiplies them: those that the caller has, where they fit; else
// quantized into the room.
template <class Problem>
Quantized quantized_rows(const Problem& p, const Kernel& kernel, ActivationShape shape, int bits, int64_t row, int rows,
                         const RowRoom& room, const Range& range = {0, 0}) {
  if (p.quantized != nullptr && p.quantized->fits(shape, bits, range))
    return {shape, bits, p.quantized->data + row * shape.stride(), p.quantized->scale + row,
            p.quantized->zero_point + row};
  kernel.quantize(value_of(p.x, p.x_type, row * p.ldx), p.x_type, p.ldx, rows, shape, (1 << bits) - 1, range.or_null(),
                  room.data, room.scale, room.zero_point);
  return {shape, bits, room.data, room.scale, room.zero_point};
}

// A matrix [m, n] that is added before the activation, made as it is needed, in the cache; it has the bias in it.
constexpr int kAddendStride = 32;
struct Addend {
  const void* context;
  // Rows [row, row + rows), columns [n, n + columns), columns <= 32: where they begin, row stride kAddendStride. They
  // may lie in `room`, float [rows][kAddendStride]. Called by several threads at once.
  const float* (*tile)(const void* context, int64_t row, int rows, int64_t n, int columns, float* room);
};

// y[m, n] for x[m, k] with row stride ldx (elements). `packed` is what pack() made. y is dense, row stride n.
struct Problem {
  const void* x;
  Type x_type;
  int64_t m, k, ldx;
  const uint8_t* packed;
  int64_t packed_bytes, n;
  const float* weight_scale;
  const float* bias;
  Activation activation;
  void* y;
  Type y_type;
  float* row_scale;     // [m] or null: where the caller wants sx and zp too
  int32_t* zero_point;  // [m] or null
  int threads;
  const Quantized* quantized = nullptr;  // instead of quantizing x, where it is of the shape that the weight needs
  const Addend* addend = nullptr;        // instead of the bias
};
void linear(const Problem& problem);                        // by the best kernel that reads `packed`
void linear(const Problem& problem, const Kernel& kernel);  // by this one, which must read its layout

// The quantizer alone, in the order of k: q uint8 [m, k], scale [m], zero_point [m]. `range`: or null.
void quantize(const Kernel& kernel, const void* x, Type type, int64_t m, int64_t k, int64_t ldx, int bits,
              const Range* range, uint8_t* q, float* scale, int32_t* zero_point);

// What a product makes of x: y float [m, k] = (q - zero_point) * scale, for training.
void round_rows(const Kernel& kernel, const void* x, Type type, int64_t m, int64_t k, int64_t ldx, int bits,
                const Range* range, float* y, int threads);

}  // namespace pycompress::int8
