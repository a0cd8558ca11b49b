// The GEMM of compute capability 9.0: wgmma on tiles that the tensor memory accelerator brings, y = x w^T of int8 or of
// halves. csrc/int8/gemm_sm90.cu and halves_sm90.cu have its kernels.
//
// A block is there for the whole launch and computes one tile of y after the other. One thread fills a ring of stages
// (ring.cuh), each 128 bytes of k of the tile's rows and channels; two warp groups multiply, a half of the tile each,
// with one stage's products under way while they wait for the next: they leave a stage when the products of the next
// one are issued and those of this one are done. The producer runs ahead through the epilogue into the next tile. Two
// blocks that lie above each other may form a cluster: both need the same channels, each fetches half of them for both,
// because what limits large tiles is the L2 (48 bytes a cycle and multiprocessor for 128 x 256, 32 in clusters, of some
// 30 that it delivers).
//
// Floor: bm * bn products a byte of k at 4096 a cycle and multiprocessor.
#pragma once

#include <algorithm>

#include "../common/check.h"
#include "../common/round.h"
#include "convert.cuh"
#include "gemm_epilogue.cuh"
#include "ring.cuh"
#include "tiles.h"

namespace pycompress::gpu::sm90 {
namespace {

constexpr int kBk = 128;  // bytes

struct Work {
  int64_t count, m, n;  // tiles of clusters: in all, above each other, beside each other
  int blocks;           // of k
};

template <int kBm_, int kBn_, int kStages_, int kCluster_>
struct Tile {
  static constexpr int kBm = kBm_, kBn = kBn_, kStages = kStages_, kCluster = kCluster_;
  // The groups halve the rows, or the channels where there are only 64 rows.
  static constexpr int kGroupsM = kBm / 64, kGroupsN = kConsumerGroups / kGroupsM, kWn = kBn / kGroupsN;
  using Ring = gpu::Ring<kStages, (kBm + kBn) * kBk>;
  using Place = gpu::Place<kStages>;
  // Behind the stages: where each warp turns 16 rows of 32 sums (rows 8 words longer, so that the lanes of a store meet
  // in no bank), and the barriers.
  static constexpr int kStagedColumns = 32, kStagedRow = kStagedColumns + 8, kStagedBytes = 16 * kStagedRow * 4;
  static constexpr int kBarriers = Ring::kBytes + kConsumerWarps * kStagedBytes;
  static constexpr int kShared = kBarriers + Ring::kBarrierBytes;
  static_assert(kGroupsM * kGroupsN == kConsumerGroups && kWn % kStagedColumns == 0);
  static_assert(kShared <= kMaxRingShared && kBn / kCluster % 8 == 0);
};

// What is multiplied: d[64, 2 kCount] (+)= a[64, 32 bytes] b[2 kCount, 32 bytes]^T; prepare<kBytes>() is called by all
// consumers for the channels of a stage that has come.
struct AsItComes {
  template <int kBytes>
  __device__ static void prepare(uint8_t*) {}
};
struct Int8 : AsItComes {
  using Sum = int32_t;
  template <int kCount>
  __device__ static void multiply(int32_t (&d)[kCount], uint64_t a, uint64_t b, bool accumulate) {
    gpu::multiply(d, a, b, accumulate);
  }
};
template <Type kType>
struct Halves : AsItComes {
  using Sum = float;
  template <int kCount>
  __device__ static void multiply(float (&d)[kCount], uint64_t a, uint64_t b, bool accumulate) {
    if constexpr (kType == Type::float16)
      multiply_f16(d, a, b, accumulate);
    else
      multiply_bf16(d, a, b, accumulate);
  }
};

// float16 rows by bfloat16 channels, which become float16 where they lie.
struct Float16ByBfloat16 : Halves<Type::float16> {
  template <int kBytes>
  __device__ static void prepare(uint8_t* channels) {
    constexpr int kThreads = kConsumerGroups * kGroupThreads;
    const int thread = static_cast<int>(threadIdx.x) - kGroupThreads;
    auto* words = reinterpret_cast<uint4*>(channels);
    for (int i = thread; i < kBytes / 16; i += kThreads) {
      const uint4 four = words[i];
      words[i] = make_uint4(converted<Type::float16>(four.x), converted<Type::float16>(four.y),
                            converted<Type::float16>(four.z), converted<Type::float16>(four.w));
    }
    publish_shared();
    synchronize(1, kThreads);
  }
};

// Tiles of the cluster in order; `rank` is that of the block in it.
template <class T, class F>
__device__ inline void for_each_tile(const Work& work, uint32_t rank, F&& f) {
  for (int64_t i = blockIdx.x / T::kCluster; i < work.count; i += gridDim.x / T::kCluster) {
    const Position tile = tile_at(i, work.m, work.n);
    f((tile.m * T::kCluster + rank) * T::kBm, tile.n * T::kBn);
  }
}

template <class T>
__device__ inline uint8_t* channels_of(const typename T::Ring& ring, int stage) {
  return ring.stage(stage) + T::kBm * kBk;
}

// `blocks` blocks of k of two matrices, for the tile that begins at m, n.
template <class T>
__device__ inline void fill(const typename T::Ring& ring, typename T::Place& at, const TensorMap& rows,
                            const TensorMap& channels, int blocks, int64_t m, int64_t n, uint32_t rank) {
  constexpr int kShare = T::kBn / T::kCluster;  // of the channels, for all blocks of the cluster
  const auto share = static_cast<int>(rank) * kShare;
  for (int block = 0; block < blocks; ++block, at.advance()) {
    uint64_t* full = ring.claim(at);
    uint8_t* to = channels_of<T>(ring, at.stage) + share * kBk;
    load_tile(ring.stage(at.stage), rows, block * kBk, static_cast<int>(m), full);
    if constexpr (T::kCluster == 1)
      load_tile(to, channels, block * kBk, static_cast<int>(n), full);
    else
      load_tile_for((1 << T::kCluster) - 1, to, channels, block * kBk, static_cast<int>(n) + share, full);
  }
}

template <class T, class Sum>
using Sums = Sum[T::kWn / 2];

// Descriptors of a group's part of the operands, `step` times 32 bytes of k into a stage.
template <class T>
struct Operands {
  const uint64_t first_row, first_channel;

  __device__ Operands(const typename T::Ring& ring, int group)
      : first_row(descriptor(ring.stage(0) + (T::kGroupsM == 1 ? 0 : group) * 64 * kBk)),
        first_channel(descriptor(channels_of<T>(ring, 0) + (T::kGroupsN == 1 ? 0 : group) * T::kWn * kBk)) {}
  __device__ uint64_t rows(const typename T::Place& at, int step) const { return first_row + along(at, step); }
  __device__ uint64_t channels(const typename T::Place& at, int step) const { return first_channel + along(at, step); }

 private:
  __device__ static uint64_t along(const typename T::Place& at, int step) {
    return static_cast<uint64_t>(at.stage * (T::Ring::kStageBytes >> 4)) + step * kNextK;
  }
};

// The sums of a group over `blocks` blocks of k.
template <class T, class Operand>
__device__ inline void multiply(Sums<T, typename Operand::Sum>& sums, const typename T::Ring& ring,
                                typename T::Place& at, int group, int blocks) {
  const Operands<T> operands(ring, group);
  int before = 0;
  for (int block = 0; block < blocks; ++block, at.advance()) {
    wait(ring.full + at.stage, at.parity);
    begin_products();
#pragma unroll
    for (int step = 0; step < kBk / 32; ++step)
      Operand::multiply(sums, operands.rows(at, step), operands.channels(at, step), block > 0 || step > 0);
    commit_products();
    wait_products<1>();
    if (block > 0) ring.template leave<T::kCluster>(before);
    before = at.stage;
  }
  wait_products<0>();
  receive_products(sums);
  ring.template leave<T::kCluster>(before);
}

// Adds to the sums what `steps` times 32 bytes of k give.
template <class T, class Operand>
__device__ inline void multiply_more(Sums<T, typename Operand::Sum>& sums, const typename T::Ring& ring,
                                     typename T::Place& at, int group, int steps) {
  const Operands<T> operands(ring, group);
  for (; steps > 0; steps -= kBk / 32, at.advance()) {
    wait(ring.full + at.stage, at.parity);
    Operand::template prepare<T::kBn * kBk>(channels_of<T>(ring, at.stage));
    begin_products();
    for (int step = 0; step < kBk / 32 && step < steps; ++step)
      Operand::multiply(sums, operands.rows(at, step), operands.channels(at, step), true);
    commit_products();
    wait_products<0>();
    receive_products(sums);
    ring.template leave<T::kCluster>(at.stage);
  }
}

// Columns [32 piece, 32 piece + 32) of a warp's 16 rows into its part of shared memory.
template <class T, class Sum>
__device__ inline void stage(const Sums<T, Sum>& sums, int piece, Sum* staged) {
  const int lane = static_cast<int>(threadIdx.x) % 32, row = lane / 4, pair = lane % 4 * 2;
#pragma unroll
  for (int all = 0; all < T::kWn / T::kStagedColumns; ++all) {  // so that each register is named
    if (all != piece) continue;
#pragma unroll
    for (int j = 0; j < T::kStagedColumns / 4; ++j) {
      const int i = all * T::kStagedColumns / 2 + j * 2;
      put_pair(staged + (row + j % 2 * 8) * T::kStagedRow + j / 2 * 8 + pair, sums[i], sums[i + 1]);
    }
  }
}

// Where a lane's part of a piece lies: four columns, in each kRowStep-th of the 16 rows.
template <class T>
struct Part {
  static constexpr int kVectors = T::kStagedColumns / kLanes, kRowStep = 32 / kVectors, kRows = 16 / kRowStep;
  const int row = static_cast<int>(threadIdx.x) % 32 / kVectors;
  const int column = static_cast<int>(threadIdx.x) % kVectors * kLanes;
};

// What the epilogue needs to know; read before the products, so that it has come when they are done.
template <class T, class Output>
struct Terms {
  typename Output::Row rows[Part<T>::kRows];
  typename Output::Columns first;  // of the first piece

  __device__ Terms(const Output& out, int64_t m, int64_t n) : first(out, n + Part<T>().column) {
#pragma unroll
    for (int i = 0; i < Part<T>::kRows; ++i) {
      const int64_t row = m + Part<T>().row + i * Part<T>::kRowStep;
      if (row < out.m)
        rows[i] = row_at(out, row);
      else
        rows[i] = {};
    }
  }
};

// Rows [m, m + 16) of y, channels [n, n + kWn); kPlain: finish_plain() does, y is of kType.
template <class T, bool kPlain, Type kType, class Output>
__device__ inline void write_as(const Sums<T, typename Output::Sum>& sums, const Output& out, int64_t m, int64_t n,
                                const Terms<T, Output>& terms, typename Output::Sum* staged) {
  const Part<T> part;
  m += part.row;
  n += part.column;
  typename Output::Columns next = terms.first;
#pragma unroll 1
  for (int piece = 0; piece < T::kWn / T::kStagedColumns; ++piece, n += T::kStagedColumns) {
    const typename Output::Columns columns = next;
    next = typename Output::Columns(out, n + T::kStagedColumns);  // while this piece is finished
    stage<T>(sums, piece, staged);
    __syncwarp();
#pragma unroll(kPlain ? Part<T>::kRows : 1)
    for (int i = 0; i < Part<T>::kRows; ++i) {
      const int64_t row = m + i * Part<T>::kRowStep;
      if (row >= out.m || n >= out.n) continue;
      typename Output::Sum four[kLanes];
      take_four(four, staged + (part.row + i * Part<T>::kRowStep) * T::kStagedRow + part.column);
      if constexpr (kPlain)
        finish_plain<kType>(out, four, columns, terms.rows[i], row, n);
      else
        finish(out, four, columns, row_at(out, row), row, n);
    }
    __syncwarp();
  }
}

template <class T, class Output>
__device__ inline void write(const Sums<T, typename Output::Sum>& sums, const Output& out, int64_t m, int64_t n,
                             const Terms<T, Output>& terms, uint8_t* shared) {
  auto* staged = reinterpret_cast<typename Output::Sum*>(shared);
  const bool plain = out.vectors && out.activation == Activation::none;
  if (plain && out.type == Type::bfloat16)
    write_as<T, true, Type::bfloat16>(sums, out, m, n, terms, staged);
  else if (plain && out.type == Type::float16)
    write_as<T, true, Type::float16>(sums, out, m, n, terms, staged);
  else if (plain && out.type == Type::float32)
    write_as<T, true, Type::float32>(sums, out, m, n, terms, staged);
  else
    write_as<T, false, Type::int32>(sums, out, m, n, terms, staged);
}

// Each tile of a consumer's warp: body(m, n, group, its shared memory for staging), m and n where its part begins.
template <class T, class F>
__device__ inline void for_each_part(const typename T::Ring& ring, const Work& work, uint32_t rank, F&& body) {
  const int warp = consumer_warp(), group = consumer_group();
  uint8_t* staged = ring.stages + T::Ring::kBytes + warp * T::kStagedBytes;
  for_each_tile<T>(work, rank, [&](int64_t m, int64_t n) {
    body(m + (T::kGroupsM == 1 ? 0 : group) * 64 + warp % 4 * 16, n + (T::kGroupsN == 1 ? 0 : group) * T::kWn, group,
         staged);
  });
}

// A block's whole run: the ring, then produce(ring, rank) and consume(ring, rank).
template <class T, class Produce, class Consume>
__device__ inline void run_block(Produce&& produce, Consume&& consume) {
  uint8_t* shared = dynamic_shared();
  const typename T::Ring ring(shared, shared + T::kBarriers);
  const uint32_t rank = T::kCluster == 1 ? 0 : cluster_rank();
  if (threadIdx.x == 0) ring.init(kConsumerWarps * T::kCluster);
  if constexpr (T::kCluster == 1)
    __syncthreads();
  else
    synchronize_cluster();  // a peer copies and arrives here
  split_groups([&] { produce(ring, rank); }, [&] { consume(ring, rank); });
  if constexpr (T::kCluster > 1) synchronize_cluster();  // a peer still arrives here
}

// All tiles of y that fall to a block.
template <class T, class Operand, class Output>
__device__ inline void compute(const TensorMap& rows, const TensorMap& channels, const Work& work, const Output& out) {
  if (threadIdx.x == 0) {
    prefetch(rows);
    prefetch(channels);
  }
  const auto produce = [&](const typename T::Ring& ring, uint32_t rank) {
    typename T::Place at;
    for_each_tile<T>(work, rank,
                     [&](int64_t m, int64_t n) { fill<T>(ring, at, rows, channels, work.blocks, m, n, rank); });
  };
  const auto consume = [&](const typename T::Ring& ring, uint32_t rank) {
    Sums<T, typename Operand::Sum> sums = {};
    typename T::Place at;
    for_each_part<T>(ring, work, rank, [&](int64_t m, int64_t n, int group, uint8_t* staged) {
      const Terms<T, Output> terms(out, m, n);
      multiply<T, Operand>(sums, ring, at, group, work.blocks);
      write<T>(sums, out, m, n, terms, staged);
    });
  };
  run_block<T>(produce, consume);
}

// The tiles of y [m, n], `bytes` of k.
template <class T>
inline Work work_of(const char* op, int64_t m, int64_t n, int64_t bytes) {
  check(m <= 0x7fffffff - 1024 && n <= 0x7fffffff - 1024, op, ": x has ", m, " rows, the weight ", n,
        ", expected at most 2^31 - 1025");
  Work work{};
  work.m = divide_up(m, T::kBm * T::kCluster);
  work.n = divide_up(n, T::kBn);
  work.count = work.m * work.n;
  check(work.count <= 0x7fffffff, op, ": y is [", m, ", ", n, "], more tiles than one launch can take");
  work.blocks = static_cast<int>(divide_up(bytes, kBk));
  return work;
}

template <class T, class Stream>
inline Launch launch_of(const Work& work, Stream stream) {
  const int64_t clusters = std::min<int64_t>(work.count, device().multiprocessors / T::kCluster);
  return {dim3(static_cast<unsigned>(clusters * T::kCluster)), dim3(kRingThreads), T::kShared, stream};
}

// An operand's tiles: all of a block's rows, or the cluster's share of its channels.
template <class T>
inline TensorMap rows_map(const void* rows, int64_t m, int64_t bytes, int64_t stride) {
  return tensor_map(rows, m, bytes, stride, T::kBm);
}
template <class T>
inline TensorMap channels_map(const void* channels, int64_t n, int64_t bytes, int64_t stride) {
  return tensor_map(channels, n, bytes, stride, T::kBn / T::kCluster);
}

}  // namespace
}  // namespace pycompress::gpu::sm90
