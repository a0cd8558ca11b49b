// Block sparse products of compute capability 9.0, blocks of 64 x 64: wgmma on tiles that the tensor memory accelerator
// brings. y^T = W x^T: a tile is a row of blocks (64 channels) and many rows of x, of which two warp groups have a half
// each (csrc/cuda/ring.cuh). A stage is one block of the weight and the rows' part of x that it meets.
//
// A block of threads is there for the whole launch and computes one tile after the other (schedule.h).
//
// Floor: bm rows of a block of k take of a multiprocessor
//   the tensor cores   2 bm cycles for halves (2048 products a cycle), bm for int8
//   the L2             (8 KiB + 128 bm) bytes, half of it for int8, at some 30 a cycle: 4.8 bm cycles for 512 rows of
//                      halves, 5.3 for 256, 6.4 for 128. That is the limit, at 45 % of the tensor cores' rate: one row
//                      of blocks has no more products for a row of x. int8 halves both and stays at the same share.
// So a layer with 80 % zeros can be 5 x 0.45 / s times as fast as the dense one that reaches a share s of the peak.
#include <algorithm>
#include <array>

#include "../../common/check.h"
#include "../../common/round.h"
#include "../../cuda/launch.h"
#include "../../cuda/ring.cuh"
#include "../epilogue.cuh"
#include "cuda.h"
#include "cuda_kernel_list.h"
#include "schedule.h"

namespace pycompress::sparse::cuda::blocks {
namespace {

constexpr int64_t kCached = 24 << 20;  // bytes of x that stay in the L2 beside weights and y

struct Work {
  Schedule schedule;
  const uint32_t *start, *order;  // of the packed weight
};

template <Element kElementOf, int kBmOf, int kStagesOf, int kPieceOf = kPieceTiles>
struct Tile {
  static constexpr Element kElement = kElementOf;
  static constexpr int kBm = kBmOf, kStages = kStagesOf, kPiece = kPieceOf;
  static constexpr bool kInt8 = kElement == Element::int8;
  static constexpr int kRows = kBm / gpu::kConsumerGroups;  // of x, of one warp group
  static constexpr int kRow = kBlock * bytes_of(kElement);  // bytes of a channel, or row of x, in a stage
  static constexpr int kProducts = kRow / 32;               // of a stage
  static constexpr int kValuesBytes = kBlock * kRow, kHalfBytes = kRows * kRow;

  using Ring = gpu::Ring<kStages, kValuesBytes + kBm * kRow>;
  static constexpr int kStaged = Ring::kBytes;
  static constexpr int kBarriers = kStaged + gpu::kConsumerWarps * kStagedBytes<kPiece>;
  static constexpr int kShared = kBarriers + Ring::kBarrierBytes;
  static_assert(kShared <= gpu::kMaxRingShared && kRows <= 256);

  using Finish = cuda::Finish<kElement>;
  using Output = cuda::Output<kElement>;
  using Sum = typename Finish::Sum;
  using Sums = Sum[kRows / 2];
};

// f(row of blocks, tile of rows of x, first block, the one behind the last) for each tile of this block of threads.
template <class F>
__device__ inline void for_each_tile(const Work& work, F&& f) {
  work.schedule.for_each(blockIdx.x, gridDim.x, [&](Schedule::Tile tile) {
    const auto part = static_cast<int>(work.order[tile.rank]);
    f(part, tile.m, work.start[part], work.start[part + 1]);
  });
}

template <class T>
__device__ inline void produce(const typename T::Ring& ring, const gpu::TensorMap& values, const gpu::TensorMap& rows,
                               const Work& work, const uint32_t* columns) {
  gpu::Place<T::kStages> at;
  for_each_tile(work, [&](int, int tile, uint32_t first, uint32_t end) {
    for (uint32_t block = first; block < end; ++block, at.advance()) {
      const auto column = static_cast<int>(columns[block]);  // on its way while the stage is waited for
      uint64_t* full = ring.claim(at);
      uint8_t* stage = ring.stage(at.stage);
      gpu::load_tile(stage, values, 0, static_cast<int>(block) * kBlock, full);
#pragma unroll
      for (int half = 0; half < gpu::kConsumerGroups; ++half)
        gpu::load_tile(stage + T::kValuesBytes + half * T::kHalfBytes, rows, column * T::kRow,
                       tile * T::kBm + half * T::kRows, full);
    }
  });
}

template <class T>
__device__ inline uint64_t descriptor(const uint8_t* tile) {
  return T::kInt8 ? gpu::descriptor_64(tile) : gpu::descriptor(tile);
}

template <class T>
__device__ inline void multiply_step(typename T::Sums& sums, uint64_t values, uint64_t rows) {
  if constexpr (T::kInt8)
    gpu::multiply(sums, values, rows, true);
  else if constexpr (T::kElement == Element::float16)
    gpu::multiply_f16(sums, values, rows, true);
  else
    gpu::multiply_bf16(sums, values, rows, true);
}

// The sums of a group over `count` blocks, one stage's products under way while the next is waited for.
template <class T>
__device__ inline void multiply(typename T::Sums& sums, const typename T::Ring& ring, gpu::Place<T::kStages>& at,
                                int group, uint32_t count) {
#pragma unroll
  for (auto& sum : sums) sum = 0;  // of a row without blocks, which has no first product
  const uint64_t values = descriptor<T>(ring.stage(0));
  const uint64_t rows = descriptor<T>(ring.stage(0) + T::kValuesBytes + group * T::kHalfBytes);
  int before = 0;
  for (uint32_t block = 0; block < count; ++block, at.advance()) {
    const auto offset = static_cast<uint64_t>(at.stage * (T::Ring::kStageBytes >> 4));
    gpu::wait(ring.full + at.stage, at.parity);
    gpu::begin_products();
#pragma unroll
    for (int step = 0; step < T::kProducts; ++step)
      multiply_step<T>(sums, values + offset + step * gpu::kNextK, rows + offset + step * gpu::kNextK);
    gpu::commit_products();
    gpu::wait_products<1>();
    if (block > 0) ring.leave(before);
    before = at.stage;
  }
  gpu::wait_products<0>();
  gpu::receive_products(sums);
  if (count > 0) ring.leave(before);
}

template <class T>
__device__ inline void consume(const typename T::Ring& ring, uint8_t* shared, const Work& work,
                               const typename T::Output& out) {
  const int warp = gpu::consumer_warp(), group = gpu::consumer_group();
  uint8_t* staged = shared + T::kStaged + warp * kStagedBytes<T::kPiece>;
  typename T::Sums sums = {};
  gpu::Place<T::kStages> at;
  for_each_tile(work, [&](int part, int tile, uint32_t first, uint32_t end) {
    multiply<T>(sums, ring, at, group, end - first);
    const typename T::Finish finish(out, static_cast<int64_t>(part) * kBlock + warp % 4 * 16);
    write<T::kRows / 8, T::kPiece>(sums, finish, static_cast<int64_t>(tile) * T::kBm + group * T::kRows, staged);
  });
}

template <class T>
__global__ void __launch_bounds__(gpu::kRingThreads, 1)
    blocks_sm90(const __grid_constant__ gpu::TensorMap values, const __grid_constant__ gpu::TensorMap rows,
                const __grid_constant__ Work work, const uint32_t* column,
                const __grid_constant__ typename T::Output out) {
  uint8_t* shared = gpu::dynamic_shared();
  const typename T::Ring ring(shared, shared + T::kBarriers);
  if (threadIdx.x == 0) {
    gpu::prefetch(values);
    gpu::prefetch(rows);
    ring.init(gpu::kConsumerWarps);
  }
  __syncthreads();
  gpu::split_groups([&] { produce<T>(ring, values, rows, work, column); },
                    [&] { consume<T>(ring, shared, work, out); });
}

template <class T>
void run(const Problem& p) {
  const Shape& shape = p.shape;
  const uint8_t* values = p.packed + shape.values();
  const int64_t blocks = std::max<int64_t>(1, shape.stored);
  const int64_t tiles_m = divide_up(p.m, int64_t{T::kBm}), parts = shape.parts();
  check(p.m <= 0x7fffffff - 1024 && tiles_m * parts <= 0x7fffffff && blocks * kBlock <= 0x7fffffff,
        "sparse_linear: y is [", p.m, ", ", shape.n, "], the weight has ", blocks,
        " blocks: more than one launch can take");
  const int64_t row = T::kInt8 ? round_up(shape.k, int64_t{int8::cuda::kPadK}) : shape.k * 2;  // bytes that are there
  const int64_t group = std::clamp<int64_t>(kCached / (row * T::kBm), 1, tiles_m);
  const Work work{{static_cast<int>(parts), static_cast<int>(tiles_m), static_cast<int>(group)},
                  reinterpret_cast<const uint32_t*>(p.packed + shape.start()),
                  reinterpret_cast<const uint32_t*>(p.packed + shape.order())};
  const auto map = T::kInt8 ? gpu::tensor_map_64 : gpu::tensor_map;
  const gpu::TensorMap of_values = map(values, blocks * kBlock, T::kRow, T::kRow, kBlock);
  const gpu::TensorMap of_rows =
      T::kInt8 ? map(p.rows.s, p.m, row, row, T::kRows) : map(p.x, p.m, row, p.ldx * 2, T::kRows);
  const auto grid = static_cast<unsigned>(std::min<int64_t>(work.schedule.count(), gpu::device().multiprocessors));
  gpu::launch<blocks_sm90<T>>("blocks_sm90", {dim3(grid), dim3(gpu::kRingThreads), T::kShared, p.stream}, of_values,
                              of_rows, work, reinterpret_cast<const uint32_t*>(p.packed + shape.behind()),
                              output_of<T::kElement>(p));
}

template <class T>
constexpr Kernel kernel_of(const char* name) {
  return {name, T::kElement, kBlock, 90, kBlock, T::kBm, T::kStages, T::kShared, run<T>};
}

constexpr std::array kKernels = {
    kernel_of<Tile<Element::bfloat16, 512, 3, 2>>("sm90_block64_bf16_64x512"),
    kernel_of<Tile<Element::bfloat16, 256, 5>>("sm90_block64_bf16_64x256"),
    kernel_of<Tile<Element::bfloat16, 128, 8>>("sm90_block64_bf16_64x128"),
    kernel_of<Tile<Element::float16, 512, 3, 2>>("sm90_block64_f16_64x512"),
    kernel_of<Tile<Element::float16, 256, 5>>("sm90_block64_f16_64x256"),
    kernel_of<Tile<Element::float16, 128, 8>>("sm90_block64_f16_64x128"),
    kernel_of<Tile<Element::int8, 512, 5>>("sm90_block64_int8_64x512"),
    kernel_of<Tile<Element::int8, 256, 8>>("sm90_block64_int8_64x256"),
    kernel_of<Tile<Element::int8, 128, 8>>("sm90_block64_int8_64x128"),
};

}  // namespace

const Kernel* kernels_sm90(int* count) {
  *count = static_cast<int>(kKernels.size());
  return kKernels.data();
}

}  // namespace pycompress::sparse::cuda::blocks
