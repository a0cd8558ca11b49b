// Packing: canonical int8 [n, k], k in the order of nn.Conv2d (channel, row, column), -> one relocatable buffer; and
// back.
//
//   Header; then, depthwise, int8 [taps][n]; else uint64 offset[groups], and for each group what int8::pack() makes of
//   its weights [n / groups, k], k in the order (row, column, channel), in which a row of an image has them.
#pragma once

#include <cstdint>
#include <vector>

#include "../int8/gemm.h"

namespace pycompress::conv {

struct Header {
  char magic[8];
  uint32_t version;
  uint32_t checksum;  // of the other fields
  int32_t n, channels, groups, kernel_h, kernel_w, activation_bits;
  uint32_t input_scale;  // as int8::Header has them
  int32_t input_zero_point;
  uint64_t parts;  // byte offset of what follows
  uint64_t bytes;  // of the whole buffer
  bool depthwise() const { return groups == channels && groups == n; }
  int64_t k() const { return static_cast<int64_t>(channels / groups) * kernel_h * kernel_w; }
};
static_assert(sizeof(Header) == 64);

// The sums of a depthwise convolution are exact in float32 up to here.
constexpr int64_t kMaxTaps = (1 << 24) / (255 * 127);

// `range`: that of the input where it is static, or null.
std::vector<uint8_t> pack(const int8::Kernel& kernel, const int8_t* values, int64_t n, int64_t channels, int64_t groups,
                          int64_t kernel_h, int64_t kernel_w, int activation_bits, int threads,
                          const int8::Range* range = nullptr);

// Throws std::invalid_argument where the buffer is not one that pack() made.
const Header& header_of(const uint8_t* packed, int64_t bytes);

int8::Range fixed_range(const Header& header);  // of a static weight's input

// A group's packed product, and its size.
struct Part {
  const uint8_t* packed;
  int64_t bytes;
};
Part part_of(const uint8_t* packed, const Header& header, int64_t group);

// values int8 [n, k], the exact inverse of pack().
void unpack(const uint8_t* packed, int64_t bytes, int8_t* values);

}  // namespace pycompress::conv
