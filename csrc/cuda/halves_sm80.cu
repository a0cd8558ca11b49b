// GEMM of halves by mma.sync, for compute capability 8.0 and all later ones: the engine of gemm_sm80.cuh.
#include <array>

#include "../common/check.h"
#include "../common/round.h"
#include "gemm_sm80.cuh"
#include "halves_kernel_list.h"
#include "launch.h"

namespace pycompress::halves {
namespace {

using gpu::sm80::Matrix;
using gpu::sm80::Tile;

struct Operands {
  Matrix rows, channels;
  int64_t tiles_m, tiles_n;
};

template <class T, Type kType>
__global__ void __launch_bounds__(T::kThreads, 1) halves_gemm_sm80(Operands in, gpu::FloatOutput out) {
  gpu::sm80::compute<T, gpu::sm80::Halves<kType>, false>(in.rows, in.channels,
                                                         gpu::tile_at(blockIdx.x, in.tiles_m, in.tiles_n), out);
}

template <class T, Type kType>
void run(const Problem& p) {
  const int64_t tiles_m = divide_up(p.m, T::kBm), tiles_n = divide_up(p.n, T::kBn);
  check(tiles_m * tiles_n <= 0x7fffffff, "halves: x has ", p.m, " rows, more than one launch can take");
  const Operands in{{p.x, p.m, p.ldx * 2, p.k * 2}, {p.w, p.n, p.k_pad * 2, p.k_pad * 2}, tiles_m, tiles_n};
  const gpu::Launch at{dim3(static_cast<unsigned>(tiles_m * tiles_n)), dim3(T::kThreads), T::kShared, p.stream};
  gpu::launch<halves_gemm_sm80<T, kType>>("halves_gemm_sm80", at, in,
                                          gpu::float_output(p.bias, p.y, p.m, p.n, p.ldy, p.activation, kType));
}

template <Type kType, class T>
constexpr Kernel kernel_of(const char* name) {
  return {name, kType, 80, T::kBm, T::kBn, T::kBk, T::kStages, run<T, kType>};
}

// At most 99 KiB a block, which is what a multiprocessor of 8.6 and 8.9 has.
#define KERNELS(type, prefix)                                                  \
  kernel_of<type, Tile<128, 256, 64, 4, 2, 4>>("sm80_" prefix "_128x256"),     \
      kernel_of<type, Tile<128, 128, 64, 4, 2, 2>>("sm80_" prefix "_128x128"), \
      kernel_of<type, Tile<64, 128, 64, 4, 2, 2>>("sm80_" prefix "_64x128"),   \
      kernel_of<type, Tile<64, 64, 128, 4, 2, 2>>("sm80_" prefix "_64x64"),    \
      kernel_of<type, Tile<32, 64, 128, 4, 2, 2>>("sm80_" prefix "_32x64")
constexpr std::array kKernels = {KERNELS(Type::bfloat16, "bf16"), KERNELS(Type::float16, "f16")};
#undef KERNELS

}  // namespace

const Kernel* kernels_sm80(int* count) {
  *count = static_cast<int>(kKernels.size());
  return kKernels.data();
}

}  // namespace pycompress::halves
