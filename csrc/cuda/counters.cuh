// The counters of blocks that share k (few_rows.cuh), set to 0 by a launch in front of the one that counts. In a header
// of its own, since a kernel is compiled wherever its header is included.
#pragma once

#include "device.cuh"

namespace pycompress::gpu {
namespace {

constexpr int kClearThreads = 256;
__global__ void clear_counters(uint32_t* counters, int64_t count) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kClearThreads + threadIdx.x;
  if (i < count) counters[i] = 0;
}

}  // namespace
}  // namespace pycompress::gpu
