// 2:4 products by mma.sp, for compute capability 8.0 and all later ones: y^T = W x^T.
//
// A block computes a tile of channels x rows of x. Values and x come through a ring of stages in shared memory, filled
// by cp.async kStages blocks ahead; a stage is 64 or 128 stored bytes a channel and twice as many a row of x. The
// metadata of a whole block of k (128 stored bytes) come with its first stage, into a ring of their own, and go into
// registers for two steps at a time. Each warp has a part of the tile in registers; for 8 of its rows after the other
// it multiplies all its channels, while the fragments of the rows that follow are being loaded. Those of the channels
// are replaced at the end of a step, each as soon as it has been used.
//
// Floor: bn * bm products, those with zeros counted, a byte of k at 4096 a cycle and multiprocessor (A100). Beside it
// stand bn (1/2 + 1/16 or 1/8) + bm bytes from the L2, and in shared memory, at 128 bytes a cycle, what the warps read:
// for each 32 stored bytes of 64 channels x 64 rows 6 KiB, which with the copies' writes takes as long as the products.
// Few rows: the bytes of the weights at the memory's bandwidth.
#include <array>
#include <cstring>
#include <utility>

#include "../../common/check.h"
#include "../../cuda/launch.h"
#include "../../cuda/tiles.h"
#include "../epilogue.cuh"
#include "cuda_kernel_list.h"

namespace pycompress::sparse::cuda::structured {
namespace {

using gpu::swizzled;

struct Operands {
  const uint8_t *x, *values, *metadata;
  int64_t m, n_pad;
  int x_stride, x_bytes, value_stride, blocks;  // bytes of a row; blocks of k
  int64_t tiles_m, tiles_n;
};

template <Element kElementOf, int kBnOf, int kBmOf, int kStoredOf, int kStagesOf, int kWarpsNOf, int kWarpsMOf>
struct Tile {
  static constexpr Element kElement = kElementOf;
  static constexpr int kBn = kBnOf, kBm = kBmOf, kStored = kStoredOf, kStages = kStagesOf;
  static constexpr int kWarpsN = kWarpsNOf, kWarpsM = kWarpsMOf, kWarps = kWarpsN * kWarpsM, kThreads = 32 * kWarps;
  static constexpr int kWn = kBn / kWarpsN, kWm = kBm / kWarpsM;  // a warp's part
  static constexpr int kNt = kWn / 16, kMt = kWm / 8;             // in tiles of one mma
  static constexpr int kParts = kStoredBytes / kStored;           // stages of a block of k
  static constexpr int kSteps = kStored / 32;                     // of a stage
  static constexpr int kValuesBytes = kBn * kStored, kStageBytes = kValuesBytes + kBm * 2 * kStored;
  static constexpr int kWords = kElement == Element::int8 ? 4 : 2;
  static constexpr int kMetadataTile = 32 * kWords * 4, kMetadataBytes = kBn / 16 * kMetadataTile;
  // Of metadata: one for each block in the ring, and one for that whose second half is still to be read.
  static constexpr int kSlots = kParts == 1 ? kStages : kStages / 2 + 1;
  static constexpr int kMetadata = kStages * kStageBytes, kShared = kMetadata + kSlots * kMetadataBytes;
  // A group is the products of all channels and 8 rows in a step, of kGroups in a block; its rows are loaded kAhead
  // groups ahead.
  static constexpr int kRing = kMt < 4 ? kMt : 4, kAhead = kRing - 1, kGroups = 4 * kMt;
  static constexpr int kStaged = kStagedBytes<kMt>;
  // Of the loops that copy: where sums fill the registers, there is no room for many addresses at once.
  static constexpr int kUnroll = kNt * kMt > 8 ? 1 : 16;
  static_assert(kWn % 16 == 0 && kWm % 16 == 0 && kSteps % 2 == 0 && kGroups % kRing == 0 && kStages >= 2);
  static_assert(kWarps * kStaged <= kMetadata && (kBn % kBlockN == 0 || kBlockN % kBn == 0));
};

// The threads' share of copying kRows rows of an operand, kBytes of each, into a stage: in tiles of 64 or 128 bytes a
// row, swizzled.
template <int kThreads, int kRows, int kBytes, int kUnroll>
class Copier {
 public:
  __device__ Copier(const uint8_t* operand, int64_t first, int64_t rows, int stride, int bytes)
      : from_(operand + (first + row()) * stride + chunk() * 16), stride_(stride), bytes_(bytes - chunk() * 16) {
    const int64_t left = rows - first - row();  // may be none
    left_ = left < 0 ? 0 : left < kRows ? static_cast<int>(left) : kRows;
  }

  // The next part of k; zeros behind the last one and where there is no row: a copy of no bytes reads nothing, wherever
  // it points.
  __device__ void copy(uint8_t* stage) {
    const int there = min(16, max(0, bytes_));
#pragma unroll(kUnroll)
    for (int i = 0; i < kEach; ++i)
      gpu::copy_async(stage + offset(row() + i * kRowStep), from_ + int64_t{i * kRowStep} * stride_,
                      i * kRowStep < left_ ? there : 0);
    from_ += kBytes;
    bytes_ -= kBytes;
  }

 private:
  static constexpr int kChunks = kBytes / 16, kRowStep = kThreads / kChunks, kEach = kRows / kRowStep;
  static constexpr int kTileBytes = kBytes < 128 ? kBytes : 128, kTileChunks = kTileBytes / 16;
  static_assert(kRows % kRowStep == 0);

  __device__ static int row() { return static_cast<int>(threadIdx.x) / kChunks; }
  __device__ static int chunk() { return static_cast<int>(threadIdx.x) % kChunks; }
  __device__ static int offset(int row) {
    return chunk() / kTileChunks * kRows * kTileBytes + swizzled<kTileBytes>(row, chunk() % kTileChunks);
  }

  const uint8_t* from_;
  const int stride_;
  int left_;   // rows from this thread's first one to the end
  int bytes_;  // of a row from here to its end
};

// The metadata of kBn channels, block after block of k. Tiles of 16 channels that are behind the last one get its
// metadata: nobody looks at their sums, but all bits must make sense.
template <class T>
class MetadataCopier {
 public:
  __device__ MetadataCopier(const Operands& in, int64_t n) : in_(in), tile_(static_cast<int>(n / 16)) {}

  __device__ void copy(uint8_t* slot) {
    constexpr int kAtOnce = T::kThreads * 16;
#pragma unroll
    for (int first = 0; first < T::kMetadataBytes; first += kAtOnce) {
      const int i = first + static_cast<int>(threadIdx.x) * 16;
      if (block_ >= in_.blocks || i >= T::kMetadataBytes) continue;
      const int tile = min(tile_ + i / T::kMetadataTile, static_cast<int>(in_.n_pad) / 16 - 1);
      const int at = (tile / 4 * in_.blocks + block_) * 4 + tile % 4;
      gpu::copy_async(slot + i, in_.metadata + int64_t{at} * T::kMetadataTile + i % T::kMetadataTile);
    }
    ++block_;
  }

 private:
  const Operands& in_;
  const int tile_;
  int block_ = 0;
};

// What of the stages and slots to fill or to read next.
template <class T>
struct Place {
  int stage = 0, slot = 0, part = 0;
  __device__ void advance() {
    stage = stage + 1 == T::kStages ? 0 : stage + 1;
    if (++part < T::kParts) return;
    part = 0;
    slot = slot + 1 == T::kSlots ? 0 : slot + 1;
  }
  __device__ uint8_t* operands(uint8_t* shared) const { return shared + stage * T::kStageBytes; }
  __device__ uint8_t* metadata(uint8_t* shared) const { return shared + T::kMetadata + slot * T::kMetadataBytes; }
};

template <class T>
using Sums = typename Finish<T::kElement>::Sum[T::kNt][T::kMt][4];

// A warp's operands: values of a step, the metadata of two, and kRing times 8 rows of x.
template <class T>
struct Fragments {
  uint32_t values[T::kNt][4], metadata[T::kNt][T::kWords / 2], x[T::kRing][4];
  const int lane = static_cast<int>(threadIdx.x) % 32, warp_n = static_cast<int>(threadIdx.x) / 32 / T::kWarpsM,
            warp_m = static_cast<int>(threadIdx.x) / 32 % T::kWarpsM;

  // Tile i of channels in step `step` of a block.
  __device__ void load_channels(int i, int step, const uint8_t* stage, const uint8_t* slot) {
    const gpu::Chunk at = gpu::chunk_of_rows(lane);
    const int tile = warp_n * T::kNt + i;
    gpu::load_matrices(values[i], stage + swizzled<T::kStored>(tile * 16 + at.row, step % T::kSteps * 2 + at.chunk));
    if (step % 2 != 0) return;
    const uint8_t* words = slot + tile * T::kMetadataTile + lane * T::kWords * 4 + step / 2 * sizeof(metadata[i]);
    std::memcpy(metadata[i], __builtin_assume_aligned(words, sizeof(metadata[i])), sizeof(metadata[i]));
  }

  // The rows of group `group` of a block.
  __device__ void load_rows(int group, const uint8_t* stage) {
    const int row = warp_m * T::kWm + group % T::kMt * 8 + lane % 8, step = group / T::kMt % T::kSteps;
    const uint8_t* rows = stage + T::kValuesBytes + step / 2 * T::kBm * 128;
    gpu::load_matrices(x[group % T::kRing], rows + swizzled<128>(row, step % 2 * 4 + lane / 8));
  }
};

// In step kStep of a block.
template <Element kElement, int kStep, class Sum, int kWords>
__device__ inline void multiply(Sum (&sums)[4], const uint32_t (&a)[4], const uint32_t (&b)[4],
                                const uint32_t (&metadata)[kWords]) {
  if constexpr (kElement == Element::int8)
    gpu::mma_sp_s8(sums, a, b, metadata[kStep % 2]);
  else if constexpr (kElement == Element::float16)
    gpu::mma_sp_f16<kStep % 2>(sums, a, b, metadata[0]);
  else
    gpu::mma_sp_bf16<kStep % 2>(sums, a, b, metadata[0]);
}

// f(integral constant) for 0 to kCount - 1: a loop in which the number chooses instructions and names registers.
template <class F, int... kIndex>
__device__ inline void for_each_of(std::integer_sequence<int, kIndex...>, F&& f) {
  (f(std::integral_constant<int, kIndex>{}), ...);
}
template <int kCount, class F>
__device__ inline void for_each(F&& f) {
  for_each_of(std::make_integer_sequence<int, kCount>{}, f);
}

// Sums -> y, 16 channels of the warp at a time.
template <class T>
__device__ inline void write_all(const Sums<T>& sums, const Output<T::kElement>& out, int64_t n, int64_t m,
                                 uint8_t* staged) {
  for_each<T::kNt>([&](auto tile) {
    constexpr int kTile = decltype(tile)::value;
    const Finish<T::kElement> finish(out, n + kTile * 16);
    write<T::kMt>(sums[kTile], finish, m, staged);
  });
}

template <class T>
__global__ void __launch_bounds__(T::kThreads, 1)
    structured_sm80(const __grid_constant__ Operands in, const __grid_constant__ Output<T::kElement> out) {
  uint8_t* shared = gpu::dynamic_shared();
  const gpu::Position tile = gpu::tile_at(blockIdx.x, in.tiles_m, in.tiles_n);
  const int64_t n = tile.n * T::kBn, m = tile.m * T::kBm;

  Copier<T::kThreads, T::kBn, T::kStored, T::kUnroll> values(in.values, n, in.n_pad, in.value_stride,
                                                             in.blocks * kStoredBytes);
  Copier<T::kThreads, T::kBm, 2 * T::kStored, T::kUnroll> x(in.x, m, in.m, in.x_stride, in.x_bytes);
  MetadataCopier<T> metadata(in, n);
  Place<T> filled, read;
  const auto fill = [&] {
    uint8_t* stage = filled.operands(shared);
    values.copy(stage);
    x.copy(stage + T::kValuesBytes);
    if (filled.part == 0) metadata.copy(filled.metadata(shared));
    gpu::commit_copies();
    filled.advance();
  };
#pragma unroll 1
  for (int i = 0; i < T::kStages; ++i) fill();

  Sums<T> sums = {};
  Fragments<T> fragments;
  gpu::wait_copies<T::kStages - 1>();
  __syncthreads();
#pragma unroll
  for (int i = 0; i < T::kNt; ++i) fragments.load_channels(i, 0, read.operands(shared), read.metadata(shared));
#pragma unroll
  for (int group = 0; group < T::kAhead; ++group) fragments.load_rows(group, read.operands(shared));
  for (int block = 0; block < in.blocks; ++block)
    for_each<T::kGroups>([&](auto at) {
      constexpr int kGroup = decltype(at)::value, kNext = kGroup + T::kAhead, kStep = kGroup / T::kMt;
      constexpr bool kIsStage = kNext % (T::kSteps * T::kMt) == 0;
      if constexpr (kIsStage) {  // the next stage is there, and everybody has read this one
        gpu::wait_copies<T::kStages - 2>();
        __syncthreads();
        read.advance();
      }
      fragments.load_rows(kNext % T::kGroups, read.operands(shared));
      if constexpr (kIsStage) fill();
#pragma unroll
      for (int i = 0; i < T::kNt; ++i) {
        multiply<T::kElement, kStep>(sums[i][kGroup % T::kMt], fragments.values[i], fragments.x[kGroup % T::kRing],
                                     fragments.metadata[i]);
        if constexpr ((kGroup + 1) % T::kMt == 0)  // the last of the step
          fragments.load_channels(i, (kStep + 1) % 4, read.operands(shared), read.metadata(shared));
      }
    });
  gpu::wait_copies<0>();
  __syncthreads();
  write_all<T>(sums, out, n + fragments.warp_n * T::kWn, m + fragments.warp_m * T::kWm,
               shared + threadIdx.x / 32 * T::kStaged);
}

template <class T>
void run(const Problem& p) {
  constexpr bool kInt8 = T::kElement == Element::int8;
  const int64_t tiles_m = divide_up(p.m, T::kBm), tiles_n = divide_up(p.shape.n, T::kBn);
  check(tiles_m * tiles_n <= 0x7fffffff, "sparse_linear: x has ", p.m, " rows, more than one launch can take");
  check(kInt8 || p.ldx <= 0x3fffffff, "sparse_linear: x has row stride ", p.ldx, ", expected at most ", 0x3fffffff);
  Operands in{};
  in.x = kInt8 ? reinterpret_cast<const uint8_t*>(p.rows.s) : static_cast<const uint8_t*>(p.x);
  in.x_bytes = static_cast<int>(kInt8 ? round_up<int64_t>(p.shape.k, int8::cuda::kPadK) : 2 * p.shape.k);
  in.x_stride = kInt8 ? in.x_bytes : static_cast<int>(2 * p.ldx);
  in.values = p.packed + p.shape.values(), in.metadata = p.packed + p.shape.metadata();
  in.m = p.m, in.n_pad = p.shape.n_pad(), in.value_stride = p.shape.value_stride();
  in.blocks = static_cast<int>(p.shape.blocks());
  in.tiles_m = tiles_m, in.tiles_n = tiles_n;
  const gpu::Launch at{dim3(static_cast<unsigned>(tiles_m * tiles_n)), dim3(T::kThreads), T::kShared, p.stream};
  gpu::launch<structured_sm80<T>>("structured_sm80", at, in, output_of<T::kElement>(p));
}

template <Element kElement, int... kTile>
constexpr Kernel kernel_of(const char* name) {
  using T = Tile<kElement, kTile...>;
  return {name, kElement, 80, T::kBn, T::kBm, T::kStages, T::kShared, run<T>};
}

// All but the first fit into the 99 KiB that a multiprocessor of 8.6 and 8.9 has.
#define KERNELS(element, name)                                                                                         \
  kernel_of<element, 256, 128, 64, 4, 4, 2>(name "_256x128"),                                                          \
      kernel_of<element, 128, 128, 64, 3, 2, 2>(name "_128x128"),                                                      \
      kernel_of<element, 128, 64, 64, 4, 2, 2>(name "_128x64"),                                                        \
      kernel_of<element, 64, 64, 64, 6, 2, 2>(name "_64x64"), kernel_of<element, 64, 32, 128, 5, 2, 2>(name "_64x32"), \
      kernel_of<element, 64, 16, 128, 6, 4, 1>(name "_64x16"), kernel_of<element, 32, 16, 128, 8, 2, 1>(name "_32x16")
constexpr std::array kKernels = {KERNELS(Element::bfloat16, "sm80_bf16"), KERNELS(Element::float16, "sm80_f16"),
                                 KERNELS(Element::int8, "sm80_int8")};
#undef KERNELS

}  // namespace

const Kernel* kernels_sm80(int* count) {
  *count = static_cast<int>(kKernels.size());
  return kKernels.data();
}

}  // namespace pycompress::sparse::cuda::structured
