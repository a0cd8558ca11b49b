// Weight-only products: how each kernel makes floats of integers, and the ops end to end against double within the
// bound of gemm.h, on exact integers, and from each type; packed weights back, any number of threads, what is refused.
#include "weight_only/gemm.h"

#include <cfloat>
#include <climits>
#include <cmath>
#include <cstdio>

#include "cases.h"
#include "common/activation.h"
#include "int4_weight.h"
#include "sparse_weight.h"
#include "weight_only/kernel_list.h"
#include "weight_only/pack.h"

namespace native {
namespace {

using namespace pycompress;
using namespace pycompress::weight_only;

// --- the kernels, each alone
// ------------------------------------------------------------------------------------------

// Any zero is as good as another.
bool equal(const Guarded<float>& a, const Guarded<float>& b) {
  return std::equal(a.data(), a.data() + a.size(), b.data());
}

void run_int8(const Kernel& kernel, int positions) {
  begin(text("weight-only kernel=", kernel.name, " int8 positions=", positions));
  const Edge edge = cases % 2 ? Edge::begin : Edge::end;
  Guarded<int8_t> panel(area(positions, kPanel), edge);
  Guarded<float> found(panel.size(), edge), expected(panel.size());
  for (size_t i = 0; i < panel.size(); ++i) {
    panel[i] = static_cast<int8_t>(static_cast<int>(i % 255) - 127);
    expected[i] = static_cast<float>(panel[i]);
  }
  kernel.expand_int8(panel.data(), positions, found.data());
  expect(equal(found, expected) && found.intact(), "floats");
}

void run_int4(const Kernel& kernel, int units, int group_units, bool symmetric) {
  begin(text("weight-only kernel=", kernel.name, " int4 units=", units, " group_units=", group_units,
             " symmetric=", symmetric));
  std::mt19937 random(static_cast<unsigned>(cases));
  const Edge edge = cases % 2 ? Edge::begin : Edge::end;
  const int groups = (units + group_units - 1) / group_units;
  Guarded<uint8_t> nibbles(area(units, int4::kUnitBytes), edge), zero(symmetric ? 0 : area(groups, kPanel / 2), edge);
  Guarded<uint16_t> scale(area(groups, kPanel), edge);
  for (size_t i = 0; i < nibbles.size(); ++i) nibbles[i] = static_cast<uint8_t>(random());
  for (size_t i = 0; i < zero.size(); ++i) zero[i] = static_cast<uint8_t>(random());
  // From the least subnormal one up to where 15 times the largest is still finite.
  for (size_t i = 0; i < scale.size(); ++i) scale[i] = static_cast<uint16_t>(random() % 0x7d80);
  Guarded<float> found(area(units * int4::kUnit, kPanel), edge), expected(found.size());
  for (int i = 0; i < units * int4::kUnit; ++i)
    for (int n = 0; n < kPanel; ++n) {
      const int unit = i / int4::kUnit, group = unit / group_units, at = i % int4::kUnit;
      const uint8_t byte = nibbles[area(unit, int4::kUnitBytes) + static_cast<size_t>(at / 8 * 64 + n * 4 + at % 4)];
      const int value = at % 8 >= 4 ? byte >> 4 : byte & 15;
      int zero_point = 8;
      if (!symmetric) {
        const uint8_t both = zero[area(group, kPanel / 2) + static_cast<size_t>(n % 8)];
        zero_point = n >= 8 ? both >> 4 : both & 15;
      }
      const double exact = double{float_of_bfloat16(scale[area(group, kPanel) + static_cast<size_t>(n)])};
      expected[area(i, kPanel) + static_cast<size_t>(n)] = static_cast<float>((value - zero_point) * exact);
    }
  kernel.expand_int4({nibbles.data(), scale.data(), symmetric ? nullptr : zero.data(), units, group_units, false},
                     found.data());
  expect(equal(found, expected) && found.intact(), "floats");
}

void run_kernel(const Kernel& kernel) {
  for (const int positions : {1, 2, 3, 31, 255, 256}) run_int8(kernel, positions);
  for (const int units : {1, 2, 3, 4, 5, 7, 8})
    for (const int group_units : {1, 2, 4})
      for (const bool symmetric : {false, true}) run_int4(kernel, units, group_units, symmetric);
}

// --- weights of either kind
// -------------------------------------------------------------------------------------------

struct Plan {
  int bits, group;  // 8, or 4 in groups
  bool symmetric;
  std::string name() const { return text("weight-only bits=", bits, " group=", group, " symmetric=", symmetric); }
};

// Of int8 weights: values, and one scale a channel; of int4 weights the scales of the groups.
struct Layer {
  Plan plan;
  int n, k;
  Guarded<int8_t> values;
  Guarded<float> scale, bias;
  Int4Weight nibbles;
  std::vector<uint8_t> packed;

  Layer(const Plan& p, int channels, int positions, bool is_integer, Edge edge, std::mt19937& random)
      : plan(p),
        n(channels),
        k(positions),
        values(p.bits == 8 ? area(n, k) : 0, edge),
        scale(p.bits == 8 ? static_cast<size_t>(n) : 0, edge),
        bias(static_cast<size_t>(n), edge),
        nibbles(p.bits == 8 ? 1 : n, p.bits == 8 ? 1 : k, p.group, p.symmetric, edge) {
    for (size_t i = 0; i < bias.size(); ++i) bias[i] = std::normal_distribution<float>()(random);
    for (size_t i = 0; i < scale.size(); ++i)
      scale[i] = is_integer ? 1.0f : 1e-3f * static_cast<float>(1 + random() % 7);
    for (size_t i = 0; i < values.size(); ++i) values[i] = static_cast<int8_t>(static_cast<int>(random() % 255) - 127);
    if (p.bits == 4) {
      nibbles.fill(static_cast<Nibbles>(cases % kNibbles), random);
      if (!is_integer) nibbles.fill_scales(random);
    }
    packed = p.bits == 8 ? weight_only::pack(values.data(), n, k) : nibbles.packed(16);
  }
  // Weight and what multiplies the sum of a channel.
  double weight(int row, int i) const {
    if (plan.bits == 8) return double{static_cast<float>(values[area(row, k) + static_cast<size_t>(i)])};
    return nibbles.centred(row, i) * double{nibbles.scale_of(row, i / nibbles.group)};
  }
  double factor(int row) const { return plan.bits == 8 ? double{scale[static_cast<size_t>(row)]} : 1.0; }

  Problem problem(const Input& x, int m, const Guarded<uint8_t>& buffer) const {
    Problem problem{};
    problem.x = x.data();
    problem.x_type = x.type();
    problem.m = m, problem.k = k, problem.ldx = x.ldx(), problem.n = n;
    problem.packed = buffer.data();
    problem.packed_bytes = static_cast<int64_t>(buffer.size());
    problem.weight_scale = plan.bits == 8 ? scale.data() : nullptr;
    problem.threads = 1;
    return problem;
  }

  void check_unpack(const Guarded<uint8_t>& buffer, Edge edge) const {
    const auto bytes = static_cast<int64_t>(buffer.size());
    if (plan.bits == 8) {
      Guarded<int8_t> found(values.size(), edge);
      weight_only::unpack(buffer.data(), bytes, found.data());
      return expect(std::memcmp(found.data(), values.data(), found.size()) == 0 && found.intact(), "unpack");
    }
    Guarded<uint8_t> found(nibbles.values.size(), edge);
    int4::unpack(buffer.data(), bytes, {found.data(), nullptr, nullptr});
    expect(std::memcmp(found.data(), nibbles.values.data(), found.size()) == 0 && found.intact(), "unpack");
  }
};

struct Result : Guarded<uint8_t> {
  Result(Problem problem, Edge edge, size_t gap)
      : Guarded(static_cast<size_t>(problem.m * problem.n) * size_of(problem.y_type), edge,
                gap * size_of(problem.y_type)) {
    fill(0x55);
    problem.y = data();
    weight_only::linear(problem);
    expect(intact(), "writes beside the results");
  }
  const float* floats() const { return reinterpret_cast<const float*>(data()); }
};

// --- end to end
// -------------------------------------------------------------------------------------------------------

struct Case {
  Plan plan;
  int m, n, k, ldx;
  Values values;
  Type x_type, y_type;
  Activation activation;
  bool has_bias;
  int number;  // decides alignment and every value

  std::string name() const {
    return text(plan.name(), " m=", m, " n=", n, " k=", k, " ldx=", ldx, " values=", name_of(values),
                " x_type=", static_cast<int>(x_type), " y_type=", static_cast<int>(y_type),
                " activation=", static_cast<int>(activation), " bias=", has_bias, " case=", number);
  }
  Edge edge() const { return number % 2 ? Edge::begin : Edge::end; }
  size_t gap() const { return static_cast<size_t>(number / 2 % 3); }
};

// What is not given takes turns, so that a run of cases meets every combination of two.
Case case_of(const Plan& plan, int m, int n, int k) {
  const int turn = cases;
  return {plan,
          m,
          n,
          k,
          k + turn % 4,
          static_cast<Values>(turn / 3 % kValues),
          static_cast<Type>(turn / 2 % 3),
          static_cast<Type>(turn / 5 % 3),
          static_cast<Activation>(turn % 5),
          turn / 4 % 3 != 0,
          turn};
}

// |y - exact| <= gamma(k + 4) sum |x w| + eps (|y| + |bias|), for float32 results without an activation; and what each
// step may lose where it is subnormal.
bool within_bound(const Layer& layer, const Input& x, int m, const float* bias, const float* y) {
  const double gamma = gamma_of(layer.k + 4), roundings = layer.k + 4;
  std::vector<double> weights(static_cast<size_t>(layer.k)), row_of_x(area(m, layer.k));
  for (int row = 0; row < m; ++row)
    for (int i = 0; i < layer.k; ++i) row_of_x[area(row, layer.k) + static_cast<size_t>(i)] = double{x.at(row, i)};
  bool within = true;
  for (int n = 0; n < layer.n; ++n) {
    for (int i = 0; i < layer.k; ++i) weights[static_cast<size_t>(i)] = layer.weight(n, i);
    for (int row = 0; row < m; ++row) {
      double sum = 0, magnitude = 0;
      for (size_t i = 0; i < weights.size(); ++i) {
        const double product = weights[i] * row_of_x[area(row, layer.k) + i];  // exact: at most 24 + 12 bits
        sum += product, magnitude += std::fabs(product);
      }
      const double b = bias == nullptr ? 0 : double{bias[n]}, found = double{y[row * layer.n + n]};
      const double error = std::fabs(found - (sum * layer.factor(n) + b));
      within = within && error <= gamma * magnitude * layer.factor(n) +
                                      double{FLT_EPSILON} * (std::fabs(found) + std::fabs(b)) +
                                      roundings * double{FLT_TRUE_MIN};
    }
  }
  return within;
}

// The same numbers as float32 give the same sums.
void check_types(const Case& c, Problem problem, const Input& x, const Result& sums) {
  Input floats(Type::float32, c.m, c.k, c.ldx, c.edge(), 0);
  for (int row = 0; row < c.m; ++row)
    for (int i = 0; i < c.k; ++i) floats.set(row, i, x.at(row, i));
  problem.x = floats.data();
  problem.x_type = Type::float32;
  const Result from_floats(problem, c.edge(), c.gap());
  expect(std::memcmp(from_floats.data(), sums.data(), sums.size()) == 0, "x as float32");
}

// The activation and the type, from the sums that linear() itself gave, on any number of threads.
void check_results(const Case& c, Problem problem, const Result& sums) {
  problem.activation = c.activation;
  problem.y_type = c.y_type;
  const size_t count = area(c.m, c.n);
  std::vector<uint8_t> expected(count * size_of(c.y_type));
  for (size_t i = 0; i < count; ++i)
    put_float(expected.data(), c.y_type, static_cast<ptrdiff_t>(i),
              activate(c.activation, Scalar{sums.floats()[i]}).value);
  for (const int threads : {1, 2, 3, 7}) {
    problem.threads = threads;
    const Result y(problem, c.edge(), c.gap());
    expect(same(y.data(), expected.data(), c.y_type, count), text(threads, " threads"));
  }
}

// A value that is not finite reaches all results of its row and no other.
void check_not_finite(const Case& c, Problem problem, Input& x, const Result& sums) {
  constexpr float kBad[] = {NAN, INFINITY, -INFINITY};
  const int bad = c.number % c.m;
  x.set(bad, c.number % c.k, kBad[c.number % 3]);
  const Result y(problem, c.edge(), c.gap());
  bool right = true;
  for (int row = 0; row < c.m; ++row) {
    const float *at = y.floats() + row * c.n, *before = sums.floats() + row * c.n;
    right = right && (row == bad ? std::none_of(at, at + c.n, [](float v) { return std::isfinite(v); })
                                 : std::memcmp(at, before, static_cast<size_t>(c.n) * 4) == 0);
  }
  expect(right, "NaN and Inf");
}

void run(const Case& c) {
  begin(c.name());
  std::mt19937 random(static_cast<unsigned>(c.number));
  const Layer layer(c.plan, c.n, c.k, false, c.edge(), random);
  const PackedBytes packed(layer.packed, c.edge(), c.gap());
  layer.check_unpack(packed, c.edge());
  Input x(c.x_type, c.m, c.k, c.ldx, c.edge(), c.gap());
  x.fill(c.m, c.values, random);
  Problem problem = layer.problem(x, c.m, packed);
  problem.bias = c.has_bias ? layer.bias.data() : nullptr;
  const Result sums(problem, c.edge(), c.gap());
  expect(within_bound(layer, x, c.m, problem.bias, sums.floats()), "the bound");
  check_types(c, problem, x, sums);
  check_results(c, problem, sums);
  if (c.m > 0) check_not_finite(c, problem, x, sums);
}

void run_shapes(const Plan& plan) {
  int turn = plan.bits + plan.group + plan.symmetric;  // each plan begins elsewhere
  constexpr int kNs[] = {1, 15, 16, 17, 35};
  for (const int m : {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 33, 67})
    for (const int k : {1, 31, 32, 33, 63, 64, 65, 127, 128, 129, 255, 256, 257, 1023, 1024, 1025, 2051, 4096})
      run(case_of(plan, m, kNs[++turn % 5], k));
  run(case_of(plan, 577, 17, 128));  // on seven threads the last task has one row, on one thread many
  run(case_of(plan, 9, 300, 290));
  run(case_of(plan, 2, 17, static_cast<int>(kMaxK)));
}

// Small integers and scales of 1: every partial sum is exact, so the order of additions does not matter.
void check_integers(const Plan& plan, int m, int n, int k) {
  begin(text(plan.name(), " integers m=", m, " n=", n, " k=", k));
  std::mt19937 random(static_cast<unsigned>(cases));
  const Layer layer(plan, n, k, true, Edge::end, random);
  const PackedBytes packed(layer.packed, Edge::end);
  Input x(Type::bfloat16, m, k, k, Edge::end, 0);
  for (int row = 0; row < m; ++row)
    for (int i = 0; i < k; ++i) x.set(row, i, static_cast<float>(static_cast<int>(random() % 17) - 8));
  const Result y(layer.problem(x, m, packed), Edge::end, 0);
  bool right = true;
  for (int row = 0; row < m; ++row)
    for (int c = 0; c < n; ++c) {
      int64_t sum = 0;
      for (int i = 0; i < k; ++i) sum += static_cast<int64_t>(x.at(row, i)) * static_cast<int64_t>(layer.weight(c, i));
      right = right && y.floats()[row * n + c] == static_cast<float>(sum);
    }
  expect(right, "sums");
}

// --- what is refused
// --------------------------------------------------------------------------------------------------

void test_pack_refusals() {
  std::vector<int8_t> values(64, 1);
  refuses("weight-only: pack of n = 0", [&] { weight_only::pack(values.data(), 0, 8); });
  refuses("weight-only: pack of n over the largest",
          [&] { weight_only::pack(values.data(), int64_t{INT_MAX} + 1, 1); });
  refuses("weight-only: pack of k = 0", [&] { weight_only::pack(values.data(), 8, 0); });
  refuses("weight-only: pack of k over the largest", [&] { weight_only::pack(values.data(), 1, kMaxK + 1); });
  values[63] = -128;
  refuses("weight-only: pack of a weight of -128", [&] { weight_only::pack(values.data(), 8, 8); });
}

void test_refusals(const Plan& plan) {
  constexpr int kM = 64;  // enough for several threads
  std::mt19937 random(1);
  const Layer layer(plan, 20, 70, false, Edge::end, random);
  Input x(Type::float32, kM, 70, 70, Edge::end, 0);
  x.fill(kM, Values::gaussian, random);
  std::vector<float> y(area(kM, 20), 7.0f);
  std::vector<int8_t> values(area(20, 70));
  const auto refused = [&](const std::string& what, const std::vector<uint8_t>& bytes, auto&& change) {
    const PackedBytes packed(bytes, Edge::end);
    Problem problem = layer.problem(x, kM, packed);
    problem.y = y.data();
    change(problem);
    for (const int threads : {1, 2}) {
      problem.threads = threads;
      refuses(text(plan.name(), ": ", what, ", ", threads, " threads"), [&] { weight_only::linear(problem); });
    }
  };
  const auto damaged = [&](const std::string& what, const std::vector<uint8_t>& bytes) {
    refused("packed, " + what, bytes, [](Problem&) {});
    if (plan.bits != 8) return;
    const PackedBytes packed(bytes, Edge::end);
    refuses(text(plan.name(), ": packed, ", what, ", unpack"),
            [&] { weight_only::unpack(packed.data(), static_cast<int64_t>(packed.size()), values.data()); });
  };
  const std::vector<uint8_t>& whole = layer.packed;
  const size_t header = plan.bits == 8 ? sizeof(weight_only::Header) : sizeof(int4::Header);
  damaged("empty", {});
  damaged("one byte short", {whole.begin(), whole.end() - 1});
  damaged("half a header", {whole.begin(), whole.begin() + static_cast<ptrdiff_t>(header / 2)});
  damaged("a header alone", {whole.begin(), whole.begin() + static_cast<ptrdiff_t>(header)});
  std::vector<uint8_t> changed = whole;
  changed.push_back(0);
  damaged("one byte long", changed);
  for (size_t i = 0; i < header; ++i) {
    changed = whole;
    changed[i] ^= 1;
    damaged(text("byte ", i, " of its header changed"), changed);
  }
  refused("x of another k", whole, [](Problem& p) { p.k = p.ldx = 64; });
  refused("another n", whole, [](Problem& p) { p.n -= 1; });
  refused("int32 x", whole, [](Problem& p) { p.x_type = Type::int32; });
  refused("int32 results", whole, [](Problem& p) { p.y_type = Type::int32; });
  expect(std::all_of(y.begin(), y.end(), [](float v) { return v == 7.0f; }), "y was written to");
}

}  // namespace

void test_weight_only() {
  for_available(weight_only::kernels(), run_kernel);

  constexpr Plan kPlans[] = {{8, 32, true},  {4, 32, true},  {4, 32, false}, {4, 64, true},
                             {4, 64, false}, {4, 128, true}, {4, 128, false}};
  for (const Plan& plan : kPlans) {
    run_shapes(plan);
    for (const int m : {1, 2, 3, 4, 7, 13})
      for (const int n : {1, 16, 17})
        for (const int k : {1, 33, 129, 256, 257, 1025}) check_integers(plan, m, n, k);
    test_refusals(plan);
  }
  test_pack_refusals();
}

}  // namespace native
