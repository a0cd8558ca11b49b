// Block sparse products by mma.sync, for compute capability 8.0 and all later ones.
//
// A block of threads has a part of the channels and some rows of x; its warps share the rows, so that what is absent
// leaves none of them idle. What is present comes in steps of k through a ring in shared memory, filled by cp.async
// ahead of the products: a step of the rows, and what the part has there. Tiles are in the order of the parts'
// descending work, so that those that a multiprocessor takes last are the lightest ones.
//
// Size 64: a step is a block of the part's 64 channels, row-major.
// Sizes 32 and 16: a step is an Entry of 128 bytes of k and one or both halves of a part. Its fragments pass through a
// ring of their own, because there may be any number of them; which are there is a branch that a whole warp takes. A
// step that does not fit beside those before waits until they have been used.
//
// Floor: 128 bytes of k of which the share d is present take 128 d bn bm / 2048 cycles of the tensor cores (A100) and
// 128 (bm + d bn) bytes of the L2, at some 40 a cycle. With few blocks the L2 is the limit, which is why the largest
// tile of fragments has more channels than rows.
#include <array>

#include "../../common/check.h"
#include "../../cuda/few_rows.cuh"
#include "../../cuda/launch.h"
#include "../../cuda/tiles.h"
#include "../epilogue.cuh"
#include "cuda_kernel_list.h"

namespace pycompress::sparse::cuda::blocks {
namespace {

struct Operands {
  const uint8_t* rows;  // of x: `bytes` each, `stride` bytes after each other
  int64_t m, stride, bytes;
  const uint8_t* packed;
  Shape shape;
  int64_t tiles_m, tiles_n;
};

// kFragments x 16 channels and kColumns x 8 rows of x a warp, whose block has kWarps x as many rows; kStep bytes of k a
// stage.
template <Element kElement_, int kStep_, int kFragments_, int kColumns_, int kWarps_, int kStages_>
struct Tile {
  static constexpr Element kElement = kElement_;
  static constexpr int kStep = kStep_, kFragments = kFragments_, kColumns = kColumns_, kWarps = kWarps_;
  static constexpr int kStages = kStages_, kThreads = 32 * kWarps;
  static constexpr int kBn = kFragments * kFragmentChannels, kWarpRows = kColumns * 8, kBm = kWarps * kWarpRows;
  static constexpr int kRowBytes = kBm * kStep;  // of a stage
  // Blocks of a multiprocessor: two where there is room for their registers (the epilogue of int8 needs more) and in
  // the 163 KiB of 8.0.
  static constexpr int kMostSums = kElement == Element::int8 ? 8 : 16;
  static constexpr int resident(int shared) {
    return kColumns <= 2 && kFragments * kColumns <= kMostSums && shared <= 80 * 1024 ? 2 : 1;
  }
  using Sum = typename Finish<kElement>::Sum;
  using Sums = Sum[kFragments][kColumns][4];
};

__device__ inline int warp() { return static_cast<int>(threadIdx.x) / 32; }
__device__ inline int lane() { return static_cast<int>(threadIdx.x) % 32; }

// At most `pending` of the copies that were committed last are still under way.
template <int kMost>
__device__ inline void wait_for_copies(int pending) {
  if constexpr (kMost == 0)
    gpu::wait_copies<0>();
  else if (pending >= kMost)
    gpu::wait_copies<kMost>();
  else
    wait_for_copies<kMost - 1>(pending);
}

// The threads' share of copying a step of the tile's rows; zeros behind the last row and behind k.
template <class T>
class Rows {
 public:
  __device__ Rows(const Operands& in, int64_t first) : in_(in) {
    const int64_t left = in.m - first - row();  // may be none
    left_ = left < 0 ? 0 : left < T::kBm ? static_cast<int>(left) : T::kBm;
    // A thread that has no row reads nothing, but from an address that exists.
    from_ = in.rows + (left_ > 0 ? (first + row()) * in.stride : 0);
  }

  __device__ void copy(uint8_t* stage, uint32_t column) const {
    const int k = static_cast<int>(column) * T::kStep + chunk() * 16,
              inside = min(16, max(0, static_cast<int>(in_.bytes) - k));
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const int count = i * kRowStep < left_ ? inside : 0;
      const uint8_t* from = count > 0 ? from_ + i * kRowStep * in_.stride + k : from_;
      gpu::copy_async(stage + gpu::swizzled<T::kStep>(row() + i * kRowStep, chunk()), from, count);
    }
  }

 private:
  static constexpr int kChunks = T::kStep / 16, kRowStep = T::kThreads / kChunks, kEach = T::kBm / kRowStep;
  static_assert(T::kBm % kRowStep == 0);

  __device__ static int row() { return static_cast<int>(threadIdx.x) / kChunks; }
  __device__ static int chunk() { return static_cast<int>(threadIdx.x) % kChunks; }

  const Operands& in_;
  const uint8_t* from_;
  int left_;  // rows from this thread's first one to the end
};

// The warp's rows in 64 bytes of k, two steps of the tensor cores: b[column][2 step], b[column][2 step + 1].
template <class T>
__device__ inline void load_rows(uint32_t (&b)[T::kColumns][4], const uint8_t* stage, int half) {
#pragma unroll
  for (int column = 0; column < T::kColumns; ++column) {
    const int row = warp() * T::kWarpRows + column * 8 + lane() % 8;
    gpu::load_matrices(b[column], stage + gpu::swizzled<T::kStep>(row, half * 4 + lane() / 8));
  }
}

template <class T>
__device__ inline void multiply(typename T::Sum (&sums)[T::kColumns][4], const uint32_t (&a)[4],
                                const uint32_t (&b)[T::kColumns][4], int step) {
#pragma unroll
  for (int column = 0; column < T::kColumns; ++column)
    if constexpr (T::kElement == Element::int8)
      gpu::mma_s8(sums[column], a, b[column][2 * step], b[column][2 * step + 1]);
    else
      gpu::multiply<type_of(T::kElement)>(sums[column], a, b[column][2 * step], b[column][2 * step + 1]);
}

// Channels from n, rows from m: the warp's sums -> y.
template <class T>
__device__ inline void write_sums(const typename T::Sums& sums, const Output<T::kElement>& out, int64_t m, int64_t n,
                                  uint8_t* shared) {
  __syncthreads();  // the ring has been read
  uint8_t* staged = shared + warp() * kStagedBytes<T::kColumns>;
#pragma unroll 1
  for (int fragment = 0; fragment < T::kFragments; ++fragment) {
    typename T::Sum picked[T::kColumns][4] = {};
#pragma unroll
    for (int all = 0; all < T::kFragments; ++all) {  // so that each register is named
      if (all != fragment) continue;
#pragma unroll
      for (int i = 0; i < 4 * T::kColumns; ++i) picked[i / 4][i % 4] = sums[all][i / 4][i % 4];
    }
    const Finish<T::kElement> finish(out, n + fragment * kFragmentChannels);
    write<T::kColumns>(picked, finish, m + warp() * T::kWarpRows, staged);
  }
}

__device__ inline const uint32_t* start_of(const Operands& in) {
  return reinterpret_cast<const uint32_t*>(in.packed + in.shape.start());
}
__device__ inline const uint8_t* behind_values(const Operands& in) { return in.packed + in.shape.behind(); }

// --- size 64
// ----------------------------------------------------------------------------------------------------------------

template <Element kElement, int kColumns, int kWarps, int kStages>
struct BlockTile : Tile<kElement, kBlock * bytes_of(kElement), kBlock / 16, kColumns, kWarps, kStages> {
  using Base = Tile<kElement, kBlock * bytes_of(kElement), kBlock / 16, kColumns, kWarps, kStages>;
  static constexpr int kBlockBytes = kBlock * Base::kStep, kStageBytes = Base::kRowBytes + kBlockBytes;
  static constexpr int kShared = kStages * kStageBytes;
  static_assert(kWarps * kStagedBytes<kColumns> <= kShared && kBlockBytes % (16 * Base::kThreads) == 0);
};

template <class T>
__device__ inline void copy_block(uint8_t* stage, const uint8_t* block) {
  constexpr int kChunks = T::kStep / 16;
#pragma unroll
  for (int i = 0; i < T::kBlockBytes / 16 / T::kThreads; ++i) {
    const int at = static_cast<int>(threadIdx.x) + i * T::kThreads;
    gpu::copy_async(stage + gpu::swizzled<T::kStep>(at / kChunks, at % kChunks), block + at * 16);
  }
}

template <class T>
__device__ inline void multiply_block(typename T::Sums& sums, const uint8_t* stage) {
  const gpu::Chunk mine = gpu::chunk_of_rows(lane());
#pragma unroll
  for (int half = 0; half < T::kStep / 64; ++half) {
    uint32_t b[T::kColumns][4];
    load_rows<T>(b, stage, half);
#pragma unroll
    for (int step = 0; step < 2; ++step)
#pragma unroll
      for (int fragment = 0; fragment < T::kFragments; ++fragment) {
        uint32_t a[4];
        const int row = fragment * kFragmentChannels + mine.row, chunk = (half * 2 + step) * 2 + mine.chunk;
        gpu::load_matrices(a, stage + T::kRowBytes + gpu::swizzled<T::kStep>(row, chunk));
        multiply<T>(sums[fragment], a, b, step);
      }
  }
}

template <class T>
__global__ void __launch_bounds__(T::kThreads, T::resident(T::kShared))
    sparse_block64_sm80(const __grid_constant__ Operands in, const __grid_constant__ Output<T::kElement> out) {
  uint8_t* shared = gpu::dynamic_shared();
  const gpu::Position tile = gpu::tile_at(blockIdx.x, in.tiles_m, in.tiles_n);
  const uint32_t part = __ldg(reinterpret_cast<const uint32_t*>(in.packed + in.shape.order()) + tile.n);
  const uint32_t first = __ldg(start_of(in) + part), count = __ldg(start_of(in) + part + 1) - first;
  const uint8_t* block = in.packed + in.shape.values() + static_cast<int64_t>(first) * T::kBlockBytes;
  const auto* column = reinterpret_cast<const uint32_t*>(behind_values(in)) + first;
  const Rows<T> rows(in, tile.m * T::kBm);

  uint32_t filled = 0, next = count > 0 ? __ldg(column) : 0;  // the column of the block that comes next
  uint8_t* to = shared;
  const auto fill = [&] {
    if (filled < count) {
      rows.copy(to, next);
      copy_block<T>(to + T::kRowBytes, block + static_cast<int64_t>(filled) * T::kBlockBytes);
      if (++filled < count) next = __ldg(column + filled);
      to = to + T::kStageBytes == shared + T::kShared ? shared : to + T::kStageBytes;
    }
    gpu::commit_copies();
  };
#pragma unroll
  for (int i = 0; i < T::kStages - 1; ++i) fill();

  typename T::Sums sums = {};
  const uint8_t* stage = shared;
  for (uint32_t i = 0; i < count; ++i) {
    gpu::wait_copies<T::kStages - 2>();
    __syncthreads();  // the stage is there, and everybody has read the one before
    fill();
    multiply_block<T>(sums, stage);
    stage = stage + T::kStageBytes == shared + T::kShared ? shared : stage + T::kStageBytes;
  }
  gpu::wait_copies<0>();
  write_sums<T>(sums, out, tile.m * T::kBm, static_cast<int64_t>(part) * T::kBn, shared);
}

// --- sizes 32 and 16
// ----------------------------------------------------------------------------------------------------------------

// kMasks halves of a part.
template <Element kElement, int kMasksOf, int kColumns, int kWarps, int kStages>
struct FragmentTile : Tile<kElement, kStepBytes, kMasksOf * kMaskChannels / 16, kColumns, kWarps, kStages> {
  using Base = Tile<kElement, kStepBytes, kMasksOf * kMaskChannels / 16, kColumns, kWarps, kStages>;
  static constexpr int kMasks = kMasksOf, kRoom = 32 * kMasks;  // fragments in the ring: as many as a step may have
  static constexpr int kFragmentRing = kStages * Base::kRowBytes, kSteps = kFragmentRing + kRoom * kFragmentBytes;
  static constexpr int kShared = kSteps + kStages * 16;
  static_assert(kWarps * kStagedBytes<kColumns> <= kShared);
};

// What a stage holds.
template <class T>
struct Step {
  uint32_t mask[T::kMasks];
  uint32_t first;  // its first fragment's place in the ring

  __device__ uint32_t count() const {
    uint32_t sum = 0;
#pragma unroll
    for (int i = 0; i < T::kMasks; ++i) sum += static_cast<uint32_t>(__popc(mask[i]));
    return sum;
  }
};

// The entries of a part that have something for the tile, in ascending k. The next is read before it is needed.
template <class T>
class Entries {
 public:
  __device__ Entries(const Operands& in, uint32_t part, int half)
      : half_(half),
        at_(reinterpret_cast<const uint4*>(behind_values(in)) + __ldg(start_of(in) + part)),
        left_(__ldg(start_of(in) + part + 1) - __ldg(start_of(in) + part)) {
    read();
  }

  __device__ bool any() {
    while (left_ > 0 && T::kMasks < kEntryMasks && mine() == 0) advance();
    return left_ > 0;
  }
  __device__ uint32_t column() const { return present_.x; }
  // Its first fragment among those that are stored.
  __device__ uint32_t first() const {
    return present_.y + (half_ == 1 ? static_cast<uint32_t>(__popc(present_.z)) : 0);
  }
  __device__ Step<T> step(uint32_t first) const {
    if constexpr (T::kMasks == kEntryMasks)
      return {{present_.z, present_.w}, first};
    else
      return {{mine()}, first};
  }
  __device__ void advance() {
    ++at_;
    --left_;
    read();
  }

 private:
  __device__ uint32_t mine() const { return half_ == 1 ? present_.w : present_.z; }
  __device__ void read() {
    if (left_ > 0) present_ = __ldg(at_);
  }

  const int half_;  // of the part; 0 where the tile has both
  const uint4* at_;
  uint32_t left_;
  uint4 present_ = {0, 0, 0, 0};
};

// The steps in shared memory. All threads call its functions, with the same arguments.
template <class T>
class Ring {
 public:
  __device__ Ring(const Operands& in, uint32_t part, int half, int64_t m, uint8_t* shared)
      : entries_(in, part, half), rows_(in, m), values_(in.packed + in.shape.values()), shared_(shared) {}

  // Copies what there is room for. Everybody has read the steps before `used`.
  __device__ void fill(uint32_t used) {
    while (loaded_ < used + T::kStages && entries_.any()) {
      const Step<T> step = entries_.step(fragments_);
      const uint32_t count = step.count();
      if (fragments_ + count - left_ > T::kRoom) return;
      rows_.copy(shared_ + loaded_ % T::kStages * T::kRowBytes, entries_.column());
      copy_fragments(values_ + static_cast<int64_t>(entries_.first()) * kFragmentBytes, count);
      gpu::commit_copies();
      if (threadIdx.x == 0) steps()[loaded_ % T::kStages] = step;
      fragments_ += count;
      ++loaded_;
      entries_.advance();
    }
  }
  // Everybody has read that many more fragments.
  __device__ void leave(uint32_t count) { left_ += count; }

  __device__ bool any() { return entries_.any(); }
  __device__ uint32_t loaded() const { return loaded_; }
  __device__ const uint8_t* rows(uint32_t i) const { return shared_ + i % T::kStages * T::kRowBytes; }
  __device__ Step<T> step(uint32_t i) const { return steps()[i % T::kStages]; }
  __device__ const uint8_t* fragment(uint32_t i) const {
    return shared_ + T::kFragmentRing + i % T::kRoom * kFragmentBytes;
  }

 private:
  __device__ Step<T>* steps() const { return reinterpret_cast<Step<T>*>(shared_ + T::kSteps); }
  __device__ void copy_fragments(const uint8_t* from, uint32_t count) const {
    constexpr uint32_t kChunks = kFragmentBytes / 16;
    for (uint32_t i = threadIdx.x; i < count * kChunks; i += T::kThreads) {
      const uint32_t place = (fragments_ + i / kChunks) % T::kRoom;
      gpu::copy_async(shared_ + T::kFragmentRing + place * kFragmentBytes + i % kChunks * 16, from + i * 16);
    }
  }

  Entries<T> entries_;
  const Rows<T> rows_;
  const uint8_t* const values_;
  uint8_t* const shared_;
  uint32_t loaded_ = 0;                // steps
  uint32_t fragments_ = 0, left_ = 0;  // that were copied, and those of them that are no longer needed
};

__device__ inline void load_fragment(uint32_t (&a)[4], const uint8_t* fragment) {
  const uint4 four = reinterpret_cast<const uint4*>(fragment)[lane()];
  a[0] = four.x, a[1] = four.y, a[2] = four.z, a[3] = four.w;
}

// Each fragment is read while the one before it is multiplied. Behind the last one of a half the ring has others, or
// what copies are just bringing: nobody looks at them.
template <class T>
__device__ inline void multiply_fragments(typename T::Sums& sums, const Ring<T>& ring, const Step<T>& present,
                                          const uint8_t* rows) {
  uint32_t at[T::kMasks], next[T::kMasks][4];
#pragma unroll
  for (int i = 0; i < T::kMasks; ++i) {
    at[i] = i == 0 ? present.first : present.first + static_cast<uint32_t>(__popc(present.mask[0]));
    load_fragment(next[i], ring.fragment(at[i]));
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    uint32_t b[T::kColumns][4];
    load_rows<T>(b, rows, half);
#pragma unroll
    for (int step = 0; step < 2; ++step)
#pragma unroll
      for (int i = 0; i < T::kFragments; ++i) {
        constexpr int kEach = T::kFragments / T::kMasks;
        if ((present.mask[i / kEach] >> ((half * 2 + step) * kEach + i % kEach) & 1) == 0) continue;
        uint32_t (&from)[4] = next[i / kEach];
        const uint32_t a[4] = {from[0], from[1], from[2], from[3]};
        load_fragment(from, ring.fragment(++at[i / kEach]));
        multiply<T>(sums[i], a, b, step);
      }
  }
}

template <class T>
__global__ void __launch_bounds__(T::kThreads, T::resident(T::kShared))
    sparse_block16_sm80(const __grid_constant__ Operands in, const __grid_constant__ Output<T::kElement> out) {
  constexpr int kHalves = kEntryMasks / T::kMasks;  // tiles of a part
  uint8_t* shared = gpu::dynamic_shared();
  const gpu::Position tile = gpu::tile_at(blockIdx.x, in.tiles_m, in.tiles_n);
  const uint32_t part = __ldg(reinterpret_cast<const uint32_t*>(in.packed + in.shape.order()) + tile.n / kHalves);
  const int half = static_cast<int>(tile.n % kHalves);
  const int64_t m = tile.m * T::kBm, n = (static_cast<int64_t>(part) * kHalves + half) * T::kBn;
  if (n >= in.shape.n) return;  // the last part's second half

  typename T::Sums sums = {};
  Ring<T> ring(in, part, half, m, shared);
  uint32_t held = 0;  // fragments of the step before
  for (uint32_t i = 0;; ++i) {
    if (i == ring.loaded()) {  // nothing is under way: at the begin and the end, or there was no room for the next
      if (!ring.any()) break;
      __syncthreads();
      ring.leave(held);
      held = 0;
      ring.fill(i);
    }
    wait_for_copies<T::kStages - 1>(static_cast<int>(ring.loaded() - i) - 1);
    __syncthreads();  // the step is there, and everybody has read the one before
    const Step<T> present = ring.step(i);
    ring.leave(held);
    held = present.count();
    ring.fill(i);
    multiply_fragments<T>(sums, ring, present, ring.rows(i));
  }
  write_sums<T>(sums, out, m, n, shared);
}

// --- the table
// --------------------------------------------------------------------------------------------------------------

template <class T>
Operands operands_of(const Problem& p, int64_t tiles_n) {
  const int64_t tiles_m = divide_up(p.m, T::kBm);
  check(tiles_m * tiles_n <= 0x7fffffff, "sparse_linear: x has ", p.m, " rows, more than one launch can take");
  const int size = bytes_of(T::kElement);
  if (T::kElement != Element::int8)
    return {static_cast<const uint8_t*>(p.x), p.m, p.ldx * size, p.shape.k * size, p.packed, p.shape, tiles_m, tiles_n};
  const int64_t k_pad = int8::cuda::PackedShape{p.shape.n, p.shape.k}.k_pad();
  return {reinterpret_cast<const uint8_t*>(p.rows.s), p.m, k_pad, k_pad, p.packed, p.shape, tiles_m, tiles_n};
}

template <class T>
gpu::Launch launch_of(const Operands& in, Stream stream) {
  return {dim3(static_cast<unsigned>(in.tiles_m * in.tiles_n)), dim3(T::kThreads), T::kShared, stream};
}

template <class T>
void run_blocks(const Problem& p) {
  const Operands in = operands_of<T>(p, p.shape.parts());
  gpu::launch<sparse_block64_sm80<T>>("sparse_block64_sm80", launch_of<T>(in, p.stream), in, output_of<T::kElement>(p));
}

template <class T>
void run_fragments(const Problem& p) {
  const Operands in = operands_of<T>(p, p.shape.parts() * (kEntryMasks / T::kMasks));
  gpu::launch<sparse_block16_sm80<T>>("sparse_block16_sm80", launch_of<T>(in, p.stream), in, output_of<T::kElement>(p));
}

template <class T>
constexpr Kernel blocks_of(const char* name) {
  return {name, T::kElement, kBlock, 80, T::kBn, T::kBm, T::kStages, T::kShared, run_blocks<T>};
}
template <class T>
constexpr Kernel fragments_of(const char* name) {
  return {name, T::kElement, 16, 80, T::kBn, T::kBm, T::kStages, T::kShared, run_fragments<T>};
}

// Steps of size 64 are half as long in int8. At most 99 KiB a block, which is what a multiprocessor of 8.6 and 8.9 has.
#define KERNELS(element, type, more)                                            \
  blocks_of<BlockTile<element, 4, 8, 2 * more>>("sm80_" type "_64x256"),        \
      blocks_of<BlockTile<element, 2, 8, 3 * more>>("sm80_" type "_64x128"),    \
      blocks_of<BlockTile<element, 2, 4, 4 * more>>("sm80_" type "_64x64"),     \
      blocks_of<BlockTile<element, 1, 4, 6 * more>>("sm80_" type "_64x32"),     \
      blocks_of<BlockTile<element, 1, 2, 6 * more>>("sm80_" type "_64x16"),     \
      fragments_of<FragmentTile<element, 2, 2, 8, 4>>("sm80_" type "_256x128"), \
      fragments_of<FragmentTile<element, 1, 2, 8, 3>>("sm80_" type "_128x128"), \
      fragments_of<FragmentTile<element, 1, 2, 4, 4>>("sm80_" type "_128x64"),  \
      fragments_of<FragmentTile<element, 1, 1, 4, 8>>("sm80_" type "_128x32"),  \
      fragments_of<FragmentTile<element, 1, 1, 2, 8>>("sm80_" type "_128x16")
constexpr std::array kKernels = {KERNELS(Element::bfloat16, "bf16", 1), KERNELS(Element::float16, "f16", 1),
                                 KERNELS(Element::int8, "int8", 2)};
#undef KERNELS

}  // namespace

const Kernel* kernels_sm80(int* count) {
  *count = static_cast<int>(kKernels.size());
  return kKernels.data();
}

}  // namespace pycompress::sparse::cuda::blocks
