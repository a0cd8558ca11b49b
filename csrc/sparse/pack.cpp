#include "pack.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>

#include "../common/buffer.h"
#include "../common/check.h"
#include "../common/parallel.h"
#include "../int8/pack.h"

namespace pycompress::sparse {
namespace {

constexpr PackedFormat kFormat{{'p', 'y', 'c', '.', 's', 'p', 'm', 'm'}, 1, "packed sparse weight", "sparse_pack"};
// From this density on a single row of x takes its weights by bitmask: an eighth of a byte a position, where indices
// cost a byte a weight, and time per position, not per weight.
constexpr double kBitsDensity = 0.4;
constexpr int64_t kMaxBlockChannels = 512, kMinBlocks = 6;

int values_per_element(Format format) { return format == Format::rows ? 1 : format == Format::panels ? kPanel : 4; }
size_t value_bytes(Format format) { return is_float(format) ? sizeof(float) : sizeof(int8_t); }
int indices_per_element(Format format) { return format == Format::quads ? 4 : 1; }
int channels_per_entry(Format format) { return format == Format::panels ? kPanel : 1; }
int positions_per_index(Format format) { return format == Format::quads4 ? 4 : 1; }

// The widest tile, and how many positions beside it still leave the L1 room for weights and sums. The sparser the
// weight, the more a block has to hold for the sums to be worth fetching. Measured, benchmarks/NOTES.md.
void choose_tile(Format format, double density, Header& header) {
  struct Choice {
    double below;  // density
    int width, kb;
  };
  static constexpr Choice kRows[] = {{0.075, 32, 256}, {0.3, 32, 192}, {2, 64, 96}};
  static constexpr Choice kPanels[] = {{2, 32, 192}};
  static constexpr Choice kQuads[] = {{2, 32, 256}};
  static constexpr Choice kQuads4[] = {{0.15, 32, 768}, {2, 64, 384}};
  static constexpr const Choice* kChoices[] = {kRows, kPanels, kQuads, kQuads4};
  if (is_delegated(format)) return;
  const Choice* choice = kChoices[static_cast<int>(format)];
  while (density >= choice->below) ++choice;
  header.width = choice->width;
  header.kb = choice->kb;
}

// Where in `values` the weights of each channel begin.
std::vector<int64_t> row_offsets(const uint8_t* mask, int64_t n, int64_t k) {
  const int64_t stride = (k + 7) / 8;
  std::vector<int64_t> offsets{0};
  for (int64_t row = 0; row < n; ++row) {
    int64_t count = 0;
    for (int64_t i = 0; i < stride; ++i) count += __builtin_popcount(mask[row * stride + i]);
    offsets.push_back(offsets.back() + count);
  }
  return offsets;
}

// A channel of one block, dense.
template <class T>
void expand(const uint8_t* mask, const T* values, int64_t begin, int64_t end, T* out) {
  // `values` points at the channel's weights from position 0 on
  for (int64_t i = 0; i < begin / 8; ++i) values += __builtin_popcount(mask[i]);
  for (int64_t i = begin; i < end; ++i) *out++ = mask[i / 8] >> (i % 8) & 1 ? *values++ : T{0};
}

struct Element {
  uint8_t index[4];
  int8_t quad[4];       // the int8 formats
  float panel[kPanel];  // the float formats; rows use the first
};
using Elements = std::vector<Element>;

// --- the int8 formats: pairs of weights meet in one 16-bit lane of `vpmaddubsw` and must not overflow it
// --------------

// Two weights fit into a lane beside each other for any activations up to amax.
bool pair_fits(int a, int b, int amax) {
  const int positive = std::max(a, 0) + std::max(b, 0), negative = std::max(-a, 0) + std::max(-b, 0);
  return amax * positive <= 32767 && amax * negative <= 32768;
}

struct Weight {
  uint8_t index;
  int8_t value;
};

// All weights of a channel in pairs that fit: one of each sign while there are both, then large with small of a sign.
// 255 * 127 < 32768, so a weight always fits alone.
std::vector<Weight> paired(const std::vector<Weight>& weights, int amax) {
  constexpr Weight kNone{0, 0};
  std::vector<Weight> positive, negative, result;
  for (const Weight& weight : weights) (weight.value > 0 ? positive : negative).push_back(weight);
  const size_t both = std::min(positive.size(), negative.size());
  for (size_t i = 0; i < both; ++i) result.insert(result.end(), {positive[i], negative[i]});
  std::vector<Weight>& rest = positive.size() > both ? positive : negative;
  rest.erase(rest.begin(), rest.begin() + static_cast<ptrdiff_t>(both));
  std::sort(rest.begin(), rest.end(), [](Weight a, Weight b) { return std::abs(a.value) < std::abs(b.value); });
  size_t low = 0;
  for (size_t high = rest.size(); high-- > low;) {
    const bool fits = low < high && pair_fits(rest[low].value, rest[high].value, amax);
    result.insert(result.end(), {rest[high], fits ? rest[low++] : kNone});
  }
  return result;
}

Elements quads_of(const int8_t* dense, int64_t length, int amax) {
  std::vector<Weight> weights;
  for (int64_t i = 0; i < length; ++i)
    if (dense[i] != 0) weights.push_back({static_cast<uint8_t>(i), dense[i]});
  if (!pair_fits(127, 127, amax)) weights = paired(weights, amax);
  Elements elements((weights.size() + 3) / 4);
  for (size_t i = 0; i < weights.size(); ++i) {
    elements[i / 4].index[i % 4] = weights[i].index;
    elements[i / 4].quad[i % 4] = weights[i].value;
  }
  return elements;
}

// A group that overflows is split into two that add up to it: halves are at most 64, so they fit.
Elements quads4_of(const int8_t* dense, int64_t length, int amax) {
  Elements elements;
  for (int64_t i = 0; i < length; i += 4) {
    Element element{}, half{};
    element.index[0] = half.index[0] = static_cast<uint8_t>(i / 4);
    for (int j = 0; j < 4 && i + j < length; ++j) element.quad[j] = dense[i + j];
    if (std::count(element.quad, element.quad + 4, 0) == 4) continue;
    if (!pair_fits(element.quad[0], element.quad[1], amax) || !pair_fits(element.quad[2], element.quad[3], amax)) {
      for (int j = 0; j < 4; ++j) {
        half.quad[j] = static_cast<int8_t>(element.quad[j] / 2);
        element.quad[j] = static_cast<int8_t>(element.quad[j] - half.quad[j]);
      }
      elements.push_back(half);
    }
    elements.push_back(element);
  }
  return elements;
}

// --- the float formats ----------------------------------------------------------------------------------------------

// `channels` dense rows of `length` each, `stride` apart.
Elements float_elements(const float* dense, int64_t length, int64_t stride, int channels) {
  Elements elements;
  for (int64_t i = 0; i < length; ++i) {
    Element element{};
    bool any = false;
    for (int c = 0; c < channels; ++c) {
      element.panel[c] = dense[c * stride + i];
      any |= element.panel[c] != 0;
    }
    element.index[0] = static_cast<uint8_t>(i);
    if (any) elements.push_back(element);
  }
  return elements;
}

// --- blocks ---------------------------------------------------------------------------------------------------------

struct Source {
  const uint8_t* mask;
  const void* values;
  const std::vector<int64_t>& rows;
  int64_t n, k;
};

template <class T>
std::vector<T> dense_block(const Source& source, int64_t first, int64_t channels, int64_t begin, int64_t length) {
  std::vector<T> dense(static_cast<size_t>(channels * length));
  for (int64_t c = 0; c < channels; ++c)
    expand(source.mask + (first + c) * ((source.k + 7) / 8),
           static_cast<const T*>(source.values) + source.rows[static_cast<size_t>(first + c)], begin, begin + length,
           dense.data() + c * length);
  return dense;
}

// The elements of every channel (panel) of a block.
std::vector<Elements> elements_of(const Source& source, const Header& header, int64_t first, int64_t channels,
                                  int64_t begin, int64_t length) {
  const int amax = (1 << header.activation_bits) - 1, step = channels_per_entry(header.format);
  std::vector<Elements> entries;
  if (is_float(header.format)) {
    const auto dense = dense_block<float>(source, first, channels, begin, length);
    for (int64_t c = 0; c < channels; c += step)
      entries.push_back(float_elements(dense.data() + c * length, length, length,
                                       static_cast<int>(std::min<int64_t>(step, channels - c))));
  } else {
    const auto dense = dense_block<int8_t>(source, first, channels, begin, length);
    for (int64_t c = 0; c < channels; ++c) {
      const int8_t* row = dense.data() + c * length;
      entries.push_back(header.format == Format::quads ? quads_of(row, length, amax) : quads4_of(row, length, amax));
    }
  }
  return entries;
}

std::vector<uint8_t> pack_block(const Source& source, const Header& header, int64_t n_block, int64_t k_block) {
  const int64_t first = n_block * header.nb, begin = k_block * header.kb;
  const std::vector<Elements> entries =
      elements_of(source, header, first, std::min<int64_t>(header.nb, source.n - first), begin,
                  std::min<int64_t>(header.kb, source.k - begin));
  std::vector<uint16_t> order;
  for (size_t i = 0; i < entries.size(); ++i)
    if (k_block == 0 || !entries[i].empty()) order.push_back(static_cast<uint16_t>(i));
  std::stable_sort(order.begin(), order.end(),
                   [&](uint16_t a, uint16_t b) { return entries[a].size() > entries[b].size(); });
  std::vector<uint16_t> runs;
  uint32_t elements = 0;
  for (const uint16_t entry : order) {
    const auto count = static_cast<uint16_t>(entries[entry].size());
    if (runs.empty() || runs[runs.size() - 2] != count) runs.insert(runs.end(), {count, 0});
    ++runs.back();
    elements += count;
  }

  std::vector<uint8_t> out;
  const uint16_t counts[2] = {static_cast<uint16_t>(runs.size() / 2), static_cast<uint16_t>(order.size())};
  append(out, &elements, 1);
  append(out, counts, 2);
  append(out, runs.data(), runs.size());
  const std::vector<uint16_t> ordered = order;
  order.insert(order.end(), 2, 0);  // the kernels prefetch the sums of the channel after next
  append(out, order.data(), order.size());
  out.resize(round_up<size_t>(out.size(), 8));
  for (const uint16_t entry : ordered)
    for (const Element& element : entries[entry]) {
      const auto count = static_cast<size_t>(values_per_element(header.format));
      if (is_float(header.format))
        append(out, element.panel, count);
      else
        append(out, element.quad, count);
    }
  for (const uint16_t entry : ordered)
    for (const Element& element : entries[entry])
      append(out, element.index, static_cast<size_t>(indices_per_element(header.format)));
  if (header.has_bits != 0)
    for (const uint16_t entry : ordered) {
      std::vector<uint8_t> bits(static_cast<size_t>(header.kb / 8), 0);
      for (const Element& element : entries[entry]) bits[element.index[0] / 8] |= 1 << element.index[0] % 8;
      append(out, bits.data(), bits.size());
    }
  return out;
}

std::vector<int8_t> dense_int8(const Source& source) {
  std::vector<int8_t> dense(static_cast<size_t>(source.n * source.k));
  for (int64_t row = 0; row < source.n; ++row)
    expand(source.mask + row * ((source.k + 7) / 8),
           static_cast<const int8_t*>(source.values) + source.rows[static_cast<size_t>(row)], 0, source.k,
           dense.data() + row * source.k);
  return dense;
}

int8::Layout layout_of(Format format) {
  return format == Format::windows ? int8::Layout::windows : int8::Layout::chains;
}

std::vector<int32_t> column_sums(const Source& source) {
  std::vector<int32_t> sums;
  const auto* values = static_cast<const int8_t*>(source.values);
  for (size_t row = 0; row + 1 < source.rows.size(); ++row) {
    int32_t sum = 0;
    for (int64_t i = source.rows[row]; i < source.rows[row + 1]; ++i) sum += values[i];
    sums.push_back(sum);
  }
  return sums;
}

}  // namespace

// --- which format
// -----------------------------------------------------------------------------------------------------

namespace {

struct Counts {
  int64_t weights = 0;  // non-zero
  int64_t columns = 0;  // 16 channels x one position with any
  int64_t holes = 0;    // zeros in those
  int64_t quads = 0;    // elements of the quads format
  int64_t groups = 0;   // one channel x four positions with any
  int64_t blocks = 0;   // 16 channels x four positions with any
  int64_t windows = 0;  // items of the windows format
  Counts& operator+=(const Counts& other) {
    weights += other.weights, columns += other.columns, holes += other.holes, quads += other.quads;
    groups += other.groups, blocks += other.blocks, windows += other.windows;
    return *this;
  }
};

// 16 channels from `first` on.
Counts count_panel(const uint8_t* mask, int64_t n, int64_t k, int64_t first) {
  const int64_t stride = (k + 7) / 8, channels = std::min<int64_t>(kPanel, n - first);
  Counts counts;
  for (int64_t begin = 0; begin < stride; begin += 2) {  // windows of 16 positions
    unsigned any = 0;
    int most = 0;
    for (int64_t c = 0; c < channels; ++c) {
      const uint8_t* row = mask + (first + c) * stride;
      const unsigned bits = row[begin] | (begin + 1 < stride ? row[begin + 1] << 8 : 0);
      const int weights = __builtin_popcount(bits);
      any |= bits;
      most = std::max(most, weights);
      counts.weights += weights;
      for (int g = 0; g < 16; g += 4) counts.groups += (bits >> g & 15) != 0;
    }
    counts.columns += __builtin_popcount(any);
    for (int g = 0; g < 16; g += 4) counts.blocks += (any >> g & 15) != 0;
    counts.windows += (most + 3) / 4;
  }
  counts.holes = counts.columns * channels - counts.weights;
  // The last element of a channel in a block of 256 positions is half empty on average.
  counts.quads = counts.weights / 4 + channels * ((k + 255) / 256) / 2;
  return counts;
}

}  // namespace

Format cheapest(const uint8_t* mask, int64_t n, int64_t k, bool is_float32) {
  Counts counts;
  for (int64_t first = 0; first < n; first += kPanel) counts += count_panel(mask, n, k, first);
  struct Cost {
    Format format;
    double cycles;  // a row of x, on Zen 3; benchmarks/NOTES.md has the measurements
  };
  const auto d = [](int64_t value) { return static_cast<double>(value); };
  // A panel multiplies its holes, and zero times NaN is NaN, so it is taken only where there are none.
  const Cost float_costs[] = {{Format::panels, counts.holes > 0 ? 1e300 : 1.1 * d(counts.columns)},
                              {Format::rows, 0.075 * d(counts.weights)}};
  const Cost int8_costs[] = {{Format::chains, 1.6 * d(counts.blocks)},
                             {Format::windows, 2.2 * d(counts.windows)},
                             {Format::quads4, 0.14 * d(counts.groups)},
                             {Format::quads, 0.2 * d(counts.quads)}};
  Cost best{is_float32 ? Format::rows : Format::quads, 1e300};
  const auto consider = [&](const Cost& cost) {
    const bool runs = !is_delegated(cost.format) || int8::kernel_for(layout_of(cost.format)) != nullptr;
    if (runs && cost.cycles < best.cycles) best = cost;
  };
  if (is_float32)
    for (const Cost& cost : float_costs) consider(cost);
  else
    for (const Cost& cost : int8_costs) consider(cost);
  return best.format;
}

const char* format_name(Format format) {
  static constexpr const char* kNames[kFormats] = {"rows", "panels", "quads", "quads4", "windows", "chains"};
  return kNames[static_cast<int>(format)];
}

Format format_for(const char* name, const uint8_t* mask, int64_t n, int64_t k, bool is_float32) {
  if (*name == 0) return cheapest(mask, n, k, is_float32);
  for (int i = 0; i < kFormats; ++i) {
    const Format format = static_cast<Format>(i);
    if (std::strcmp(name, format_name(format)) != 0) continue;
    check(is_float(format) == is_float32, "sparse_pack: format ", name, " holds ",
          is_float(format) ? "float32" : "int8", " weights, these are ", is_float32 ? "float32" : "int8");
    return format;
  }
  check(false, "sparse_pack: no format is named '", name, "', expected rows, panels, quads, quads4, windows or chains");
  std::abort();
}

std::vector<uint8_t> pack(Format format, const uint8_t* mask, const void* values, int64_t n, int64_t k,
                          int64_t nonzeros, int activation_bits, int threads) {
  check(n >= 1 && n <= 1 << 24, "sparse_pack: out_features is ", n, ", expected 1 to ", 1 << 24);
  check(k >= 1 && k <= kMaxK, "sparse_pack: in_features is ", k, ", expected 1 to ", kMaxK);
  check(is_float(format) ? activation_bits == 0 : activation_bits == 7 || activation_bits == 8,
        "sparse_pack: activation_bits is ", activation_bits, ", expected 7 or 8 for int8 weights, 0 for float32");
  const std::vector<int64_t> rows = row_offsets(mask, n, k);
  for (int64_t row = 0; row < n && k % 8 != 0; ++row)
    check(mask[(row + 1) * ((k + 7) / 8) - 1] >> (k % 8) == 0, "sparse_pack: row ", row,
          " of the mask has bits set behind k = ", k);
  check(rows.back() == nonzeros, "sparse_pack: the mask has ", rows.back(), " ones, but there are ", nonzeros,
        " values");
  const auto* bytes = static_cast<const int8_t*>(values);
  check(is_float(format) || std::find(bytes, bytes + nonzeros, int8_t{-128}) == bytes + nonzeros,
        "sparse_pack: a weight is -128, expected -127 to 127 (the scale is symmetric)");

  Header header{};
  header.format = format;
  header.n = static_cast<int32_t>(n);
  header.k = static_cast<int32_t>(k);
  header.activation_bits = activation_bits;
  header.nonzeros = nonzeros;
  choose_tile(format, static_cast<double>(nonzeros) / static_cast<double>(n * k), header);
  if (header.kb == 0) header.kb = 1;
  header.has_bits =
      format == Format::rows && static_cast<double>(nonzeros) >= kBitsDensity * static_cast<double>(n * k);
  // Enough blocks of channels for threads to share, but no more: in a large block more channels are of one length.
  const int64_t blocks = kMinBlocks * ((n + kMinBlocks * kMaxBlockChannels - 1) / (kMinBlocks * kMaxBlockChannels));
  header.nb = static_cast<int32_t>(round_up<int64_t>((n + blocks - 1) / blocks, kPanel));

  const Source source{mask, values, rows, n, k};
  if (is_delegated(format)) {
    const int8::Kernel* kernel = int8::kernel_for(layout_of(format));
    check(kernel != nullptr, "sparse_pack: format ", format_name(format), " has no kernel that this processor runs");
    const std::vector<uint8_t> inner = int8::pack(*kernel, dense_int8(source).data(), n, k, activation_bits, threads);
    header.blocks = round_up<uint64_t>(sizeof(Header), 64);
    header.bytes = header.blocks + inner.size();
    kFormat.seal(header);
    std::vector<uint8_t> out(header.bytes, 0);
    std::memcpy(out.data(), &header, sizeof(header));
    std::memcpy(out.data() + header.blocks, inner.data(), inner.size());
    return out;
  }
  const int64_t total = header.n_blocks() * header.k_blocks();
  std::vector<std::vector<uint8_t>> packed(static_cast<size_t>(total));
  parallel(usable_threads(threads), [&](int thread, int team) {
    for (int64_t i = thread; i < total; i += team)
      packed[static_cast<size_t>(i)] = pack_block(source, header, i / header.k_blocks(), i % header.k_blocks());
  });

  const std::vector<int32_t> sums = is_float(format) ? std::vector<int32_t>{} : column_sums(source);
  header.column_sums = round_up<uint64_t>(sizeof(Header), 64);
  // The epilogue reads whole panels of sums.
  header.blocks = round_up<uint64_t>(header.column_sums + (sums.size() + kPanel) * 4, 64);
  uint64_t at = round_up<uint64_t>(header.blocks + packed.size() * 8, 64);
  std::vector<uint64_t> offsets;
  for (const auto& block : packed) {
    offsets.push_back(at);
    at = round_up<uint64_t>(at + block.size(), 64);
  }
  header.bytes = at + 64;  // vector loads may read past the last values
  kFormat.seal(header);

  std::vector<uint8_t> out(header.bytes, 0);
  std::memcpy(out.data(), &header, sizeof(header));
  if (!sums.empty()) std::memcpy(out.data() + header.column_sums, sums.data(), sums.size() * 4);
  std::memcpy(out.data() + header.blocks, offsets.data(), offsets.size() * 8);
  for (size_t i = 0; i < packed.size(); ++i) std::memcpy(out.data() + offsets[i], packed[i].data(), packed[i].size());
  return out;
}

bool is_packed(const uint8_t* packed, int64_t bytes) { return kFormat.begins(packed, bytes); }

const Header& header_of(const uint8_t* packed, int64_t bytes) { return kFormat.header_of<Header>(packed, bytes); }

Block block_of(const uint8_t* packed, const Header& header, int64_t n_block, int64_t k_block) {
  const auto* offsets = reinterpret_cast<const uint64_t*>(packed + header.blocks);
  const uint8_t* begin = packed + offsets[n_block * header.k_blocks() + k_block];
  uint32_t elements;
  uint16_t counts[2];
  std::memcpy(&elements, begin, 4);
  std::memcpy(counts, begin + 4, 4);
  Block block;
  block.run_count = counts[0];
  block.runs = reinterpret_cast<const uint16_t*>(begin + 8);
  block.order = block.runs + 2 * counts[0];
  block.values = begin + round_up<size_t>(8 + 4 * size_t{counts[0]} + 2 * (size_t{counts[1]} + 2), 8);
  block.index = static_cast<const uint8_t*>(block.values) +
                elements * static_cast<size_t>(values_per_element(header.format)) * value_bytes(header.format);
  block.bits =
      header.has_bits == 0 ? nullptr : block.index + elements * static_cast<size_t>(indices_per_element(header.format));
  block.bits_per_channel = header.kb / 8;
  return block;
}

namespace {

// Adds the block's weights into dense [nb][kb].
template <class T>
void scatter(const Header& header, const Block& block, T* dense) {
  const int values = values_per_element(header.format), indices = indices_per_element(header.format);
  const int step = channels_per_entry(header.format), positions = positions_per_index(header.format);
  const T* value = static_cast<const T*>(block.values);
  const uint8_t* index = block.index;
  const uint16_t* entry = block.order;
  for (int r = 0; r < block.run_count; ++r)
    for (int e = 0; e < block.runs[2 * r + 1]; ++e, ++entry)
      for (int i = 0; i < block.runs[2 * r]; ++i, value += values, index += indices)
        for (int j = 0; j < values; ++j) {
          const int channel = *entry * step + (step > 1 ? j : 0);
          const int position = index[indices > 1 ? j : 0] * positions + (positions > 1 ? j : 0);
          if (value[j] == 0) continue;
          T& at = dense[channel * header.kb + position];
          at = static_cast<T>(at + value[j]);
        }
}

template <class T>
void unpack_as(const uint8_t* packed, const Header& header, uint8_t* mask, T* values) {
  const int64_t nb = header.nb, kb = header.kb, n = header.n, k = header.k, stride = (k + 7) / 8;
  std::vector<T> dense(static_cast<size_t>(nb * kb * header.k_blocks()));
  for (int64_t b = 0; b < header.n_blocks(); ++b) {
    std::fill(dense.begin(), dense.end(), T{0});
    for (int64_t i = 0; i < header.k_blocks(); ++i)
      scatter(header, block_of(packed, header, b, i), dense.data() + i * nb * kb);
    for (int64_t c = 0; c < std::min(nb, n - b * nb); ++c)
      for (int64_t p = 0; p < k; ++p) {
        const T value = dense[static_cast<size_t>((p / kb * nb + c) * kb + p % kb)];
        if (value == 0) continue;
        uint8_t& byte = mask[(b * nb + c) * stride + p / 8];
        byte = static_cast<uint8_t>(byte | 1u << (p % 8));
        *values++ = value;
      }
  }
}

void compress(const Header& header, const int8_t* dense, uint8_t* mask, int8_t* values) {
  const int64_t n = header.n, k = header.k, stride = (k + 7) / 8;
  for (int64_t row = 0; row < n; ++row)
    for (int64_t i = 0; i < k; ++i) {
      const int8_t value = dense[row * k + i];
      if (value == 0) continue;
      mask[row * stride + i / 8] = static_cast<uint8_t>(mask[row * stride + i / 8] | 1u << (i % 8));
      *values++ = value;
    }
}

}  // namespace

void unpack(const uint8_t* packed, int64_t bytes, uint8_t* mask, void* values) {
  const Header& header = header_of(packed, bytes);
  std::memset(mask, 0, static_cast<size_t>(header.n) * static_cast<size_t>((header.k + 7) / 8));
  if (is_delegated(header.format)) {
    std::vector<int8_t> dense(static_cast<size_t>(int64_t{header.n} * header.k));
    int8::unpack(packed + header.blocks, bytes - static_cast<int64_t>(header.blocks), dense.data());
    compress(header, dense.data(), mask, static_cast<int8_t*>(values));
  } else if (is_float(header.format))
    unpack_as(packed, header, mask, static_cast<float*>(values));
  else
    unpack_as(packed, header, mask, static_cast<int8_t*>(values));
}

}  // namespace pycompress::sparse
