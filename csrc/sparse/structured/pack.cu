// The packed weight of cuda.h, made and taken apart on the device. Once per weight: plain, not fast.
#include "../../cuda/convert.cuh"
#include "../../cuda/device.cuh"
#include "../../cuda/launch.h"
#include "cuda.h"

namespace pycompress::sparse::cuda::structured {
namespace {

constexpr int kThreads = 128;
constexpr int kUnit = 4;  // groups of four that a thread takes at once: 16 bits of metadata

template <Element kElement>
struct Value {  // as it is stored
  using Dense = float;
  using Bits = uint16_t;
  __device__ static Bits stored(float value) { return gpu::rounded<type_of(kElement)>(value); }
  __device__ static float dense(Bits bits) { return gpu::widened<type_of(kElement)>(bits); }
  __device__ static bool is_exact(float value) { return gpu::bits_of(dense(stored(value))) == gpu::bits_of(value); }
};
template <>
struct Value<Element::int8> {
  using Dense = int8_t;
  using Bits = int8_t;
  __device__ static Bits stored(int8_t value) { return value; }
  __device__ static int8_t dense(Bits bits) { return bits; }
  __device__ static bool is_exact(int8_t value) { return value != -128; }
};

// values[i], where an index that is not known would put them into memory.
template <class T>
__device__ inline T one_of(const T (&values)[4], uint32_t i) {
  const T low = i & 1 ? values[1] : values[0], high = i & 1 ? values[3] : values[2];
  return i & 2 ? high : low;
}

// The metadata of kUnit groups, which is 16 bits in one place.
__device__ inline int64_t metadata_offset(const Packed& shape, int64_t channel, int64_t unit) {
  const Place at = place_of(shape, channel, unit * kUnit);
  return shape.metadata() + at.word * 4 + at.shift / 8;
}

__device__ inline int64_t units(const Packed& shape) { return shape.k_pad() / (4 * kUnit); }

// One block per padded channel.
template <Element kElement>
__global__ void __launch_bounds__(kThreads)
    structured_pack(const typename Value<kElement>::Dense* weight, Packed shape, uint8_t* packed, int32_t* refused) {
  using V = Value<kElement>;
  const int64_t channel = blockIdx.x;
  auto* values = reinterpret_cast<typename V::Bits*>(packed + shape.values() + channel * shape.value_stride());
  int32_t bad = 0, sum = 0;
  for (int64_t unit = threadIdx.x; unit < units(shape); unit += kThreads) {
    uint32_t metadata = 0;
    for (int group = 0; group < kUnit; ++group) {
      const int64_t k = (unit * kUnit + group) * 4;
      typename V::Dense four[4] = {};
      uint32_t mask = 0;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (channel < shape.n && k + i < shape.k) four[i] = weight[channel * shape.k + k + i];
        if (four[i] != 0) mask |= 1u << i;
        if (!V::is_exact(four[i])) bad |= kNotOfType;
      }
      if (__popc(mask) > 2) bad |= kTooMany;
      const uint32_t pair = pair_of(mask);
      const typename V::Dense first = one_of(four, pair & 3), second = one_of(four, pair >> 2);
      values[k / 2] = V::stored(first), values[k / 2 + 1] = V::stored(second);
      if constexpr (kElement == Element::int8) sum += first + second;
      metadata |= pair << 4 * group;
    }
    *reinterpret_cast<uint16_t*>(packed + metadata_offset(shape, channel, unit)) = static_cast<uint16_t>(metadata);
  }
  if (bad != 0) atomicOr(refused, bad);
  if constexpr (kElement == Element::int8) {
    for (int mask = 16; mask > 0; mask /= 2) sum += gpu::shuffle_xor(sum, mask);
    auto* sums = reinterpret_cast<int*>(gpu::dynamic_shared());
    if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = sum;
    __syncthreads();
    if (threadIdx.x != 0) return;
    for (int i = 1; i < kThreads / 32; ++i) sum += sums[i];
    reinterpret_cast<int32_t*>(packed)[channel] = sum;
  }
}

template <Element kElement>
__global__ void __launch_bounds__(kThreads)
    structured_unpack(const uint8_t* packed, Packed shape, typename Value<kElement>::Dense* weight) {
  using V = Value<kElement>;
  const int64_t channel = blockIdx.x;
  const auto* values =
      reinterpret_cast<const typename V::Bits*>(packed + shape.values() + channel * shape.value_stride());
  for (int64_t unit = threadIdx.x; unit < units(shape); unit += kThreads) {
    const uint32_t metadata = *reinterpret_cast<const uint16_t*>(packed + metadata_offset(shape, channel, unit));
    for (int group = 0; group < kUnit; ++group) {
      const int64_t k = (unit * kUnit + group) * 4;
      const uint32_t pair = metadata >> 4 * group & 15;
      for (uint32_t i = 0; i < 4; ++i) {
        if (k + i >= shape.k) continue;
        const bool is_first = i == (pair & 3), is_second = i == pair >> 2;
        weight[channel * shape.k + k + i] =
            is_first || is_second ? V::dense(values[k / 2 + (is_second ? 1 : 0)]) : typename V::Dense{0};
      }
    }
  }
}

template <Element kElement>
void pack_as(const void* dense, const Packed& shape, uint8_t* packed, int32_t* refused, Stream stream) {
  const gpu::Launch at{dim3(static_cast<unsigned>(shape.n_pad())), dim3(kThreads), kThreads / 32 * 4, stream};
  gpu::launch<structured_pack<kElement>>(
      "structured_pack", at, static_cast<const typename Value<kElement>::Dense*>(dense), shape, packed, refused);
}

template <Element kElement>
void unpack_as(const uint8_t* packed, const Packed& shape, void* dense, Stream stream) {
  const gpu::Launch at{dim3(static_cast<unsigned>(shape.n)), dim3(kThreads), 0, stream};
  gpu::launch<structured_unpack<kElement>>("structured_unpack", at, packed, shape,
                                           static_cast<typename Value<kElement>::Dense*>(dense));
}

}  // namespace

void pack(const void* dense, const Packed& shape, uint8_t* packed, int32_t* refused, Stream stream) {
  check_packed(shape, shape.bytes());
  switch (shape.element) {
    case Element::bfloat16:
      return pack_as<Element::bfloat16>(dense, shape, packed, refused, stream);
    case Element::float16:
      return pack_as<Element::float16>(dense, shape, packed, refused, stream);
    case Element::int8:
      return pack_as<Element::int8>(dense, shape, packed, refused, stream);
  }
}

void unpack(const uint8_t* packed, const Packed& shape, void* dense, Stream stream) {
  switch (shape.element) {
    case Element::bfloat16:
      return unpack_as<Element::bfloat16>(packed, shape, dense, stream);
    case Element::float16:
      return unpack_as<Element::float16>(packed, shape, dense, stream);
    case Element::int8:
      return unpack_as<Element::int8>(packed, shape, dense, stream);
  }
}

}  // namespace pycompress::sparse::cuda::structured
