// Packing of bitmap.h, on the host.
#include <algorithm>
#include <cstring>
#include <utility>

#include "../../common/check.h"
#include "bitmap.h"

namespace pycompress::sparse::cuda {
namespace {

// f(word, bit, n, k) for every weight of a unit that the kernels look at, in the order of their values.
template <class F>
void for_each_weight(int64_t unit, int64_t k, F&& f) {
  const int64_t n_begin = unit / units_across(k) * kUnitN, k_begin = unit % units_across(k) * kUnitK;
  for (int tile = 0; tile < kTilesOfUnit; ++tile)
    for (int reg = 0; reg < 4; ++reg)
      for (int half = 0; half < 2; ++half)
        for (int bit = 0; bit < 32; ++bit) {
          const Position at = position_of(tile, reg, half * 16 + bit / 2, bit % 2);
          f((tile * 2 + half) * 4 + reg, bit, n_begin + at.n, k_begin + at.k);
        }
}

template <class T>
void put(std::vector<uint8_t>& to, size_t at, T value) {
  std::memcpy(to.data() + at, &value, sizeof value);
}

struct Canonical {
  const uint8_t* mask;
  const uint16_t* values;
  std::vector<int64_t> first;  // value of each row
  int64_t n, k;

  Canonical(const uint8_t* mask_, const uint16_t* values_, int64_t n_, int64_t k_)
      : mask(mask_), values(values_), first(static_cast<size_t>(n_ + 1)), n(n_), k(k_) {
    for (int64_t row = 0; row < n; ++row)
      first[static_cast<size_t>(row + 1)] = first[static_cast<size_t>(row)] + before(row, k);
  }
  bool is_there(int64_t row, int64_t column) const {
    return row < n && column < k && (mask[row * divide_up(k, 8) + column / 8] >> column % 8 & 1) != 0;
  }
  int64_t before(int64_t row, int64_t column) const {  // bits of the row in front of a column
    const uint8_t* bytes = mask + row * divide_up(k, 8);
    int64_t count = 0;
    for (int64_t i = 0; i < column / 8; ++i) count += __builtin_popcount(bytes[i]);
    return column % 8 == 0 ? count : count + __builtin_popcount(bytes[column / 8] & ((1u << column % 8) - 1));
  }
};

std::vector<uint8_t> packed_unit(const Canonical& from, std::vector<int64_t>& next, int64_t unit) {
  // Values of a row lie in ascending k, which is another order than the unit's: gathered first.
  uint16_t dense[kUnitN][kUnitK] = {};
  const int64_t n_begin = unit / units_across(from.k) * kUnitN, k_begin = unit % units_across(from.k) * kUnitK;
  for (int64_t row = n_begin; row < std::min(from.n, n_begin + kUnitN); ++row)
    for (int64_t column = k_begin; column < std::min(from.k, k_begin + kUnitK); ++column)
      if (from.is_there(row, column))
        dense[row - n_begin][column - k_begin] = from.values[next[static_cast<size_t>(row)]++];

  std::vector<uint8_t> to(kValues);
  uint32_t count = 0, tile_first = 0;
  for_each_weight(unit, from.k, [&](int word, int bit, int64_t n, int64_t k) {
    if (bit == 0) {
      const int tile = word / 8;
      if (word % 8 == 0) {  // the first of a tile: half 0, register 0
        tile_first = count;
        put(to, static_cast<size_t>(kFirst + tile * 2), static_cast<uint16_t>(count));
      }
      to[static_cast<size_t>(kBefore + word)] = static_cast<uint8_t>(count - tile_first);
    }
    if (!from.is_there(n, k)) return;
    to[static_cast<size_t>(word * 4 + bit / 8)] |= static_cast<uint8_t>(1 << bit % 8);
    to.resize(to.size() + 2);
    put(to, to.size() - 2, dense[n - n_begin][k - k_begin]);
    ++count;
  });
  to.resize(round_up<size_t>(to.size(), kChunk));
  return to;
}

}  // namespace

Packed pack_bitmap(const uint8_t* mask, const uint16_t* values, int64_t count, Type type, int64_t n, int64_t k) {
  check(n >= 1 && k >= 1 && k <= kMaxK, "sparse_pack: the weight is ", n, "x", k, ", expected n >= 1 and k from 1 to ",
        kMaxK);
  const Canonical from(mask, values, n, k);
  check(from.first.back() == count, "sparse_pack: there are ", count, " values, the mask has ", from.first.back(),
        " bits set");
  std::vector<int64_t> next(from.first.begin(), from.first.end());
  const int64_t units = units_of(n, k);
  std::vector<uint8_t> packed(static_cast<size_t>(round_up<int64_t>((units + 1) * 4, kChunk)));
  size_t largest = 0;
  for (int64_t unit = 0; unit < units; ++unit) {
    put(packed, static_cast<size_t>(unit) * 4, static_cast<uint32_t>(packed.size() / kChunk));
    const std::vector<uint8_t> one = packed_unit(from, next, unit);
    largest = std::max(largest, one.size());
    packed.insert(packed.end(), one.begin(), one.end());
  }
  check(packed.size() / kChunk < UINT32_MAX, "sparse_pack: a weight ", n, "x", k, " is too large");
  put(packed, static_cast<size_t>(units) * 4, static_cast<uint32_t>(packed.size() / kChunk));
  const Shape shape{type, n, k, static_cast<int64_t>(packed.size()), static_cast<int>(largest)};
  return {shape, std::move(packed)};
}

}  // namespace pycompress::sparse::cuda
