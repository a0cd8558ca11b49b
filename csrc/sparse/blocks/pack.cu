// The packed weight of cuda.h: made on the host, taken apart on the device.
#include <algorithm>
#include <cstring>
#include <numeric>
#include <utility>

#include "../../common/buffer.h"
#include "../../common/check.h"
#include "../../cuda/convert.cuh"
#include "../../cuda/launch.h"
#include "cuda.h"

namespace pycompress::sparse::cuda::blocks {
namespace {

// The channels of a part, dense, and which of its blocks are present.
class Part {
 public:
  explicit Part(const Shape& shape)
      : shape_(shape),
        pitch_(shape.steps() * shape.step_bytes()),
        across_(divide_up(pitch_, shape.size * bytes_of(shape.element))),
        bytes_(static_cast<size_t>(shape.part_channels() * pitch_)),
        present_(static_cast<size_t>(shape.part_channels() / shape.size * across_)) {}

  // Channels from `first` on, whose mask and values begin here; gives how many values they have.
  int64_t read(const uint8_t* mask, const uint8_t* values, int64_t first) {
    std::fill(bytes_.begin(), bytes_.end(), uint8_t{0});
    std::fill(present_.begin(), present_.end(), uint8_t{0});
    const int size = bytes_of(shape_.element);
    int64_t count = 0;
    for (int64_t channel = 0; channel < std::min<int64_t>(shape_.part_channels(), shape_.n - first); ++channel)
      for (int64_t i = 0; i < shape_.k; ++i) {
        if ((mask[channel * divide_up(shape_.k, 8) + i / 8] >> i % 8 & 1) == 0) continue;
        std::memcpy(bytes_.data() + channel * pitch_ + i * size, values + count * size, static_cast<size_t>(size));
        present_[static_cast<size_t>(channel / shape_.size * across_ + i / shape_.size)] = 1;
        ++count;
      }
    return count;
  }

  // Whether anything is present in some channels and bytes of k.
  bool any(int channel, int64_t byte, int channels, int bytes) const {
    const int64_t width = shape_.size * bytes_of(shape_.element);
    for (int64_t row = channel / shape_.size; row <= (channel + channels - 1) / shape_.size; ++row)
      for (int64_t column = byte / width; column <= (byte + bytes - 1) / width; ++column)
        if (present_[static_cast<size_t>(row * across_ + column)] != 0) return true;
    return false;
  }
  const uint8_t* at(int channel, int64_t byte) const { return bytes_.data() + channel * pitch_ + byte; }

 private:
  const Shape shape_;
  const int64_t pitch_, across_;  // bytes of a channel; blocks of k
  std::vector<uint8_t> bytes_, present_;
};

// What stands behind the offset of the values.
struct Contents {
  std::vector<uint8_t> values;
  std::vector<uint32_t> start, work;  // by part: where its list begins, what it stores
  std::vector<uint32_t> columns;      // size 64
  std::vector<Entry> entries;         // sizes 32 and 16
  uint32_t stored = 0;
};

void add_blocks(Contents& to, const Part& part, const Shape& shape) {
  to.start.push_back(static_cast<uint32_t>(to.columns.size()));
  for (int64_t column = 0; column < shape.steps(); ++column) {
    const int64_t byte = column * shape.step_bytes();
    if (!part.any(0, byte, kBlock, shape.step_bytes())) continue;
    for (int channel = 0; channel < kBlock; ++channel)
      append(to.values, part.at(channel, byte), static_cast<size_t>(shape.step_bytes()));
    to.columns.push_back(static_cast<uint32_t>(column));
    ++to.stored;
  }
}

void add_fragments(Contents& to, const Part& part, const Shape& shape) {
  to.start.push_back(static_cast<uint32_t>(to.entries.size()));
  for (int64_t column = 0; column < shape.steps(); ++column) {
    Entry entry{static_cast<uint32_t>(column), to.stored, {}};
    for (int half = 0; half < kEntryMasks; ++half)
      for (int bit = 0; bit < 32; ++bit) {
        const int channel = half * kMaskChannels + bit % 8 * kFragmentChannels;
        const int64_t byte = column * kStepBytes + bit / 8 * 32;
        if (!part.any(channel, byte, kFragmentChannels, 32)) continue;
        entry.mask[half] |= 1u << bit;
        for (int i = 0; i < kFragmentBytes; ++i) {
          const Position in = fragment_position(i);
          to.values.push_back(*part.at(channel + in.channel, byte + in.byte));
        }
        ++to.stored;
      }
    if (to.stored != entry.first) to.entries.push_back(entry);
  }
}

// Parts by descending work.
std::vector<uint32_t> order_of(const std::vector<uint32_t>& work) {
  std::vector<uint32_t> order(work.size());
  std::iota(order.begin(), order.end(), 0u);
  std::stable_sort(order.begin(), order.end(), [&](uint32_t a, uint32_t b) { return work[a] > work[b]; });
  return order;
}

Contents contents_of(const uint8_t* mask, const uint8_t* values, int64_t count, const Shape& shape,
                     std::vector<int32_t>& column_sum) {
  Contents to;
  Part part(shape);
  int64_t taken = 0;
  const int64_t mask_row = divide_up(shape.k, 8);
  int64_t there = 0;
  for (int64_t i = 0; i < shape.n * mask_row; ++i) there += __builtin_popcount(mask[i]);
  check(there == count, "sparse_pack: there are ", count, " values, the mask has ", there, " bits set");
  for (int64_t p = 0; p < shape.parts(); ++p) {
    const int64_t first = p * shape.part_channels();
    const uint32_t before = to.stored;
    taken += part.read(mask + first * mask_row, values + taken * bytes_of(shape.element), first);
    shape.size == kBlock ? add_blocks(to, part, shape) : add_fragments(to, part, shape);
    to.work.push_back(to.stored - before);
    for (int64_t channel = first; channel < std::min(shape.n, first + shape.part_channels()); ++channel) {
      if (shape.element != Element::int8) continue;
      const auto* row = reinterpret_cast<const int8_t*>(part.at(static_cast<int>(channel - first), 0));
      column_sum[static_cast<size_t>(channel)] = std::accumulate(row, row + shape.k, 0);
    }
  }
  to.start.push_back(static_cast<uint32_t>(shape.size == kBlock ? to.columns.size() : to.entries.size()));
  return to;
}

}  // namespace

void check_packed(const Shape& shape, int64_t bytes) {
  check(shape.n >= 1 && shape.n <= 1 << 24 && shape.k >= 1 && shape.k <= kMaxK, "sparse: the packed weight is ",
        shape.n, "x", shape.k, ", expected n from 1 to ", 1 << 24, " and k from 1 to ", kMaxK);
  check(shape.size == 64 || shape.size == 32 || shape.size == 16, "sparse: blocks of size ", shape.size,
        ", expected 64, 32 or 16");
  const int64_t least = shape.behind() + (shape.size == kBlock ? 4 * shape.stored : 0);
  check(shape.stored >= 0 && bytes >= least, "sparse: no packed weight ", shape.n, "x", shape.k, " of ", shape.stored,
        shape.size == kBlock ? " blocks has " : " fragments has ", bytes, " bytes");
}

Packed pack(const uint8_t* mask, const void* values, int64_t count, Element element, int size, int64_t n, int64_t k) {
  Shape shape{element, size, n, k};
  check_packed(shape, INT64_MAX);
  const auto* first = static_cast<const int8_t*>(values);
  check(element != Element::int8 || std::find(first, first + count, -128) == first + count,
        "sparse_pack: a weight is -128, expected -127 to 127");
  std::vector<int32_t> column_sum(static_cast<size_t>(shape.n_pad()));
  const Contents contents = contents_of(mask, static_cast<const uint8_t*>(values), count, shape, column_sum);
  shape.stored = contents.stored;

  std::vector<uint8_t> packed;
  if (element == Element::int8) append(packed, column_sum.data(), column_sum.size());
  append(packed, contents.start.data(), contents.start.size());
  const std::vector<uint32_t> order = order_of(contents.work);
  append(packed, order.data(), order.size());
  packed.resize(static_cast<size_t>(shape.values()));
  append(packed, contents.values.data(), contents.values.size());
  append(packed, contents.columns.data(), contents.columns.size());
  append(packed, contents.entries.data(), contents.entries.size());
  packed.resize(round_up<size_t>(packed.size(), 16));
  return {shape, std::move(packed)};
}

// --- dense again, on the device
// ---------------------------------------------------------------------------------------

namespace {

constexpr int kThreads = 256;

template <Element kElement>
__device__ inline void put(void* dense, int64_t at, const uint8_t* value) {
  if constexpr (kElement == Element::int8)
    static_cast<int8_t*>(dense)[at] = static_cast<int8_t>(*value);
  else
    static_cast<float*>(dense)[at] = gpu::widened<type_of(kElement)>(*reinterpret_cast<const uint16_t*>(value));
}

// The channels of a part: zeros, then what is present.
template <Element kElement>
__global__ void __launch_bounds__(kThreads, 1) sparse_blocks_dense(const uint8_t* packed, Shape shape, void* dense) {
  constexpr int kSize = bytes_of(kElement);
  alignas(2) constexpr uint8_t kZero[2] = {0, 0};
  const int64_t channel = static_cast<int64_t>(blockIdx.x) * shape.part_channels();
  const int64_t end = min(shape.n, channel + shape.part_channels()) * shape.k;
  for (int64_t i = channel * shape.k + threadIdx.x; i < end; i += kThreads) put<kElement>(dense, i, kZero);
  __syncthreads();

  const auto* start = reinterpret_cast<const uint32_t*>(packed + shape.start()) + blockIdx.x;
  const uint8_t* values = packed + shape.values();
  const uint8_t* behind = packed + shape.behind();
  const auto place = [&](int64_t row, int64_t byte, const uint8_t* value) {
    if (row < shape.n && byte < shape.k * kSize) put<kElement>(dense, row * shape.k + byte / kSize, value);
  };
  for (uint32_t i = start[0]; i < start[1]; ++i) {
    if (shape.size == kBlock) {
      constexpr int kRow = kBlock * kSize;
      const uint8_t* block = values + static_cast<int64_t>(i) * kBlock * kRow;
      const int64_t byte = static_cast<int64_t>(reinterpret_cast<const uint32_t*>(behind)[i]) * kRow;
      for (int at = static_cast<int>(threadIdx.x) * kSize; at < kBlock * kRow; at += kThreads * kSize)
        place(channel + at / kRow, byte + at % kRow, block + at);
      continue;
    }
    const Entry& entry = reinterpret_cast<const Entry*>(behind)[i];
    const uint8_t* fragment = values + static_cast<int64_t>(entry.first) * kFragmentBytes;
    for (int bit = 0; bit < kEntryMasks * 32; ++bit) {
      if ((entry.mask[bit / 32] >> bit % 32 & 1) == 0) continue;
      for (int at = static_cast<int>(threadIdx.x) * kSize; at < kFragmentBytes; at += kThreads * kSize) {
        const Position in = fragment_position(at);
        place(channel + bit / 32 * kMaskChannels + bit % 8 * kFragmentChannels + in.channel,
              static_cast<int64_t>(entry.column) * kStepBytes + bit % 32 / 8 * 32 + in.byte, fragment + at);
      }
      fragment += kFragmentBytes;
    }
  }
}

}  // namespace

void unpack(const uint8_t* packed, const Shape& shape, void* dense, Stream stream) {
  const gpu::Launch at{dim3(static_cast<unsigned>(shape.parts())), dim3(kThreads), 0, stream};
  const char* name = "sparse_blocks_dense";
  if (shape.element == Element::int8)
    gpu::launch<sparse_blocks_dense<Element::int8>>(name, at, packed, shape, dense);
  else if (shape.element == Element::float16)
    gpu::launch<sparse_blocks_dense<Element::float16>>(name, at, packed, shape, dense);
  else
    gpu::launch<sparse_blocks_dense<Element::bfloat16>>(name, at, packed, shape, dense);
}

}  // namespace pycompress::sparse::cuda::blocks
