// The quantizer of int8_linear and x down^T in one kernel, so that x is read from memory once (branch.h).
//
// The product is t^T = down x^T by mma.m16n8k16. A lane has 8 neighbouring positions of two rows of x, 16 bytes each as
// they are in memory. A sum does not care which position is which as long as x and down agree, so these registers are
// B fragments as they are, and 16 bytes of a row of down, straight from the L2, halves of A fragments: lane t of a
// group of four has positions 8t to 8t + 7 of a step of 32. The registers of x are then rounded. Where a row is too
// long for them, x is read again.
#include "branch.h"

#include "../common/check.h"
#include "../cuda/few_rows.cuh"
#include "../cuda/launch.h"
#include "../int8/quantize.cuh"

namespace pycompress::low_rank::branch {
namespace {

using int8::cuda::Range;
using int8::cuda::Rounding;
using int8::cuda::Vector;

constexpr int kGroup = 32;                      // ranks whose sums the warps hand over at once
constexpr int kPitch = kGroup + 4;              // floats: so that the lanes of a store meet in no bank
constexpr int kSumsBytes = kRows * kPitch * 4;  // of one warp

struct Arguments {
  const uint16_t* x;
  int64_t m, ldx;
  int k, k_pad;
  bool vectors;  // all rows of x are aligned to 16 bytes, and k is a multiple of 8
  int activation_bits;
  const uint16_t* down;  // [rank_pad][k_pad]
  int rank, rank_pad;
  Between to;
};

// What a lane has of one step: 8 positions of rows g and g + 8 of the block's.
template <Type kType>
struct Piece {
  Vector<kType> row[2];
};

// The steps of a warp: kHeld of them at most, of whole vectors, which stay in registers; 0: any number, read whenever
// they are wanted. A row that is not there has the values of the last one.
template <Type kType, int kHeld>
class Pieces {
 public:
  __device__ explicit Pieces(const Arguments& of) : k_(of.k), k_pad_(of.k_pad), vectors_(of.vectors) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int64_t row = first_row() + threadIdx.x % 32 / 4 + half * 8;
      x_[half] = of.x + min(row, of.m - 1) * of.ldx;
    }
    // All loads are under way before any is waited for.
#pragma unroll
    for (int i = 0; i < kHeld; ++i) held_[i] = load_vectors(begin() + i * stride());
  }

  // f(piece, its first position); backwards: what was read last, which the L2 still has, comes first.
  template <bool kBackwards, class F>
  __device__ void each(F&& f) const {
    if constexpr (kHeld > 0) {
      each_step([&](int i, int first) { f(held_[i], first); });
    } else {
      const int steps = (k_pad_ - begin() + stride() - 1) / stride(), stride_on = kBackwards ? -stride() : stride();
      int first = kBackwards ? begin() + (steps - 1) * stride() : begin();
      Piece<kType> next = load(first);
      for (int left = steps; left > 0; --left, first += stride_on) {
        const Piece<kType> piece = next;
        if (left > 1) next = load(first + stride_on);
        f(piece, first);
      }
    }
  }

  __device__ static int64_t first_row() { return static_cast<int64_t>(blockIdx.x) * kRows; }

 private:
  __device__ static int stride() { return static_cast<int>(blockDim.x); }  // a step of 32 positions a warp
  __device__ static int begin() { return static_cast<int>(threadIdx.x / 32 * kStep + threadIdx.x % 4 * 8); }

  template <class F>
  __device__ void each_step(F&& f) const {
#pragma unroll
    for (int i = 0; i < kHeld; ++i)
      if (const int first = begin() + i * stride(); first < k_pad_) f(i, first);
  }

  // Zeros behind k.
  __device__ Piece<kType> load(int first) const {
    if (vectors_) return load_vectors(first);
    return {{Vector<kType>::load(x_[0], first, k_, false), Vector<kType>::load(x_[1], first, k_, false)}};
  }
  __device__ Piece<kType> load_vectors(int first) const {
    Piece<kType> piece{};
    if (first >= k_) return piece;
#pragma unroll
    for (int half = 0; half < 2; ++half) piece.row[half] = Vector<kType>::load(x_[half], first, INT32_MAX, true);
    return piece;
  }

  const int k_, k_pad_;
  const bool vectors_;
  const uint16_t* x_[2];
  Piece<kType> held_[kHeld > 0 ? kHeld : 1];
};

// Of kTiles x 16 ranks and 2 x 8 rows, as mma has them: ranks g and g + 8, rows 2t and the next.
template <int kTiles>
using Sums = float[kTiles][2][4];

// c += down x^T of a piece. down: the lane's row of the first tile.
template <Type kType, int kTiles>
__device__ inline void multiply(Sums<kTiles>& c, const Piece<kType>& piece, const uint16_t* down, int k_pad) {
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) {
    const uint4 low = *reinterpret_cast<const uint4*>(down + tile * 16 * k_pad);
    const uint4 high = *reinterpret_cast<const uint4*>(down + (tile * 16 + 8) * k_pad);
    const uint32_t first[] = {gpu::converted<kType>(low.x), gpu::converted<kType>(high.x), gpu::converted<kType>(low.y),
                              gpu::converted<kType>(high.y)};
    const uint32_t second[] = {gpu::converted<kType>(low.z), gpu::converted<kType>(high.z),
                               gpu::converted<kType>(low.w), gpu::converted<kType>(high.w)};
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const uint32_t (&x)[4] = piece.row[half].words;
      gpu::multiply<kType>(c[tile][half], first, x[0], x[1]);
      gpu::multiply<kType>(c[tile][half], second, x[2], x[3]);
    }
  }
}

// The sums of all warps, in the order of k, become t of the ranks from `rank`.
template <Type kType, int kTiles>
__device__ inline void write_between(const Arguments& of, const Sums<kTiles>& c, int rank) {
  auto* shared = reinterpret_cast<float*>(gpu::dynamic_shared());  // [warps][kRows][kPitch]
  const int lane = static_cast<int>(threadIdx.x) % 32, threads = static_cast<int>(blockDim.x);
  float* mine = shared + (threadIdx.x / 32 * kRows + lane % 4 * 2) * kPitch + lane / 4;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kRows;
#pragma unroll
  for (int group = 0; group < kTiles / 2; ++group) {
    __syncthreads();  // what was there has been read
#pragma unroll
    for (int tile = 0; tile < 2; ++tile)
#pragma unroll
      for (int half = 0; half < 2; ++half)
#pragma unroll
        for (int i = 0; i < 4; ++i)
          mine[(half * 8 + i % 2) * kPitch + tile * 16 + i / 2 * 8] = c[group * 2 + tile][half][i];
    __syncthreads();
    for (int i = static_cast<int>(threadIdx.x); i < kRows * kGroup; i += threads) {
      const int at = i / kGroup, column = i % kGroup;
      float sum = 0;
      for (int warp = 0; warp < threads / 32; ++warp) sum += shared[(warp * kRows + at) * kPitch + column];
      if (row + at < of.m)
        of.to.t[(row + at) * of.rank_pad + rank + group * kGroup + column] = gpu::rounded<kType>(sum);
    }
  }
}

// How the block's rows are rounded, from what their lanes have met; in shared memory, and for each row there is in
// scale and zero_point.
__device__ inline const Rounding* finish_ranges(const Arguments& of, const Range (&ranges)[2]) {
  auto* shared = reinterpret_cast<float*>(gpu::dynamic_shared());  // [3][kRows][kMaxWarps]
  auto* roundings = reinterpret_cast<Rounding*>(shared + 3 * kRows * kMaxWarps);
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const int warps = static_cast<int>(blockDim.x) / 32;
  __syncthreads();  // what was there has been read
#pragma unroll
  for (int half = 0; half < 2; ++half)
#pragma unroll
    for (int i = 0; i < 3; ++i) {
      float most = ranges[half].values[i];
      most = fmaxf(most, gpu::shuffle_xor(most, 1));
      most = fmaxf(most, gpu::shuffle_xor(most, 2));
      if (lane % 4 == 0) shared[(i * kRows + lane / 4 + half * 8) * kMaxWarps + warp] = most;
    }
  __syncthreads();
  for (int row = warp; row < kRows; row += warps) {
    Range range;
#pragma unroll
    for (int i = 0; i < 3; ++i) {
      float most = lane < warps ? shared[(i * kRows + row) * kMaxWarps + lane] : 0;
#pragma unroll
      for (int mask = kMaxWarps / 2; mask > 0; mask /= 2) most = fmaxf(most, gpu::shuffle_xor(most, mask));
      range.values[i] = most;
    }
    if (lane != 0) continue;
    const Rounding rounding(range, of.activation_bits);
    roundings[row] = rounding;
    const int64_t at = static_cast<int64_t>(blockIdx.x) * kRows + row;
    if (at >= of.m) continue;
    of.to.rows.scale[at] = rounding.scale;
    of.to.rows.zero_point[at] = rounding.zero_point;
  }
  __syncthreads();
  return roundings;
}
constexpr int kRoundingsEnd = 3 * kRows * kMaxWarps * 4 + kRows * static_cast<int>(sizeof(Rounding));

// Blocks of the same rows, blockIdx.y, share the ranks, kTiles x 16 at a time; the first of them rounds the rows.
template <Type kType, int kHeld, int kTiles>
__global__ void __launch_bounds__(kMaxWarps * 32, 1) quantize_down_rows(const __grid_constant__ Arguments of) {
  const Pieces<kType, kHeld> x(of);
  const int lane = static_cast<int>(threadIdx.x) % 32;
  Range ranges[2];
  for (int rank = static_cast<int>(blockIdx.y) * kTiles * 16; rank < of.rank_pad; rank += gridDim.y * kTiles * 16) {
    Sums<kTiles> c = {};
    if (rank < of.rank) {
      const uint16_t* down = of.down + (rank + lane / 4) * of.k_pad;
      x.template each<false>([&](const Piece<kType>& piece, int first) {
        multiply<kType, kTiles>(c, piece, down + first, of.k_pad);
        if (rank != 0) return;
#pragma unroll
        for (int half = 0; half < 2; ++half)
#pragma unroll
          for (int i = 0; i < 8; ++i) ranges[half].add(piece.row[half].get(i));
      });
    }
    write_between<kType, kTiles>(of, c, rank);
  }
  if (blockIdx.y != 0) return;

  const Rounding* roundings = finish_ranges(of, ranges);
  const int row = lane / 4;
  const Rounding rounding[] = {roundings[row], roundings[row + 8]};
  const auto left = static_cast<int>(min(of.m - x.first_row(), static_cast<int64_t>(kRows)));
  int8_t* s = of.to.rows.s + (x.first_row() + row) * of.k_pad;
  x.template each<true>([&](const Piece<kType>& piece, int first) {
#pragma unroll
    for (int half = 0; half < 2; ++half)
      if (row + half * 8 < left)
        int8::cuda::store_rounded(s + half * 8 * of.k_pad, piece.row[half], rounding[half], first, of.k);
  });
}

template <Type kType, int kHeld, int kTiles>
void run(const Arguments& of, int parts, Stream stream) {
  const int warps = branch::warps(of.k), shared = std::max(warps * kSumsBytes, kRoundingsEnd);
  const dim3 grid(static_cast<unsigned>(divide_up(of.m, kRows)), static_cast<unsigned>(parts));
  const gpu::Launch at{grid, dim3(static_cast<unsigned>(warps * 32)), static_cast<size_t>(shared), stream};
  gpu::launch<quantize_down_rows<kType, kHeld, kTiles>>("quantize_down", at, of);
}

template <Type kType>
void run_as(const Arguments& of, Stream stream) {
  // Few rows leave multiprocessors idle: the ranks are shared among blocks, each of which reads x.
  const bool few = 2 * divide_up(of.m, kRows) <= gpu::device().multiprocessors;
  const int groups = static_cast<int>(divide_up(of.rank, kGroup)), parts = few ? groups : 1;
  if (of.vectors && of.k <= kHeld) return run<kType, kHeldSteps, 2>(of, parts, stream);
  if (parts == groups) return run<kType, 0, 2>(of, parts, stream);
  if (groups == 2) return run<kType, 0, 4>(of, 1, stream);
  run<kType, 0, 8>(of, 1, stream);
}

}  // namespace

int64_t workspace_bytes(const cuda::Factors& shape, int64_t m) {
  return round_up(m * shape.k_pad(), kAlign) + m * (shape.rank_pad() * 2 + 8);
}

Between between(const cuda::Factors& shape, int64_t m, uint8_t* workspace) {
  uint8_t* t = workspace + round_up(m * shape.k_pad(), kAlign);
  auto* scale = reinterpret_cast<float*>(t + m * shape.rank_pad() * 2);
  return {{reinterpret_cast<int8_t*>(workspace), scale, reinterpret_cast<int32_t*>(scale + m)},
          reinterpret_cast<uint16_t*>(t)};
}

void quantize_down(const Problem& p) {
  const cuda::Factors& shape = p.shape;
  check(p.type == Type::float16 || p.type == Type::bfloat16, "low_rank_linear: x is of type ", static_cast<int>(p.type),
        ", expected float16 or bfloat16");
  check(shape.n >= 1 && shape.k >= 1 && shape.k <= kMaxK && shape.rank >= 1 && shape.rank <= kMaxRank,
        "low_rank_linear: the packed weight is ", shape.n, "x", shape.k, " of rank ", shape.rank,
        ", expected n >= 1, k from 1 to ", kMaxK, " and a rank from 1 to ", kMaxRank);
  check(p.activation_bits == 7 || p.activation_bits == 8, "low_rank_linear: activation_bits is ", p.activation_bits,
        ", expected 7 or 8");
  check(divide_up(p.m, kRows) <= 0x7fffffff, "low_rank_linear: x has ", p.m, " rows, more than one launch can take");
  if (p.m == 0) return;
  const Arguments arguments{static_cast<const uint16_t*>(p.x),
                            p.m,
                            p.ldx,
                            static_cast<int>(shape.k),
                            static_cast<int>(shape.k_pad()),
                            reinterpret_cast<uintptr_t>(p.x) % 16 == 0 && p.ldx % 8 == 0 && shape.k % 8 == 0,
                            p.activation_bits,
                            p.factors,
                            static_cast<int>(shape.rank),
                            static_cast<int>(shape.rank_pad()),
                            between(shape, p.m, p.workspace)};
  if (p.type == Type::float16)
    run_as<Type::float16>(arguments, p.stream);
  else
    run_as<Type::bfloat16>(arguments, p.stream);
}

void linear(const Problem& p, const int8::cuda::Kernel* forced) {
  quantize_down(p);
  const cuda::Factors& shape = p.shape;
  const Between of = between(shape, p.m, p.workspace);
  int8::cuda::Problem product{};
  product.rows = of.rows;
  product.m = p.m, product.n = shape.n, product.k = shape.k;
  product.packed = p.residual;
  product.weight_scale = p.weight_scale;
  product.bias = p.bias, product.activation = p.activation;
  product.y = p.y, product.y_type = p.type;
  product.stream = p.stream;
  product.branch = {of.t, p.factors + shape.up_begin(), shape.rank_pad(), shape.rank, p.type};
  int8::cuda::linear(product, forced);
}

}  // namespace pycompress::low_rank::branch
