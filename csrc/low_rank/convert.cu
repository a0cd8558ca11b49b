// The bfloat16 factors as float16, for the kernels of many rows, which would convert each value once a tile of rows.
//
// Floor: four bytes a value at the bandwidth of the L2, and a launch.
#include "../cuda/convert.cuh"

#include "../common/check.h"
#include "../cuda/launch.h"
#include "cuda_kernel_list.h"

namespace pycompress::low_rank::cuda {
namespace {

constexpr int kThreads = 256;

__global__ void factors_to_float16(const uint4* from, uint4* to, int64_t count) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= count) return;
  const uint4 word = from[i];
  to[i] = make_uint4(gpu::converted<Type::float16>(word.x), gpu::converted<Type::float16>(word.y),
                     gpu::converted<Type::float16>(word.z), gpu::converted<Type::float16>(word.w));
}

}  // namespace

const uint16_t* halves_of(const Problem& p, void* room) {
  if (p.type == Type::bfloat16) return p.packed;
  const int64_t count = p.shape.size() / 8;
  const gpu::Launch at{dim3(static_cast<unsigned>(divide_up(count, kThreads))), dim3(kThreads), 0, p.stream};
  gpu::launch<factors_to_float16>("low_rank", at, reinterpret_cast<const uint4*>(p.packed), static_cast<uint4*>(room),
                                  count);
  return static_cast<const uint16_t*>(room);
}

void check_aligned(const Problem& p) {
  check(reinterpret_cast<uintptr_t>(p.x) % 16 == 0 && p.ldx % 8 == 0, "low_rank_linear: x is at ", p.x, " with rows ",
        p.ldx, " elements apart, expected multiples of 16 bytes and of 8 elements for ", p.m, " rows");
}

}  // namespace pycompress::low_rank::cuda
