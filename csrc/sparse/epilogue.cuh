// From sums to y where the weight is the A operand (y^T = W x^T). A warp has the sums of 16 channels x 8 kTiles rows of
// x: with g = lane / 4, t = lane % 4, of tile j
//   [j][0], [j][1]: channel g, rows 8 j + 2 t and the next;  [j][2], [j][3]: the same rows, channel g + 8
// which are the fragments of mma (sums[j][i]) and the registers of wgmma (sums[4 j + i]). They pass through shared
// memory of the warp's own, so that y is written in whole sectors, four channels a lane.
//
//   const Finish<kElement> finish(out, n);   // n: the warp's first channel; before the products, so that what it reads
//   ...                                      // has come when they are done
//   write<kTiles>(sums, finish, m, staged);  // m: the warp's first row; staged: kStagedBytes<kTiles>
#pragma once

#include <cstring>
#include <type_traits>

#include "../cuda/gemm_epilogue.cuh"
#include "../int8/epilogue.cuh"
#include "element.h"

namespace pycompress::sparse::cuda {
namespace {

using gpu::finish_plain;
using gpu::kLanes;
using int8::cuda::finish_plain;

// Rows of 16 sums, 4 words longer: a store of 8 channels x 4 of each second row meets in no bank, nor does a load of 4
// channels x 8 rows.
constexpr int kStagedPitch = 20, kPieceTiles = 4;  // words; tiles that are staged at once
template <int kTiles>
constexpr int kStagedBytes = (kTiles < kPieceTiles ? kTiles : kPieceTiles) * 8 * kStagedPitch * 4;

// The first of the four channels that a lane writes, of 16; its row of eight is lane % 8.
__device__ inline int first_channel() { return static_cast<int>(threadIdx.x) % 32 / 8 * kLanes; }

// What sums of a kind of values need to become y; a kernel's argument.
template <Element kElement>
using Output = std::conditional_t<kElement == Element::int8, int8::cuda::Output, gpu::FloatOutput>;

// What a lane does with its four channels.
template <Element kElement>
class Finish {
 public:
  using Sum = typename Output<kElement>::Sum;
  using Row = typename Output<kElement>::Row;

  __device__ Finish(const Output<kElement>& out, int64_t n) : out_(out), n_(n + first_channel()), columns_(out, n_) {}

  __device__ bool takes(int64_t m) const { return m < out_.m && n_ < out_.n; }
  __device__ Row row(int64_t m) const { return m < out_.m ? row_at(out_, m) : Row{}; }
  __device__ void store(const Sum (&sums)[kLanes], const Row& row, int64_t m) const {
    finish(out_, sums, columns_, row, m, n_);
  }
  // The same where there is no activation and all values are there: as short as it can be.
  template <Type kType>
  __device__ void store_plain(const Sum (&sums)[kLanes], const Row& row, int64_t m) const {
    finish_plain<kType>(out_, sums, columns_, row, m, n_);
  }
  // f(the type of y) where store_plain() does; false where it does not.
  template <class F>
  __device__ bool plain(F&& f) const {
    if (!out_.vectors || out_.activation != Activation::none || out_.type == Type::int32) return false;
    if constexpr (kElement != Element::int8)
      f(std::integral_constant<Type, type_of(kElement)>{});
    else if (out_.type == Type::float32)
      f(std::integral_constant<Type, Type::float32>{});
    else if (out_.type == Type::bfloat16)
      f(std::integral_constant<Type, Type::bfloat16>{});
    else
      f(std::integral_constant<Type, Type::float16>{});
    return true;
  }

 private:
  const Output<kElement>& out_;
  const int64_t n_;
  const typename Output<kElement>::Columns columns_;
};

// The kernel's argument of a problem whose packed int8 weight begins as that of csrc/int8/cuda.h: column_sum.
template <Element kElement, class Problem>
Output<kElement> output_of(const Problem& p) {
  if constexpr (kElement == Element::int8) {
    int8::cuda::Problem as{};
    as.rows = p.rows, as.m = p.m, as.n = p.shape.n, as.k = p.shape.k, as.packed = p.packed, as.weight_scale = p.scale;
    as.bias = p.bias, as.activation = p.activation, as.y = p.y, as.y_type = p.y_type;
    return int8::cuda::output_of(as);
  } else {
    return gpu::float_output(p.bias, p.y, p.m, p.shape.n, p.shape.n, p.activation, p.y_type);
  }
}

template <class Sum, int kTiles>
__device__ inline Sum sum_at(const Sum (&sums)[kTiles][4], int tile, int i) {
  return sums[tile][i];
}
template <class Sum, int kCount>
__device__ inline Sum sum_at(const Sum (&sums)[kCount], int tile, int i) {
  return sums[4 * tile + i];
}

// Tiles [kPiece piece, kPiece piece + kPiece) into the warp's shared memory, [row][channel]; piece is one of kCount
// from kFirst on. Each register has to be named in the code: so one branch after the other halves the pieces.
template <int kPiece, int kFirst, int kCount, class Sum, class Sums>
__device__ inline void stage(const Sums& sums, int piece, Sum* to) {
  if constexpr (kCount > 1) {
    constexpr int kHalf = kCount / 2;
    if (piece < kFirst + kHalf)
      stage<kPiece, kFirst, kHalf>(sums, piece, to);
    else
      stage<kPiece, kFirst + kHalf, kCount - kHalf>(sums, piece, to);
  } else {
#pragma unroll
    for (int j = 0; j < kPiece; ++j)
#pragma unroll
      for (int i = 0; i < 4; ++i) to[(j * 8 + i % 2) * kStagedPitch + i / 2 * 8] = sum_at(sums, kFirst * kPiece + j, i);
  }
}

// store(four sums, what finish.row() knows of the row, the row) for what a lane writes, kPiece tiles at once. kPlain:
// store() is short.
template <int kTiles, int kPiece, bool kPlain, class Finish, class Sums, class Store>
__device__ inline void write_pieces(const Sums& sums, const Finish& finish, int64_t m, uint8_t* shared, Store&& store) {
  static_assert(kTiles % kPiece == 0);
  auto* staged = reinterpret_cast<typename Finish::Sum*>(shared);
  const int lane = static_cast<int>(threadIdx.x) % 32, first = lane % 8;
  auto* to = staged + lane % 4 * 2 * kStagedPitch + lane / 4;
  const auto* from = staged + first * kStagedPitch + first_channel();
#pragma unroll 1
  for (int piece = 0; piece < kTiles / kPiece; ++piece, m += kPiece * 8) {
    typename Finish::Row rows[kPiece];
    if constexpr (kPlain)
#pragma unroll
      for (int j = 0; j < kPiece; ++j) rows[j] = finish.row(m + j * 8 + first);  // on its way while the sums are staged
    stage<kPiece, 0, kTiles / kPiece>(sums, piece, to);
    __syncwarp();
#pragma unroll(kPlain ? kPiece : 1)
    for (int j = 0; j < kPiece; ++j) {
      const int64_t row = m + j * 8 + first;
      if (!finish.takes(row)) continue;
      const uint4 bits = *reinterpret_cast<const uint4*>(from + j * 8 * kStagedPitch);
      const uint32_t words[] = {bits.x, bits.y, bits.z, bits.w};
      typename Finish::Sum four[kLanes];
      std::memcpy(four, words, sizeof(four));
      if constexpr (kPlain)
        store(four, rows[j], row);
      else
        store(four, finish.row(row), row);
    }
    __syncwarp();
  }
}

template <int kTiles, int kPieceOf = kPieceTiles, class Finish, class Sums>
__device__ inline void write(const Sums& sums, const Finish& finish, int64_t m, uint8_t* staged) {
  constexpr int kPiece = kTiles < kPieceOf ? kTiles : kPieceOf;
  const bool is_plain = finish.plain([&](auto type) {
    write_pieces<kTiles, kPiece, true>(sums, finish, m, staged, [&](const auto& four, const auto& row, int64_t at) {
      finish.template store_plain<decltype(type)::value>(four, row, at);
    });
  });
  if (is_plain) return;
  write_pieces<kTiles, kPiece, false>(
      sums, finish, m, staged, [&](const auto& four, const auto& row, int64_t at) { finish.store(four, row, at); });
}

}  // namespace
}  // namespace pycompress::sparse::cuda
