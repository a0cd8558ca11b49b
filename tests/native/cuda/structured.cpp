// The CUDA 2:4 kernels' own source on the host: the packed layout against the figures of the PTX ISA, int8 to the bit
// against int64 and the specification's epilogue, floats to the bit where they are exact and inside the bound of
// csrc/sparse/structured/cuda.h where they are not.
#include "structured.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <random>
#include <set>

#include "common/activation.h"
#include "int8/kernel_list.h"

namespace native {

using pycompress::Scalar;
namespace {

using pycompress::sparse::cuda::bytes_of;
using pycompress::sparse::cuda::type_of;
using structured::Kernel;
using structured::Packed;

constexpr Element kElements[] = {Element::bfloat16, Element::float16, Element::int8};

int64_t row_bytes(int64_t k) { return (k + int8::cuda::kPadK - 1) / int8::cuda::kPadK * int8::cuda::kPadK; }

// The weight as pack() takes it.
template <class T>
std::vector<T> as(const std::vector<double>& weight) {
  std::vector<T> values(weight.size());
  std::transform(weight.begin(), weight.end(), values.begin(), [](double value) { return static_cast<T>(value); });
  return values;
}

int32_t pack(const std::vector<double>& weight, const Packed& shape, uint8_t* packed) {
  int32_t refused = 0;
  if (shape.element == Element::int8)
    structured::pack(as<int8_t>(weight).data(), shape, packed, &refused, nullptr);
  else
    structured::pack(as<float>(weight).data(), shape, packed, &refused, nullptr);
  return refused;
}

}  // namespace

StructuredCase::StructuredCase(Element element, int64_t m_, int64_t n, int64_t k, Content content, double share)
    : shape{n, k, element},
      m(m_),
      weight(size(n * k)),
      x(element == Element::int8 ? Type::bfloat16 : type_of(element), m, k, (8 - k % 8) % 8 + 8,
        content != Content::normal),
      s(size(is_int8() ? m * row_bytes(k) : 0)),
      row_scale(size(m)),
      scale(size(n)),
      bias(size(n)),
      zero_point(size(m)),
      packed(size(shape.bytes()), Edge::begin) {
  fill(content, share);
  packed.fill(emulate::kPoison);
  expect(pack(weight, shape, packed.data()) == 0 && packed.intact(), "pack");
}

void StructuredCase::fill(Content content, double share) {
  std::mt19937 random(static_cast<uint32_t>(m * 7919 + shape.n * 104729 + shape.k * 31));
  std::normal_distribution<double> normal;
  const auto within = [&](int low, int high) {
    return low + static_cast<int>(random() % static_cast<uint32_t>(high - low + 1));
  };
  const auto value = [&]() -> double {
    if (content == Content::extreme) return random() % 2 ? 127 : -127;
    if (content == Content::exact) return within(-127, 127);
    return static_cast<double>(half_value(half_bits(normal(random), type_of(shape.element)), type_of(shape.element)));
  };
  for (int64_t row = 0; row < shape.n; ++row)
    for (int64_t group = 0; group < shape.k; group += 4) {
      const auto count = static_cast<int>(random() % 1000 < share * 1000 ? 2 : random() % 2);
      for (int i = 0; i < count; ++i) {
        const int64_t k = group + static_cast<int64_t>(random() % 4);
        if (k < shape.k) weight[size(row * shape.k + k)] = value();
      }
    }
  for (size_t i = 0; i < s.size(); ++i)
    s[i] = static_cast<int8_t>(content == Content::extreme ? (random() % 2 ? 127 : -128) : within(-128, 127));
  for (size_t i = 0; i < row_scale.size(); ++i) {
    row_scale[i] = static_cast<float>(within(1, 1000)) * 1e-4f;
    zero_point[i] = within(0, 255);
  }
  for (size_t i = 0; i < bias.size(); ++i) {
    scale[i] = static_cast<float>(within(1, 1000)) * 1e-4f;
    bias[i] = static_cast<float>(within(-1000, 1000)) * 0.25f;
  }
}

std::string StructuredCase::name() const {
  return text("2:4 of element ", static_cast<int>(shape.element), " m=", m, " n=", shape.n, " k=", shape.k);
}

structured::Problem StructuredCase::problem(void* y) const {
  structured::Problem p{};
  p.x = x.data.data(), p.ldx = x.ldx, p.m = m, p.shape = shape, p.packed = packed.data();
  p.rows = {const_cast<int8_t*>(s.data()), const_cast<float*>(row_scale.data()),
            const_cast<int32_t*>(zero_point.data())};
  p.y = y, p.y_type = type_of(shape.element);
  return p;
}

double StructuredCase::sum(int64_t row, int64_t channel, double* magnitude) const {
  double total = 0, sizes = 0;
  for (int64_t i = 0; i < shape.k; ++i) {
    const double w = weight[size(channel * shape.k + i)];
    if (w == 0) continue;
    const double from = is_int8() ? s[size(row * row_bytes(shape.k) + i)] + 128 - zero_point[size(row)] : x.at(row, i);
    total += from * w;
    sizes += std::fabs(from * w);
  }
  if (magnitude != nullptr) *magnitude = sizes;
  return total;
}

namespace {

// --- the layout -----------------------------------------------------------------------------------------------------

// From the figures of the metadata (PTX ISA 9.7.14.6.1): the bits that lane `lane` of warp `warp` hands over for step
// `step` (32 halves or 64 int8) of 16 channels, as the sequence of its groups of four, from the lowest bits. Each is a
// channel and a position of the step.
struct Group {
  int channel, k;
};
std::vector<Group> groups_of(Element element, int lane) {
  const int g = lane / 4, t = lane % 4;
  std::vector<Group> groups;
  if (element == Element::int8) {  // threads 0 and 2 of each four: rows 0 to 7, columns from 0 and from 32
    for (int k = 0; k < 32; k += 4) groups.push_back({t % 2 == 0 ? g : g + 8, (t < 2 ? 0 : 32) + k});
    return groups;
  }
  for (const int channel : {g, g + 8})
    for (int k = 0; k < 16; k += 4) groups.push_back({channel, t % 2 * 16 + k});
  return groups;
}

void test_metadata(const StructuredCase& c) {
  begin(text("metadata of ", c.name()));
  const Packed& shape = c.shape;
  const int step_k = shape.element == Element::int8 ? 64 : 32, steps = shape.block_k() / step_k;
  const auto* words = reinterpret_cast<const uint32_t*>(c.packed.data() + shape.metadata());
  const uint8_t* values = c.packed.data() + shape.values();
  const auto stored = [&](int64_t channel, int64_t i) -> double {
    const uint8_t* row = values + channel * shape.value_stride();
    if (shape.element == Element::int8) return static_cast<int8_t>(row[i]);
    return static_cast<double>(half_value(reinterpret_cast<const uint16_t*>(row)[i], type_of(shape.element)));
  };
  int64_t wrong = 0, seen = 0;
  for (int64_t part = 0; part < shape.n_pad() / 64; ++part)
    for (int64_t block = 0; block < shape.blocks(); ++block)
      for (int warp = 0; warp < 4; ++warp)
        for (int lane = 0; lane < 32; ++lane)
          for (int step = 0; step < steps; ++step) {
            // Of halves two lanes in four have a step, which selector 0 or 1 names.
            if (shape.element != Element::int8 && lane % 4 / 2 != step % 2) continue;
            const int64_t at = ((part * shape.blocks() + block) * 4 + warp) * 32 + lane;
            uint32_t bits = words[at * shape.words() + (shape.element == Element::int8 ? step : step / 2)];
            for (const Group& group : groups_of(shape.element, lane)) {
              const uint32_t first = bits & 3, second = bits >> 2 & 3;
              bits >>= 4;
              ++seen;
              wrong += first >= second;
              const int64_t channel = part * 64 + warp * 16 + group.channel;
              const int64_t k = block * shape.block_k() + step * step_k + group.k;
              for (uint32_t i = 0; i < 4; ++i) {
                const double expected =
                    channel < shape.n && k + i < shape.k ? c.weight[size(channel * shape.k + k + i)] : 0;
                const double got = i == first ? stored(channel, k / 2) : i == second ? stored(channel, k / 2 + 1) : 0;
                wrong += expected != got;
              }
            }
          }
  expect(seen == shape.n_pad() * shape.k_pad() / 4, text(seen, " groups"));
  expect(wrong == 0, text(wrong, " of ", seen, " groups are wrong"));
}

void test_unpack(const StructuredCase& c) {
  begin(text("unpack ", c.name()));
  const auto check = [&](auto zero) {
    using T = decltype(zero);
    Guarded<T> back(c.weight.size());
    back.fill(emulate::kPoison);
    structured::unpack(c.packed.data(), c.shape, back.data(), nullptr);
    const std::vector<T> expected = as<T>(c.weight);
    expect(std::equal(expected.begin(), expected.end(), back.data()) && back.intact(), "another weight");
  };
  if (!c.is_int8()) return check(float{});
  check(int8_t{});
  for (int64_t channel = 0; channel < c.shape.n_pad(); ++channel) {
    int32_t sum = 0;
    double expected = 0;
    std::memcpy(&sum, c.packed.data() + channel * 4, 4);
    for (int64_t i = 0; i < c.shape.k && channel < c.shape.n; ++i) expected += c.weight[size(channel * c.shape.k + i)];
    expect(sum == expected, text("column sum ", channel));
  }
}

// Every set of positions that a group can have: two or fewer are packed, more are refused; and values that the type has
// not.
void test_groups(Element element) {
  for (uint32_t mask = 0; mask < 16; ++mask) {
    begin(text("2:4 group ", mask, " of element ", static_cast<int>(element)));
    const Packed shape{3, 21, element};
    std::vector<double> weight(size(shape.n * shape.k));
    for (int i = 0; i < 4; ++i) weight[size(shape.k + 8 + i)] = mask >> i & 1 ? 3 - i * 2 : 0;
    std::vector<uint8_t> packed(size(shape.bytes()));
    const int32_t refused = pack(weight, shape, packed.data());
    const auto count = __builtin_popcount(mask);
    expect(refused == (count > 2 ? structured::kTooMany : 0), text(refused));
    if (count > 2) continue;
    const uint32_t pair = structured::pair_of(mask);
    expect((pair & 3) < pair >> 2 && pair < 16, text("pair ", pair));
    expect((mask & ~(1u << (pair & 3) | 1u << (pair >> 2))) == 0, text("pair ", pair, " leaves a value out"));
  }
  begin(text("values that element ", static_cast<int>(element), " has not"));
  const Packed shape{1, 4, element};
  std::vector<uint8_t> packed(size(shape.bytes()));
  for (const double value : element == Element::int8       ? std::vector<double>{-128}
                            : element == Element::bfloat16 ? std::vector<double>{257, 1e-42}
                                                           : std::vector<double>{2049, 65536, 0x1p-25})
    expect(pack({0, value, 0, 0}, shape, packed.data()) == structured::kNotOfType, text(value));
  for (const double value : element == Element::int8 ? std::vector<double>{-127, 127} : std::vector<double>{256, -0.5})
    expect(pack({0, value, 0, 0}, shape, packed.data()) == 0, text(value));
}

void test_lengths() {
  begin("2:4: the packed length");
  for (const int64_t n : {1, 128, 129, 4096})
    for (const int64_t k : {1, 5, 127, 128, 129, 4096, 65536})
      for (const Element element : kElements) {
        const Packed shape{n, k, element};
        const int64_t bytes = shape.bytes();
        const std::string which = text("n ", n, " k ", k, " element ", static_cast<int>(element));
        structured::check_packed(shape, bytes);
        refuses(text("another n: ", which), [&] { structured::check_packed({n + 128, k, element}, bytes); });
        refuses(text("another length: ", which), [&] { structured::check_packed(shape, bytes + 1); });
      }
  const auto of_k = [](int64_t k) {
    const Packed shape{1, k, Element::int8};
    structured::check_packed(shape, shape.bytes());
  };
  refuses("2:4: k = 65537", [&] { of_k(65537); });
  refuses("2:4: k = 0", [&] { of_k(0); });
}

// --- dispatch -------------------------------------------------------------------------------------------------------

void test_dispatch() {
  for (const Element element : kElements)
    for (const int arch : {80, 86, 89, 90, 100, 120})
      for (const int64_t m : {1, 16, 17, 64, 129, 512, 8192})
        for (const int64_t n : {1, 100, 4096}) {
          begin(text("2:4 dispatch element=", static_cast<int>(element), " arch=", arch, " m=", m, " n=", n));
          const Kernel& kernel = structured::chosen_kernel({n, 4096, element}, m, arch, 108);
          expect(kernel.element == element && structured::runs_on(kernel, arch), kernel.name);
          expect(m > 16 || kernel.bm <= 64, text(kernel.name, " wastes most of its rows"));
          expect(m * n < 4096 * 4096 || kernel.bm * kernel.bn >= 128 * 128, text(kernel.name, " is too small"));
        }
  refuses("2:4 dispatch: compute capability 7.5",
          [] { structured::chosen_kernel({64, 64, Element::int8}, 1, 75, 40); });
  refuses("2:4 dispatch: an unknown name", [] { structured::kernel_named("sm80_bf16_1x1"); });
}

void test_refused() {
  const StructuredCase c(Element::bfloat16, 3, 5, 32), integers(Element::int8, 3, 5, 32);
  std::vector<uint16_t> y(15);
  std::vector<float> floats(15);
  structured::Problem p = c.problem(y.data()), q = integers.problem(floats.data());
  emulate::options.arch = 89;
  const auto refuses_changed = [&](const std::string& what, const structured::Problem& good, auto change) {
    refuses(text("2:4: ", what), [&] {
      structured::Problem bad = good;
      change(bad);
      structured::linear(bad);
    });
  };
  refuses_changed("x that is not aligned", p, [](auto& bad) { bad.x = static_cast<const uint8_t*>(bad.x) + 2; });
  refuses_changed("rows that are not aligned", p, [](auto& bad) { bad.ldx = 33; });
  refuses_changed("a packed weight that is not aligned", p, [](auto& bad) { bad.packed += 8; });
  refuses_changed("y of another type", p, [](auto& bad) { bad.y_type = Type::float16; });
  refuses_changed("float y without a scale", q, [](auto& bad) { bad.y_type = Type::float32; });
  refuses_changed("sums with a scale", q, [&](auto& bad) { bad.scale = integers.scale.data(); });
  refuses("2:4: a kernel of other values", [&] { structured::linear(p, &structured::kernel_named("sm80_f16_64x64")); });
  refuses("2:4: a kernel that needs more shared memory",
          [&] { structured::linear(p, &structured::kernel_named("sm80_bf16_256x128")); });
  begin("2:4: linear");
  structured::linear(p);
  for (int i = 0; i < 15; ++i) expect(y[size(i)] == half_bits(c.sum(i / 5, i % 5), Type::bfloat16), text("value ", i));
  p.m = 0, p.x = nullptr;
  structured::linear(p);  // no rows: nothing to do
  emulate::options = {};
}

// --- kernels --------------------------------------------------------------------------------------------------------

// Halves to the bit, of exact sums.
void check_halves(const Kernel& kernel, const StructuredCase& c, Activation activation, bool bias, size_t gap = 0) {
  begin(text(kernel.name, " ", c.name(), " activation=", static_cast<int>(activation), " bias=", bias, " gap=", gap));
  const Type type = type_of(kernel.element);
  Guarded<uint16_t> y(size(c.m * c.shape.n), Edge::end, gap);
  y.fill(emulate::kPoison);
  structured::Problem p = c.problem(y.data());
  p.activation = activation;
  if (bias) p.bias = c.bias.data();
  kernel.run(p);
  int64_t wrong = 0;
  for (int64_t row = 0; row < c.m; ++row)
    for (int64_t i = 0; i < c.shape.n; ++i) {
      const float v = static_cast<float>(c.sum(row, i)) + (bias ? c.bias[size(i)] : 0.0f);
      const float expected = activate(activation, Scalar{v}).value;
      wrong += y[size(row * c.shape.n + i)] != half_bits(static_cast<double>(expected), type);
    }
  expect(wrong == 0, text(wrong, " of ", y.size(), " values differ"));
  expect(y.intact(), "a store outside of y");
}

void check_sums(const Kernel& kernel, const StructuredCase& c) {
  begin(text(kernel.name, " ", c.name(), " sums"));
  Guarded<int32_t> y(size(c.m * c.shape.n));
  y.fill(emulate::kPoison);
  kernel.run(c.problem(y.data()));
  int64_t wrong = 0;
  for (int64_t row = 0; row < c.m; ++row)
    for (int64_t i = 0; i < c.shape.n; ++i) wrong += y[size(row * c.shape.n + i)] != c.sum(row, i);
  expect(wrong == 0, text(wrong, " of ", y.size(), " sums differ from int64"));
  expect(y.intact(), "a store outside of y");
}

// int8 against the specification's epilogue, to the bit.
void check_int8(const Kernel& kernel, const StructuredCase& c, Activation activation, Type type, bool bias) {
  begin(text(kernel.name, " ", c.name(), " activation=", static_cast<int>(activation), " type=", static_cast<int>(type),
             " bias=", bias));
  const size_t bytes = size(c.m * c.shape.n) * size_of(type);
  Guarded<uint8_t> y(bytes), expected(bytes);
  y.fill(emulate::kPoison);
  structured::Problem p = c.problem(y.data());
  p.activation = activation, p.y_type = type, p.scale = c.scale.data();
  if (bias) p.bias = c.bias.data();
  kernel.run(p);
  std::vector<int32_t> sums;
  for (int64_t row = 0; row < c.m; ++row)
    for (int64_t i = 0; i < c.shape.n; ++i) sums.push_back(static_cast<int32_t>(c.sum(row, i)));
  const std::vector<int32_t> corrected(size(c.shape.n), 0);  // the sums have the zero point in them
  const int8::Epilogue epilogue{corrected.data(),    p.scale,    p.bias, 0, c.row_scale.data(),
                                c.zero_point.data(), activation, type};
  int8::kScalar.finish(sums.data(), static_cast<int>(c.shape.n), static_cast<int>(c.m), static_cast<int>(c.shape.n),
                       epilogue, expected.data(), c.shape.n);
  expect(std::equal(y.data(), y.data() + bytes, expected.data()), "y differs from the specification's");
  expect(y.intact(), "a store outside of y");
}

// Random values: within the bound; the same bits in any order of threads and blocks.
void check_bound(const Kernel& kernel, const StructuredCase& c) {
  begin(text(kernel.name, " ", c.name(), " against float64"));
  const Type type = type_of(kernel.element);
  const auto run = [&] {
    Guarded<uint16_t> y(size(c.m * c.shape.n));
    y.fill(emulate::kPoison);
    structured::Problem p = c.problem(y.data());
    p.bias = c.bias.data();
    kernel.run(p);
    return std::vector<uint16_t>(y.data(), y.data() + y.size());
  };
  const std::vector<uint16_t> y = run();
  const double steps = static_cast<double>(c.shape.k_pad()) / 32, eps = unit_roundoff(type);
  int64_t wrong = 0;
  for (int64_t row = 0; row < c.m; ++row)
    for (int64_t i = 0; i < c.shape.n; ++i) {
      double magnitude;
      const double bias = static_cast<double>(c.bias[size(i)]), expected = c.sum(row, i, &magnitude) + bias;
      const double bound = 0x1p-23 * 17 * (steps + 1) * magnitude + eps * (std::fabs(expected) + std::fabs(bias));
      const double got = static_cast<double>(half_value(y[size(row * c.shape.n + i)], type));
      wrong += !(std::fabs(got - expected) <= bound);
    }
  expect(wrong == 0, text(wrong, " values outside the bound"));
  for (const emulate::Order order : {emulate::Order::descending, emulate::Order::random}) {
    emulate::options.threads = order;
    emulate::options.reversed_blocks = order == emulate::Order::descending;
    expect(run() == y, "other bits in another order of threads and blocks");
  }
  emulate::options = {};
}

void check_plain(const Kernel& kernel, const StructuredCase& c) {
  if (kernel.element == Element::int8)
    check_sums(kernel, c);
  else
    check_halves(kernel, c, Activation::none, false);
}

}  // namespace

void check_structured_kernel(const Kernel& kernel) {
  const Element element = kernel.element;
  const bool is_int8 = element == Element::int8;
  const auto edges = [](int tile) { return std::set<int64_t>{1, tile - 1, tile, tile + 1, 2 * tile + 3}; };
  const int block = Packed{1, 1, element}.block_k();
  if (element != Element::float16) {  // which differs from bfloat16 in its instruction and its rounding alone
    for (const int64_t m : edges(kernel.bm)) check_plain(kernel, {element, m, 19, 40});
    for (const int64_t n : edges(kernel.bn)) check_plain(kernel, {element, 9, n, 70});
    for (const int64_t k : edges(block)) check_plain(kernel, {element, 7, 24, k});
  }
  const int64_t deep = int64_t{block} * (kernel.stages + 2) + 5;  // the ring goes round
  check_plain(kernel, {element, kernel.bm + 1, kernel.bn + 2, deep});
  const StructuredCase vectors(element, 11, 44, 65),
      odd(element, 5, 7, deep, is_int8 ? Content::extreme : Content::exact);
  for (int activation = 0; activation < 6; ++activation)
    for (const bool bias : {false, true}) {
      const StructuredCase& c = (activation + bias) % 2 ? vectors : odd;
      if (!is_int8)
        check_halves(kernel, c, static_cast<Activation>(activation), bias);
      else
        for (const Type type : {Type::float32, Type::bfloat16, Type::float16})
          check_int8(kernel, c, static_cast<Activation>(activation), type, bias);
    }
  if (is_int8) {
    check_sums(kernel, odd);
    check_int8(kernel, vectors, Activation::none, Type::bfloat16, false);
  } else {
    check_halves(kernel, vectors, Activation::none, true, 2);  // y is not aligned to four values
    check_bound(kernel, {element, 9, 30, deep, Content::normal, 0.9});
  }
}

void test_cuda_structured_layout() {
  for (const Element element : kElements) {
    test_groups(element);
    for (const int64_t n : {1, 64, 130})
      for (const int64_t k : {1, 7, 128, 260, 513}) {
        const StructuredCase c(element, 1, n, k);
        test_metadata(c);
        test_unpack(c);
      }
  }
  test_lengths();
  test_dispatch();
  test_refused();
}

void test_cuda_structured() {
  int count = 0;
  const Kernel* all = structured::kernels(&count);
  for (int i = 0; i < count; ++i) check_structured_kernel(all[i]);
}

}  // namespace native
