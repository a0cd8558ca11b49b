// Sparse linear: the contract of the op. `scalar.cpp` is its specification.
//
//   float32   y[m, n] = act(acc[m, n] + bias[n])
//             acc     = fma(x[m, k], w[n, k], acc) over the stored weights of row n in ascending k, starting at 0
//   int8      as int8_linear (csrc/int8/gemm.h), to the bit: the weight is the same int8 matrix, most of it zero
//
// Zeros are not stored and not multiplied: NaN or Inf in x shows where a weight meets it (in a panel, see below, where
// any of its 16 channels has a weight; it is chosen only where all have). Kernels for a single row add
// up in several partial sums; every float32 result is within
//     eps * (stored weights of the row + 2) * sum_k |x w|   (+ eps |y| for the bias and the activation)
// of the exact one, and does not depend on the threads.
//
// Weight: canonical bitmask + values (weights/sparse.py); packed here into one of the formats (pack.h).
//
// Floors, for m rows and z stored weights:
//   rows     2 m z operations at the fp32 FMA peak. A stored weight costs width / 8 FMAs and as many loads of x plus a
//            quarter of one for the weight itself, at two loads and two FMAs a cycle: 97 % of the peak at most, while
//            the tile of x (block * width floats) stays in L1. One row: 5 bytes a weight at the read bandwidth, or by
//            bitmask 4 bytes a weight and one for eight positions.
//   panels   2 m z operations at the fp32 FMA peak, z counting the zeros inside a kept block: channels share the loads.
//   quads    per 128 products eight byte shuffles and four times (maddubs, maddwd, add): 20 operations on four pipes,
//            so 2 m z operations at 0.8 of the d = 1 integer peak.
//   quads4   2 m z operations at the d = 1 integer peak, z counting the zeros inside a group of four.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../int8/gemm.h"

namespace pycompress::sparse {

constexpr int kMaxWidth = 64;  // rows of x in one tile, at most: 64, 32, 16, 8 or 1
constexpr int kPanel = 16;     // channels that share their positions in the panels format

// What one stored element is, and how the tile of x lies for it: `width` rows side by side for every position (for
// every group of four positions in quads4).
enum class Format : uint32_t {
  rows = 0,    // one float32 weight;                          tile float32 [k][width]
  panels = 1,  // 16 channels x one position, float32;         tile float32 [k][width]
  quads = 2,   // four int8 weights of a channel, anywhere;    tile uint8 [k][width]
  quads4 = 3,  // four int8 weights of a channel, side by side; tile uint8 [k / 4][width][4]
  // The int8 op's own layouts and kernels (csrc/int8/pack.h, windows.h), which leave out what is zero:
  windows = 4,  // 16 channels x any four of 16 positions
  chains = 5,   // 16 channels x four positions
};
constexpr int kFormats = 6;
const char* format_name(Format format);
constexpr bool is_delegated(Format format) { return format == Format::windows || format == Format::chains; }
constexpr bool is_float(Format format) { return format == Format::rows || format == Format::panels; }

// One block of the packed weight: some channels x some positions, see pack.h.
struct Block {
  const uint16_t* runs;  // [2 * run_count]: elements, and how many channels (panels) with so many follow one another
  int run_count;
  const uint16_t* order;  // the channels (panels) in the order of the runs, counted from the block's first
  const uint8_t* index;   // positions of the elements, counted from the block's first; four an element in quads
  const void* values;     // float [elements] or [elements][16]; int8 [elements][4]
  const uint8_t* bits;    // [channels][bits_per_channel] or null: the positions again, as a bitmask
  int bits_per_channel;   // bytes
};

// x[rows, k] (row stride ldx) -> the tile, zeros in rows [rows, width). For the int8 formats x holds quantized bytes.
using Load = void (*)(const void* x, Type type, ptrdiff_t ldx, int rows, int64_t k, int width, void* tile);

// sums[channel][width] (+)= block . tile, 4-byte sums. The first block of some channels names all of them and
// overwrites. tile: at the block's first position.
using Tile = void (*)(const Block& block, const void* tile, int width, void* sums, bool accumulate);

// y[rows, columns] (row stride ldy) from sums[columns][width]. Float formats use bias, activation and type alone.
using Finish = void (*)(const void* sums, int width, int rows, int columns, const int8::Epilogue& epilogue, void* y,
                        ptrdiff_t ldy);

// The same without turning them round, for convolutions: y[columns, rows] (row stride ldy). Float formats only.
using FinishChannels = Finish;

struct Kernel {
  const char* name;
  Isa isa;
  Format format;
  int mr, nr, kr;   // the widest tile; channels and positions of one element
  unsigned widths;  // all tile widths that it runs, or-ed: each is a power of two
  Load load;
  Tile tile;
  Finish finish;
  FinishChannels finish_channels;
};

Kernels<Kernel>& kernels();
const Kernel& kernel_for(Format format);  // the first that reads it and runs here

// y[m, n] for x[m, k] with row stride ldx (elements). `packed` is what pack() made. y is dense, row stride n.
struct Problem {
  const void* x;
  Type x_type;
  int64_t m, k, ldx;
  const uint8_t* packed;
  int64_t packed_bytes, n;
  const float* weight_scale;  // [n] for the int8 formats
  const float* bias;
  Activation activation;
  void* y;
  Type y_type;          // int32: the accumulators of the int8 formats as they are
  float* row_scale;     // [m] or null: where the caller wants scales and zero points too (int8 formats)
  int32_t* zero_point;  // [m] or null
  int threads;
  const int8::Quantized* quantized =
      nullptr;                           // instead of quantizing x, where it is of the shape that the weight needs
  const int8::Addend* addend = nullptr;  // instead of the bias
};
void linear(const Problem& problem);

// A convolution: its weight is the matrix [n, channels * kernel_h * kernel_w]. x [images, channels, height, width] and
// y [images, n, out_h, out_w] are dense and of one type. Tiles of x are unfolded as they are needed: rows are the
// positions of y, so a tile is a copy of runs of x, and neither x nor y is turned round.
struct Convolution {
  const void* x;
  Type type;
  int64_t images, channels, height, width;
  const uint8_t* packed;
  int64_t packed_bytes, n;
  const float* bias;
  Activation activation;
  int64_t kernel_h, kernel_w, stride_h, stride_w, pad_top, pad_left, dilation_h, dilation_w;
  int64_t out_h, out_w;  // padding at the bottom and at the right is what they need
  void* y;
  int threads;
};
void conv2d(const Convolution& problem);

}  // namespace pycompress::sparse
