// sparse_linear end to end, in every format: against double and int64, its packed weight back to mask and values, the
// same bits on any number of threads, and what it refuses.
#include <cfloat>

#include "addend.h"
#include "int8/kernel_list.h"
#include "int8/pack.h"
#include "sparse/kernel_list.h"
#include "sparse_weight.h"

namespace native {
namespace {

using namespace pycompress;
using namespace pycompress::sparse;

constexpr Format kAll[] = {Format::rows,   Format::panels,  Format::quads,
                           Format::quads4, Format::windows, Format::chains};

struct Case {
  Format format;
  int m, n, k;
  Mask mask;
  Values values;
  int activation_bits;
  Type x_type, y_type;
  Activation activation;
  bool has_bias;
  int number;  // decides alignment, row stride and every value

  std::string name() const {
    return text("format=", format_name(format), " m=", m, " n=", n, " k=", k, " mask=", mask.name(),
                " values=", name_of(values), " activation_bits=", activation_bits, " x_type=", static_cast<int>(x_type),
                " y_type=", static_cast<int>(y_type), " activation=", static_cast<int>(activation), " bias=", has_bias,
                " case=", number);
  }
  Edge edge() const { return number % 2 ? Edge::begin : Edge::end; }
  size_t gap() const { return static_cast<size_t>(number / 2 % 3); }
  size_t results() const { return static_cast<size_t>(m) * static_cast<size_t>(n); }
};

Problem problem_of(const Case& c, const Guarded<uint8_t>& packed, const Input& x) {
  Problem problem{};
  problem.x = x.data();
  problem.x_type = x.type();
  problem.m = c.m, problem.k = c.k, problem.ldx = x.ldx(), problem.n = c.n;
  problem.packed = packed.data();
  problem.packed_bytes = static_cast<int64_t>(packed.size());
  problem.threads = 1;
  return problem;
}

void check_unpack(const Case& c, const Weight& w, const Guarded<uint8_t>& packed) {
  Guarded<uint8_t> mask(w.mask.size(), c.edge());
  const size_t size = is_float(c.format) ? 4 : 1;
  Guarded<uint8_t> values(w.nonzeros() * size);
  unpack(packed.data(), static_cast<int64_t>(packed.size()), mask.data(), values.data());
  const void* expected = is_float(c.format) ? static_cast<const void*>(w.floats.data()) : w.ints.data();
  expect(std::equal(w.mask.begin(), w.mask.end(), mask.data()) && mask.intact(), "unpacked mask");
  expect(values.size() == 0 || std::memcmp(values.data(), expected, values.size()) == 0, "unpacked values");
}

// --- the sums: no bias, no activation -------------------------------------------------------------------------------

void check_float_sums(const Case& c, const Weight& w, const Input& x, const float* y) {
  bool within = true;
  std::vector<double> row(static_cast<size_t>(c.k));
  for (int m = 0; m < c.m; ++m) {
    for (int i = 0; i < c.k; ++i) row[static_cast<size_t>(i)] = x.at(m, i);
    for (size_t channel = 0; channel < static_cast<size_t>(c.n); ++channel) {
      double exact = 0, magnitude = 0;
      for (size_t i = w.rows[channel]; i < w.rows[channel + 1]; ++i) {
        const double product = row[w.columns[i]] * static_cast<double>(w.floats[i]);
        exact += product;
        magnitude += std::fabs(product);
      }
      const auto stored = static_cast<double>(w.rows[channel + 1] - w.rows[channel]);
      const double error = std::fabs(static_cast<double>(*y++) - exact);
      within = within && error <= static_cast<double>(FLT_EPSILON) * (stored + 2) * magnitude;
    }
  }
  expect(within, "sums");
}

// What the specification quantizes x to.
struct Quantized {
  std::vector<uint8_t> q;
  std::vector<float> scale;
  std::vector<int32_t> zero_point;
  Quantized(const Case& c, const Input& x)
      : q(static_cast<size_t>(c.m) * static_cast<size_t>(c.k)),
        scale(static_cast<size_t>(c.m)),
        zero_point(static_cast<size_t>(c.m)) {
    int8::quantize(int8::kScalar, x.data(), x.type(), c.m, c.k, x.ldx(), c.activation_bits, nullptr, q.data(),
                   scale.data(), zero_point.data());
  }
};

void check_int8_sums(const Case& c, const Weight& w, const Quantized& x, const int32_t* y) {
  bool equal = true;
  for (size_t m = 0; m < static_cast<size_t>(c.m); ++m) {
    const uint8_t* q = x.q.data() + m * static_cast<size_t>(c.k);
    for (size_t channel = 0; channel < static_cast<size_t>(c.n); ++channel) {
      int64_t sum = 0;
      for (size_t i = w.rows[channel]; i < w.rows[channel + 1]; ++i)
        sum += (int64_t{q[w.columns[i]]} - x.zero_point[m]) * w.ints[i];
      equal = equal && sum == *y++;
    }
  }
  expect(equal, "sums");
}

// The same bits on 2 and 3 threads, where the work is enough for more than one.
void check_threads(const Case& c, Problem problem, const Guarded<int32_t>& expected) {
  if (2.0 * c.m * c.n * c.k < 1e5) return;
  Guarded<int32_t> y(expected.size());
  problem.y = y.data();
  for (const int threads : {2, 3}) {
    y.fill(0x55);
    problem.threads = threads;
    linear(problem);
    expect(std::memcmp(y.data(), expected.data(), y.bytes()) == 0, text(threads, " threads"));
  }
}

// Packed on more threads the blocks may differ, the sums may not.
void check_packed_on_threads(const Case& c, const Weight& w, Problem problem, const Guarded<int32_t>& expected) {
  const std::vector<uint8_t> buffer = packed_of(c.format, w, c.activation_bits, 5);
  Guarded<uint8_t> packed(buffer.size());
  std::memcpy(packed.data(), buffer.data(), buffer.size());
  check_unpack(c, w, packed);
  Guarded<int32_t> y(expected.size());
  problem.y = y.data();
  problem.packed = packed.data();
  problem.packed_bytes = static_cast<int64_t>(packed.size());
  linear(problem);
  expect(y.size() == 0 || std::memcmp(y.data(), expected.data(), y.bytes()) == 0, "packed on 5 threads");
}

// --- bias, activation and type, from the sums that linear() itself gave
// ------------------------------------------------

struct Epilogue {
  Guarded<float> bias, weight_scale;
  Epilogue(const Case& c, std::mt19937& random) : bias(static_cast<size_t>(c.n)), weight_scale(bias.size()) {
    for (size_t i = 0; i < bias.size(); ++i) {
      bias[i] = std::normal_distribution<float>()(random);
      weight_scale[i] = 1e-3f * static_cast<float>(1 + random() % 7);
    }
  }
};

// bias [n], or with a stride of n the rows of a matrix.
std::vector<uint8_t> expected_results(const Case& c, const Epilogue& e, const float* bias, int bias_stride,
                                      const Guarded<int32_t>& sums, const Quantized* x) {
  std::vector<uint8_t> y(c.results() * size_of(c.y_type));
  if (x != nullptr) {
    const std::vector<int32_t> zeros(static_cast<size_t>(std::max(c.m, c.n)), 0);  // the sums are without them already
    int8::kScalar.finish(
        sums.data(), c.n, c.m, c.n,
        {zeros.data(), e.weight_scale.data(), bias, bias_stride, x->scale.data(), zeros.data(), c.activation, c.y_type},
        y.data(), c.n);
    return y;
  }
  std::vector<int32_t> turned(sums.size());
  for (size_t i = 0; i < sums.size(); ++i)
    turned[i % static_cast<size_t>(c.n) * static_cast<size_t>(c.m) + i / static_cast<size_t>(c.n)] = sums[i];
  kScalarRows.finish(turned.data(), c.m, c.m, c.n,
                     {nullptr, nullptr, bias, bias_stride, nullptr, nullptr, c.activation, c.y_type}, y.data(), c.n);
  return y;
}

void check_results(const Case& c, Problem problem, const Epilogue& e, const Guarded<int32_t>& sums,
                   const Quantized* x) {
  Guarded<uint8_t> y(c.results() * size_of(c.y_type), c.edge(), c.gap() * size_of(c.y_type));
  Guarded<float> row_scale(static_cast<size_t>(c.m));
  Guarded<int32_t> zero_point(static_cast<size_t>(c.m));
  problem.y = y.data();
  problem.y_type = c.y_type;
  problem.bias = c.has_bias ? e.bias.data() : nullptr;
  problem.activation = c.activation;
  if (x != nullptr) {
    problem.weight_scale = e.weight_scale.data();
    problem.row_scale = row_scale.data();
    problem.zero_point = zero_point.data();
  }
  linear(problem);
  const std::vector<uint8_t> expected = expected_results(c, e, problem.bias, 0, sums, x);
  expect(same(y.data(), expected.data(), c.y_type, c.results()) && y.intact(), "results");
  if (x == nullptr) return;
  expect(std::equal(x->scale.begin(), x->scale.end(), row_scale.data()), "row scale");
  expect(std::equal(x->zero_point.begin(), x->zero_point.end(), zero_point.data()), "zero point");
}

// Rows that were quantized before the call. Only the chains of 8-bit activations need them in another shape.
struct Rows {
  Guarded<uint8_t> bytes;
  Guarded<float> scale;
  Guarded<int32_t> zero_point;
  int8::Quantized quantized;
  bool fits;

  Rows(const Case& c, const Input& x)
      : bytes(static_cast<size_t>(c.m * int8::ActivationShape{c.k, 1}.stride())),
        scale(static_cast<size_t>(c.m)),
        zero_point(static_cast<size_t>(c.m)),
        quantized{{c.k, 1}, c.activation_bits, bytes.data(), scale.data(), zero_point.data()},
        fits(!is_float(c.format) && (c.format != Format::chains || c.activation_bits == 7)) {
    int8::kScalar.quantize(x.data(), c.x_type, x.ldx(), c.m, quantized.shape, (1 << c.activation_bits) - 1, nullptr,
                           bytes.data(), scale.data(), zero_point.data());
  }
};

// A matrix instead of the bias, and rows quantized before the call.
void check_addend(const Case& c, Problem problem, const Epilogue& e, const Guarded<int32_t>& sums, const Quantized* x,
                  const Input& input, std::mt19937& random) {
  if (c.m == 0) return;
  const Summand summand(c.m, c.n, kPanel, c.number % 3 != 0, random);
  const int8::Addend addend = summand.addend();
  const Rows rows(c, input);
  Guarded<uint8_t> y(c.results() * size_of(c.y_type), c.edge(), c.gap() * size_of(c.y_type));
  problem.y = y.data();
  problem.y_type = c.y_type;
  problem.activation = c.activation;
  problem.weight_scale = x == nullptr ? nullptr : e.weight_scale.data();
  problem.addend = &addend;
  problem.quantized = &rows.quantized;
  problem.x = rows.fits ? nullptr : input.data();
  problem.threads = 1 + c.number % 3;
  linear(problem);
  const std::vector<uint8_t> expected = expected_results(c, e, summand.data(), c.n, sums, x);
  expect(same(y.data(), expected.data(), c.y_type, c.results()) && y.intact(), "addend");
}

void run(const Case& c) {
  begin(c.name());
  std::mt19937 random(static_cast<unsigned>(c.number));
  const Weight w = make_weight(c.n, c.k, c.mask, c.values, is_float(c.format), random);
  const std::vector<uint8_t> buffer = packed_of(c.format, w, c.activation_bits);
  Guarded<uint8_t> packed(buffer.size(), c.edge(), 8 * c.gap());
  std::memcpy(packed.data(), buffer.data(), buffer.size());
  check_unpack(c, w, packed);

  Input x(c.x_type, c.m, c.k, c.k + c.number % 4, c.edge(), c.gap());
  x.fill(c.m, c.values, random);
  Guarded<int32_t> sums(c.results(), c.edge());
  Problem problem = problem_of(c, packed, x);
  problem.y = sums.data();
  problem.y_type = is_float(c.format) ? Type::float32 : Type::int32;
  linear(problem);
  expect(sums.intact(), "writes beside y");
  check_threads(c, problem, sums);
  if (c.number % 8 == 0) check_packed_on_threads(c, w, problem, sums);
  const Epilogue epilogue(c, random);
  if (is_float(c.format)) {
    check_float_sums(c, w, x, reinterpret_cast<const float*>(sums.data()));
    check_results(c, problem, epilogue, sums, nullptr);
    check_addend(c, problem, epilogue, sums, nullptr, x, random);
  } else {
    const Quantized quantized(c, x);
    check_int8_sums(c, w, quantized, sums.data());
    check_results(c, problem, epilogue, sums, &quantized);
    check_addend(c, problem, epilogue, sums, &quantized, x, random);
  }
}

// --- shapes ---------------------------------------------------------------------------------------------------------

// What is not given takes turns, so that a run of cases meets every combination of two.
Case case_of(Format format, int m, int n, int k, const Mask& mask) {
  const int turn = cases;
  return {format,
          m,
          n,
          k,
          mask,
          static_cast<Values>(turn / 3 % kValues),
          7 + turn / 7 % 2,
          static_cast<Type>(turn / 2 % 3),
          static_cast<Type>(turn / 5 % 3),
          static_cast<Activation>(turn % 5),
          turn / 4 % 3 != 0,
          turn};
}

void run_shapes(Format format) {
  constexpr int kMs[] = {0, 1, 2, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 100, 129};
  constexpr int kNs[] = {1, 15, 16, 17, 48, 97, 300};
  constexpr int kKs[] = {1, 3, 4, 5, 8, 31, 32, 33, 95, 96, 97, 128, 129, 255, 256, 257, 385, 769, 1025};
  constexpr Mask kMasks[] = {{1, 1, 0.2},     {1, 1, 0.5},     {16, 1, 0.4},    {1, 1, 0.03},
                             {1, 1, 1},       {1, 1, 0},       {16, 4, 0.3},    {1, 4, 0.3},
                             {1, 1, 0.9},     {1, 1, 1, 2, 4}, {1, 1, 1, 4, 8}, {1, 1, 0.1, 0, 0, true},
                             {1, 1, 1, 4, 16}};
  int turn = 0;
  const auto next = [&](int m, int n, int k) { run(case_of(format, m, n, k, kMasks[turn++ % 13])); };
  for (const int m : kMs)
    for (const int k : kKs) {
      const int n = kNs[turn % 7];
      next(m, m * n * k > 2000000 ? 17 : n, k);
    }
  for (const int n : kNs)
    for (const int k : kKs) next(kMs[turn % 12], n, k);
  for (const Mask& mask : kMasks) run(case_of(format, 129, 97, 385, mask));  // enough for several threads
  next(65, 1100, 97);  // sums of all channels that do not fit the cache together
  next(3, 1100, 97);
  next(100, 300, 2051);
}

// Each N of M, with every kind of value.
void run_n_of_m(Format format) {
  for (const int of : {4, 8, 16})
    for (int keep = 1; keep <= of; ++keep)
      for (const int bits : {7, 8}) {
        Case c = case_of(format, 9, 33, 150, {1, 1, 1, keep, of});
        c.activation_bits = bits;
        c.values = static_cast<Values>((keep + 2 * bits) % kValues);
        run(c);
      }
}

// The longest rows there are, all weights and activations at their largest: the 32-bit sums just hold them.
void run_longest(Format format) {
  for (const int bits : {7, 8}) {
    Case c = case_of(format, 2, 2, static_cast<int>(kMaxK), {});
    c.activation_bits = bits;
    c.values = Values::runs;
    run(c);
  }
}

// --- NaN and Inf
// ------------------------------------------------------------------------------------------------------

// They show where a weight meets them and nowhere else; in panels that are full, as they are wherever they are chosen.
void run_not_finite(Format format, int m, double density) {
  begin(text("format=", format_name(format), " m=", m, " density=", density));
  constexpr int kN = 50, kK = 300;
  std::mt19937 random(static_cast<unsigned>(m));
  const Mask mask{format == Format::panels ? kPanel : 1, 1, density};
  const Weight w = make_weight(kN, kK, mask, Values::gaussian, true, random);
  const std::vector<uint8_t> buffer = packed_of(format, w, 0);
  Guarded<uint8_t> packed(buffer.size());
  std::memcpy(packed.data(), buffer.data(), buffer.size());
  Input x(Type::float32, m, kK, kK, Edge::end, 0);
  x.fill(m, Values::gaussian, random);
  std::vector<size_t> position;  // of the one value of each row that is not finite
  for (int row = 0; row < m; ++row) {
    constexpr float kBad[] = {NAN, INFINITY, -INFINITY};
    position.push_back(random() % kK);
    x.set(row, static_cast<int>(position.back()), kBad[row % 3]);
  }
  Guarded<float> y(static_cast<size_t>(m) * kN);
  Case c = case_of(format, m, kN, kK, mask);
  Problem problem = problem_of(c, packed, x);
  problem.y = y.data();
  linear(problem);
  bool right = true;
  for (size_t row = 0; row < static_cast<size_t>(m); ++row)
    for (size_t channel = 0; channel < kN; ++channel) {
      const auto begin = w.columns.begin() + static_cast<ptrdiff_t>(w.rows[channel]);
      const auto end = w.columns.begin() + static_cast<ptrdiff_t>(w.rows[channel + 1]);
      right = right && std::isfinite(y[row * kN + channel]) != std::binary_search(begin, end, position[row]);
    }
  expect(right, "NaN and Inf");
}

// --- what is refused
// ----------------------------------------------------------------------------------------------------

// A small weight in a format, and a call that works until something in it is changed.
struct Call {
  Format format;
  std::mt19937 random{1};
  Weight w;
  std::vector<uint8_t> packed;
  std::vector<float> x, y, scale, bias;

  explicit Call(Format which) : format(which) {
    w = make_weight(5, 20, {1, 1, 0.5}, Values::gaussian, is_float(format), random);
    packed = packed_of(format, w, 8);
    x.assign(2 * 20, 1.0f), y.assign(2 * 5, 0.0f), scale.assign(5, 1.0f), bias.assign(5, 1.0f);
  }
  Problem problem() const {
    return {x.data(),
            Type::float32,
            2,
            20,
            20,
            packed.data(),
            static_cast<int64_t>(packed.size()),
            5,
            is_float(format) ? nullptr : scale.data(),
            bias.data(),
            Activation::none,
            const_cast<float*>(y.data()),
            Type::float32,
            nullptr,
            nullptr,
            1};
  }
  std::vector<uint8_t> pack_as(int64_t n, int64_t k, int64_t nonzeros, int activation_bits) const {
    const void* values = is_float(format) ? static_cast<const void*>(w.floats.data()) : w.ints.data();
    return pack(format, w.mask.data(), values, n, k, nonzeros, activation_bits, 1);
  }
};

void test_pack_refusals(const Call& call, const std::string& name) {
  const auto nonzeros = static_cast<int64_t>(call.w.nonzeros());
  const int bits = is_float(call.format) ? 0 : 8;
  refuses(name + " mask with a value too few", [&] { call.pack_as(5, 20, nonzeros - 1, bits); });
  refuses(name + " mask with a value too many", [&] { call.pack_as(5, 20, nonzeros + 1, bits); });
  refuses(name + " n = 0", [&] { call.pack_as(0, 20, nonzeros, bits); });
  refuses(name + " k = 0", [&] { call.pack_as(5, 0, nonzeros, bits); });
  refuses(name + " k over the largest", [&] { call.pack_as(5, kMaxK + 1, nonzeros, bits); });
  refuses(name + " activation_bits 6", [&] { call.pack_as(5, 20, nonzeros, 6); });
  refuses(name + " activation_bits of the other type", [&] { call.pack_as(5, 20, nonzeros, bits == 0 ? 8 : 0); });
  refuses(name + " values of the other type",
          [&] { format_for(format_name(call.format), call.w.mask.data(), 5, 20, !is_float(call.format)); });
}

void test_buffer_refusals(const Call& call, const std::string& name) {
  std::vector<uint8_t> mask(call.w.mask.size());
  std::vector<float> values(5 * 20);
  const auto refused = [&](const std::string& what, const std::vector<uint8_t>& bytes) {
    const auto size = static_cast<int64_t>(bytes.size());
    refuses(name + what + ", unpack", [&] { unpack(bytes.data(), size, mask.data(), values.data()); });
    Problem problem = call.problem();
    problem.packed = bytes.data();
    problem.packed_bytes = size;
    refuses(name + what + ", linear", [&] { linear(problem); });
  };
  const auto without = [&](size_t bytes) {
    return std::vector<uint8_t>(call.packed.begin(), call.packed.end() - bytes);
  };
  refused(" empty", {});
  refused(" one byte short", without(1));
  refused(" half a header", without(call.packed.size() - sizeof(Header) / 2));
  refused(" a header alone", without(call.packed.size() - sizeof(Header)));
  std::vector<uint8_t> changed = call.packed;
  changed.push_back(0);
  refused(" one byte long", changed);
  for (size_t i = 0; i < sizeof(Header); ++i) {
    changed = call.packed;
    changed[i] ^= 1;
    refused(text(" header byte ", i, " changed"), changed);
  }
  if (!is_delegated(call.format)) return;
  const Header& header = header_of(call.packed.data(), static_cast<int64_t>(call.packed.size()));
  for (const size_t i : {0, 9, 12, 16, 20, 36, 60}) {  // the header of the int8 op inside
    changed = call.packed;
    changed[header.blocks + i] ^= 1;
    refused(text(" inner header byte ", i, " changed"), changed);
  }
}

void test_call_refusals(const Call& call, const std::string& name) {
  const auto refused = [&](const char* what, const Problem& changed) {
    refuses(name + what, [&] { linear(changed); });
  };
  Problem problem = call.problem();
  linear(problem);  // it is fine as it is
  problem.k = problem.ldx = 19;
  refused(" x of another k", problem);
  problem = call.problem(), problem.n = 4;
  refused(" another n", problem);
  problem = call.problem(), problem.weight_scale = is_float(call.format) ? call.scale.data() : nullptr;
  refused(is_float(call.format) ? " a scale" : " no scale", problem);
  problem = call.problem(), problem.y_type = Type::int32;
  if (is_float(call.format)) refused(" int32 results", problem);
}

void test_refusals(Format format) {
  const std::string name = text("sparse ", format_name(format), ":");
  const Call call(format);
  test_pack_refusals(call, name);
  test_buffer_refusals(call, name);
  test_call_refusals(call, name);
}

// --- the choice of a format
// -------------------------------------------------------------------------------------------

// Whether a panel of 16 channels would store a zero.
bool has_holes(const Weight& w) {
  for (int first = 0; first < w.n; first += kPanel) {
    const int end = std::min(w.n, first + kPanel);
    std::vector<int> weights(static_cast<size_t>(w.k), 0);
    for (size_t i = w.rows[static_cast<size_t>(first)]; i < w.rows[static_cast<size_t>(end)]; ++i)
      ++weights[w.columns[i]];
    for (const int count : weights)
      if (count != 0 && count != end - first) return true;
  }
  return false;
}

void test_choice() {
  std::mt19937 random(1);
  for (const bool is_float32 : {true, false})
    for (const Mask& mask : {Mask{1, 1, 0}, Mask{1, 1, 1}, Mask{16, 1, 0.2}, Mask{16, 4, 0.2}, Mask{1, 4, 0.2},
                             Mask{1, 1, 0.05}, Mask{1, 1, 0.97}, Mask{1, 1, 1, 4, 16}})
      for (const int k : {1, 7, 8, 9, 100}) {
        begin(text("mask=", mask.name(), " k=", k, " float32=", is_float32));
        const Weight w = make_weight(33, k, mask, Values::gaussian, is_float32, random);
        Guarded<uint8_t> bits(w.mask.size());
        std::copy(w.mask.begin(), w.mask.end(), bits.data());
        const Format format = format_for("", bits.data(), 33, k, is_float32);
        const bool shows_nan = format == Format::panels && has_holes(w);  // where no weight is
        expect(is_float(format) == is_float32 && runs_here(format) && !shows_nan,
               text("the choice of ", format_name(format)));
      }
  refuses("sparse: a format of no known name", [] {
    const uint8_t mask = 1;
    format_for("columns", &mask, 1, 1, true);
  });
}

}  // namespace

void test_sparse_linear() {
  for (const Format format : kAll) {
    if (!runs_here(format)) {  // the formats of the AVX2 kernels, on other processors
      std::mt19937 random(1);
      refuses(text("format ", format_name(format), " without a kernel that runs"),
              [&] { packed_of(format, make_weight(3, 9, {}, Values::gaussian, false, random), 8); });
      continue;
    }
    run_shapes(format);
    if (!is_float(format)) run_n_of_m(format);
    run_longest(format);
    test_refusals(format);
  }
  for (const int m : {1, 2, 8, 17, 33, 65})
    for (const double density : {0.03, 0.3, 0.7})
      for (const Format format : {Format::rows, Format::panels}) run_not_finite(format, m, density);
  test_choice();
}

}  // namespace native
