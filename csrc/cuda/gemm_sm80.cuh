// The GEMM by mma.sync, for compute capability 8.0 and all later ones: y = x w^T of int8 or of halves, whose fragments
// are alike in bytes. csrc/int8/gemm_sm80.cu and halves_sm80.cu have its kernels.
//
// A block computes a tile of y. Its operands come through a ring of stages in shared memory, filled by cp.async kStages
// - 1 blocks of k ahead; each warp computes a part of the tile in registers, and loads the fragments of the next 32
// bytes of k while the tensor cores work on the present ones. The sums then pass through shared memory, so that y is
// written in whole lines.
//
// Floor: bm * bn products a byte of k at 2048 a cycle and multiprocessor (A100) beside bm + bn bytes read.
#pragma once

#include "convert.cuh"
#include "device.cuh"
#include "gemm_epilogue.cuh"
#include "tiles.h"

namespace pycompress::gpu::sm80 {
namespace {

// An operand's rows; bytes along k.
struct Matrix {
  const void* data;      // aligned to 16 bytes
  int64_t rows, stride;  // the stride a multiple of 16
  int64_t bytes;
};

template <int kBm_, int kBn_, int kBk_, int kStages_, int kWarpsM_, int kWarpsN_>
struct Tile {
  static constexpr int kBm = kBm_, kBn = kBn_, kBk = kBk_, kStages = kStages_;  // kBk: bytes
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

// What is multiplied: c[16, 8] += a[16, 32 bytes] b[32 bytes, 8].
struct Int8 {
  using Sum = int32_t;
  __device__ static void multiply(int32_t (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    mma_s8(c, a, b0, b1);
  }
};
template <Type kType>
struct Halves {
  using Sum = float;
  __device__ static void multiply(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    if constexpr (kType == Type::float16)
      mma_f16(c, a, b0, b1);
    else
      mma_bf16(c, a, b0, b1);
  }
};

// float16 rows by bfloat16 channels, which become float16.
struct Float16ByBfloat16 {
  using Sum = float;
  __device__ static void multiply(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    mma_f16(c, a, converted<Type::float16>(b0), converted<Type::float16>(b1));
  }
};

// The threads' share of copying kRows rows of an operand, from row `first` on, into a stage: so many blocks into k,
// zeros behind its end. kWhole: its rows are whole chunks of 16 bytes.
template <class T, int kRows, bool kWhole>
__device__ inline void copy(uint8_t* stage, const Matrix& operand, int64_t first, int block) {
  constexpr int kChunks = T::kBk / 16, kRowStep = T::kThreads / kChunks, kEach = kRows / kRowStep;
  static_assert(kRows % kRowStep == 0);
  const int row = static_cast<int>(threadIdx.x) / kChunks, chunk = static_cast<int>(threadIdx.x) % kChunks;
  const int k = block * T::kBk + chunk * 16, left = static_cast<int>(operand.bytes) - k;
  const int there = left <= 0 ? 0 : kWhole || left > 16 ? 16 : left;
  const auto* from = static_cast<const uint8_t*>(operand.data) + (first + row) * operand.stride + k;
#pragma unroll
  for (int i = 0; i < kEach; ++i)  // where nothing is there, nothing is read from the address
    copy_async(stage + swizzled<T::kBk>(row + i * kRowStep, chunk), from + i * kRowStep * operand.stride,
               first + row + i * kRowStep < operand.rows ? there : 0);
}
template <class T, bool kWhole>
__device__ inline void copy_block(uint8_t* stage, const Matrix& rows, const Matrix& channels, int64_t m, int64_t n,
                                  int block) {
  copy<T, T::kBm, kWhole>(stage, rows, m, block);
  copy<T, T::kBn, true>(stage + T::kBm * T::kBk, channels, n, block);
}

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
      load_matrices(rows[i], stage + swizzled<T::kBk>(warp_m * T::kWm + i * 16 + a.row, 2 * step + a.chunk));
    const uint8_t* weights = stage + T::kBm * T::kBk;
#pragma unroll
    for (int i = 0; i < T::kNt / 2; ++i)
      load_matrices(channels[i], weights + swizzled<T::kBk>(warp_n * T::kWn + i * 16 + b.row, 2 * step + b.chunk));
  }
};

template <class T, class Sum>
using Sums = Sum[T::kMt][T::kNt][4];

template <class T, class Operand>
__device__ inline void multiply(Sums<T, typename Operand::Sum>& sums, const Fragments<T>& f) {
#pragma unroll
  for (int i = 0; i < T::kMt; ++i)
#pragma unroll
    for (int j = 0; j < T::kNt; ++j)
      Operand::multiply(sums[i][j], f.rows[i], f.channels[j / 2][j % 2 * 2], f.channels[j / 2][j % 2 * 2 + 1]);
}

// A block's way along k: products() of so many blocks, while fill(stage, block) starts the copies of those to come.
template <class T>
struct Pipeline {
  uint8_t* const shared;
  const int warp_m, warp_n;
  uint8_t* stage;
  Fragments<T> fragments[2];

  template <class Fill>
  __device__ Pipeline(uint8_t* shared_, Fill&& fill)
      : shared(shared_),
        warp_m(static_cast<int>(threadIdx.x) / 32 / T::kWarpsN),
        warp_n(static_cast<int>(threadIdx.x) / 32 % T::kWarpsN),
        stage(shared_) {
#pragma unroll
    for (int i = 0; i < T::kStages - 1; ++i) {
      fill(shared + i * T::kStageBytes, i);
      commit_copies();
    }
    wait_copies<T::kStages - 2>();
    __syncthreads();
    fragments[0].load(stage, warp_m, warp_n, 0);
  }

  template <class Operand, class Fill>
  __device__ void products(Sums<T, typename Operand::Sum>& sums, int blocks, Fill&& fill) {
    for (int block = 0; block < blocks; ++block) {
#pragma unroll
      for (int step = 0; step < T::kSteps; ++step) {
        if (step + 1 == T::kSteps) advance();
        fragments[(step + 1) % 2].load(stage, warp_m, warp_n, (step + 1) % T::kSteps);
        if (step == 0) fill_behind(block + T::kStages - 1, fill);
        multiply<T, Operand>(sums, fragments[step % 2]);
      }
    }
  }

  // Of blocks from `first` on, of few, which products() has gone up to: with half the registers for fragments.
  template <class Operand, class Fill>
  __device__ void more_products(Sums<T, typename Operand::Sum>& sums, int first, int blocks, Fill&& fill) {
#pragma unroll 1
    for (int block = 0; block < blocks; ++block) {
      fill_behind(first + block + T::kStages - 1, fill);
#pragma unroll 1
      for (int step = 0; step < T::kSteps; ++step) {
        fragments[0].load(stage, warp_m, warp_n, step);
        multiply<T, Operand>(sums, fragments[0]);
      }
      advance();
    }
  }

 private:
  // Into the stage before this one, which everybody had read by the end of the block before.
  template <class Fill>
  __device__ void fill_behind(int block, Fill& fill) {
    fill(stage == shared ? shared + T::kShared - T::kStageBytes : stage - T::kStageBytes, block);
    commit_copies();
  }
  // The next stage is there, and everybody has read this one.
  __device__ void advance() {
    wait_copies<T::kStages - 2>();
    __syncthreads();
    stage = stage + T::kStageBytes == shared + T::kShared ? shared : stage + T::kStageBytes;
  }
};

// Sums -> y, 16 rows at a time through the warp's own part of shared memory, of which the block has no other use any
// more. m, n: of the block's tile.
template <class T, class Output>
__device__ inline void write(const Sums<T, typename Output::Sum>& sums, const Output& out, int64_t m, int64_t n,
                             uint8_t* shared) {
  constexpr int kVectors = T::kWn / kLanes, kRowStep = 32 / kVectors;
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  const int group = lane / 4, pair = lane % 4 * 2, row = lane / kVectors, column = lane % kVectors * kLanes;
  auto* staged = reinterpret_cast<typename Output::Sum*>(shared) + warp * 16 * T::kStagedRow;
  m += warp / T::kWarpsN * T::kWm;
  n += warp % T::kWarpsN * T::kWn;
  const typename Output::Columns columns(out, n + column);
#pragma unroll
  for (int i = 0; i < T::kMt; ++i) {
#pragma unroll
    for (int j = 0; j < T::kNt; ++j)
#pragma unroll
      for (int half = 0; half < 2; ++half)
        put_pair(staged + (group + half * 8) * T::kStagedRow + j * 8 + pair, sums[i][j][half * 2],
                 sums[i][j][half * 2 + 1]);
    __syncwarp();
#pragma unroll 1
    for (int r = row; r < 16; r += kRowStep) {
      const int64_t at = m + i * 16 + r;
      if (at >= out.m || n + column >= out.n) continue;
      typename Output::Sum four[kLanes];
      take_four(four, staged + r * T::kStagedRow + column);
      finish(out, four, columns, row_at(out, at), at, n + column);
    }
    __syncwarp();
  }
}

// How many blocks of k a matrix has.
template <class T>
__device__ inline int blocks_of(const Matrix& matrix) {
  return static_cast<int>((matrix.bytes + T::kBk - 1) / T::kBk);
}

// The tile of y that a block computes. kWhole: that of x's rows.
template <class T, class Operand, bool kWhole, class Output>
__device__ inline void compute(const Matrix& rows, const Matrix& channels, const Position& tile, const Output& out) {
  uint8_t* shared = dynamic_shared();
  const int64_t m = tile.m * T::kBm, n = tile.n * T::kBn;
  const auto fill = [&](uint8_t* stage, int block) { copy_block<T, kWhole>(stage, rows, channels, m, n, block); };
  Pipeline<T> pipeline(shared, fill);
  Sums<T, typename Operand::Sum> sums = {};
  pipeline.template products<Operand>(sums, blocks_of<T>(rows), fill);
  wait_copies<0>();
  __syncthreads();
  write<T>(sums, out, m, n, shared);
}

}  // namespace
}  // namespace pycompress::gpu::sm80
