#include "windows.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>

#include "../common/buffer.h"

namespace pycompress::int8 {
namespace {

constexpr int kChannels = 16, kSlots = 4, kLanesPerItem = 2 * kChannels, kReach = 16;

struct Item {
  uint16_t offset;
  uint8_t pick[kChannels][kSlots];
  int8_t weight[kChannels][kSlots];
};

struct Placed {
  uint8_t position;  // in the window
  int8_t weight;
};

bool lane_fits(int positive, int negative, int amax) { return amax * positive <= 32767 && amax * negative <= 32768; }

// Puts a channel's weights into the 2 * items lanes of two slots each, large ones first, each where it leaves the lane
// least full. False where a lane overflows.
bool place(std::vector<Placed> weights, int channel, int amax, std::vector<Item>& items) {
  struct Lane {
    int used = 0, positive = 0, negative = 0;
  };
  std::vector<Lane> lanes(2 * items.size());
  std::sort(weights.begin(), weights.end(), [](Placed a, Placed b) {
    return std::abs(a.weight) != std::abs(b.weight) ? std::abs(a.weight) > std::abs(b.weight) : a.position < b.position;
  });
  for (const Placed& placed : weights) {
    Lane* best = nullptr;
    int least = 1 << 30;
    for (Lane& lane : lanes) {
      const int filled = placed.weight > 0 ? lane.positive : lane.negative;
      if (lane.used < 2 && filled < least) best = &lane, least = filled;
    }
    (placed.weight > 0 ? best->positive : best->negative) += std::abs(placed.weight);
    if (!lane_fits(best->positive, best->negative, amax)) return false;
    const auto at = static_cast<size_t>(best - lanes.data());
    const size_t slot = at % 2 * 2 + static_cast<size_t>(best->used++);
    items[at / 2].pick[channel][slot] = placed.position;
    items[at / 2].weight[channel][slot] = placed.weight;
  }
  return true;
}

// As few items as hold the window; more always help, because a weight fits into a lane of its own.
std::vector<Item> items_of(const std::vector<Placed> (&weights)[kChannels], uint16_t offset, int amax) {
  size_t most = 0;
  for (const auto& channel : weights) most = std::max(most, channel.size());
  for (size_t count = (most + kSlots - 1) / kSlots; count > 0; ++count) {
    std::vector<Item> items(count, Item{});
    bool fits = true;
    for (int c = 0; c < kChannels && fits; ++c) fits = place(weights[c], c, amax, items);
    for (Item& item : items) item.offset = offset;
    if (fits) return items;
  }
  return {};
}

bool pair_fits(const Item& a, const Item& b, int amax) {
  for (int lane = 0; lane < kLanesPerItem; ++lane) {
    int positive = 0, negative = 0;
    for (const Item* item : {&a, &b})
      for (int j = 0; j < 2; ++j) {
        const int weight = item->weight[lane / 2][lane % 2 * 2 + j];
        positive += std::max(weight, 0);
        negative += std::max(-weight, 0);
      }
    if (!lane_fits(positive, negative, amax)) return false;
  }
  return true;
}

// Pairs first, then what found no partner among the next kReach items.
std::vector<Item> matched(const std::vector<Item>& items, int amax, uint32_t* pairs) {
  std::vector<bool> used(items.size(), false);
  std::vector<Item> result, singles;
  for (size_t i = 0; i < items.size(); ++i) {
    if (used[i]) continue;
    const size_t end = std::min(items.size(), i + 1 + kReach);
    size_t j = i + 1;
    while (j < end && (used[j] || !pair_fits(items[i], items[j], amax))) ++j;
    if (j == end) {
      singles.push_back(items[i]);
      continue;
    }
    used[j] = true;
    result.insert(result.end(), {items[i], items[j]});
  }
  *pairs = static_cast<uint32_t>(result.size() / 2);
  result.insert(result.end(), singles.begin(), singles.end());
  return result;
}

void append_item(std::vector<uint8_t>& out, const Item& item) {
  const uint8_t* low = &item.pick[0][0];
  const uint8_t* high = &item.pick[kChannels / 2][0];
  for (int b = 0; b < kChannels / 2 * kSlots; ++b) out.push_back(static_cast<uint8_t>(low[b] | high[b] << 4));
  append(out, &item.weight[0][0], kChannels * kSlots);
}

}  // namespace

void pack_windows(const int8_t* values, int64_t n, int64_t k, int64_t first, int64_t begin, int64_t length, int amax,
                  std::vector<uint8_t>& out) {
  std::vector<Item> items;
  for (int64_t start = begin; start < std::min(begin + length, k); start += kWindow) {
    std::vector<Placed> weights[kChannels];
    for (int64_t c = 0; c < std::min<int64_t>(kChannels, n - first); ++c)
      for (int64_t i = 0; i < std::min<int64_t>(kWindow, k - start); ++i) {
        const int8_t weight = values[(first + c) * k + start + i];
        if (weight != 0) weights[c].push_back({static_cast<uint8_t>(i), weight});
      }
    const std::vector<Item> window = items_of(weights, static_cast<uint16_t>(start - begin), amax);
    items.insert(items.end(), window.begin(), window.end());
  }
  uint32_t pairs = 0;
  items = matched(items, amax, &pairs);

  const size_t base = out.size();
  const auto count = static_cast<uint32_t>(items.size());
  const uint32_t head[4] = {pairs, count - 2 * pairs, count, 0};
  append(out, head, 4);
  for (const Item& item : items) append(out, &item.offset, 1);
  out.resize(base + (16 + 2 * items.size() + 63) / 64 * 64);
  for (const Item& item : items) append_item(out, item);
}

void unpack_windows(const uint8_t* block, int64_t n, int64_t k, int64_t first, int64_t begin, int8_t* values) {
  uint32_t items;
  std::memcpy(&items, block + 8, 4);
  const auto* offset = reinterpret_cast<const uint16_t*>(block + 16);
  const uint8_t* item = block + (16 + 2 * size_t{items} + 63) / 64 * 64;
  for (uint32_t i = 0; i < items; ++i, item += kItemBytes) {
    const auto* weight = reinterpret_cast<const int8_t*>(item + 32);
    for (int64_t c = 0; c < std::min<int64_t>(kChannels, n - first); ++c)
      for (int64_t slot = 0; slot < kSlots; ++slot) {
        const int64_t b = c * kSlots + slot;
        if (weight[b] == 0) continue;
        const int pick = item[b % 32] >> (b < 32 ? 0 : 4) & 15;
        values[(first + c) * k + begin + offset[i] + pick] = weight[b];
      }
  }
}

}  // namespace pycompress::int8
