// Canonical weights to the layout of shuffle.h and back, on the device. Once per weight: plain, not fast.
#include "../cuda/device.cuh"
#include "../cuda/launch.h"
#include "cuda.h"

namespace pycompress::weight_only::cuda {
namespace {

constexpr int kThreads = 256;

__device__ inline int64_t this_thread() { return static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; }

// The nibble at `i` of a row of them.
__device__ inline uint32_t nibble(const uint8_t* row, int64_t i) { return row[i / 2] >> (i % 2 * 4) & 15; }

// Position `p` of the block of weights that stands at place `block` of all.
struct Place {
  int64_t n, k;
};
__device__ inline Place place(const Packed& shape, int64_t block, Position p) {
  const int64_t across = shape.k_pad() / kBlockK;
  return {block / across * kBlockN + p.n, block % across * kBlockK + p.k};
}

// A thread makes a word of weights.
__global__ void pack_bytes(const int8_t* values, Packed shape, uint32_t* packed, int32_t* refused) {
  const int64_t i = this_thread() * 4;
  if (i >= shape.scales(0, 0)) return;
  uint32_t word = 0;
  for (int j = 0; j < 4; ++j) {
    const Place at =
        place(shape, i / shape.block_bytes(), byte_position(static_cast<int>(i % shape.block_bytes()) + j));
    const int value = at.n < shape.n && at.k < shape.k ? values[at.n * shape.k + at.k] : 0;
    if (value == -128) atomicAdd(refused, 1);
    word |= static_cast<uint32_t>(value + 128) << 8 * j;
  }
  packed[i / 4] = word;
}

__global__ void pack_nibbles(const uint8_t* values, Packed shape, uint32_t* packed) {
  const int64_t i = this_thread() * 4;
  if (i >= shape.scales(0, 0)) return;
  uint32_t word = 0;
  for (int j = 0; j < 8; ++j) {
    const int index = static_cast<int>(i % shape.block_bytes()) * 2 + j;
    const Place at = place(shape, i / shape.block_bytes(), nibble_position(index));
    if (at.n < shape.n && at.k < shape.k) word |= nibble(values + at.n * ((shape.k + 1) / 2), at.k) << 4 * j;
  }
  packed[i / 4] = word;
}

// A thread takes a channel and a group: its scale, and of each second eight channels both zero points of a byte.
__global__ void pack_groups(const uint16_t* scale, const uint8_t* zero_point, Packed shape, uint8_t* packed) {
  const int64_t n = this_thread() / shape.groups(), group = this_thread() % shape.groups();
  if (n >= shape.n_pad()) return;
  const int channel = static_cast<int>(n % kBlockN);
  uint8_t* to = packed + shape.scales(n / kBlockN, group);
  reinterpret_cast<uint16_t*>(to)[scale_index(channel)] = n < shape.n ? scale[n * shape.groups() + group] : 0;
  if (shape.symmetric || channel / 8 % 2 != 0) return;
  const int64_t row = (shape.groups() + 1) / 2;
  uint32_t zeros = 0;
  for (int i = 0; i < 2; ++i)
    if (n + i * 8 < shape.n) zeros |= nibble(zero_point + (n + i * 8) * row, group) << 4 * i;
  to[kScaleBytes + zero_index(channel) / 2] = static_cast<uint8_t>(zeros);
}

__device__ inline int64_t block_of(const Packed& shape, int64_t n, int64_t k) {
  return shape.weights(n / kBlockN, k / kBlockK);
}
__device__ inline Position within(int64_t n, int64_t k) {
  return {static_cast<int>(n % kBlockN), static_cast<int>(k % kBlockK)};
}

__global__ void unpack_bytes(const uint8_t* packed, Packed shape, int8_t* values) {
  const int64_t n = this_thread() / shape.k, k = this_thread() % shape.k;
  if (n >= shape.n) return;
  values[n * shape.k + k] = static_cast<int8_t>(packed[block_of(shape, n, k) + byte_index(within(n, k))] - 128);
}

// A thread makes a canonical byte: two positions, two groups.
__global__ void unpack_nibbles(const uint8_t* packed, Packed shape, uint8_t* values) {
  const int64_t row = (shape.k + 1) / 2, n = this_thread() / row, k = this_thread() % row * 2;
  if (n >= shape.n) return;
  uint32_t byte = 0;
  for (int i = 0; i < 2 && k + i < shape.k; ++i)
    byte |= nibble(packed + block_of(shape, n, k + i), nibble_index(within(n, k + i))) << 4 * i;
  values[n * row + k / 2] = static_cast<uint8_t>(byte);
}

__global__ void unpack_groups(const uint8_t* packed, Packed shape, uint16_t* scale, uint8_t* zero_point) {
  const int64_t row = (shape.groups() + 1) / 2, n = this_thread() / row, group = this_thread() % row * 2;
  if (n >= shape.n) return;
  const int channel = static_cast<int>(n % kBlockN);
  uint32_t zeros = 0;
  for (int i = 0; i < 2 && group + i < shape.groups(); ++i) {
    const uint8_t* from = packed + shape.scales(n / kBlockN, group + i);
    scale[n * shape.groups() + group + i] = reinterpret_cast<const uint16_t*>(from)[scale_index(channel)];
    if (!shape.symmetric) zeros |= nibble(from + kScaleBytes, zero_index(channel)) << 4 * i;
  }
  if (!shape.symmetric) zero_point[n * row + group / 2] = static_cast<uint8_t>(zeros);
}

template <auto kKernel, class... Arguments>
void for_each(const char* name, int64_t threads, Stream stream, Arguments... arguments) {
  const dim3 grid(static_cast<unsigned>(divide_up(threads, kThreads)));
  gpu::launch<kKernel>(name, {grid, dim3(kThreads), 0, stream}, arguments...);
}

}  // namespace

void pack(const Canonical& from, const Packed& shape, uint8_t* packed, int32_t* refused, Stream stream) {
  auto* words = reinterpret_cast<uint32_t*>(packed);
  const int64_t count = shape.scales(0, 0) / 4;
  if (shape.bits == Bits::eight) {
    for_each<pack_bytes>("pack_bytes", count, stream, reinterpret_cast<const int8_t*>(from.values), shape, words,
                         refused);
    return;
  }
  for_each<pack_nibbles>("pack_nibbles", count, stream, from.values, shape, words);
  for_each<pack_groups>("pack_groups", shape.n_pad() * shape.groups(), stream, from.scale, from.zero_point, shape,
                        packed);
}

void unpack(const uint8_t* packed, const Packed& shape, const CanonicalOut& to, Stream stream) {
  if (shape.bits == Bits::eight) {
    for_each<unpack_bytes>("unpack_bytes", shape.n * shape.k, stream, packed, shape,
                           reinterpret_cast<int8_t*>(to.values));
    return;
  }
  for_each<unpack_nibbles>("unpack_nibbles", shape.n * ((shape.k + 1) / 2), stream, packed, shape, to.values);
  for_each<unpack_groups>("unpack_groups", shape.n * ((shape.groups() + 1) / 2), stream, packed, shape, to.scale,
                          to.zero_point);
}

}  // namespace pycompress::weight_only::cuda
