#include "pack.h"

#include <algorithm>
#include <cstring>

#include "../common/buffer.h"
#include "../common/check.h"
#include "../common/kernels.h"
#include "../common/parallel.h"

namespace pycompress::int4 {
namespace {

constexpr PackedFormat kFormat{{'p', 'y', 'c', '.', 'i', 'n', 't', '4'}, 1, "packed int4 weight", "int4_pack"};
constexpr uint64_t kAlignment = 64;

// Everything but the checksum follows from the shape.
Header header_for(int64_t n, int64_t k, int group, bool symmetric, int activation_bits) {
  Header h{};
  h.n = static_cast<int32_t>(n);
  h.k = static_cast<int32_t>(k);
  h.group = group;
  h.symmetric = symmetric ? 1 : 0;
  h.activation_bits = activation_bits;
  const auto count = static_cast<uint64_t>(h.panels() * h.groups());
  h.offsets = round_up<uint64_t>(sizeof(Header), kAlignment);
  h.scales = h.offsets + static_cast<uint64_t>(h.panels()) * kPanel * sizeof(float);
  uint64_t end = h.scales + count * kPanel * 2;
  if (!symmetric) {
    h.zeros = end;
    end += count * (kPanel / 2);
  }
  h.deep = end;
  h.nibbles = round_up(end + static_cast<uint64_t>(h.panels()), kAlignment);
  h.bytes = h.nibbles + static_cast<uint64_t>(h.panels() * h.units()) * kUnitBytes;
  kFormat.seal(h);
  return h;
}

uint8_t value_at(const uint8_t* row, int64_t i) { return nibble(row[i / 2], i % 2 != 0); }

void put(uint8_t* at, bool high, uint8_t value) { *at |= static_cast<uint8_t>(high ? value << 4 : value); }

// One panel's part of the buffer, zeroed before. Behind the last channel everything stays 0.
struct Place {
  uint8_t* nibbles;
  uint16_t* scale;
  uint8_t* zero;  // or null

  Place(uint8_t* packed, const Header& h, int64_t panel)
      : nibbles(packed + h.nibbles + panel * h.units() * kUnitBytes),
        scale(reinterpret_cast<uint16_t*>(packed + h.scales) + panel * h.groups() * kPanel),
        zero(h.zeros == 0 ? nullptr : packed + h.zeros + panel * h.groups() * (kPanel / 2)) {}
};

// Whether the lanes of chains of depth 8 have room for any activations. A lane adds up the products of two positions of
// each set of a unit, the first two or the last two.
bool fits_deep(const int8_t* unit) {
  constexpr int kRoom = 32767 / 255;
  for (int lane = 0; lane < 2 * kPanel; ++lane) {
    int positive = 0, negative = 0;
    for (int i = 0; i < kUnit / 2; ++i) {
      const int w = unit[i / 2 * 4 * kPanel + 2 * lane + i % 2];
      (w > 0 ? positive : negative) += w;
    }
    if (positive > kRoom || -negative > kRoom) return false;
  }
  return true;
}

// What is made of the weights expanded: whether each panel is deep, and the offsets.
void add_derived(const Header& h, uint8_t* packed) {
  const Kernel& kernel = kernels().first();
  const std::vector<uint8_t> ones(static_cast<size_t>(h.units()) * kUnit, 1);
  std::vector<int8_t> weights(ones.size() * kPanel);
  std::vector<float> scale(static_cast<size_t>(h.groups()) * kPanel);
  const Expanded expanded{weights.data(), scale.data()};
  for (int64_t i = 0; i < h.panels(); ++i) {
    const Panel panel = panel_of(packed, h, i, 0, h.units());
    kernel.expand(panel, expanded);
    bool deep = true;
    for (int unit = 0; unit < panel.units; ++unit) deep = deep && fits_deep(weights.data() + unit * kUnit * kPanel);
    packed[h.deep + static_cast<uint64_t>(i)] = deep ? 1 : 0;
    auto* offset = reinterpret_cast<float*>(packed + h.offsets) + i * kPanel;
    kernel.tile(ones.data(), 0, 1, panel, expanded, offset, false);
  }
}

void pack_panel(const Weight& w, const Header& h, int64_t panel, uint8_t* packed) {
  const Place to(packed, h, panel);
  const int64_t groups = h.groups();
  for (int c = 0; c < kPanel && panel * kPanel + c < w.n; ++c) {
    const int64_t row = panel * kPanel + c;
    const uint8_t* values = w.values + row * divide_up(w.k, 2);
    const uint8_t* zeros = w.zero_point == nullptr ? nullptr : w.zero_point + row * divide_up(groups, 2);
    for (int64_t g = 0; g < groups; ++g) {
      to.scale[g * kPanel + c] = w.scale[row * groups + g];
      const uint8_t zero = zeros == nullptr ? kSymmetricZero : value_at(zeros, g);
      if (to.zero != nullptr) put(to.zero + g * (kPanel / 2) + c % 8, c >= 8, zero);
      const int64_t end = std::min<int64_t>(round_up<int64_t>(w.k, kUnit), (g + 1) * w.group);
      for (int64_t i = g * w.group; i < end; ++i) {
        const int at = static_cast<int>(i % kUnit);
        put(to.nibbles + i / kUnit * kUnitBytes + nibble_byte(at, c), is_high(at),
            i < w.k ? value_at(values, i) : zero);
      }
    }
  }
}

}  // namespace

std::vector<uint8_t> pack(const Weight& w, int threads) {
  check(w.n >= 1 && w.n < (int64_t{1} << 31) && w.k >= 1 && w.k <= kMaxK, "int4_pack: the weight is [", w.n, ", ", w.k,
        "], expected at least one row and 1 to ", kMaxK, " columns");
  check(w.group == 32 || w.group == 64 || w.group == 128, "int4_pack: group is ", w.group, ", expected 32, 64 or 128");
  check(w.activation_bits == 8 || w.activation_bits == 16, "int4_pack: activation_bits is ", w.activation_bits,
        ", expected 8 or 16");
  const Header header = header_for(w.n, w.k, w.group, w.zero_point == nullptr, w.activation_bits);
  std::vector<uint8_t> packed(header.bytes);
  std::memcpy(packed.data(), &header, sizeof(header));
  parallel(usable_threads(threads), [&](int thread, int count) {
    for (int64_t panel = thread; panel < header.panels(); panel += count) pack_panel(w, header, panel, packed.data());
  });
  add_derived(header, packed.data());
  return packed;
}

const Header& header_of(const uint8_t* packed, int64_t bytes) { return kFormat.header_of<Header>(packed, bytes); }

Panel panel_of(const uint8_t* packed, const Header& h, int64_t panel, int64_t unit, int64_t units) {
  const int group_units = h.group / kUnit;
  const int64_t group = panel * h.groups() + unit / group_units;
  return {packed + h.nibbles + (panel * h.units() + unit) * kUnitBytes,
          reinterpret_cast<const uint16_t*>(packed + h.scales) + group * kPanel,
          h.zeros == 0 ? nullptr : packed + h.zeros + group * (kPanel / 2),
          static_cast<int>(units),
          group_units,
          packed[h.deep + static_cast<uint64_t>(panel)] != 0};
}

void unpack(const uint8_t* packed, int64_t bytes, const Parts& parts) {
  const Header& h = header_of(packed, bytes);
  const int64_t groups = h.groups(), row_bytes = divide_up(h.k, 2), zero_bytes = divide_up(groups, 2);
  if (parts.values != nullptr) std::memset(parts.values, 0, static_cast<size_t>(h.n * row_bytes));
  if (parts.zero_point != nullptr) std::memset(parts.zero_point, 0, static_cast<size_t>(h.n * zero_bytes));
  for (int64_t row = 0; row < h.n; ++row) {
    const Panel panel = panel_of(packed, h, row / kPanel, 0, h.units());
    const int c = static_cast<int>(row % kPanel);
    for (int64_t i = 0; i < h.k && parts.values != nullptr; ++i) {
      const int at = static_cast<int>(i % kUnit);
      put(parts.values + row * row_bytes + i / 2, i % 2 != 0,
          nibble(panel.nibbles[i / kUnit * kUnitBytes + nibble_byte(at, c)], is_high(at)));
    }
    for (int64_t g = 0; g < groups; ++g) {
      if (parts.scale != nullptr) parts.scale[row * groups + g] = panel.scale[g * kPanel + c];
      if (parts.zero_point != nullptr && panel.zero != nullptr)
        put(parts.zero_point + row * zero_bytes + g / 2, g % 2 != 0,
            nibble(panel.zero[g * (kPanel / 2) + c % 8], c >= 8));
    }
  }
}

}  // namespace pycompress::int4
