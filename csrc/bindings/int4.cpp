#include "../int4/gemm.h"

#include "../int4/pack.h"
#include "../weight_only/gemm.h"
#include "python.h"
#include "tensors.h"

namespace pycompress {
namespace {

// By what the weight was packed for: activations quantized to 8 bits, or left as they are.
void run(const int4::Problem& p) {
  if (int4::header_of(p.packed, p.packed_bytes).activation_bits == 8) return int4::linear(p);
  weight_only::linear({p.x, p.x_type, p.m, p.k, p.ldx, p.packed, p.packed_bytes, p.n, nullptr, p.bias, p.activation,
                       p.y, p.y_type, p.threads});
}

void int4_linear(uintptr_t x, int x_type, int64_t m, int64_t k, int64_t ldx, uintptr_t packed, int64_t packed_bytes,
                 int64_t n, uintptr_t bias, int activation, uintptr_t y, int y_type, int threads) {
  const MaybeReleaseGil gil(m * n * k > kReleaseGil);
  run({pointer<const void>(x), static_cast<Type>(x_type), m, k, ldx, pointer<const uint8_t>(packed), packed_bytes, n,
       pointer<const float>(bias), static_cast<Activation>(activation), pointer<void>(y), static_cast<Type>(y_type),
       threads});
}

bool int4_linear_tensors(py::handle x, py::handle packed, py::handle bias, int activation, py::handle y, int threads) {
  LinearTensors t;
  if (!t.read(x, packed, bias, activation, y)) return false;
  const MaybeReleaseGil gil(t.m * t.n * t.k > kReleaseGil);
  run({t.x, t.type, t.m, t.k, t.k, t.packed, t.packed_bytes, t.n, t.bias, static_cast<Activation>(activation), t.y,
       t.type, threads});
  return true;
}

py::bytes int4_pack(uintptr_t values, uintptr_t scale, uintptr_t zero_point, int64_t n, int64_t k, int group,
                    int activation_bits, int threads) {
  std::vector<uint8_t> packed;
  {
    py::gil_scoped_release release;
    packed = int4::pack({pointer<const uint8_t>(values), pointer<const uint16_t>(scale),
                         pointer<const uint8_t>(zero_point), n, k, group, activation_bits},
                        threads);
  }
  return py::bytes(reinterpret_cast<const char*>(packed.data()), packed.size());
}

py::dict int4_header(uintptr_t packed, int64_t bytes) {
  const int4::Header& header = int4::header_of(pointer<const uint8_t>(packed), bytes);
  py::dict result;
  result["n"] = header.n;
  result["k"] = header.k;
  result["group"] = header.group;
  result["symmetric"] = header.symmetric != 0;
  result["activation_bits"] = header.activation_bits;
  return result;
}

}  // namespace

void bind_int4(py::module_& m) {
  m.def("int4_linear", &int4_linear);
  m.def("int4_linear_tensors", &int4_linear_tensors);
  m.def("int4_pack", &int4_pack);
  m.def("int4_header", &int4_header);
  m.def("int4_unpack", [](uintptr_t packed, int64_t bytes, uintptr_t values, uintptr_t scale, uintptr_t zero_point) {
    py::gil_scoped_release release;
    int4::unpack(pointer<const uint8_t>(packed), bytes,
                 {pointer<uint8_t>(values), pointer<uint16_t>(scale), pointer<uint8_t>(zero_point)});
  });
}

}  // namespace pycompress
