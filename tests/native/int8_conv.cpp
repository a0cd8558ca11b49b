// int8_conv2d end to end, by every kernel: integers against int64 over what each position of the kernel sees, with x, y
// and the weights against guard pages, of both memory formats, the same on any number of threads.
#include <random>

#include "cases.h"
#include "conv/conv.h"
#include "conv/pack.h"
#include "guarded.h"
#include "int8/pack.h"
#include "report.h"

namespace native {
namespace {

using namespace pycompress;
using namespace pycompress::conv;

struct Shape {
  int images, channels, n, groups, height, width, kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w, dilation_h,
      dilation_w;
  int out_h() const { return (height + 2 * pad_h - dilation_h * (kernel_h - 1) - 1) / stride_h + 1; }
  int out_w() const { return (width + 2 * pad_w - dilation_w * (kernel_w - 1) - 1) / stride_w + 1; }
  int own() const { return channels / groups; }
  int k() const { return own() * kernel_h * kernel_w; }
  size_t pixels() const { return static_cast<size_t>(images * channels * height * width); }
  size_t results() const { return static_cast<size_t>(images * n * out_h() * out_w()); }
  std::string name() const {
    return text("x=[", images, ", ", channels, ", ", height, ", ", width, "] n=", n, " groups=", groups,
                " kernel=", kernel_h, "x", kernel_w, " stride=", stride_h, "x", stride_w, " pad=", pad_h, "x", pad_w,
                " dilation=", dilation_h, "x", dilation_w);
  }
  // Where a number lies: of x with `channels`, of y with `n`.
  size_t at(bool last, int count, int h, int w, int image, int channel, int row, int column) const {
    const int place =
        last ? ((image * h + row) * w + column) * count + channel : ((image * count + channel) * h + row) * w + column;
    return static_cast<size_t>(place);
  }
};

Convolution problem_of(const Shape& s, const Guarded<uint8_t>& packed) {
  Convolution p{};
  p.images = s.images, p.channels = s.channels, p.height = s.height, p.width = s.width;
  p.packed = packed.data();
  p.packed_bytes = static_cast<int64_t>(packed.size());
  p.n = s.n;
  p.stride_h = s.stride_h, p.stride_w = s.stride_w, p.pad_top = s.pad_h, p.pad_left = s.pad_w;
  p.dilation_h = s.dilation_h, p.dilation_w = s.dilation_w;
  p.out_h = s.out_h(), p.out_w = s.out_w();
  p.y_type = Type::int32;
  p.threads = 1;
  return p;
}

// q of an image that is one row to the quantizer, in the order of x.
std::vector<int> integers_of(const Shape& s, const float* x, int bits, const int8::Range* range) {
  const int64_t count = int64_t{1} * s.channels * s.height * s.width;
  std::vector<uint8_t> q(static_cast<size_t>(s.images * count));
  std::vector<float> scale(static_cast<size_t>(s.images));
  std::vector<int32_t> zero(static_cast<size_t>(s.images));
  int8::quantize(int8::kernel_named("scalar_4x8"), x, Type::float32, s.images, count, count, bits, range, q.data(),
                 scale.data(), zero.data());
  std::vector<int> result(q.size());
  for (size_t i = 0; i < q.size(); ++i) result[i] = q[i] - zero[i / static_cast<size_t>(count)];
  return result;
}

// The same from bytes, which are the integers already, and to bytes, which are what the quantizer makes of the floats.
void run_bytes(const Shape& s, Convolution problem, const std::vector<int>& q, const std::vector<int64_t>& expected,
               const int8::Range& range, int number) {
  const size_t behind = number % 2 ? static_cast<size_t>(kBehind) : 0;
  Guarded<uint8_t> x(s.pixels() + behind, Edge::end);
  for (size_t i = 0; i < q.size(); ++i) x[i] = static_cast<uint8_t>(q[i] + range.zero_point);
  Guarded<int32_t> sums(s.results(), Edge::end);
  sums.fill(0x55);
  problem.x = x.data(), problem.type = Type::uint8, problem.behind = static_cast<int64_t>(behind);
  problem.y = sums.data();
  conv2d(problem);
  expect(std::equal(expected.begin(), expected.end(), sums.data()) && sums.intact(), "sums of bytes");

  std::vector<float> scale(static_cast<size_t>(s.n)), bias(scale.size()), y(s.results());
  for (size_t i = 0; i < scale.size(); ++i) scale[i] = 1e-3f + 1e-4f * static_cast<float>(i), bias[i] = 3.0f - scale[i];
  problem.weight_scale = scale.data(), problem.bias = bias.data();
  problem.activation = static_cast<Activation>(number % kActivations);
  problem.y = y.data(), problem.y_type = Type::float32;
  conv2d(problem);
  if (y.empty()) return;
  const int8::Range next{0.03f, 57};
  std::vector<uint8_t> wanted(y.size());
  std::vector<float> row_scale(1);
  std::vector<int32_t> zero(1);
  const int64_t count = static_cast<int64_t>(y.size());
  int8::quantize(int8::kernel_named("scalar_4x8"), y.data(), Type::float32, 1, count, count, 8, &next, wanted.data(),
                 row_scale.data(), zero.data());
  Guarded<uint8_t> bytes(y.size(), Edge::end);
  bytes.fill(0x55);
  problem.y = bytes.data(), problem.y_type = Type::uint8;
  problem.to = int8::requantize(next.scale, next.zero_point, 255);
  expect(conv2d(problem), "finite");
  expect(std::equal(wanted.begin(), wanted.end(), bytes.data()) && bytes.intact(), "bytes of what comes out");
  if (s.own() == 1 && s.n == s.groups) return;

  // An addend, the same number everywhere but for its sign: bytes alone, and floats beside theirs.
  Guarded<float> addend(y.size(), number % 2 ? Edge::begin : Edge::end);
  problem.activation = Activation::none;
  problem.y = y.data(), problem.y_type = Type::float32;
  conv2d(problem);
  for (size_t i = 0; i < y.size(); ++i) addend[i] = i % 3 ? 0.7f : -0.4f, y[i] = std::max(y[i] + addend[i], 0.0f);
  int8::quantize(int8::kernel_named("scalar_4x8"), y.data(), Type::float32, 1, count, count, 8, &next, wanted.data(),
                 row_scale.data(), zero.data());
  problem.activation = Activation::relu, problem.addend = addend.data();
  bytes.fill(0x55);
  problem.y = bytes.data(), problem.y_type = Type::uint8;
  expect(conv2d(problem), "finite with an addend");
  expect(std::equal(wanted.begin(), wanted.end(), bytes.data()) && bytes.intact(), "bytes of a sum");
  Guarded<float> floats(y.size(), Edge::end);
  floats.fill(0x55), bytes.fill(0x55);
  problem.y = floats.data(), problem.y_type = Type::float32, problem.beside = bytes.data();
  expect(conv2d(problem), "finite beside floats");
  expect(std::equal(y.begin(), y.end(), floats.data()) && floats.intact(), "the floats of a sum");
  expect(std::equal(wanted.begin(), wanted.end(), bytes.data()) && bytes.intact(), "their bytes");
  addend[y.size() - 1] = std::numeric_limits<float>::infinity();
  expect(!conv2d(problem), "a sum that is not finite");
}

void run(const Shape& s, const int8::Kernel& product, int bits, bool last, int number) {
  begin(text(s.name(), " product=", product.name, " bits=", bits, " last=", last, " static=", number % 3 == 1,
             " case=", number));
  std::mt19937 random(static_cast<unsigned>(number));
  const Edge edge = number % 2 ? Edge::begin : Edge::end;
  std::vector<int8_t> values(static_cast<size_t>(s.n * s.k()));
  for (int8_t& value : values) value = static_cast<int8_t>(std::uniform_int_distribution<int>(-127, 127)(random));
  const int8::Range fixed{0.02f, 40};
  const int8::Range* range = number % 3 == 1 ? &fixed : nullptr;
  const std::vector<uint8_t> buffer =
      pack(product, values.data(), s.n, s.channels, s.groups, s.kernel_h, s.kernel_w, bits, 1, range);
  Guarded<uint8_t> packed(buffer.size());
  std::copy(buffer.begin(), buffer.end(), packed.data());
  std::vector<int8_t> again(values.size());
  unpack(packed.data(), static_cast<int64_t>(packed.size()), again.data());
  expect(again == values, "unpacked");

  Guarded<float> x(s.pixels(), edge);
  for (size_t i = 0; i < x.size(); ++i) x[i] = std::normal_distribution<float>()(random);
  const std::vector<int> q = integers_of(s, x.data(), bits, range);
  std::vector<int64_t> expected(s.results());
  for (int i = 0; i < s.images; ++i)
    for (int n = 0; n < s.n; ++n)
      for (int y = 0; y < s.out_h(); ++y)
        for (int z = 0; z < s.out_w(); ++z) {
          int64_t sum = 0;
          for (int c = 0; c < s.own(); ++c)
            for (int r = 0; r < s.kernel_h; ++r)
              for (int t = 0; t < s.kernel_w; ++t) {
                const int h = y * s.stride_h - s.pad_h + r * s.dilation_h,
                          w = z * s.stride_w - s.pad_w + t * s.dilation_w;
                if (h < 0 || h >= s.height || w < 0 || w >= s.width) continue;
                const int channel = n / (s.n / s.groups) * s.own() + c;
                sum += int64_t{1} * q[s.at(last, s.channels, s.height, s.width, i, channel, h, w)] *
                       values[static_cast<size_t>(((n * s.own() + c) * s.kernel_h + r) * s.kernel_w + t)];
              }
          expected[s.at(last, s.n, s.out_h(), s.out_w(), i, n, y, z)] = sum;
        }

  Guarded<int32_t> y(s.results(), edge);
  Convolution problem = problem_of(s, packed);
  problem.x = x.data();
  problem.y = y.data();
  problem.channels_last = problem.y_channels_last = last;
  for (const int threads : {1, 2, 3}) {
    y.fill(0x55);
    problem.threads = threads;
    conv2d(problem);
    expect(std::equal(expected.begin(), expected.end(), y.data()) && y.intact(), text("sums, ", threads, " threads"));
  }
  if (range != nullptr && last) run_bytes(s, problem, q, expected, *range, number);
}

void test_refusals() {
  const Shape s{1, 3, 4, 1, 5, 5, 3, 3, 1, 1, 1, 1, 1, 1};
  const std::vector<int8_t> values(1000, 1);  // as many as any of the weights below has
  const auto packed_as = [&](int64_t n, int64_t channels, int64_t groups, int64_t kernel, int bits) {
    return pack(int8::kernel_named("scalar_4x8"), values.data(), n, channels, groups, kernel, kernel, bits, 1);
  };
  refuses("int8 conv: groups", [&] { packed_as(4, 3, 2, 3, 8); });
  refuses("int8 conv: bits", [&] { packed_as(4, 3, 1, 3, 16); });
  refuses("int8 conv: no kernel", [&] { packed_as(4, 3, 1, 0, 8); });
  refuses("int8 conv: a kernel whose sums would not be exact", [&] { packed_as(1, 1, 1, 23, 8); });
  const auto refused = [&](const std::string& what, const std::vector<uint8_t>& buffer, auto&& change) {
    Guarded<uint8_t> packed(buffer.size(), Edge::begin);
    std::copy(buffer.begin(), buffer.end(), packed.data());
    std::vector<float> x(75, 1.0f), y(100);
    Convolution problem = problem_of(s, packed);
    problem.x = x.data();
    problem.y = y.data();
    change(problem);
    refuses("int8 conv: " + what, [&] { conv2d(problem); });
  };
  const std::vector<uint8_t> packed = packed_as(4, 3, 1, 3, 8);
  refused("other channels", packed, [](Convolution& p) { p.channels = 2; });
  refused("another n", packed, [](Convolution& p) { p.n = 5; });
  refused("packed, one byte short", {packed.begin(), packed.end() - 1}, [](Convolution&) {});
  std::vector<uint8_t> edited = packed;
  edited[16] ^= 1;
  refused("an edited header", edited, [](Convolution&) {});
  const std::vector<float> addend(100);
  std::vector<uint8_t> bytes(100);
  const auto as_floats = [&](Convolution& p) {
    p.y_type = Type::float32, p.y_channels_last = true, p.addend = addend.data(), p.beside = bytes.data();
    p.to = int8::requantize(1.0f, 0, 255);
  };
  refused("an addend to int32", packed, [&](Convolution& p) { as_floats(p), p.y_type = Type::int32; });
  refused("an addend, channels first", packed, [&](Convolution& p) { as_floats(p), p.y_channels_last = false; });
  refused("bytes without a range", packed, [&](Convolution& p) { as_floats(p), p.to = {}; });
  refused("an addend, depthwise", packed_as(3, 3, 3, 3, 8),
          [&](Convolution& p) { as_floats(p), p.n = 3, p.channels_last = true; });
}

}  // namespace

void test_int8_conv() {
  constexpr Shape kShapes[] = {
      {1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 1, 1},     {2, 3, 17, 1, 7, 9, 3, 3, 1, 1, 1, 1, 1, 1},
      {1, 5, 33, 1, 8, 8, 3, 3, 2, 2, 1, 1, 1, 1},    {3, 4, 8, 2, 11, 6, 5, 3, 2, 1, 2, 1, 1, 2},
      {2, 40, 5, 1, 13, 5, 1, 1, 1, 1, 0, 0, 1, 1},   {2, 33, 40, 1, 6, 7, 1, 1, 2, 1, 1, 2, 1, 1},
      {1, 3, 8, 1, 33, 31, 7, 7, 2, 2, 3, 3, 1, 1},   {1, 2, 3, 1, 2, 3, 3, 3, 1, 1, 5, 6, 1, 1},
      {0, 3, 4, 1, 5, 5, 3, 3, 1, 1, 1, 1, 1, 1},     {1, 130, 6, 1, 6, 6, 3, 3, 1, 1, 1, 1, 1, 1},  // two blocks of k
      {2, 17, 17, 17, 9, 11, 3, 3, 1, 1, 1, 1, 1, 1}, {1, 33, 33, 33, 9, 20, 5, 2, 2, 3, 2, 0, 1, 1},
      {2, 16, 16, 16, 12, 7, 3, 3, 2, 2, 0, 1, 2, 1}, {1, 7, 7, 7, 1, 1, 3, 3, 1, 1, 1, 1, 1, 1},
      {1, 6, 12, 6, 5, 9, 3, 3, 1, 1, 1, 1, 1, 1},    {1, 1, 1, 1, 9, 40, 1, 7, 1, 1, 0, 3, 1, 4},
      {1, 2, 2, 2, 1, 1, 1, 1, 9, 9, 3, 3, 1, 1},     {1, 3, 2, 1, 1, 1, 1, 1, 9, 10, 3, 4, 1, 1},
      {2, 3, 40, 1, 7, 70, 3, 3, 2, 2, 1, 1, 1, 1},   {2, 64, 70, 1, 6, 9, 3, 3, 1, 1, 1, 1, 1, 1},  // where rows lie
  };
  int number = 0;
  for (const Shape& shape : kShapes)
    for (const bool last : {false, true}) {
      for_available(int8::kernels(), [&](const int8::Kernel& product) {
        int8::kernels().force(product.name);
        run(shape, product, 7 + number % 2, last, number);
        ++number;
        int8::kernels().force("");
      });
      for_available(kernels(), [&](const Kernel& kernel) {
        kernels().force(kernel.name);
        run(shape, int8::best_kernel(), 8, last, number++);
        kernels().force("");
      });
    }
  test_refusals();
}

}  // namespace native
