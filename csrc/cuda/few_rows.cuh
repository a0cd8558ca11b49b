// What the kernels for few rows of x share: y^T = W x^T by mma.m16n8k16, the weights as its A operand. Each warp
// streams steps of kStep positions through a ring of its own in shared memory, the weights and its part of x, so that
// the main loop has no barrier; at the end the warps' sums are added, and, where k is split among blocks, the blocks'.
#pragma once

#include "../common/activation.h"
#include "convert.cuh"
#include "device.cuh"

namespace pycompress::gpu {
namespace {

constexpr int kStep = 64;               // positions that a warp takes at once
constexpr int kInputPitch = 2 * kStep;  // bytes of one row of x in a stage

// kTiles x 16 channels and kColumns x 8 rows of x a block, whose kWarps warps share its part of k.
template <Type kTypeOf, int kTilesOf, int kColumnsOf, int kWarpsOf>
struct Tile {
  static constexpr Type kType = kTypeOf;
  static constexpr int kTiles = kTilesOf, kColumns = kColumnsOf, kWarps = kWarpsOf;
  static constexpr int kChannels = kTiles * 16, kRows = kColumns * 8, kThreads = kWarps * 32;
  static constexpr int kInputBytes = kRows * kInputPitch;
  // Sums that warps hand over: [kWarps / 2][kRows][kPitch]; the filler keeps lanes in banks of their own.
  static constexpr int kPitch = kChannels + 4;
  static constexpr int kExchange = kWarps / 2 * kRows * kPitch * 4;
};

// Some rows of x; aligned: all of them, to 16 bytes.
struct Input {
  const uint16_t* x;
  int64_t ldx;
  int rows, k;
  bool aligned;
};

// Where 16 bytes of x, `chunk` of 8 of its row, lie: so that neither copies nor ldmatrix meet in a bank.
__device__ inline int input_offset(int row, int chunk) { return row * kInputPitch + (chunk ^ (row & 7)) * 16; }

// A warp copies the positions of one step; zeros behind k.
__device__ inline void load_input(uint8_t* to, const Input& from, int step, int lane) {
  const int chunk = lane % 8, k = step * kStep + chunk * 8, count = min(8, max(0, from.k - k));
  for (int row = lane / 8; row < from.rows; row += 4) {
    uint8_t* target = to + input_offset(row, chunk);
    const uint16_t* x = from.x + row * from.ldx + (count > 0 ? k : 0);
    if (from.aligned)
      copy_async(target, x, count * 2);
    else
      for (int i = 0; i < 8; ++i) reinterpret_cast<uint16_t*>(target)[i] = i < count ? x[i] : 0;
  }
}

// 8 rows of x as the fragments of 32 positions: registers 0, 1 and 2, 3. Rows that are not there get the last one's
// values; nobody looks at their columns.
__device__ inline void load_fragments(uint32_t (&b)[4], const uint8_t* input, int rows, int half, int column,
                                      int lane) {
  load_matrices(b, input + input_offset(min(column * 8 + lane % 8, rows - 1), half * 4 + lane / 8));
}

template <Type kType>
__device__ inline void multiply(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  if constexpr (kType == Type::float16)
    mma_f16(c, a, b0, b1);
  else
    mma_bf16(c, a, b0, b1);
}

// y of some rows and channels, and what turns sums into it.
struct Output {
  uint16_t* y;
  int64_t n;                  // row stride, and how many channels there are
  const float *scale, *bias;  // [n] or null
  Activation activation;
};

template <Type kType>
__device__ inline void store(const Output& to, int64_t row, int64_t channel, float v) {
  if (channel >= to.n) return;
  if (to.scale != nullptr) v = v * to.scale[channel];
  if (to.bias != nullptr) v = v + to.bias[channel];
  to.y[row * to.n + channel] = rounded<kType>(activate(to.activation, Scalar{v}).value);
}

// sums[row][channel] of one warp, row stride kPitch, (+)= c.
template <class T, bool kAdd>
__device__ inline void hand_over(float* sums, const float (&c)[T::kTiles][T::kColumns][4], int lane) {
  for (int tile = 0; tile < T::kTiles; ++tile)
    for (int column = 0; column < T::kColumns; ++column)
      for (int i = 0; i < 4; ++i) {
        const int row = column * 8 + lane % 4 * 2 + i % 2, channel = tile * 16 + lane / 4 + i / 2 * 8;
        float& sum = sums[row * T::kPitch + channel];
        sum = kAdd ? sum + c[tile][column][i] : c[tile][column][i];
      }
}

// The sums of all warps: take(row, channel, sum) for each of `rows` rows, by one thread each, neighbours taking
// neighbouring channels. The order of the additions is fixed.
template <class T, class F>
__device__ inline void add_up(const float (&c)[T::kTiles][T::kColumns][4], float* shared, int rows, F&& take) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  float* of_pair = shared + warp % (T::kWarps / 2) * T::kRows * T::kPitch;
  __syncthreads();
  if (warp >= T::kWarps / 2) hand_over<T, false>(of_pair, c, lane);
  __syncthreads();
  if (warp < T::kWarps / 2) hand_over<T, true>(of_pair, c, lane);
  __syncthreads();
  for (int i = threadIdx.x; i < rows * T::kChannels; i += T::kThreads) {
    const float* pairs = shared + i / T::kChannels * T::kPitch + i % T::kChannels;
    float sum = pairs[0];
    for (int other = 1; other < T::kWarps / 2; ++other) sum += pairs[other * T::kRows * T::kPitch];
    take(i / T::kChannels, i % T::kChannels, sum);
  }
}

// Parts of k in several blocks, of one tile of channels and rows.
struct Parts {
  float* workspace;   // [count][rows of the tile][channels of the tile]
  uint32_t* counter;  // 0 before the launch
  int mine, count;
};

// Whether this block is the last of them to come. What each wrote before is then there. It waits for nobody, so blocks
// may run in any order and number. `arrived`: four bytes of shared memory.
__device__ inline bool comes_last(const Parts& parts, uint32_t* arrived) {
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) *arrived = atomicAdd(parts.counter, 1u);
  __syncthreads();
  __threadfence();
  return *arrived == static_cast<uint32_t>(parts.count - 1);
}

// The sums of all warps and all blocks, in the order of k, become rows [row, row + rows) and channels from `channel` of
// y. `shared` has T::kExchange bytes.
template <class T>
__device__ inline void finish(const float (&c)[T::kTiles][T::kColumns][4], uint8_t* shared, const Parts& parts,
                              const Output& to, int64_t row, int rows, int64_t channel) {
  constexpr int kTile = T::kRows * T::kChannels;
  auto* sums = reinterpret_cast<float*>(shared);
  if (parts.count == 1) {
    add_up<T>(c, sums, rows, [&](int i, int j, float sum) { store<T::kType>(to, row + i, channel + j, sum); });
    return;
  }
  float* mine = parts.workspace + parts.mine * kTile;
  add_up<T>(c, sums, rows, [&](int i, int j, float sum) { mine[i * T::kChannels + j] = sum; });
  if (!comes_last(parts, reinterpret_cast<uint32_t*>(shared))) return;
  for (int i = threadIdx.x; i < rows * T::kChannels; i += T::kThreads) {
    float sum = __ldcg(parts.workspace + i);
    for (int other = 1; other < parts.count; ++other) sum += __ldcg(parts.workspace + other * kTile + i);
    store<T::kType>(to, row + i / T::kChannels, channel + i % T::kChannels, sum);
  }
}

}  // namespace
}  // namespace pycompress::gpu
