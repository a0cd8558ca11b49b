// The packed weight of cuda.h, made and taken apart on the device.
#include "../common/check.h"
#include "../cuda/device.cuh"
#include "../cuda/launch.h"
#include "cuda.h"

namespace pycompress::int8::cuda {
namespace {

constexpr int kThreads = 128;

// One block per padded channel.
__global__ void __launch_bounds__(kThreads)
    int8_pack(const int8_t* values, PackedShape shape, uint8_t* packed, int32_t* refused) {
  const int64_t k_pad = shape.k_pad(), channel = blockIdx.x;
  auto* weights = reinterpret_cast<int8_t*>(packed + shape.weights()) + channel * k_pad;
  int sum = 0;
  bool bad = false;
  for (int64_t i = threadIdx.x; i < k_pad; i += kThreads) {
    const int8_t value = channel < shape.n && i < shape.k ? values[channel * shape.k + i] : int8_t{0};
    bad = bad || value == -128;
    sum += value;
    weights[i] = value;
  }
  for (int mask = 16; mask > 0; mask /= 2) sum += gpu::shuffle_xor(sum, mask);
  auto* sums = reinterpret_cast<int*>(gpu::dynamic_shared());
  if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = sum;
  if (bad) *refused = 1;
  __syncthreads();
  if (threadIdx.x != 0) return;
  for (int i = 1; i < kThreads / 32; ++i) sum += sums[i];
  reinterpret_cast<int32_t*>(packed + shape.column_sum())[channel] = sum;
}

__global__ void __launch_bounds__(kThreads) int8_unpack(const uint8_t* packed, PackedShape shape, int8_t* values) {
  const int64_t channel = blockIdx.x;
  const uint8_t* weights = packed + shape.weights() + channel * shape.k_pad();
  for (int64_t i = threadIdx.x; i < shape.k; i += kThreads)
    values[channel * shape.k + i] = static_cast<int8_t>(weights[i]);
}

__global__ void __launch_bounds__(kThreads) int8_unsigned_rows(const int8_t* s, int64_t k_pad, int64_t k, uint8_t* q) {
  const int64_t row = blockIdx.x;
  for (int64_t i = threadIdx.x; i < k; i += kThreads)
    q[row * k + i] = static_cast<uint8_t>(static_cast<uint8_t>(s[row * k_pad + i]) ^ 0x80);
}

gpu::Launch blocks(int64_t count, size_t shared, Stream stream) {
  return {dim3(static_cast<unsigned>(count)), dim3(kThreads), shared, stream};
}

}  // namespace

void pack(const int8_t* values, int64_t n, int64_t k, uint8_t* packed, int32_t* refused, Stream stream) {
  check(n >= 1 && n <= 1 << 24, "int8_pack: out_features is ", n, ", expected 1 to ", 1 << 24);
  check(k >= 1 && k <= kMaxK, "int8_pack: in_features is ", k, ", expected 1 to ", kMaxK);
  const PackedShape shape{n, k};
  gpu::launch<int8_pack>("int8_pack", blocks(shape.n_pad(), kThreads / 32 * 4, stream), values, shape, packed, refused);
}

void unpack(const uint8_t* packed, int64_t n, int64_t k, int8_t* values, Stream stream) {
  gpu::launch<int8_unpack>("int8_unpack", blocks(n, 0, stream), packed, PackedShape{n, k}, values);
}

void unsigned_rows(const Rows& rows, int64_t m, int64_t k, uint8_t* q, Stream stream) {
  if (m == 0) return;
  const int64_t k_pad = PackedShape{1, k}.k_pad();
  const auto* s = static_cast<const int8_t*>(rows.s);
  gpu::launch<int8_unsigned_rows>("int8_unsigned_rows", blocks(m, 0, stream), s, k_pad, k, q);
}

}  // namespace pycompress::int8::cuda
