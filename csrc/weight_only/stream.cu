// Weights that are read once, at the speed of memory, for up to 64 rows of x (few_rows.cuh): packed integers arrive by
// asynchronous copies and become fragments in registers. As many bytes are under way as the warps' rings hold.
#include <algorithm>

#include "../cuda/counters.cuh"
#include "../cuda/few_rows.cuh"
#include "../cuda/launch.h"
#include "cuda.h"
#include "dequantize.cuh"

namespace pycompress::weight_only::cuda {
namespace {

constexpr int kMaxShared = 96 * 1024;  // a block of sm_89 has 99 KiB

struct Arguments {
  gpu::Input input;  // all rows of x
  int64_t m;
  const uint8_t *weights, *groups;          // of `packed`
  int weights_stride, groups_stride;        // bytes from 32 channels to the next
  int group_shift, group_bytes, has_zeros;  // a group has 2^group_shift positions
  int steps, slabs, splits;
  gpu::Output output;
  float* workspace;
  uint32_t* counters;
};

template <Bits kBitsOf, Type kType, int kTiles, int kColumns>
struct Config : gpu::Tile<kType, kTiles, kColumns, kColumns <= 2 ? 8 : 4> {
  using Base = gpu::Tile<kType, kTiles, kColumns, kColumns <= 2 ? 8 : 4>;
  static constexpr Bits kBits = kBitsOf;
  static constexpr int kBlocks = Base::kChannels / kBlockN;
  // Of one step, in bytes:
  static constexpr int kRun = kBlockN * kStep * static_cast<int>(kBits) / 8;                 // weights of 32 channels
  static constexpr int kGroups = kBits == Bits::eight ? 0 : 2 * (kScaleBytes + kZeroBytes);  // what is beside them
  static constexpr int kGroupsBegin = kBlocks * kRun, kInputBegin = kGroupsBegin + kBlocks * kGroups;
  static constexpr int kStageBytes = kInputBegin + Base::kInputBytes;
  static constexpr int kStages = std::min(4, kMaxShared / (Base::kWarps * kStageBytes));
  static_assert(kStages >= 2);
  static constexpr int kShared = std::max(Base::kWarps * kStages * kStageBytes, Base::kExchange);
};

template <class C>
struct Warp {
  const Arguments& of;
  int lane;
  gpu::Input input;                 // of this slab
  const uint8_t *weights, *groups;  // its channels'
  uint8_t* ring;
  uint64_t policy;  // of copies of weights

  __device__ uint8_t* stage(int i) const { return ring + i % C::kStages * C::kStageBytes; }

  __device__ void load_weights(uint8_t* to, int step) const {
    for (int block = 0; block < C::kBlocks; ++block)
      for (int i = lane * 16; i < C::kRun; i += 512)
        gpu::copy_async_once(to + block * C::kRun + i, weights + block * of.weights_stride + step * C::kRun + i,
                             policy);
  }

  // The groups that a step meets: one, or two of 32.
  __device__ int groups_met(int step) const {
    return (kStep >> of.group_shift) == 2 && step * kStep + kStep / 2 < input.k ? 2 : 1;
  }

  __device__ void load_groups(uint8_t* to, int step) const {
    const int block = lane / 16, i = lane % 16 * 16;
    if (block >= C::kBlocks || i >= groups_met(step) * of.group_bytes) return;
    const uint8_t* from = groups + block * of.groups_stride + (step * kStep >> of.group_shift) * of.group_bytes;
    gpu::copy_async_once(to + C::kGroupsBegin + block * C::kGroups + i, from + i, policy);
  }

  __device__ void load(int i, int step) const {
    load_weights(stage(i), step);
    if constexpr (C::kBits == Bits::four) load_groups(stage(i), step);
    gpu::load_input(stage(i) + C::kInputBegin, input, step, lane);
  }

  // 32 positions of a step.
  __device__ void multiply_bytes(float (&c)[C::kTiles][C::kColumns][4], const uint8_t* from, int half) const {
    uint32_t b[C::kColumns][4];
    for (int column = 0; column < C::kColumns; ++column)
      gpu::load_fragments(b[column], from + C::kInputBegin, input.rows, half, column, lane);
    for (int tile = 0; tile < C::kTiles; ++tile) {
      const uint4 word =
          *reinterpret_cast<const uint4*>(from + tile / 2 * C::kRun + half * 1024 + tile % 2 * 512 + lane * 16);
      uint32_t a[2][4];
      expand_bytes<C::kType>(word.x, a[0][0], a[0][1]);
      expand_bytes<C::kType>(word.y, a[0][2], a[0][3]);
      expand_bytes<C::kType>(word.z, a[1][0], a[1][1]);
      expand_bytes<C::kType>(word.w, a[1][2], a[1][3]);
      for (int column = 0; column < C::kColumns; ++column) {
        gpu::multiply<C::kType>(c[tile][column], a[0], b[column][0], b[column][1]);
        gpu::multiply<C::kType>(c[tile][column], a[1], b[column][2], b[column][3]);
      }
    }
  }

  // 32 positions of one group, 16 channels: summed first, then scaled. scales: channel g's and g + 8's.
  __device__ void multiply_group(float (&c)[4], const uint32_t (&a)[2][4], const uint32_t (&b)[4],
                                 uint32_t scales) const {
    float sum[4] = {0, 0, 0, 0};
    gpu::multiply<C::kType>(sum, a[0], b[0], b[1]);
    gpu::multiply<C::kType>(sum, a[1], b[2], b[3]);
    const float low = gpu::float_of(scales << 16), high = gpu::float_of(scales & 0xffff0000u);
    for (int i = 0; i < 4; ++i) c[i] = __fmaf_rn(sum[i], i < 2 ? low : high, c[i]);
  }

  // 32 positions of a step; group: theirs among those that the step meets.
  __device__ void multiply_nibbles(float (&c)[C::kTiles][C::kColumns][4], const uint8_t* from, int half,
                                   int group) const {
    for (int block = 0; block < C::kBlocks; ++block) {
      const uint8_t* beside = from + C::kGroupsBegin + block * C::kGroups + group * of.group_bytes;
      const uint2 scales = *reinterpret_cast<const uint2*>(beside + lane / 4 * 8);
      const uint32_t zeros =
          of.has_zeros ? *reinterpret_cast<const uint16_t*>(beside + kScaleBytes + lane / 4 * 2) : 0x8888;
      const ZeroPoints first = zero_points<C::kType>(zeros), second = zero_points<C::kType>(zeros >> 8);
      const uint4 word = *reinterpret_cast<const uint4*>(from + block * C::kRun + half * 512 + lane * 16);
      uint32_t a[2][2][4];
      expand_nibbles<C::kType>(word.x, first, a[0][0]);
      expand_nibbles<C::kType>(word.y, first, a[0][1]);
      expand_nibbles<C::kType>(word.z, second, a[1][0]);
      expand_nibbles<C::kType>(word.w, second, a[1][1]);
      for (int column = 0; column < C::kColumns; ++column) {
        uint32_t b[4];
        gpu::load_fragments(b, from + C::kInputBegin, input.rows, half, column, lane);
        multiply_group(c[block * 2][column], a[0], b, scales.x);
        multiply_group(c[block * 2 + 1][column], a[1], b, scales.y);
      }
    }
  }

  __device__ void multiply_step(float (&c)[C::kTiles][C::kColumns][4], const uint8_t* from, int step) const {
    for (int half = 0; half < 2; ++half) {
      if constexpr (C::kBits == Bits::eight)
        multiply_bytes(c, from, half);
      else
        multiply_nibbles(c, from, half, min(half, groups_met(step) - 1));
    }
  }

  // The sums over steps first, first + kWarps, ...: `count` of them.
  __device__ void run(float (&c)[C::kTiles][C::kColumns][4], int first, int count) const {
    for (int i = 0; i < C::kStages - 1; ++i) {
      if (i < count) load(i, first + i * C::kWarps);
      gpu::commit_copies();
    }
    for (int i = 0; i < count; ++i) {
      gpu::wait_copies<C::kStages - 2>();
      __syncwarp();  // the other lanes' copies have landed, and the stage that is filled next has been read
      const int next = i + C::kStages - 1;
      if (next < count) load(next, first + next * C::kWarps);
      gpu::commit_copies();
      multiply_step(c, stage(i), first + i * C::kWarps);
    }
  }
};

// The steps of part `split` of all.
__device__ inline int first_step(const Arguments& of, int split) { return split * of.steps / of.splits; }

template <class C>
__global__ void __launch_bounds__(C::kThreads, 2) stream(const __grid_constant__ Arguments of) {
  uint8_t* shared = gpu::dynamic_shared();
  const int warp = threadIdx.x / 32, tile = blockIdx.x / of.slabs, split = blockIdx.y;
  const int first = first_step(of, split), steps = first_step(of, split + 1) - first;
  const int64_t row = static_cast<int64_t>(blockIdx.x % of.slabs) * C::kRows;
  const int64_t channel = static_cast<int64_t>(tile) * C::kChannels, block_n = channel / kBlockN;
  gpu::Input input = of.input;
  input.x += row * input.ldx;
  input.rows = static_cast<int>(min(static_cast<int64_t>(C::kRows), of.m - row));

  float c[C::kTiles][C::kColumns][4] = {};
  const Warp<C> mine{of,
                     static_cast<int>(threadIdx.x % 32),
                     input,
                     of.weights + block_n * of.weights_stride,
                     of.groups + block_n * of.groups_stride,
                     shared + warp * C::kStages * C::kStageBytes,
                     gpu::evict_first()};
  mine.run(c, first + warp, (steps - warp + C::kWarps - 1) / C::kWarps);

  const int64_t partial = static_cast<int64_t>(blockIdx.x) * of.splits * (C::kRows * C::kChannels);
  const gpu::Parts parts{of.workspace + partial, of.counters + blockIdx.x, split, of.splits};
  gpu::finish<C>(c, shared, parts, of.output, row, input.rows, channel);
}

template <class C>
void run(const Problem& problem, int splits) {
  const int64_t slabs = divide_up(problem.m, C::kRows), tiles = divide_up(problem.shape.n, C::kChannels);
  const bool aligned = reinterpret_cast<uintptr_t>(problem.x) % 16 == 0 && problem.ldx % 8 == 0;
  const Packed& shape = problem.shape;
  auto* counters = reinterpret_cast<uint32_t*>(static_cast<float*>(problem.workspace) +
                                               slabs * tiles * splits * (C::kRows * C::kChannels));
  const Arguments arguments{
      {static_cast<const uint16_t*>(problem.x), problem.ldx, 0, static_cast<int>(shape.k), aligned},
      problem.m,
      problem.packed,
      problem.packed + shape.scales(0, 0),
      static_cast<int>(shape.weights(1, 0)),
      static_cast<int>(shape.groups() * shape.group_bytes()),
      shape.group == 128  ? 7
      : shape.group == 64 ? 6
                          : 5,
      shape.group_bytes(),
      !shape.symmetric,
      static_cast<int>(shape.k_pad() / kStep),
      static_cast<int>(slabs),
      splits,
      {static_cast<uint16_t*>(problem.y), shape.n, problem.weight_scale, problem.bias, problem.activation},
      static_cast<float*>(problem.workspace),
      counters};
  if (splits > 1) {
    const dim3 clear(static_cast<unsigned>(divide_up(slabs * tiles, gpu::kClearThreads)));
    gpu::launch<gpu::clear_counters>("weight_only", {clear, dim3(gpu::kClearThreads), 0, problem.stream}, counters,
                                     slabs * tiles);
  }
  const dim3 grid(static_cast<unsigned>(slabs * tiles), static_cast<unsigned>(splits));
  gpu::launch<stream<C>>("weight_only", {grid, dim3(C::kThreads), C::kShared, problem.stream}, arguments);
}

template <Bits kBits, Type kType, int kTiles, int kColumns>
constexpr Kernel row(const char* name) {
  using C = Config<kBits, kType, kTiles, kColumns>;
  return {name, kBits, kType, kTiles, kColumns, C::kWarps, C::kStages, run<C>};
}

// Narrow tiles make more blocks where there are few rows, so that k is split less; wide ones read x less often. int4
// needs registers for the sums of a group besides, which 64 x 64 has none left for.
#define KERNELS(bits, type, prefix)                                             \
  row<bits, type, 2, 1>(prefix "_32x8"), row<bits, type, 4, 1>(prefix "_64x8"), \
      row<bits, type, 4, 2>(prefix "_64x16"), row<bits, type, 4, 4>(prefix "_64x32")
constexpr Kernel kTable[] = {
    KERNELS(Bits::eight, Type::bfloat16, "w8_bf16"), row<Bits::eight, Type::bfloat16, 4, 8>("w8_bf16_64x64"),
    KERNELS(Bits::eight, Type::float16, "w8_f16"),   row<Bits::eight, Type::float16, 4, 8>("w8_f16_64x64"),
    KERNELS(Bits::four, Type::bfloat16, "w4_bf16"),  KERNELS(Bits::four, Type::float16, "w4_f16")};
#undef KERNELS

}  // namespace

const Kernel* kernels(int* count) {
  *count = static_cast<int>(std::size(kTable));
  return kTable;
}

}  // namespace pycompress::weight_only::cuda
