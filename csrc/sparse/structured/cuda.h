// 2:4 sparse linear on the CUDA tensor cores: the contract of the op there. Of each four weights of a channel that
// follow each other (k a multiple of four) at most two are not zero; the tensor cores skip the others (Mishra et al.,
// "Accelerating sparse deep neural networks", 2021).
//
//   bfloat16, float16   y[m, n] = act(sum_k x[m, k] w[n, k] + bias[n]), x and y of the values' type
//   int8                as csrc/int8/cuda.h: the rows that quantize() made there, the same integers, the same float
//   steps
//
// Float values are the canonical float32 ones, which must all be numbers of the type: nothing is rounded. A step of the
// tensor cores adds 16 products to a sum, so with c = k_pad / 32 steps
//     |y - y64| <= 2^-23 * 17 (c + 1) * sum_k |x w| + eps (|y| + |bias|)    before the activation,
// in a fixed order: the same bits at every call on one kind of device. A group that has fewer than two weights is
// stored with zeros, which are multiplied: NaN or Inf in x may show where a channel has no weight.
//
// The weight is the A operand, y^T = W x^T: M are channels, N rows of x, in blocks of k of 128 stored bytes a channel.
// Packed, the values zeros behind n and k:
//   int8 alone: int32 column_sum[n_pad]
//   uint32 metadata[n_pad / 64][blocks][4 warps][32 lanes][words]
//   values[n_pad][k_pad / 2]: of each four k two, in ascending k
// The four bits of a group of four k are the position of the first stored value and, << 2, that of the second. With
// g = lane / 4, t = lane % 4, from the lowest bits in ascending k:
//   halves, 2 words: step s = 2 word + t / 2 of 32 k: bits 0 to 15 of row 16 warp + g, k 32 s + 16 (t % 2) and the next
//                    15; bits 16 to 31 of row 8 below
//   int8, 4 words:   step s = word of 64 k: row 16 warp + g + 8 (t % 2), k 64 s + 32 (t / 2) and the next 31
// which is how mma.sp and wgmma.sp (ordered_metadata) want their lanes' registers (PTX ISA 9.7.14.6, 9.7.15.6).
//
// The floor of the op: 2mnk operations at twice the tensor cores' dense peak, or the bytes of x, y and of the weights,
// 9 / 16 (int8: 5 / 8) of the dense ones, at the memory's bandwidth.
//
// No CUDA header is needed here: the bindings are compiled by the host compiler alone.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "../../common/check.h"
#include "../../common/host_device.h"
#include "../../common/round.h"
#include "../../cuda/tiles.h"
#include "../../int8/cuda.h"
#include "../element.h"

namespace pycompress::sparse::cuda::structured {

using Stream = int8::cuda::Stream;

constexpr int kBlockN = 64, kPadN = 128;  // channels: of a block of metadata; n_pad is a multiple of
constexpr int kStoredBytes = 128;         // of a channel in a block of k, which stand for 256 bytes of k

struct Packed {
  int64_t n, k;
  Element element;

  PYCOMPRESS_HOST_DEVICE int64_t n_pad() const { return (n + kPadN - 1) / kPadN * kPadN; }
  PYCOMPRESS_HOST_DEVICE int block_k() const { return 2 * kStoredBytes / bytes_of(element); }  // elements
  PYCOMPRESS_HOST_DEVICE int64_t blocks() const { return (k + block_k() - 1) / block_k(); }
  PYCOMPRESS_HOST_DEVICE int64_t k_pad() const { return blocks() * block_k(); }
  PYCOMPRESS_HOST_DEVICE int words() const { return element == Element::int8 ? 4 : 2; }
  PYCOMPRESS_HOST_DEVICE int metadata_bytes() const { return 4 * 32 * 4 * words(); }  // of a block: 1024 or 2048
  // Byte offsets.
  PYCOMPRESS_HOST_DEVICE int64_t metadata() const { return element == Element::int8 ? 4 * n_pad() : 0; }
  PYCOMPRESS_HOST_DEVICE int64_t values() const { return metadata() + n_pad() / kBlockN * blocks() * metadata_bytes(); }
  PYCOMPRESS_HOST_DEVICE int64_t value_stride() const { return blocks() * kStoredBytes; }  // bytes of a channel
  PYCOMPRESS_HOST_DEVICE int64_t bytes() const { return values() + n_pad() * value_stride(); }
};

// Where the bits of the group of four weights [channel][4 group ...] stand: which uint32 of the metadata, and from
// which bit on.
struct Place {
  int64_t word;
  int shift;
};
PYCOMPRESS_HOST_DEVICE inline Place place_of(const Packed& shape, int64_t channel, int64_t group) {
  const int64_t k = group * 4, block = k / shape.block_k();
  const auto inside = static_cast<int>(k % shape.block_k()), row = static_cast<int>(channel % kBlockN);
  const int warp = row / 16, g = row % 8, below = row / 8 % 2;
  int lane, word, shift;
  if (shape.element == Element::int8) {
    word = inside / 64;
    lane = g * 4 + inside / 32 % 2 * 2 + below;
    shift = inside % 32;
  } else {
    const int step = inside / 32;
    word = step / 2;
    lane = g * 4 + step % 2 * 2 + inside / 16 % 2;
    shift = below * 16 + inside % 16;
  }
  const int64_t at = (channel / kBlockN * shape.blocks() + block) * 4 + warp;
  return {(at * 32 + lane) * shape.words() + word, shift};
}

// The four bits of a group of which the weights in `mask` (bit i: position i, two bits at most) are not zero: other
// positions fill up, the first that are free.
PYCOMPRESS_HOST_DEVICE constexpr uint32_t pair_of(uint32_t mask) {
  int count = 0;
  for (int i = 0; i < 4; ++i) count += mask >> i & 1;
  for (int i = 0; i < 4 && count < 2; ++i)
    if ((mask >> i & 1) == 0) {
      mask |= 1u << i;
      ++count;
    }
  uint32_t first = 0;
  while ((mask >> first & 1) == 0) ++first;
  uint32_t second = first + 1;
  while ((mask >> second & 1) == 0) ++second;
  return first | second << 2;
}

struct Problem {
  const void* x;          // halves: [m, k] of the values' type, aligned to 16 bytes, row stride ldx (elements)
  int64_t ldx;            // a multiple of 8
  int8::cuda::Rows rows;  // int8: what quantize() made of x, [m][round_up(k, int8::cuda::kPadK)]
  int64_t m;
  Packed shape;
  const uint8_t* packed;  // aligned to 16 bytes
  const float* scale;     // int8: [n]; null for y of Type::int32, which is the sums
  const float* bias;      // [n] or null
  Activation activation;
  void* y;      // [m, n], dense
  Type y_type;  // halves: that of the values
  Stream stream;
};

// Tiles of bn channels x bm rows of x. `arch` is the compute capability that the code needs, times ten: 80 runs there
// and on all later ones, 90 on 9.0 alone. `shared`: bytes of a block.
struct Kernel {
  const char* name;
  Element element;
  int arch, bn, bm, stages, shared;
  void (*run)(const Problem& problem);
  int cluster = 1;  // blocks, their channels after each other, that fetch the rows of x together
};
const Kernel* kernels(int* count);             // all, best first where the tiles are alike
const Kernel& kernel_named(const char* name);  // throws where there is none
const Kernel& chosen_kernel(const Packed& shape, int64_t m, int arch, int multiprocessors);

inline bool runs_on(const Kernel& kernel, int arch) {
  return gpu::runs_on(kernel, arch) && kernel.shared <= gpu::max_shared(arch);
}

// A rough count of cycles, as in csrc/cuda/tiles.h: a multiprocessor computes its tiles one after the other, each block
// of k bound by the tensor cores, by shared memory or by what the L2 delivers (32 bytes a cycle while all are reading,
// up to 64 for one of few).
inline double cycles(const Kernel& kernel, const Packed& shape, int64_t m, int multiprocessors) {
  const int64_t tiles = divide_up(m, kernel.bm) * divide_up(shape.n, kernel.bn * kernel.cluster);  // of clusters
  const int64_t clusters = multiprocessors / kernel.cluster, busy = tiles < clusters ? tiles : clusters;
  const double share = 32.0 * static_cast<double>(clusters) / static_cast<double>(busy);
  const double bytes_per_cycle = share < 64 ? share : 64, size = bytes_of(kernel.element);
  const double products_per_cycle = (kernel.arch >= 90 ? 8192 : 4096) / size;  // those with zeros count
  const double compute = kernel.bn * kernel.bm / products_per_cycle;
  // wgmma.sp reads the rows once for each 64 channels, from the shared memory that copies fill meanwhile.
  const double filled = kernel.bn * (size / 2 + 0.125) + kernel.bm * size;
  const double shared = kernel.arch >= 90 ? (filled + kernel.bn * (size / 2 + kernel.bm * size / 64)) / 128 : 0;
  const int64_t rows = m < kernel.bm ? m : kernel.bm;  // those that are not there are not read
  const double load =
      (kernel.bn * (size / 2 + 0.125) + static_cast<double>(rows) * size / kernel.cluster) / bytes_per_cycle;
  return static_cast<double>(divide_up(tiles, clusters)) * static_cast<double>(shape.k_pad()) *
         std::max({compute, shared, load});
}

void linear(const Problem& problem, const Kernel* forced = nullptr);

// Throws where it is no packed weight, or one of another number of bytes.
void check_packed(const Packed& shape, int64_t bytes);

// Dense on the device (float32 [n, k], or int8 [n, k]) -> packed [shape.bytes()], and back. *refused (on the device,
// the caller has set it to 0) gets bits set: kTooMany where a group of four has more than two weights, kNotOfType where
// a value is no number of the type, or -128.
constexpr int32_t kTooMany = 1, kNotOfType = 2;
void pack(const void* dense, const Packed& shape, uint8_t* packed, int32_t* refused, Stream stream);
void unpack(const uint8_t* packed, const Packed& shape, void* dense, Stream stream);

}  // namespace pycompress::sparse::cuda::structured
