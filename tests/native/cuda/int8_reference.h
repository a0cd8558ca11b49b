// What the tests of the CUDA int8 kernels compare with: int64 sums, and the CPU's specification.
#pragma once

#include <cstdint>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "../guarded.h"
#include "../report.h"
#include "emulate.h"
#include "int8/cuda.h"
#include "int8/gemm.h"
#include "int8/pack.h"

namespace native {

namespace int8 = pycompress::int8;
namespace cuda = pycompress::int8::cuda;
using pycompress::Activation;
using pycompress::Type;

enum class Values { uniform, extreme };

// A random problem on guarded memory: weights, and rows as quantize() leaves them.
struct Int8Case {
  int64_t m, n, k;
  cuda::PackedShape shape;
  Guarded<int8_t> values, s;
  Guarded<uint8_t> packed;
  Guarded<float> scale, weight_scale, bias;
  Guarded<int32_t> zero_point;

  Int8Case(int64_t m_, int64_t n_, int64_t k_, Values kind = Values::uniform, int bits = 8)
      : m(m_),
        n(n_),
        k(k_),
        shape{n_, k_},
        values(size(n * k)),
        s(size(m * shape.k_pad())),
        packed(size(shape.bytes()), Edge::begin),
        scale(size(m)),
        weight_scale(size(n)),
        bias(size(n)),
        zero_point(size(m)) {
    std::mt19937 random(static_cast<uint32_t>(m * 7919 + n * 104729 + k * 31 + bits));
    const auto within = [&](int low, int high) { return low + static_cast<int>(random() % (high - low + 1)); };
    const int amax = (1 << bits) - 1;
    for (size_t i = 0; i < values.size(); ++i)
      values[i] = static_cast<int8_t>(kind == Values::extreme ? (random() % 2 ? 127 : -127) : within(-127, 127));
    for (size_t i = 0; i < s.size(); ++i) {
      const bool inside = static_cast<int64_t>(i) % shape.k_pad() < k;
      const int q = kind == Values::extreme ? (random() % 2 ? amax : 0) : within(0, amax);
      s[i] = static_cast<int8_t>(inside ? q - 128 : within(-128, 127));  // what stands behind k must not matter
    }
    for (size_t i = 0; i < scale.size(); ++i) {
      scale[i] = static_cast<float>(within(1, 1000)) * 1e-4f;
      zero_point[i] = within(0, amax);
    }
    for (size_t i = 0; i < weight_scale.size(); ++i) {
      weight_scale[i] = static_cast<float>(within(1, 1000)) * 1e-4f;
      bias[i] = static_cast<float>(within(-1000, 1000)) * 0.3f;
    }
    int32_t refused = 0;
    packed.fill(emulate::kPoison);
    cuda::pack(values.data(), n, k, packed.data(), &refused, nullptr);
    expect(refused == 0 && packed.intact(), "pack");
  }

  std::string name() const { return text("m=", m, " n=", n, " k=", k); }

  cuda::Problem problem(void* y, Type type) {
    return {{s.data(), scale.data(), zero_point.data()},
            m,
            n,
            k,
            packed.data(),
            type == Type::int32 ? nullptr : weight_scale.data(),
            nullptr,
            Activation::none,
            y,
            type,
            nullptr};
  }

  int64_t sum(int64_t row, int64_t channel) const {
    int64_t total = 0;
    for (int64_t i = 0; i < k; ++i)
      total +=
          (int64_t{s[size(row * shape.k_pad() + i)]} + 128 - zero_point[size(row)]) * values[size(channel * k + i)];
    return total;
  }

  static size_t size(int64_t count) { return static_cast<size_t>(count); }
};

// Every value of y against the specification's epilogue, to the bit; the sums are int64.
void check_int8_sums(const cuda::Kernel& kernel, Int8Case& c);
void check_int8_epilogue(const cuda::Kernel& kernel, Int8Case& c, Activation activation, Type type, bool bias);

// All of that at the edges of a kernel's tile.
void check_int8_kernel(const cuda::Kernel& kernel);

void test_cuda_int8_quantize();  // quantize() against scalar.cpp
void test_cuda_int8_pack();
void test_cuda_int8_sm80();
void test_cuda_int8_hopper();
void test_cuda_int8_branch();

}  // namespace native
