#include "pack.h"

#include <algorithm>
#include <cstring>

#include "../common/buffer.h"
#include "../common/check.h"
#include "../common/float16.h"
#include "../common/parallel.h"
#include "windows.h"

namespace pycompress::int8 {
namespace {

constexpr PackedFormat kFormat{{'p', 'y', 'c', '.', 'i', 'n', 't', '8'}, 2, "packed int8 weight", "int8_pack"};
constexpr int kNr = 16, kLanes = 2 * kNr;  // of the chains layout: two 16-bit lanes per channel

// --- the chains layout --------------------------------------------------------------------------------------------

// What one lane may hold: sums of positive and of negative weights that no activation can push out of 16 bits.
struct Budget {
  int positive, negative;
  explicit Budget(int amax) : positive(32767 / amax), negative(32768 / amax) {}
};

struct LaneSums {
  uint16_t positive[kLanes], negative[kLanes];
};

bool fits(const LaneSums& a, const LaneSums& b, Budget budget) {
  int over = 0;  // no early exit: the compiler turns the loop into a few vector compares
  for (int l = 0; l < kLanes; ++l) {
    over |= a.positive[l] + b.positive[l] > budget.positive;
    over |= a.negative[l] + b.negative[l] > budget.negative;
  }
  return over == 0;
}

int fullest(const LaneSums& a, const LaneSums& b) {
  int most = 0;
  for (int l = 0; l < kLanes; ++l) {
    most = std::max(most, a.positive[l] + b.positive[l]);
    most = std::max(most, a.negative[l] + b.negative[l]);
  }
  return most;
}

LaneSums sum(const LaneSums& a, const LaneSums& b) {
  LaneSums s;
  for (int l = 0; l < kLanes; ++l) {
    s.positive[l] = static_cast<uint16_t>(a.positive[l] + b.positive[l]);
    s.negative[l] = static_cast<uint16_t>(a.negative[l] + b.negative[l]);
  }
  return s;
}

// Four positions x 16 channels of weights, and the orders (bit v: version v) in which they keep the budget alone.
struct Item {
  int group;
  int8_t weights[kNr][4];  // in the order of k
  unsigned versions;
  LaneSums sums[kVersions];
  int fullest_lane;  // of the best version: the larger, the harder to find partners for
  bool light;        // may join a chain of four: others are worth more as partners of hard items in chains of two
};

struct Member {
  const Item* item;
  int version;
};

using Chain = std::vector<Member>;
const LaneSums kEmpty{};

void measure(Item& item, int versions, Budget budget) {
  item.versions = 0;
  item.fullest_lane = 1 << 30;
  for (int v = 0; v < versions; ++v) {
    LaneSums& sums = item.sums[v];
    for (int c = 0; c < kNr; ++c)
      for (int h = 0; h < 2; ++h) {
        const int a = item.weights[c][kOrder[v][2 * h]], b = item.weights[c][kOrder[v][2 * h + 1]];
        sums.positive[2 * c + h] = static_cast<uint16_t>(std::max(a, 0) + std::max(b, 0));
        sums.negative[2 * c + h] = static_cast<uint16_t>(std::max(-a, 0) + std::max(-b, 0));
      }
    if (!fits(sums, kEmpty, budget)) continue;
    item.versions |= 1u << v;
    item.fullest_lane = std::min(item.fullest_lane, fullest(sums, kEmpty));
  }
}

// The group breaks the budget in every order. Lanes that break it in the best order are halved; the other halves
// (|w| <= 64, so within any budget) make a second item of mostly zeros, which joins chains easily.
Item split(Item& item, int versions, Budget budget) {
  int best = 0, fewest = kLanes + 1;
  const auto over = [&](int v, int lane) {
    return item.sums[v].positive[lane] > budget.positive || item.sums[v].negative[lane] > budget.negative;
  };
  for (int v = 0; v < versions; ++v) {
    int lanes = 0;
    for (int l = 0; l < kLanes; ++l) lanes += over(v, l);
    if (lanes < fewest) best = v, fewest = lanes;
  }
  Item rest{};
  rest.group = item.group;
  rest.light = true;
  for (int l = 0; l < kLanes; ++l) {
    if (!over(best, l)) continue;
    for (int j = 0; j < 2; ++j) {
      const int position = kOrder[best][2 * (l % 2) + j];
      int8_t& weight = item.weights[l / 2][position];
      rest.weights[l / 2][position] = static_cast<int8_t>(weight / 2);
      weight = static_cast<int8_t>(weight - weight / 2);
    }
  }
  measure(item, versions, budget);
  measure(rest, versions, budget);
  return rest;
}

// The first `wanted` items, scanning from the hardest, that fit in any order; of those the one that leaves most room.
// `wanted` = 1 spends the hard items first, which is right for the last member of a chain.
Member best_partner(const std::vector<Item>& items, const std::vector<bool>& used, const LaneSums& chain, Budget budget,
                    bool light, int wanted) {
  Member best{nullptr, 0};
  int room = 1 << 30;
  for (size_t i = 0; i < items.size() && wanted > 0; ++i) {
    if (used[i] || (light && !items[i].light)) continue;
    bool found = false;
    for (int v = 0; v < kVersions; ++v) {
      if (!(items[i].versions >> v & 1) || !fits(chain, items[i].sums[v], budget)) continue;
      const int lane = fullest(chain, items[i].sums[v]);
      if (lane < room) room = lane, best = {&items[i], v};
      found = true;
    }
    wanted -= found;
  }
  return best;
}

// Greedy matching, hardest item first: chains of 4 while they can be had, then of 2, the rest alone.
void match(std::vector<Item>& items, Budget budget, std::vector<Chain> (&chains)[3]) {
  std::sort(items.begin(), items.end(), [](const Item& a, const Item& b) {
    return a.fullest_lane != b.fullest_lane ? a.fullest_lane > b.fullest_lane : a.group < b.group;
  });
  std::vector<bool> used(items.size(), false);
  const auto take = [&](const Item* item, bool taken) { used[static_cast<size_t>(item - items.data())] = taken; };
  for (int d = 0; d < 3; ++d) {
    const int depth = kDepths[d];
    for (Item& first : items) {
      if (used[static_cast<size_t>(&first - items.data())]) continue;
      if (depth == 4 && !first.light) continue;
      Chain chain;
      for (int v = 0; v < kVersions && chain.empty(); ++v) {
        if (!(first.versions >> v & 1)) continue;
        chain = {{&first, v}};
        LaneSums sums = first.sums[v];
        take(&first, true);
        while (static_cast<int>(chain.size()) < depth) {
          const bool closing = static_cast<int>(chain.size()) + 1 == depth;
          const Member next = best_partner(items, used, sums, budget, depth == 4, closing ? 1 : 8);
          if (next.item == nullptr) break;
          take(next.item, true);
          sums = sum(sums, next.item->sums[next.version]);
          chain.push_back(next);
        }
        if (static_cast<int>(chain.size()) == depth) break;
        for (const Member& member : chain) take(member.item, false);
        chain.clear();
      }
      if (!chain.empty()) chains[d].push_back(chain);
    }
  }
}

void pack_chains(const int8_t* values, int64_t n, int64_t k, int first_channel, int block, int length, int versions,
                 int amax, std::vector<uint8_t>& out) {
  const Budget budget(amax);
  std::vector<Item> items;
  const int64_t begin = static_cast<int64_t>(block) * kBlockK, end = std::min<int64_t>(begin + length, k);
  for (int64_t position = begin; position < end; position += 4) {
    Item item{};
    item.light = versions == 1;
    item.group = static_cast<int>((position - begin) / 4);
    for (int c = 0; c < kNr && first_channel + c < n; ++c)
      for (int j = 0; j < 4 && position + j < k; ++j)
        item.weights[c][j] = values[(first_channel + c) * k + position + j];
    if (std::all_of(&item.weights[0][0], &item.weights[0][0] + 4 * kNr, [](int8_t w) { return w == 0; })) continue;
    measure(item, versions, budget);
    if (item.versions == 0) items.push_back(split(item, versions, budget));
    items.push_back(item);
  }
  std::vector<Chain> chains[3];
  match(items, budget, chains);

  const uint32_t head[4] = {static_cast<uint32_t>(chains[0].size()), static_cast<uint32_t>(chains[1].size()),
                            static_cast<uint32_t>(chains[2].size()), static_cast<uint32_t>(items.size())};
  append(out, head, 4);
  for (const auto& depth : chains)
    for (const Chain& chain : depth)
      for (const Member& member : chain) {
        const uint16_t offset = static_cast<uint16_t>(member.version * length + 4 * member.item->group);
        append(out, &offset, 1);
      }
  out.resize(round_up<size_t>(out.size(), 64));
  for (const auto& depth : chains)
    for (const Chain& chain : depth)
      for (const Member& member : chain)
        for (int c = 0; c < kNr; ++c)
          for (int j = 0; j < 4; ++j)
            out.push_back(static_cast<uint8_t>(member.item->weights[c][kOrder[member.version][j]]));
}

// --- the layouts of the other kernels -----------------------------------------------------------------------------

void pack_plain(Layout layout, int nr, const int8_t* values, int64_t n, int64_t k, int first_channel, int block,
                int length, std::vector<uint8_t>& out) {
  const int64_t begin = static_cast<int64_t>(block) * kBlockK;
  const size_t base = out.size();
  out.resize(base + static_cast<size_t>(nr) * static_cast<size_t>(length));
  for (int c = 0; c < nr && first_channel + c < n; ++c)
    for (int64_t i = 0; i < length && begin + i < k; ++i) {
      const int64_t at = layout == Layout::rows ? c * length + i : (i / 4 * nr + c) * 4 + i % 4;
      out[base + static_cast<size_t>(at)] = static_cast<uint8_t>(values[(first_channel + c) * k + begin + i]);
    }
}

}  // namespace

void check_range(const char* op, const Range& range, int activation_bits) {
  const int amax = (1 << activation_bits) - 1;
  check(range.scale >= 0x1p-126f && range.scale <= 0x1p126f, op, ": input_scale is ", range.scale,
        ", expected 2^-126 to 2^126");
  check(range.zero_point >= 0 && range.zero_point <= amax, op, ": input_zero_point is ", range.zero_point,
        ", expected 0 to ", amax);
}

Range range_of(const Header& header) { return {to_float(header.input_scale), header.input_zero_point}; }

std::vector<uint8_t> pack(const Kernel& kernel, const int8_t* values, int64_t n, int64_t k, int activation_bits,
                          int threads, const Range* range) {
  check(n >= 1 && n <= 1 << 24, "int8_pack: out_features is ", n, ", expected 1 to ", 1 << 24);
  check(k >= 1 && k <= kMaxK, "int8_pack: in_features is ", k, ", expected 1 to ", kMaxK);
  check(activation_bits == 7 || activation_bits == 8, "int8_pack: activation_bits is ", activation_bits,
        ", expected 7 or 8");
  check(std::find(values, values + n * k, int8_t{-128}) == values + n * k,
        "int8_pack: a weight is -128, expected -127 to 127 (the scale is symmetric)");
  if (range != nullptr) check_range("int8_pack", *range, activation_bits);

  Header header{};
  header.layout = kernel.layout;
  header.n = static_cast<int32_t>(n);
  header.k = static_cast<int32_t>(k);
  header.nr = kernel.nr;
  header.activation_bits = activation_bits;
  if (range != nullptr) {
    std::memcpy(&header.input_scale, &range->scale, sizeof(range->scale));
    header.input_zero_point = range->zero_point;
  }
  // 7-bit activations always fit alone and pair up as they lie, so they need one order only.
  header.versions = kernel.layout == Layout::chains && activation_bits == 8 ? kVersions : 1;

  const int amax = (1 << activation_bits) - 1;
  const ActivationShape shape{header.k, header.versions};
  const int64_t panels = (n + kernel.nr - 1) / kernel.nr;
  const size_t blocks = static_cast<size_t>(shape.blocks());
  std::vector<std::vector<uint8_t>> packed(static_cast<size_t>(panels) * blocks);
  std::vector<int32_t> column_sums(static_cast<size_t>(panels * kernel.nr), 0);
  parallel(usable_threads(threads), [&](int thread, int team) {
    for (int64_t p = thread; p < panels; p += team) {
      const int first = static_cast<int>(p) * kernel.nr;
      for (int b = 0; b < shape.blocks(); ++b) {
        std::vector<uint8_t>& out = packed[static_cast<size_t>(p) * blocks + static_cast<size_t>(b)];
        if (kernel.layout == Layout::chains)
          pack_chains(values, n, k, first, b, shape.length(b), header.versions, amax, out);
        else if (kernel.layout == Layout::windows)
          pack_windows(values, n, k, first, int64_t{b} * kBlockK, shape.length(b), amax, out);
        else
          pack_plain(kernel.layout, kernel.nr, values, n, k, first, b, shape.length(b), out);
      }
      for (int64_t c = first; c < std::min<int64_t>(first + kernel.nr, n); ++c)
        for (int64_t i = 0; i < k; ++i) column_sums[static_cast<size_t>(c)] += values[c * k + i];
    }
  });

  header.column_sums = round_up<uint64_t>(sizeof(Header), 64);
  header.blocks = round_up<uint64_t>(header.column_sums + column_sums.size() * 4, 64);
  uint64_t at = round_up<uint64_t>(header.blocks + packed.size() * 8, 64);
  std::vector<uint64_t> offsets;
  for (const auto& block : packed) {
    offsets.push_back(at);
    at = round_up<uint64_t>(at + block.size(), 64);
  }
  header.bytes = at;
  kFormat.seal(header);

  std::vector<uint8_t> out(at, 0);
  std::memcpy(out.data(), &header, sizeof(header));
  std::memcpy(out.data() + header.column_sums, column_sums.data(), column_sums.size() * 4);
  std::memcpy(out.data() + header.blocks, offsets.data(), offsets.size() * 8);
  for (size_t i = 0; i < packed.size(); ++i) std::memcpy(out.data() + offsets[i], packed[i].data(), packed[i].size());
  return out;
}

const Header& header_of(const uint8_t* packed, int64_t bytes) { return kFormat.header_of<Header>(packed, bytes); }

namespace {

// f(first channel, first position, number of items, their offsets, their weights, block length), for the chains layout
template <class F>
void each_block(const uint8_t* packed, const Header& header, F&& f) {
  const ActivationShape shape{header.k, header.versions};
  const uint64_t* offsets = reinterpret_cast<const uint64_t*>(packed + header.blocks);
  for (int first = 0; first < header.n; first += header.nr)
    for (int b = 0; b < shape.blocks(); ++b) f(first, b, shape.length(b), packed + *offsets++);
}

}  // namespace

void unpack(const uint8_t* packed, int64_t bytes, int8_t* values) {
  const Header& header = header_of(packed, bytes);
  const int64_t n = header.n, k = header.k;
  std::memset(values, 0, static_cast<size_t>(n * k));
  each_block(packed, header, [&](int first, int b, int length, const uint8_t* block) {
    const int64_t begin = static_cast<int64_t>(b) * kBlockK;
    const int channels = static_cast<int>(std::min<int64_t>(header.nr, n - first));
    if (header.layout == Layout::windows) return unpack_windows(block, n, k, first, begin, values);
    if (header.layout != Layout::chains) {
      const int8_t* w = reinterpret_cast<const int8_t*>(block);
      for (int c = 0; c < channels; ++c)
        for (int64_t i = 0; i < length && begin + i < k; ++i)
          values[(first + c) * k + begin + i] =
              w[header.layout == Layout::rows ? c * length + i : (i / 4 * header.nr + c) * 4 + i % 4];
      return;
    }
    const uint32_t items = reinterpret_cast<const uint32_t*>(block)[3];
    const uint16_t* offset = reinterpret_cast<const uint16_t*>(block + 16);
    const int8_t* w = reinterpret_cast<const int8_t*>(block + round_up<size_t>(16 + 2 * items, 64));
    for (uint32_t i = 0; i < items; ++i, w += 4 * kNr) {
      const uint8_t (&order)[4] = kOrder[offset[i] / length];
      const int64_t position = begin + offset[i] % length;
      for (int c = 0; c < channels; ++c)
        for (int j = 0; j < 4; ++j)
          if (position + order[j] < k)
            values[(first + c) * k + position + order[j]] =
                static_cast<int8_t>(values[(first + c) * k + position + order[j]] + w[4 * c + j]);
    }
  });
}

Depths depths(const uint8_t* packed, int64_t bytes) {
  const Header& header = header_of(packed, bytes);
  const int64_t panels = (header.n + header.nr - 1) / header.nr;
  Depths result{{0, 0, 0}, (static_cast<int64_t>(header.k) + 3) / 4 * panels};
  if (header.layout != Layout::chains) return result;
  each_block(packed, header, [&](int, int, int, const uint8_t* block) {
    for (int d = 0; d < 3; ++d) result.items[d] += int64_t{kDepths[d]} * reinterpret_cast<const uint32_t*>(block)[d];
  });
  return result;
}

}  // namespace pycompress::int8
