// int8 GEMM of compute capability 9.0: wgmma on tiles that the tensor memory accelerator brings.
//
// A block is there for the whole launch and computes one tile of y after the other. One thread fills a ring of stages,
// each 128 bytes of k of the tile's rows and channels; two warp groups multiply, a half of the tile each, with one
// stage's products under way while they wait for the next. The producer runs ahead through the epilogue into the next
// tile. Two blocks that lie above each other may form a cluster: both need the same channels, each fetches half of them
// for both, because what limits large tiles is the L2 (48 bytes a cycle and multiprocessor for 128 x 256, 32 in
// clusters, of some 30 that it delivers).
//
// The phases of a stage, of which `full` and `empty` are the mbarriers:
//   the producer waits until all consumers of the cluster have left it (empty), announces its bytes and starts the
//   copies; these arrive at full, in each block that gets them; the consumers wait there, issue their products, and
//   leave the stage when the products of the next one are issued and those of this one are done.
//
// Floor: bm * bn products a byte of k at 4096 a cycle and multiprocessor.
#include <algorithm>
#include <array>
#include <cstring>

#include "../common/check.h"
#include "../common/round.h"
#include "../cuda/hopper.cuh"
#include "../cuda/launch.h"
#include "cuda_kernel_list.h"
#include "epilogue.cuh"
#include "tiles.h"

namespace pycompress::int8::cuda {
namespace {

constexpr int kBk = 128, kGroup = 128, kGroups = 2, kWarps = kGroups * 4;  // threads of a warp group; consumers
// Of the 65536 registers, a producer thread needs few. The launch gives each thread 168.
constexpr int kProducerRegisters = 40, kConsumerRegisters = 232;

struct Work {
  int64_t count, m, n;  // tiles of clusters: in all, above each other, beside each other
  int blocks;           // of k
};

template <int kBm_, int kBn_, int kStages_, int kCluster_>
struct Tile {
  static constexpr int kBm = kBm_, kBn = kBn_, kStages = kStages_, kCluster = kCluster_;
  static constexpr int kThreads = (kGroups + 1) * kGroup;
  // The groups halve the rows, or the channels where there are only 64 rows.
  static constexpr int kGroupsM = kBm / 64, kGroupsN = kGroups / kGroupsM, kWn = kBn / kGroupsN;
  static constexpr int kStageBytes = (kBm + kBn) * kBk;
  // Behind the stages: where each warp turns 16 rows of 32 sums (rows 8 words longer, so that the lanes of a store meet
  // in no bank), and the barriers.
  static constexpr int kStagedColumns = 32, kStagedRow = kStagedColumns + 8, kStagedBytes = 16 * kStagedRow * 4;
  static constexpr int kBarriers = kStages * kStageBytes + kWarps * kStagedBytes;
  static constexpr int kShared = kBarriers + 2 * kStages * 8;
  static_assert(kGroupsM * kGroupsN == kGroups && kWn % kStagedColumns == 0 && kStages >= 2);
  static_assert(kShared <= 227 * 1024 && kBn / kCluster % 8 == 0);
};

// A place in the ring: the stage, and the parity of its present round.
template <class T>
struct Place {
  int stage = 0;
  uint32_t parity = 0;
  __device__ void advance() {
    if (++stage < T::kStages) return;
    stage = 0;
    parity ^= 1;
  }
};

template <class T>
struct Ring {
  uint8_t* const stages;
  uint64_t *const full, *const empty;

  __device__ explicit Ring(uint8_t* shared)
      : stages(shared),
        full(reinterpret_cast<uint64_t*>(shared + T::kBarriers)),
        empty(reinterpret_cast<uint64_t*>(shared + T::kBarriers) + T::kStages) {}

  __device__ void init() const {
    for (int i = 0; i < T::kStages; ++i) {
      gpu::init_barrier(full + i, 1);
      gpu::init_barrier(empty + i, kWarps * T::kCluster);
    }
    gpu::publish_barriers();
  }
  __device__ uint8_t* rows(int stage) const { return stages + stage * T::kStageBytes; }
  __device__ uint8_t* channels(int stage) const { return rows(stage) + T::kBm * kBk; }
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
__device__ inline void produce(const Ring<T>& ring, const gpu::TensorMap& rows, const gpu::TensorMap& channels,
                               const Work& work, uint32_t rank) {
  constexpr int kShare = T::kBn / T::kCluster;  // of the channels, for all blocks of the cluster
  const auto share = static_cast<int>(rank) * kShare;
  Place<T> at;
  for_each_tile<T>(work, rank, [&](int64_t m, int64_t n) {
    for (int block = 0; block < work.blocks; ++block, at.advance()) {
      uint64_t* full = ring.full + at.stage;
      uint8_t* to = ring.channels(at.stage) + share * kBk;
      gpu::wait(ring.empty + at.stage, at.parity ^ 1);
      gpu::arrive_expecting(full, T::kStageBytes);
      gpu::load_tile(ring.rows(at.stage), rows, block * kBk, static_cast<int>(m), full);
      if constexpr (T::kCluster == 1)
        gpu::load_tile(to, channels, block * kBk, static_cast<int>(n), full);
      else
        gpu::load_tile_for((1 << T::kCluster) - 1, to, channels, block * kBk, static_cast<int>(n) + share, full);
    }
  });
}

template <class T>
using Sums = int32_t[T::kWn / 2];

// The sums of a group over all of k.
template <class T>
__device__ inline void multiply(Sums<T>& sums, const Ring<T>& ring, Place<T>& at, int group, int blocks) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const uint64_t rows = gpu::descriptor(ring.rows(0) + (T::kGroupsM == 1 ? 0 : group) * 64 * kBk);
  const uint64_t channels = gpu::descriptor(ring.channels(0) + (T::kGroupsN == 1 ? 0 : group) * T::kWn * kBk);
  const auto leave = [&](int stage) {  // once a warp, at every block that copies into it
    if (lane >= T::kCluster) return;
    if constexpr (T::kCluster == 1)
      gpu::arrive(ring.empty + stage);
    else
      gpu::arrive_at(ring.empty + stage, static_cast<uint32_t>(lane));
  };
  int before = 0;
  for (int block = 0; block < blocks; ++block, at.advance()) {
    const auto offset = static_cast<uint64_t>(at.stage * (T::kStageBytes >> 4));
    gpu::wait(ring.full + at.stage, at.parity);
    gpu::begin_products();
#pragma unroll
    for (int step = 0; step < kBk / 32; ++step) {
      const uint64_t along = offset + step * gpu::kNextK;
      gpu::multiply(sums, rows + along, channels + along, block > 0 || step > 0);
    }
    gpu::commit_products();
    gpu::wait_products<1>();
    if (block > 0) leave(before);
    before = at.stage;
  }
  gpu::wait_products<0>();
  gpu::receive_products(sums);
  leave(before);
}

// Columns [32 piece, 32 piece + 32) of a warp's 16 rows into its part of shared memory.
template <class T>
__device__ inline void stage(const Sums<T>& sums, int piece, int32_t* staged) {
  const int lane = static_cast<int>(threadIdx.x) % 32, row = lane / 4, pair = lane % 4 * 2;
#pragma unroll
  for (int all = 0; all < T::kWn / T::kStagedColumns; ++all) {  // so that each register is named
    if (all != piece) continue;
#pragma unroll
    for (int j = 0; j < T::kStagedColumns / 4; ++j) {
      const int i = all * T::kStagedColumns / 2 + j * 2;
      int32_t* to = staged + (row + j % 2 * 8) * T::kStagedRow + j / 2 * 8 + pair;
      *reinterpret_cast<int2*>(to) = make_int2(sums[i], sums[i + 1]);
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
template <class T>
struct Terms {
  Row rows[Part<T>::kRows];
  Columns first;  // of the first piece

  __device__ Terms(const Output& out, int64_t m, int64_t n) : first(out, n + Part<T>().column) {
#pragma unroll
    for (int i = 0; i < Part<T>::kRows; ++i) {
      const int64_t row = m + Part<T>().row + i * Part<T>::kRowStep;
      rows[i] = row < out.m ? row_at(out, row) : Row{0, 0};
    }
  }
};

// Four values that are all there, without an activation: what large layers need, as short as it can be.
template <Type kType>
__device__ inline void finish_plain(const Output& out, const int32_t (&products)[kLanes], const Columns& columns,
                                    const Row& row, uint8_t* y) {
  const Floats v = scaled(out, Corrected(products, columns, row), columns, row);
  if constexpr (kType == Type::float32) {
    *reinterpret_cast<float4*>(y) = make_float4(v.at[0], v.at[1], v.at[2], v.at[3]);
    return;
  }
  uint2 four;
  if constexpr (kType == Type::bfloat16) {
    const __nv_bfloat162 pairs[] = {__floats2bfloat162_rn(v.at[0], v.at[1]), __floats2bfloat162_rn(v.at[2], v.at[3])};
    std::memcpy(&four, pairs, sizeof(four));
  } else {
    const __half2 pairs[] = {__floats2half2_rn(v.at[0], v.at[1]), __floats2half2_rn(v.at[2], v.at[3])};
    std::memcpy(&four, pairs, sizeof(four));
  }
  *reinterpret_cast<uint2*>(y) = four;
}

// Rows [m, m + 16) of y, channels [n, n + kWn); kPlain: finish_plain() does, y is of kType.
template <class T, bool kPlain, Type kType>
__device__ inline void write(const Sums<T>& sums, const Output& out, int64_t m, int64_t n, const Terms<T>& terms,
                             int32_t* staged) {
  constexpr int64_t kSize = kType == Type::float32 ? 4 : 2;  // bytes of a value, where kPlain
  const Part<T> part;
  m += part.row;
  n += part.column;
  Columns next = terms.first;
#pragma unroll 1
  for (int piece = 0; piece < T::kWn / T::kStagedColumns; ++piece, n += T::kStagedColumns) {
    const Columns columns = next;
    next = Columns(out, n + T::kStagedColumns);  // while this piece is finished
    stage<T>(sums, piece, staged);
    __syncwarp();
#pragma unroll(kPlain ? Part<T>::kRows : 1)
    for (int i = 0; i < Part<T>::kRows; ++i) {
      const int64_t row = m + i * Part<T>::kRowStep;
      if (row >= out.m || n >= out.n) continue;
      const int at = (part.row + i * Part<T>::kRowStep) * T::kStagedRow + part.column;
      const int4 four = *reinterpret_cast<const int4*>(staged + at);
      const int32_t products[kLanes] = {four.x, four.y, four.z, four.w};
      if constexpr (kPlain)
        finish_plain<kType>(out, products, columns, terms.rows[i],
                            static_cast<uint8_t*>(out.y) + (row * out.n + n) * kSize);
      else
        finish(out, products, columns, row_at(out, row), row, n);
    }
    __syncwarp();
  }
}

template <class T>
__device__ inline void consume(const Ring<T>& ring, const Work& work, const Output& out, uint32_t rank) {
  const int warp = static_cast<int>(threadIdx.x) / 32 - kGroup / 32, group = warp / 4;
  const bool plain = out.vectors && out.activation == Activation::none;
  auto* staged = reinterpret_cast<int32_t*>(ring.stages + T::kStages * T::kStageBytes + warp * T::kStagedBytes);
  Sums<T> sums = {};
  Place<T> at;
  for_each_tile<T>(work, rank, [&](int64_t m, int64_t n) {
    m += (T::kGroupsM == 1 ? 0 : group) * 64 + warp % 4 * 16;
    n += (T::kGroupsN == 1 ? 0 : group) * T::kWn;
    const Terms<T> terms(out, m, n);
    multiply<T>(sums, ring, at, group, work.blocks);
    if (plain && out.type == Type::bfloat16)
      write<T, true, Type::bfloat16>(sums, out, m, n, terms, staged);
    else if (plain && out.type == Type::float16)
      write<T, true, Type::float16>(sums, out, m, n, terms, staged);
    else if (plain && out.type == Type::float32)
      write<T, true, Type::float32>(sums, out, m, n, terms, staged);
    else
      write<T, false, Type::int32>(sums, out, m, n, terms, staged);
  });
}

template <class T>
__global__ void __launch_bounds__(T::kThreads, 1)
    int8_gemm_sm90(const __grid_constant__ gpu::TensorMap rows, const __grid_constant__ gpu::TensorMap channels,
                   const __grid_constant__ Work work, const __grid_constant__ Output out) {
  const Ring<T> ring(gpu::dynamic_shared());
  const uint32_t rank = T::kCluster == 1 ? 0 : gpu::cluster_rank();
  if (threadIdx.x == 0) {
    gpu::prefetch(rows);
    gpu::prefetch(channels);
    ring.init();
  }
  if constexpr (T::kCluster == 1)
    __syncthreads();
  else
    gpu::synchronize_cluster();  // a peer copies and arrives here

  if (threadIdx.x < kGroup) {
    gpu::give_registers<kProducerRegisters>();
    if (threadIdx.x == 0) produce<T>(ring, rows, channels, work, rank);
  } else {
    gpu::take_registers<kConsumerRegisters>();
    consume<T>(ring, work, out, rank);
  }
  if constexpr (T::kCluster > 1) gpu::synchronize_cluster();  // a peer still arrives here
}

template <class T>
void run(const Problem& p) {
  const PackedShape shape{p.n, p.k};
  const auto* weights = p.packed + shape.weights();
  check(p.m <= 0x7fffffff - 1024 && p.n <= 0x7fffffff - 1024, "int8_linear: x has ", p.m, " rows, the weight ", p.n,
        ", expected at most 2^31 - 1025");
  check(reinterpret_cast<uintptr_t>(p.rows.s) % 16 == 0 && reinterpret_cast<uintptr_t>(weights) % 16 == 0,
        "int8_linear: the quantized rows or the packed weight are not aligned to 16 bytes");
  Work work{};
  work.m = divide_up(p.m, T::kBm * T::kCluster);
  work.n = divide_up(p.n, T::kBn);
  work.count = work.m * work.n;
  check(work.count <= 0x7fffffff, "int8_linear: y is [", p.m, ", ", p.n, "], more tiles than one launch can take");
  work.blocks = static_cast<int>(divide_up(shape.k_pad(), kBk));
  const int64_t clusters = std::min<int64_t>(work.count, gpu::device().multiprocessors / T::kCluster);
  const gpu::TensorMap rows = gpu::tensor_map(p.rows.s, p.m, shape.k_pad(), shape.k_pad(), T::kBm);
  const gpu::TensorMap channels =
      gpu::tensor_map(weights, shape.n_pad(), shape.k_pad(), shape.k_pad(), T::kBn / T::kCluster);
  const gpu::Launch at{dim3(static_cast<unsigned>(clusters * T::kCluster)), dim3(T::kThreads), T::kShared, p.stream};
  gpu::launch_clusters<int8_gemm_sm90<T>>("int8_gemm_sm90", T::kCluster, at, rows, channels, work, output_of(p));
}

template <class T>
constexpr Kernel kernel_of(const char* name) {
  return {name, 90, T::kBm, T::kBn, kBk, T::kStages, run<T>, T::kCluster};
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
