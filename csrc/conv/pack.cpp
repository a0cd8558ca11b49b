#include "pack.h"

#include <algorithm>
#include <cstring>

#include "../common/buffer.h"
#include "../common/check.h"
#include "../int8/pack.h"

namespace pycompress::conv {
namespace {

constexpr PackedFormat kFormat{
    {'p', 'y', 'c', '.', 'c', 'o', 'n', 'v'}, 1, "packed int8 convolution", "int8_conv2d_pack"};

// Of n channels [channels, taps] -> [taps, channels], or back.
void turned(const int8_t* from, int64_t n, int64_t rows, int64_t columns, int8_t* to) {
  for (int64_t i = 0; i < n; ++i, from += rows * columns, to += rows * columns)
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t c = 0; c < columns; ++c) to[c * rows + r] = from[r * columns + c];
}

}  // namespace

std::vector<uint8_t> pack(const int8::Kernel& kernel, const int8_t* values, int64_t n, int64_t channels, int64_t groups,
                          int64_t kernel_h, int64_t kernel_w, int activation_bits, int threads,
                          const int8::Range* range) {
  constexpr int64_t kMost = 1 << 24;
  check(n >= 1 && n <= kMost, "int8_conv2d_pack: out_channels is ", n, ", expected 1 to ", kMost);
  check(channels >= 1 && channels <= kMost, "int8_conv2d_pack: in_channels is ", channels, ", expected 1 to ", kMost);
  check(groups >= 1 && channels % groups == 0 && n % groups == 0, "int8_conv2d_pack: groups is ", groups,
        ", expected a divisor of ", channels, " and ", n, " channels");
  check(kernel_h >= 1 && kernel_w >= 1 && kernel_h <= kMaxK && kernel_w <= kMaxK, "int8_conv2d_pack: the kernel is ",
        kernel_h, "x", kernel_w, ", expected 1 to ", kMaxK, " each");
  const int64_t taps = kernel_h * kernel_w, own = channels / groups, k = own * taps, out = n / groups;
  check(k <= kMaxK, "int8_conv2d_pack: an output is made of ", k, " inputs, expected at most ", kMaxK);
  check(activation_bits == 7 || activation_bits == 8, "int8_conv2d_pack: activation_bits is ", activation_bits,
        ", expected 7 or 8");
  check(std::find(values, values + n * k, int8_t{-128}) == values + n * k,
        "int8_conv2d_pack: a weight is -128, expected -127 to 127 (the scale is symmetric)");
  Header header{};
  header.n = static_cast<int32_t>(n);
  header.channels = static_cast<int32_t>(channels);
  header.groups = static_cast<int32_t>(groups);
  header.kernel_h = static_cast<int32_t>(kernel_h);
  header.kernel_w = static_cast<int32_t>(kernel_w);
  header.activation_bits = activation_bits;
  if (range != nullptr) {
    int8::check_range("int8_conv2d_pack", *range, activation_bits);
    std::memcpy(&header.input_scale, &range->scale, sizeof(range->scale));
    header.input_zero_point = range->zero_point;
  }
  header.parts = sizeof(Header);
  std::vector<uint8_t> result(header.parts, 0);
  std::vector<int8_t> order(static_cast<size_t>(n * k));
  if (header.depthwise()) {
    check(taps <= kMaxTaps, "int8_conv2d_pack: the kernel is ", kernel_h, "x", kernel_w, ", expected at most ",
          kMaxTaps, " weights a channel where each is convolved alone");
    turned(values, 1, n, taps, order.data());
    append(result, order.data(), order.size());
  } else {
    turned(values, n, own, taps, order.data());
    std::vector<uint64_t> offsets(static_cast<size_t>(groups));
    result.resize(round_up<size_t>(header.parts + offsets.size() * 8, 64), 0);
    for (int64_t g = 0; g < groups; ++g) {
      offsets[static_cast<size_t>(g)] = result.size();
      const std::vector<uint8_t> part =
          int8::pack(kernel, order.data() + g * out * k, out, k, activation_bits, groups == 1 ? threads : 1);
      result.insert(result.end(), part.begin(), part.end());  // a multiple of 64 bytes
    }
    std::memcpy(result.data() + header.parts, offsets.data(), offsets.size() * 8);
  }
  result.resize(round_up<size_t>(result.size(), 64), 0);
  header.bytes = result.size();
  kFormat.seal(header);
  std::memcpy(result.data(), &header, sizeof(header));
  return result;
}

const Header& header_of(const uint8_t* packed, int64_t bytes) { return kFormat.header_of<Header>(packed, bytes); }

int8::Range fixed_range(const Header& header) {
  int8::Range range{0, header.input_zero_point};
  std::memcpy(&range.scale, &header.input_scale, sizeof(range.scale));
  return range;
}

Part part_of(const uint8_t* packed, const Header& header, int64_t group) {
  const auto* offsets = reinterpret_cast<const uint64_t*>(packed + header.parts);
  const uint64_t end = group + 1 < header.groups ? offsets[group + 1] : header.bytes;
  return {packed + offsets[group], static_cast<int64_t>(end - offsets[group])};
}

void unpack(const uint8_t* packed, int64_t bytes, int8_t* values) {
  const Header& header = header_of(packed, bytes);
  const int64_t taps = static_cast<int64_t>(header.kernel_h) * header.kernel_w, k = header.k();
  if (header.depthwise())
    return turned(reinterpret_cast<const int8_t*>(packed + header.parts), 1, taps, header.n, values);
  const int64_t out = header.n / header.groups;
  std::vector<int8_t> order(static_cast<size_t>(out * k));
  for (int64_t g = 0; g < header.groups; ++g, values += out * k) {
    const Part part = part_of(packed, header, g);
    int8::unpack(part.packed, part.bytes, order.data());
    turned(order.data(), out, taps, header.channels / header.groups, values);
  }
}

}  // namespace pycompress::conv
