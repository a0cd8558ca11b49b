// sparse_conv2d end to end: sums against double over what each position of the kernel sees, results in every type and
// activation from those sums, the same bits on any number of threads.
#include <cfloat>

#include "sparse/kernel_list.h"
#include "sparse_weight.h"

namespace native {
namespace {

using namespace pycompress;
using namespace pycompress::sparse;

struct Shape {
  int images, channels, height, width, kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w;
  int out_h() const { return (height + 2 * pad_h - dilation_h * (kernel_h - 1) - 1) / stride_h + 1; }
  int out_w() const { return (width + 2 * pad_w - dilation_w * (kernel_w - 1) - 1) / stride_w + 1; }
  int k() const { return channels * kernel_h * kernel_w; }
  size_t pixels() const { return static_cast<size_t>(images * channels * height * width); }
};

struct Case {
  Shape shape;
  Format format;
  int n;
  Mask mask;
  Type type;
  Activation activation;
  int number;
  std::string name() const {
    const Shape& s = shape;
    return text("format=", format_name(format), " x=[", s.images, ", ", s.channels, ", ", s.height, ", ", s.width,
                "] n=", n, " kernel=", s.kernel_h, "x", s.kernel_w, " stride=", s.stride_h, "x", s.stride_w,
                " pad=", s.pad_h, "x", s.pad_w, " dilation=", s.dilation_h, "x", s.dilation_w, " mask=", mask.name(),
                " type=", static_cast<int>(type), " activation=", static_cast<int>(activation), " case=", number);
  }
  Edge edge() const { return number % 2 ? Edge::begin : Edge::end; }
  size_t positions() const { return static_cast<size_t>(shape.out_h() * shape.out_w()); }
  size_t results() const { return static_cast<size_t>(shape.images * n) * positions(); }
};

Convolution problem_of(const Case& c, const Guarded<uint8_t>& packed) {
  const Shape& s = c.shape;
  Convolution p{};
  p.images = s.images, p.channels = s.channels, p.height = s.height, p.width = s.width;
  p.packed = packed.data();
  p.packed_bytes = static_cast<int64_t>(packed.size());
  p.n = c.n;
  p.kernel_h = s.kernel_h, p.kernel_w = s.kernel_w, p.stride_h = s.stride_h, p.stride_w = s.stride_w;
  p.pad_top = s.pad_h, p.pad_left = s.pad_w, p.dilation_h = s.dilation_h, p.dilation_w = s.dilation_w;
  p.out_h = s.out_h(), p.out_w = s.out_w();
  p.threads = 1;
  return p;
}

// What position `i` of the kernel sees from position (row, column) of y.
float seen(const Shape& s, const Input& x, int image, int row, int column, int i) {
  const int channel = i / (s.kernel_h * s.kernel_w), at = i % (s.kernel_h * s.kernel_w);
  const int h = row * s.stride_h - s.pad_h + at / s.kernel_w * s.dilation_h;
  const int w = column * s.stride_w - s.pad_w + at % s.kernel_w * s.dilation_w;
  if (h < 0 || h >= s.height || w < 0 || w >= s.width) return 0;
  return x.at(0, ((image * s.channels + channel) * s.height + h) * s.width + w);
}

void check_sums(const Case& c, const Weight& w, const Input& x, const float* y) {
  bool within = true;
  for (int image = 0; image < c.shape.images; ++image)
    for (size_t channel = 0; channel < static_cast<size_t>(c.n); ++channel)
      for (int row = 0; row < c.shape.out_h(); ++row)
        for (int column = 0; column < c.shape.out_w(); ++column) {
          double exact = 0, magnitude = 0;
          for (size_t i = w.rows[channel]; i < w.rows[channel + 1]; ++i) {
            const double value = seen(c.shape, x, image, row, column, static_cast<int>(w.columns[i]));
            const double product = value * static_cast<double>(w.floats[i]);
            exact += product;
            magnitude += std::fabs(product);
          }
          const auto stored = static_cast<double>(w.rows[channel + 1] - w.rows[channel]);
          const double error = std::fabs(static_cast<double>(*y++) - exact);
          within = within && error <= static_cast<double>(FLT_EPSILON) * (stored + 2) * magnitude;
        }
  expect(within, "sums");
}

std::vector<uint8_t> expected_results(const Case& c, const Guarded<float>& bias, const Guarded<float>& sums) {
  std::vector<uint8_t> y(c.results() * size_of(c.type));
  const auto positions = static_cast<int>(c.positions());
  const size_t image = static_cast<size_t>(c.n) * c.positions();
  for (size_t i = 0; i < static_cast<size_t>(c.shape.images); ++i)
    kScalarRows.finish_channels(sums.data() + i * image, positions, positions, c.n,
                                {nullptr, nullptr, bias.data(), 0, nullptr, nullptr, c.activation, c.type},
                                y.data() + i * image * size_of(c.type), positions);
  return y;
}

void run(const Case& c) {
  begin(c.name());
  std::mt19937 random(static_cast<unsigned>(c.number));
  const Weight w = make_weight(c.n, c.shape.k(), c.mask, Values::gaussian, true, random);
  const std::vector<uint8_t> buffer = packed_of(c.format, w, 0);
  Guarded<uint8_t> packed(buffer.size());
  std::memcpy(packed.data(), buffer.data(), buffer.size());
  const int pixels = static_cast<int>(c.shape.pixels()), lines = pixels == 0 ? 0 : 1;
  Input x(c.type, lines, pixels, pixels, c.edge(), 1), as_float(Type::float32, lines, pixels, pixels, c.edge(), 1);
  x.fill(lines, Values::gaussian, random);
  for (int i = 0; i < pixels; ++i) as_float.set(0, i, x.at(0, i));

  Guarded<float> sums(c.results(), c.edge()), bias(static_cast<size_t>(c.n));
  for (size_t i = 0; i < bias.size(); ++i) bias[i] = std::normal_distribution<float>()(random);
  Convolution problem = problem_of(c, packed);
  problem.x = as_float.data();
  problem.y = sums.data();
  conv2d(problem);
  check_sums(c, w, as_float, sums.data());

  Guarded<uint8_t> y(c.results() * size_of(c.type), c.edge(), size_of(c.type));
  const std::vector<uint8_t> expected = expected_results(c, bias, sums);
  problem.x = x.data();
  problem.type = c.type;
  problem.bias = bias.data();
  problem.activation = c.activation;
  problem.y = y.data();
  for (const int threads : {1, 2, 3}) {
    y.fill(0x55);
    problem.threads = threads;
    conv2d(problem);
    expect(same(y.data(), expected.data(), c.type, c.results()) && y.intact(), text("results, ", threads, " threads"));
  }
}

void test_refusals() {
  const Case c{{1, 3, 5, 5, 3, 3, 1, 1, 1, 1, 1, 1}, Format::rows, 4, {1, 1, 0.5}, Type::float32, Activation::none, 1};
  std::mt19937 random(1);
  const Weight floats = make_weight(4, 27, c.mask, Values::gaussian, true, random);
  const Weight ints = make_weight(4, 27, c.mask, Values::gaussian, false, random);
  const auto refused = [&](const std::string& what, const std::vector<uint8_t>& buffer, auto&& change) {
    Guarded<uint8_t> packed(buffer.size(), Edge::begin);
    std::copy(buffer.begin(), buffer.end(), packed.data());
    std::vector<float> x(75, 1.0f), y(100);
    Convolution problem = problem_of(c, packed);
    problem.x = x.data();
    problem.y = y.data();
    change(problem);
    refuses("sparse conv: " + what, [&] { conv2d(problem); });
  };
  const std::vector<uint8_t> packed = packed_of(Format::rows, floats, 0);
  refused("int8 weights", packed_of(Format::quads, ints, 8), [](Convolution&) {});
  refused("other channels", packed, [](Convolution& p) { p.channels = 2; });
  refused("another kernel", packed, [](Convolution& p) { p.kernel_w = 2; });
  refused("another n", packed, [](Convolution& p) { p.n = 5; });
  refused("packed, one byte short", {packed.begin(), packed.end() - 1}, [](Convolution&) {});
}

}  // namespace

void test_sparse_conv() {
  constexpr Shape kShapes[] = {
      {1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 1, 1},   {2, 3, 7, 9, 3, 3, 1, 1, 1, 1, 1, 1},
      {1, 5, 8, 8, 3, 3, 2, 2, 1, 1, 1, 1},   {3, 4, 11, 6, 5, 3, 2, 1, 2, 1, 1, 2},
      {2, 40, 13, 5, 1, 1, 1, 1, 0, 0, 1, 1}, {2, 2, 5, 20, 1, 7, 1, 3, 0, 3, 1, 1},
      {1, 3, 33, 31, 7, 7, 2, 2, 3, 3, 1, 1}, {1, 2, 2, 3, 3, 3, 1, 1, 5, 6, 1, 1},  // some see nothing but padding
      {1, 8, 9, 9, 3, 3, 3, 4, 2, 2, 2, 2},   {2, 3, 9, 17, 2, 4, 5, 3, 0, 1, 3, 2},
      {0, 3, 5, 5, 3, 3, 1, 1, 1, 1, 1, 1},   {1, 60, 6, 6, 3, 3, 1, 1, 1, 1, 1, 1},  // several blocks of k
  };
  constexpr Mask kMasks[] = {{1, 1, 0.2}, {16, 1, 0.4}, {1, 1, 0.7}, {1, 1, 0}, {16, 4, 0.3}};
  int turn = 0;
  for (const Shape& shape : kShapes)
    for (const Format format : {Format::rows, Format::panels})
      for (const int n : {1, 17, 70})
        for (int type = 0; type < 3; ++type, ++turn)
          run({shape, format, n, kMasks[turn / 2 % 5], static_cast<Type>(type), static_cast<Activation>(turn % 5),
               turn});
  test_refusals();
}

}  // namespace native
