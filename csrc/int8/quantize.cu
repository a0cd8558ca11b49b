// The quantizer on CUDA: rows of x to int8, bit-equal to scalar.cpp, with what stands in front of the layer fused in.
//
// A row stays in the registers of a warp or a block between the pass that looks for its range (and for a norm, its
// statistics) and the one that rounds it, so memory is read once. Only rows of more than 64 KiB do not fit (1024
// threads of 64 bytes each); they are read again, from the L2 for the most part.
//
// Floor: the bytes of x plus one byte an element, at the memory's bandwidth.
#include <type_traits>

#include "../common/activation.h"
#include "../common/check.h"
#include "../common/round.h"
#include "../cuda/launch.h"
#include "quantize.cuh"

namespace pycompress::int8::cuda {
namespace {

struct Source {
  const uint8_t *x, *gate;  // row strides in bytes
  int64_t x_stride, gate_stride;
  const void *weight, *bias;  // of a norm
  float eps;
  Before before;
  int k;
  bool x_aligned, gate_aligned, weight_aligned, bias_aligned;  // to 16 bytes, in every row
};

struct Target {
  int8_t* s;  // row stride k_pad
  int k_pad;
  float* scale;
  int32_t* zero_point;
  int activation_bits;
};

// act(gate) x, where act is the activation of a gate.
template <Type kType, Before kBefore>
__device__ inline float gated(float x, float gate) {
  constexpr Activation kActivation = kBefore == Before::silu_gate   ? Activation::silu
                                     : kBefore == Before::gelu_gate ? Activation::gelu
                                                                    : Activation::gelu_tanh;
  return rounded<kType>(rounded<kType>(activate(kActivation, Scalar{gate}).value) * x);
}

// f(std::integral_constant<Before, before>) for a gate, so that its loops have no choice in them; false for the rest.
template <class F>
__device__ inline bool with_gate(Before before, F&& f) {
  switch (before) {
    case Before::silu_gate:
      f(std::integral_constant<Before, Before::silu_gate>{});
      return true;
    case Before::gelu_gate:
      f(std::integral_constant<Before, Before::gelu_gate>{});
      return true;
    case Before::gelu_tanh_gate:
      f(std::integral_constant<Before, Before::gelu_tanh_gate>{});
      return true;
    default:
      return false;
  }
}

struct Maximum {
  __device__ float operator()(float a, float b) const { return fmaxf(a, b); }
};
struct Sum {
  __device__ float operator()(float a, float b) const { return a + b; }
};

// Combines each of the values over the threads of a row: those of a warp, or of the whole block. The order is fixed.
template <int kCount, class F>
__device__ inline void reduce(float (&values)[kCount], F combine) {
  const auto in_warp = [&] {
#pragma unroll
    for (int mask = 16; mask > 0; mask /= 2)
#pragma unroll
      for (int i = 0; i < kCount; ++i) values[i] = combine(values[i], gpu::shuffle_xor(values[i], mask));
  };
  in_warp();
  const int warps = static_cast<int>(blockDim.x) / 32;
  if (warps == 1) return;
  auto* shared = reinterpret_cast<float*>(gpu::dynamic_shared());  // [kCount][32]
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  __syncthreads();  // the values of the reduction before have been read
#pragma unroll
  for (int i = 0; i < kCount; ++i)
    if (lane == 0) shared[i * 32 + warp] = values[i];
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kCount; ++i) values[i] = shared[i * 32 + lane % warps];  // each of them 32 / warps times
  if (warps == 32) {
    in_warp();
    return;
  }
  for (int mask = warps / 2; mask > 0; mask /= 2)
#pragma unroll
    for (int i = 0; i < kCount; ++i) values[i] = combine(values[i], gpu::shuffle_xor(values[i], mask));
}

__device__ inline Rounding finish_range(Range& range, const Target& out, int64_t row) {
  reduce(range.values, Maximum{});
  const Rounding rounding(range, out.activation_bits);
  if (threadIdx.x == 0) {
    out.scale[row] = rounding.scale;
    out.zero_point[row] = rounding.zero_point;
  }
  return rounding;
}

constexpr int kVectors = 4, kMaxThreads = 1024;

// blockDim.x threads a row, blockDim.y rows a block; each thread has every blockDim.x-th vector, kVectors at most.
template <Type kType>
__global__ void __launch_bounds__(kMaxThreads, 1) int8_quantize(Source in, Target out, int64_t m) {
  using V = Vector<kType>;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  if (row >= m) return;  // a whole warp: of several rows each has one
  const int threads = static_cast<int>(blockDim.x), vectors = out.k_pad / V::kElements;
  V held[kVectors];
  const auto each = [&](auto&& f) {  // f(vector, its first element)
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      const int v = static_cast<int>(threadIdx.x) + i * threads;
      if (v < vectors) f(held[i], v * V::kElements);
    }
  };

  const uint8_t* x = in.x + row * in.x_stride;
  each([&](V& v, int first) { v = V::load(x, first, in.k, in.x_aligned); });
  const bool has_gate = with_gate(in.before, [&](auto before) {
    const uint8_t* gate = in.gate + row * in.gate_stride;
    each([&](V& v, int first) {
      const V g = V::load(gate, first, in.k, in.gate_aligned);
#pragma unroll
      for (int i = 0; i < V::kElements; ++i) v.set(i, gated<kType, decltype(before)::value>(v.get(i), g.get(i)));
    });
  });
  if (!has_gate && in.before != Before::none) {
    float mean[1] = {0}, square[1] = {0};
    if (in.before == Before::layer_norm) {
      each([&](V& v, int) {
#pragma unroll
        for (int i = 0; i < V::kElements; ++i) mean[0] += v.get(i);
      });
      reduce(mean, Sum{});
      mean[0] /= static_cast<float>(in.k);
    }
    each([&](V& v, int first) {
#pragma unroll
      for (int i = 0; i < V::kElements; ++i) {
        const float centred = first + i < in.k ? v.get(i) - mean[0] : 0;
        square[0] += centred * centred;
      }
    });
    reduce(square, Sum{});
    const float inverse = 1.0f / sqrtf(square[0] / static_cast<float>(in.k) + in.eps);
    each([&](V& v, int first) {
      const V weight = in.weight == nullptr ? V{} : V::load(in.weight, first, in.k, in.weight_aligned);
      const V bias = in.bias == nullptr ? V{} : V::load(in.bias, first, in.k, in.bias_aligned);
#pragma unroll
      for (int i = 0; i < V::kElements; ++i) {
        const float normal = (v.get(i) - mean[0]) * inverse * (in.weight == nullptr ? 1.0f : weight.get(i));
        v.set(i, first + i < in.k ? normal + bias.get(i) : 0);
      }
    });
  }

  Range range;
  each([&](V& v, int) {
#pragma unroll
    for (int i = 0; i < V::kElements; ++i) range.add(v.get(i));
  });
  const Rounding rounding = finish_range(range, out, row);
  int8_t* s = out.s + row * out.k_pad;
  each([&](V& v, int first) { store_rounded(s, v, rounding, first, in.k); });
}

// Rows that no block holds: one block a row, element by element, each pass from memory.
template <Type kType>
__global__ void __launch_bounds__(kMaxThreads, 1) int8_quantize_long(Source in, Target out) {
  const int64_t row = blockIdx.x;
  const uint8_t *x = in.x + row * in.x_stride, *gate = in.gate + row * in.gate_stride;
  float mean[1] = {0}, square[1] = {0}, inverse = 0;
  const auto each = [&](int end, auto&& f) {
    for (int i = static_cast<int>(threadIdx.x); i < end; i += static_cast<int>(blockDim.x)) f(i);
  };
  const auto value = [&](int i) {
    const float from = load_one<kType>(x, i);
    if (in.before == Before::none) return from;
    float result = 0;
    const auto multiply = [&](auto before) {
      result = gated<kType, decltype(before)::value>(from, load_one<kType>(gate, i));
    };
    if (with_gate(in.before, multiply)) return result;
    const float weight = in.weight == nullptr ? 1.0f : load_one<kType>(in.weight, i);
    return rounded<kType>((from - mean[0]) * inverse * weight +
                          (in.bias == nullptr ? 0.0f : load_one<kType>(in.bias, i)));
  };
  if (in.before == Before::layer_norm) {
    each(in.k, [&](int i) { mean[0] += load_one<kType>(x, i); });
    reduce(mean, Sum{});
    mean[0] /= static_cast<float>(in.k);
  }
  if (in.before == Before::layer_norm || in.before == Before::rms_norm) {
    each(in.k, [&](int i) {
      const float centred = load_one<kType>(x, i) - mean[0];
      square[0] += centred * centred;
    });
    reduce(square, Sum{});
    inverse = 1.0f / sqrtf(square[0] / static_cast<float>(in.k) + in.eps);
  }
  Range range;
  each(in.k, [&](int i) { range.add(value(i)); });
  const Rounding rounding = finish_range(range, out, row);
  int8_t* s = out.s + row * out.k_pad;
  each(out.k_pad, [&](int i) { s[i] = static_cast<int8_t>(i < in.k ? rounding.byte(value(i)) : 0); });
}

template <Type kType>
void quantize_as(const Input& input, const Source& in, const Target& out, Stream stream) {
  const int64_t m = input.m;
  check(m <= 0x7fffffff, "int8_linear: x has ", m, " rows, more than one launch can take");
  const int vectors = out.k_pad / Vector<kType>::kElements;
  int threads = 32;  // a power of two, which reduce() counts on
  while (threads < kMaxThreads && threads * kVectors < vectors) threads = threads == 32 ? 128 : 2 * threads;
  const int rows = threads == 32 ? 4 : 1;
  const dim3 grid(static_cast<unsigned>(divide_up(m, rows)));
  const dim3 block(static_cast<unsigned>(threads), static_cast<unsigned>(rows));
  const gpu::Launch at{grid, block, threads == 32 ? size_t{0} : size_t{3 * 32 * 4}, stream};
  if (vectors <= threads * kVectors)
    gpu::launch<int8_quantize<kType>>("int8_quantize", at, in, out, m);
  else
    gpu::launch<int8_quantize_long<kType>>("int8_quantize_long", at, in, out);
}

bool aligned(const void* pointer, int64_t stride_bytes) {
  return (reinterpret_cast<uintptr_t>(pointer) | static_cast<uintptr_t>(stride_bytes)) % 16 == 0;
}

}  // namespace

void quantize(const Input& input, const Rows& rows, Stream stream) {
  check(input.activation_bits == 7 || input.activation_bits == 8, "int8_quantize: activation_bits is ",
        input.activation_bits, ", expected 7 or 8");
  check(input.k >= 1 && input.k <= kMaxK, "int8_quantize: x has ", input.k, " columns, expected 1 to ", kMaxK);
  if (input.m == 0) return;
  const auto size = static_cast<int64_t>(size_of(input.type));
  const int64_t x_stride = input.ldx * size, gate_stride = input.ldg * size;
  const Source in{static_cast<const uint8_t*>(input.x),
                  static_cast<const uint8_t*>(input.gate),
                  x_stride,
                  gate_stride,
                  input.weight,
                  input.bias,
                  input.eps,
                  input.before,
                  static_cast<int>(input.k),
                  aligned(input.x, x_stride),
                  aligned(input.gate, gate_stride),
                  aligned(input.weight, 0),
                  aligned(input.bias, 0)};
  const Target out{rows.s, static_cast<int>(PackedShape{1, input.k}.k_pad()), rows.scale, rows.zero_point,
                   input.activation_bits};
  switch (input.type) {
    case Type::float32:
      return quantize_as<Type::float32>(input, in, out, stream);
    case Type::bfloat16:
      return quantize_as<Type::bfloat16>(input, in, out, stream);
    default:
      return quantize_as<Type::float16>(input, in, out, stream);
  }
}

}  // namespace pycompress::int8::cuda
