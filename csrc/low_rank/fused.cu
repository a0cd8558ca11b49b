// Both products in one launch, for ranks up to kFusedRank and many rows: as FlashAttention keeps its scores (Dao et al.
// 2022), a block keeps t of its rows in shared memory, where the second product finds it, and never writes it out.
//
// A block takes kRows rows of x. Blocks of 64 positions of x and down come through a ring of stages, filled by cp.async
// kStages - 1 ahead, and give t; behind them, through the same ring and without a pause, come those of up, a tile of
// kRank channels after the other. A stage has a part for x and a part for a factor. The former is idle in the second
// product: those of the first stages hold t by then, that of the next one the sums on their way to whole lines of y. So
// shared memory holds stages alone. Where there are too few row tiles, several blocks take a share of n each, and each
// computes t again.
//
// Floor: 2 m kRank (k + n) operations at 1024 products a cycle and multiprocessor (A100), of which
// kRows x kRank x 64 take kRows + kRank lines of 128 bytes from the L2; or 2 m (k + n) bytes of x and y from the
// memory.
#include <algorithm>

#include "../common/check.h"
#include "../cuda/few_rows.cuh"
#include "../cuda/floats.cuh"
#include "../cuda/launch.h"
#include "cuda_kernel_list.h"

namespace pycompress::low_rank::cuda {
namespace {

using gpu::Floats;
using gpu::kLanes;

constexpr int kLine = 2 * kStep;  // bytes of a row in a stage
static_assert(kLine == gpu::kInputPitch);

// Each of kWarpsM x kWarpsN warps has kWm rows and 64 columns of t, then of a tile of y.
template <Type kTypeOf, int kRowsOf, int kRankOf, int kWarpsM, int kStagesOf, int kResident_>
struct Config {
  static constexpr Type kType = kTypeOf;
  static constexpr int kRows = kRowsOf, kRank = kRankOf, kStages = kStagesOf, kResident = kResident_;
  static constexpr int kWn = 64, kWarpsN = kRank / kWn, kWm = kRows / kWarpsM;
  static constexpr int kWarps = kWarpsM * kWarpsN, kThreads = 32 * kWarps;
  static constexpr int kMt = kWm / 16, kNt = kWn / 8;  // in tiles of one mma
  static constexpr int kBlocks = kRank / kStep;        // of t
  static constexpr int kInput = kRows * kLine, kStageBytes = kInput + kRank * kLine, kShared = kStages * kStageBytes;
  static constexpr int kStaged = 8 * kWn * 4;  // sums of 8 rows of a warp
  static_assert(kRank % kStep == 0 && kWm % 16 == 0 && kStages > kBlocks && kWarps * kStaged <= kInput);
};

struct Arguments {
  const uint16_t *x, *down, *up;  // down [kRank][k_pad], up [n_pad][kRank]
  int64_t ldx, m;
  int k, k_pad, tiles, splits;  // tiles: of kRank channels
  uint16_t* y;
  int n;
  const float* bias;
  Activation activation;
  bool vectors;  // n is a multiple of four, y is aligned to 8 bytes and bias to 16
};

// kLanes channels from n of a row of y.
__device__ inline Floats bias_at(const Arguments& of, int n) {
  if (of.bias == nullptr || n >= of.n) return Floats::of(0);
  if (of.vectors) {
    const float4 four = *reinterpret_cast<const float4*>(of.bias + n);
    return {{four.x, four.y, four.z, four.w}};
  }
  return gpu::each([&](int i) { return n + i < of.n ? of.bias[n + i] : 0.0f; });
}
template <Type kType>
__device__ inline void store(const Arguments& of, int64_t row, int n, Floats v) {
  uint16_t halves[kLanes];
#pragma unroll
  for (int i = 0; i < kLanes; ++i) halves[i] = gpu::rounded<kType>(v.at[i]);
  uint16_t* y = of.y + row * of.n + n;
  if (of.vectors)
    __stcg(reinterpret_cast<uint2*>(y), make_uint2(halves[0] | static_cast<uint32_t>(halves[1]) << 16,
                                                   halves[2] | static_cast<uint32_t>(halves[3]) << 16));
  else
    gpu::store_each(y, halves, min(kLanes, of.n - n));
}

template <class C>
struct Block {
  const Arguments& of;
  uint8_t* shared;
  int64_t row;      // the first
  int first, last;  // tiles of channels
  int steps;        // of k
  int warp_m, warp_n, lane;
  float sums[C::kMt][C::kNt][4];

  __device__ uint8_t* input(int stage) const { return shared + stage % C::kStages * C::kStageBytes; }
  __device__ uint8_t* factor(int stage) const { return input(stage) + C::kInput; }

  // Lines of 64 values, of which `valid` (any number) of the first are read and the others 0.
  template <int kLines>
  __device__ static void copy(uint8_t* to, const uint16_t* from, int64_t stride, int64_t lines, int valid) {
    constexpr int kAtOnce = C::kThreads / 8;
    const int chunk = static_cast<int>(threadIdx.x) % 8, count = min(8, max(0, valid - chunk * 8));
    const int line = static_cast<int>(threadIdx.x) / 8;
    const uint16_t* at = from + line * stride + (count > 0 ? chunk * 8 : 0);
#pragma unroll
    for (int i = 0; i < kLines; i += kAtOnce) {
      const int bytes = i + line < lines ? count * 2 : 0;
      gpu::copy_async(to + gpu::input_offset(i + line, chunk), bytes > 0 ? at : from, bytes);
      at += kAtOnce * stride;
    }
  }

  __device__ void fill(int step) const {
    if (step < steps) {
      copy<C::kRows>(input(step), of.x + row * of.ldx + step * kStep, of.ldx, of.m - row, of.k - step * kStep);
      copy<C::kRank>(factor(step), of.down + step * kStep, of.k_pad, C::kRank, kStep);
    } else if (const int tile = first + (step - steps) / C::kBlocks; tile < last) {
      copy<C::kRank>(factor(step),
                     of.up + static_cast<int64_t>(tile) * C::kRank * C::kRank + (step - steps) % C::kBlocks * kStep,
                     C::kRank, C::kRank, kStep);
    }
    gpu::commit_copies();
  }

  // The stage of `step` is there, and everybody has read the one before, which is filled again.
  __device__ void advance(int step) const {
    gpu::wait_copies<C::kStages - 2>();
    __syncthreads();
    fill(step + C::kStages - 1);
  }

  __device__ void clear() {
#pragma unroll
    for (auto& rows : sums)
#pragma unroll
      for (auto& tile : rows)
#pragma unroll
        for (float& sum : tile) sum = 0;
  }

  // sums += the 64 positions of `rows` (of x or t) times those of `channels`.
  __device__ void multiply(const uint8_t* rows, const uint8_t* channels) {
#pragma unroll
    for (int chunk = 0; chunk < 8; chunk += 2) {
      uint32_t a[C::kMt][4];
#pragma unroll
      for (int i = 0; i < C::kMt; ++i)
        gpu::load_matrices(a[i], rows + gpu::input_offset(warp_m * C::kWm + i * 16 + lane % 16, chunk + lane / 16));
#pragma unroll
      for (int j = 0; j < C::kNt; j += 2) {
        uint32_t b[4];  // of 8 channels, then of the next 8
        const int channel = warp_n * C::kWn + j * 8 + lane % 8 + lane / 16 * 8;
        gpu::load_matrices(b, channels + gpu::input_offset(channel, chunk + lane / 8 % 2));
#pragma unroll
        for (int i = 0; i < C::kMt; ++i) {
          gpu::multiply<C::kType>(sums[i][j], a[i], b[0], b[1]);
          gpu::multiply<C::kType>(sums[i][j + 1], a[i], b[2], b[3]);
        }
      }
    }
  }

  // The sums, rounded, become t in the input parts of the first stages.
  __device__ void keep() const {
    uint8_t* t = input(warp_n);
#pragma unroll
    for (int i = 0; i < C::kMt; ++i)
#pragma unroll
      for (int j = 0; j < C::kNt; ++j)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const uint32_t low = gpu::rounded<C::kType>(sums[i][j][half * 2]);
          const uint32_t high = gpu::rounded<C::kType>(sums[i][j][half * 2 + 1]);
          const int at = warp_m * C::kWm + i * 16 + half * 8 + lane / 4;
          *reinterpret_cast<uint32_t*>(t + gpu::input_offset(at, j) + lane % 4 * 4) = low | high << 16;
        }
  }

  // The sums become y, eight rows at a time through the warp's own part of shared memory. Its 16-byte chunks are
  // swizzled, so that neither stores nor loads meet in a bank.
  __device__ void write(int tile) const {
    uint8_t* staged = input(C::kBlocks) + (warp_m * C::kWarpsN + warp_n) * C::kStaged;
    const auto at = [&](int r, int chunk) { return staged + (r * (C::kWn / 4) + (chunk ^ (r & 3) * 2)) * 16; };
    const int column = lane % 16;
    const int n = tile * C::kRank + warp_n * C::kWn + column * kLanes;
    const Floats bias = bias_at(of, n);
#pragma unroll
    for (int i = 0; i < C::kMt; ++i)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
#pragma unroll
        for (int j = 0; j < C::kNt; ++j)
          *reinterpret_cast<float2*>(at(lane / 4, j * 2 + lane % 4 / 2) + lane % 2 * 8) =
              make_float2(sums[i][j][half * 2], sums[i][j][half * 2 + 1]);
        __syncwarp();
#pragma unroll 1
        for (int r = lane / 16; r < 8; r += 2) {
          const int64_t m = row + warp_m * C::kWm + i * 16 + half * 8 + r;
          if (m >= of.m || n >= of.n) continue;
          const float4 four = *reinterpret_cast<const float4*>(at(r, column));
          const Floats v = Floats{{four.x, four.y, four.z, four.w}} + bias;
          store<C::kType>(of, m, n, activate(of.activation, v));
        }
        __syncwarp();
      }
  }

  __device__ void run() {
    for (int i = 0; i < C::kStages - 1; ++i) fill(i);
    clear();
    int step = 0;
    for (; step < steps; ++step) {
      advance(step);
      multiply(input(step), factor(step));
    }
    __syncthreads();  // everybody has read x, of which no copy is under way
    keep();
    for (int tile = first; tile < last; ++tile) {
      clear();
      for (int block = 0; block < C::kBlocks; ++block, ++step) {
        advance(step);
        multiply(input(block), factor(step));
      }
      write(tile);
    }
    gpu::wait_copies<0>();
  }
};

template <class C>
__global__ void __launch_bounds__(C::kThreads, C::kResident) fused(const __grid_constant__ Arguments of) {
  const int split = static_cast<int>(blockIdx.x) % of.splits, warp = static_cast<int>(threadIdx.x) / 32;
  Block<C> block{of,
                 gpu::dynamic_shared(),
                 static_cast<int64_t>(blockIdx.x) / of.splits * C::kRows,
                 split * of.tiles / of.splits,
                 (split + 1) * of.tiles / of.splits,
                 (of.k + kStep - 1) / kStep,
                 warp / C::kWarpsN,
                 warp % C::kWarpsN,
                 static_cast<int>(threadIdx.x) % 32,
                 {}};
  block.run();
}

template <class C>
void run(const Problem& p, const Plan& plan) {
  check_aligned(p);
  const Factors& shape = p.shape;
  const int64_t blocks = plan.down.blocks * plan.down.splits;
  check(blocks <= INT32_MAX && shape.n_pad() <= INT32_MAX, "low_rank_linear: ", p.m, " rows and ", shape.n,
        " channels are too many");
  const uint16_t* factors = halves_of(p, p.workspace);
  const bool vectors = shape.n % kLanes == 0 && reinterpret_cast<uintptr_t>(p.y) % 8 == 0 &&
                       reinterpret_cast<uintptr_t>(p.bias) % 16 == 0;
  const Arguments arguments{static_cast<const uint16_t*>(p.x),
                            factors,
                            factors + shape.up_begin(),
                            p.ldx,
                            p.m,
                            static_cast<int>(shape.k),
                            static_cast<int>(shape.k_pad()),
                            static_cast<int>(divide_up(shape.n, C::kRank)),
                            plan.down.splits,
                            static_cast<uint16_t*>(p.y),
                            static_cast<int>(shape.n),
                            p.bias,
                            p.activation,
                            vectors};
  const gpu::Launch at{dim3(static_cast<unsigned>(blocks)), dim3(C::kThreads), C::kShared, p.stream};
  gpu::launch<fused<C>>("low_rank", at, arguments);
}

Plan forced(const Kernel& kernel, const Factors& shape, int64_t m, int splits) {
  check(shape.rank_pad() == kernel.channels, "low_rank_linear: kernel ", kernel.name, " for rank ", shape.rank,
        ", expected one that is ", kernel.channels, " in whole ", kStep);
  const int64_t most = divide_up(shape.n, kernel.channels);
  const Part part{&kernel, static_cast<int>(std::min<int64_t>(splits, most)), divide_up(m, kernel.rows)};
  return {part, part, room_bytes(shape, kernel.type)};
}

template <class C>
constexpr Kernel row(const char* name) {
  return {name, C::kType, C::kRows, C::kRank, C::kWarps, C::kStages, forced, run<C>};
}

// At most 99 KiB a block, which is what a multiprocessor of 8.6 and 8.9 has; two blocks of 64 rows have room on one of
// 8.0, three on one of 9.0.
#define KERNELS(type, prefix)                                                                                 \
  row<Config<type, 64, 64, 4, 4, 3>>(prefix "_64x64"), row<Config<type, 128, 64, 4, 4, 2>>(prefix "_128x64"), \
      row<Config<type, 64, 128, 2, 3, 3>>(prefix "_64x128"), row<Config<type, 128, 128, 4, 3, 1>>(prefix "_128x128")
constexpr Kernel kTable[kFusedKernels] = {KERNELS(Type::bfloat16, "fused_bf16"), KERNELS(Type::float16, "fused_f16")};
#undef KERNELS

// A multiprocessor computes its blocks one after the other or beside each other, which costs the same. Each 64
// positions are bound by the tensor cores (mma.sync on 9.0: less than wgmma), by what the L2 delivers
// (csrc/cuda/tiles.h) or, for a block alone, by how long x takes to come; all of them by the memory's bandwidth too.
double cycles(const Plan& plan, const Factors& shape, int64_t m, int arch, int multiprocessors) {
  const Kernel& kernel = *plan.down.kernel;
  const int64_t blocks = plan.down.blocks * plan.down.splits, rows = kernel.rows, channels = kernel.channels;
  const int64_t tiles = divide_up(divide_up(shape.n, channels), plan.down.splits);
  const double busy = static_cast<double>(std::min<int64_t>(blocks, multiprocessors));
  const double l2 = std::min(64.0, 32.0 * multiprocessors / busy);
  const double compute = static_cast<double>(rows * channels * kStep) / (arch >= 90 ? 1280 : 1024);
  const double wait = blocks <= multiprocessors ? 900.0 / (kernel.stages - 1) : 0;
  const double down = std::max({compute, wait, static_cast<double>((rows + channels) * kLine) / l2});
  const double up = std::max(compute, static_cast<double>(channels * kLine) / l2);
  const double block =
      static_cast<double>(divide_up(shape.k, kStep)) * down + static_cast<double>(tiles * (channels / kStep)) * up;
  const double all = static_cast<double>(divide_up(blocks, multiprocessors)) * block;
  const double bytes = 2.0 * static_cast<double>(m * (shape.k + shape.n) + shape.size());
  return kLaunch + convert_cycles(shape, kernel.type, multiprocessors) +
         std::max(all, memory_cycles(bytes, multiprocessors));
}

}  // namespace

std::array<const Kernel*, kFusedKernels> kernels_fused() {
  std::array<const Kernel*, kFusedKernels> all{};
  for (int i = 0; i < kFusedKernels; ++i) all[i] = &kTable[i];
  return all;
}

Priced price_fused(const Factors& shape, Type type, int64_t m, int arch, int multiprocessors) {
  Priced best{{}, 1e300};
  for (const Kernel& kernel : kTable) {
    if (kernel.type != type || kernel.channels != shape.rank_pad()) continue;
    for (int splits = 1; splits <= kMaxSplits; ++splits) {
      const Plan here = forced(kernel, shape, m, splits);
      const double costs = cycles(here, shape, m, arch, multiprocessors);
      if (costs < best.cycles) best = {here, costs};
    }
  }
  return best;
}

}  // namespace pycompress::low_rank::cuda
