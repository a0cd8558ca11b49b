#include "pack.h"

#include <algorithm>
#include <cstring>
#include <string>

#include "../common/buffer.h"
#include "../common/check.h"
#include "../dense/pack.h"
#include "../int4/pack.h"
#include "../int8/pack.h"
#include "../sparse/pack.h"

namespace pycompress::low_rank {
namespace {

constexpr PackedFormat kFormat{{'p', 'y', 'c', '.', 'l', 'o', 'w', '1'}, 1, "packed low-rank weight", "low_rank_pack"};
constexpr size_t kAlignment = 64;

template <class T>
Part append_part(std::vector<uint8_t>& out, const T* values, int64_t count) {
  if (values == nullptr || count == 0) return {0, 0};
  out.resize(round_up(out.size(), kAlignment));
  const Part part{out.size(), static_cast<uint64_t>(count) * sizeof(T)};
  append(out, values, static_cast<size_t>(count));
  return part;
}

template <class T>
Part append_part(std::vector<uint8_t>& out, const std::vector<T>& values) {
  return append_part(out, values.data(), static_cast<int64_t>(values.size()));
}

Part append_factor(std::vector<uint8_t>& out, const Weight& w, const void* matrix, int64_t n, int64_t k, int threads) {
  if (w.bits == 32) return append_part(out, dense::pack(static_cast<const float*>(matrix), n, k));
  const auto* values = static_cast<const int8_t*>(matrix);
  return append_part(out, int8::pack(int8::best_kernel(), values, n, k, w.activation_bits, threads));
}

// What the residual's own op says about it: its shape, and whether it needs a scale.
struct Outline {
  int64_t n, k;
  bool scaled;
};

Outline outline_of(Residual kind, const uint8_t* packed, int64_t bytes, int64_t n, int64_t k) {
  if (kind == Residual::int8) {
    const int8::Header& header = int8::header_of(packed, bytes);
    return {header.n, header.k, true};
  }
  if (kind == Residual::int4) {
    const int4::Header& header = int4::header_of(packed, bytes);
    check(header.activation_bits == 8, "low_rank_pack: the residual keeps its activations as floats, expected 8 bits");
    return {header.n, header.k, false};
  }
  if (kind == Residual::sparse) {
    const sparse::Header& header = sparse::header_of(packed, bytes);
    return {header.n, header.k, !sparse::is_float(header.format)};
  }
  return {n, k, false};
}

void check_weight(const Weight& w) {
  check(w.k >= 1 && w.k <= kMaxK, "low_rank_pack: in_features is ", w.k, ", expected 1 to ", kMaxK);
  check(w.n >= 1 && w.n <= INT32_MAX / 2, "low_rank_pack: out_features is ", w.n, ", expected 1 to ", INT32_MAX / 2);
  check(w.rank >= 1 && w.rank <= std::min(w.n, w.k), "low_rank_pack: the rank is ", w.rank, ", expected 1 to ",
        std::min(w.n, w.k), " for a weight [", w.n, ", ", w.k, "]");
  check(w.bits == 32 || w.bits == 8, "low_rank_pack: bits is ", w.bits, ", expected 32 or 8");
  const bool is_int8 = w.bits == 8;
  check(is_int8 ? w.activation_bits == 7 || w.activation_bits == 8 : w.activation_bits == 0,
        "low_rank_pack: activation_bits is ", w.activation_bits, ", expected 7 or 8 for int8 factors, 0 for float32");
  check((w.down_scale != nullptr) == is_int8 && (w.up_scale != nullptr) == is_int8, "low_rank_pack: the factors have ",
        w.bits, " bits, expected two scales for int8, none for float32");
  check(static_cast<uint32_t>(w.residual_kind) < kResiduals, "low_rank_pack: the residual's kind is ",
        static_cast<uint32_t>(w.residual_kind), ", expected 0 to ", kResiduals - 1);
  check((w.residual != nullptr) == (w.residual_kind != Residual::none),
        "low_rank_pack: expected a residual's kind and its weight, or neither");
  const Outline own = outline_of(w.residual_kind, static_cast<const uint8_t*>(w.residual), w.residual_bytes, w.n, w.k);
  check(own.n == w.n && own.k == w.k, "low_rank_pack: the residual is [", own.n, ", ", own.k, "], the weight [", w.n,
        ", ", w.k, "]");
  check((w.residual_scale != nullptr) == own.scaled, "low_rank_pack: the residual is ", residual_name(w.residual_kind),
        own.scaled ? " with int8 values, expected a scale" : ", expected no scale");
}

}  // namespace

const char* residual_name(Residual residual) {
  static constexpr const char* names[kResiduals] = {"", "dense", "int8", "sparse", "int4"};
  return names[static_cast<uint32_t>(residual)];
}

std::vector<uint8_t> pack(const Weight& w, int threads) {
  check_weight(w);
  Header header{};
  header.residual_kind = w.residual_kind;
  header.n = static_cast<int32_t>(w.n);
  header.k = static_cast<int32_t>(w.k);
  header.rank = static_cast<int32_t>(w.rank);
  header.bits = w.bits;
  header.activation_bits = w.activation_bits;
  std::vector<uint8_t> out(sizeof(Header));
  header.down = append_factor(out, w, w.down, w.rank, w.k, threads);
  header.up = append_factor(out, w, w.up, w.n, w.rank, threads);
  header.down_scale = append_part(out, w.down_scale, w.rank);
  header.up_scale = append_part(out, w.up_scale, w.n);
  header.residual = w.residual_kind == Residual::dense
                        ? append_part(out, dense::pack(static_cast<const float*>(w.residual), w.n, w.k))
                        : append_part(out, static_cast<const uint8_t*>(w.residual), w.residual_bytes);
  header.residual_scale = append_part(out, w.residual_scale, w.n);
  header.bytes = out.size();
  kFormat.seal(header);
  std::memcpy(out.data(), &header, sizeof(header));
  return out;
}

const Header& header_of(const uint8_t* packed, int64_t bytes) { return kFormat.header_of<Header>(packed, bytes); }

void unpack(const uint8_t* packed, int64_t bytes, const Parts& parts) {
  const Header& h = header_of(packed, bytes);
  const auto copy = [&](const Part& part, void* to) {
    if (to != nullptr && part.bytes != 0) std::memcpy(to, packed + part.offset, part.bytes);
  };
  const auto factor = [&](const Part& part, int64_t n, int64_t k, void* to) {
    if (to == nullptr) return;
    const uint8_t* at = packed + part.offset;
    if (h.bits == 32) return dense::unpack(reinterpret_cast<const float*>(at), n, k, static_cast<float*>(to));
    int8::unpack(at, static_cast<int64_t>(part.bytes), static_cast<int8_t*>(to));
  };
  factor(h.down, h.rank, h.k, parts.down);
  factor(h.up, h.n, h.rank, parts.up);
  copy(h.down_scale, parts.down_scale);
  copy(h.up_scale, parts.up_scale);
  copy(h.residual_scale, parts.residual_scale);
  if (h.residual_kind != Residual::dense) return copy(h.residual, parts.residual);
  if (parts.residual != nullptr)
    dense::unpack(reinterpret_cast<const float*>(packed + h.residual.offset), h.n, h.k,
                  static_cast<float*>(parts.residual));
}

}  // namespace pycompress::low_rank
