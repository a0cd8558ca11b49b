// The CUDA sparse kernels' own source on the host: packed and dense again, exact sums, float64 within the bound of
// csrc/sparse/bitmap/cuda.h, several orders of threads and blocks.
#include "sparse.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <random>
#include <string>
#include <vector>

#include "../report.h"
#include "common/activation.h"
#include "halves.h"
#include "sparse/bitmap/cuda.h"

namespace native {
namespace {

using pycompress::Scalar;
namespace bitmap = pycompress::sparse::cuda;

// A canonical weight, its values in 16 bits, and the same packed, on guarded memory.
struct SparseWeight {
  int64_t n, k;
  Type type;
  std::vector<uint8_t> mask;
  std::vector<uint16_t> values;
  std::vector<double> dense;
  Guarded<uint8_t> packed;
  bitmap::Shape shape;

  SparseWeight(int64_t n_, int64_t k_, Type type_, double density, bool exact)
      : n(n_),
        k(k_),
        type(type_),
        mask(size(n * ((k + 7) / 8))),
        dense(size(n * k)),
        packed(fill(density, exact), Edge::begin) {
    const bitmap::Packed made = bitmap::pack_bitmap(mask.data(), values.data(), count(), type, n, k);
    std::copy(made.bytes.begin(), made.bytes.end(), packed.data());
    shape = made.shape;
  }

  // The first half of the channels are twice as dense as the others: units differ in size.
  size_t fill(double density, bool exact) {
    std::mt19937 random(static_cast<uint32_t>(n * 7919 + k));
    std::uniform_real_distribution<double> uniform;
    for (int64_t row = 0; row < n; ++row)
      for (int64_t i = 0; i < k; ++i) {
        if (uniform(random) >= (row < n / 2 ? density : density / 2) && density < 1) continue;
        mask[size(row * ((k + 7) / 8) + i / 8)] |= static_cast<uint8_t>(1 << i % 8);
        const int integer = static_cast<int>(random() % 127) + 1;
        values.push_back(half_bits(exact ? (random() % 2 ? integer : -integer) : uniform(random) - 0.5, type));
        dense[size(row * k + i)] = static_cast<double>(half_value(values.back(), type));
      }
    return bitmap::pack_bitmap(mask.data(), values.data(), count(), type, n, k).bytes.size();
  }

  int64_t count() const { return static_cast<int64_t>(values.size()); }
  std::string name() const { return text("sparse n=", n, " k=", k, " values=", values.size()); }
};

void test_pack(int64_t n, int64_t k, double density, Type type) {
  const SparseWeight weight(n, k, type, density, false);
  begin(text("pack and dense ", weight.name()));
  Guarded<float> dense(size(n * k));
  dense.fill(emulate::kPoison);
  bitmap::dense(weight.packed.data(), weight.shape, dense.data(), nullptr);
  const bool same = std::equal(weight.dense.begin(), weight.dense.end(), dense.data(),
                               [](double expected, float got) { return expected == static_cast<double>(got); });
  expect(same, "another weight");
  expect(dense.intact(), "a store outside");
}

std::vector<uint16_t> run(const SparseWeight& weight, const HalfRows& x, const bitmap::Plan& plan, const float* bias,
                          Activation activation) {
  Guarded<uint16_t> y(size(x.m * weight.n));
  Guarded<float> workspace(size(plan.workspace / 4));
  y.fill(emulate::kPoison), workspace.fill(emulate::kPoison);
  bitmap::linear({x.data.data(), x.type, x.m, x.ldx, weight.packed.data(), weight.shape, bias, activation, y.data(),
                  workspace.data(), nullptr},
                 plan);
  expect(y.intact() && workspace.intact(), "a store outside");
  return {y.data(), y.data() + y.size()};
}

std::vector<float> bias_of(int64_t n) {
  std::vector<float> bias;
  for (int64_t i = 0; i < n; ++i) bias.push_back(static_cast<float>(i % 37 - 18) * 0.25f);
  return bias;
}

double exact_sum(const SparseWeight& weight, const HalfRows& x, int64_t row, int64_t n, double* magnitude) {
  double sum = 0;
  *magnitude = 0;
  for (int64_t i = 0; i < weight.k; ++i) {
    const double product = x.at(row, i) * weight.dense[size(n * weight.k + i)];
    sum += product;
    *magnitude += std::fabs(product);
  }
  return sum;
}

// Small integers: every float32 sum is exact, so y is known to the bit.
void check_exact(const bitmap::Kernel& kernel, int64_t m, int64_t n, int64_t k, double density, int64_t gap, int splits,
                 Activation activation) {
  const SparseWeight weight(n, k, kernel.type, density, true);
  const HalfRows x(kernel.type, m, k, gap, true);
  const bitmap::Plan plan = bitmap::plan(kernel, n, m, splits);
  begin(text(kernel.name, " ", weight.name(), " m=", m, " gap=", gap, " splits=", splits));
  if (!bitmap::fits(kernel, weight.shape)) {
    refuses("units that do not fit", [&] { run(weight, x, plan, nullptr, activation); });
    return;
  }
  const std::vector<float> bias = bias_of(n);
  const std::vector<uint16_t> y = run(weight, x, plan, bias.data(), activation);
  int64_t wrong = 0;
  for (int64_t row = 0; row < m; ++row)
    for (int64_t i = 0; i < n; ++i) {
      double magnitude;
      const double sum = exact_sum(weight, x, row, i, &magnitude) + static_cast<double>(bias[size(i)]);
      const float expected = activate(activation, Scalar{static_cast<float>(sum)}).value;
      wrong += y[size(row * n + i)] != half_bits(static_cast<double>(expected), kernel.type);
    }
  expect(wrong == 0, text(wrong, " values differ"));
}

// Random values: within the bound of cuda.h; the same bits in any order of threads and blocks.
void check_bound(const bitmap::Kernel& kernel, int64_t m, int64_t n, int64_t k, int splits) {
  const SparseWeight weight(n, k, kernel.type, 0.4, false);
  const HalfRows x(kernel.type, m, k, 0, false);
  const bitmap::Plan plan = bitmap::plan(kernel, n, m, splits);
  begin(text(kernel.name, " ", weight.name(), " m=", m, " splits=", splits, " against float64"));
  const std::vector<uint16_t> y = run(weight, x, plan, nullptr, Activation::none);
  const double steps = std::ceil(static_cast<double>(k) / 64) * 4;
  const double relative = 0x1p-23 * (17 * (steps + 1) + splits + kernel.warps + 8);
  int64_t wrong = 0;
  for (int64_t row = 0; row < m; ++row)
    for (int64_t i = 0; i < n; ++i) {
      double magnitude;
      const double expected = exact_sum(weight, x, row, i, &magnitude),
                   got = half_value(y[size(row * n + i)], kernel.type);
      wrong += !(std::fabs(got - expected) <= relative * magnitude + unit_roundoff(kernel.type) * std::fabs(expected));
    }
  expect(wrong == 0, text(wrong, " values outside the bound"));
  for (const emulate::Order order : {emulate::Order::descending, emulate::Order::random}) {
    emulate::options.threads = order;
    emulate::options.reversed_blocks = order == emulate::Order::descending;
    expect(run(weight, x, plan, nullptr, Activation::none) == y, "other bits in another order of threads and blocks");
  }
  emulate::options = {};
}

void check_kernel(const bitmap::Kernel& kernel) {
  const int64_t channels = kernel.tiles * 16, rows = kernel.columns * 8, ring = kernel.warps * bitmap::kUnitK;
  for (const int64_t n : {int64_t{1}, channels - 1, channels, channels + 1, 2 * channels + 3})
    check_exact(kernel, std::min<int64_t>(rows, 3), n, 96, 0.3, 0, 1, Activation::none);
  for (const int64_t k : {int64_t{1}, int64_t{7}, int64_t{63}, int64_t{64}, int64_t{65}, ring - 1, 5 * ring + 40})
    check_exact(kernel, 2, 40, k, 0.3, k % 8 == 0 ? 8 : k % 4, 1, Activation::none);
  for (const int64_t m : {int64_t{1}, rows - 1, rows, rows + 1})
    check_exact(kernel, m, 33, 200, 0.5, m % 2 * 8, m % 2 == 0 ? 2 : 1, Activation::none);
  for (const double density : {0.0, 0.02, 0.7, 1.0})
    check_exact(kernel, 3, 70, 448, density, 0, 3, density > 0.5 ? Activation::gelu : Activation::relu);
  check_exact(kernel, 1, 40, 33 * ring, 0.02, 0, 1, Activation::none);  // more steps than a warp looks up at once
  check_bound(kernel, rows, channels + 7, 2 * ring + 24, 1);
  check_bound(kernel, 3, channels + 7, 2 * ring + 24, 3);
}

void test_refused() {
  begin("sparse: what is refused");
  const uint8_t mask[2] = {5, 1};
  const uint16_t values[4] = {};
  for (const int64_t count : {2, 4})
    refuses("values that are not as many as bits",
            [&] { bitmap::pack_bitmap(mask, values, count, Type::float16, 2, 3); });
  refuses("no channels", [&] { bitmap::pack_bitmap(mask, values, 0, Type::float16, 0, 3); });
  refuses("k too large", [&] { bitmap::pack_bitmap(mask, values, 0, Type::float16, 1, 65537); });

  const SparseWeight weight(40, 70, Type::bfloat16, 0.5, true);
  expect(weight.shape.bytes == static_cast<int64_t>(weight.packed.size()) && weight.shape.bytes % 16 == 0, "length");
  const auto with = [&](auto&& change) {
    bitmap::Shape shape = weight.shape;
    change(shape);
    bitmap::plan(shape, 1, 132);
  };
  refuses("more channels than fit", [&] { with([](bitmap::Shape& shape) { shape.n = 4000; }); });
  refuses("no k", [&] { with([](bitmap::Shape& shape) { shape.k = 0; }); });
  refuses("a unit that is no unit", [&] { with([](bitmap::Shape& shape) { shape.unit_bytes += 8; }); });
  refuses("too large a unit", [&] { with([](bitmap::Shape& shape) { shape.unit_bytes = 4448; }); });
  const bitmap::Plan plan = bitmap::plan(weight.shape, 1, 132);
  const HalfRows other(Type::float16, 1, 70, 0, true), right(Type::bfloat16, 1, 70, 0, true);
  refuses("x of another type", [&] { run(weight, other, plan, nullptr, Activation::none); });
  refuses("no workspace", [&] {
    uint16_t y[40];
    bitmap::linear({right.data.data(), Type::bfloat16, 1, 70, weight.packed.data(), weight.shape, nullptr,
                    Activation::none, y, nullptr, nullptr},
                   bitmap::plan(*plan.kernel, 40, 1, 2));
  });
  bitmap::linear({nullptr, Type::bfloat16, 0, 70, weight.packed.data(), weight.shape, nullptr, Activation::none,
                  nullptr, nullptr, nullptr},
                 plan);  // no rows: nothing to do
}

void test_plans() {
  begin("sparse: plans");
  for (const int64_t m : {1, 8, 9, 16, 17, 32, 33, 200})
    for (const int64_t unit : {60, 180, 277}) {
      const int64_t bytes = bitmap::units_of(4096, 4096) * (unit * 16 + 4) + 16;
      const bitmap::Shape shape{Type::bfloat16, 4096, 4096, bytes, static_cast<int>(unit * 16)};
      const bitmap::Plan plan = bitmap::plan(shape, m, 132);
      expect(plan.kernel != nullptr && plan.kernel->type == Type::bfloat16, text("m ", m, " unit ", unit));
      expect(bitmap::fits(*plan.kernel, shape), text("does not fit: m ", m, " unit ", unit));
      expect(plan.blocks * plan.splits >= 100, text("idle at m ", m, " unit ", unit));
      expect((plan.splits > 1) == (plan.workspace > 0), text("workspace at m ", m));
    }
}

}  // namespace

void test_cuda_sparse() {
  for (const int64_t n : {1, 31, 33, 64, 70})
    for (const int64_t k : {1, 9, 64, 65, 200})
      for (const double density : {0.0, 0.3, 1.0})
        test_pack(n, k, density, k % 2 == 0 ? Type::float16 : Type::bfloat16);
  test_refused();
  test_plans();
  int count = 0;
  const bitmap::Kernel* all = bitmap::cuda_kernels(&count);
  for (int i = 0; i < count; ++i) check_kernel(all[i]);
}

}  // namespace native
