// Sparse weights that are read once, at the speed of memory, for few rows of x (few_rows.cuh): bitmaps and non-zeros
// arrive by asynchronous copies; each lane counts the bits in front of its own to find its values.
#include <algorithm>

#include "../../common/check.h"
#include "../../cuda/counters.cuh"
#include "../../cuda/few_rows.cuh"
#include "../../cuda/launch.h"
#include "cuda.h"

namespace pycompress::sparse::cuda {
namespace {

constexpr int kMaxShared = 96 * 1024;  // a block of sm_89 has 99 KiB
constexpr int kMaxStages = 4;

struct Arguments {
  gpu::Input input;  // all rows of x
  int64_t m;
  const uint8_t* packed;
  int steps, slabs, splits;
  int unit_bytes, stages;  // room for the largest unit
  gpu::Output output;
  float* workspace;
  uint32_t* counters;
};

template <Type kType, int kTiles, int kColumns>
struct Config : gpu::Tile<kType, kTiles, kColumns, kColumns == 1 ? 8 : 4> {
  using Base = gpu::Tile<kType, kTiles, kColumns, kColumns == 1 ? 8 : 4>;
  static constexpr int kUnits = kTiles / 2;
  static_assert(Base::kExchange <= kMaxShared);
};

int stage_bytes(const Kernel& kernel, const Shape& shape) {
  return kernel.tiles / 2 * shape.unit_bytes + kernel.columns * 8 * gpu::kInputPitch;
}

// All but `stages` - 2 of the copies that were committed last have landed.
__device__ inline void wait_for_stage(int stages) {
  if (stages == 2)
    gpu::wait_copies<0>();
  else if (stages == 3)
    gpu::wait_copies<1>();
  else
    gpu::wait_copies<2>();
}

// Register by register, the weights of a lane in one tile of a unit.
__device__ inline void expand(uint32_t (&a)[4], const uint8_t* unit, int tile, int lane) {
  const int half = lane / 16, shift = lane % 16 * 2;
  const uint4 bits = *reinterpret_cast<const uint4*>(unit + tile * 32 + half * 16);
  const uint32_t words[4] = {bits.x, bits.y, bits.z, bits.w};
  const uint32_t before = *reinterpret_cast<const uint32_t*>(unit + kBefore + tile * 8 + half * 4);
  const uint32_t first = *reinterpret_cast<const uint16_t*>(unit + kFirst + tile * 2);
  const auto* values = reinterpret_cast<const uint16_t*>(unit + kValues);
  for (int i = 0; i < 4; ++i) {
    const uint32_t mine = words[i] >> shift, in_front = __popc(words[i] & ((1u << shift) - 1));
    const uint16_t* at = values + first + (before >> 8 * i & 255) + in_front;
    const uint32_t low = (mine & 1) != 0 ? at[0] : 0, high = (mine & 2) != 0 ? at[mine & 1] : 0;
    a[i] = low | high << 16;
  }
}

template <class C>
struct Warp {
  const Arguments& of;
  int lane;
  gpu::Input input;       // of this slab
  const uint32_t* index;  // of its channels' units
  uint8_t* ring;
  uint64_t policy;
  uint32_t begin[C::kUnits], end[C::kUnits];  // chunks of the units of 32 steps, one step a lane

  __device__ int stage_bytes() const { return C::kUnits * of.unit_bytes + C::kInputBytes; }
  __device__ uint8_t* stage(int i) const { return ring + i % of.stages * stage_bytes(); }

  // Step i of `count` of this warp.
  __device__ void load(int i, int first, int count) {
    if (i % 32 == 0 && i + lane < count)
      for (int unit = 0; unit < C::kUnits; ++unit) {
        const uint32_t* at = index + unit * of.steps + first + (i + lane) * C::kWarps;
        begin[unit] = __ldg(at);
        end[unit] = __ldg(at + 1);
      }
    __syncwarp();
    for (int unit = 0; unit < C::kUnits; ++unit) {
      const uint32_t from = __shfl_sync(0xffffffffu, begin[unit], i % 32);
      const uint32_t to = __shfl_sync(0xffffffffu, end[unit], i % 32);
      for (uint32_t chunk = from + lane; chunk < to; chunk += 32)
        gpu::copy_async_once(stage(i) + unit * of.unit_bytes + (chunk - from) * kChunk,
                             of.packed + static_cast<int64_t>(chunk) * kChunk, policy);
    }
    gpu::load_input(stage(i) + C::kUnits * of.unit_bytes, input, first + i * C::kWarps, lane);
  }

  __device__ void multiply_step(float (&c)[C::kTiles][C::kColumns][4], const uint8_t* from) const {
    for (int half = 0; half < 2; ++half) {
      uint32_t b[C::kColumns][4];
      for (int column = 0; column < C::kColumns; ++column)
        gpu::load_fragments(b[column], from + C::kUnits * of.unit_bytes, input.rows, half, column, lane);
      for (int i = 0; i < 2; ++i)
        for (int tile = 0; tile < C::kTiles; ++tile) {
          uint32_t a[4];
          expand(a, from + tile / 2 * of.unit_bytes, (half * 2 + i) * 2 + tile % 2, lane);
          for (int column = 0; column < C::kColumns; ++column)
            gpu::multiply<C::kType>(c[tile][column], a, b[column][2 * i], b[column][2 * i + 1]);
        }
    }
  }

  __device__ void run(float (&c)[C::kTiles][C::kColumns][4], int first, int count) {
    for (int i = 0; i < of.stages - 1; ++i) {
      if (i < count) load(i, first, count);
      gpu::commit_copies();
    }
    for (int i = 0; i < count; ++i) {
      wait_for_stage(of.stages);
      __syncwarp();  // the other lanes' copies have landed, and the stage that is filled next has been read
      const int next = i + of.stages - 1;
      if (next < count) load(next, first, count);
      gpu::commit_copies();
      multiply_step(c, stage(i));
    }
  }
};

template <class C>
__global__ void __launch_bounds__(C::kThreads, 2) sparse_stream(const __grid_constant__ Arguments of) {
  uint8_t* shared = gpu::dynamic_shared();
  const int warp = threadIdx.x / 32, tile = blockIdx.x / of.slabs, split = blockIdx.y;
  const int first = split * of.steps / of.splits, steps = (split + 1) * of.steps / of.splits - first;
  const int64_t row = static_cast<int64_t>(blockIdx.x % of.slabs) * C::kRows;
  gpu::Input input = of.input;
  input.x += row * input.ldx;
  input.rows = static_cast<int>(min(static_cast<int64_t>(C::kRows), of.m - row));

  float c[C::kTiles][C::kColumns][4] = {};
  const auto* index = reinterpret_cast<const uint32_t*>(of.packed);
  Warp<C> mine{of,      static_cast<int>(threadIdx.x % 32),
               input,   index + static_cast<int64_t>(tile) * C::kUnits * of.steps,
               nullptr, gpu::evict_first(),
               {},      {}};
  mine.ring = shared + warp * of.stages * mine.stage_bytes();
  mine.run(c, first + warp, (steps - warp + C::kWarps - 1) / C::kWarps);

  const int64_t partial = static_cast<int64_t>(blockIdx.x) * of.splits * (C::kRows * C::kChannels);
  const gpu::Parts parts{of.workspace + partial, of.counters + blockIdx.x, split, of.splits};
  gpu::finish<C>(c, shared, parts, of.output, row, input.rows, static_cast<int64_t>(tile) * C::kChannels);
}

// A block takes a unit, a warp a tile of it.
template <Type kType>
__global__ void sparse_dense(const uint8_t* packed, int64_t n, int64_t k, int across, float* weight) {
  const int64_t unit = static_cast<int64_t>(blockIdx.x) * across + blockIdx.y;
  const int tile = threadIdx.x / 32, lane = threadIdx.x % 32;
  uint32_t a[4];
  expand(a, packed + static_cast<int64_t>(reinterpret_cast<const uint32_t*>(packed)[unit]) * kChunk, tile, lane);
  for (int i = 0; i < 8; ++i) {
    const Position at = position_of(tile, i / 2, lane, i % 2);
    const int64_t row = static_cast<int64_t>(blockIdx.x) * kUnitN + at.n, column = blockIdx.y * kUnitK + at.k;
    const auto bits = static_cast<uint16_t>(a[i / 2] >> i % 2 * 16);
    if (row < n && column < k) weight[row * k + column] = gpu::widened<kType>(bits);
  }
}

template <class C>
void run(const Problem& p, int splits) {
  const int64_t slabs = divide_up(p.m, C::kRows), tiles = divide_up(p.shape.n, C::kChannels);
  const bool aligned = reinterpret_cast<uintptr_t>(p.x) % 16 == 0 && p.ldx % 8 == 0;
  const int unit = p.shape.unit_bytes;
  const int stages = std::min(kMaxStages, kMaxShared / (C::kWarps * (C::kUnits * unit + C::kInputBytes)));
  auto* counters = reinterpret_cast<uint32_t*>(static_cast<float*>(p.workspace) +
                                               slabs * tiles * splits * (C::kRows * C::kChannels));
  const Arguments arguments{{static_cast<const uint16_t*>(p.x), p.ldx, 0, static_cast<int>(p.shape.k), aligned},
                            p.m,
                            p.packed,
                            static_cast<int>(units_across(p.shape.k)),
                            static_cast<int>(slabs),
                            splits,
                            unit,
                            stages,
                            {static_cast<uint16_t*>(p.y), p.shape.n, nullptr, p.bias, p.activation},
                            static_cast<float*>(p.workspace),
                            counters};
  if (splits > 1) {
    const dim3 clear(static_cast<unsigned>(divide_up(slabs * tiles, gpu::kClearThreads)));
    gpu::launch<gpu::clear_counters>("sparse", {clear, dim3(gpu::kClearThreads), 0, p.stream}, counters, slabs * tiles);
  }
  const dim3 grid(static_cast<unsigned>(slabs * tiles), static_cast<unsigned>(splits));
  gpu::launch<sparse_stream<C>>("sparse", {grid, dim3(C::kThreads), kMaxShared, p.stream}, arguments);
}

template <Type kType, int kTiles, int kColumns>
constexpr Kernel row(const char* name) {
  using C = Config<kType, kTiles, kColumns>;
  return {name, kType, kTiles, kColumns, C::kWarps, run<C>};
}

#define KERNELS(type, prefix)                                                                         \
  row<type, 2, 1>(prefix "_32x8"), row<type, 4, 1>(prefix "_64x8"), row<type, 2, 2>(prefix "_32x16"), \
      row<type, 4, 2>(prefix "_64x16"), row<type, 2, 4>(prefix "_32x32"), row<type, 4, 4>(prefix "_64x32")
constexpr Kernel kTable[] = {KERNELS(Type::bfloat16, "sparse_bf16"), KERNELS(Type::float16, "sparse_f16")};
#undef KERNELS

// The bytes that the busiest multiprocessor reads; those of x come from the L2, at about half the price. Handing sums
// over costs as much as 64 KiB (csrc/weight_only/dispatch.cu).
int64_t cost(const Plan& plan, const Shape& shape, int64_t m, int multiprocessors) {
  const int64_t unit = shape.bytes / units_of(shape.n, shape.k), rows = std::min<int64_t>(m, plan.kernel->columns * 8);
  const int64_t step = plan.kernel->tiles / 2 * unit + rows * kUnitK;
  const int64_t steps = divide_up(units_across(shape.k), plan.splits);
  return divide_up(plan.blocks * plan.splits, multiprocessors) * steps * step + (plan.splits > 1 ? 64 * 1024 : 0);
}

}  // namespace

const Kernel* cuda_kernels(int* count) {
  *count = static_cast<int>(std::size(kTable));
  return kTable;
}

// As far as the host can tell: where units begin stands on the device.
void check_shape(const Shape& shape) {
  check(shape.n >= 1 && shape.k >= 1 && shape.k <= kMaxK, "sparse: the packed weight is ", shape.n, "x", shape.k,
        ", expected n >= 1 and k from 1 to ", kMaxK);
  const int64_t units = units_of(shape.n, shape.k), least = (units + 1) * 4 + units * kValues;
  const bool unit = shape.unit_bytes >= kValues && shape.unit_bytes <= kLargestUnit && shape.unit_bytes % kChunk == 0;
  check(unit && shape.bytes >= least, "sparse: no packed weight ", shape.n, "x", shape.k, " has ", shape.bytes,
        " bytes, ", shape.unit_bytes, " of them in its largest unit");
}

bool fits(const Kernel& kernel, const Shape& shape) {
  return 2 * kernel.warps * stage_bytes(kernel, shape) <= kMaxShared;
}

Plan plan(const Kernel& kernel, int64_t n, int64_t m, int splits) {
  const int64_t rows = kernel.columns * 8, channels = kernel.tiles * 16;
  const int64_t blocks = divide_up(m, rows) * divide_up(n, channels);
  return {&kernel, splits, blocks, splits == 1 ? 0 : 4 * blocks * (splits * rows * channels + 1)};
}

Plan plan(const Shape& shape, int64_t m, int multiprocessors) {
  check_shape(shape);
  const int columns = m <= 8 ? 1 : m <= 16 ? 2 : 4;
  Plan best{};
  int64_t least = INT64_MAX;
  for (const Kernel& kernel : kTable) {
    if (kernel.type != shape.type || kernel.columns != columns || !fits(kernel, shape)) continue;
    for (int splits = 1; splits <= std::min<int64_t>(kMaxSplits, units_across(shape.k)); ++splits) {
      const Plan here = plan(kernel, shape.n, m, splits);
      const int64_t costs = cost(here, shape, m, multiprocessors);
      if (costs >= least) continue;
      least = costs;
      best = here;
    }
  }
  return best;
}

void linear(const Problem& p, const Plan& plan) {
  check_shape(p.shape);
  check(p.type == p.shape.type && p.type == plan.kernel->type, "sparse_linear: x is of type ", static_cast<int>(p.type),
        ", the kernel is ", plan.kernel->name, ", the packed weight is of type ", static_cast<int>(p.shape.type));
  check(fits(*plan.kernel, p.shape), "sparse_linear: the units of the packed weight do not fit ", plan.kernel->name);
  check(plan.blocks < INT32_MAX, "sparse_linear: ", p.m, " rows and ", p.shape.n, " channels are too many");
  check(plan.workspace == 0 || p.workspace != nullptr, "sparse_linear: no workspace, expected ", plan.workspace,
        " bytes");
  if (p.m > 0) plan.kernel->run(p, plan.splits);
}

void dense(const uint8_t* packed, const Shape& shape, float* weight, Stream stream) {
  check_shape(shape);
  const int64_t down = divide_up(shape.n, kUnitN), across = units_across(shape.k);
  const gpu::Launch at{dim3(static_cast<unsigned>(down), static_cast<unsigned>(across)), dim3(kTilesOfUnit * 32), 0,
                       stream};
  const auto units = static_cast<int>(across);
  if (shape.type == Type::float16)
    gpu::launch<sparse_dense<Type::float16>>("sparse_dense", at, packed, shape.n, shape.k, units, weight);
  else
    gpu::launch<sparse_dense<Type::bfloat16>>("sparse_dense", at, packed, shape.n, shape.k, units, weight);
}

}  // namespace pycompress::sparse::cuda
