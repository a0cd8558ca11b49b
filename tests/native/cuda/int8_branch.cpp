// The int8 kernels with a branch of low rank, on the host: float64 within the bound of csrc/int8/cuda.h, and the bits
// of the kernel alone where the branch is zero.
#include <algorithm>
#include <cmath>
#include <vector>

#include "common/activation.h"
#include "emulate_hopper.h"
#include "halves.h"
#include "int8_reference.h"

namespace native {

using pycompress::Scalar;
namespace {

constexpr double unit(Type type) { return type == Type::float32 ? 0x1p-24 : unit_roundoff(type); }

enum class Side { zero, exact, normal };  // of t and up; exact: integers from -4 to 4

// t [m][rank_pad] and bfloat16 up [n][rank_pad], zeros behind the rank.
struct BranchCase {
  Int8Case integers;
  int64_t rank, rank_pad;
  Type type;
  Guarded<uint16_t> t, up;

  BranchCase(int64_t m, int64_t n, int64_t k, int64_t rank_, Type type_, Side kind)
      : integers(m, n, k),
        rank(rank_),
        rank_pad((rank_ + cuda::kPadRank - 1) / cuda::kPadRank * cuda::kPadRank),
        type(type_),
        t(size(m * rank_pad)),
        up(size(n * rank_pad)) {
    std::mt19937 random(static_cast<uint32_t>(m + 31 * n + 1009 * rank));
    std::normal_distribution<double> normal;
    const auto value = [&] { return kind == Side::exact ? static_cast<int>(random() % 9) - 4 : 3 * normal(random); };
    const auto fill = [&](Guarded<uint16_t>& to, Type of) {
      for (size_t i = 0; i < to.size(); ++i)
        to[i] = static_cast<int64_t>(i) % rank_pad < rank ? half_bits(value(), of) : uint16_t{0};
    };
    fill(t, type);
    fill(up, Type::bfloat16);
    if (kind == Side::zero) t.fill(0);
  }

  cuda::Problem problem(void* y, Type y_type) {
    cuda::Problem p = integers.problem(y, y_type);
    p.branch = {t.data(), up.data(), rank_pad, rank, type};
    return p;
  }
  std::string name() const { return text(integers.name(), " rank=", rank, " type=", static_cast<int>(type)); }

  // (float(acc) * sx) * sw
  float scaled(int64_t row, int64_t channel) const {
    const auto sum = static_cast<float>(static_cast<int32_t>(integers.sum(row, channel)));
    return (sum * integers.scale[size(row)]) * integers.weight_scale[size(channel)];
  }
  // t . up of a row and a channel, and of their magnitudes.
  void side(int64_t row, int64_t channel, double& sum, double& magnitude) const {
    sum = magnitude = 0;
    for (int64_t r = 0; r < rank; ++r) {
      const double product = static_cast<double>(half_value(t[size(row * rank_pad + r)], type)) *
                             static_cast<double>(bfloat_value(up[size(channel * rank_pad + r)]));
      sum += product;
      magnitude += std::fabs(product);
    }
  }
};

double value_of(const uint8_t* y, Type type, size_t i) {
  if (type == Type::float32) return static_cast<double>(reinterpret_cast<const float*>(y)[i]);
  return static_cast<double>(half_value(reinterpret_cast<const uint16_t*>(y)[i], type));
}

// Within the bound, bias and rounding to y's type included.
void check_bound(const cuda::Kernel& kernel, BranchCase& c, Type y_type, bool bias) {
  begin(text("cuda kernel=", kernel.name, " branch ", c.name(), " y type=", static_cast<int>(y_type), " bias=", bias));
  const int64_t m = c.integers.m, n = c.integers.n;
  Guarded<uint8_t> y(size(m * n) * size_of(y_type));
  y.fill(emulate::kPoison);
  cuda::Problem problem = c.problem(y.data(), y_type);
  if (bias) problem.bias = c.integers.bias.data();
  cuda::linear(problem, &kernel);
  expect(y.intact(), "a store outside of y");
  const double v = 0x1p-23 * 17 * (static_cast<double>((c.rank + 15) / 16) + 1);
  int64_t wrong = 0;
  for (int64_t row = 0; row < m; ++row)
    for (int64_t channel = 0; channel < n; ++channel) {
      const auto scaled = static_cast<double>(c.scaled(row, channel));
      double sum, magnitude;
      c.side(row, channel, sum, magnitude);
      const double b = bias ? static_cast<double>(c.integers.bias[size(channel)]) : 0;
      const double expected = scaled + sum + b;
      const double float_bound = v * (std::fabs(scaled) + magnitude) + 0x1p-23 * (std::fabs(expected) + std::fabs(b));
      const double bound = float_bound + unit(y_type) * (std::fabs(expected) + float_bound);
      wrong += !(std::fabs(value_of(y.data(), y_type, size(row * n + channel)) - expected) <= bound);
    }
  expect(wrong == 0, text(wrong, " of ", m * n, " values outside the bound"));
}

// Scales of one make all sums exact, so y is known to the bit; rounded to float once.
void check_exact(const cuda::Kernel& kernel, int64_t m, int64_t n, int64_t k, int64_t rank, Type type,
                 Activation activation = Activation::none) {
  BranchCase c(m, n, k, rank, type, Side::exact);
  for (size_t i = 0; i < c.integers.scale.size(); ++i) c.integers.scale[i] = 0x1p-3f;
  for (size_t i = 0; i < c.integers.weight_scale.size(); ++i) {
    c.integers.weight_scale[i] = 0x1p-2f;
    c.integers.bias[i] = static_cast<float>(i % 37) * 0.25f - 4;
  }
  begin(text("cuda kernel=", kernel.name, " branch ", c.name(), " activation=", static_cast<int>(activation)));
  Guarded<float> y(size(m * n));
  y.fill(emulate::kPoison);
  cuda::Problem problem = c.problem(y.data(), Type::float32);
  problem.bias = c.integers.bias.data();
  problem.activation = activation;
  cuda::linear(problem, &kernel);
  expect(y.intact(), "a store outside of y");
  int64_t wrong = 0;
  for (int64_t row = 0; row < m; ++row)
    for (int64_t channel = 0; channel < n; ++channel) {
      double sum, magnitude;
      c.side(row, channel, sum, magnitude);
      const double total = static_cast<double>(c.scaled(row, channel)) + sum;
      const float b = c.integers.bias[size(channel)];
      const float expected = activate(activation, Scalar{static_cast<float>(total) + b}).value;
      wrong += std::memcmp(&y[size(row * n + channel)], &expected, 4) != 0;
    }
  expect(wrong == 0, text(wrong, " of ", m * n, " values differ"));
}

// A branch of zeros leaves the bits of the layer alone.
void check_zero(const cuda::Kernel& kernel, int64_t n, Type y_type, Activation activation) {
  BranchCase c(9, n, 70, 40, y_type == Type::float16 ? Type::float16 : Type::bfloat16, Side::zero);
  begin(text("cuda kernel=", kernel.name, " branch of zeros, y type=", static_cast<int>(y_type),
             " activation=", static_cast<int>(activation)));
  const size_t bytes = size(9 * n) * size_of(y_type);
  Guarded<uint8_t> with(bytes), without(bytes);
  with.fill(emulate::kPoison);
  cuda::Problem problem = c.problem(with.data(), y_type);
  problem.activation = activation;
  problem.bias = c.integers.bias.data();
  cuda::linear(problem, &kernel);
  problem.y = without.data();
  problem.branch = {};
  cuda::linear(problem, &kernel);
  expect(std::equal(with.data(), with.data() + bytes, without.data()), "y differs from that of the integers alone");
}

void check_schedules(const cuda::Kernel& kernel, Type type) {
  BranchCase c(2 * kernel.bm + 3, 2 * kernel.bn + 5, kernel.bk * (kernel.stages - 1) + 3, 100, type, Side::normal);
  const auto with = [&](emulate::Order threads, emulate::Landing tiles, int multiprocessors) {
    emulate::options.threads = threads;
    emulate::options.tiles = tiles;
    emulate::options.multiprocessors = multiprocessors;
    emulate::options.reversed_blocks = threads == emulate::Order::descending;
    check_bound(kernel, c, type, true);
    emulate::options = {};
  };
  with(emulate::Order::descending, emulate::Landing::late, 4);
  if (kernel.arch == 90) with(emulate::Order::random, emulate::Landing::early, 2);
}

void check_kernel(const cuda::Kernel& kernel) {
  for (const int64_t rank : {1, 16, 17, 32, 33, 64, 65, 128})
    check_exact(kernel, 7, 20, 65, rank, rank % 2 == 0 ? Type::bfloat16 : Type::float16);
  for (const int64_t m : {kernel.bm - 1, kernel.bm + 1}) check_exact(kernel, m, 19, 37, 24, Type::float16);
  for (const int64_t n : {kernel.bn - 1, kernel.bn, kernel.bn + 4}) check_exact(kernel, 3, n, 130, 80, Type::bfloat16);
  for (const int64_t k : {1, kernel.bk, kernel.bk * (kernel.stages + 1) + 5})
    check_exact(kernel, 5, 44, k, 72, k % 2 == 0 ? Type::float16 : Type::bfloat16);
  for (const Activation activation : {Activation::relu, Activation::gelu, Activation::gelu_tanh, Activation::silu,
                                      Activation::quick_gelu, Activation::relu6, Activation::hardswish})
    check_exact(kernel, 5, 44, 65, 40, Type::bfloat16, activation);
  for (const Type type : {Type::bfloat16, Type::float16})
    for (const Type y_type : {Type::float32, type}) {
      BranchCase c(kernel.bm + 1, 30, 200, 90, type, Side::normal), odd(3, 31, 64, 32, type, Side::normal);
      check_bound(kernel, c, y_type, true);
      check_bound(kernel, odd, y_type, false);
    }
  for (const Type y_type : {Type::float32, Type::bfloat16, Type::float16})
    check_zero(kernel, 44, y_type, Activation::none);
  check_zero(kernel, 19, Type::bfloat16, Activation::gelu);
  for (const Type type : {Type::bfloat16, Type::float16}) check_schedules(kernel, type);
}

void test_refused() {
  BranchCase c(3, 5, 7, 20, Type::bfloat16, Side::exact);
  std::vector<float> y(15);
  const auto refused = [&](const char* what, auto change) {
    cuda::Problem p = c.problem(y.data(), Type::float32);
    change(p);
    refuses(text("cuda branch: ", what), [&] { cuda::linear(p); });
  };
  refused("rank 0", [](auto& p) { p.branch.rank = 0; });
  refused("a rank beyond what is stored", [](auto& p) { p.branch.rank = 65; });
  refused("rows that are not padded", [](auto& p) { p.branch.rank_pad = 72; });
  refused("t of float32", [](auto& p) { p.branch.type = Type::float32; });
  refused("t that is not aligned", [](auto& p) { p.branch.t = static_cast<const uint16_t*>(p.branch.t) + 1; });
  refused("up that is not aligned", [](auto& p) { p.branch.up = static_cast<const uint16_t*>(p.branch.up) + 1; });
  refused("no up", [](auto& p) { p.branch.up = nullptr; });
  refused("sums that are not scaled", [](auto& p) { p.y_type = Type::int32; });
}

}  // namespace

void test_cuda_int8_branch() {
  test_refused();
  int count = 0;
  const cuda::Kernel* kernels = cuda::kernels(&count);
  for (int i = 0; i < count; ++i) check_kernel(kernels[i]);
}

}  // namespace native
