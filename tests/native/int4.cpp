// int4: every kernel alone against the specification, and int4_linear end to end against int64 arithmetic and the chain
// of fma that the contract writes; packed weights back, any number of threads, what is refused.
#include "int4/gemm.h"

#include <climits>
#include <cmath>

#include "addend.h"
#include "cases.h"
#include "common/activation.h"
#include "int4/kernel_list.h"
#include "int4/pack.h"
#include "int4_weight.h"
#include "int8/kernel_list.h"
#include "sparse_weight.h"

namespace pycompress::int4 {
extern const Kernel kAvxVnniEmulated;
extern const Kernel kAvx512VnniEmulated;
}  // namespace pycompress::int4

namespace native {
namespace {

using namespace pycompress;
using namespace pycompress::int4;

size_t span(int rows, ptrdiff_t stride, int columns) { return static_cast<size_t>((rows - 1) * stride + columns); }

std::vector<const int4::Kernel*> available() {
  std::vector<const int4::Kernel*> kernels{&int4::kScalar};
#if defined(PYCOMPRESS_X86)
  if (isa_available(Isa::avx2))
    kernels.insert(kernels.end(), {&int4::kAvx2, &int4::kAvxVnniEmulated, &int4::kAvx512VnniEmulated});
  if (isa_available(Isa::avx_vnni)) kernels.push_back(&int4::kAvxVnni);
  if (isa_available(Isa::avx512_vnni)) kernels.push_back(&int4::kAvx512Vnni);
#endif
  return kernels;
}

// --- the kernels, each alone
// ------------------------------------------------------------------------------------------

// Part of a panel, cut out of its buffer: each array ends where the kernels may read no further.
struct Cut {
  Guarded<uint8_t> nibbles, zero;
  Guarded<uint16_t> scale;
  Panel panel;

  Cut(int units, int group_units, bool symmetric, bool deep, Edge edge, std::mt19937& random)
      : nibbles(area(units, kUnitBytes), edge),
        zero(symmetric ? 0 : area(groups_of(units, group_units), kPanel / 2), edge),
        scale(area(groups_of(units, group_units), kPanel), edge),
        panel{nibbles.data(), scale.data(), symmetric ? nullptr : zero.data(), units, group_units, deep} {
    // Where chains of depth 8 must fit, no weight is more than 8 away from its zero point.
    for (size_t i = 0; i < nibbles.size(); ++i) nibbles[i] = static_cast<uint8_t>(random());
    for (size_t i = 0; i < zero.size(); ++i)
      zero[i] = static_cast<uint8_t>(deep ? 0x78 + random() % 2 * 0xf : random());
    for (size_t i = 0; i < scale.size(); ++i)
      scale[i] = static_cast<uint16_t>((120 + random() % 8) << 7 | random() % 128);
  }
  static int groups_of(int units, int group_units) { return (units + group_units - 1) / group_units; }
  int groups() const { return groups_of(panel.units, panel.group_units); }
};

// Room for what expand() makes of a panel, and no byte more.
struct Room {
  Guarded<int8_t> weights;
  Guarded<float> scale;

  Room(const Cut& cut, Edge edge)
      : weights(area(cut.panel.units * kUnit, kPanel), edge), scale(area(cut.groups(), kPanel), edge) {
    weights.fill(0x55), scale.fill(0x55);
  }
  Expanded expanded() { return {weights.data(), scale.data()}; }
};

struct Sums {
  Guarded<float> v;
  explicit Sums(int rows) : v(area(rows, kPanel)) {
    for (size_t i = 0; i < v.size(); ++i) v[i] = static_cast<float>(i) - 30.5f;  // what `accumulate` adds to
  }
};

void run_products(const int4::Kernel& kernel, int rows, int units, int group_units, bool symmetric, bool deep) {
  begin(text("int4 kernel=", kernel.name, " rows=", rows, " units=", units, " group_units=", group_units,
             " symmetric=", symmetric, " deep=", deep));
  std::mt19937 random(static_cast<unsigned>(cases));
  const Edge edge = cases % 2 ? Edge::begin : Edge::end;
  const Cut cut(units, group_units, symmetric, deep, edge, random);
  Room expected(cut, edge), found(cut, edge);
  int4::kScalar.expand(cut.panel, expected.expanded());
  kernel.expand(cut.panel, found.expanded());
  expect(same(found.scale.data(), expected.scale.data(), Type::float32, found.scale.size()) && found.scale.intact() &&
             std::memcmp(found.weights.data(), expected.weights.data(), found.weights.size()) == 0 &&
             found.weights.intact(),
         "expand");

  const int k = units * kUnit, ldq = k + cases % 3 * 5;
  Guarded<uint8_t> q(span(rows, ldq, k), edge);
  for (size_t i = 0; i < q.size(); ++i) q[i] = static_cast<uint8_t>(cases % 3 ? random() : 255);
  for (const bool accumulate : {false, true}) {
    Sums v(rows), right(rows);
    int4::kScalar.tile(q.data(), ldq, rows, cut.panel, expected.expanded(), right.v.data(), accumulate);
    kernel.tile(q.data(), ldq, rows, cut.panel, expected.expanded(), v.v.data(), accumulate);
    expect(same(v.v.data(), right.v.data(), Type::float32, v.v.size()) && v.v.intact(),
           text("tile, accumulate=", accumulate));
    if (accumulate || kernel.stream == nullptr) continue;
    kernel.stream(q.data(), ldq, rows, cut.panel, v.v.data());
    expect(same(v.v.data(), right.v.data(), Type::float32, v.v.size()) && v.v.intact(), "stream");
  }
}

void run_finish(const int4::Kernel& kernel, int rows, int columns, Type type, Activation activation) {
  begin(text("int4 kernel=", kernel.name, " finish of rows=", rows, " columns=", columns,
             " type=", static_cast<int>(type), " activation=", static_cast<int>(activation)));
  std::mt19937 random(static_cast<unsigned>(cases));
  const Edge edge = cases % 2 ? Edge::begin : Edge::end;
  const bool has_rows = cases % 3 == 1;  // of the bias, 16 floats of the last one too
  const ptrdiff_t bias_stride = has_rows ? int8::kAddendStride : 0;
  Guarded<float> v(area(rows, kPanel), edge), offset(kPanel, edge),
      bias(span(rows, bias_stride, has_rows ? kPanel : columns), edge), row_scale(static_cast<size_t>(rows), edge);
  Guarded<int32_t> zero_point(row_scale.size(), edge);
  for (size_t i = 0; i < v.size(); ++i) v[i] = hard_value(i, random);
  for (size_t i = 0; i < offset.size(); ++i) offset[i] = std::normal_distribution<float>()(random);
  for (size_t i = 0; i < bias.size(); ++i) bias[i] = std::normal_distribution<float>()(random);
  for (size_t i = 0; i < row_scale.size(); ++i) {
    row_scale[i] = i % 5 == 4 ? NAN : i % 3 == 2 ? 0.0f : 0.01f * static_cast<float>(1 + random() % 9);
    zero_point[i] = static_cast<int32_t>(random() % 256);
  }
  const int ldy = columns + cases % 4;
  const size_t count = span(rows, ldy, columns);
  Guarded<uint8_t> y(count * size_of(type), edge), expected(y.size());
  y.fill(0x55), expected.fill(0x55);
  const int4::Epilogue epilogue{
      offset.data(), cases % 3 ? bias.data() : nullptr, bias_stride, row_scale.data(), zero_point.data(), activation,
      type};
  int4::kScalar.finish(v.data(), rows, columns, epilogue, expected.data(), ldy);
  kernel.finish(v.data(), rows, columns, epilogue, y.data(), ldy);
  expect(same(y.data(), expected.data(), type, count) && y.intact(), "finish");
}

void run_kernel(const int4::Kernel& kernel) {
  for (int rows = 1; rows <= kernel.mr; ++rows)
    for (const int units : {1, 2, 3, 4, 5, 7, 8, 9})
      for (const int group_units : {1, 2, 4})
        for (const bool symmetric : {false, true})
          for (const bool deep : {false, true}) run_products(kernel, rows, units, group_units, symmetric, deep);
  for (const Type type : {Type::float32, Type::bfloat16, Type::float16})
    for (const int rows : {1, 2, 5, 16})
      for (int columns = 1; columns <= kPanel; ++columns)
        run_finish(kernel, rows, columns, type, static_cast<Activation>((columns + rows) % 5));
}

// --- end to end
// -------------------------------------------------------------------------------------------------------

struct Case {
  int m, n, k, group;
  bool symmetric;
  Nibbles nibbles;
  Values values;
  Type x_type, y_type;
  Activation activation;
  bool has_bias;
  int ldx, number;  // the number decides alignment and every value

  std::string name() const {
    return text("int4 m=", m, " n=", n, " k=", k, " group=", group, " symmetric=", symmetric,
                " nibbles=", static_cast<int>(nibbles), " values=", name_of(values),
                " x_type=", static_cast<int>(x_type), " y_type=", static_cast<int>(y_type),
                " activation=", static_cast<int>(activation), " bias=", has_bias, " ldx=", ldx, " case=", number);
  }
  Edge edge() const { return number % 2 ? Edge::begin : Edge::end; }
  size_t gap() const { return static_cast<size_t>(number / 2 % 3); }
};

// What is not given takes turns, so that a run of cases meets every combination of two.
Case case_of(int m, int n, int k) {
  const int turn = cases;
  constexpr int kGroups[] = {32, 64, 128};
  return {m,
          n,
          k,
          kGroups[turn % 3],
          turn / 3 % 2 != 0,
          static_cast<Nibbles>(turn % kNibbles),
          static_cast<Values>(turn / 4 % kValues),
          static_cast<Type>(turn / 2 % 3),
          static_cast<Type>(turn / 5 % 3),
          static_cast<Activation>(turn / 7 % 5),
          turn / 4 % 3 != 0,
          k + turn % 4,
          turn};
}

Problem problem_of(const Input& x, int m, const Int4Weight& w, const Guarded<uint8_t>& packed) {
  Problem problem{};
  problem.x = x.data();
  problem.x_type = x.type();
  problem.m = m, problem.k = w.k, problem.ldx = x.ldx(), problem.n = w.n;
  problem.packed = packed.data();
  problem.packed_bytes = static_cast<int64_t>(packed.size());
  problem.threads = 1;
  return problem;
}

// v of gemm.h for one row of q and one channel, from exact sums; and the offset, for a row of ones.
float chain(const Int4Weight& w, int n, const uint8_t* q) {
  float v = 0;
  for (int g = 0; g < w.groups; ++g) {
    int64_t dot = 0;
    for (int i = g * w.group; i < std::min(w.k, (g + 1) * w.group); ++i)
      dot += int64_t{q == nullptr ? uint8_t{1} : q[i]} * w.centred(n, i);
    v = std::fma(static_cast<float>(dot), w.scale_of(n, g), v);
  }
  return v;
}

// u * sx of gemm.h, [m, n].
std::vector<float> products(const Problem& p, const Int4Weight& w) {
  std::vector<uint8_t> q(area(static_cast<int>(p.m), w.k));
  std::vector<float> scale(static_cast<size_t>(p.m)), offset, result;
  std::vector<int32_t> zero_point(scale.size());
  int8::quantize(int8::kScalar, p.x, p.x_type, p.m, p.k, p.ldx, 8, nullptr, q.data(), scale.data(), zero_point.data());
  for (int n = 0; n < w.n; ++n) offset.push_back(chain(w, n, nullptr));
  for (size_t row = 0; row < scale.size(); ++row)
    for (int n = 0; n < w.n; ++n) {
      const float v = chain(w, n, q.data() + row * static_cast<size_t>(w.k));
      const float u = std::fma(-static_cast<float>(zero_point[row]), offset[static_cast<size_t>(n)], v);
      result.push_back(u * scale[row]);
    }
  return result;
}

std::vector<uint8_t> results(const Problem& p, const std::vector<float>& product) {
  std::vector<uint8_t> y(product.size() * size_of(p.y_type));
  for (size_t i = 0; i < product.size(); ++i) {
    Scalar v{product[i]};
    if (p.bias != nullptr) v = v + Scalar{p.bias[i % static_cast<size_t>(p.n)]};
    put_float(y.data(), p.y_type, static_cast<ptrdiff_t>(i), activate(p.activation, v).value);
  }
  return y;
}

struct Result : Guarded<uint8_t> {
  Result(Problem problem, const int4::Kernel& kernel, Edge edge, size_t gap)
      : Guarded(static_cast<size_t>(problem.m * problem.n) * size_of(problem.y_type), edge,
                gap * size_of(problem.y_type)) {
    fill(0x55);
    problem.y = data();
    int4::linear(problem, kernel);
    expect(intact(), "writes beside the results");
  }
};

void check_packed(const Int4Weight& w, const Guarded<uint8_t>& packed, Edge edge) {
  Guarded<uint8_t> values(w.values.size(), edge), zeros(w.zeros.size(), edge);
  Guarded<uint16_t> scale(w.scale.size(), edge);
  const auto bytes = static_cast<int64_t>(packed.size());
  int4::unpack(packed.data(), bytes, {values.data(), scale.data(), w.symmetric ? nullptr : zeros.data()});
  int4::unpack(packed.data(), bytes, {});  // nothing is asked for
  const auto is = [](const auto& found, const auto& expected) {
    return std::memcmp(found.data(), expected.data(), found.bytes()) == 0 && found.intact();
  };
  expect(is(values, w.values) && is(scale, w.scale) && is(zeros, w.zeros), "unpack");
  const std::vector<uint8_t> again = w.packed(8, 3);
  expect(again.size() == packed.size() && std::equal(again.begin(), again.end(), packed.data()), "pack on 3 threads");
}

// A row that holds NaN or Inf gives a row of NaN, and no other row changes.
void check_not_finite(const Case& c, Problem problem, Input& x, const std::vector<uint8_t>& before,
                      const int4::Kernel& kernel) {
  constexpr float kBad[] = {NAN, INFINITY, -INFINITY};
  const int bad = c.number % c.m;
  const float saved = x.at(bad, c.number % c.k);
  x.set(bad, c.number % c.k, kBad[c.number % 3]);
  const Result y(problem, kernel, c.edge(), c.gap());
  const size_t row_bytes = before.size() / static_cast<size_t>(c.m);
  bool right = true;
  for (int row = 0; row < c.m; ++row) {
    const size_t at = static_cast<size_t>(row) * row_bytes;
    if (row != bad) right = right && same(y.data() + at, before.data() + at, c.y_type, static_cast<size_t>(c.n));
    for (int n = 0; n < c.n && row == bad; ++n) right = right && std::isnan(float_at(y.data() + at, c.y_type, n));
  }
  expect(right, text("NaN and Inf, ", kernel.name));
  x.set(bad, c.number % c.k, saved);
}

// A matrix instead of the bias, and rows quantized before the call; those of another shape are quantized anew.
void check_addend(const Case& c, Problem problem, const std::vector<float>& product, const int4::Kernel& kernel) {
  std::mt19937 random(static_cast<unsigned>(c.number));
  const int8::ActivationShape shape{c.k, 1};
  Guarded<uint8_t> q(static_cast<size_t>(c.m * shape.stride()));
  Guarded<float> scale(static_cast<size_t>(c.m));
  Guarded<int32_t> zero_point(scale.size());
  int8::best_kernel().quantize(problem.x, problem.x_type, problem.ldx, c.m, shape, 255, nullptr, q.data(), scale.data(),
                               zero_point.data());
  const Summand summand(c.m, c.n, kPanel, c.number % 3 != 0, random);
  const int8::Addend addend = summand.addend();
  std::vector<float> sums = product;
  for (size_t i = 0; i < sums.size(); ++i) sums[i] += summand.data()[i];
  problem.bias = nullptr;
  const std::vector<uint8_t> expected = results(problem, sums);
  problem.addend = &addend;
  const int8::Quantized rows{shape, 8, q.data(), scale.data(), zero_point.data()};
  int8::Quantized misfit = rows;
  (c.number % 2 ? misfit.activation_bits : misfit.shape.k) -= 1;
  const void* x = problem.x;
  for (const bool fits : {true, false}) {
    problem.quantized = fits ? &rows : &misfit;
    problem.x = fits ? nullptr : x;  // it is not needed
    problem.threads = c.number % 2 == fits ? 1 : 2;
    const Result y(problem, kernel, c.edge(), c.gap());
    expect(same(y.data(), expected.data(), c.y_type, area(c.m, c.n)), text("addend, ", kernel.name, " fits=", fits));
  }
}

void run(const Case& c, const std::vector<const int4::Kernel*>& kernels) {
  begin(c.name());
  std::mt19937 random(static_cast<unsigned>(c.number));
  Int4Weight w(c.n, c.k, c.group, c.symmetric, c.edge());
  w.fill(c.nibbles, random);
  w.fill_scales(random);
  const PackedBytes packed(w.packed(8), c.edge(), c.gap());
  check_packed(w, packed, c.edge());
  Input x(c.x_type, c.m, c.k, c.ldx, c.edge(), c.gap());
  x.fill(c.m, c.values, random);
  Guarded<float> bias(static_cast<size_t>(c.n), c.edge());
  for (size_t i = 0; i < bias.size(); ++i) bias[i] = std::normal_distribution<float>()(random);
  Problem problem = problem_of(x, c.m, w, packed);
  problem.bias = c.has_bias ? bias.data() : nullptr;
  problem.activation = c.activation;
  problem.y_type = c.y_type;
  const std::vector<float> product = products(problem, w);
  const std::vector<uint8_t> expected = results(problem, product);
  for (const int4::Kernel* kernel : kernels)
    for (const int threads : {1, 2, 3}) {
      problem.threads = threads;
      const Result y(problem, *kernel, c.edge(), c.gap());
      expect(same(y.data(), expected.data(), c.y_type, area(c.m, c.n)), text(kernel->name, ", ", threads, " threads"));
      if (c.m == 0 || threads != 1 + c.number % 3) continue;
      check_not_finite(c, problem, x, expected, *kernel);
      check_addend(c, problem, product, *kernel);
    }
}

void run_shapes(const std::vector<const int4::Kernel*>& kernels) {
  int large = 0;
  for (const int m : {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 33, 67})
    for (const int n : {1, 15, 16, 17, 35})
      for (const int k : {1, 31, 32, 33, 63, 64, 65, 127, 128, 129, 1023, 1024, 1025, 2051, 4096})
        if (m * n * k < 100000 || ++large % 4 == 0) run(case_of(m, n, k), kernels);
  for (const int group : {32, 64, 128})
    for (const bool symmetric : {false, true})
      for (int nibbles = 0; nibbles < kNibbles; ++nibbles)
        for (const int m : {3, 6}) {
          Case c = case_of(m, 20, 300);
          c.group = group, c.symmetric = symmetric, c.nibbles = static_cast<Nibbles>(nibbles);
          run(c, kernels);
        }
  run(case_of(300, 33, 97), kernels);
  run(case_of(9, 300, 1030), kernels);
  run(case_of(2, 1, static_cast<int>(kMaxK)), kernels);
}

// --- exact integers
// ---------------------------------------------------------------------------------------------------

// With one scale of 1 everywhere the results are integers; x spans [-zero, 255 - zero], so that its scale is 1, too.
void check_integers(const std::string& which, int m, const Int4Weight& w, int zero, bool largest) {
  begin(text("int4 integers: ", which, " m=", m, " ", w.name(), " zero point of x=", zero));
  std::mt19937 random(static_cast<unsigned>(cases));
  const PackedBytes packed(w.packed(8), Edge::end);
  Input x(Type::float32, m, w.k, w.k + 1, Edge::end, 0);
  for (int row = 0; row < m; ++row)
    for (int i = 0; i < w.k; ++i) {
      const bool is_end = i < 2 && zero > 0;  // both ends of the range come up in each row
      const int q = is_end ? (i == 0) * 255 : largest || i == 0 ? 255 : static_cast<int>(random() % 256);
      x.set(row, i, static_cast<float>((zero == 255 ? 255 - q : q) - zero));
    }
  Problem problem = problem_of(x, m, w, packed);
  std::vector<float> expected;
  for (int row = 0; row < m; ++row)
    for (int n = 0; n < w.n; ++n) {
      int64_t sum = 0;
      for (int i = 0; i < w.k; ++i) sum += static_cast<int64_t>(x.at(row, i)) * w.centred(n, i);
      expected.push_back(static_cast<float>(sum));  // below 2^24: exact
    }
  for (const int4::Kernel* kernel : available()) {
    const Result y(problem, *kernel, Edge::end, 0);
    bool right = true;
    for (size_t i = 0; i < expected.size(); ++i)
      right = right && float_at(y.data(), Type::float32, static_cast<ptrdiff_t>(i)) == expected[i];
    expect(right, kernel->name);
  }
}

void test_integers() {
  std::mt19937 random(2);
  for (const int k : {1, 31, 33, 64, 129, 1025, 4096})
    for (const int group : {32, 64, 128})
      for (const bool symmetric : {false, true})
        for (int nibbles = 0; nibbles < kNibbles; ++nibbles) {
          Int4Weight w(17, k, group, symmetric, Edge::begin);
          w.fill(static_cast<Nibbles>(nibbles), random);
          const int zero = k == 1 ? nibbles % 2 * 255 : nibbles * 63 % 256, m = 1 + cases % 6;
          check_integers("all activations at 255", m, w, 0, true);
          check_integers("any activations", m, w, zero, false);
        }
}

uint8_t deep_of(const Guarded<uint8_t>& packed, int panel) {
  const Header& header = header_of(packed.data(), static_cast<int64_t>(packed.size()));
  return packed[header.deep + static_cast<uint64_t>(panel)];
}

// Sixteen weights of a lane that add up to 128 fit chains of depth 8; with one more they do not, wherever it is.
void test_budget() {
  std::mt19937 random(3);
  constexpr int kN = 35, kK = 96;
  for (const Nibbles nibbles : {Nibbles::full_positive, Nibbles::full_negative}) {
    const bool is_positive = nibbles == Nibbles::full_positive;
    Int4Weight w(kN, kK, 32, false, Edge::end);
    w.fill(nibbles, random);
    const PackedBytes full(w.packed(8), Edge::end);
    check_integers("lanes that are full", 4, w, 0, true);
    expect(deep_of(full, 0) == 1 && deep_of(full, 1) == 1 && deep_of(full, 2) == 1, "a full lane is taken for more");
    for (int i = 0; i < kK; ++i) {
      const int n = (7 * i) % kN, before = w.value(n, i);
      w.set(n, i, before + (is_positive ? 1 : -1));
      const PackedBytes over(w.packed(8), Edge::end);
      check_integers("a lane with one more than fits", 1 + i % 5, w, 0, true);
      for (int panel = 0; panel < 3; ++panel)
        expect(deep_of(over, panel) == (panel != n / kPanel), text("channel ", n, " position ", i, " panel ", panel));
      w.set(n, i, before);
    }
  }
}

// The table says what is fast, so a panel that is deep may be walked as if it were not.
void test_shallow() {
  std::mt19937 random(4);
  for (const int group : {32, 64, 128}) {
    begin(text("int4: a deep panel taken for one that is not, group=", group));
    Int4Weight w(20, 200, group, true, Edge::end);
    w.fill(Nibbles::random, random);
    w.fill_scales(random);
    std::vector<uint8_t> buffer = w.packed(8);
    const PackedBytes deep(buffer, Edge::end);
    const Header header = header_of(deep.data(), static_cast<int64_t>(deep.size()));
    buffer[header.deep] = buffer[header.deep + 1] = 0;
    const PackedBytes shallow(buffer, Edge::end);
    Input x(Type::float32, 7, w.k, w.k, Edge::end, 0);
    x.fill(7, Values::gaussian, random);
    for (const int4::Kernel* kernel : available()) {
      const Result a(problem_of(x, 7, w, deep), *kernel, Edge::end, 0);
      const Result b(problem_of(x, 7, w, shallow), *kernel, Edge::end, 0);
      expect(deep_of(deep, 0) == 1 && std::memcmp(a.data(), b.data(), a.size()) == 0, kernel->name);
    }
  }
}

// Nibbles behind the last value of a row, and behind its last zero point, are no part of the weight.
void test_odd_rows() {
  begin("int4: nibbles behind the last value and zero point");
  std::mt19937 random(5);
  Int4Weight w(5, 65, 32, false, Edge::end);
  w.fill(Nibbles::random, random);
  const std::vector<uint8_t> packed = w.packed(8);
  for (int row = 0; row < w.n; ++row) w.set(row, w.k, 9), w.set_zero(row, w.groups, 9);
  expect(w.packed(8) == packed, "they were packed");
}

// --- what is refused
// --------------------------------------------------------------------------------------------------

void test_pack_refusals() {
  Int4Weight w(4, 40, 32, false, Edge::end);
  const auto refused = [&](const char* what, auto&& change) {
    int4::Weight weight{w.values.data(), w.scale.data(), w.zeros.data(), w.n, w.k, w.group, 8};
    change(weight);
    refuses(text("int4: pack of ", what), [&] { int4::pack(weight, 1); });
  };
  using W = int4::Weight;
  refused("n = 0", [](W& weight) { weight.n = 0; });
  refused("n over the largest", [](W& weight) { weight.n = int64_t{INT_MAX} + 1; });
  refused("k = 0", [](W& weight) { weight.k = 0; });
  refused("k over the largest", [](W& weight) { weight.k = kMaxK + 1; });
  for (const int group : {0, 16, 33, 256}) refused("groups of another size", [=](W& weight) { weight.group = group; });
  for (const int bits : {0, 7, 32}) refused("activation_bits", [=](W& weight) { weight.activation_bits = bits; });
}

struct SmallCase {
  Int4Weight w{20, 70, 32, false, Edge::end};
  Input x{Type::float32, 64, 70, 70, Edge::end, 0};  // enough for several threads
  std::vector<float> y = std::vector<float>(size_t{64} * 20, 7.0f);

  SmallCase() {
    std::mt19937 random(6);
    w.fill(Nibbles::random, random);
    x.fill(64, Values::gaussian, random);
  }
  Problem problem(const Guarded<uint8_t>& packed) {
    Problem p = problem_of(x, 64, w, packed);
    p.y = y.data();
    return p;
  }
};

void test_buffer_refusals() {
  SmallCase small;
  std::vector<uint8_t> values(small.w.values.size());
  const auto refused = [&](const std::string& what, const std::vector<uint8_t>& bytes) {
    const PackedBytes packed(bytes, Edge::end);
    refuses(text("int4: packed, ", what, ", unpack"), [&] {
      int4::unpack(packed.data(), static_cast<int64_t>(packed.size()), {values.data(), nullptr, nullptr});
    });
    Problem problem = small.problem(packed);
    for (const int threads : {1, 2}) {
      problem.threads = threads;
      refuses(text("int4: packed, ", what, ", linear on ", threads, " threads"), [&] { int4::linear(problem); });
    }
  };
  const std::vector<uint8_t> whole = small.w.packed(8);
  refused("empty", {});
  refused("one byte short", {whole.begin(), whole.end() - 1});
  refused("half a header", {whole.begin(), whole.begin() + sizeof(Header) / 2});
  refused("a header alone", {whole.begin(), whole.begin() + sizeof(Header)});
  std::vector<uint8_t> changed = whole;
  changed.push_back(0);
  refused("one byte long", changed);
  for (size_t i = 0; i < sizeof(Header); ++i)
    for (const uint8_t bit : {1, 128}) {
      changed = whole;
      changed[i] = static_cast<uint8_t>(changed[i] ^ bit);
      refused(text("byte ", i, " of its header changed"), changed);
    }
}

void test_call_refusals() {
  SmallCase small;
  const PackedBytes packed(small.w.packed(8), Edge::end), as_floats(small.w.packed(16), Edge::end);
  Problem problem = small.problem(packed);
  problem.m = 0;
  begin("int4: no rows");
  int4::linear(problem);
  expect(std::all_of(small.y.begin(), small.y.end(), [](float v) { return v == 7.0f; }), "y was written to");
  const auto refused = [&](const char* what, auto&& change) {
    Problem changed = small.problem(packed);
    change(changed);
    refuses(text("int4: ", what), [&] { int4::linear(changed); });
  };
  refused("x of another k", [](Problem& p) { p.k = p.ldx = 64; });
  refused("another n", [](Problem& p) { p.n -= 1; });
  refused("int32 x", [](Problem& p) { p.x_type = Type::int32; });
  refused("int32 results", [](Problem& p) { p.y_type = Type::int32; });
  refused("a weight whose activations stay floats", [&](Problem& p) { p.packed = as_floats.data(); });
}

}  // namespace

void test_int4() {
  const std::vector<const int4::Kernel*> kernels = available();
  for (const int4::Kernel* kernel : kernels) run_kernel(*kernel);
  run_shapes(kernels);
  test_integers();
  test_budget();
  test_shallow();
  test_odd_rows();
  test_pack_refusals();
  test_buffer_refusals();
  test_call_refusals();
}

}  // namespace native
