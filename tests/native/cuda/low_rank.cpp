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
#include "common/activation.h"
#include "halves.h"
#include "low_rank/cuda.h"

namespace native {
namespace {

using pycompress::Scalar;
namespace low_rank = pycompress::low_rank::cuda;
using low_rank::Factors;
using low_rank::Kernel;
using low_rank::Matrix;
using low_rank::Plan;

bool is_way(const Kernel& kernel, const char* way) { return std::string(kernel.name).rfind(way, 0) == 0; }

// Values of a factor and where they stand packed.
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
    for (int64_t n = 0; n < shape.n; ++n)
      for (int64_t k = 0; k < shape.k; ++k) to[n * shape.stride + k] = values[size(n * shape.k + k)];
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
        packed(size(shape.size()), Edge::begin) {
    packed.fill(0);
    down.pack(packed.data());
    up.pack(packed.data() + shape.up_begin());
    for (int64_t i = 0; i < n; ++i) bias.push_back(static_cast<float>(i % 37 - 18) * 0.25f);
  }

  std::vector<uint16_t> run(const Plan& plan, Activation activation) const {
    Guarded<uint16_t> y(size(x.m * shape.n));
    Guarded<uint8_t> workspace(size(plan.workspace), Edge::begin);
    y.fill(emulate::kPoison), workspace.fill(emulate::kPoison);
    low_rank::linear({x.data.data(), x.type, x.m, x.ldx, packed.data(), shape, bias.data(), activation, y.data(),
                      workspace.data(), nullptr},
                     plan);
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

std::string name(const Plan& plan, const LowRankCase& c) {
  return text(plan.down.kernel->name, " splits=", plan.down.splits, " m=", c.x.m, " n=", c.shape.n, " k=", c.shape.k,
              " rank=", c.rank, " ldx=", c.x.ldx);
}

// Small integers: every float32 sum is exact, so t and y are known to the bit.
void check_exact(const Kernel& kernel, int64_t m, int64_t n, int64_t k, int64_t rank, int64_t gap, int splits,
                 Activation activation) {
  const LowRankCase c(n, k, rank, kernel.type, m, gap, true);
  const Plan plan = low_rank::plan(kernel, c.shape, m, splits);
  begin(name(plan, c));
  const std::vector<uint16_t> y = c.run(plan, activation);
  std::vector<double> t, magnitude;
  int64_t wrong = 0;
  for (int64_t row = 0; row < m; ++row) {
    c.between(row, t, magnitude);
    for (double& value : t) value = static_cast<double>(half_value(half_bits(value, kernel.type), kernel.type));
    for (int64_t i = 0; i < n; ++i) {
      double sum = static_cast<double>(c.bias[size(i)]);
      for (int64_t r = 0; r < rank; ++r) sum += t[size(r)] * c.up.at(i, r);
      const float expected = activate(activation, Scalar{static_cast<float>(sum)}).value;
      wrong += y[size(row * n + i)] != half_bits(static_cast<double>(expected), kernel.type);
    }
  }
  expect(wrong == 0, text(wrong, " values differ"));
}

double of_steps(int64_t count, const Kernel& kernel, int splits) {
  const double steps = static_cast<double>((count + 63) / 64 * 4);
  return 0x1p-23 * (17 * (steps + 1) + (is_way(kernel, "thin") ? splits + kernel.warps : 1) + 8);
}

// Random values: within the bound of cuda.h; the same bits in any order of threads and blocks.
void check_bound(const Kernel& kernel, int64_t m, int64_t n, int64_t k, int64_t rank, int splits) {
  const LowRankCase c(n, k, rank, kernel.type, m, 0, false);
  const Plan plan = low_rank::plan(kernel, c.shape, m, splits);
  begin(text(name(plan, c), " against float64"));
  const std::vector<uint16_t> y = c.run(plan, Activation::none);
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
    expect(c.run(plan, Activation::none) == y, "other bits in another order of threads and blocks");
  }
  emulate::options = {};
}

void check_few(const Kernel& kernel) {
  const int64_t channels = kernel.channels, rows = kernel.rows, ring = kernel.warps * low_rank::kStep;
  for (const int64_t n : {int64_t{1}, int64_t{16}, int64_t{17}, channels - 1, channels, channels + 1, 2 * channels + 3})
    check_exact(kernel, std::min<int64_t>(rows, 3), n, 96, 20, 0, 1, Activation::none);
  for (const int64_t k :
       {int64_t{1}, int64_t{7}, int64_t{63}, int64_t{64}, int64_t{65}, ring - 1, (kernel.stages + 1) * ring + 40})
    check_exact(kernel, 2, 40, k, 33, k % 8 == 0 ? 8 : k % 4, 1, Activation::none);
  for (const int64_t rank : {int64_t{1}, int64_t{15}, int64_t{16}, int64_t{17}, channels + 1, int64_t{129}})
    check_exact(kernel, 3, 50, 200, rank, 0, rank % 2 == 0 ? 2 : 1, Activation::none);
  for (const int64_t m : {int64_t{1}, rows - 1, rows, rows + 1, 2 * rows + 3})
    check_exact(kernel, std::max<int64_t>(m, 1), 33, 200, 40, m % 2 * 8, m % 2 == 0 ? 2 : 1, Activation::none);
  for (const Activation activation : {Activation::relu, Activation::gelu, Activation::gelu_tanh, Activation::silu,
                                      Activation::quick_gelu, Activation::relu6, Activation::hardswish})
    check_exact(kernel, 3, 70, 448, 70, 0, 3, activation);
  check_bound(kernel, rows, channels + 7, 2 * ring + 24, 72, 1);
  check_bound(kernel, 3, channels + 7, 2 * ring + 24, 130, 3);
}

// To whole 16 bytes, and one more of them for every other k.
int64_t aligned_gap(int64_t k) { return (8 - k % 8) % 8 + k % 2 * 8; }

void check_fused(const Kernel& kernel) {
  const int64_t channels = kernel.channels, rows = kernel.rows, rank = channels - 5;
  const auto exact = [&](int64_t m, int64_t n, int64_t k, int64_t of_rank, int splits, Activation activation) {
    check_exact(kernel, m, n, k, of_rank, aligned_gap(k), splits, activation);
  };
  for (const int64_t n : {int64_t{1}, channels - 1, channels, channels + 1, 2 * channels + 3})
    exact(3, n, 96, rank, n % 2 == 0 ? 1 : 2, Activation::none);
  for (const int64_t k : {int64_t{1}, int64_t{7}, int64_t{63}, int64_t{64}, int64_t{65}, int64_t{128}, int64_t{193},
                          int64_t{(kernel.stages + 1) * low_rank::kStep + 40}})
    exact(5, 36, k, rank, 1, Activation::none);
  for (const int64_t of_rank : {channels - 63, channels - 48, channels - 47, channels - 1, channels})
    exact(5, 36, 72, of_rank, 1, Activation::none);
  for (const int64_t m : {int64_t{1}, rows - 1, rows, rows + 1, 2 * rows + 3})
    exact(m, 33, 72, rank, 1, Activation::none);
  for (const int splits : {2, 3, 7}) exact(rows + 2, 3 * channels - 4, 72, rank, splits, Activation::none);
  for (const Activation activation : {Activation::relu, Activation::gelu, Activation::gelu_tanh, Activation::silu,
                                      Activation::quick_gelu, Activation::relu6, Activation::hardswish})
    exact(20, 70, 80, rank, 1, activation);
  check_bound(kernel, rows / 2 + 3, channels + 7, 216, rank, 2);
  refuses(text(kernel.name, " for the rank of another kernel"),
          [&] { low_rank::plan(kernel, {64, 64, channels + 16}, 40, 1); });
}

// csrc/cuda/halves.h has tests of its own.
void check_wide(const Kernel& kernel) {
  for (const int arch : {80, 90}) {
    emulate::options.arch = arch;
    check_exact(kernel, 33, 70, 136, 129, 0, 1, Activation::none);
    check_exact(kernel, 70, 200, 67, 150, 5, 1, Activation::silu);
    check_exact(kernel, 5, 129, 264, 20, 8, 1, Activation::none);
    check_bound(kernel, 40, 130, 200, 140, 1);
    emulate::options = {};
  }
}

// Rows with NaN and Inf leave the others as they are, and show in every channel.
void check_not_finite(const Kernel& kernel) {
  LowRankCase c(10, 100, std::max(20, kernel.channels - 3), kernel.type, 4, 4, false);
  const Plan plan = low_rank::plan(kernel, c.shape, 4, 1);
  begin(text(name(plan, c), " with NaN and Inf"));
  const std::vector<uint16_t> before = c.run(plan, Activation::none);
  c.x.data[size(c.x.ldx + 99)] = half_bits(INFINITY, kernel.type);
  c.x.data[size(2 * c.x.ldx)] = half_bits(NAN, kernel.type);
  const std::vector<uint16_t> after = c.run(plan, Activation::none);
  for (int64_t n = 0; n < 10; ++n) {
    const auto value = [&](int64_t row) { return half_value(after[size(row * 10 + n)], kernel.type); };
    expect(!std::isfinite(value(1)) && std::isnan(value(2)), text("channel ", n));
    for (const int64_t row : {0, 3})
      expect(after[size(row * 10 + n)] == before[size(row * 10 + n)], text("row ", row, " channel ", n));
  }
}

const char* way_of(const Factors& shape, Type type, int64_t m, int arch) {
  const Plan plan = low_rank::plan(shape, type, m, arch, arch == 90 ? 132 : 108);
  expect(plan.down.kernel->type == type && plan.up.kernel->type == type, text("type at m ", m));
  for (const char* way : {"thin", "fused", "wide"})
    if (is_way(*plan.down.kernel, way)) return way;
  return "";
}

void test_plans() {
  begin("low rank: plans for few rows");
  for (const int64_t m : {1, 8, 9, 16, 17, 32})
    for (const Type type : {Type::bfloat16, Type::float16}) {
      const Plan plan = low_rank::plan({4096, 4096, 512}, type, m, 90, 132);
      for (const low_rank::Part& part : {plan.down, plan.up}) {
        expect(is_way(*part.kernel, "thin") && part.kernel->type == type, text("kernel at m ", m));
        expect(part.blocks * part.splits >= 100, text("idle at m ", m));
      }
      expect(plan.workspace >= m * 512 * 2, text("no room at m ", m));
    }
  begin("low rank: plans for many rows");
  for (const int arch : {80, 90})
    for (const Type type : {Type::bfloat16, Type::float16})
      for (const int64_t m : {4096, 16384}) {
        for (const int64_t rank : {16, 64})
          expect(std::string(way_of({4096, 4096, rank}, type, m, arch)) == "fused", text("rank ", rank, " m ", m));
        expect(std::string(way_of({4096, 4096, 128}, type, m, arch)) != "thin", text("rank 128 m ", m));
        for (const int64_t rank : {144, 512, 1024})
          expect(std::string(way_of({4096, 4096, rank}, type, m, arch)) == "wide", text("rank ", rank, " m ", m));
      }
  const Plan plan = low_rank::plan({4096, 4096, 512}, Type::float16, 4096, 90, 132);
  expect(plan.workspace == 2 * (4096 * 512 + 512 * 8192), "workspace of t and of converted factors");
}

void test_refused() {
  begin("low rank: what is refused");
  refuses("float32", [] { low_rank::plan({64, 64, 16}, Type::float32, 1, 90, 132); });
  const LowRankCase c(20, 70, 16, Type::bfloat16, 1, 0, true);
  const Plan plan = low_rank::plan(c.shape, Type::bfloat16, 1, 90, 132);
  uint16_t y[20];
  low_rank::Problem problem{c.x.data.data(), Type::bfloat16,   1, c.x.ldx, c.packed.data(), c.shape,
                            nullptr,         Activation::none, y, nullptr, nullptr};
  refuses("no workspace", [&] { low_rank::linear(problem, plan); });
  problem.m = 0;
  low_rank::linear(problem, plan);  // nothing to do
  problem.m = 1;
  problem.shape.rank = 17;
  refuses("a rank that is not padded", [&] { low_rank::linear(problem, plan); });
  problem.shape = c.shape;
  problem.type = Type::float16;
  refuses("kernels of another type", [&] { low_rank::linear(problem, plan); });
  const LowRankCase odd(20, 70, 16, Type::bfloat16, 40, 1, true);
  for (const Kernel* kernel : low_rank::cuda_kernels()) {
    if (is_way(*kernel, "thin") || kernel->type != Type::bfloat16 || kernel->channels > 64) continue;
    refuses(text(kernel->name, " on rows that are not aligned"),
            [&] { odd.run(low_rank::plan(*kernel, odd.shape, 40, 1), Activation::none); });
  }
}

}  // namespace

void test_cuda_low_rank() {
  test_plans();
  test_refused();
  for (const Kernel* kernel : low_rank::cuda_kernels()) {
    (is_way(*kernel, "thin") ? check_few : is_way(*kernel, "fused") ? check_fused : check_wide)(*kernel);
    check_not_finite(*kernel);
  }
}

}  // namespace native
