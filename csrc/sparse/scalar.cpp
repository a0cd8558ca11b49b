// The specification: plain loops over the elements of a block, as gemm.h and pack.h describe them.
#include <cmath>

#include "../common/activation.h"
#include "../common/float16.h"
#include "../int8/kernel_list.h"
#include "kernel_list.h"

namespace pycompress::sparse {
namespace {

// A byte is four times as small as a float, so everything is a matter of where position k of row m lies in the tile.
void load_float(const void* x, Type type, ptrdiff_t ldx, int rows, int64_t k, int width, void* tile) {
  auto* out = static_cast<float*>(tile);
  for (int64_t i = 0; i < k; ++i)
    for (int m = 0; m < width; ++m) out[i * width + m] = m < rows ? float_at(x, type, m * ldx + i) : 0.0f;
}

void load_bytes(const void* x, Type, ptrdiff_t ldx, int rows, int64_t k, int width, void* tile) {
  auto* out = static_cast<uint8_t*>(tile);
  for (int64_t i = 0; i < k; ++i)
    for (int m = 0; m < width; ++m)
      out[i * width + m] = m < rows ? static_cast<const uint8_t*>(x)[m * ldx + i] : uint8_t{0};
}

void load_groups(const void* x, Type, ptrdiff_t ldx, int rows, int64_t k, int width, void* tile) {
  auto* out = static_cast<uint8_t*>(tile);
  for (int64_t i = 0; i < (k + 3) / 4 * 4; ++i)
    for (int m = 0; m < width; ++m)
      out[i / 4 * 4 * width + 4 * m + i % 4] =
          m < rows && i < k ? static_cast<const uint8_t*>(x)[m * ldx + i] : uint8_t{0};
}

// f(channel or panel, its elements, their index, their values) for each entry of a block.
template <int kIndices, class Value, class F>
void each_entry(const Block& block, int values_per_element, F&& f) {
  const uint8_t* index = block.index;
  const auto* values = static_cast<const Value*>(block.values);
  const uint16_t* entry = block.order;
  for (int r = 0; r < block.run_count; ++r)
    for (int e = 0; e < block.runs[2 * r + 1]; ++e, ++entry) {
      const int count = block.runs[2 * r];
      f(*entry, count, index, values);
      index += count * kIndices;
      values += count * values_per_element;
    }
}

void tile_rows(const Block& block, const void* tile, int width, void* sums, bool accumulate) {
  const auto* x = static_cast<const float*>(tile);
  each_entry<1, float>(block, 1, [&](int channel, int count, const uint8_t* index, const float* w) {
    for (int m = 0; m < width; ++m) {
      float& sum = static_cast<float*>(sums)[channel * width + m];
      if (!accumulate) sum = 0;
      for (int i = 0; i < count; ++i) sum = std::fma(x[index[i] * width + m], w[i], sum);
    }
  });
}

void tile_panels(const Block& block, const void* tile, int width, void* sums, bool accumulate) {
  const auto* x = static_cast<const float*>(tile);
  each_entry<1, float>(block, kPanel, [&](int panel, int count, const uint8_t* index, const float* w) {
    for (int c = 0; c < kPanel; ++c)
      for (int m = 0; m < width; ++m) {
        float& sum = static_cast<float*>(sums)[(panel * kPanel + c) * width + m];
        if (!accumulate) sum = 0;
        for (int i = 0; i < count; ++i) sum = std::fma(x[index[i] * width + m], w[i * kPanel + c], sum);
      }
  });
}

void tile_quads(const Block& block, const void* tile, int width, void* sums, bool accumulate) {
  const auto* x = static_cast<const uint8_t*>(tile);
  each_entry<4, int8_t>(block, 4, [&](int channel, int count, const uint8_t* index, const int8_t* w) {
    for (int m = 0; m < width; ++m) {
      int32_t& sum = static_cast<int32_t*>(sums)[channel * width + m];
      if (!accumulate) sum = 0;
      for (int i = 0; i < 4 * count; ++i) sum += x[index[i] * width + m] * w[i];
    }
  });
}

void tile_quads4(const Block& block, const void* tile, int width, void* sums, bool accumulate) {
  const auto* x = static_cast<const uint8_t*>(tile);
  each_entry<1, int8_t>(block, 4, [&](int channel, int count, const uint8_t* index, const int8_t* w) {
    for (int m = 0; m < width; ++m) {
      int32_t& sum = static_cast<int32_t*>(sums)[channel * width + m];
      if (!accumulate) sum = 0;
      for (int i = 0; i < 4 * count; ++i) sum += x[(index[i / 4] * width + m) * 4 + i % 4] * w[i];
    }
  });
}

void finish_float(const void* sums, int width, int rows, int columns, const int8::Epilogue& e, void* y, ptrdiff_t ldy) {
  for (int m = 0; m < rows; ++m)
    for (int n = 0; n < columns; ++n) {
      Scalar v{static_cast<const float*>(sums)[n * width + m]};
      if (e.bias != nullptr) v = v + Scalar{e.bias[m * e.bias_stride + n]};
      put_float(y, e.type, m * ldy + n, activate(e.activation, v).value);
    }
}

void finish_channels(const void* sums, int width, int rows, int columns, const int8::Epilogue& e, void* y,
                     ptrdiff_t ldy) {
  for (int n = 0; n < columns; ++n)
    for (int m = 0; m < rows; ++m) {
      Scalar v{static_cast<const float*>(sums)[n * width + m]};
      if (e.bias != nullptr) v = v + Scalar{e.bias[n]};
      put_float(y, e.type, n * ldy + m, activate(e.activation, v).value);
    }
}

void finish_int(const void* sums, int width, int rows, int columns, const int8::Epilogue& e, void* y, ptrdiff_t ldy) {
  int32_t turned[kMaxWidth * kPanel];
  for (int m = 0; m < rows; ++m)
    for (int n = 0; n < columns; ++n) turned[m * kPanel + n] = static_cast<const int32_t*>(sums)[n * width + m];
  int8::kScalar.finish(turned, kPanel, rows, columns, e, y, ldy);
}

constexpr unsigned kAllWidths = 1 | 8 | 16 | 32 | 64;

}  // namespace

const Kernel kScalarRows{"scalar_rows", Isa::scalar, Format::rows, kMaxWidth,      1, 1, kAllWidths,
                         load_float,    tile_rows,   finish_float, finish_channels};
const Kernel kScalarPanels{"scalar_panels", Isa::scalar, Format::panels, kMaxWidth,    kPanel,         1,
                           kAllWidths,      load_float,  tile_panels,    finish_float, finish_channels};
const Kernel kScalarQuads{"scalar_quads", Isa::scalar, Format::quads, kMaxWidth,  1,      4,
                          kAllWidths,     load_bytes,  tile_quads,    finish_int, nullptr};
const Kernel kScalarQuads4{"scalar_quads4", Isa::scalar, Format::quads4, kMaxWidth,  1,      4,
                           kAllWidths,      load_groups, tile_quads4,    finish_int, nullptr};

}  // namespace pycompress::sparse
