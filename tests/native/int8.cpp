// Every int8 kernel against int64 arithmetic, and its packed layout back to the weights.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <random>
#include <vector>

#include "addend.h"
#include "guarded.h"
#include "int8/gemm.h"
#include "int8/kernel_list.h"
#include "int8/pack.h"
#include "report.h"

namespace pycompress::int8 {
extern const Kernel kAvxVnniEmulated;
extern const Kernel kAvx512VnniEmulated;
extern const Kernel kAmxEmulated;
}  // namespace pycompress::int8

namespace native {
namespace {

using namespace pycompress;
using namespace pycompress::int8;

enum class Values { gaussian, uniform, extreme, runs, border };
const char* const kNames[] = {"gaussian", "uniform", "extreme", "runs", "border"};
constexpr int kValues = 5;

// Which weights stay: `keep` of each `of` consecutive ones, chosen anew for each channel or by all of them together.
struct Pattern {
  int keep, of;
  bool shared;
};
constexpr Pattern kDense{1, 1, false}, kEmptyGroups{1, 8, true};

struct Case {
  const Kernel& kernel;
  int m, n, k, bits;
  Values values;
  Pattern pattern;
  std::string name() const {
    return text("kernel=", kernel.name, " m=", m, " n=", n, " k=", k, " activation_bits=", bits,
                " values=", kNames[static_cast<int>(values)], " keep=", pattern.keep, ":", pattern.of,
                pattern.shared ? " in all channels" : "");
  }
};

int8_t weight(Values values, size_t i, std::mt19937& random) {
  constexpr int kTop = 127;
  int value = std::uniform_int_distribution<int>(-kTop, kTop)(random);
  if (values == Values::gaussian) value = static_cast<int>(std::lrintf(std::normal_distribution<float>()(random) * 38));
  if (values == Values::extreme) value = random() % 2 ? kTop : -kTop;
  if (values == Values::runs) value = i / 64 % 2 ? kTop : -kTop;  // one sign over whole lanes: the worst for 16 bits
  if (values == Values::border) {  // two, four or eight of one sign add up to just what a lane holds, or one more
    constexpr int kBorder[] = {1, 2, 15, 16, 17, 31, 32, 33, 63, 64, 65, 66, 127};
    value = kBorder[random() % 13] * (i / 64 % 2 ? 1 : -1);
  }
  return static_cast<int8_t>(std::clamp(value, -kTop, kTop));
}

void prune(Guarded<int8_t>& w, const Case& c, std::mt19937& random) {
  std::vector<int> order(static_cast<size_t>(c.pattern.of));
  for (size_t i = 0; i < order.size(); ++i) order[i] = static_cast<int>(i);
  for (int begin = 0; begin < c.k; begin += c.pattern.of)
    for (int row = 0; row < c.n; ++row) {
      if (row == 0 || !c.pattern.shared) std::shuffle(order.begin(), order.end(), random);
      for (size_t i = static_cast<size_t>(c.pattern.keep); i < order.size(); ++i)
        if (begin + order[i] < c.k) w[static_cast<size_t>(row * c.k + begin + order[i])] = 0;
    }
}

float activation(Values values, std::mt19937& random) {
  if (values == Values::extreme) return random() % 2 ? 1.0f : -1.0f;
  if (values == Values::runs || values == Values::border) return 1.0f;  // every activation at its largest
  return std::normal_distribution<float>()(random);
}

Problem problem_of(const Case& c, const Guarded<uint8_t>& packed) {
  Problem problem{};
  problem.m = c.m, problem.k = problem.ldx = c.k, problem.n = c.n;
  problem.packed = packed.data();
  problem.packed_bytes = static_cast<int64_t>(packed.size());
  problem.threads = 1;
  return problem;
}

// A range that is given: as the specification has it, and nothing read or written beyond the rows.
void check_range(const Case& c, const Guarded<float>& x) {
  const ActivationShape shape{c.k, 1};
  const Range range{0.01f, 1 << (c.bits - 1)};
  const auto rows = static_cast<size_t>(c.m);
  Guarded<uint8_t> found(rows * static_cast<size_t>(shape.stride())), expected(found.size());
  Guarded<float> scale(rows);
  Guarded<int32_t> zero_point(rows);
  const Kernel* both[] = {&c.kernel, &kScalar};
  for (int i = 0; i < 2; ++i)
    both[i]->quantize(x.data(), Type::float32, c.k, c.m, shape, (1 << c.bits) - 1, &range,
                      i == 0 ? found.data() : expected.data(), scale.data(), zero_point.data());
  bool same = found.intact() && scale.intact() && zero_point.intact();
  for (size_t row = 0; row < rows; ++row)
    for (int b = 0; b < shape.blocks(); ++b) {
      const ptrdiff_t at = static_cast<ptrdiff_t>(row) * shape.stride() + shape.offset(b);
      const int length = std::min(kBlockK, c.k - b * kBlockK);
      same = same && std::equal(found.data() + at, found.data() + at + length, expected.data() + at);
    }
  expect(same, "rows with a given range");
}

void check_sums(const Case& c, const Guarded<uint8_t>& packed, const Guarded<float>& x, const Guarded<int8_t>& w) {
  const auto rows = static_cast<size_t>(c.m), channels = static_cast<size_t>(c.n), k = static_cast<size_t>(c.k);
  Guarded<float> scale(rows);
  Guarded<int32_t> y(rows * channels), zero_point(rows);
  Guarded<uint8_t> q(x.size());
  quantize(c.kernel, x.data(), Type::float32, c.m, c.k, c.k, c.bits, nullptr, q.data(), scale.data(),
           zero_point.data());
  std::vector<int64_t> expected;
  for (size_t i = 0; i < rows; ++i)
    for (size_t j = 0; j < channels; ++j) {
      int64_t sum = 0;
      for (size_t p = 0; p < k; ++p) sum += (int64_t{q[i * k + p]} - zero_point[i]) * w[j * k + p];
      expected.push_back(sum);
    }
  for (const int threads : {1, 2}) {
    y.fill(0x55);
    Problem problem = problem_of(c, packed);
    problem.x = x.data();
    problem.y = y.data();
    problem.y_type = Type::int32;
    problem.threads = threads;
    linear(problem, c.kernel);
    expect(std::equal(expected.begin(), expected.end(), y.data()) && y.intact(), text("sums, ", threads, " threads"));
  }
}

// The float epilogue up to the guard pages; its values are tested from Python. Each type and activation takes its turn.
void check_epilogue(const Case& c, const Guarded<uint8_t>& packed) {
  const auto type = static_cast<Type>(cases % 3);
  const auto rows = static_cast<size_t>(c.m), channels = static_cast<size_t>(c.n), k = static_cast<size_t>(c.k);
  const size_t size = type == Type::float32 ? 4 : 2;
  Guarded<float> weight_scale(channels), bias(channels);
  Guarded<uint8_t> result(rows * channels * size), input(rows * k * size);
  std::fill_n(weight_scale.data(), channels, 0.01f);
  std::fill_n(bias.data(), channels, 1.0f);
  input.fill(0);
  Problem problem = problem_of(c, packed);
  problem.x = input.data();
  problem.x_type = problem.y_type = type;
  problem.weight_scale = weight_scale.data();
  problem.bias = bias.data();
  problem.activation = static_cast<Activation>(cases % kActivations);
  problem.y = result.data();
  linear(problem, c.kernel);
  expect(result.intact(), "epilogue");
  if (type != Type::float32 || problem.activation != Activation::none) return;
  const auto* y = reinterpret_cast<const float*>(result.data());  // x is zero: the bias comes through as it is
  expect(std::all_of(y, y + rows * channels, [](float value) { return value == 1.0f; }), "bias");
}

// Rows that were quantized before the call.
struct Rows {
  Guarded<uint8_t> bytes;
  Guarded<float> scale;
  Guarded<int32_t> zero_point;
  Quantized quantized;

  Rows(const Case& c, const Guarded<uint8_t>& packed, const Guarded<float>& x)
      : bytes(static_cast<size_t>(c.m * shape_of(c, packed).stride())),
        scale(static_cast<size_t>(c.m)),
        zero_point(static_cast<size_t>(c.m)),
        quantized{shape_of(c, packed), c.bits, bytes.data(), scale.data(), zero_point.data()} {
    c.kernel.quantize(x.data(), Type::float32, c.k, c.m, quantized.shape, (1 << c.bits) - 1, nullptr, bytes.data(),
                      scale.data(), zero_point.data());
  }
  static ActivationShape shape_of(const Case& c, const Guarded<uint8_t>& packed) {
    return {c.k, header_of(packed.data(), static_cast<int64_t>(packed.size())).versions};
  }
};

// What the call must give from the sums that it gives.
std::vector<uint8_t> added(const Case& c, Problem problem, const Summand& summand, const Rows& rows) {
  Guarded<int32_t> sums(static_cast<size_t>(c.m) * static_cast<size_t>(c.n));
  problem.y = sums.data();
  problem.y_type = Type::int32;
  linear(problem, c.kernel);
  const std::vector<int32_t> zeros(static_cast<size_t>(std::max(c.m, c.n)), 0);  // the sums are without them already
  std::vector<uint8_t> y(sums.bytes());
  kScalar.finish(sums.data(), c.n, c.m, c.n,
                 {zeros.data(), problem.weight_scale, summand.data(), c.n, rows.scale.data(), zeros.data(),
                  problem.activation, Type::float32},
                 y.data(), c.n);
  return y;
}

// A matrix instead of the bias, and rows quantized before the call; those of another shape are quantized anew.
void check_addend(const Case& c, const Guarded<uint8_t>& packed, const Guarded<float>& x, std::mt19937& random) {
  Guarded<float> weight_scale(static_cast<size_t>(c.n));
  for (size_t i = 0; i < weight_scale.size(); ++i) weight_scale[i] = 1e-3f * static_cast<float>(1 + random() % 7);
  const Rows rows(c, packed, x);
  const Summand summand(c.m, c.n, c.kernel.nr, cases % 3 != 0, random);
  const Addend addend = summand.addend();
  Problem problem = problem_of(c, packed);
  problem.x = x.data();
  problem.weight_scale = weight_scale.data();
  problem.activation = static_cast<Activation>(cases / 2 % kActivations);
  const std::vector<uint8_t> expected = added(c, problem, summand, rows);
  Guarded<uint8_t> y(expected.size());
  problem.y = y.data();
  problem.addend = &addend;
  Quantized misfit = rows.quantized;
  (cases % 2 ? misfit.activation_bits : misfit.shape.k) += 1;
  for (const bool fits : {true, false}) {
    problem.quantized = fits ? &rows.quantized : &misfit;
    problem.x = fits ? nullptr : x.data();  // it is not needed
    problem.threads = cases % 2 == fits ? 1 : 2;
    y.fill(0x55);
    linear(problem, c.kernel);
    expect(std::equal(expected.begin(), expected.end(), y.data()) && y.intact(), text("addend, quantized=", fits));
  }
}

void run(const Case& c, std::mt19937& random) {
  begin(c.name());
  Guarded<int8_t> w(static_cast<size_t>(c.n) * static_cast<size_t>(c.k)), unpacked(w.size());
  Guarded<float> x(static_cast<size_t>(c.m) * static_cast<size_t>(c.k));
  for (size_t i = 0; i < w.size(); ++i) w[i] = weight(c.values, i, random);
  for (size_t i = 0; i < x.size(); ++i) x[i] = activation(c.values, random);
  prune(w, c, random);

  const std::vector<uint8_t> buffer = pack(c.kernel, w.data(), c.n, c.k, c.bits, 1);
  Guarded<uint8_t> packed(buffer.size());
  std::memcpy(packed.data(), buffer.data(), buffer.size());
  unpack(packed.data(), static_cast<int64_t>(packed.size()), unpacked.data());
  expect(std::memcmp(unpacked.data(), w.data(), w.size()) == 0, "unpack");
  check_range(c, x);
  check_sums(c, packed, x, w);
  check_epilogue(c, packed);
  if (cases % 2 == 0 || c.m > 12) check_addend(c, packed, x, random);
}

void run_tile_edges(const Kernel& kernel, std::mt19937& random) {
  const auto edges = [](int tile) { return std::vector<int>{1, std::max(1, tile - 1), tile, tile + 1, 2 * tile + 3}; };
  for (const int m : edges(kernel.mr))
    for (const int n : edges(kernel.nr))
      for (const int k : {1, 3, 4, 5, 15, 16, 17, 31, 32, 33, 67})
        for (const int bits : {7, 8}) {
          const Pattern patterns[] = {kDense, {2, 4, false}, kDense, {1, 3, false}, kEmptyGroups};
          run({kernel, m, n, k, bits, static_cast<Values>(cases % kValues), patterns[cases / 3 % 5]}, random);
        }
  for (const int k : {kBlockK - 1, kBlockK, kBlockK + 1, 2 * kBlockK + 3})
    for (const int bits : {7, 8})
      for (int values = 0; values < kValues; ++values)
        for (const Pattern& pattern : {kDense, kEmptyGroups})
          run({kernel, kernel.mr + 1, kernel.nr + 1, k, bits, static_cast<Values>(values), pattern}, random);
  run({kernel, 130, 64, 300, 8, Values::gaussian, kDense}, random);  // large enough for two threads
  run({kernel, 2, 2, static_cast<int>(kMaxK), 8, Values::runs, kDense}, random);
}

// Each N of M, with weights that are the worst for the 16-bit lanes and such as leave them room.
void run_n_of_m(const Kernel& kernel, std::mt19937& random) {
  for (const int of : {4, 8, 16})
    for (int keep = 1; keep <= of; ++keep)
      for (const int bits : {7, 8})
        for (int values = 0; values < kValues; ++values)
          run({kernel, 5, kernel.nr + 1, 150, bits, static_cast<Values>(values), {keep, of, false}}, random);
}

// Pieces of k in turns with what is made of the sums: all rows once, in order, up to the guard page.
void run_strips(const Kernel& kernel, std::mt19937& random) {
  struct Pieces {
    int count, length;
  };
  const int lda = 80;
  for (const int rows : {1, 15, 16, 17, 31, 32, 33, 64, 77})
    for (const int n : {5, kernel.nr, kernel.nr + 1, 2 * kernel.nr})
      for (const Pieces& pieces : {Pieces{1, 32}, {1, 64}, {1, 96}, {3, 64}, {2, 128}, {1, kBlockK + 32}}) {
        const int k = pieces.count * pieces.length, distance = 2 * lda;
        begin(text("kernel=", kernel.name, " strip rows=", rows, " n=", n, " pieces=", pieces.count, " of ",
                   pieces.length));
        std::vector<int8_t> w(static_cast<size_t>(n * k));
        for (int8_t& value : w) value = static_cast<int8_t>(std::uniform_int_distribution<int>(-127, 127)(random));
        const std::vector<uint8_t> packed = pack(kernel, w.data(), n, k, 8, 1);
        Header header;
        std::memcpy(&header, packed.data(), sizeof(header));
        const auto panel_of = [&](int panel) {
          uint64_t at;
          const int blocks = ActivationShape{k, 1}.blocks();
          std::memcpy(&at, packed.data() + header.blocks + static_cast<size_t>(panel * blocks) * sizeof(at),
                      sizeof(at));
          return packed.data() + at;
        };
        Guarded<uint8_t> a(static_cast<size_t>((rows - 1) * lda + (pieces.count - 1) * distance + pieces.length + 63));
        for (size_t i = 0; i < a.size(); ++i)
          a[i] = static_cast<uint8_t>(std::uniform_int_distribution<int>(0, 255)(random));
        struct Finished {
          int stride, columns, next = 0;
          std::vector<int32_t> c{};
        } finished{2 * kernel.nr, n};
        Guarded<int32_t> sums(static_cast<size_t>(2 * kernel.mr * 2 * kernel.nr));
        Strip strip{a.data(),    lda, distance, pieces.count, pieces.length, rows, {panel_of(0), nullptr},
                    sums.data(), 8,   nullptr,  nullptr};
        if (n > kernel.nr) strip.panels[1] = panel_of(1);
        strip.context = &finished;
        strip.finished = [](const void* context, const int32_t* c, int first, int count) {
          auto& to = *static_cast<Finished*>(const_cast<void*>(context));
          expect(first == to.next, text("row ", first, " after ", to.next));
          to.next = first + count;
          for (int i = 0; i < count; ++i) to.c.insert(to.c.end(), c + i * to.stride, c + i * to.stride + to.columns);
        };
        if (kernel.begin != nullptr) kernel.begin();
        kernel.strip(strip);
        if (kernel.end != nullptr) kernel.end();
        std::vector<int32_t> expected;
        for (int i = 0; i < rows; ++i)
          for (int j = 0; j < n; ++j) {
            int64_t sum = 0;
            for (int p = 0; p < k; ++p)
              sum += int64_t{a[static_cast<size_t>(i * lda + p / pieces.length * distance + p % pieces.length)]} *
                     w[static_cast<size_t>(j * k + p)];
            expected.push_back(static_cast<int32_t>(sum));
          }
        expect(finished.c == expected && sums.intact(), "sums of a strip");
      }
}

// The epilogue of two panels at once, of rows that share their scale and of such as do not: the bits of scalar.cpp.
void run_finishes(const Kernel& kernel, std::mt19937& random) {
  constexpr int kRows = 9, kMost = 64;
  for (const int columns : {1, 16, 31, 32, 33, 63, 64})
    for (const Type type : {Type::float32, Type::uint8})
      for (const Activation activation : {Activation::none, Activation::relu, Activation::relu6, Activation::silu})
        for (int which = 0; which < 8; ++which) {
          begin(text("kernel=", kernel.name, " finish columns=", columns, " type=", static_cast<int>(type),
                     " activation=", static_cast<int>(activation), " which=", which));
          const bool alike = which % 2 == 0;
          const auto number = [&](int most) { return std::uniform_int_distribution<int>(-most, most)(random); };
          std::vector<int32_t> c(kRows * kMost), column_sum(kMost), zero_point(kRows, 77);
          for (int32_t& value : c) value = number(which / 4 ? 1 << 30 : 1000);
          for (int32_t& value : column_sum) value = number(300);
          std::vector<float> scale(kRows, 0.01f), weight_scale(kMost), bias(kMost);
          for (float& value : weight_scale) value = 0.001f * static_cast<float>(2000 + number(1000));
          for (float& value : bias) value = 0.01f * static_cast<float>(number(100));
          if (!alike) zero_point[7] = 3, scale[8] = 0.5f;
          if (which / 4 && alike) std::fill(scale.begin(), scale.end(), NAN);
          const Requantize to = requantize(0.05f, which % 3 * 90, 255);
          const Epilogue epilogue{column_sum.data(),
                                  weight_scale.data(),
                                  which & 2 ? bias.data() : nullptr,
                                  0,
                                  scale.data(),
                                  zero_point.data(),
                                  activation,
                                  type,
                                  to};
          const size_t bytes = static_cast<size_t>(kRows * columns) * size_of(type);
          Guarded<uint8_t> y(bytes);
          std::vector<uint8_t> expected(bytes);
          kernel.finish(c.data(), kMost, kRows, columns, epilogue, y.data(), columns);
          kScalar.finish(c.data(), kMost, kRows, columns, epilogue, expected.data(), columns);
          const auto is_nan = [&](const uint8_t* at) {
            float v;
            std::memcpy(&v, at, sizeof(v));
            return std::isnan(v);
          };
          bool same = y.intact();
          for (size_t i = 0; i < bytes; i += size_of(type))
            same = same && (std::memcmp(y.data() + i, expected.data() + i, size_of(type)) == 0 ||
                            (type == Type::float32 && is_nan(y.data() + i) && is_nan(&expected[i])));
          expect(same, "finished");
        }
}

#if defined(PYCOMPRESS_X86)
// Groups of four positions that are zero in all channels cost nothing.
void check_skipped(const Kernel& kernel) {
  begin(text("kernel=", kernel.name, " groups of zeros"));
  constexpr int kN = 40, kK = 1300, kEvery = 5;
  std::vector<int8_t> w(size_t{kN} * kK, 0);
  for (size_t i = 0; i < w.size(); ++i)
    if (i % kK / 4 % kEvery == 0) w[i] = 3;
  const std::vector<uint8_t> packed = pack(kernel, w.data(), kN, kK, 7, 1);
  const Depths found = depths(packed.data(), static_cast<int64_t>(packed.size()));
  const int64_t items = found.items[0] + found.items[1] + found.items[2];
  expect(found.groups == 3 * kK / 4 && items == found.groups / kEvery, text("skipped groups, ", items, " are left"));
}
#endif

void test_refusals() {
  std::vector<int8_t> values(64, 1);
  const std::vector<uint8_t> packed = pack(kScalar, values.data(), 8, 8, 8, 1);
  const auto unpack_of = [&](const std::vector<uint8_t>& bytes) {
    unpack(bytes.data(), static_cast<int64_t>(bytes.size()), values.data());
  };
  refuses("int8: packed, cut short", [&] { unpack_of({packed.begin(), packed.end() - 1}); });
  refuses("int8: packed, empty", [&] { unpack_of({}); });
  for (size_t i = 0; i < sizeof(Header); ++i)
    refuses(text("int8: packed, byte ", i, " of its header changed"), [&] {
      std::vector<uint8_t> changed = packed;
      changed[i] ^= 1;
      unpack_of(changed);
    });
  values[63] = -128;
  refuses("int8: a weight of -128", [&] { pack(kScalar, values.data(), 8, 8, 8, 1); });
}

}  // namespace

void test_int8() {
  std::mt19937 random(1);
  std::vector<const Kernel*> kernels{&kScalar};
#if defined(PYCOMPRESS_X86)
  if (isa_available(Isa::avx2))
    kernels.insert(kernels.end(), {&kAvx2, &kAvx2Windows, &kAvxVnniEmulated, &kAvx512VnniEmulated, &kAmxEmulated});
  if (isa_available(Isa::avx_vnni)) kernels.push_back(&kAvxVnni);
  if (isa_available(Isa::avx512_vnni)) kernels.push_back(&kAvx512Vnni);
  if (isa_available(Isa::amx_int8)) kernels.push_back(&kAmx);
  check_skipped(kAvx2);
#endif
  for (const Kernel* kernel : kernels) {
    run_tile_edges(*kernel, random);
    run_finishes(*kernel, random);
    if (kernel->strip != nullptr) run_strips(*kernel, random);
    if (kernel->layout == Layout::chains || kernel->layout == Layout::windows) run_n_of_m(*kernel, random);
  }
  test_refusals();
}

}  // namespace native
