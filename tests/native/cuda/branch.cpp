// The side branch's own source on the host (csrc/low_rank/branch.h): the quantized rows are those of quantize(), to the
// bit; t is exact where sums are, and within the bound against float64; the layer end to end.
#include "low_rank/branch.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <random>
#include <string>
#include <vector>

#include "../report.h"
#include "branch.h"
#include "common/activation.h"
#include "halves.h"

namespace native {
namespace {

namespace cuda8 = pycompress::int8::cuda;
namespace branch = pycompress::low_rank::branch;
using pycompress::low_rank::cuda::Factors;

// A factor [rows, columns] of bfloat16 values: from -1 to 1, integers where `exact`.
struct BranchFactor {
  int64_t rows, columns;
  std::vector<uint16_t> values;

  BranchFactor(int64_t rows_, int64_t columns_, bool exact)
      : rows(rows_), columns(columns_), values(size(rows * columns)) {
    std::mt19937 random(static_cast<uint32_t>(rows * 7919 + columns));
    std::uniform_real_distribution<double> uniform(-1, 1);
    for (uint16_t& value : values)
      value = half_bits(exact ? static_cast<int>(random() % 3) - 1 : uniform(random), Type::bfloat16);
  }
  double at(int64_t row, int64_t column) const {
    return static_cast<double>(bfloat_value(values[size(row * columns + column)]));
  }
  void write(uint16_t* to, int64_t stride) const {
    for (int64_t row = 0; row < rows; ++row) std::copy_n(values.data() + row * columns, columns, to + row * stride);
  }
};

struct BranchCase {
  Factors shape;
  BranchFactor down, up;
  HalfRows x;
  int activation_bits;
  std::vector<int8_t> weight;
  Guarded<float> weight_scale;
  std::vector<float> bias;
  Guarded<uint8_t> residual;
  Guarded<uint16_t> factors;

  BranchCase(int64_t n, int64_t k, int64_t rank, Type type, int64_t m, int64_t gap, bool exact, int bits)
      : shape{n, k, rank},
        down(rank, k, exact),
        up(n, rank, exact),
        x(type, m, k, gap, exact),
        activation_bits(bits),
        weight_scale(size(n)),
        residual(size(cuda8::PackedShape{n, k}.bytes()), Edge::begin),
        factors(size(shape.size()), Edge::begin) {
    std::mt19937 random(static_cast<uint32_t>(n * 31 + k));
    for (int64_t i = 0; i < n * k; ++i) weight.push_back(static_cast<int8_t>(static_cast<int>(random() % 255) - 127));
    for (int64_t i = 0; i < n; ++i) {
      weight_scale[size(i)] = static_cast<float>(1 + random() % 100) * 1e-4f;
      bias.push_back(static_cast<float>(i % 37 - 18) * 0.25f);
    }
    int32_t refused = 0;
    cuda8::pack(weight.data(), n, k, residual.data(), &refused, nullptr);
    factors.fill(0);
    down.write(factors.data(), shape.k_pad());
    up.write(factors.data() + shape.up_begin(), shape.rank_pad());
  }

  std::string name() const {
    return text("branch type=", static_cast<int>(x.type), " m=", x.m, " n=", shape.n, " k=", shape.k,
                " rank=", shape.rank, " ldx=", x.ldx);
  }

  branch::Problem problem(uint8_t* workspace, void* y, Activation activation) const {
    return {x.data.data(),  x.type,          x.m,
            x.ldx,          shape,           activation_bits,
            factors.data(), residual.data(), weight_scale.data(),
            bias.data(),    activation,      y,
            workspace,      nullptr};
  }

  // x down^T of a row, and the sums of magnitudes.
  void between(int64_t row, std::vector<double>& t, std::vector<double>& magnitude) const {
    t.assign(size(shape.rank), 0), magnitude.assign(size(shape.rank), 0);
    for (int64_t r = 0; r < shape.rank; ++r)
      for (int64_t k = 0; k < shape.k; ++k) {
        const double product = x.at(row, k) * down.at(r, k);
        t[size(r)] += product;
        magnitude[size(r)] += std::fabs(product);
      }
  }
  double bound() const {  // of t, beside its rounding
    return 0x1p-23 * static_cast<double>(17 * (2 * branch::steps(shape.k) + 1) + branch::warps(shape.k) + 8);
  }
};

// The workspace of a launch, on guarded memory, poisoned.
struct Workspace {
  int64_t m;
  Factors shape;
  Guarded<uint8_t> bytes;
  branch::Between of;

  explicit Workspace(const BranchCase& c)
      : m(c.x.m),
        shape(c.shape),
        bytes(size(branch::workspace_bytes(c.shape, c.x.m)), Edge::begin),
        of(branch::between(c.shape, c.x.m, bytes.data())) {
    bytes.fill(emulate::kPoison);
  }
};

void check_rows(const BranchCase& c, const Workspace& w) {
  const int64_t m = c.x.m, k_pad = c.shape.k_pad();
  Guarded<int8_t> s(size(m * k_pad));
  Guarded<float> scale(size(m));
  Guarded<int32_t> zero_point(size(m));
  cuda8::Input input{};
  input.x = c.x.data.data(), input.type = c.x.type, input.m = m, input.k = c.shape.k, input.ldx = c.x.ldx;
  input.activation_bits = c.activation_bits;
  cuda8::quantize(input, {s.data(), scale.data(), zero_point.data()}, nullptr);
  expect(std::equal(s.data(), s.data() + s.size(), w.of.rows.s), "rows differ from those of quantize()");
  expect(std::memcmp(scale.data(), w.of.rows.scale, size(m * 4)) == 0, "scales differ from those of quantize()");
  expect(std::equal(zero_point.data(), zero_point.data() + m, w.of.rows.zero_point), "zero points differ");
}

// t to the bit where c is exact, else within the bound.
void check_between(const BranchCase& c, const Workspace& w, bool exact) {
  const double u = unit_roundoff(c.x.type), v = c.bound();
  std::vector<double> t, magnitude;
  int64_t wrong = 0, behind = 0;
  for (int64_t row = 0; row < c.x.m; ++row) {
    c.between(row, t, magnitude);
    const uint16_t* found = w.of.t + row * c.shape.rank_pad();
    for (int64_t r = 0; r < c.shape.rank; ++r) {
      const double expected = t[size(r)];
      if (exact)
        wrong += found[r] != half_bits(expected, c.x.type);
      else
        wrong += !(std::fabs(static_cast<double>(half_value(found[r], c.x.type)) - expected) <=
                   v * magnitude[size(r)] * (1 + u) + u * std::fabs(expected));
    }
    for (int64_t r = c.shape.rank; r < c.shape.rank_pad(); ++r) behind += found[r] != 0;
  }
  expect(wrong == 0, text(wrong, " of t ", exact ? "differ" : "are outside the bound"));
  expect(behind == 0, text(behind, " of t behind the rank are not 0"));
}

void check_quantize_down(const BranchCase& c, bool exact) {
  begin(text(c.name(), exact ? "" : " against float64"));
  Workspace w(c);
  branch::quantize_down(c.problem(w.bytes.data(), nullptr, Activation::none));
  check_rows(c, w);
  check_between(c, w, exact);
  expect(w.bytes.intact(), "a store outside");
}

void check_exact(Type type, int64_t m, int64_t k, int64_t rank, int64_t gap) {
  check_quantize_down({5, k, rank, type, m, gap, true, k % 2 == 0 ? 8 : 7}, true);
}

// The same bits whatever the order of threads and blocks, and whatever other rows there are.
void check_order(Type type, int64_t k, int64_t rank) {
  const BranchCase c(5, k, rank, type, 35, 0, false, 8);
  check_quantize_down(c, false);
  const auto run = [&](int64_t rows) {
    Workspace w(c);
    branch::Problem problem = c.problem(w.bytes.data(), nullptr, Activation::none);
    problem.m = rows;
    branch::quantize_down(problem);
    const uint16_t* t = branch::between(c.shape, rows, problem.workspace).t;
    return std::vector<uint16_t>(t, t + rows * c.shape.rank_pad());
  };
  const std::vector<uint16_t> expected = run(35), few = run(3);
  expect(std::equal(few.begin(), few.end(), expected.begin()), "other bits beside other rows");
  for (const emulate::Order order : {emulate::Order::descending, emulate::Order::random}) {
    emulate::options.threads = order;
    emulate::options.reversed_blocks = order == emulate::Order::descending;
    expect(run(35) == expected, "other bits in another order of threads and blocks");
  }
  emulate::options = {};
  emulate::options.multiprocessors = 132;  // the ranks are shared among blocks
  expect(run(35) == expected, "other bits where blocks share the ranks");
  emulate::options = {};
}

void check_type(Type type) {
  constexpr int64_t kHeld = branch::kHeld;
  for (const int64_t m : {1, 15, 16, 17, 35}) check_exact(type, m, 192, 32, m % 2 * 8);
  for (const int64_t k : {1, 7, 8, 31, 32, 33, 63, 64, 65, 128, 255, 1024, 1032}) check_exact(type, 3, k, 20, k % 3);
  for (const int64_t k : {kHeld - 8, kHeld, kHeld + 1, kHeld + 8}) check_exact(type, 2, k, 3, 0);
  for (const int64_t rank : {1, 16, 31, 33, 64, 65, 97, 128}) {
    check_exact(type, 18, 96, rank, 0);                             // held
    check_exact(type, 50, 100, rank, 0);                            // read again, all ranks at once
    if (rank % 32 != 0) check_exact(type, 2, kHeld + 72, rank, 0);  // and shared
  }
  check_order(type, 520, 70);
  check_order(type, 517, 128);
}

// Rows of extremes: those with NaN and Inf are told, the others left as they are.
void check_not_finite(Type type, int64_t gap) {
  BranchCase c(5, 104, 20, type, 20, gap, false, 8);
  c.x.data[size(c.x.ldx + 99)] = half_bits(INFINITY, type);
  c.x.data[size(2 * c.x.ldx)] = half_bits(NAN, type);
  std::fill_n(&c.x.data[size(3 * c.x.ldx)], 104, uint16_t{0x8000});
  std::fill_n(&c.x.data[size(4 * c.x.ldx)], 104, uint16_t{1});
  std::fill_n(&c.x.data[size(5 * c.x.ldx)], 104, half_bits(-60000, type));
  begin(text(c.name(), " with rows of extremes"));
  Workspace w(c);
  branch::quantize_down(c.problem(w.bytes.data(), nullptr, Activation::none));
  check_rows(c, w);
  for (const int64_t row : {0, 1, 2, 3})
    for (int64_t r = 0; r < 20; ++r) {
      const float t = half_value(w.of.t[row * c.shape.rank_pad() + r], type);
      expect(std::isfinite(t) == (row == 0 || row == 3) && (row != 3 || t == 0), text("t of row ", row));
    }
}

// y of a kernel of the int8 GEMM, for any shape of its tile: within the bounds of branch.h and int8/cuda.h.
void check_linear(const cuda8::Kernel& kernel, Type type, int64_t rank) {
  // The ring goes round for float16.
  const int64_t k = type == Type::float16 ? kernel.bk * (kernel.stages + 1) + 8 : 136;
  const BranchCase c(kernel.bn + 3, k, rank, type, kernel.bm + 1, 0, false, 8);
  begin(text(c.name(), " kernel=", kernel.name));
  const int64_t m = c.x.m, n = c.shape.n;
  Workspace w(c);
  Guarded<uint16_t> y(size(m * n));
  y.fill(emulate::kPoison);
  branch::linear(c.problem(w.bytes.data(), y.data(), Activation::none), &kernel);
  const double u = unit_roundoff(type), first = c.bound();
  const double second = 0x1p-23 * 17 * static_cast<double>(c.shape.rank_pad() / 16 + 1);
  std::vector<double> t, magnitude;
  int64_t wrong = 0;
  for (int64_t row = 0; row < m; ++row) {
    c.between(row, t, magnitude);
    const int8_t* s = w.of.rows.s + row * c.shape.k_pad();
    for (int64_t j = 0; j < n; ++j) {
      int64_t sum = 0;
      for (int64_t i = 0; i < c.shape.k; ++i)
        sum += (int64_t{s[i]} + 128 - w.of.rows.zero_point[row]) * c.weight[size(j * c.shape.k + i)];
      const float integers = static_cast<float>(sum) * w.of.rows.scale[row] * c.weight_scale[size(j)];
      const auto bias = static_cast<double>(c.bias[size(j)]), scaled = static_cast<double>(integers);
      double expected = scaled, bound = second * std::fabs(scaled);
      for (int64_t r = 0; r < rank; ++r) {
        const double up = std::fabs(c.up.at(j, r)), d = first * magnitude[size(r)] + u * std::fabs(t[size(r)]) * 1.01;
        expected += t[size(r)] * c.up.at(j, r);
        bound += d * up + second * (std::fabs(t[size(r)]) + d) * up;
      }
      expected += bias;
      bound += (u + 0x1p-23) * (std::fabs(expected) + bound + std::fabs(bias));
      wrong += !(std::fabs(static_cast<double>(half_value(y[size(row * n + j)], type)) - expected) <= bound);
    }
  }
  expect(wrong == 0, text(wrong, " of ", m * n, " values outside the bound"));
  expect(y.intact() && w.bytes.intact(), "a store outside");
}

void test_branch_layout() {
  begin("branch: layout");
  for (const int64_t k : {int64_t{1}, int64_t{64}, int64_t{65}, int64_t{129}, int64_t{4000}, branch::kHeld - 63,
                          branch::kHeld, branch::kHeld + 1, pycompress::kMaxK}) {
    const Factors shape{300, k, 70};
    const int64_t across = branch::warps(k) * branch::kStep;
    expect(shape.k_pad() == cuda8::PackedShape{300, k}.k_pad(), text("k_pad of k ", k));
    expect(branch::steps(k) * across >= shape.k_pad() && (branch::steps(k) - 1) * across < shape.k_pad(),
           text("steps of k ", k));
    expect(branch::steps(k) <= branch::kHeldSteps || k > branch::kHeld, text("too many steps of k ", k));
    for (const int64_t m : {1, 3, 64}) {
      const branch::Between of = branch::between(shape, m, nullptr);
      expect(reinterpret_cast<uintptr_t>(of.t) % branch::kAlign == 0, text("alignment of t at m ", m));
      expect(reinterpret_cast<int64_t>(of.rows.zero_point + m) == branch::workspace_bytes(shape, m),
             text("workspace at m ", m));
    }
  }
}

void test_branch_refused() {
  begin("branch: what is refused");
  const BranchCase c(20, 70, 16, Type::bfloat16, 1, 0, true, 8);
  Workspace w(c);
  const auto with = [&](auto&& change) {
    branch::Problem problem = c.problem(w.bytes.data(), nullptr, Activation::none);
    change(problem);
    branch::quantize_down(problem);
  };
  refuses("branch: float32", [&] { with([](auto& p) { p.type = Type::float32; }); });
  refuses("branch: rank 0", [&] { with([](auto& p) { p.shape.rank = 0; }); });
  refuses("branch: rank 129", [&] { with([](auto& p) { p.shape.rank = 129; }); });
  refuses("branch: 9 bits", [&] { with([](auto& p) { p.activation_bits = 9; }); });
  refuses("branch: k 65537", [&] { with([](auto& p) { p.shape.k = 65537; }); });
  begin("branch: no rows");
  with([](auto& p) { p.m = 0, p.workspace = nullptr; });
}

}  // namespace

void test_cuda_side_branch() {
  test_branch_layout();
  test_branch_refused();
  for (const Type type : {Type::bfloat16, Type::float16}) {
    check_type(type);
    check_not_finite(type, 0);
    check_not_finite(type, 1);
  }
  int count = 0;
  const cuda8::Kernel* kernels = cuda8::kernels(&count);
  for (int i = 0; i < count; ++i) {
    check_linear(kernels[i], Type::bfloat16, 20);
    check_linear(kernels[i], Type::float16, 70);
  }
}

}  // namespace native
