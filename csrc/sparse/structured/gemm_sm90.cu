// 2:4 products of compute capability 9.0: wgmma.sp on tiles that the tensor memory accelerator brings. y^T = W x^T: the
// two warp groups that multiply have 64 channels each, and all of the tile's rows of x (csrc/cuda/ring.cuh).
//
// A block is there for the whole launch and computes one tile of y after the other. Two blocks beside each other may
// form a cluster: both need the same rows of x, each fetches half of them for both. A stage is half a block of k (128
// bytes of x, 64 stored bytes a channel), so that several fit beside 256 rows; the metadata of a whole block come with
// its first half, into a ring of their own.
//
// The metadata are in registers that products under way still read. So a group waits for a block's products before it
// reads the metadata of the next; meanwhile those of the other group keep the tensor cores busy.
//
// Floor: a block of k (256 bytes of x) of 128 channels and bm rows takes of a multiprocessor
//   the tensor cores   4 bm cycles, half of what dense products take
//   shared memory      at 128 bytes a cycle. Each of the 8 products reads 2 KiB of values and 64 bm bytes of x: the
//   rows
//                      alone, which both groups read, take 4 bm; in all it is 4.5 bm for 256 rows, 5 bm for 128, 6 bm
//                      for 64. Copies write 16 KiB of values, 2 KiB of metadata (int8: 4) and 256 bm bytes into the
//                      same memory, 2.6 bm more for 256 rows
//   the L2             those bytes at some 30 a cycle: 11 bm for 256 rows, 6.7 bm in clusters of two. x is dense and
//                      twice as wide as the stored channels, so it is x that the blocks of a cluster share
// So 128 x 256 in clusters of two is bound by shared memory and the L2 alike, 7 bm: at best 1.15 times as fast as dense
// products at the tensor cores' peak. More sums do not fit the registers, and 256 x 128 is bound no better: it copies
// less of x, but more of the values, and reads those more often.
#include <algorithm>
#include <array>
#include <type_traits>

#include "../../common/check.h"
#include "../../common/round.h"
#include "../../cuda/launch.h"
#include "../../cuda/ring.cuh"
#include "../../cuda/tiles.h"
#include "../epilogue.cuh"
#include "cuda.h"
#include "cuda_kernel_list.h"

namespace pycompress::sparse::cuda::structured {
namespace {

constexpr int kBn = 128;                         // channels of a tile; each warp group has kBlockN of them
constexpr int kInputRow = 128, kValuesRow = 64;  // bytes of a row of x and of a channel in a stage

struct Work {
  int64_t count, n, m;  // tiles of clusters: in all, of channels, of rows
  int blocks;           // of k
  int last;             // the channel at which the weight's last tile begins
};

template <Element kElementOf, int kBmOf, int kStagesOf, int kClusterOf>
struct Tile {
  static constexpr Element kElement = kElementOf;
  static constexpr int kBm = kBmOf, kStages = kStagesOf, kCluster = kClusterOf;
  static constexpr bool kInt8 = kElement == Element::int8;
  static constexpr int kValuesBytes = kBn * kValuesRow;
  // Of a block of metadata: a lane's words; the rows of 128 bytes that a group's are; the bytes of all groups.
  static constexpr int kWords = kInt8 ? 4 : 2, kMetadataRows = kWords * 4;
  static constexpr int kMetadataBytes = gpu::kConsumerGroups * kMetadataRows * 128;
  // They are read in the first half of their block, and the producer is at most kStages halves ahead.
  static constexpr int kSlots = (kStages + 1) / 2;
  // The tiles of 8 rows that the epilogue stages at once.
  static constexpr int kPiece = kInt8 && kBm == 256 ? 2 : 4;

  using Ring = gpu::Ring<kStages, kValuesBytes + kBm * kInputRow>;
  static constexpr int kMetadata = Ring::kBytes, kStaged = kMetadata + kSlots * kMetadataBytes;
  static constexpr int kBarriers = kStaged + gpu::kConsumerWarps * kStagedBytes<kPiece>;
  static constexpr int kShared = kBarriers + Ring::kBarrierBytes;
  static_assert(kShared <= gpu::kMaxRingShared && kBm / kCluster % 8 == 0);

  using Finish = cuda::Finish<kElement>;
  using Output = cuda::Output<kElement>;
  using Sums = typename Finish::Sum[kBm / 2];
};

// Where the producer, or a consumer, stands. Tiles have whole blocks, so that both rings go through all of them.
template <class T>
struct Cursor {
  gpu::Place<T::kStages> stage;
  gpu::Place<T::kSlots> slot;
};

// Tiles of the cluster in order; `rank` is that of the block in it.
template <class T, class F>
__device__ inline void for_each_tile(const Work& work, uint32_t rank, F&& f) {
  for (int64_t i = blockIdx.x / T::kCluster; i < work.count; i += gridDim.x / T::kCluster) {
    const gpu::Position tile = gpu::tile_at(i, work.n, work.m);
    f((tile.m * T::kCluster + rank) * kBn, tile.n * T::kBm);
  }
}

struct Maps {
  gpu::TensorMap values, metadata, rows;
};

template <class T>
__device__ inline void produce(const typename T::Ring& ring, uint8_t* metadata, const Maps& maps, const Work& work,
                               uint32_t rank) {
  constexpr int kShare = T::kBm / T::kCluster;  // of the rows, for all blocks of the cluster
  const auto share = static_cast<int>(rank) * kShare;
  Cursor<T> at;
  for_each_tile<T>(work, rank, [&](int64_t n, int64_t m) {
    // A block of the last cluster may have no channels: it does those of the tile before again, and writes none.
    const auto channel = static_cast<int>(n < work.last ? n : work.last), row = static_cast<int>(m) + share;
    for (int half = 0; half < 2 * work.blocks; ++half, at.stage.advance()) {
      uint8_t* stage = ring.stage(at.stage.stage);
      const bool first = half % 2 == 0;
      gpu::wait(ring.empty + at.stage.stage, at.stage.parity ^ 1);
      uint64_t* full = ring.full + at.stage.stage;
      gpu::arrive_expecting(full, T::Ring::kStageBytes + (first ? T::kMetadataBytes : 0));
      if (first) {
        uint8_t* to = metadata + at.slot.stage * T::kMetadataBytes;
#pragma unroll
        for (int group = 0; group < gpu::kConsumerGroups; ++group)
          gpu::load_tile(to + group * T::kMetadataRows * 128, maps.metadata, 0,
                         ((channel / kBlockN + group) * work.blocks + half / 2) * T::kMetadataRows, full);
        at.slot.advance();
      }
      gpu::load_tile(stage, maps.values, half * kValuesRow, channel, full);
      uint8_t* rows = stage + T::kValuesBytes + share * kInputRow;
      if constexpr (T::kCluster == 1)
        gpu::load_tile(rows, maps.rows, half * kInputRow, row, full);
      else
        gpu::load_tile_for((1 << T::kCluster) - 1, rows, maps.rows, half * kInputRow, row, full);
    }
  });
}

// A lane's words of metadata of one block.
template <class T>
using Words = uint32_t[T::kWords];
template <class T>
__device__ inline void load_words(Words<T>& words, const uint8_t* metadata) {
  constexpr int kBytes = T::kWords * 4;
  const int at = static_cast<int>(threadIdx.x) % gpu::kGroupThreads * kBytes;
  const uint8_t* from = metadata + gpu::swizzled<128>(at / 128, at % 128 / 16) + at % 16;
  if constexpr (T::kWords == 2) {
    const uint2 both = *reinterpret_cast<const uint2*>(from);
    words[0] = both.x, words[1] = both.y;
  } else {
    const uint4 all = *reinterpret_cast<const uint4*>(from);
    words[0] = all.x, words[1] = all.y, words[2] = all.z, words[3] = all.w;
  }
}

// Product kStep of the four of a block.
template <class T, int kStep>
__device__ inline void multiply_step(typename T::Sums& sums, uint64_t values, uint64_t rows, const Words<T>& words,
                                     bool accumulate) {
  if constexpr (T::kInt8)
    gpu::multiply_sparse_s8(sums, values, rows, words[kStep], accumulate);
  else if constexpr (T::kElement == Element::float16)
    gpu::multiply_sparse_f16<kStep % 2>(sums, values, rows, words[kStep / 2], accumulate);
  else
    gpu::multiply_sparse_bf16<kStep % 2>(sums, values, rows, words[kStep / 2], accumulate);
}

// The sums of a group over all of k.
template <class T>
__device__ inline void multiply(typename T::Sums& sums, const typename T::Ring& ring, const uint8_t* metadata,
                                Cursor<T>& at, int group, int blocks) {
  const uint64_t values = gpu::descriptor_64(ring.stage(0) + group * kBlockN * kValuesRow);
  const uint64_t rows = gpu::descriptor(ring.stage(0) + T::kValuesBytes);
  metadata += group * T::kMetadataRows * 128;
  Words<T> words;
  const auto multiply_half = [&](auto half, bool accumulate) {  // returns the stage that the products read
    constexpr int kHalf = decltype(half)::value;
    const int stage = at.stage.stage;
    const auto offset = static_cast<uint64_t>(stage * (T::Ring::kStageBytes >> 4));
    gpu::wait(ring.full + stage, at.stage.parity);
    at.stage.advance();
    if constexpr (kHalf == 0) load_words<T>(words, metadata + at.slot.stage * T::kMetadataBytes);
    gpu::begin_products();
    multiply_step<T, 2 * kHalf>(sums, values + offset, rows + offset, words, accumulate);
    multiply_step<T, 2 * kHalf + 1>(sums, values + offset + gpu::kNextK, rows + offset + 2 * gpu::kNextK, words, true);
    gpu::commit_products();
    return stage;
  };
  for (int block = 0; block < blocks; ++block, at.slot.advance()) {
    const int first = multiply_half(std::integral_constant<int, 0>{}, block > 0);
    const int second = multiply_half(std::integral_constant<int, 1>{}, true);
    gpu::wait_products<1>();
    ring.template leave<T::kCluster>(first);
    gpu::wait_products<0>();
    ring.template leave<T::kCluster>(second);
  }
  gpu::receive_products(sums);
}

template <class T>
__device__ inline void consume(const typename T::Ring& ring, uint8_t* shared, const Work& work,
                               const typename T::Output& out, uint32_t rank) {
  const int warp = gpu::consumer_warp(), group = gpu::consumer_group();
  uint8_t* staged = shared + T::kStaged + warp * kStagedBytes<T::kPiece>;
  typename T::Sums sums = {};
  Cursor<T> at;
  for_each_tile<T>(work, rank, [&](int64_t n, int64_t m) {
    const typename T::Finish finish(out, n + warp * 16);
    multiply<T>(sums, ring, shared + T::kMetadata, at, group, work.blocks);
    write<T::kBm / 8, T::kPiece>(sums, finish, m, staged);
  });
}

template <class T>
__global__ void __launch_bounds__(gpu::kRingThreads, 1)
    structured_sm90(const __grid_constant__ Maps maps, const __grid_constant__ Work work,
                    const __grid_constant__ typename T::Output out) {
  uint8_t* shared = gpu::dynamic_shared();
  const typename T::Ring ring(shared, shared + T::kBarriers);
  const uint32_t rank = T::kCluster == 1 ? 0 : gpu::cluster_rank();
  if (threadIdx.x == 0) {
    gpu::prefetch(maps.values);
    gpu::prefetch(maps.metadata);
    gpu::prefetch(maps.rows);
    ring.init(gpu::kConsumerWarps * T::kCluster);
  }
  if constexpr (T::kCluster == 1)
    __syncthreads();
  else
    gpu::synchronize_cluster();  // a peer copies and arrives here
  gpu::split_groups([&] { produce<T>(ring, shared + T::kMetadata, maps, work, rank); },
                    [&] { consume<T>(ring, shared, work, out, rank); });
  if constexpr (T::kCluster > 1) gpu::synchronize_cluster();  // a peer still arrives here
}

template <class T>
void run(const Problem& p) {
  const Packed& shape = p.shape;
  const uint8_t *metadata = p.packed + shape.metadata(), *values = p.packed + shape.values();
  check(p.m <= 0x7fffffff - 1024 && shape.n <= 0x7fffffff - 1024, "sparse_linear: x has ", p.m, " rows, the weight ",
        shape.n, ", expected at most 2^31 - 1025");
  Work work{};
  work.n = divide_up(shape.n, kBn * T::kCluster);
  work.m = divide_up(p.m, T::kBm);
  work.count = work.n * work.m;
  work.blocks = static_cast<int>(shape.blocks());
  work.last = static_cast<int>(shape.n_pad() - kBn);
  const int64_t metadata_rows = shape.n_pad() / kBlockN * shape.blocks() * T::kMetadataRows;
  check(work.count <= 0x7fffffff && metadata_rows <= 0x7fffffff, "sparse_linear: y is [", p.m, ", ", shape.n,
        "], k is ", shape.k, ": more than one launch can take");
  const int64_t row = T::kInt8 ? round_up(shape.k, int64_t{int8::cuda::kPadK}) : shape.k * 2;  // bytes that are there
  const void* x = T::kInt8 ? p.rows.s : p.x;
  const Maps maps{gpu::tensor_map_64(values, shape.n_pad(), shape.value_stride(), shape.value_stride(), kBn),
                  gpu::tensor_map(metadata, metadata_rows, 128, 128, T::kMetadataRows),
                  gpu::tensor_map(x, p.m, row, T::kInt8 ? row : p.ldx * 2, T::kBm / T::kCluster)};
  const int64_t clusters = std::min<int64_t>(work.count, gpu::device().multiprocessors / T::kCluster);
  const gpu::Launch at{dim3(static_cast<unsigned>(clusters * T::kCluster)), dim3(gpu::kRingThreads), T::kShared,
                       p.stream};
  gpu::launch_clusters<structured_sm90<T>>("structured_sm90", T::kCluster, at, maps, work, output_of<T::kElement>(p));
}

template <class T>
constexpr Kernel kernel_of(const char* name) {
  return {name, T::kElement, 90, kBn, T::kBm, T::kStages, T::kShared, run<T>, T::kCluster};
}

constexpr std::array kKernels = {
    kernel_of<Tile<Element::bfloat16, 256, 5, 2>>("sm90_bf16_128x256_cluster2"),
    kernel_of<Tile<Element::bfloat16, 128, 8, 2>>("sm90_bf16_128x128_cluster2"),
    kernel_of<Tile<Element::bfloat16, 128, 8, 1>>("sm90_bf16_128x128"),
    kernel_of<Tile<Element::bfloat16, 64, 8, 2>>("sm90_bf16_128x64_cluster2"),
    kernel_of<Tile<Element::bfloat16, 64, 8, 1>>("sm90_bf16_128x64"),
    kernel_of<Tile<Element::float16, 256, 5, 2>>("sm90_f16_128x256_cluster2"),
    kernel_of<Tile<Element::float16, 128, 8, 2>>("sm90_f16_128x128_cluster2"),
    kernel_of<Tile<Element::float16, 128, 8, 1>>("sm90_f16_128x128"),
    kernel_of<Tile<Element::float16, 64, 8, 2>>("sm90_f16_128x64_cluster2"),
    kernel_of<Tile<Element::float16, 64, 8, 1>>("sm90_f16_128x64"),
    kernel_of<Tile<Element::int8, 256, 5, 2>>("sm90_int8_128x256_cluster2"),
    kernel_of<Tile<Element::int8, 128, 7, 2>>("sm90_int8_128x128_cluster2"),
    kernel_of<Tile<Element::int8, 128, 7, 1>>("sm90_int8_128x128"),
    kernel_of<Tile<Element::int8, 64, 8, 2>>("sm90_int8_128x64_cluster2"),
    kernel_of<Tile<Element::int8, 64, 8, 1>>("sm90_int8_128x64"),
};

}  // namespace

const Kernel* kernels_sm90(int* count) {
  *count = static_cast<int>(kKernels.size());
  return kKernels.data();
}

}  // namespace pycompress::sparse::cuda::structured
