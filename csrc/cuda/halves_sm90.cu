// GEMM of halves of compute capability 9.0: the engine of gemm_sm90.cuh.
#include <array>

#include "gemm_sm90.cuh"
#include "halves_kernel_list.h"
#include "launch.h"

namespace pycompress::halves {
namespace {

using gpu::sm90::Tile;
using gpu::sm90::Work;

template <class T, Type kType>
__global__ void __launch_bounds__(gpu::kRingThreads, 1)
    halves_gemm_sm90(const __grid_constant__ gpu::TensorMap rows, const __grid_constant__ gpu::TensorMap channels,
                     const __grid_constant__ Work work, const __grid_constant__ gpu::FloatOutput out) {
  gpu::sm90::compute<T, gpu::sm90::Halves<kType>>(rows, channels, work, out);
}

template <class T, Type kType>
void run(const Problem& p) {
  const Work work = gpu::sm90::work_of<T>("halves", p.m, p.n, p.k * 2);
  const gpu::TensorMap rows = gpu::sm90::rows_map<T>(p.x, p.m, p.k * 2, p.ldx * 2);
  const gpu::TensorMap channels = gpu::sm90::channels_map<T>(p.w, p.n, p.k_pad * 2, p.k_pad * 2);
  const gpu::Launch at = gpu::sm90::launch_of<T>(work, p.stream);
  gpu::launch_clusters<halves_gemm_sm90<T, kType>>(
      "halves_gemm_sm90", T::kCluster, at, rows, channels, work,
      gpu::float_output(p.bias, p.y, p.m, p.n, p.ldy, p.activation, kType));
}

template <Type kType, class T>
constexpr Kernel kernel_of(const char* name) {
  return {name, kType, 90, T::kBm, T::kBn, gpu::sm90::kBk, T::kStages, run<T, kType>, T::kCluster};
}

#define KERNELS(type, prefix)                                                \
  kernel_of<type, Tile<128, 256, 4, 2>>("sm90_" prefix "_128x256_cluster2"), \
      kernel_of<type, Tile<128, 256, 4, 1>>("sm90_" prefix "_128x256"),      \
      kernel_of<type, Tile<128, 128, 6, 1>>("sm90_" prefix "_128x128"),      \
      kernel_of<type, Tile<128, 64, 8, 1>>("sm90_" prefix "_128x64"),        \
      kernel_of<type, Tile<64, 64, 8, 1>>("sm90_" prefix "_64x64")
constexpr std::array kKernels = {KERNELS(Type::bfloat16, "bf16"), KERNELS(Type::float16, "f16")};
#undef KERNELS

}  // namespace

const Kernel* kernels_sm90(int* count) {
  *count = static_cast<int>(kKernels.size());
  return kKernels.data();
}

}  // namespace pycompress::halves
