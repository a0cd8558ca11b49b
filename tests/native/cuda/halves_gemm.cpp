// The source of the CUDA GEMM of halves on the host: exact sums at the edges of the tiles, float64 within the bound of
// csrc/cuda/halves.h, and schedules of threads, blocks and tiles that could uncover a missing wait.
#include "halves_gemm.h"

#include <cmath>
#include <cstdint>
#include <random>
#include <set>
#include <string>
#include <vector>

#include "../report.h"
#include "common/activation.h"
#include "cuda/halves.h"
#include "emulate_hopper.h"
#include "halves.h"

namespace native {
namespace {

namespace halves = pycompress::halves;
using pycompress::Scalar;

// x with row stride k + gap, w [n][k_pad] with zeros behind k, y with row stride n + 3 where that is odd.
struct HalvesCase {
  int64_t m, n, k, k_pad, ldy;
  HalfRows x;
  Guarded<uint16_t> w;
  Guarded<float> bias;

  HalvesCase(Type type, int64_t m_, int64_t n_, int64_t k_, bool exact)
      : m(m_),
        n(n_),
        k(k_),
        k_pad((k_ + halves::kPadK - 1) / halves::kPadK * halves::kPadK),
        ldy(n_ % 2 == 0 ? n_ : n_ + 3),
        x(type, m_, k_, (8 - k_ % 8) % 8 + (k_ % 3 == 0 ? 8 : 0), exact),
        w(size(n * k_pad)),
        bias(size(n)) {
    std::mt19937 random(static_cast<uint32_t>(n * 7919 + k));
    std::normal_distribution<double> normal;
    w.fill(0);
    for (int64_t i = 0; i < n; ++i) {
      for (int64_t j = 0; j < k; ++j)
        w[size(i * k_pad + j)] = half_bits(exact ? static_cast<int>(random() % 3) - 1 : normal(random), type);
      bias[size(i)] = static_cast<float>(i % 37 - 18) * 0.25f;
    }
  }

  std::string name() const { return text("m=", m, " n=", n, " k=", k, " ldx=", x.ldx, " ldy=", ldy); }

  halves::Problem problem(uint16_t* y) const {
    return {x.data.data(), x.type, m, n, k, x.ldx, w.data(), k_pad, bias.data(), Activation::none, y, ldy, nullptr};
  }

  double product(int64_t row, int64_t channel, int64_t i) const {
    return x.at(row, i) * static_cast<double>(half_value(w[size(channel * k_pad + i)], x.type));
  }

  std::vector<uint16_t> run(const halves::Kernel& kernel, Activation activation, bool with_bias) const {
    Guarded<uint16_t> y(size(m * ldy));
    y.fill(emulate::kPoison);
    halves::Problem p = problem(y.data());
    p.activation = activation;
    if (!with_bias) p.bias = nullptr;
    halves::multiply(p, &kernel);
    expect(y.intact(), "a store outside of y");
    for (int64_t row = 0; row < m; ++row)
      for (int64_t i = n; i < ldy; ++i) expect(y[size(row * ldy + i)] == 0xffff, text("a store behind row ", row));
    return {y.data(), y.data() + y.size()};
  }
};

// Small integers: every float32 sum is exact, so y is known to the bit.
void check_exact(const halves::Kernel& kernel, const HalvesCase& c, Activation activation = Activation::none,
                 bool bias = true) {
  begin(
      text("halves kernel=", kernel.name, " ", c.name(), " activation=", static_cast<int>(activation), " bias=", bias));
  const std::vector<uint16_t> y = c.run(kernel, activation, bias);
  int64_t wrong = 0;
  for (int64_t row = 0; row < c.m; ++row)
    for (int64_t channel = 0; channel < c.n; ++channel) {
      double sum = bias ? static_cast<double>(c.bias[size(channel)]) : 0;
      for (int64_t i = 0; i < c.k; ++i) sum += c.product(row, channel, i);
      const float expected = activate(activation, Scalar{static_cast<float>(sum)}).value;
      wrong += y[size(row * c.ldy + channel)] != half_bits(static_cast<double>(expected), kernel.type);
    }
  expect(wrong == 0, text(wrong, " of ", c.m * c.n, " values differ"));
}

// Random values: within the bound of halves.h.
void check_bound(const halves::Kernel& kernel, int64_t m, int64_t n, int64_t k) {
  const HalvesCase c(kernel.type, m, n, k, false);
  begin(text("halves kernel=", kernel.name, " ", c.name(), " against float64"));
  const std::vector<uint16_t> y = c.run(kernel, Activation::none, true);
  const double steps = static_cast<double>(c.k_pad / 16), v = 0x1p-23 * (17 * (steps + 1) + 9);
  int64_t wrong = 0;
  for (int64_t row = 0; row < m; ++row)
    for (int64_t channel = 0; channel < n; ++channel) {
      const double bias = static_cast<double>(c.bias[size(channel)]);
      double expected = bias, magnitude = 0;
      for (int64_t i = 0; i < k; ++i) {
        expected += c.product(row, channel, i);
        magnitude += std::fabs(c.product(row, channel, i));
      }
      const double bound = v * magnitude + unit_roundoff(kernel.type) * (std::fabs(expected) + std::fabs(bias));
      const auto got = static_cast<double>(half_value(y[size(row * c.ldy + channel)], kernel.type));
      wrong += !(std::fabs(got - expected) <= bound);
    }
  expect(wrong == 0, text(wrong, " values outside the bound"));
}

void check_schedules(const halves::Kernel& kernel) {
  const HalvesCase c(kernel.type, 2 * kernel.bm + 3, 2 * kernel.bn + 5, kernel.bk / 2 * (kernel.stages + 1) + 8, true);
  const auto with = [&](emulate::Order threads, emulate::Landing tiles, int multiprocessors) {
    emulate::options.threads = threads;
    emulate::options.tiles = tiles;
    emulate::options.multiprocessors = multiprocessors;
    emulate::options.reversed_blocks = threads == emulate::Order::descending;
    check_exact(kernel, c);
    emulate::options = {};
  };
  with(emulate::Order::descending, emulate::Landing::late, 4);
  if (kernel.arch == 90) with(emulate::Order::random, emulate::Landing::early, 2);
}

void check_kernel(const halves::Kernel& kernel) {
  const auto edges = [](int tile) { return std::set<int64_t>{1, tile - 1, tile, tile + 1, 2 * tile + 3}; };
  for (const int64_t m : edges(kernel.bm)) check_exact(kernel, {kernel.type, m, 20, 40, true});
  for (const int64_t n : edges(kernel.bn)) check_exact(kernel, {kernel.type, 5, n, 72, true});
  for (const int64_t k : edges(kernel.bk / 2)) check_exact(kernel, {kernel.type, 7, 24, k, true});
  const HalvesCase vectors(kernel.type, 11, 44, 65, true), odd(kernel.type, 5, 9, 130, true);
  for (int activation = 0; activation < 5; ++activation)
    check_exact(kernel, activation % 2 ? vectors : odd, static_cast<Activation>(activation), activation != 2);
  check_exact(kernel, vectors, Activation::none, true);
  check_bound(kernel, 9, kernel.bn + 4, kernel.bk / 2 * (kernel.stages + 2) + 5);
  check_schedules(kernel);
}

// Rows of x with NaN and Inf leave the others as they are.
void check_not_finite(const halves::Kernel& kernel) {
  HalvesCase c(kernel.type, 4, 10, 100, true);
  begin(text("halves kernel=", kernel.name, " with NaN and Inf"));
  const std::vector<uint16_t> before = c.run(kernel, Activation::none, true);
  for (int64_t i = 0; i < c.n; ++i) c.w[size(i * c.k_pad + 99)] = half_bits(1, kernel.type);
  const std::vector<uint16_t> finite = c.run(kernel, Activation::none, true);
  c.x.data[size(c.x.ldx + 99)] = half_bits(INFINITY, kernel.type);
  c.x.data[size(2 * c.x.ldx)] = half_bits(NAN, kernel.type);
  const std::vector<uint16_t> after = c.run(kernel, Activation::none, true);
  expect(before != finite, "w does not matter");
  for (int64_t i = 0; i < c.n; ++i) {
    const auto value = [&](int64_t row) { return half_value(after[size(row * c.ldy + i)], kernel.type); };
    expect(std::isinf(value(1)) && std::isnan(value(2)), text("channel ", i));
    for (const int64_t row : {0, 3})
      expect(after[size(row * c.ldy + i)] == finite[size(row * c.ldy + i)], text("row ", row, " channel ", i));
  }
}

void test_dispatch() {
  for (const Type type : {Type::bfloat16, Type::float16})
    for (const int arch : {80, 86, 89, 90, 100, 120})
      for (const int64_t m : {1, 33, 64, 129, 512, 8192})
        for (const int64_t n : {1, 100, 512, 4096}) {
          begin(text("halves dispatch arch=", arch, " m=", m, " n=", n));
          const halves::Kernel& kernel = halves::chosen_kernel(type, m, n, 4096, arch, 108);
          expect(kernel.type == type && kernel.arch <= arch && (kernel.arch != 90 || arch == 90), kernel.name);
          expect(m > 32 || kernel.bm <= 64, text(kernel.name, " wastes most of its rows"));
          expect(m * n < 4096 * 4096 || kernel.bm * kernel.bn >= 128 * 128, text(kernel.name, " is too small"));
          expect(&halves::kernel_named(kernel.name) == &kernel, text(kernel.name, " is there twice"));
        }
}

void test_refused() {
  const HalvesCase c(Type::bfloat16, 3, 5, 40, true);
  std::vector<uint16_t> y(size(c.m * c.ldy));
  const auto refused = [&](const char* what, auto change) {
    halves::Problem p = c.problem(y.data());
    change(p);
    refuses(text("halves: ", what), [&] { halves::multiply(p); });
  };
  refused("rows of x that are not aligned", [](auto& p) { p.ldx += 4; });
  refused("x that is not aligned", [](auto& p) { p.x = static_cast<const uint16_t*>(p.x) + 4; });
  refused("w that is not aligned", [](auto& p) { p.w += 4; });
  refused("rows of w that are too short", [](auto& p) { p.k_pad = 0; });
  refused("rows of w that are not padded", [](auto& p) { p.k_pad = 72; });
  refused("rows of y that are too short", [](auto& p) { p.ldy = p.n - 1; });
  refused("float32", [](auto& p) { p.type = Type::float32; });
  refuses("halves: a kernel of another type",
          [&] { halves::multiply(c.problem(y.data()), &halves::kernel_named("sm80_f16_64x64")); });
  refuses("halves: an unknown name", [] { halves::kernel_named("sm80_f16_1x1"); });
  refuses("halves: compute capability 7.5", [] { halves::chosen_kernel(Type::float16, 1, 1, 1, 75, 40); });
  emulate::options.arch = 89;
  refuses("halves: a kernel of another architecture",
          [&] { halves::multiply(c.problem(y.data()), &halves::kernel_named("sm90_bf16_64x64")); });
  emulate::options = {};
  begin("halves: no rows");
  halves::Problem none = c.problem(nullptr);
  none.m = 0;
  halves::multiply(none);
}

}  // namespace

void test_cuda_halves() {
  test_dispatch();
  test_refused();
  int count = 0;
  const halves::Kernel* all = halves::kernels(&count);
  for (int i = 0; i < count; ++i) {
    check_kernel(all[i]);
    check_not_finite(all[i]);
  }
}

}  // namespace native
