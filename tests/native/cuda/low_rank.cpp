// The CUDA low-rank kernels' own source on the host: exact sums, float64 within the bound of csrc/low_rank/cuda.h,
// several orders of threads and blocks.
#include "low_rank.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <random>
#include <string>
#include <vector>

#include "../report.h"
#include "halves.h"
#include "int8/activation.h"
#include "low_rank/cuda.h"

namespace native {
namespace {

namespace int8 = pycompress::int8;
namespace low_rank = pycompress::low_rank::cuda;
using low_rank::Factors;
using low_rank::Matrix;

// Values of a matrix and where they stand packed.
struct Factor {
  Matrix shape;
  std::vector<uint16_t> values;

  Factor(const Matrix& of, int64_t rows, int64_t columns, bool exact) : shape(of), values(size(of.n * of.k)) {
    std::mt19937 random(static_cast<uint32_t>(of.n * 7919 + of.k));
    std::normal_distribution<double> normal;
    for (int64_t n = 0; n < rows; ++n)
      for (int64_t k = 0; k < columns; ++k)
        values[size(n * of.k + k)] =
            half_bits(exact ? static_cast<int>(random() % 3) - 1 : normal(random), Type::bfloat16);
  }
  double at(int64_t n, int64_t k) const { return static_cast<double>(bfloat_value(values[size(n * shape.k + k)])); }

  void pack(uint16_t* to) const {
    std::fill(to, to + shape.size(), uint16_t{0});
    for (int64_t n = 0; n < shape.n; ++n)
      for (int64_t k = 0; k < shape.k; ++k) {
        const int64_t tile = n / 16 * ((shape.k + 63) / 64 * 4) + k / 16;
        const int64_t i = n % 16 / 8, g = n % 8, j = k % 16 / 8, t = k % 8 / 2, e = k % 2;
        to[tile * 256 + (((g * 4 + t) * 2 + j) * 2 + i) * 2 + e] = values[size(n * shape.k + k)];
      }
  }
};

struct LowRankCase {
  Factors shape;
  int64_t rank;  // the true one
  Factor down, up;
  HalfRows x;
  Guarded<uint16_t> packed;
  std::vector<float> bias;

  LowRankCase(int64_t n, int64_t k, int64_t rank_, Type type, int64_t m, int64_t gap, bool exact)
      : shape{n, k, (rank_ + 15) / 16 * 16},
        rank(rank_),
        down(shape.down(), rank, k, exact),
        up(shape.up(), n, rank, exact),
        x(type, m, k, gap, exact),
        packed(size(shape.down().size() + shape.up().size()), Edge::begin) {
    down.pack(packed.data());
    up.pack(packed.data() + shape.down().size());
    for (int64_t i = 0; i < n; ++i) bias.push_back(static_cast<float>(i % 37 - 18) * 0.25f);
  }

  std::vector<uint16_t> run(const low_rank::Plans& plans, Activation activation) const {
    Guarded<uint16_t> y(size(x.m * shape.n));
    Guarded<uint8_t> workspace(size(plans.workspace), Edge::begin);
    y.fill(emulate::kPoison), workspace.fill(emulate::kPoison);
    low_rank::linear({x.data.data(), x.type, x.m, x.ldx, packed.data(), shape, bias.data(), activation, y.data(),
                      workspace.data(), nullptr},
                     plans);
    expect(y.intact() && workspace.intact(), "a store outside");
    return {y.data(), y.data() + y.size()};
  }

  // x down^T of a row, and the sums of magnitudes.
  void between(int64_t row, std::vector<double>& t, std::vector<double>& magnitude) const {
    t.assign(size(rank), 0), magnitude.assign(size(rank), 0);
    for (int64_t r = 0; r < rank; ++r)
      for (int64_t k = 0; k < shape.k; ++k) {
        const double product = x.at(row, k) * down.at(r, k);
        t[size(r)] += product;
        magnitude[size(r)] += std::fabs(product);
      }
  }
};

std::string name(const low_rank::Plans& plans, const LowRankCase& c) {
  return text(plans.down.kernel->name, " splits=", plans.down.splits, " m=", c.x.m, " n=", c.shape.n, " k=", c.shape.k,
              " rank=", c.rank, " ldx=", c.x.ldx);
}

// Small integers: every float32 sum is exact, so t and y are known to the bit.
void check_exact(const low_rank::Kernel& kernel, int64_t m, int64_t n, int64_t k, int64_t rank, int64_t gap, int splits,
                 Activation activation) {
  const LowRankCase c(n, k, rank, kernel.type, m, gap, true);
  const low_rank::Plans plans = low_rank::plans(kernel, c.shape, m, splits);
  begin(name(plans, c));
  const std::vector<uint16_t> y = c.run(plans, activation);
  std::vector<double> t, magnitude;
  int64_t wrong = 0;
  for (int64_t row = 0; row < m; ++row) {
    c.between(row, t, magnitude);
    for (double& value : t) value = static_cast<double>(half_value(half_bits(value, kernel.type), kernel.type));
    for (int64_t i = 0; i < n; ++i) {
      double sum = static_cast<double>(c.bias[size(i)]);
      for (int64_t r = 0; r < rank; ++r) sum += t[size(r)] * c.up.at(i, r);
      const float expected = int8::activate(activation, int8::Scalar{static_cast<float>(sum)}).value;
      wrong += y[size(row * n + i)] != half_bits(static_cast<double>(expected), kernel.type);
    }
  }
  expect(wrong == 0, text(wrong, " values differ"));
}

double of_steps(int64_t count, const low_rank::Kernel& kernel, int splits) {
  const double steps = static_cast<double>((count + 63) / 64 * 4);
  return 0x1p-23 * (17 * (steps + 1) + splits + kernel.warps + 8);
}

// Random values: within the bound of cuda.h; the same bits in any order of threads and blocks.
void check_bound(const low_rank::Kernel& kernel, int64_t m, int64_t n, int64_t k, int64_t rank, int splits) {
  const LowRankCase c(n, k, rank, kernel.type, m, 0, false);
  const low_rank::Plans plans = low_rank::plans(kernel, c.shape, m, splits);
  begin(text(name(plans, c), " against float64"));
  const std::vector<uint16_t> y = c.run(plans, Activation::none);
  const double first = of_steps(k, kernel, splits), second = of_steps(rank, kernel, splits);
  const double u = unit_roundoff(kernel.type);
  std::vector<double> t, magnitude;
  int64_t wrong = 0;
  for (int64_t row = 0; row < m; ++row) {
    c.between(row, t, magnitude);
    for (int64_t i = 0; i < n; ++i) {
      const double bias = static_cast<double>(c.bias[size(i)]);
      double expected = bias, bound = 0;
      for (int64_t r = 0; r < rank; ++r) {
        const double up = std::fabs(c.up.at(i, r)), d = first * magnitude[size(r)] + u * std::fabs(t[size(r)]);
        expected += t[size(r)] * c.up.at(i, r);
        bound += d * up + second * (std::fabs(t[size(r)]) + d) * up;
      }
      bound += u * (std::fabs(expected) + bound + std::fabs(bias));
      wrong += !(std::fabs(static_cast<double>(half_value(y[size(row * n + i)], kernel.type)) - expected) <= bound);
    }
  }
  expect(wrong == 0, text(wrong, " values outside the bound"));
  for (const emulate::Order order : {emulate::Order::descending, emulate::Order::random}) {
    emulate::options.threads = order;
    emulate::options.reversed_blocks = order == emulate::Order::descending;
    expect(c.run(plans, Activation::none) == y, "other bits in another order of threads and blocks");
  }
  emulate::options = {};
}

void check_kernel(const low_rank::Kernel& kernel) {
  const int64_t channels = kernel.tiles * 16, rows = kernel.columns * 8, ring = kernel.warps * low_rank::kStep;
  for (const int64_t n : {int64_t{1}, int64_t{16}, int64_t{17}, channels - 1, channels, channels + 1, 2 * channels + 3})
    check_exact(kernel, std::min<int64_t>(rows, 3), n, 96, 20, 0, 1, Activation::none);
  for (const int64_t k :
       {int64_t{1}, int64_t{7}, int64_t{63}, int64_t{64}, int64_t{65}, ring - 1, (kernel.stages + 1) * ring + 40})
    check_exact(kernel, 2, 40, k, 33, k % 8 == 0 ? 8 : k % 4, 1, Activation::none);
  for (const int64_t rank : {int64_t{1}, int64_t{15}, int64_t{16}, int64_t{17}, channels + 1, int64_t{129}})
    check_exact(kernel, 3, 50, 200, rank, 0, rank % 2 == 0 ? 2 : 1, Activation::none);
  for (const int64_t m : {int64_t{1}, rows - 1, rows, rows + 1, 2 * rows + 3})
    check_exact(kernel, std::max<int64_t>(m, 1), 33, 200, 40, m % 2 * 8, m % 2 == 0 ? 2 : 1, Activation::none);
  for (const Activation activation : {Activation::relu, Activation::gelu, Activation::gelu_tanh, Activation::silu})
    check_exact(kernel, 3, 70, 448, 70, 0, 3, activation);
  check_bound(kernel, rows, channels + 7, 2 * ring + 24, 72, 1);
  check_bound(kernel, 3, channels + 7, 2 * ring + 24, 130, 3);
}

// Rows with NaN and Inf leave the others as they are, and show in every channel.
void check_not_finite(const low_rank::Kernel& kernel) {
  LowRankCase c(10, 100, 20, kernel.type, 4, 0, false);
  const low_rank::Plans plans = low_rank::plans(kernel, c.shape, 4, 1);
  begin(text(name(plans, c), " with NaN and Inf"));
  const std::vector<uint16_t> before = c.run(plans, Activation::none);
  c.x.data[size(c.x.ldx + 99)] = half_bits(INFINITY, kernel.type);
  c.x.data[size(2 * c.x.ldx)] = half_bits(NAN, kernel.type);
  const std::vector<uint16_t> after = c.run(plans, Activation::none);
  for (int64_t n = 0; n < 10; ++n) {
    const auto value = [&](int64_t row) { return half_value(after[size(row * 10 + n)], kernel.type); };
    expect(!std::isfinite(value(1)) && std::isnan(value(2)), text("channel ", n));
    for (const int64_t row : {0, 3})
      expect(after[size(row * 10 + n)] == before[size(row * 10 + n)], text("row ", row, " channel ", n));
  }
}

void test_plans() {
  begin("low rank: plans");
  for (const int64_t m : {1, 8, 9, 16, 17, 32, 33, 200})
    for (const Type type : {Type::bfloat16, Type::float16}) {
      const low_rank::Plans plans = low_rank::plans({4096, 4096, 512}, type, m, 132);
      for (const low_rank::Plan& plan : {plans.down, plans.up}) {
        expect(plan.kernel != nullptr && plan.kernel->type == type, text("kernel at m ", m));
        expect(plan.blocks * plan.splits >= 100, text("idle at m ", m));
        expect((plan.splits > 1) == (plan.workspace > 0), text("workspace at m ", m));
        expect(plans.workspace >= plan.workspace + m * 512 * 2, text("no room at m ", m));
      }
    }
}

void test_refused() {
  begin("low rank: what is refused");
  refuses("float32", [] { low_rank::plans({64, 64, 16}, Type::float32, 1, 132); });
  const LowRankCase c(20, 70, 16, Type::bfloat16, 1, 0, true);
  const low_rank::Plans plans = low_rank::plans(c.shape, Type::bfloat16, 1, 132);
  uint16_t y[20];
  low_rank::Problem problem{c.x.data.data(), Type::bfloat16,   1, c.x.ldx, c.packed.data(), c.shape,
                            nullptr,         Activation::none, y, nullptr, nullptr};
  refuses("no workspace", [&] { low_rank::linear(problem, plans); });
  problem.m = 0;
  low_rank::linear(problem, plans);  // nothing to do
  problem.m = 1;
  problem.shape.rank = 17;
  refuses("a rank that is not padded", [&] { low_rank::linear(problem, plans); });
  problem.shape = c.shape;
  problem.type = Type::float16;
  refuses("kernels of another type", [&] { low_rank::linear(problem, plans); });
}

}  // namespace

void test_cuda_low_rank() {
  test_plans();
  test_refused();
  int count = 0;
  const low_rank::Kernel* all = low_rank::cuda_kernels(&count);
  for (int i = 0; i < count; ++i) {
    check_kernel(all[i]);
    check_not_finite(all[i]);
  }
}

}  // namespace native
