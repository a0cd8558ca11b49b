// int8 GEMM by mma.sync, for compute capability 8.0 and all later ones.
//
// A block computes a tile of y. Its operands come through a ring of stages in shared memory, filled by cp.async kStages
// - 1 blocks of k ahead; each warp computes a part of the tile in registers, and loads the fragments of the next 32
// positions of k while the tensor cores work on the present ones. The sums then pass through shared memory, so that y
// is written in whole lines.
//
// Floor: bm * bn products a byte of k at 2048 a cycle and multiprocessor (A100) beside bm + bn bytes read.
#include <array>

#include "../common/check.h"
#include "../cuda/launch.h"
#include "cuda_kernel_list.h"
#include "epilogue.cuh"
#include "tiles.h"

namespace pycompress::int8::cuda {
namespace {

struct Operands {
  const int8_t* rows;      // [m][k_pad]
  const int8_t* channels;  // [n_pad][k_pad]
  int64_t m, n_pad, k_pad;
  int64_t tiles_m, tiles_n;
};

template <int kBm_, int kBn_, int kBk_, int kStages_, int kWarpsM_, int kWarpsN_>
struct Tile {
  static constexpr int kBm = kBm_, kBn = kBn_, kBk = kBk_, kStages = kStages_;
  static constexpr int kWarpsM = kWarpsM_, kWarpsN = kWarpsN_, kThreads = 32 * kWarpsM * kWarpsN;
  static constexpr int kWm = kBm / kWarpsM, kWn = kBn / kWarpsN;  // a warp's part
  static constexpr int kMt = kWm / 16, kNt = kWn / 8;             // in tiles of one mma
  static constexpr int kSteps = kBk / 32;
  static constexpr int kStageBytes = (kBm + kBn) * kBk;
  static constexpr int kShared = kStages * kStageBytes;
  // The sums of 16 rows of a warp; rows 8 words longer, so that the lanes of a store meet in no bank.
  static constexpr int kStagedRow = kWn + 8;
  static_assert(kWm % 16 == 0 && kWn % 16 == 0 && kSteps % 2 == 0 && kStages >= 2);
  static_assert(kWarpsM * kWarpsN * 16 * kStagedRow * 4 <= kShared);
};

// The threads' share of copying kRows rows of an operand into a stage.
template <class T, int kRows>
class Copier {
 public:
  __device__ Copier(const int8_t* operand, int64_t first, int64_t rows, int64_t k_pad)
      : k_(chunk() * 16), k_pad_(static_cast<int>(k_pad)) {
    const int64_t left = rows - first - row();  // may be none
    left_ = left < 0 ? 0 : left < kRows ? static_cast<int>(left) : kRows;
    // A thread that has no row reads nothing, but from an address that exists.
    from_ = operand + (left_ > 0 ? (first + row()) * k_pad : 0);
  }

  // The next block of k; behind the last one come zeros.
  __device__ void copy(uint8_t* stage) {
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const bool inside = i * kRowStep < left_ && k_ < k_pad_;
      const int8_t* from = inside ? from_ + static_cast<int64_t>(i * kRowStep) * k_pad_ + k_ : from_;
      gpu::copy_async(stage + swizzled<T::kBk>(row() + i * kRowStep, chunk()), from, inside ? 16 : 0);
    }
    k_ += T::kBk;
  }

 private:
  static constexpr int kChunks = T::kBk / 16, kRowStep = T::kThreads / kChunks, kEach = kRows / kRowStep;
  static_assert(kRows % kRowStep == 0);

  __device__ static int row() { return static_cast<int>(threadIdx.x) / kChunks; }
  __device__ static int chunk() { return static_cast<int>(threadIdx.x) % kChunks; }

  const int8_t* from_;
  int left_;  // rows from this thread's first one to the end
  int k_;
  const int k_pad_;
};

// One step's operands of a warp.
template <class T>
struct Fragments {
  uint32_t rows[T::kMt][4];
  uint32_t channels[T::kNt / 2][4];

  __device__ void load(const uint8_t* stage, int warp_m, int warp_n, int step) {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    const Chunk a = chunk_of_rows(lane), b = chunk_of_channels(lane);
#pragma unroll
    for (int i = 0; i < T::kMt; ++i)
      gpu::load_matrices(rows[i], stage + swizzled<T::kBk>(warp_m * T::kWm + i * 16 + a.row, 2 * step + a.chunk));
    const uint8_t* weights = stage + T::kBm * T::kBk;
#pragma unroll
    for (int i = 0; i < T::kNt / 2; ++i)
      gpu::load_matrices(channels[i], weights + swizzled<T::kBk>(warp_n * T::kWn + i * 16 + b.row, 2 * step + b.chunk));
  }
};

template <class T>
using Sums = int32_t[T::kMt][T::kNt][4];

template <class T>
__device__ inline void multiply(Sums<T>& sums, const Fragments<T>& f) {
#pragma unroll
  for (int i = 0; i < T::kMt; ++i)
#pragma unroll
    for (int j = 0; j < T::kNt; ++j)
      gpu::mma_s8(sums[i][j], f.rows[i], f.channels[j / 2][j % 2 * 2], f.channels[j / 2][j % 2 * 2 + 1]);
}

// Sums -> y, 16 rows at a time through the warp's own part of shared memory.
template <class T>
__device__ inline void write(const Sums<T>& sums, const Output& out, int64_t m, int64_t n, int32_t* staged) {
  constexpr int kVectors = T::kWn / kLanes, kRowStep = 32 / kVectors;
  const int lane = static_cast<int>(threadIdx.x) % 32, group = lane / 4, pair = lane % 4 * 2;
  const int row = lane / kVectors, column = lane % kVectors * kLanes;
  const Columns columns(out, n + column);
#pragma unroll
  for (int i = 0; i < T::kMt; ++i) {
#pragma unroll
    for (int j = 0; j < T::kNt; ++j)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        int32_t* at = staged + (group + half * 8) * T::kStagedRow + j * 8 + pair;
        *reinterpret_cast<int2*>(at) = make_int2(sums[i][j][half * 2], sums[i][j][half * 2 + 1]);
      }
    __syncwarp();
#pragma unroll 1
    for (int r = row; r < 16; r += kRowStep) {
      const int64_t at = m + i * 16 + r;
      if (at >= out.m || n + column >= out.n) continue;
      const int4 four = *reinterpret_cast<const int4*>(staged + r * T::kStagedRow + column);
      const int32_t products[kLanes] = {four.x, four.y, four.z, four.w};
      finish(out, products, columns, row_at(out, at), at, n + column);
    }
    __syncwarp();
  }
}

template <class T>
__global__ void __launch_bounds__(T::kThreads, 1) int8_gemm_sm80(Operands in, Output out) {
  uint8_t* shared = gpu::dynamic_shared();
  const Position tile = tile_at(blockIdx.x, in.tiles_m, in.tiles_n);
  const int64_t m = tile.m * T::kBm, n = tile.n * T::kBn;
  const int warp = static_cast<int>(threadIdx.x) / 32, warp_m = warp / T::kWarpsN, warp_n = warp % T::kWarpsN;
  const int blocks = static_cast<int>((in.k_pad + T::kBk - 1) / T::kBk);

  Copier<T, T::kBm> rows(in.rows, m, in.m, in.k_pad);
  Copier<T, T::kBn> channels(in.channels, n, in.n_pad, in.k_pad);
  int filled = 0;
  const auto fill = [&] {
    uint8_t* stage = shared + filled * T::kStageBytes;
    rows.copy(stage);
    channels.copy(stage + T::kBm * T::kBk);
    gpu::commit_copies();
    filled = filled + 1 == T::kStages ? 0 : filled + 1;
  };
#pragma unroll
  for (int i = 0; i < T::kStages - 1; ++i) fill();

  Sums<T> sums = {};
  Fragments<T> fragments[2];
  gpu::wait_copies<T::kStages - 2>();
  __syncthreads();
  const uint8_t* stage = shared;
  fragments[0].load(stage, warp_m, warp_n, 0);
  for (int block = 0; block < blocks; ++block) {
#pragma unroll
    for (int step = 0; step < T::kSteps; ++step) {
      if (step + 1 == T::kSteps) {  // the next stage is there, and everybody has read this one
        gpu::wait_copies<T::kStages - 2>();
        __syncthreads();
        stage = stage + T::kStageBytes == shared + T::kShared ? shared : stage + T::kStageBytes;
      }
      fragments[(step + 1) % 2].load(stage, warp_m, warp_n, (step + 1) % T::kSteps);
      if (step == 0) fill();  // into the stage that everybody had read by the end of the block before
      multiply<T>(sums, fragments[step % 2]);
    }
  }
  gpu::wait_copies<0>();
  __syncthreads();
  write<T>(sums, out, m + warp_m * T::kWm, n + warp_n * T::kWn,
           reinterpret_cast<int32_t*>(shared) + warp * 16 * T::kStagedRow);
}

template <class T>
void run(const Problem& p) {
  const PackedShape shape{p.n, p.k};
  const int64_t tiles_m = divide_up(p.m, T::kBm), tiles_n = divide_up(p.n, T::kBn);
  check(tiles_m * tiles_n <= 0x7fffffff, "int8_linear: x has ", p.m, " rows, more than one launch can take");
  const auto* channels = reinterpret_cast<const int8_t*>(p.packed + shape.weights());
  const Operands in{p.rows.s, channels, p.m, shape.n_pad(), shape.k_pad(), tiles_m, tiles_n};
  const gpu::Launch at{dim3(static_cast<unsigned>(tiles_m * tiles_n)), dim3(T::kThreads), T::kShared, p.stream};
  gpu::launch<int8_gemm_sm80<T>>("int8_gemm_sm80", at, in, output_of(p));
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
