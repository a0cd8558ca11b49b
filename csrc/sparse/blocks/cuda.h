// Block sparse linear on CUDA: the contract of the op there.
//
//   y[m, n] = act(sum_k x[m, k] w[n, k] + bias[n])             weights of bfloat16 or float16, x and y of the same type
//   y[m, n] = act((float(acc) * sx[m]) * sw[n] + bias[n])      int8 weights: the formula of csrc/int8/cuda.h
//
// The weight is the dense one but for whole blocks of size x size (64, 32 or 16), which are not stored, not read and
// not multiplied. It is the first operand of the products (y^T = W x^T), so that rows of x are what a tile may have
// many of. Integers are exact. With c = ceil(k / 16) steps, of which those of present blocks count,
//     |y - y64| <= 2^-23 (17 (c + 1) + 8) * sum_k |x w| + eps (|y| + |bias|)    before the activation,
// in a fixed order: the same bits at every call on one kind of device. Zeros within a present block are multiplied: NaN
// or Inf of x shows in all channels of the block.
//
// The packed weight is one byte vector, the same for all kernels:
//   int8: int32 column_sum[n_pad]; uint32 start[parts + 1]; uint32 order[parts]; filler up to 128 bytes; values; what
//   says where the values belong; filler up to 16 bytes
// A part is what one block of threads has of the channels: 64 (size 64) or 256. `order` has them by descending work, so
// that the last tiles of a launch are its lightest ones.
//
// Size 64: values are blocks, row-major: 64 channels of 128 (int8: 64) bytes of k, in ascending k within a part, one
// part after the other; behind them uint32 column[blocks], the block of k of each. Those of part p: start[p] up to
// start[p + 1].
// Sizes 32 and 16: values are fragments of 16 channels x 32 bytes of k in the order in which the lanes of a warp have
// them as the first operand of mma.sync (fragment_position), 16 bytes a lane. Behind them stands an Entry for each part
// and 128 bytes of k in which anything is present; those of part p: start[p] up to start[p + 1]. A fragment of int8 has
// two blocks of size 16, of which one may be zeros.
//
// The floor of the op: 2 m size^2 operations a block at the tensor cores' peak, or the bytes of x, of the stored blocks
// and of y at the memory's bandwidth. What limits large layers with many zeros is the L2: a tile reads its rows of x
// wherever anything of its channels is present.
//
// No CUDA header is needed here: the bindings are compiled by the host compiler alone.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "../../common/host_device.h"
#include "../../common/round.h"
#include "../../int8/cuda.h"
#include "../element.h"

namespace pycompress::sparse::cuda::blocks {

using Stream = int8::cuda::Stream;

constexpr int kBlock = 64;                                   // channels and positions of a block of size 64
constexpr int kFragmentBytes = 512, kFragmentChannels = 16;  // of 32 bytes of k
constexpr int kStepBytes = 128;                              // of k, what an entry stands for
constexpr int kEntryMasks = 2, kMaskChannels = 128;          // 8 x 4 fragments a mask

// Bit 8 step + i of mask[half]: whether fragment i of the part's channels from 128 half is there in 32 bytes of k from
// 32 step. The fragments of an entry stand in the order of the bits, those of mask[0] first.
struct Entry {
  uint32_t column;  // of 128 bytes of k
  uint32_t first;   // fragment
  uint32_t mask[kEntryMasks];
};

struct Shape {
  Element element;
  int size;  // of a block
  int64_t n, k;
  int64_t stored = 0;  // blocks (size 64) or fragments

  PYCOMPRESS_HOST_DEVICE int part_channels() const { return size == kBlock ? kBlock : kEntryMasks * kMaskChannels; }
  PYCOMPRESS_HOST_DEVICE int64_t parts() const { return (n + part_channels() - 1) / part_channels(); }
  // Bytes of what `stored` counts, and of k that one of it, or an entry, stands for.
  PYCOMPRESS_HOST_DEVICE int stored_bytes() const {
    return size == kBlock ? kBlock * kBlock * bytes_of(element) : kFragmentBytes;
  }
  PYCOMPRESS_HOST_DEVICE int step_bytes() const { return size == kBlock ? kBlock * bytes_of(element) : kStepBytes; }
  PYCOMPRESS_HOST_DEVICE int64_t steps() const { return (k * bytes_of(element) + step_bytes() - 1) / step_bytes(); }
  // Byte offsets.
  PYCOMPRESS_HOST_DEVICE int64_t n_pad() const { return (n + 127) / 128 * 128; }
  PYCOMPRESS_HOST_DEVICE int64_t start() const { return element == Element::int8 ? n_pad() * 4 : 0; }
  PYCOMPRESS_HOST_DEVICE int64_t order() const { return start() + (parts() + 1) * 4; }
  PYCOMPRESS_HOST_DEVICE int64_t values() const { return (order() + parts() * 4 + 127) / 128 * 128; }
  PYCOMPRESS_HOST_DEVICE int64_t behind() const { return values() + stored * stored_bytes(); }
};
// Throws where no buffer of so many bytes can hold it.
void check_packed(const Shape& shape, int64_t bytes);

struct Position {
  int channel, byte;  // within a fragment
};
// Byte `i` of a fragment.
PYCOMPRESS_HOST_DEVICE constexpr Position fragment_position(int i) {
  return {i / 64 + i % 16 / 4 % 2 * 8, i % 16 / 8 * 16 + i / 16 % 4 * 4 + i % 4};
}

struct Packed {
  Shape shape;
  std::vector<uint8_t> bytes;
};
// A canonical weight (weights/sparse.py): mask uint8 [n][ceil(k / 8)]; values in the order of its bits, uint16 or int8
// as `element` says; count: how many there are. A block is present where a bit of it is set. On the host.
Packed pack(const uint8_t* mask, const void* values, int64_t count, Element element, int size, int64_t n, int64_t k);

// The weight with its zeros [n, k], on the device: float32, or int8 where it is stored in int8.
void unpack(const uint8_t* packed, const Shape& shape, void* dense, Stream stream);

struct Problem {
  const void* x;          // halves: [m, k] of the values' type, aligned to 16 bytes, row stride ldx (elements)
  int64_t ldx;            // a multiple of 8
  int8::cuda::Rows rows;  // int8: what quantize() made of x, [m][round_up(k, int8::cuda::kPadK)]
  int64_t m;
  Shape shape;
  const uint8_t* packed;  // aligned to 16 bytes
  const float* scale;     // int8: [n]; null for y of Type::int32, which is the sums
  const float* bias;      // [n] or null
  Activation activation;
  void* y;      // [m, n], dense
  Type y_type;  // halves: that of the values
  Stream stream;
};

// Tiles of bn channels x bm rows of x. `size`: 64, or 16 for what takes sizes 32 and 16. `arch` is the compute
// capability that the code needs, times ten: 80 runs there and on all later ones, 90 on 9.0 alone. `shared`: bytes of a
// block of threads.
struct Kernel {
  const char* name;
  Element element;
  int size, arch, bn, bm, stages, shared;
  void (*run)(const Problem& problem);
};
const Kernel* kernels(int* count);             // all, best first where the tiles are alike
const Kernel& kernel_named(const char* name);  // throws where there is none
const Kernel& chosen_kernel(const Shape& shape, int64_t m, int arch, int multiprocessors);

void linear(const Problem& problem, const Kernel* forced = nullptr);

// A rough count of cycles for m rows of x, where `density` is the share of what could be stored that is.
double cycles(const Kernel& kernel, const Shape& shape, double density, int64_t m, int multiprocessors);

}  // namespace pycompress::sparse::cuda::blocks
