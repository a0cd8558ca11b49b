#include "pack.h"

#include <algorithm>
#include <cstring>

#include "../common/buffer.h"
#include "../common/check.h"
#include "../common/round.h"

namespace pycompress::weight_only {
namespace {

constexpr PackedFormat kFormat{{'p', 'y', 'c', '.', 'w', 'o', 'n', '8'}, 1, "packed int8 weight", "int8_pack"};
constexpr uint64_t kAlignment = 64;

}  // namespace

std::vector<uint8_t> pack(const int8_t* values, int64_t n, int64_t k) {
  check(n >= 1 && n < (int64_t{1} << 31) && k >= 1 && k <= kMaxK, "int8_pack: the weight is [", n, ", ", k,
        "], expected at least one row and 1 to ", kMaxK, " columns");
  check(std::find(values, values + n * k, int8_t{-128}) == values + n * k,
        "int8_pack: a weight is -128, expected -127 to 127 (the scale is symmetric)");
  Header h{};
  h.n = static_cast<int32_t>(n);
  h.k = static_cast<int32_t>(k);
  h.values = round_up<uint64_t>(sizeof(Header), kAlignment);
  h.bytes = h.values + static_cast<uint64_t>(divide_up(n, kPanel) * k * kPanel);
  kFormat.seal(h);
  std::vector<uint8_t> packed(h.bytes);
  std::memcpy(packed.data(), &h, sizeof(h));
  auto* to = reinterpret_cast<int8_t*>(packed.data() + h.values);
  for (int64_t row = 0; row < n; ++row)
    for (int64_t i = 0; i < k; ++i) to[(row / kPanel * k + i) * kPanel + row % kPanel] = values[row * k + i];
  return packed;
}

bool is_packed(const uint8_t* packed, int64_t bytes) { return kFormat.begins(packed, bytes); }

const Header& header_of(const uint8_t* packed, int64_t bytes) { return kFormat.header_of<Header>(packed, bytes); }

void unpack(const uint8_t* packed, int64_t bytes, int8_t* values) {
  const Header& h = header_of(packed, bytes);
  const auto* from = reinterpret_cast<const int8_t*>(packed + h.values);
  const int64_t n = h.n, k = h.k;
  for (int64_t row = 0; row < n; ++row)
    for (int64_t i = 0; i < k; ++i) values[row * k + i] = from[(row / kPanel * k + i) * kPanel + row % kPanel];
}

}  // namespace pycompress::weight_only
