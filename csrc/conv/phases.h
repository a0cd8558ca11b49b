// How the rows of a depthwise task lie in its room.
//
// The rows of x that a task needs are quantized into its room, split by the remainder of their coordinates by the
// strides, so that what a tap meets lies side by side: phase (a, b) holds the pixels (a + stride_h * i, b + stride_w *
// j) at i * pitch + j, zeros around the image included. Tap (r, s) of position (i, j) of y is the pixel at (i + r', j +
// s') of the phase of (r, s): one distance for all positions, which are walked as one line of `pitch` a row; what lies
// behind a row's last position is computed and not written.
//
// With the channels last a pixel is kChannels numbers, of which some vectors are multiplied with the weights of theirs.
// Else a pixel is one number, and vectors lie along the line.
// In an anonymous namespace, because each instruction-set file compiles its own copy and the linker must not merge
// them.
#pragma once

#include "conv.h"

namespace pycompress::conv {
namespace {

struct Phases {
  int64_t height, pitch, lanes;  // of one phase; lanes: numbers of a pixel
  int64_t count_h, count_w;      // phases that a tap can meet

  Phases(const Convolution& p, int kernel_h, int kernel_w, int64_t rows)
      : height(rows + (kernel_h - 1) * p.dilation_h / p.stride_h),
        pitch(p.out_w + (kernel_w - 1) * p.dilation_w / p.stride_w),
        lanes(p.channels_last ? kChannels : 1),
        count_h(p.stride_h),
        count_w(p.stride_w) {}
  int64_t size() const { return (height * pitch + kSlack) * lanes; }  // of a phase, floats
  int64_t floats() const { return (count_h * count_w * size() + 15) / 16 * 16; }
  // From the pixel of a position's first tap in the first phase to that of tap (r, s), in floats.
  int64_t distance(const Convolution& p, int64_t r, int64_t s) const {
    const int64_t y = r * p.dilation_h, x = s * p.dilation_w;
    return (y % p.stride_h * count_w + x % p.stride_w) * size() + (y / p.stride_h * pitch + x / p.stride_w) * lanes;
  }
  static constexpr int64_t kSlack = 64;  // positions that a last step along the line may read behind it
};

}  // namespace
}  // namespace pycompress::conv
