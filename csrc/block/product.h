// One linear layer of a block, with any of the weights that there are: y = act(x W^T + bias), float32 [m, k] to [m, n].
// Its integers are those of the layer alone on the same x; so are its floats, but for the order of the sums in calls of
// few rows: a block calls as if there were many, so that no row depends on how many others there are.
#pragma once

#include <cstdint>
#include <optional>

#include "../common/types.h"
#include "../int8/gemm.h"

namespace pycompress::block {

enum class Weight : int { none = -1, dense = 0, int8 = 1, int4 = 2, sparse = 3, low_rank = 4 };

struct Product {
  Weight weight = Weight::none;
  int64_t n = 0, k = 0;
  const uint8_t* packed = nullptr;  // what the weight's op packed, without the scale of its channels
  int64_t packed_bytes = 0;
  const float* scale = nullptr;  // [n] or null
  const void* rows = nullptr;    // dense: [n][k] of a float type, rows ld apart
  Type type = Type::float32;
  int64_t ld = 0;
  const float* bias = nullptr;  // [n] or null

  bool is_there() const { return weight != Weight::none; }
};

// The shape of what `packed` holds, and the scale behind it taken from its bytes. False where it is too short for that.
// Throws std::invalid_argument where the weight's op did not pack it.
bool read_packed(Product* product);

// Throws std::invalid_argument where the packed weight is not one of its op of this shape, or no kernel here reads it.
void check_product(const Product& product);

// m must be a multiple of it: rows behind the last one may hold anything, and get anything.
constexpr int kRowUnit = 8;
int row_unit(const Product& product);

// Into what a product quantizes its rows: those that are quantized so need not be quantized again.
struct Quantization {
  int8::ActivationShape shape;
  int bits;
  int8::Range range;
  bool operator==(const Quantization& other) const {
    return shape.k == other.shape.k && shape.versions == other.shape.versions && bits == other.bits &&
           range == other.range;
  }
};
std::optional<Quantization> quantization_of(const Product& product);  // or none, where it leaves them as they are

// x, y: row strides ldx, n. `quantized`: the rows again, where quantization_of() said how, or null.
void multiply(const Product& product, const float* x, int64_t m, int64_t ldx, Activation activation, float* y,
              int threads, const int8::Quantized* quantized = nullptr);

}  // namespace pycompress::block
