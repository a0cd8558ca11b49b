// int8 GEMM of compute capability 9.0: the engine of csrc/cuda/gemm_sm90.cuh.
#include <array>

#include "../common/check.h"
#include "../cuda/gemm_sm90.cuh"
#include "../cuda/launch.h"
#include "cuda_kernel_list.h"
#include "epilogue.cuh"

namespace pycompress::int8::cuda {
namespace {

using gpu::sm90::Tile;
using gpu::sm90::Work;

template <class T>
__global__ void __launch_bounds__(gpu::kRingThreads, 1)
    int8_gemm_sm90(const __grid_constant__ gpu::TensorMap rows, const __grid_constant__ gpu::TensorMap channels,
                   const __grid_constant__ Work work, const __grid_constant__ Output out) {
  gpu::sm90::compute<T, gpu::sm90::Int8>(rows, channels, work, out);
}

// What the integers of a warp's channels are scaled by, in its shared memory: it is on its way while they are summed.
template <class T>
struct Scales {
  int32_t* const sum;
  float* const scale;
  static_assert(T::kWn * 8 <= T::kStagedBytes);

  __device__ explicit Scales(uint8_t* shared)
      : sum(reinterpret_cast<int32_t*>(shared)), scale(reinterpret_cast<float*>(shared) + T::kWn) {}

  __device__ void load(const Output& out, int64_t n) const {
    for (int i = static_cast<int>(threadIdx.x) % 32 * kLanes; i < T::kWn; i += 32 * kLanes) {
      if (out.vectors) {  // all four are there, or none
        const int64_t from = n + i < out.n ? n + i : 0;
        gpu::copy_async(sum + i, out.column_sum + from);
        gpu::copy_async(scale + i, out.weight_scale + from);
        continue;
      }
      const Columns columns(out, n + i);
      for (int c = 0; c < kLanes; ++c) {
        sum[i + c] = columns.sum[c];
        scale[i + c] = columns.scale.at[c];
      }
    }
    gpu::commit_copies();
  }
};

template <class T>
using Integers = gpu::sm90::Sums<T, int32_t>;
template <class T>
using Scaled = gpu::sm90::Sums<T, float>;

// The integers as the floats that the branch is added to.
template <class T>
__device__ inline void scale(const Integers<T>& integers, Scaled<T>& sums, const Scales<T>& scales,
                             const Row (&rows)[2]) {
  const int pair = static_cast<int>(threadIdx.x) % 4 * 2;
  gpu::wait_copies<0>();
  __syncwarp();
#pragma unroll
  for (int j = 0; j < T::kWn / 8; ++j) {
    const ColumnPair columns(scales.sum + j * 8 + pair, scales.scale + j * 8 + pair);
#pragma unroll
    for (int c = 0; c < 4; ++c) sums[j * 4 + c] = scaled_sum(integers[j * 4 + c], columns, c % 2, rows[c / 2]);
  }
  __syncwarp();
}

// A branch: how many steps of 32 bytes its rank has, and what its sums become.
struct Side {
  int steps;
  gpu::FloatOutput out;
};

// With a branch: its blocks of k follow the integers' through the ring.
template <class T, class Operand>
__global__ void __launch_bounds__(gpu::kRingThreads, 1)
    int8_branch_sm90(const __grid_constant__ gpu::TensorMap rows, const __grid_constant__ gpu::TensorMap channels,
                     const __grid_constant__ gpu::TensorMap t, const __grid_constant__ gpu::TensorMap up,
                     const __grid_constant__ Work work, const __grid_constant__ Output out,
                     const __grid_constant__ Side side) {
  if (threadIdx.x == 0)
    for (const gpu::TensorMap* map : {&rows, &channels, &t, &up}) gpu::prefetch(*map);
  const auto produce = [&](const typename T::Ring& ring, uint32_t rank) {
    typename T::Place at;
    gpu::sm90::for_each_tile<T>(work, rank, [&](int64_t m, int64_t n) {
      gpu::sm90::fill<T>(ring, at, rows, channels, work.blocks, m, n, rank);
      gpu::sm90::fill<T>(ring, at, t, up, (side.steps + 3) / 4, m, n, rank);
    });
  };
  const auto consume = [&](const typename T::Ring& ring, uint32_t rank) {
    typename T::Place at;
    gpu::sm90::for_each_part<T>(ring, work, rank, [&](int64_t m, int64_t n, int group, uint8_t* staged) {
      const Scales<T> scales(staged);
      scales.load(out, n);
      const int64_t row = m + threadIdx.x % 32 / 4;
      const Row scale_of[] = {row_or_none(out, row), row_or_none(out, row + 8)};
      const gpu::sm90::Terms<T, gpu::FloatOutput> terms(side.out, m, n);
      Integers<T> integers = {};  // here: values that outlived a tile would take registers beside the sums
      Scaled<T> sums;
      gpu::sm90::multiply<T, gpu::sm90::Int8>(integers, ring, at, group, work.blocks);
      scale<T>(integers, sums, scales, scale_of);
      gpu::sm90::multiply_more<T, Operand>(sums, ring, at, group, side.steps);
      gpu::sm90::write<T>(sums, side.out, m, n, terms, staged);
    });
  };
  gpu::sm90::run_block<T>(produce, consume);
}

template <class T>
void run(const Problem& p) {
  const PackedShape shape{p.n, p.k};
  const auto* weights = p.packed + shape.weights();
  const Work work = gpu::sm90::work_of<T>("int8_linear", p.m, p.n, shape.k_pad());
  check(reinterpret_cast<uintptr_t>(p.rows.s) % 16 == 0 && reinterpret_cast<uintptr_t>(weights) % 16 == 0,
        "int8_linear: the quantized rows or the packed weight are not aligned to 16 bytes");
  const gpu::TensorMap rows = gpu::sm90::rows_map<T>(p.rows.s, p.m, shape.k_pad(), shape.k_pad());
  const gpu::TensorMap channels = gpu::sm90::channels_map<T>(weights, shape.n_pad(), shape.k_pad(), shape.k_pad());
  const gpu::Launch at = gpu::sm90::launch_of<T>(work, p.stream);
  const Branch& branch = p.branch;
  if (branch.t == nullptr) {
    gpu::launch_clusters<int8_gemm_sm90<T>>("int8_gemm_sm90", T::kCluster, at, rows, channels, work, output_of(p));
    return;
  }
  const int64_t bytes = branch.rank_pad * 2;
  const gpu::TensorMap t = gpu::sm90::rows_map<T>(branch.t, p.m, bytes, bytes);
  const gpu::TensorMap up = gpu::sm90::channels_map<T>(branch.up, p.n, bytes, bytes);
  const Side side{static_cast<int>(divide_up(branch.rank, 16)),
                  gpu::float_output(p.bias, p.y, p.m, p.n, p.n, p.activation, p.y_type)};
  const auto launch = [&](auto operand) {
    gpu::launch_clusters<int8_branch_sm90<T, decltype(operand)>>("int8_branch_sm90", T::kCluster, at, rows, channels, t,
                                                                 up, work, output_of(p), side);
  };
  if (branch.type == Type::float16)
    launch(gpu::sm90::Float16ByBfloat16{});
  else
    launch(gpu::sm90::Halves<Type::bfloat16>{});
}

template <class T>
constexpr Kernel kernel_of(const char* name) {
  return {name, 90, T::kBm, T::kBn, gpu::sm90::kBk, T::kStages, run<T>, T::kCluster};
}

constexpr std::array kKernels = {
    kernel_of<Tile<128, 256, 4, 2>>("sm90_128x256x128_cluster2"),
    kernel_of<Tile<128, 256, 4, 1>>("sm90_128x256x128"),
    kernel_of<Tile<128, 128, 6, 1>>("sm90_128x128x128"),
    kernel_of<Tile<128, 64, 8, 1>>("sm90_128x64x128"),
    kernel_of<Tile<64, 64, 8, 1>>("sm90_64x64x128"),
};

}  // namespace

const Kernel* kernels_sm90(int* count) {
  *count = static_cast<int>(kKernels.size());
  return kKernels.data();
}

}  // namespace pycompress::int8::cuda
