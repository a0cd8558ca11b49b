#include "pack.h"

#include <algorithm>
#include <cstring>

#include "../common/buffer.h"
#include "../common/check.h"
#include "../common/round.h"

namespace pycompress::weight_only {
namespace {

constexpr char kMagic[8] = {'p', 'y', 'c', '.', 'w', 'o', 'n', '8'};
constexpr uint32_t kVersion = 1;
constexpr uint64_t kAlignment = 64;

}  // namespace

std::vector<uint8_t> pack(const int8_t* values, int64_t n, int64_t k) {
  check(n >= 1 && n < (int64_t{1} << 31) && k >= 1 && k <= kMaxK, "int8_pack: the weight is [", n, ", ", k,
        "], expected at least one row and 1 to ", kMaxK, " columns");
  check(std::find(values, values + n * k, int8_t{-128}) == values + n * k,
        "int8_pack: a weight is -128, expected -127 to 127 (the scale is symmetric)");
  Header h{};
  std::memcpy(h.magic, kMagic, sizeof(kMagic));
  h.version = kVersion;
  h.n = static_cast<int32_t>(n);
  h.k = static_cast<int32_t>(k);
  h.values = round_up<uint64_t>(sizeof(Header), kAlignment);
  h.bytes = h.values + static_cast<uint64_t>(divide_up(n, kPanel) * k * kPanel);
  h.checksum = checksum_of(h);
  std::vector<uint8_t> packed(h.bytes);
  std::memcpy(packed.data(), &h, sizeof(h));
  auto* to = reinterpret_cast<int8_t*>(packed.data() + h.values);
  for (int64_t row = 0; row < n; ++row)
    for (int64_t i = 0; i < k; ++i) to[(row / kPanel * k + i) * kPanel + row % kPanel] = values[row * k + i];
  return packed;
}

bool is_packed(const uint8_t* packed, int64_t bytes) {
  return bytes >= static_cast<int64_t>(sizeof(Header)) && std::memcmp(packed, kMagic, sizeof(kMagic)) == 0;
}

const Header& header_of(const uint8_t* packed, int64_t bytes) {
  const auto* h = reinterpret_cast<const Header*>(packed);
  const bool known = is_packed(packed, bytes) && h->version == kVersion && h->checksum == checksum_of(*h) &&
                     h->bytes == static_cast<uint64_t>(bytes);
  check(known, "packed int8 weight: unknown format, expected what int8_pack of this version returns");
  return *h;
}

void unpack(const uint8_t* packed, int64_t bytes, int8_t* values) {
  const Header& h = header_of(packed, bytes);
  const auto* from = reinterpret_cast<const int8_t*>(packed + h.values);
  const int64_t n = h.n, k = h.k;
  for (int64_t row = 0; row < n; ++row)
    for (int64_t i = 0; i < k; ++i) values[row * k + i] = from[(row / kPanel * k + i) * kPanel + row % kPanel];
}

}  // namespace pycompress::weight_only
