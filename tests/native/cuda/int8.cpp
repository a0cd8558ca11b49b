// The CUDA int8 kernels' own source on the host: the quantizer and the packing against the CPU's, the GEMM kernels
// against int64 sums and the specification's epilogue.
#include <algorithm>
#include <array>
#include <cmath>
#include <limits>

#include "cuda/tiles.h"
#include "int8/cuda_kernel_list.h"
#include "int8/kernel_list.h"
#include "int8_reference.h"

namespace native {
namespace {

// --- index arithmetic
// ---------------------------------------------------------------------------------------------------

template <int kBk>
void test_swizzle() {
  begin(text("swizzle of rows of ", kBk, " bytes"));
  constexpr int kRows = 32, kChunks = kBk / 16;
  std::array<bool, kRows * kChunks> used{};
  for (int row = 0; row < kRows; ++row)
    for (int chunk = 0; chunk < kChunks; ++chunk) {
      const int at = pycompress::gpu::swizzled<kBk>(row, chunk);
      expect(at % 16 == 0 && at >= 0 && at < kRows * kBk && !used[static_cast<size_t>(at / 16)], "no permutation");
      used[static_cast<size_t>(at / 16)] = true;
    }
  for (int first = 0; first < kRows; first += 8)  // ldmatrix reads eight rows at once; cp.async writes 128 bytes
    for (int chunk = 0; chunk < kChunks; ++chunk) {
      int banks = 0;
      for (int row = first; row < first + 8; ++row) banks |= 1 << pycompress::gpu::swizzled<kBk>(row, chunk) / 16 % 8;
      expect(banks == 0xff, text("bank conflict at row ", first, " chunk ", chunk));
    }
}

void test_tiles() {
  for (const int64_t tiles_m : {1, 7, 8, 9, 19})
    for (const int64_t tiles_n : {1, 2, 5}) {
      begin(text("tiles ", tiles_m, "x", tiles_n));
      std::vector<int> visits(static_cast<size_t>(tiles_m * tiles_n));
      for (int64_t i = 0; i < tiles_m * tiles_n; ++i) {
        const pycompress::gpu::Position at = pycompress::gpu::tile_at(i, tiles_m, tiles_n);
        const bool inside = at.m >= 0 && at.m < tiles_m && at.n >= 0 && at.n < tiles_n;
        expect(inside, "outside");
        if (inside) ++visits[static_cast<size_t>(at.m * tiles_n + at.n)];
      }
      expect(std::all_of(visits.begin(), visits.end(), [](int count) { return count == 1; }), "not each tile once");
    }
}

// --- the quantizer
// ------------------------------------------------------------------------------------------------------

enum class Row { normal, zeros, tiny, subnormal, huge, nan, infinite, negative_infinite, positive, negative, halves };
constexpr int kRowKinds = 11;

float element(Row kind, int64_t i, int64_t k, std::mt19937& random) {
  const float value = std::normal_distribution<float>()(random);
  const bool last = i == k - 1;
  switch (kind) {
    case Row::normal:
      return value;
    case Row::zeros:
      return i % 2 ? -0.0f : 0.0f;
    case Row::tiny:
      return value * 0x1p-100f;
    case Row::subnormal:
      return value * 0x1p-140f;
    case Row::huge:
      return value < 0 ? -std::numeric_limits<float>::max() : std::numeric_limits<float>::max();
    case Row::nan:
      return last ? std::nanf("") : value;
    case Row::infinite:
      return last ? INFINITY : value;
    case Row::negative_infinite:
      return last ? -INFINITY : value;
    case Row::positive:
      return 3.0f + std::fabs(value);
    case Row::negative:
      return -3.0f - std::fabs(value);
    case Row::halves:  // ties of the rounding
      return static_cast<float>(random() % 255) * 0.5f - 63.5f;
  }
  return 0;
}

uint32_t bits_of(float value, Type type) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  if (type == Type::float32) return bits;
  return type == Type::bfloat16 ? __bfloat16_as_ushort(__float2bfloat16(value)) : __half_as_ushort(__float2half(value));
}

// Rows of x with `gap` unused elements between them, behind `gap` elements.
std::vector<uint8_t> rows_of(Type type, int64_t m, int64_t k, int64_t gap) {
  std::mt19937 random(static_cast<uint32_t>(k));
  const size_t size = size_of(type);
  std::vector<uint8_t> x((Int8Case::size(m * (k + gap) + gap)) * size, 0xff);  // NaN around the rows
  for (int64_t row = 0; row < m; ++row)
    for (int64_t i = 0; i < k; ++i) {
      const uint32_t bits = bits_of(element(static_cast<Row>(row % kRowKinds), i, k, random), type);
      std::memcpy(x.data() + Int8Case::size(gap + row * (k + gap) + i) * size, &bits, size);
    }
  return x;
}

void test_quantize(Type type, int64_t m, int64_t k, int64_t gap, int bits) {
  begin(text("cuda quantize type=", static_cast<int>(type), " m=", m, " k=", k, " gap=", gap, " bits=", bits));
  const std::vector<uint8_t> bytes = rows_of(type, m, k, gap);
  Guarded<uint8_t> x(bytes.size());
  std::copy(bytes.begin(), bytes.end(), x.data());
  const void* first = x.data() + Int8Case::size(gap) * size_of(type);
  Guarded<uint8_t> q(Int8Case::size(m * k));
  Guarded<float> scale(Int8Case::size(m)), expected_scale(Int8Case::size(m));
  Guarded<int32_t> zero_point(Int8Case::size(m)), expected_zero_point(Int8Case::size(m));
  const int8::ActivationShape shape{static_cast<int>(k), 1};
  std::vector<uint8_t> row(Int8Case::size(shape.stride()));
  for (int64_t i = 0; i < m; ++i) {
    const auto* from = static_cast<const uint8_t*>(first) + Int8Case::size(i * (k + gap)) * size_of(type);
    int8::kScalar.quantize(from, type, k + gap, 1, shape, (1 << bits) - 1, nullptr, row.data(),
                           expected_scale.data() + i, expected_zero_point.data() + i);
    std::copy_n(row.data(), k, q.data() + i * k);
  }

  const int64_t k_pad = cuda::PackedShape{1, k}.k_pad();
  Guarded<int8_t> s(Int8Case::size(m * k_pad));
  s.fill(0x55), scale.fill(0x55), zero_point.fill(0x55);
  cuda::Input input{};
  input.x = first, input.type = type, input.m = m, input.k = k, input.ldx = k + gap;
  input.activation_bits = bits;
  cuda::quantize(input, {s.data(), scale.data(), zero_point.data()}, nullptr);
  int64_t wrong = 0;
  for (int64_t row = 0; row < m; ++row)
    for (int64_t i = 0; i < k_pad; ++i) {
      const int value = s[Int8Case::size(row * k_pad + i)];
      wrong += i < k ? value + 128 != q[Int8Case::size(row * k + i)] : value != 0;
    }
  expect(wrong == 0, text(wrong, " values differ from the specification's"));
  for (int64_t row = 0; row < m; ++row) {
    const auto i = Int8Case::size(row);
    const bool same = std::memcmp(&scale[i], &expected_scale[i], 4) == 0;
    expect(same && zero_point[i] == expected_zero_point[i], text("scale or zero point of row ", row));
  }
  expect(s.intact() && scale.intact() && zero_point.intact(), "a store outside");
  Guarded<uint8_t> back(q.size());
  cuda::unsigned_rows({s.data(), scale.data(), zero_point.data()}, m, k, back.data(), nullptr);
  expect(std::equal(q.data(), q.data() + q.size(), back.data()) && back.intact(), "unsigned_rows");
}

float value_of(const uint8_t* x, Type type, int64_t i) {
  if (type == Type::float32) return reinterpret_cast<const float*>(x)[i];
  const uint16_t bits = reinterpret_cast<const uint16_t*>(x)[i];
  return type == Type::bfloat16 ? __bfloat162float(__ushort_as_bfloat16(bits)) : __half2float(__ushort_as_half(bits));
}

// What stands in front, in float64: the quantizer's result must lie within the rounding of that and of q itself.
void test_before(cuda::Before before, Type type, int64_t k) {
  begin(text("cuda quantize before=", static_cast<int>(before), " type=", static_cast<int>(type), " k=", k));
  constexpr int64_t kRows = 5;
  std::mt19937 random(7);
  const size_t size = size_of(type);
  const auto fill = [&](int64_t count, float centre) {
    std::vector<uint8_t> data(Int8Case::size(count) * size);
    for (int64_t i = 0; i < count; ++i) {
      const uint32_t bits = bits_of(centre + std::normal_distribution<float>()(random), type);
      std::memcpy(data.data() + Int8Case::size(i) * size, &bits, size);
    }
    return data;
  };
  const auto x = fill(kRows * k, 0.5f), gate = fill(kRows * k, 0), weight = fill(k, 1), bias = fill(k, 0);
  const bool norm = before == cuda::Before::rms_norm || before == cuda::Before::layer_norm;
  const bool layer = before == cuda::Before::layer_norm;
  const int64_t k_pad = cuda::PackedShape{1, k}.k_pad();
  Guarded<int8_t> s(Int8Case::size(kRows * k_pad));
  Guarded<float> scale(kRows);
  Guarded<int32_t> zero_point(kRows);
  cuda::Input input{};
  input.x = x.data(), input.type = type, input.m = kRows, input.k = input.ldx = input.ldg = k;
  input.activation_bits = 8, input.before = before, input.eps = 1e-5f, input.gate = gate.data();
  if (norm) input.weight = weight.data();
  if (layer) input.bias = bias.data();
  cuda::quantize(input, {s.data(), scale.data(), zero_point.data()}, nullptr);

  const double eps = type == Type::float32 ? 0x1p-20 : type == Type::float16 ? 0x1p-10 : 0x1p-7;
  for (int64_t row = 0; row < kRows; ++row) {
    double mean = 0, square = 0;
    const auto at = [&](const std::vector<uint8_t>& data, int64_t i) {
      return static_cast<double>(value_of(data.data(), type, i));
    };
    for (int64_t i = 0; i < k && layer; ++i) mean += at(x, row * k + i) / static_cast<double>(k);
    for (int64_t i = 0; i < k; ++i) square += std::pow(at(x, row * k + i) - mean, 2) / static_cast<double>(k);
    int64_t wrong = 0;
    for (int64_t i = 0; i < k; ++i) {
      const double from = at(x, row * k + i), g = at(gate, row * k + i);
      double expected = (from - mean) / std::sqrt(square + 1e-5) * at(weight, i) + (layer ? at(bias, i) : 0);
      double reach = std::fabs((from - mean) / std::sqrt(square + 1e-5) * at(weight, i)) + 1;
      if (before == cuda::Before::silu_gate) expected = g / (1 + std::exp(-g)) * from;
      if (before == cuda::Before::gelu_gate) expected = 0.5 * g * (1 + std::erf(g / std::sqrt(2.0))) * from;
      if (before == cuda::Before::gelu_tanh_gate)
        expected = 0.5 * g * (1 + std::tanh(std::sqrt(2 / M_PI) * (g + 0.044715 * g * g * g))) * from;
      if (!norm) reach = std::fabs(expected) + 1e-3;
      const auto r = Int8Case::size(row);
      const double got = (s[Int8Case::size(row * k_pad + i)] + 128 - zero_point[r]) * static_cast<double>(scale[r]);
      wrong += std::fabs(got - expected) > static_cast<double>(scale[r]) * 1.01 + 4 * eps * reach;
    }
    expect(wrong == 0, text(wrong, " values of row ", row, " are too far from float64"));
  }
}

}  // namespace

void test_cuda_int8_quantize() {
  test_swizzle<64>();
  test_swizzle<128>();
  test_tiles();
  for (const Type type : {Type::float32, Type::bfloat16, Type::float16}) {
    for (const int64_t k : {1, 3, 4, 7, 8, 63, 64, 65, 127, 511, 512, 513, 1023, 1024, 1025, 2049})
      test_quantize(type, kRowKinds, k, k % 3 == 0 ? 16 : k % 2, k % 5 == 0 ? 7 : 8);
    test_quantize(type, 2 * kRowKinds + 3, 96, 0, 7);
    for (const int64_t k : {4096, 4097, 16384, 16385, 32769, 65536}) test_quantize(type, 2, k, k % 2, 8);
    for (int before = 1; before <= 5; ++before)
      for (const int64_t k : {5, 300, 1100, 33000}) test_before(static_cast<cuda::Before>(before), type, k);
  }
  begin("cuda quantize: no rows");
  cuda::Input none{};
  none.k = 5, none.activation_bits = 8;
  cuda::quantize(none, {}, nullptr);
  const auto with = [](int bits, int64_t k) {
    cuda::Input input{};
    input.k = k, input.activation_bits = bits;
    cuda::quantize(input, {}, nullptr);
  };
  refuses("cuda quantize: 6 bits", [&] { with(6, 8); });
  refuses("cuda quantize: no bits", [&] { with(0, 8); });
  refuses("cuda quantize: k = 0", [&] { with(8, 0); });
  refuses("cuda quantize: k = 65537", [&] { with(8, 65537); });
}

void test_cuda_int8_pack() {
  for (const int64_t n : {1, 127, 128, 129})
    for (const int64_t k : {1, 63, 64, 65, 300}) {
      begin(text("cuda pack n=", n, " k=", k));
      Int8Case c(1, n, k, Values::uniform, 7);
      Guarded<int8_t> back(c.values.size());
      cuda::unpack(c.packed.data(), n, k, back.data(), nullptr);
      expect(std::equal(back.data(), back.data() + back.size(), c.values.data()) && back.intact(), "unpack");
      for (int64_t j = 0; j < c.shape.n_pad(); ++j) {
        int32_t sum = 0, expected = 0;
        std::memcpy(&sum, c.packed.data() + c.shape.column_sum() + j * 4, 4);
        for (int64_t i = 0; i < k && j < n; ++i) expected += c.values[Int8Case::size(j * k + i)];
        expect(sum == expected, text("column sum ", j));
        const auto* row = c.packed.data() + c.shape.weights() + j * c.shape.k_pad();
        expect(std::all_of(row + (j < n ? k : 0), row + c.shape.k_pad(), [](uint8_t byte) { return byte == 0; }),
               text("padding of channel ", j));
      }
    }
  begin("cuda pack: -128");
  const std::vector<int8_t> values(200, -128);
  std::vector<uint8_t> packed(Int8Case::size(cuda::PackedShape{2, 100}.bytes()));
  int32_t refused = 0;
  cuda::pack(values.data(), 2, 100, packed.data(), &refused, nullptr);
  expect(refused == 1, "it was not reported");
  refuses("cuda pack: no channels", [&] { cuda::pack(values.data(), 0, 100, packed.data(), &refused, nullptr); });
  refuses("cuda pack: k = 65537", [&] { cuda::pack(values.data(), 2, 65537, packed.data(), &refused, nullptr); });
}

namespace {

// Every device has kernels for every size, and only those that run there; a kernel that does not is refused.
void test_dispatch() {
  for (const int arch : {80, 86, 89, 90, 100, 120})
    for (const int64_t m : {1, 16, 17, 64, 129, 512, 8192})
      for (const int64_t n : {1, 100, 4096}) {
        begin(text("cuda dispatch arch=", arch, " m=", m, " n=", n));
        const cuda::Kernel& kernel = cuda::chosen_kernel(m, n, 4096, arch, 108);
        expect(kernel.arch <= arch && (kernel.arch != 90 || arch == 90), kernel.name);
        expect(m > 16 || kernel.bm <= 64, text(kernel.name, " wastes most of its rows"));
        expect(m * n < 4096 * 4096 || kernel.bm * kernel.bn >= 128 * 128, text(kernel.name, " is too small"));
      }
  refuses("cuda dispatch: compute capability 7.5", [] { cuda::chosen_kernel(1, 1, 1, 75, 40); });
  refuses("cuda dispatch: an unknown name", [] { cuda::kernel_named("sm80_1x1x1"); });
  Int8Case c(3, 5, 7);
  std::vector<int32_t> y(15);
  emulate::options.arch = 89;
  refuses("cuda dispatch: a kernel of another architecture",
          [&] { cuda::linear(c.problem(y.data(), Type::int32), &cuda::kernel_named("sm90_64x64x128")); });
  begin("cuda dispatch: linear");
  cuda::linear(c.problem(y.data(), Type::int32), nullptr);
  for (int i = 0; i < 15; ++i) expect(y[static_cast<size_t>(i)] == c.sum(i / 5, i % 5), text("sum ", i));
  emulate::options = {};
}

}  // namespace

void test_cuda_int8_sm80() {
  test_dispatch();
  int count = 0;
  const cuda::Kernel* kernels = cuda::kernels_sm80(&count);
  for (int i = 0; i < count; ++i) check_int8_kernel(kernels[i]);
}

}  // namespace native
