// int8 convolution: the contract of the op. `scalar.cpp` is its specification; every other kernel equals it to the bit.
//
//   y[i, n, p]   = act((float(acc[i, n, p]) * sx[i]) * sw[n] + bias[n] + addend[i, n, p])
//                  from left to right, each step rounded to float32, no fma
//   acc[i, n, p] = sum over the taps t of p, c: (q[i, c, p + t] - zp[i]) * w[n, c, t]      exact int32; k <= kMaxK
//
//   w   int8  [n, k]      weights in [-127, 127], one scale sw per output channel; k = channels / groups * taps
//   q   uint8 [i, c, ...] activations in [0, amax], quantized per image inside the op by the formula of int8/gemm.h,
//   with
//       the lowest and highest of all its values; or, for a weight that was packed with the range of its input, by
//       that, so that nobody looks for the ends of an image: values outside of the range take its ends. Around an image
//       lie zeros: q = zp there.
//   An image that holds NaN or Inf gives an image of NaN: sx = NaN, q and zp are those of an image of zeros.
//   A static weight also takes x as bytes that are q already. And y may be bytes: what the next layer would make of it;
//   or floats with these bytes beside them. What has an addend is not depthwise, and its channels lie last.
//
// Two ways. Where every group has one channel in and one out (depthwise), a tap is a product of two vectors: the
// activations of some rows are quantized to whole numbers in float32, whose chains of fma are exact below 2^24, so that
// the result is the integer all the same. Everywhere else a group is the product of int8/gemm.h with a row for each
// position of y: the images are quantized once, to bytes with the channels last and their zeros around them, of which
// the rows are copied tile by tile. Not so for a kernel of 1x1 without steps, whose rows lie there; nor for one that
// takes each pixel, whose own rows are multiplied one after the other where they lie, in pieces that are whole steps of
// a tile; nor, by AMX, for one whose rows are less than a step, as in first layers: with the bytes behind them, which
// meet zeros. Bytes that are given as x, with nothing around them, are read as they are.
//
// The floor of the op: 2 * images * positions * n * k operations at the peak of the int8 product; depthwise, an fma for
// each of images * positions * n * taps. Or x read twice (once where its range is given) and y written once.
#pragma once

#include "../int8/gemm.h"

namespace pycompress::conv {

struct Convolution {
  const void* x;  // [images, channels, height, width], dense, channels first or last; of uint8 last
  Type type;
  bool channels_last, y_channels_last;
  int64_t images, channels, height, width;
  const uint8_t* packed;  // what pack() made
  int64_t packed_bytes, n;
  const float* weight_scale;
  const float* bias;  // or null
  Activation activation;
  int64_t stride_h, stride_w, pad_top, pad_left, dilation_h, dilation_w, out_h, out_w;
  void* y;  // [images, n, out_h, out_w]
  Type y_type;
  int8::Requantize to;  // for y of uint8, whose channels lie last, and for `beside`
  const float* addend;  // [images, out_h, out_w, n] or null, for y of float32 or uint8
  uint8_t* beside;      // [images, out_h, out_w, n] or null: the bytes of a y of float32 whose channels lie last
  int64_t behind;       // bytes that may be read behind x of uint8
  float* scale;         // [images] or null: where the caller wants sx and zp too
  int32_t* zero_point;  // [images] or null
  int threads;
};
// Returns whether all images are finite, and all y where there is an addend or `beside`: bytes cannot say so of those
// that are not, and are no result then.
bool conv2d(const Convolution& problem);
constexpr int64_t kBehind = 128;  // bytes behind x with which none of it is copied: tiles read in steps

// What an image is quantized by: q = clamp(rint(x * inverse) + zero_point, 0, amax).
struct Range {
  float scale, inverse;
  int32_t zero_point;
};

// Lowest and highest of some values and 0, and whether all are finite.
struct Extremes {
  float low, high;
  bool finite;
};

// Some channels of an image, of which some rows of y are computed; what `Kernel::depthwise` takes.
struct Depthwise {
  const Convolution* problem;
  int kernel_h, kernel_w, amax;
  Range range;
  int64_t image, channel, channels;  // channels: any number where they lie last, else 1
  int64_t row, rows;                 // of y
  const int8_t* weights;             // [taps][problem->n]
  float* room;                       // depthwise_room() floats
};
constexpr int kChannels = 16;

// Floats that a task of so many rows of y needs.
int64_t depthwise_room(const Convolution& problem, int kernel_h, int kernel_w, int64_t rows);

struct Kernel {
  const char* name;
  Isa isa;
  int mr, nr, kr;  // of depthwise: pixels and channels at a time, or vectors of a line and numbers of a vector
  Extremes (*extremes)(const void* x, Type type, int64_t count);
  // Returns whether all are finite. q[position * ldq + channel], of values at x + channel * channel_stride + position *
  // position_stride, of which one stride is 1.
  bool (*quantize)(const void* x, Type type, int64_t channels, int64_t positions, int64_t channel_stride,
                   int64_t position_stride, const Range& range, int amax, uint8_t* q, int64_t ldq);
  // One row of activations in the order of k -> the reorderings that int8::ActivationShape has of it.
  void (*reorder)(const uint8_t* row, int8::ActivationShape shape, uint8_t* data);
  // to[column * stride + row] = from[row * ld + column], numbers of 2 or 4 bytes.
  void (*transpose)(const void* from, int64_t ld, int rows, int columns, size_t size, void* to, int64_t stride);
  bool (*depthwise)(const Depthwise& task);  // returns whether all x that it met are finite
};

Kernels<Kernel>& kernels();

}  // namespace pycompress::conv
