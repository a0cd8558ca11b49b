// load, tile and finish of every sparse kernel, each alone: the specification against plain loops over the weights, the
// others against the specification, to the bit but for single rows of float32.
#include <cfloat>

#include "cases.h"
#include "int8/kernel_list.h"
#include "sparse_weight.h"

namespace native {
namespace {

using namespace pycompress;
using namespace pycompress::sparse;

const Kernel& specification(Format format) {
  const auto is = [&](const Kernel* kernel) { return kernel->format == format && kernel->isa == Isa::scalar; };
  return **std::find_if(kernels().begin(), kernels().end(), is);
}

struct Case {
  const Kernel& kernel;
  int width, rows, n, k;
  Mask mask;
  Values values;
  int activation_bits;
  Type x_type;
  std::string name() const {
    return text("kernel=", kernel.name, " width=", width, " rows=", rows, " n=", n, " k=", k, " mask=", mask.name(),
                " values=", name_of(values), " activation_bits=", activation_bits,
                " x_type=", static_cast<int>(x_type));
  }
};

// What Load reads: x itself, or quantized bytes in rows that are padded as int8::ActivationShape says.
struct Source {
  Input x;
  Guarded<uint8_t> bytes;
  int64_t stride;

  Source(const Case& c, std::mt19937& random)
      : x(c.x_type, c.rows, c.k, c.k + c.rows % 3, c.n % 2 ? Edge::end : Edge::begin, 1),
        bytes(static_cast<size_t>(c.rows * int8::ActivationShape{c.k, 1}.stride())),
        stride(int8::ActivationShape{c.k, 1}.stride()) {
    x.fill(c.rows, c.values, random);
    const int amax = (1 << c.activation_bits) - 1;
    for (size_t i = 0; i < bytes.size(); ++i)  // what lies behind a row counts for nothing, so it is random too
      bytes[i] = static_cast<uint8_t>(at_their_largest(c.values) ? amax : static_cast<int>(random() % (amax + 1)));
  }
  void load(const Kernel& kernel, const Case& c, uint8_t* tile) const {
    if (is_float(kernel.format))
      kernel.load(x.data(), c.x_type, x.ldx(), c.rows, c.k, c.width, tile);
    else
      kernel.load(bytes.data(), Type::float32, stride, c.rows, c.k, c.width, tile);
  }
};

size_t tile_bytes(Format format, int k, int width) {
  const int positions = format == Format::quads4 ? (k + 3) / 4 * 4 : k;
  return static_cast<size_t>(positions * width) * (is_float(format) ? sizeof(float) : sizeof(uint8_t));
}

// Position i of row m, in the tile that gemm.h describes.
size_t tile_index(Format format, int width, int i, int m) {
  return static_cast<size_t>(format == Format::quads4 ? (i / 4 * width + m) * 4 + i % 4 : i * width + m);
}

// The order of the rows in a tile of quads is each kernel's own affair.
void check_load(const Case& c, const uint8_t* got, const uint8_t* expected) {
  const size_t size = is_float(c.kernel.format) ? sizeof(float) : sizeof(uint8_t);
  bool equal = true;
  for (int i = 0; i < c.k && c.kernel.format != Format::quads; ++i)
    for (int m = 0; m < c.width; ++m) {
      const size_t at = tile_index(c.kernel.format, c.width, i, m) * size;
      equal = equal && std::memcmp(got + at, expected + at, size) == 0;
    }
  expect(equal, "load");
}

// sums[channel][width] of the whole weight, block by block.
void multiply(const Kernel& kernel, const Case& c, const Guarded<uint8_t>& packed, const uint8_t* tile,
              Guarded<int32_t>& sums) {
  const Header& header = header_of(packed.data(), static_cast<int64_t>(packed.size()));
  sums.fill(0x55);
  for (int64_t i = 0; i < header.k_blocks(); ++i)
    for (int64_t b = 0; b < header.n_blocks(); ++b)
      kernel.tile(block_of(packed.data(), header, b, i),
                  tile + tile_bytes(kernel.format, static_cast<int>(i) * header.kb, c.width), c.width,
                  sums.data() + b * header.nb * c.width, i > 0);
}

// The specification means what gemm.h says: one chain of fused multiply-adds, or one exact sum, per channel and row.
void check_specification(const Case& c, const Weight& w, const Source& source, const Guarded<int32_t>& sums) {
  bool equal = true;
  for (int channel = 0; channel < c.n; ++channel)
    for (int m = 0; m < c.width; ++m) {
      float chain = 0;
      int64_t sum = 0;
      const auto row = static_cast<size_t>(channel);
      for (size_t i = w.rows[row]; i < w.rows[row + 1] && m < c.rows; ++i) {
        const auto position = static_cast<int>(w.columns[i]);
        if (is_float(c.kernel.format))
          chain = std::fma(source.x.at(m, position), w.floats[i], chain);
        else
          sum += int64_t{source.bytes[static_cast<size_t>(m * source.stride + position)]} * w.ints[i];
      }
      const int32_t bits = sums[static_cast<size_t>(channel * c.width + m)];
      float value;
      std::memcpy(&value, &bits, sizeof(value));
      equal = equal && (is_float(c.kernel.format) ? value == chain : bits == sum);
    }
  expect(equal, "the specification's sums");
}

// One row of float32 may be summed in any order: both stay within the bound of the contract.
void check_single_row(const Case& c, const Weight& w, const Source& source, const Guarded<int32_t>& sums) {
  bool within = true;
  for (size_t channel = 0; channel < static_cast<size_t>(c.n); ++channel) {
    double exact = 0, magnitude = 0;
    for (size_t i = w.rows[channel]; i < w.rows[channel + 1]; ++i) {
      const double product = static_cast<double>(source.x.at(0, static_cast<int>(w.columns[i]))) * w.floats[i];
      exact += product;
      magnitude += std::fabs(product);
    }
    float value;
    std::memcpy(&value, &sums[channel], sizeof(value));
    const auto stored = static_cast<double>(w.rows[channel + 1] - w.rows[channel]);
    within = within && std::fabs(value - exact) <= static_cast<double>(FLT_EPSILON) * (stored + 2) * magnitude;
  }
  expect(within, "sums of a single row");
}

void run(const Case& c) {
  begin(c.name());
  std::mt19937 random(static_cast<unsigned>(cases));
  const Kernel& spec = specification(c.kernel.format);
  const Weight w = make_weight(c.n, c.k, c.mask, c.values, is_float(spec.format), random);
  const std::vector<uint8_t> buffer = packed_of(spec.format, w, c.activation_bits);
  Guarded<uint8_t> packed(buffer.size());
  std::memcpy(packed.data(), buffer.data(), buffer.size());
  const Source source(c, random);

  const size_t channels = static_cast<size_t>((c.n + kPanel - 1) / kPanel * kPanel);
  Guarded<uint8_t> tile(tile_bytes(spec.format, c.k, c.width)), spec_tile(tile.size());
  Guarded<int32_t> sums(channels * static_cast<size_t>(c.width)), spec_sums(sums.size());
  source.load(spec, c, spec_tile.data());
  multiply(spec, c, packed, spec_tile.data(), spec_sums);
  if (&c.kernel == &spec) return check_specification(c, w, source, spec_sums);

  source.load(c.kernel, c, tile.data());
  multiply(c.kernel, c, packed, tile.data(), sums);
  check_load(c, tile.data(), spec_tile.data());
  if (is_float(spec.format) && c.width == 1) return check_single_row(c, w, source, sums);
  const size_t count = static_cast<size_t>(c.n * c.width);
  expect(std::memcmp(sums.data(), spec_sums.data(), count * 4) == 0, "sums");
}

void run_width(const Kernel& kernel, int width) {
  constexpr int kNs[] = {1, 15, 16, 17, 48, 97, 300};
  constexpr int kKs[] = {1, 3, 4, 5, 8, 31, 32, 33, 95, 96, 97, 128, 129, 255, 256, 257, 385, 769, 1025};
  constexpr Mask kMasks[] = {{1, 1, 0.2}, {1, 1, 0.5},     {16, 1, 0.4},    {1, 1, 0.03},
                             {1, 1, 1},   {1, 1, 0},       {16, 4, 0.3},    {1, 4, 0.3},
                             {1, 1, 0.9}, {1, 1, 1, 2, 4}, {1, 1, 1, 4, 8}, {1, 1, 0.1, 0, 0, true}};
  const int rows[] = {width, 1, std::max(1, width - 1), std::max(1, width / 2), std::min(width, 7)};
  int turn = width;  // each width begins elsewhere
  for (const int k : kKs)
    for (int i = 0; i < 3; ++i, ++turn)
      run({kernel, width, rows[turn % 5], kNs[turn % 7], k, kMasks[turn % 12], static_cast<Values>(turn / 2 % kValues),
           7 + turn % 2, static_cast<Type>(turn / 5 % 3)});
}

// --- finish ---------------------------------------------------------------------------------------------------------

void run_finish(const Kernel& kernel, int width, int rows, int columns, Type type, Activation activation,
                bool by_channel) {
  begin(text("kernel=", kernel.name, " width=", width, " rows=", rows, " columns=", columns,
             " type=", static_cast<int>(type), " activation=", static_cast<int>(activation)));
  std::mt19937 random(static_cast<unsigned>(cases));
  const int turn = rows + columns + static_cast<int>(activation);
  const bool has_scale = !is_float(kernel.format), has_bias = turn % 3 != 0;
  const int bias_stride = has_bias && turn % 2 == 0 && !by_channel ? int8::kAddendStride : 0;  // each row its own
  const auto in_row = static_cast<size_t>(columns), in_column = static_cast<size_t>(rows);
  // The results of rows are read from whole panels.
  Guarded<int32_t> sums(static_cast<size_t>((by_channel ? columns : kPanel) * width)), column_sum(kPanel),
      zero_point(in_column);
  Guarded<float> bias(bias_stride == 0 ? in_row : static_cast<size_t>((rows - 1) * bias_stride + kPanel)),
      weight_scale(in_row), row_scale(in_column);
  for (size_t i = 0; i < sums.size(); ++i) {
    const float value = hard_value(i, random);
    sums[i] = static_cast<int32_t>(random() % 2000000) - 1000000;
    if (!has_scale) std::memcpy(&sums[i], &value, sizeof(value));
  }
  for (size_t i = 0; i < in_row; ++i) weight_scale[i] = 1e-3f * (1 + random() % 7);
  for (size_t i = 0; i < bias.size(); ++i) bias[i] = hard_value(i + 1, random);
  for (size_t i = 0; i < kPanel; ++i) column_sum[i] = static_cast<int32_t>(random() % 2000) - 1000;
  for (size_t i = 0; i < in_column; ++i) {
    zero_point[i] = static_cast<int32_t>(random() % 256);
    row_scale[i] = i % 5 == 4 ? std::nanf("") : 1e-3f * (1 + random() % 5);
  }
  const int8::Epilogue epilogue{has_scale ? column_sum.data() : nullptr,
                                has_scale && type != Type::int32 ? weight_scale.data() : nullptr,
                                has_bias ? bias.data() : nullptr,
                                bias_stride,
                                has_scale ? row_scale.data() : nullptr,
                                has_scale ? zero_point.data() : nullptr,
                                activation,
                                type};
  const int lines = by_channel ? columns : rows, length = by_channel ? rows : columns, ldy = length + rows % 3;
  const size_t count = static_cast<size_t>((lines - 1) * ldy + length);
  Guarded<uint8_t> y(count * size_of(type)), expected(y.size());
  y.fill(0x55), expected.fill(0x55);
  const Kernel& spec = specification(kernel.format);
  (by_channel ? kernel.finish_channels : kernel.finish)(sums.data(), width, rows, columns, epilogue, y.data(), ldy);
  (by_channel ? spec.finish_channels : spec.finish)(sums.data(), width, rows, columns, epilogue, expected.data(), ldy);
  expect(same(y.data(), expected.data(), type, count) && y.intact(), by_channel ? "finish_channels" : "finish");
}

void run_finish_edges(const Kernel& kernel, int width) {
  const bool floats = is_float(kernel.format);
  for (const int rows : {1, 2, 7, 8, 9, width - 1, width})
    for (const int columns : {1, 7, 8, 9, 15, 16})
      for (int type = 0; type < (floats ? 3 : 4) && rows >= 1 && rows <= width; ++type)
        for (int activation = 0; activation < kActivations; ++activation)
          for (int by_channel = 0; by_channel < (floats ? 2 : 1); ++by_channel)
            run_finish(kernel, width, rows, columns, static_cast<Type>(type), static_cast<Activation>(activation),
                       by_channel == 1);
}

}  // namespace

void test_sparse_kernels() {
  for_available(kernels(), [](const Kernel& kernel) {
    for (int width = 1; width <= kernel.mr; width *= 2) {
      if ((kernel.widths & static_cast<unsigned>(width)) == 0) continue;
      run_width(kernel, width);
      if (kernel.isa != Isa::scalar) run_finish_edges(kernel, width);
    }
  });
}

}  // namespace native
