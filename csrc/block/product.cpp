#include "product.h"

#include "../common/check.h"
#include "../dense/linear.h"
#include "../int4/gemm.h"
#include "../int4/pack.h"
#include "../int8/pack.h"
#include "../low_rank/gemm.h"
#include "../low_rank/pack.h"
#include "../sparse/gemm.h"
#include "../sparse/pack.h"
#include "../weight_only/gemm.h"
#include "../weight_only/pack.h"

namespace pycompress::block {
namespace {

bool keeps_floats(const Product& p) {
  if (p.weight == Weight::int8) return weight_only::is_packed(p.packed, p.packed_bytes);
  return p.weight == Weight::int4 && int4::header_of(p.packed, p.packed_bytes).activation_bits != 8;
}

// Whether it adds up integers, whose order does not matter.
bool is_exact(const Product& p) {
  switch (p.weight) {
    case Weight::int8:
    case Weight::int4:
      return !keeps_floats(p);
    case Weight::sparse:
      return !sparse::is_float(sparse::header_of(p.packed, p.packed_bytes).format);
    default:
      return false;
  }
}

// n floats behind the packed weight.
bool take_scale(Product* p, int64_t n) {
  p->packed_bytes -= n * static_cast<int64_t>(sizeof(float));
  if (p->packed_bytes < 0) return false;
  p->scale = reinterpret_cast<const float*>(p->packed + p->packed_bytes);
  return true;
}

template <class Header>
const Header* front_of(const Product& p) {
  return p.packed_bytes < static_cast<int64_t>(sizeof(Header)) ? nullptr : reinterpret_cast<const Header*>(p.packed);
}

template <class Header>
bool read_shape(Product* p, bool scaled) {
  const auto* header = front_of<Header>(*p);
  if (header == nullptr) return false;
  p->n = header->n;
  p->k = header->k;
  return !scaled || (p->n >= 0 && take_scale(p, p->n));
}

}  // namespace

bool read_packed(Product* p) {
  switch (p->weight) {
    case Weight::int8:
      return weight_only::is_packed(p->packed, p->packed_bytes) ? read_shape<weight_only::Header>(p, true)
                                                                : read_shape<int8::Header>(p, true);
    case Weight::int4:
      return read_shape<int4::Header>(p, false);
    case Weight::sparse:
      return sparse::is_packed(p->packed, p->packed_bytes) &&
             read_shape<sparse::Header>(p, !sparse::is_float(front_of<sparse::Header>(*p)->format));
    case Weight::low_rank:
      return read_shape<low_rank::Header>(p, false);
    default:
      return false;
  }
}

void check_product(const Product& p) { multiply(p, nullptr, 0, p.k, Activation::none, nullptr, 1); }

int row_unit(const Product& p) { return !p.is_there() || is_exact(p) ? 1 : kRowUnit; }

std::optional<Quantization> quantization_of(const Product& p) {
  if (!p.is_there() || !is_exact(p)) return std::nullopt;
  Quantization found{{static_cast<int>(p.k), 1}, 8, {0, 0}};
  if (p.weight == Weight::int8) {
    const int8::Header& header = int8::header_of(p.packed, p.packed_bytes);
    found.shape.versions = header.versions;
    found.bits = header.activation_bits;
    found.range = int8::range_of(header);
  }
  if (p.weight == Weight::sparse) {
    const sparse::Header& header = sparse::header_of(p.packed, p.packed_bytes);
    if (sparse::is_delegated(header.format)) return std::nullopt;
    found.bits = header.activation_bits;
  }
  return found;
}

void multiply(const Product& p, const float* x, int64_t m, int64_t ldx, Activation activation, float* y, int threads,
              const int8::Quantized* quantized) {
  constexpr Type kFloat = Type::float32;
  switch (p.weight) {
    case Weight::none:
      return;
    case Weight::dense:
      return dense::linear({x, kFloat, m, p.k, ldx, p.rows, p.type, p.ld, p.n, p.bias, activation, y, kFloat, threads});
    case Weight::int8:
      if (!keeps_floats(p))
        return int8::linear({x, kFloat, m, p.k, ldx, p.packed, p.packed_bytes, p.n, p.scale, p.bias, activation, y,
                             kFloat, nullptr, nullptr, threads, quantized});
      return weight_only::linear(
          {x, kFloat, m, p.k, ldx, p.packed, p.packed_bytes, p.n, p.scale, p.bias, activation, y, kFloat, threads});
    case Weight::int4:
      if (!keeps_floats(p))
        return int4::linear(
            {x, kFloat, m, p.k, ldx, p.packed, p.packed_bytes, p.n, p.bias, activation, y, kFloat, threads, quantized});
      return weight_only::linear(
          {x, kFloat, m, p.k, ldx, p.packed, p.packed_bytes, p.n, nullptr, p.bias, activation, y, kFloat, threads});
    case Weight::sparse:
      return sparse::linear({x, kFloat, m, p.k, ldx, p.packed, p.packed_bytes, p.n, p.scale, p.bias, activation, y,
                             kFloat, nullptr, nullptr, threads, quantized});
    case Weight::low_rank:
      return low_rank::linear(
          {x, kFloat, m, p.k, ldx, p.packed, p.packed_bytes, p.n, p.bias, activation, y, kFloat, nullptr, threads});
  }
}

}  // namespace pycompress::block
