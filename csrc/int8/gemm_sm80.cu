// int8 GEMM by mma.sync, for compute capability 8.0 and all later ones: the engine of csrc/cuda/gemm_sm80.cuh.
#include <array>

#include "../common/check.h"
#include "../cuda/gemm_sm80.cuh"
#include "../cuda/launch.h"
#include "../cuda/tiles.h"
#include "cuda_kernel_list.h"
#include "epilogue.cuh"

namespace pycompress::int8::cuda {
namespace {

struct Operands {
  const int8_t* rows;      // [m][k_pad]
  const int8_t* channels;  // [n_pad][k_pad]
  int64_t m, n_pad, k_pad;
  int64_t tiles_m, tiles_n;
};

using gpu::sm80::Matrix;
using gpu::sm80::Tile;

template <class T>
__global__ void __launch_bounds__(T::kThreads, 1) int8_gemm_sm80(Operands in, Output out) {
  const Matrix rows{in.rows, in.m, in.k_pad, in.k_pad}, channels{in.channels, in.n_pad, in.k_pad, in.k_pad};
  gpu::sm80::compute<T, gpu::sm80::Int8, true>(rows, channels, gpu::tile_at(blockIdx.x, in.tiles_m, in.tiles_n), out);
}

// The branch's operands, and what its sums become.
struct Side {
  Matrix rows, channels;
  gpu::FloatOutput out;
};

template <class T>
using Integers = gpu::sm80::Sums<T, int32_t>;
template <class T>
using Scaled = gpu::sm80::Sums<T, float>;

// The integers as the floats that the branch is added to. m, n: of the warp's part.
template <class T>
__device__ inline void scale(const Integers<T>& integers, Scaled<T>& sums, const Output& out, int64_t m, int64_t n) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  Row rows[T::kMt][2];
#pragma unroll
  for (int i = 0; i < T::kMt; ++i)
#pragma unroll
    for (int half = 0; half < 2; ++half) rows[i][half] = row_or_none(out, m + i * 16 + half * 8 + lane / 4);
#pragma unroll
  for (int j = 0; j < T::kNt; ++j) {
    const ColumnPair columns(out, n + j * 8 + lane % 4 * 2);
#pragma unroll
    for (int i = 0; i < T::kMt; ++i)
#pragma unroll
      for (int c = 0; c < 4; ++c) sums[i][j][c] = scaled_sum(integers[i][j][c], columns, c % 2, rows[i][c / 2]);
  }
}

// With a branch: its blocks of k follow the integers' through the ring.
template <class T, class Operand>
__global__ void __launch_bounds__(T::kThreads, 1)
    int8_branch_sm80(const __grid_constant__ Operands in, const __grid_constant__ Output out,
                     const __grid_constant__ Side side) {
  const gpu::Position tile = gpu::tile_at(blockIdx.x, in.tiles_m, in.tiles_n);
  const int64_t m = tile.m * T::kBm, n = tile.n * T::kBn;
  const Matrix rows{in.rows, in.m, in.k_pad, in.k_pad}, channels{in.channels, in.n_pad, in.k_pad, in.k_pad};
  const int blocks = gpu::sm80::blocks_of<T>(rows);
  const auto fill = [&](uint8_t* stage, int block) {
    if (block < blocks)
      gpu::sm80::copy_block<T, true>(stage, rows, channels, m, n, block);
    else
      gpu::sm80::copy_block<T, true>(stage, side.rows, side.channels, m, n, block - blocks);
  };
  gpu::sm80::Pipeline<T> pipeline(gpu::dynamic_shared(), fill);
  Integers<T> integers = {};
  pipeline.template products<gpu::sm80::Int8>(integers, blocks, fill);
  Scaled<T> sums;
  scale<T>(integers, sums, out, m + pipeline.warp_m * T::kWm, n + pipeline.warp_n * T::kWn);
  pipeline.template more_products<Operand>(sums, blocks, gpu::sm80::blocks_of<T>(side.rows), fill);
  gpu::wait_copies<0>();
  __syncthreads();
  gpu::sm80::write<T>(sums, side.out, m, n, pipeline.shared);
}

template <class T>
void run(const Problem& p) {
  const PackedShape shape{p.n, p.k};
  const int64_t tiles_m = divide_up(p.m, T::kBm), tiles_n = divide_up(p.n, T::kBn);
  check(tiles_m * tiles_n <= 0x7fffffff, "int8_linear: x has ", p.m, " rows, more than one launch can take");
  const auto* channels = reinterpret_cast<const int8_t*>(p.packed + shape.weights());
  const Operands in{p.rows.s, channels, p.m, shape.n_pad(), shape.k_pad(), tiles_m, tiles_n};
  const gpu::Launch at{dim3(static_cast<unsigned>(tiles_m * tiles_n)), dim3(T::kThreads), T::kShared, p.stream};
  const Branch& branch = p.branch;
  if (branch.t == nullptr) {
    gpu::launch<int8_gemm_sm80<T>>("int8_gemm_sm80", at, in, output_of(p));
    return;
  }
  const int64_t stride = branch.rank_pad * 2, bytes = round_up<int64_t>(branch.rank, 16) * 2;
  const Side side{{branch.t, p.m, stride, bytes},
                  {branch.up, p.n, stride, bytes},
                  gpu::float_output(p.bias, p.y, p.m, p.n, p.n, p.activation, p.y_type)};
  if (branch.type == Type::float16)
    gpu::launch<int8_branch_sm80<T, gpu::sm80::Float16ByBfloat16>>("int8_branch_sm80", at, in, output_of(p), side);
  else
    gpu::launch<int8_branch_sm80<T, gpu::sm80::Halves<Type::bfloat16>>>("int8_branch_sm80", at, in, output_of(p), side);
}

template <class T>
constexpr Kernel kernel_of(const char* name) {
  return {name, 80, T::kBm, T::kBn, T::kBk, T::kStages, run<T>};
}

// At most 99 KiB a block, which is what a multiprocessor of 8.6 and 8.9 has.
constexpr std::array kKernels = {
    kernel_of<Tile<128, 256, 64, 4, 2, 4>>("sm80_128x256x64"),
    kernel_of<Tile<128, 128, 64, 4, 2, 2>>("sm80_128x128x64"),
    kernel_of<Tile<64, 128, 64, 4, 2, 2>>("sm80_64x128x64"),
    kernel_of<Tile<64, 64, 128, 4, 2, 2>>("sm80_64x64x128"),
    kernel_of<Tile<32, 64, 128, 4, 2, 2>>("sm80_32x64x128"),
    kernel_of<Tile<16, 64, 128, 6, 1, 4>>("sm80_16x64x128"),
    kernel_of<Tile<16, 32, 128, 8, 1, 2>>("sm80_16x32x128"),
};

}  // namespace

const Kernel* kernels_sm80(int* count) {
  *count = static_cast<int>(kKernels.size());
  return kKernels.data();
}

}  // namespace pycompress::int8::cuda
