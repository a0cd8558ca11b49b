#include "../common/check.h"
#include "../low_rank/gemm.h"
#include "../low_rank/pack.h"
#include "python.h"
#include "tensors.h"

namespace pycompress {
namespace {

int64_t multiply_adds(int64_t m, const low_rank::Header& header) {
  const int64_t residual = header.residual_kind == low_rank::Residual::none ? 0 : int64_t{header.n} * header.k;
  return m * (int64_t{header.rank} * (header.n + header.k) + residual);
}

void low_rank_linear(uintptr_t x, int x_type, int64_t m, int64_t k, int64_t ldx, uintptr_t packed, int64_t packed_bytes,
                     int64_t n, uintptr_t bias, int activation, uintptr_t y, int y_type, uintptr_t intermediate,
                     int threads) {
  const low_rank::Problem problem{pointer<const void>(x),
                                  static_cast<Type>(x_type),
                                  m,
                                  k,
                                  ldx,
                                  pointer<const uint8_t>(packed),
                                  packed_bytes,
                                  n,
                                  pointer<const float>(bias),
                                  static_cast<Activation>(activation),
                                  pointer<void>(y),
                                  static_cast<Type>(y_type),
                                  pointer<float>(intermediate),
                                  threads};
  const MaybeReleaseGil gil(multiply_adds(m, low_rank::header_of(problem.packed, packed_bytes)) > kReleaseGil);
  low_rank::linear(problem);
}

bool low_rank_linear_tensors(py::handle x, py::handle packed, py::handle bias, int activation, py::handle y,
                             int threads) {
  LinearTensors t;
  if (!t.read(x, packed, bias, activation, y)) return false;
  const MaybeReleaseGil gil(multiply_adds(t.m, low_rank::header_of(t.packed, t.packed_bytes)) > kReleaseGil);
  low_rank::linear({t.x, t.type, t.m, t.k, t.k, t.packed, t.packed_bytes, t.n, t.bias,
                    static_cast<Activation>(activation), t.y, t.type, nullptr, threads});
  return true;
}

py::bytes low_rank_pack(uintptr_t down, uintptr_t up, int64_t n, int64_t k, int64_t rank, int bits, int activation_bits,
                        uintptr_t down_scale, uintptr_t up_scale, uint32_t residual_kind, uintptr_t residual,
                        int64_t residual_bytes, uintptr_t residual_scale, int threads) {
  const low_rank::Weight weight{pointer<const void>(down),
                                pointer<const void>(up),
                                n,
                                k,
                                rank,
                                bits,
                                activation_bits,
                                pointer<const float>(down_scale),
                                pointer<const float>(up_scale),
                                static_cast<low_rank::Residual>(residual_kind),
                                pointer<const void>(residual),
                                residual_bytes,
                                pointer<const float>(residual_scale)};
  std::vector<uint8_t> buffer;
  {
    py::gil_scoped_release release;
    buffer = low_rank::pack(weight, threads);
  }
  return py::bytes(reinterpret_cast<const char*>(buffer.data()), buffer.size());
}

py::dict low_rank_header(uintptr_t packed, int64_t bytes) {
  const low_rank::Header& header = low_rank::header_of(pointer<const uint8_t>(packed), bytes);
  py::dict result;
  result["n"] = header.n;
  result["k"] = header.k;
  result["rank"] = header.rank;
  result["bits"] = header.bits;
  result["activation_bits"] = header.activation_bits;
  result["residual"] = low_rank::residual_name(header.residual_kind);
  const bool is_dense = header.residual_kind == low_rank::Residual::dense;  // in panels it may take more
  result["residual_bytes"] = is_dense ? uint64_t{4} * static_cast<uint64_t>(header.n) * static_cast<uint64_t>(header.k)
                                      : header.residual.bytes;
  result["residual_scaled"] = header.residual_scale.bytes != 0;
  return result;
}

}  // namespace

void bind_low_rank(py::module_& m) {
  m.def("low_rank_linear", &low_rank_linear);
  m.def("low_rank_linear_tensors", &low_rank_linear_tensors);
  m.def("low_rank_pack", &low_rank_pack);
  m.def("low_rank_header", &low_rank_header);
  m.def("low_rank_unpack", [](uintptr_t packed, int64_t bytes, uintptr_t down, uintptr_t up, uintptr_t down_scale,
                              uintptr_t up_scale, uintptr_t residual, uintptr_t residual_scale) {
    py::gil_scoped_release release;
    low_rank::unpack(pointer<const uint8_t>(packed), bytes,
                     {pointer<void>(down), pointer<void>(up), pointer<float>(down_scale), pointer<float>(up_scale),
                      pointer<void>(residual), pointer<float>(residual_scale)});
  });
}

}  // namespace pycompress
