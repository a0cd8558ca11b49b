// low_rank_linear end to end, with each residual, against plain chains, the ops that it is made of, and double; packed
// weights back, any number of threads, what it refuses.
#include <memory>

#include "cases.h"
#include "dense/kernel_list.h"
#include "int8/kernel_list.h"
#include "int8/pack.h"
#include "low_rank/gemm.h"
#include "low_rank/pack.h"
#include "sparse_weight.h"

namespace native {
namespace {

using namespace pycompress;
using namespace pycompress::low_rank;

enum class Rest { none, dense, int8, rows, panels, quads, quads4, windows, chains };
const char* const kRests[] = {"none", "dense", "int8", "rows", "panels", "quads", "quads4", "windows", "chains"};

bool is_sparse(Rest rest) { return rest >= Rest::rows; }
Format format_of(Rest rest) { return static_cast<Format>(static_cast<int>(rest) - static_cast<int>(Rest::rows)); }
bool has_ints(Rest rest) { return rest == Rest::int8 || (is_sparse(rest) && !sparse::is_float(format_of(rest))); }

// What the factors and the residual are; bits of activations where a part is int8, else 0.
struct Plan {
  int bits, activation_bits;
  Rest rest;
  int rest_bits;
  bool is_float() const { return bits == 32; }
  std::string name() const {
    return text("bits=", bits, " activation_bits=", activation_bits, " residual=", kRests[static_cast<int>(rest)],
                " its activation_bits=", rest_bits);
  }
};

struct Case {
  Plan plan;
  int m, n, k, rank, ldx;
  Values values;
  Type x_type, y_type;
  Activation activation;
  bool has_bias;
  int number;  // decides alignment and every value

  std::string name() const {
    return text(plan.name(), " m=", m, " n=", n, " k=", k, " rank=", rank, " ldx=", ldx, " values=", name_of(values),
                " x_type=", static_cast<int>(x_type), " y_type=", static_cast<int>(y_type),
                " activation=", static_cast<int>(activation), " bias=", has_bias, " case=", number);
  }
  Edge edge() const { return number % 2 ? Edge::begin : Edge::end; }
  size_t gap() const { return static_cast<size_t>(number / 2 % 3); }
  bool is_few() const { return m <= kFewRows; }
};

struct Matrix {  // [n, k], float or int8
  int n, k;
  std::vector<float> floats;
  std::vector<int8_t> ints;
  std::vector<float> scale;  // [n] for int8

  Matrix(int rows, int columns, bool is_float, Values values, std::mt19937& random) : n(rows), k(columns) {
    std::normal_distribution<float> normal;
    for (size_t i = 0; i < area(n, k); ++i)
      if (is_float)
        floats.push_back(values == Values::extreme ? std::ldexp(normal(random), static_cast<int>(random() % 20) - 10)
                                                   : normal(random));
      else
        ints.push_back(static_cast<int8_t>(int8_value(values, i, random)));
    for (int row = 0; row < n && !is_float; ++row) scale.push_back(1e-3f * static_cast<float>(1 + random() % 7));
  }
  const void* data() const { return ints.empty() ? static_cast<const void*>(floats.data()) : ints.data(); }
  const float* scales() const { return scale.empty() ? nullptr : scale.data(); }
};

struct Layer {
  Matrix down, up, rest;  // the residual dense or int8 [n, k]; sparse: its values are in `sparse`
  Weight sparse{};
  std::vector<uint8_t> packed_rest;
  std::vector<float> bias, rest_scale;
  std::vector<uint8_t> packed;

  Layer(const Case& c, std::mt19937& random)
      : down(c.rank, c.k, c.plan.is_float(), c.values, random),
        up(c.n, c.rank, c.plan.is_float(), c.values, random),
        rest(c.plan.rest == Rest::dense || c.plan.rest == Rest::int8 ? c.n : 0, c.k, c.plan.rest == Rest::dense,
             c.values, random) {
    if (c.plan.rest == Rest::int8)
      packed_rest = int8::pack(int8::best_kernel(), rest.ints.data(), c.n, c.k, c.plan.rest_bits, 1);
    if (is_sparse(c.plan.rest)) {
      const Format format = format_of(c.plan.rest);
      const Mask mask = format == Format::panels ? Mask{kPanel, 1, 0.3} : Mask{1, 1, c.number % 3 == 0 ? 0.6 : 0.2};
      sparse = make_weight(c.n, c.k, mask, c.values, sparse::is_float(format), random);
      packed_rest = packed_of(format, sparse, c.plan.rest_bits);
    }
    for (int i = 0; i < c.n; ++i) {
      bias.push_back(std::normal_distribution<float>()(random));
      if (has_ints(c.plan.rest)) rest_scale.push_back(1e-3f * static_cast<float>(1 + random() % 7));
    }
    packed = low_rank::pack(weight(c), 1 + c.number % 3);
  }

  Residual kind(Rest rest) const {
    return is_sparse(rest) ? Residual::sparse : static_cast<Residual>(static_cast<int>(rest));
  }
  low_rank::Weight weight(const Case& c) const {
    low_rank::Weight w{};
    w.down = down.data(), w.up = up.data();
    w.n = c.n, w.k = c.k, w.rank = c.rank;
    w.bits = c.plan.bits, w.activation_bits = c.plan.activation_bits;
    w.down_scale = down.scales(), w.up_scale = up.scales();
    w.residual_kind = kind(c.plan.rest);
    if (c.plan.rest == Rest::dense) w.residual = rest.data();
    if (!packed_rest.empty()) w.residual = packed_rest.data();
    w.residual_bytes = static_cast<int64_t>(packed_rest.size());
    w.residual_scale = rest_scale.empty() ? nullptr : rest_scale.data();
    return w;
  }
};

// A packed weight between guard pages, its header aligned as the header's fields need it.
struct Packed : Guarded<uint8_t> {
  Packed(const std::vector<uint8_t>& bytes, Edge edge, size_t gap)
      : Guarded(bytes.size(), edge, gap + (edge == Edge::end ? (8 - bytes.size() % 8) % 8 : 0)) {
    std::copy(bytes.begin(), bytes.end(), data());
  }
};

Problem problem_of(const Case& c, const Layer& layer, const Guarded<uint8_t>& packed, const Input& x) {
  Problem problem{};
  problem.x = x.data();
  problem.x_type = x.type();
  problem.m = c.m, problem.k = c.k, problem.ldx = x.ldx(), problem.n = c.n;
  problem.packed = packed.data();
  problem.packed_bytes = static_cast<int64_t>(packed.size());
  problem.bias = c.has_bias ? layer.bias.data() : nullptr;
  problem.threads = 1;
  return problem;
}

void check_unpack(const Case& c, const Layer& layer, const Guarded<uint8_t>& packed) {
  Guarded<uint8_t> down(area(c.rank, c.k) * (c.plan.is_float() ? 4 : 1), c.edge()),
      up(area(c.n, c.rank) * (c.plan.is_float() ? 4 : 1));
  Guarded<float> down_scale(layer.down.scale.size()), up_scale(layer.up.scale.size()), scale(layer.rest_scale.size());
  const bool is_dense = c.plan.rest == Rest::dense;
  Guarded<uint8_t> rest(is_dense ? area(c.n, c.k) * 4 : layer.packed_rest.size());
  const auto bytes = static_cast<int64_t>(packed.size());
  unpack(packed.data(), bytes, {down.data(), up.data(), down_scale.data(), up_scale.data(), rest.data(), scale.data()});
  unpack(packed.data(), bytes, {});  // nothing is asked for
  const auto is = [](const auto& found, const void* expected) {
    return found.size() == 0 || (std::memcmp(found.data(), expected, found.bytes()) == 0 && found.intact());
  };
  expect(is(down, layer.down.data()) && is(up, layer.up.data()), "unpacked factors");
  expect(is(down_scale, layer.down.scale.data()) && is(up_scale, layer.up.scale.data()) &&
             is(scale, layer.rest_scale.data()),
         "unpacked scales");
  expect(is(rest, is_dense ? layer.rest.data() : layer.packed_rest.data()), "unpacked residual");
}

// --- what the contract says: each part by its own op, or by plain chains
// ------------------------------------------------

// out[m, w.n] = start + a[m, w.k] w^T, one chain of fma each; start: [w.n] with row stride lds, or null.
std::vector<float> chains(const std::vector<float>& a, int m, const Matrix& w, const float* start, int lds) {
  std::vector<float> out(area(m, w.n));
  for (int row = 0; row < m; ++row)
    for (int j = 0; j < w.n; ++j) {
      float sum = start == nullptr ? 0.0f : start[row * lds + j];
      const float *left = a.data() + row * w.k, *right = w.floats.data() + j * w.k;
      for (int i = 0; i < w.k; ++i) sum = std::fma(left[i], right[i], sum);
      out[static_cast<size_t>(row * w.n + j)] = sum;
    }
  return out;
}

// By the specification: it packs without search.
std::vector<float> int8_linear(const void* x, Type type, int m, int ldx, const Matrix& w, int bits, const float* bias) {
  const std::vector<uint8_t> packed = int8::pack(int8::kScalar, w.ints.data(), w.n, w.k, bits, 1);
  std::vector<float> y(area(m, w.n));
  int8::linear({x, type, m, w.k, ldx, packed.data(), static_cast<int64_t>(packed.size()), w.n, w.scale.data(), bias,
                Activation::none, y.data(), Type::float32, nullptr, nullptr, 1});
  return y;
}

// What an int8 or sparse residual gives on its own: integer sums with the scales of the rows, or float sums.
struct RestSums {
  std::vector<int32_t> ints;
  std::vector<float> scale, floats;

  RestSums(const Case& c, const Layer& layer, const Input& x) {
    const auto bytes = static_cast<int64_t>(layer.packed_rest.size());
    const uint8_t* packed = layer.packed_rest.data();
    if (!has_ints(c.plan.rest)) {
      floats.resize(area(c.m, c.n));
      sparse::linear({x.data(), c.x_type, c.m, c.k, x.ldx(), packed, bytes, c.n, nullptr, nullptr, Activation::none,
                      floats.data(), Type::float32, nullptr, nullptr, 1});
      return;
    }
    ints.resize(area(c.m, c.n));
    scale.resize(static_cast<size_t>(c.m));
    std::vector<int32_t> zero_point(scale.size());
    if (c.plan.rest == Rest::int8)
      int8::linear({x.data(), c.x_type, c.m, c.k, x.ldx(), packed, bytes, c.n, nullptr, nullptr, Activation::none,
                    ints.data(), Type::int32, scale.data(), zero_point.data(), 1});
    else
      sparse::linear({x.data(), c.x_type, c.m, c.k, x.ldx(), packed, bytes, c.n, nullptr, nullptr, Activation::none,
                      ints.data(), Type::int32, scale.data(), zero_point.data(), 1});
  }
  double exact(const Layer& layer, size_t i) const {
    if (ints.empty()) return double{floats[i]};
    const size_t n = layer.rest_scale.size();
    return double{scale[i / n]} * double{layer.rest_scale[i % n]} * ints[i];
  }
};

// t, what the factors and the bias give, and y before the activation, by the formulas of gemm.h.
struct Expected {
  std::vector<float> x, t, lifted, y;

  Expected(const Case& c, const Layer& layer, const Input& input) {
    for (int row = 0; row < c.m; ++row)
      for (int i = 0; i < c.k; ++i) x.push_back(input.at(row, i));
    const float* bias = c.has_bias ? layer.bias.data() : nullptr;
    if (c.plan.is_float()) {
      t = chains(x, c.m, layer.down, nullptr, 0);
      y = chains(t, c.m, layer.up, bias, 0);
    } else {
      t = int8_linear(input.data(), c.x_type, c.m, input.ldx(), layer.down, c.plan.activation_bits, nullptr);
      y = int8_linear(t.data(), Type::float32, c.m, c.rank, layer.up, c.plan.activation_bits, bias);
    }
    lifted = y;
    if (c.plan.rest == Rest::dense) y = chains(x, c.m, layer.rest, y.data(), c.n);
    if (c.plan.rest == Rest::none || c.plan.rest == Rest::dense) return;
    const RestSums sums(c, layer, input);
    if (sums.ints.empty()) {
      for (size_t i = 0; i < y.size(); ++i) y[i] = sums.floats[i] + y[i];
      return;
    }
    const std::vector<int32_t> zeros(static_cast<size_t>(std::max(c.m, c.n)), 0);  // the sums are without them already
    std::vector<float> joined(y.size());
    int8::kScalar.finish(sums.ints.data(), c.n, c.m, c.n,
                         {zeros.data(), layer.rest_scale.data(), y.data(), c.n, sums.scale.data(), zeros.data(),
                          Activation::none, Type::float32},
                         joined.data(), c.n);
    y = joined;
  }
};

void add_products(double& sum, double& magnitude, const float* a, const float* b, int count) {
  for (int i = 0; i < count; ++i) {
    const double product = double{a[i]} * double{b[i]};
    sum += product, magnitude += std::fabs(product);
  }
}

// The bound of gemm.h for float32 factors. What comes after the low-rank part rounds it too, as the bias.
bool within_bound(const Case& c, const Layer& layer, const Input& x, const Expected& e, const float* t,
                  const float* y) {
  const bool joins = c.plan.rest != Rest::none && c.plan.rest != Rest::dense;
  const std::unique_ptr<RestSums> sums(joins ? new RestSums(c, layer, x) : nullptr);
  const double chain = c.rank + 4 + (c.plan.rest == Rest::dense ? c.k : 0);
  bool within = true;
  std::vector<double> exact_t(static_cast<size_t>(c.rank)), size_of_t(exact_t.size());
  for (int row = 0; row < c.m; ++row) {
    const float* at = e.x.data() + row * c.k;
    for (size_t j = 0; j < exact_t.size(); ++j) {
      exact_t[j] = size_of_t[j] = 0;
      add_products(exact_t[j], size_of_t[j], at, layer.down.floats.data() + static_cast<int>(j) * c.k, c.k);
      within = within && std::fabs(double{*t++} - exact_t[j]) <= gamma_of(c.k + 4) * size_of_t[j];
    }
    for (int n = 0; n < c.n; ++n) {
      double exact = c.has_bias ? double{layer.bias[static_cast<size_t>(n)]} : 0, other = std::fabs(exact), size = 0;
      for (size_t j = 0; j < exact_t.size(); ++j) {
        const double w = layer.up.floats[static_cast<size_t>(n * c.rank) + j];
        exact += exact_t[j] * w;
        size += size_of_t[j] * std::fabs(w);
      }
      if (c.plan.rest == Rest::dense) add_products(exact, other, at, layer.rest.floats.data() + n * c.k, c.k);
      const double residual = joins ? sums->exact(layer, static_cast<size_t>(row * c.n + n)) : 0;
      const double bound =
          gamma_of(c.k + chain + joins) * size + gamma_of(chain) * other + gamma_of(4) * std::fabs(residual);
      within = within && std::fabs(double{*y++} - (exact + residual)) <= bound;
    }
  }
  return within;
}

// --- end to end: the checks of one case
// -----------------------------------------------------------------------------------

// A call with x full of NaN: whatever of it stays in the scratch memory of any thread must not show.
void poison(const Case& c, Problem problem) {
  const Input x(c.x_type, c.m, c.k, c.ldx, Edge::end, 0);
  std::vector<uint8_t> y(area(c.m, c.n) * 4);
  problem.x = x.data();
  problem.y = y.data();
  problem.y_type = c.y_type;
  for (const int threads : {1, 3}) {
    problem.threads = threads;
    linear(problem);
  }
}

struct Result {
  Guarded<uint8_t> y;
  Guarded<float> t;

  Result(const Case& c, Problem problem, Type type, bool wants_t)
      : y(area(c.m, c.n) * size_of(type), c.edge(), c.gap() * size_of(type)), t(area(c.m, c.rank), c.edge()) {
    y.fill(0x55), t.fill(0x55);
    problem.y = y.data();
    problem.y_type = type;
    problem.intermediate = wants_t ? t.data() : nullptr;
    linear(problem);
    expect(y.intact() && t.intact(), "writes beside the results");
  }
  const float* floats() const { return reinterpret_cast<const float*>(y.data()); }
};

// A dense residual on int8 factors: only its own products are added up in an order of the kernel's choice.
bool goes_on(const Case& c, const Layer& layer, const Expected& e, const float* y) {
  bool within = true;
  for (int row = 0; row < c.m; ++row)
    for (int n = 0; n < c.n; ++n) {
      double exact = double{e.lifted[static_cast<size_t>(row * c.n + n)]}, magnitude = std::fabs(exact);
      add_products(exact, magnitude, e.x.data() + row * c.k, layer.rest.floats.data() + n * c.k, c.k);
      within = within && std::fabs(double{*y++} - exact) <= gamma_of(c.k + 4) * magnitude;
    }
  return within;
}

void check_sums(const Case& c, const Layer& layer, const Input& x, const Result& sums) {
  const Expected expected(c, layer, x);
  if (c.plan.is_float()) expect(within_bound(c, layer, x, expected, sums.t.data(), sums.floats()), "the bound");
  // In phases the order of additions is the kernel's own.
  if (c.plan.is_float() && c.is_few()) return;
  expect(all_equal(expected.t.data(), sums.t.data(), expected.t.size()), "t");
  if (c.plan.rest == Rest::dense && c.is_few())
    expect(goes_on(c, layer, expected, sums.floats()), "the residual behind int8 factors");
  else
    expect(all_equal(expected.y.data(), sums.floats(), expected.y.size()), "y before the activation");
}

// The activation and the type, from the sums that linear() itself gave; then the same on more threads.
void check_results(const Case& c, Problem problem, const Result& sums) {
  problem.activation = c.activation;
  const Result one(c, problem, c.y_type, false);
  std::vector<uint8_t> expected(one.y.size());
  pycompress::dense::kScalar.finish(sums.floats(), c.n, c.m, c.n, c.activation, c.y_type, expected.data(), c.n);
  expect(same(one.y.data(), expected.data(), c.y_type, area(c.m, c.n)), "results");
  for (const int threads : {2, 3}) {
    problem.threads = threads;
    const Result several(c, problem, c.y_type, true);
    expect(all_equal(several.y.data(), one.y.data(), one.y.size()), text("y on ", threads, " threads"));
    expect(all_equal(several.t.data(), sums.t.data(), sums.t.size()), text("t on ", threads, " threads"));
  }
}

// A value of one row that is not finite reaches all results of that row and no other.
void check_not_finite(const Case& c, Problem problem, Input& x, const Result& sums) {
  constexpr float kBad[] = {NAN, INFINITY, -INFINITY};
  const int bad = c.number % c.m;
  x.set(bad, c.number % c.k, kBad[c.number % 3]);
  for (const int threads : {1, 2}) {
    problem.threads = threads;
    const Result result(c, problem, Type::float32, false);
    bool right = true;
    for (int row = 0; row < c.m; ++row) {
      const float *y = result.floats() + row * c.n, *before = sums.floats() + row * c.n;
      right = right && (row == bad ? std::none_of(y, y + c.n, [](float v) { return std::isfinite(v); })
                                   : all_equal(y, before, static_cast<size_t>(c.n)));
    }
    expect(right, text("NaN and Inf, ", threads, " threads"));
  }
}

void run(const Case& c) {
  begin(c.name());
  std::mt19937 random(static_cast<unsigned>(c.number));
  const Layer layer(c, random);
  const Packed packed(layer.packed, c.edge(), 8 * c.gap());
  check_unpack(c, layer, packed);
  Input x(c.x_type, c.m, c.k, c.ldx, c.edge(), c.gap());
  x.fill(c.m, c.values, random);
  const Problem problem = problem_of(c, layer, packed, x);
  poison(c, problem);
  const Result sums(c, problem, Type::float32, true);
  check_sums(c, layer, x, sums);
  check_results(c, problem, sums);
  check_not_finite(c, problem, x, sums);
}

// --- shapes
// ---------------------------------------------------------------------------------------------------------------

// What is not given takes turns, so that a run of cases meets every combination of two.
Case case_of(const Plan& plan, int m, int n, int k, int rank) {
  const int turn = cases;
  return {plan,
          m,
          n,
          k,
          std::min({rank, n, k}),
          k + turn % 4,
          static_cast<Values>(turn / 3 % kValues),
          static_cast<Type>(turn / 2 % 3),
          static_cast<Type>(turn / 5 % 3),
          static_cast<Activation>(turn % 5),
          turn / 4 % 3 != 0,
          turn};
}

void run_shapes(const Plan& plan) {
  constexpr int kMs[] = {1, 2, 3, 4, 5, 6, 7, 12, 13, 16, 17, 33, 64, 65, 130};
  constexpr int kNs[] = {1, 15, 16, 17, 31, 33, 48, 128, 129};
  constexpr int kKs[] = {1, 15, 16, 17, 31, 33, 128, 129};
  constexpr int kRanks[] = {1, 15, 16, 17, 31, 33, 128, 1 << 30};  // the last one: as large as there is
  int turn = static_cast<int>(plan.rest) + plan.activation_bits;   // each plan begins elsewhere
  for (const int m : kMs)
    for (const int k : kKs) {
      turn += 5;
      if ((turn + m) % 2 == 0 && m > kFewRows) continue;  // the next plan has it
      run(case_of(plan, m, kNs[turn % 9], k, kRanks[(turn / 2 + k) % 8]));
    }
  run(case_of(plan, 65, 140, 257, 129));  // several blocks of rows, k and rank
  run(case_of(plan, 97, 129, 129, 33));
  run(case_of(plan, 200, 33, 140, 17));
  run(case_of(plan, 3, 300, 270, 140));
  run(case_of(plan, 1, 70, 1030, 65));
  for (const int ldx : {1024, 2048}) {  // rows that fall into the same sets of the L1
    Case c = case_of(plan, ldx / 56, 70, ldx / 2 - 70, 65);
    c.ldx = ldx;
    run(c);
  }
}

// --- what is refused
// --------------------------------------------------------------------------------------------------------

Case small_case(const Plan& plan) {
  Case c = case_of(plan, 2, 20, 17, 5);
  c.x_type = c.y_type = Type::float32;
  return c;
}

void test_pack_refusals(const Plan& plan) {
  const Case c = small_case(plan);
  std::mt19937 random(1);
  Layer layer(c, random);
  const auto refused = [&](const char* what, auto&& change) {
    low_rank::Weight w = layer.weight(c);
    change(w);
    refuses(text("low_rank: ", plan.name(), ": pack of ", what), [&] { low_rank::pack(w, 1); });
  };
  using W = low_rank::Weight;
  refused("n = 0", [](W& w) { w.n = 0; });
  refused("k = 0", [](W& w) { w.k = 0; });
  refused("k over the largest", [](W& w) { w.k = kMaxK + 1; });
  refused("a huge n", [](W& w) { w.n = INT32_MAX; });
  refused("rank 0", [](W& w) { w.rank = 0; });
  refused("a rank over k", [](W& w) { w.rank = w.k + 1; });
  refused("bits = 16", [](W& w) { w.bits = 16; });
  refused("activation_bits of the other factors", [](W& w) { w.activation_bits = w.bits == 8 ? 0 : 8; });
  refused("activation_bits = 6", [](W& w) { w.activation_bits = 6; });
  refused("a scale too many or too few", [&](W& w) { w.up_scale = w.bits == 8 ? nullptr : layer.bias.data(); });
  refused("a residual of no known kind", [](W& w) { w.residual_kind = static_cast<Residual>(kResiduals); });
  refused("a residual's scale too many or too few",
          [&](W& w) { w.residual_scale = w.residual_scale != nullptr ? nullptr : layer.bias.data(); });
  refused("a residual or its kind alone", [&](W& w) {
    if (w.residual == nullptr) w.residual_kind = Residual::dense;
    w.residual = nullptr;
  });
  if (layer.packed_rest.empty()) return;
  refused("a residual of the other kind",
          [](W& w) { w.residual_kind = w.residual_kind == Residual::int8 ? Residual::sparse : Residual::int8; });
  refused("a residual cut short", [](W& w) { w.residual_bytes -= 1; });
  refused("a residual of another n", [](W& w) { w.n -= 1; });
  refused("a residual of another k", [](W& w) { w.k -= 1; });
}

// A buffer that was changed; for 64 rows too, where several threads take it.
void test_buffer_refusals(const Plan& plan) {
  Case c = small_case(plan);
  c.m = 64;
  std::mt19937 random(1);
  const Layer layer(c, random);
  const Input x(Type::float32, c.m, c.k, c.ldx, Edge::end, 0);
  std::vector<float> y(area(c.m, c.n)), factor(area(c.n, c.k));
  const auto refused = [&](const std::string& what, const std::vector<uint8_t>& bytes, bool by_unpack = true) {
    const Packed packed(bytes, Edge::end, 0);
    const std::string name = text("low_rank: ", plan.name(), ": packed, ", what);
    if (by_unpack)
      refuses(name + ", unpack", [&] {
        unpack(packed.data(), static_cast<int64_t>(packed.size()),
               {factor.data(), nullptr, nullptr, nullptr, nullptr, nullptr});
      });
    Problem problem = problem_of(c, layer, packed, x);
    problem.y = y.data();
    for (const int threads : {1, 2}) {
      problem.threads = threads;
      refuses(text(name, ", linear on ", threads, " threads"), [&] { linear(problem); });
    }
  };
  const std::vector<uint8_t>& whole = layer.packed;
  refused("empty", {});
  refused("one byte short", {whole.begin(), whole.end() - 1});
  refused("half a header", {whole.begin(), whole.begin() + sizeof(Header) / 2});
  refused("a header alone", {whole.begin(), whole.begin() + sizeof(Header)});
  std::vector<uint8_t> changed = whole;
  changed.push_back(0);
  refused("one byte long", changed);
  for (size_t i = 0; i < sizeof(Header); ++i) {
    changed = whole;
    changed[i] ^= 1;
    refused(text("byte ", i, " of its header changed"), changed);
  }
  // The headers of the ops inside: what is wrong with them must not come up first on a thread that cannot say so.
  const Header& header = header_of(whole.data(), static_cast<int64_t>(whole.size()));
  const auto damaged = [&](const char* what, const Part& part, bool by_unpack) {
    for (const size_t i : {0, 9, 13, 16, 20}) {
      changed = whole;
      changed[part.offset + i] ^= 1;
      refused(text("byte ", i, " of the header of its ", what, " changed"), changed, by_unpack);
    }
  };
  if (!plan.is_float()) damaged("down", header.down, true);
  if (!plan.is_float()) damaged("up", header.up, false);
  if (!layer.packed_rest.empty()) damaged("residual", header.residual, false);
}

void test_call_refusals(const Plan& plan) {
  const Case c = small_case(plan);
  std::mt19937 random(1);
  const Layer layer(c, random);
  const Packed packed(layer.packed, Edge::end, 0);
  const Input x(Type::float32, c.m, c.k, c.ldx, Edge::end, 0);
  std::vector<float> y(area(c.m, c.n), 7.0f);
  Problem problem = problem_of(c, layer, packed, x);
  problem.y = y.data();
  problem.m = 0;
  begin(text("low_rank: ", plan.name(), ": no rows"));
  linear(problem);
  expect(std::all_of(y.begin(), y.end(), [](float value) { return value == 7.0f; }), "y was written to");
  const auto refused = [&](const char* what, auto&& change) {
    Problem changed_problem = problem_of(c, layer, packed, x);
    changed_problem.y = y.data();
    change(changed_problem);
    refuses(text("low_rank: ", plan.name(), ": ", what), [&] { linear(changed_problem); });
  };
  refused("x of another k", [](Problem& p) { p.k = p.ldx = 16; });
  refused("another n", [](Problem& p) { p.n -= 1; });
  refused("int32 results", [](Problem& p) { p.y_type = Type::int32; });
}

}  // namespace

void test_low_rank() {
  constexpr Plan kPlans[] = {
      {32, 0, Rest::none, 0},   {32, 0, Rest::dense, 0},   {32, 0, Rest::int8, 7},  {32, 0, Rest::int8, 8},
      {32, 0, Rest::rows, 0},   {32, 0, Rest::panels, 0},  {32, 0, Rest::quads, 7}, {32, 0, Rest::quads4, 8},
      {32, 0, Rest::chains, 7}, {32, 0, Rest::windows, 8}, {8, 7, Rest::none, 0},   {8, 8, Rest::none, 0},
      {8, 7, Rest::dense, 0},   {8, 8, Rest::int8, 8},     {8, 7, Rest::int8, 7},   {8, 8, Rest::int8, 7},
      {8, 7, Rest::rows, 0},    {8, 8, Rest::panels, 0},   {8, 7, Rest::quads, 7},  {8, 8, Rest::quads4, 8},
      {8, 7, Rest::windows, 7}, {8, 8, Rest::chains, 8},   {8, 7, Rest::chains, 7},
  };
  for (const Plan& plan : kPlans) {
    if (is_sparse(plan.rest) && !runs_here(format_of(plan.rest)))
      continue;  // sparse_linear.cpp says that it is refused
    run_shapes(plan);
    test_pack_refusals(plan);
    test_buffer_refusals(plan);
    test_call_refusals(plan);
  }
}

}  // namespace native
