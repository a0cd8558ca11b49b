// The CUDA weight-only kernels' own source on the host: against exact sums, against float64 within the bound of cuda.h,
// in several orders of threads and blocks.
#include "weight_only.h"

#include <algorithm>
#include <utility>

#include "common/activation.h"
#include "int8/cuda.h"
#include "weight_only/dequantize.cuh"
#include "weight_only_case.h"

namespace native {
namespace {

namespace int8 = pycompress::int8;
using pycompress::Scalar;
using weight_only::Packed;
using weight_only::Position;

constexpr int64_t kEdges[] = {1, 31, 32, 33, 63, 64, 65, 127, 128, 129, 200};

// --- index arithmetic
// ---------------------------------------------------------------------------------------------------

void test_positions() {
  begin("weight-only: the positions of a block");
  for (int i = 0; i < 1024; ++i) {
    const Position of_byte = weight_only::byte_position(i), of_nibble = weight_only::nibble_position(i);
    expect(weight_only::byte_index(of_byte) == i, text("byte ", i));
    expect(weight_only::nibble_index(of_nibble) == i, text("nibble ", i));
    expect(std::max({of_byte.n, of_byte.k, of_nibble.n, of_nibble.k}) < 32, text("outside at ", i));
  }
  std::vector<int> scales, zeros;
  for (int channel = 0; channel < 32; ++channel) {
    scales.push_back(weight_only::scale_index(channel));
    zeros.push_back(weight_only::zero_index(channel));
  }
  std::sort(scales.begin(), scales.end()), std::sort(zeros.begin(), zeros.end());
  for (int i = 0; i < 32; ++i) expect(scales[size(i)] == i && zeros[size(i)] == i, text("scale or zero point ", i));
}

void test_lengths() {
  begin("weight-only: the packed length");
  for (const int64_t n : kEdges)
    for (const int64_t k : {1, 64, 65, 700})
      for (const int group : {32, 64, 128}) {
        const int64_t n_pad = (n + 63) / 64 * 64, k_pad = (k + 63) / 64 * 64, groups = (k + group - 1) / group;
        const std::string which = text("n ", n, " k ", k, " group ", group);
        expect(Packed{Bits::eight, n, k}.bytes() == n_pad * k_pad, which);
        expect(Packed{Bits::four, n, k, group, true}.bytes() == n_pad * (k_pad / 2 + groups * 2), which);
        expect(Packed{Bits::four, n, k, group, false}.bytes() == n_pad * (k_pad * 4 + groups * 20) / 8, which);
      }
}

// --- packing
// ------------------------------------------------------------------------------------------------------------

void test_pack(Packed shape) {
  begin(text("weight-only pack bits=", static_cast<int>(shape.bits), " n=", shape.n, " k=", shape.k,
             " group=", shape.group, " symmetric=", shape.symmetric));
  PackedWeight weight(shape, false);
  expect(weight.refused == 0 && weight.packed.intact(), "pack");
  Guarded<uint8_t> values(weight.values.size()), zeros(weight.zero_point.size());
  Guarded<uint16_t> scale(weight.scale.size());
  values.fill(0x55), zeros.fill(0x55), scale.fill(0x55);
  weight_only::unpack(weight.packed.data(), shape, {values.data(), scale.data(), zeros.data()}, nullptr);
  expect(std::equal(weight.values.begin(), weight.values.end(), values.data()), "values");
  expect(std::equal(weight.scale.begin(), weight.scale.end(), scale.data()), "scales");
  expect(std::equal(weight.zero_point.begin(), weight.zero_point.end(), zeros.data()), "zero points");
  expect(values.intact() && zeros.intact() && scale.intact(), "a store outside");
}

void test_refused() {
  begin("weight-only pack: -128 is counted");
  std::vector<uint8_t> values(70, 5);
  values[3] = values[69] = 128;
  const Packed shape{Bits::eight, 2, 35};
  std::vector<uint8_t> packed(size(shape.bytes()));
  int32_t refused = 0;
  weight_only::pack({values.data(), nullptr, nullptr}, shape, packed.data(), &refused, nullptr);
  expect(refused == 2, text(refused, " of 2"));
}

// --- dequantization
// -----------------------------------------------------------------------------------------------------

template <Type kType>
void test_expand() {
  begin(text("weight-only: every integer in registers, type ", static_cast<int>(kType)));
  const auto is = [](uint32_t pair, int low, int high) {
    return half_value(static_cast<uint16_t>(pair), kType) == static_cast<float>(low) &&
           half_value(static_cast<uint16_t>(pair >> 16), kType) == static_cast<float>(high);
  };
  for (int i = 0; i < 256; ++i) {
    const int b[4] = {i, (i + 77) % 256, 255 - i, (i * 3) % 256};
    uint32_t even, odd;
    weight_only::expand_bytes<kType>(
        static_cast<uint32_t>(b[0] | b[1] << 8 | b[2] << 16) | static_cast<uint32_t>(b[3]) << 24, even, odd);
    expect(is(even, b[0] - 128, b[2] - 128) && is(odd, b[1] - 128, b[3] - 128), text("byte ", i));
  }
  for (uint32_t zero = 0; zero < 256; ++zero)
    for (uint32_t i = 0; i < 16; ++i) {
      uint32_t word = 0, a[4];
      for (uint32_t j = 0; j < 8; ++j) word |= (i + j * 3) % 16 << 4 * j;
      weight_only::expand_nibbles<kType>(word, weight_only::zero_points<kType>(zero), a);
      for (int j = 0; j < 4; ++j) {
        const int z = static_cast<int>(j % 2 == 0 ? zero & 15 : zero >> 4);
        const auto value = [&](int nibble) { return static_cast<int>(word >> 4 * nibble & 15) - z; };
        expect(is(a[j], value(j), value(j + 4)), text("nibble ", i, " register ", j, " zero points ", zero));
      }
    }
}

// --- plans
// --------------------------------------------------------------------------------------------------------------

void test_plans() {
  begin("weight-only: plans");
  for (const Bits bits : {Bits::eight, Bits::four})
    for (const int64_t m : {1, 8, 9, 16, 17, 33, 64, 65, 1000})
      for (const auto& [n, k] :
           {std::pair{1, 1}, {64, 65536}, {4096, 4096}, {8192, 8192}, {14336, 4096}, {4096, 14336}}) {
        const Packed shape{bits, n, k, 32, false};
        const weight_only::Plan plan = weight_only::plan(shape, Type::bfloat16, m, 132);
        const std::string which = text("bits ", static_cast<int>(bits), " m ", m, " n ", n, " k ", k);
        expect(plan.kernel != nullptr && plan.kernel->bits == bits && plan.kernel->type == Type::bfloat16, which);
        expect(plan.splits >= 1 && plan.splits <= shape.k_pad() / weight_only::kStep, text("splits: ", which));
        const int64_t rows = plan.kernel->columns * 8, channels = plan.kernel->tiles * 16;
        expect(plan.blocks == (m + rows - 1) / rows * ((n + channels - 1) / channels), text("blocks: ", which));
        expect((plan.splits > 1) == (plan.workspace > 0), which);
        expect(m > 32 || rows >= m, text("a slab more than it takes: ", which));
        if (n * static_cast<int64_t>(k) >= 4096 * 4096) expect(plan.blocks * plan.splits >= 100, text("idle: ", which));
      }
}

// --- the kernels
// --------------------------------------------------------------------------------------------------------

std::string name(const weight_only::Plan& plan, const WeightOnlyCase& c) {
  const Packed& shape = c.weight.shape;
  return text(plan.kernel->name, " splits=", plan.splits, " m=", c.x.m, " n=", shape.n, " k=", shape.k,
              " ldx=", c.x.ldx, " group=", shape.group, " symmetric=", shape.symmetric);
}

// Small integers and powers of two: every float32 sum is exact, so y is known to the bit.
void check_exact(const weight_only::Kernel& kernel, Packed shape, int64_t m, int64_t gap, int splits,
                 Activation activation, bool bias) {
  WeightOnlyCase c(shape, kernel.type, m, gap, true);
  const weight_only::Plan plan = weight_only::plan(kernel, shape, m, splits);
  begin(text(name(plan, c), " activation=", static_cast<int>(activation), " bias=", bias));
  const std::vector<uint16_t> y = c.run(plan, activation, bias);
  int64_t wrong = 0;
  for (int64_t row = 0; row < m; ++row)
    for (int64_t n = 0; n < shape.n; ++n) {
      double magnitude;
      const auto v = static_cast<float>(c.exact(row, n, bias, &magnitude));
      const float expected = activate(activation, Scalar{v}).value;
      wrong += y[size(row * shape.n + n)] != half_bits(static_cast<double>(expected), kernel.type);
    }
  expect(wrong == 0, text(wrong, " values differ"));
}

// Random values: within the bound of cuda.h; the same bits in any order of threads and blocks.
void check_bound(const weight_only::Kernel& kernel, Packed shape, int64_t m, int splits) {
  WeightOnlyCase c(shape, kernel.type, m, 0, false);
  const weight_only::Plan plan = weight_only::plan(kernel, shape, m, splits);
  begin(text(name(plan, c), " against float64"));
  const std::vector<uint16_t> y = c.run(plan, Activation::none, true);
  const double steps = static_cast<double>(shape.k_pad() / 16), parts = splits + kernel.warps;
  const double relative = 0x1p-23 * (17 * (steps + 1) + static_cast<double>(shape.groups()) + parts + 8);
  int64_t wrong = 0;
  for (int64_t row = 0; row < m; ++row)
    for (int64_t n = 0; n < shape.n; ++n) {
      double magnitude;
      const double expected = c.exact(row, n, true, &magnitude),
                   got = half_value(y[size(row * shape.n + n)], kernel.type);
      const double rounding = unit_roundoff(kernel.type) * (std::fabs(expected) + std::fabs(c.bias[size(n)]));
      wrong += !(std::fabs(got - expected) <= relative * magnitude + rounding);
    }
  expect(wrong == 0, text(wrong, " values outside the bound"));

  for (const emulate::Order order : {emulate::Order::descending, emulate::Order::random}) {
    emulate::options.threads = order;
    emulate::options.reversed_blocks = order == emulate::Order::descending;
    expect(c.run(plan, Activation::none, true) == y, "other bits in another order of threads and blocks");
  }
  emulate::options = {};
}

// Rows with NaN and Inf leave the others as they are, and show in every channel: zeros are multiplied too.
void check_not_finite(const weight_only::Kernel& kernel, Packed shape) {
  WeightOnlyCase c(shape, kernel.type, 4, 0, true);
  const weight_only::Plan plan = weight_only::plan(kernel, shape, 4, 1);
  begin(text(name(plan, c), " with NaN and Inf"));
  const std::vector<uint16_t> before = c.run(plan, Activation::none, true);
  c.x.data[size(c.x.ldx + shape.k - 1)] = half_bits(INFINITY, kernel.type);
  c.x.data[size(2 * c.x.ldx)] = half_bits(NAN, kernel.type);
  const std::vector<uint16_t> after = c.run(plan, Activation::none, true);
  for (int64_t n = 0; n < shape.n; ++n) {
    const auto value = [&](int64_t row) { return half_value(after[size(row * shape.n + n)], kernel.type); };
    expect(!std::isfinite(value(1)) && std::isnan(value(2)), text("channel ", n));
    for (const int64_t row : {0, 3})
      expect(after[size(row * shape.n + n)] == before[size(row * shape.n + n)], text("row ", row, " channel ", n));
  }
}

void check_kernel(const weight_only::Kernel& kernel) {
  const int64_t channels = kernel.tiles * 16, rows = kernel.columns * 8, ring = kernel.warps * weight_only::kStep;
  const auto shape = [&](int64_t n, int64_t k, int group, bool symmetric) {
    return Packed{kernel.bits, n, k, kernel.bits == Bits::four ? group : 0, kernel.bits == Bits::eight || symmetric};
  };
  for (const int64_t n : {int64_t{1}, channels - 1, channels, channels + 1, 2 * channels + 3})
    check_exact(kernel, shape(n, 96, 32, n % 2 == 0), std::min<int64_t>(rows, 9), 0, 1, Activation::none, true);
  for (const int64_t k : {int64_t{1}, int64_t{7}, int64_t{32}, int64_t{33}, int64_t{64}, int64_t{65}, int64_t{136},
                          ring - 1, ring + 8, (kernel.stages + 1) * ring + 40})
    check_exact(kernel, shape(40, k, k % 3 == 0 ? 128 : 64, k % 2 == 0), 3, k % 8 == 0 ? 8 : k % 4, 1, Activation::none,
                false);
  for (const int64_t m : {int64_t{1}, rows - 1, rows, rows + 1, 2 * rows + 3})
    check_exact(kernel, shape(33, 200, 32, false), m, m % 2 * 8, m % 2 == 0 ? 2 : 1, Activation::none, true);
  for (const int group : {32, 64, 128})
    for (const bool symmetric : {false, true})
      for (const int splits : {1, 2, 3})
        check_exact(kernel, shape(50, 64 * 7 + 40, group, symmetric), 2, 0, splits, Activation::none, true);
  for (const Activation activation : {Activation::relu, Activation::gelu, Activation::gelu_tanh, Activation::silu,
                                      Activation::quick_gelu, Activation::relu6, Activation::hardswish})
    check_exact(kernel, shape(20, 64, 32, false), 2, 0, activation == Activation::relu ? 2 : 1, activation, true);
  check_bound(kernel, shape(channels + 7, 2 * ring + 24, 32, false), rows, 1);
  check_bound(kernel, shape(channels + 7, 2 * ring + 24, 64, true), 3, 3);
  check_not_finite(kernel, shape(10, 100, 32, false));
}

void test_default_plan() {
  const Packed shape{Bits::four, 70, 1000, 32, false};
  WeightOnlyCase c(shape, Type::bfloat16, 70, 0, true);
  begin("weight-only: the plan that linear() makes");
  const weight_only::Plan plan = weight_only::plan(shape, Type::bfloat16, 70, emulate::options.multiprocessors);
  const std::vector<uint16_t> forced = c.run(plan, Activation::none, false);
  std::vector<uint16_t> y(forced.size());
  std::vector<float> workspace(size(plan.workspace / 4));
  weight_only::Problem problem{c.x.data.data(),
                               Type::bfloat16,
                               70,
                               c.x.ldx,
                               c.weight.packed.data(),
                               shape,
                               nullptr,
                               nullptr,
                               Activation::none,
                               y.data(),
                               workspace.data(),
                               nullptr};
  weight_only::linear(problem);
  expect(y == forced, "other bits than with the plan given");
  problem.m = 0;
  weight_only::linear(problem);  // nothing to do
  problem.m = 1;
  problem.type = Type::float32;
  refuses("weight-only: float32", [&] { weight_only::linear(problem); });
  refuses("weight-only: no workspace", [&] {
    problem.type = Type::bfloat16;
    problem.workspace = nullptr;
    weight_only::linear(problem, weight_only::plan(*plan.kernel, shape, 1, 2));
  });
}

}  // namespace

void test_cuda_weight_only_layout() {
  test_positions();
  test_lengths();
  for (const int64_t n : {1, 15, 32, 33, 64, 65, 130})
    for (const int64_t k : {1, 2, 31, 33, 64, 65, 127, 129, 300}) {
      test_pack({Bits::eight, n, k});
      for (const int group : {32, 64, 128}) test_pack({Bits::four, n, k, group, (n + k + group / 32) % 2 == 0});
    }
  test_refused();
  test_expand<Type::float16>();
  test_expand<Type::bfloat16>();
  test_plans();
}

void test_cuda_weight_only() {
  int count = 0;
  const weight_only::Kernel* all = weight_only::kernels(&count);
  for (int i = 0; i < count; ++i) check_kernel(all[i]);
  test_default_plan();
}

}  // namespace native
