// Two thin products, one launch each, whose weights are read once, at the speed of memory, for few rows of x
// (few_rows.cuh). Tiles of the factors arrive by asynchronous copies as the fragments that they become.
#include <algorithm>

#include "../common/check.h"
#include "../cuda/few_rows.cuh"
#include "../cuda/launch.h"
#include "cuda.h"

namespace pycompress::low_rank::cuda {

// y[m, n] = act(x w^T + bias)
struct Product {
  const void* x;
  int64_t m, ldx;
  const uint16_t* weights;
  Matrix shape;
  const float* bias;
  Activation activation;
  void *y, *workspace;
  Stream stream;
};

namespace {

constexpr int kMaxShared = 96 * 1024;                                             // a block of sm_89 has 99 KiB
constexpr int kTileBytes = kTile * kTile * 2, kRun = kStep / kTile * kTileBytes;  // of 16 channels in one step
static_assert(kStep == gpu::kStep);

struct Arguments {
  gpu::Input input;  // all rows of x
  int64_t m;
  const uint8_t* weights;
  int steps, tiles, slabs, splits;  // tiles: of 16 channels
  gpu::Output output;
  float* workspace;
  uint32_t* counters;
};

template <Type kType, int kTiles, int kColumns>
struct Config : gpu::Tile<kType, kTiles, kColumns, 4> {
  using Base = gpu::Tile<kType, kTiles, kColumns, 4>;
  static constexpr int kInputBegin = kTiles * kRun, kStageBytes = kInputBegin + Base::kInputBytes;
  static constexpr int kStages = std::min(4, kMaxShared / (Base::kWarps * kStageBytes));
  static_assert(kStages >= 2);
  static constexpr int kShared = std::max(Base::kWarps * kStages * kStageBytes, Base::kExchange);
};

// Two bfloat16 as two of kType.
template <Type kType>
__device__ inline uint32_t converted(uint32_t pair) {
  if constexpr (kType == Type::bfloat16) return pair;
  const uint32_t low = gpu::rounded<Type::float16>(gpu::float_of(pair << 16));
  return low | static_cast<uint32_t>(gpu::rounded<Type::float16>(gpu::float_of(pair & 0xffff0000u))) << 16;
}

template <class C>
struct Warp {
  const Arguments& of;
  int lane;
  gpu::Input input;        // of this slab
  const uint8_t* weights;  // of its first tile
  int tiles;               // those that are there
  uint8_t* ring;
  uint64_t policy;

  __device__ uint8_t* stage(int i) const { return ring + i % C::kStages * C::kStageBytes; }

  __device__ void load(uint8_t* to, int step) const {
    for (int tile = 0; tile < tiles; ++tile)
      for (int i = lane * 16; i < kRun; i += 512)
        gpu::copy_async_once(to + tile * kRun + i, weights + (static_cast<int64_t>(tile) * of.steps + step) * kRun + i,
                             policy);
    gpu::load_input(to + C::kInputBegin, input, step, lane);
  }

  __device__ void multiply_step(float (&c)[C::kTiles][C::kColumns][4], const uint8_t* from) const {
    for (int half = 0; half < 2; ++half) {
      uint32_t b[C::kColumns][4];
      for (int column = 0; column < C::kColumns; ++column)
        gpu::load_fragments(b[column], from + C::kInputBegin, input.rows, half, column, lane);
      for (int i = 0; i < 2; ++i)
        for (int tile = 0; tile < C::kTiles; ++tile) {
          const uint4 word =
              *reinterpret_cast<const uint4*>(from + tile * kRun + (half * 2 + i) * kTileBytes + lane * 16);
          const uint32_t a[4] = {converted<C::kType>(word.x), converted<C::kType>(word.y), converted<C::kType>(word.z),
                                 converted<C::kType>(word.w)};
          for (int column = 0; column < C::kColumns; ++column)
            gpu::multiply<C::kType>(c[tile][column], a, b[column][2 * i], b[column][2 * i + 1]);
        }
    }
  }

  // `count` steps from `first`, kWarps apart.
  __device__ void run(float (&c)[C::kTiles][C::kColumns][4], int first, int count) const {
    for (int i = 0; i < C::kStages - 1; ++i) {
      if (i < count) load(stage(i), first + i * C::kWarps);
      gpu::commit_copies();
    }
    for (int i = 0; i < count; ++i) {
      gpu::wait_copies<C::kStages - 2>();
      __syncwarp();  // the other lanes' copies have landed, and the stage that is filled next has been read
      const int next = i + C::kStages - 1;
      if (next < count) load(stage(next), first + next * C::kWarps);
      gpu::commit_copies();
      multiply_step(c, stage(i));
    }
  }
};

template <class C>
__global__ void __launch_bounds__(C::kThreads, 2) thin(const __grid_constant__ Arguments of) {
  uint8_t* shared = gpu::dynamic_shared();
  const int warp = threadIdx.x / 32, tile = blockIdx.x / of.slabs * C::kTiles, split = blockIdx.y;
  const int first = split * of.steps / of.splits, steps = (split + 1) * of.steps / of.splits - first;
  const int64_t row = static_cast<int64_t>(blockIdx.x % of.slabs) * C::kRows;
  gpu::Input input = of.input;
  input.x += row * input.ldx;
  input.rows = static_cast<int>(min(static_cast<int64_t>(C::kRows), of.m - row));

  float c[C::kTiles][C::kColumns][4] = {};
  const Warp<C> mine{of,
                     static_cast<int>(threadIdx.x % 32),
                     input,
                     of.weights + static_cast<int64_t>(tile) * of.steps * kRun,
                     min(C::kTiles, of.tiles - tile),
                     shared + warp * C::kStages * C::kStageBytes,
                     gpu::evict_first()};
  mine.run(c, first + warp, (steps - warp + C::kWarps - 1) / C::kWarps);

  const int64_t partial = static_cast<int64_t>(blockIdx.x) * of.splits * (C::kRows * C::kChannels);
  const gpu::Parts parts{of.workspace + partial, of.counters + blockIdx.x, split, of.splits};
  gpu::finish<C>(c, shared, parts, of.output, row, input.rows, static_cast<int64_t>(tile) * kTile);
}

template <class C>
void run(const Product& p, int splits) {
  const int64_t slabs = divide_up(p.m, C::kRows), tiles = divide_up(p.shape.n, C::kChannels);
  const bool aligned = reinterpret_cast<uintptr_t>(p.x) % 16 == 0 && p.ldx % 8 == 0;
  auto* counters = reinterpret_cast<uint32_t*>(static_cast<float*>(p.workspace) +
                                               slabs * tiles * splits * (C::kRows * C::kChannels));
  const Arguments arguments{{static_cast<const uint16_t*>(p.x), p.ldx, 0, static_cast<int>(p.shape.k), aligned},
                            p.m,
                            reinterpret_cast<const uint8_t*>(p.weights),
                            static_cast<int>(divide_up(p.shape.k, kStep)),
                            static_cast<int>(divide_up(p.shape.n, kTile)),
                            static_cast<int>(slabs),
                            splits,
                            {static_cast<uint16_t*>(p.y), p.shape.n, nullptr, p.bias, p.activation},
                            static_cast<float*>(p.workspace),
                            counters};
  if (splits > 1) {
    const dim3 clear(static_cast<unsigned>(divide_up(slabs * tiles, gpu::kClearThreads)));
    gpu::launch<gpu::clear_counters>("low_rank", {clear, dim3(gpu::kClearThreads), 0, p.stream}, counters,
                                     slabs * tiles);
  }
  const dim3 grid(static_cast<unsigned>(slabs * tiles), static_cast<unsigned>(splits));
  gpu::launch<thin<C>>("low_rank", {grid, dim3(C::kThreads), C::kShared, p.stream}, arguments);
}

template <Type kType, int kTiles, int kColumns>
constexpr Kernel row(const char* name) {
  using C = Config<kType, kTiles, kColumns>;
  return {name, kType, kTiles, kColumns, C::kWarps, C::kStages, run<C>};
}

#define KERNELS(type, prefix)                                                                          \
  row<type, 2, 1>(prefix "_32x8"), row<type, 2, 2>(prefix "_32x16"), row<type, 2, 4>(prefix "_32x32"), \
      row<type, 4, 4>(prefix "_64x32")
constexpr Kernel kTable[] = {KERNELS(Type::bfloat16, "thin_bf16"), KERNELS(Type::float16, "thin_f16")};
#undef KERNELS

// The bytes that the busiest multiprocessor reads; those of x come from the L2, at about half the price. Handing sums
// over costs as much as 64 KiB (csrc/weight_only/dispatch.cu).
int64_t cost(const Plan& plan, const Matrix& matrix, int64_t m, int multiprocessors) {
  const int64_t rows = std::min<int64_t>(m, plan.kernel->columns * 8);
  const int64_t step = plan.kernel->tiles * kRun + rows * kStep;
  const int64_t steps = divide_up(divide_up(matrix.k, kStep), plan.splits);
  return divide_up(plan.blocks * plan.splits, multiprocessors) * steps * step + (plan.splits > 1 ? 64 * 1024 : 0);
}

// Of the sums between the products, [m, rank].
int64_t between_bytes(const Factors& shape, int64_t m) { return m * shape.rank * 2; }

Plans both(const Factors& shape, int64_t m, const Plan& down, const Plan& up) {
  return {down, up, between_bytes(shape, m) + std::max(down.workspace, up.workspace)};
}

}  // namespace

const Kernel* cuda_kernels(int* count) {
  *count = static_cast<int>(std::size(kTable));
  return kTable;
}

Plan plan(const Kernel& kernel, const Matrix& matrix, int64_t m, int splits) {
  const int64_t rows = kernel.columns * 8, channels = kernel.tiles * kTile;
  const int64_t blocks = divide_up(m, rows) * divide_up(matrix.n, channels);
  return {&kernel, splits, blocks, splits == 1 ? 0 : 4 * blocks * (splits * rows * channels + 1)};
}

Plan plan(const Matrix& matrix, Type type, int64_t m, int multiprocessors) {
  const int columns = m <= 8 ? 1 : m <= 16 ? 2 : 4;
  Plan best{};
  int64_t least = INT64_MAX;
  for (const Kernel& kernel : kTable) {
    if (kernel.type != type || kernel.columns != columns) continue;
    for (int splits = 1; splits <= std::min<int64_t>(kMaxSplits, divide_up(matrix.k, kStep)); ++splits) {
      const Plan here = plan(kernel, matrix, m, splits);
      const int64_t costs = cost(here, matrix, m, multiprocessors);
      if (costs >= least) continue;
      least = costs;
      best = here;
    }
  }
  return best;
}

Plans plans(const Factors& shape, Type type, int64_t m, int multiprocessors) {
  check(type == Type::float16 || type == Type::bfloat16, "low_rank_linear: x is of type ", static_cast<int>(type),
        ", expected float16 or bfloat16");
  return both(shape, m, plan(shape.down(), type, m, multiprocessors), plan(shape.up(), type, m, multiprocessors));
}

Plans plans(const Kernel& kernel, const Factors& shape, int64_t m, int splits) {
  return both(shape, m, plan(kernel, shape.down(), m, splits), plan(kernel, shape.up(), m, splits));
}

void linear(const Problem& p, const Plans& plans) {
  const Factors& shape = p.shape;
  check(shape.n >= 1 && shape.k >= 1 && shape.k <= kMaxK && shape.rank >= kTile && shape.rank % kTile == 0,
        "low_rank_linear: the packed weight is ", shape.n, "x", shape.k, " of rank ", shape.rank,
        ", expected n >= 1, k from 1 to ", kMaxK, " and a multiple of ", kTile);
  check(plans.down.kernel->type == p.type && plans.up.kernel->type == p.type, "low_rank_linear: kernels ",
        plans.down.kernel->name, " and ", plans.up.kernel->name, " for x of type ", static_cast<int>(p.type));
  check(std::max(plans.down.blocks, plans.up.blocks) < INT32_MAX, "low_rank_linear: ", p.m, " rows and ", shape.n,
        " channels are too many");
  if (p.m == 0) return;
  check(p.workspace != nullptr, "low_rank_linear: no workspace, expected ", plans.workspace, " bytes");
  void* rest = static_cast<uint8_t*>(p.workspace) + between_bytes(shape, p.m);
  plans.down.kernel->run(
      {p.x, p.m, p.ldx, p.packed, shape.down(), nullptr, Activation::none, p.workspace, rest, p.stream},
      plans.down.splits);
  plans.up.kernel->run({p.workspace, p.m, shape.rank, p.packed + shape.down().size(), shape.up(), p.bias, p.activation,
                        p.y, rest, p.stream},
                       plans.up.splits);
}

}  // namespace pycompress::low_rank::cuda
