// Two thin products, one launch each, whose weights are read once, at the speed of memory, for few rows of x
// (few_rows.cuh). Rows of the factors arrive by asynchronous copies, swizzled as those of x are, and leave by ldmatrix.
//
// Floor of a product: 2 n k bytes of its factor at the memory's bandwidth; the 2 m n k operations are a tenth of that
// at kMaxRows.
#include <algorithm>

#include "../common/check.h"
#include "../cuda/counters.cuh"
#include "../cuda/few_rows.cuh"
#include "../cuda/launch.h"
#include "cuda_kernel_list.h"

namespace pycompress::low_rank::cuda {
namespace {

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

struct Thin : Kernel {
  void (*product)(const Product& product, int splits);
};

constexpr int kMaxShared = 96 * 1024;    // a block of sm_89 has 99 KiB
constexpr int kRun = kTile * 2 * kStep;  // bytes of 16 channels in one step
static_assert(kStep == gpu::kStep && kRun == kTile * gpu::kInputPitch);

struct Arguments {
  gpu::Input input;  // all rows of x
  int64_t m;
  const uint16_t* weights;
  int64_t stride;
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

template <class C>
struct Warp {
  const Arguments& of;
  int lane;
  gpu::Input input;         // of this slab
  const uint16_t* weights;  // of its first tile
  int tiles;                // those that are there
  uint8_t* ring;
  uint64_t policy;

  __device__ uint8_t* stage(int i) const { return ring + i % C::kStages * C::kStageBytes; }

  // Positions of a step up to the end of k, in whole tiles: weights behind it are neither read nor multiplied.
  __device__ int positions(int step) const { return (input.k + kTile - 1) / kTile * kTile - step * kStep; }

  __device__ void load(uint8_t* to, int step) const {
    const int chunk = lane % 8;
    if (chunk * 8 < positions(step))
      for (int row = lane / 8; row < tiles * kTile; row += 4)
        gpu::copy_async_once(to + gpu::input_offset(row, chunk), weights + row * of.stride + step * kStep + chunk * 8,
                             policy);
    gpu::load_input(to + C::kInputBegin, input, step, lane);
  }

  __device__ void multiply_step(float (&c)[C::kTiles][C::kColumns][4], const uint8_t* from, int positions) const {
    for (int half = 0; half < 2; ++half) {
      uint32_t b[C::kColumns][4];
      for (int column = 0; column < C::kColumns; ++column)
        gpu::load_fragments(b[column], from + C::kInputBegin, input.rows, half, column, lane);
      for (int i = 0; i < 2; ++i) {
        const int position = half * 2 * kTile + i * kTile;
        if (position >= positions) return;
        for (int tile = 0; tile < C::kTiles; ++tile) {
          uint32_t a[4];
          gpu::load_matrices(a, from + gpu::input_offset(tile * kTile + lane % 16, position / 8 + lane / 16));
          for (uint32_t& pair : a) pair = gpu::converted<C::kType>(pair);
          for (int column = 0; column < C::kColumns; ++column)
            gpu::multiply<C::kType>(c[tile][column], a, b[column][2 * i], b[column][2 * i + 1]);
        }
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
      multiply_step(c, stage(i), positions(first + i * C::kWarps));
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
                     of.weights + tile * kTile * of.stride,
                     min(C::kTiles, of.tiles - tile),
                     shared + warp * C::kStages * C::kStageBytes,
                     gpu::evict_first()};
  mine.run(c, first + warp, (steps - warp + C::kWarps - 1) / C::kWarps);

  const int64_t partial = static_cast<int64_t>(blockIdx.x) * of.splits * (C::kRows * C::kChannels);
  const gpu::Parts parts{of.workspace + partial, of.counters + blockIdx.x, split, of.splits};
  gpu::finish<C>(c, shared, parts, of.output, row, input.rows, static_cast<int64_t>(tile) * kTile);
}

template <class C>
void launch(const Product& p, int splits) {
  const int64_t slabs = divide_up(p.m, C::kRows), tiles = divide_up(p.shape.n, C::kChannels);
  const bool aligned = reinterpret_cast<uintptr_t>(p.x) % 16 == 0 && p.ldx % 8 == 0;
  auto* counters = reinterpret_cast<uint32_t*>(static_cast<float*>(p.workspace) +
                                               slabs * tiles * splits * (C::kRows * C::kChannels));
  const Arguments arguments{{static_cast<const uint16_t*>(p.x), p.ldx, 0, static_cast<int>(p.shape.k), aligned},
                            p.m,
                            p.weights,
                            p.shape.stride,
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

// `kernel` for one product.
int64_t workspace_bytes(const Kernel& kernel, const Part& part) {
  return part.splits == 1 ? 0 : 4 * part.blocks * (part.splits * kernel.rows * kernel.channels + 1);
}
Part part_of(const Kernel& kernel, const Matrix& matrix, int64_t m, int splits) {
  return {&kernel, splits, divide_up(m, kernel.rows) * divide_up(matrix.n, kernel.channels)};
}

// Of the sums between the products, [m, rank].
int64_t between_bytes(const Factors& shape, int64_t m) { return m * shape.rank * 2; }

Plan both(const Factors& shape, int64_t m, const Part& down, const Part& up) {
  return {down, up,
          between_bytes(shape, m) + std::max(workspace_bytes(*down.kernel, down), workspace_bytes(*up.kernel, up))};
}

Plan forced(const Kernel& kernel, const Factors& shape, int64_t m, int splits) {
  return both(shape, m, part_of(kernel, shape.down(), m, splits), part_of(kernel, shape.up(), m, splits));
}

void run(const Problem& p, const Plan& plan) {
  check(std::max(plan.down.blocks, plan.up.blocks) < INT32_MAX, "low_rank_linear: ", p.m, " rows and ", p.shape.n,
        " channels are too many");
  void* rest = static_cast<uint8_t*>(p.workspace) + between_bytes(p.shape, p.m);
  static_cast<const Thin*>(plan.down.kernel)
      ->product({p.x, p.m, p.ldx, p.packed, p.shape.down(), nullptr, Activation::none, p.workspace, rest, p.stream},
                plan.down.splits);
  static_cast<const Thin*>(plan.up.kernel)
      ->product({p.workspace, p.m, p.shape.rank, p.packed + p.shape.up_begin(), p.shape.up(), p.bias, p.activation, p.y,
                 rest, p.stream},
                plan.up.splits);
}

template <Type kType, int kTiles, int kColumns>
constexpr Thin row(const char* name) {
  using C = Config<kType, kTiles, kColumns>;
  return {{name, kType, C::kRows, C::kChannels, C::kWarps, C::kStages, forced, run}, launch<C>};
}

#define KERNELS(type, prefix)                                                                          \
  row<type, 2, 1>(prefix "_32x8"), row<type, 2, 2>(prefix "_32x16"), row<type, 2, 4>(prefix "_32x32"), \
      row<type, 4, 4>(prefix "_64x32")
constexpr Thin kTable[kFewKernels] = {KERNELS(Type::bfloat16, "thin_bf16"), KERNELS(Type::float16, "thin_f16")};
#undef KERNELS

// The bytes that the busiest multiprocessor reads; those of x come from the L2, at about half the price. Handing sums
// over costs as much as 64 KiB (csrc/weight_only/dispatch.cu).
int64_t cost(const Part& part, const Matrix& matrix, int64_t m, int multiprocessors) {
  const int64_t rows = std::min<int64_t>(m, part.kernel->rows);
  const int64_t step = part.kernel->channels * kStep * 2 + rows * kStep;
  const int64_t steps = divide_up(divide_up(matrix.k, kStep), part.splits);
  return divide_up(part.blocks * part.splits, multiprocessors) * steps * step + (part.splits > 1 ? 64 * 1024 : 0);
}

struct Cheapest {
  Part part;
  int64_t bytes;
};
Cheapest cheapest(const Matrix& matrix, Type type, int64_t m, int multiprocessors) {
  const int rows = m <= 8 ? 8 : m <= 16 ? 16 : kMaxRows;
  Cheapest best{{}, INT64_MAX};
  for (const Thin& kernel : kTable) {
    if (kernel.type != type || kernel.rows != rows) continue;
    for (int splits = 1; splits <= std::min<int64_t>(kMaxSplits, divide_up(matrix.k, kStep)); ++splits) {
      const Part here = part_of(kernel, matrix, m, splits);
      const int64_t bytes = cost(here, matrix, m, multiprocessors);
      if (bytes < best.bytes) best = {here, bytes};
    }
  }
  return best;
}

}  // namespace

std::array<const Kernel*, kFewKernels> kernels_few() {
  std::array<const Kernel*, kFewKernels> all{};
  for (int i = 0; i < kFewKernels; ++i) all[i] = &kTable[i];
  return all;
}

Priced price_few(const Factors& shape, Type type, int64_t m, int multiprocessors) {
  const Cheapest down = cheapest(shape.down(), type, m, multiprocessors);
  const Cheapest up = cheapest(shape.up(), type, m, multiprocessors);
  return {both(shape, m, down.part, up.part),
          2 * kLaunch + memory_cycles(static_cast<double>(down.bytes + up.bytes), 1)};
}

}  // namespace pycompress::low_rank::cuda
