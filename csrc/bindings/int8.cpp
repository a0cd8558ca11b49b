#include "../int8/gemm.h"

#include "../common/check.h"
#include "../int8/pack.h"
#include "../weight_only/pack.h"
#include "python.h"
#include "tensors.h"

namespace pycompress {
namespace {

// By what the weight was packed for: activations quantized to 7 or 8 bits, or left as they are.
void run(const int8::Problem& p) {
  if (!weight_only::is_packed(p.packed, p.packed_bytes)) return int8::linear(p);
  weight_only::linear({p.x, p.x_type, p.m, p.k, p.ldx, p.packed, p.packed_bytes, p.n, p.weight_scale, p.bias,
                       p.activation, p.y, p.y_type, p.threads});
}

void int8_linear(uintptr_t x, int x_type, int64_t m, int64_t k, int64_t ldx, uintptr_t packed, int64_t packed_bytes,
                 int64_t n, uintptr_t weight_scale, uintptr_t bias, int activation, uintptr_t y, int y_type,
                 uintptr_t row_scale, uintptr_t zero_point, int threads) {
  const int8::Problem problem{pointer<const void>(x),
                              static_cast<Type>(x_type),
                              m,
                              k,
                              ldx,
                              pointer<const uint8_t>(packed),
                              packed_bytes,
                              n,
                              pointer<const float>(weight_scale),
                              pointer<const float>(bias),
                              static_cast<Activation>(activation),
                              pointer<void>(y),
                              static_cast<Type>(y_type),
                              pointer<float>(row_scale),
                              pointer<int32_t>(zero_point),
                              threads};
  const MaybeReleaseGil gil(m * n * k > kReleaseGil);
  run(problem);
}

bool int8_linear_tensors(py::handle x, py::handle packed, py::handle bias, int activation, py::handle y, int threads) {
  LinearTensors t;
  if (!t.read(x, packed, bias, activation, y)) return false;
  const float* scale = t.scale_behind();
  const MaybeReleaseGil gil(t.m * t.n * t.k > kReleaseGil);
  run({t.x, t.type, t.m, t.k, t.k, t.packed, t.packed_bytes, t.n, scale, t.bias, static_cast<Activation>(activation),
       t.y, t.type, nullptr, nullptr, threads});
  return true;
}

py::bytes int8_pack(uintptr_t values, int64_t n, int64_t k, int activation_bits, const std::string& kernel, int threads,
                    float input_scale, int input_zero_point) {
  const int8::Range range{input_scale, input_zero_point};
  check(activation_bits != 16 || kernel.empty(), "int8_pack: the kernel ", kernel, " reads 7- or 8-bit activations");
  check(activation_bits != 16 || range.or_null() == nullptr,
        "int8_pack: a range of the input was given, expected none where it stays in floating point");
  const int8::Kernel& chosen = kernel.empty() ? int8::best_kernel() : int8::kernel_named(kernel.c_str());
  std::vector<uint8_t> packed;
  {
    py::gil_scoped_release release;
    const auto* from = pointer<const int8_t>(values);
    packed = activation_bits == 16 ? weight_only::pack(from, n, k)
                                   : int8::pack(chosen, from, n, k, activation_bits, threads, range.or_null());
  }
  return py::bytes(reinterpret_cast<const char*>(packed.data()), packed.size());
}

py::dict int8_header(uintptr_t packed, int64_t bytes) {
  static constexpr const char* kLayouts[] = {"rows", "dot4", "chains", "windows"};  // by int8::Layout
  py::dict result;
  if (weight_only::is_packed(pointer<const uint8_t>(packed), bytes)) {
    const weight_only::Header& header = weight_only::header_of(pointer<const uint8_t>(packed), bytes);
    result["n"] = header.n;
    result["k"] = header.k;
    result["activation_bits"] = 16;
    result["layout"] = "weight_only";
    result["groups"] = 0;
    result["items"] = py::make_tuple(0, 0, 0);
    result["input_scale"] = 0.0f;
    result["input_zero_point"] = 0;
    return result;
  }
  const int8::Header& header = int8::header_of(pointer<const uint8_t>(packed), bytes);
  const int8::Range range = int8::range_of(header);
  const int8::Depths depths = int8::depths(pointer<const uint8_t>(packed), bytes);
  result["n"] = header.n;
  result["k"] = header.k;
  result["activation_bits"] = header.activation_bits;
  result["layout"] = kLayouts[static_cast<int>(header.layout)];
  result["groups"] = depths.groups;
  result["items"] = py::make_tuple(depths.items[0], depths.items[1], depths.items[2]);
  result["input_scale"] = range.scale;
  result["input_zero_point"] = range.zero_point;
  return result;
}

}  // namespace

void bind_int8(py::module_& m) {
  m.def("int8_linear", &int8_linear);
  m.def("use_exchange", &use_exchange);
  m.def("int8_linear_tensors", &int8_linear_tensors);
  m.def("int8_pack", &int8_pack);
  m.def("int8_unpack", [](uintptr_t packed, int64_t bytes, uintptr_t values) {
    const auto* from = pointer<const uint8_t>(packed);
    if (weight_only::is_packed(from, bytes)) return weight_only::unpack(from, bytes, pointer<int8_t>(values));
    int8::unpack(from, bytes, pointer<int8_t>(values));
  });
  m.def("int8_header", &int8_header);
  m.def("int8_quantize", [](uintptr_t x, int type, int64_t rows, int64_t k, int64_t ldx, int bits, float input_scale,
                            int input_zero_point, uintptr_t q, uintptr_t scale, uintptr_t zero_point) {
    const int8::Range range{input_scale, input_zero_point};
    int8::quantize(int8::best_kernel(), pointer<const void>(x), static_cast<Type>(type), rows, k, ldx, bits,
                   range.or_null(), pointer<uint8_t>(q), pointer<float>(scale), pointer<int32_t>(zero_point));
  });
  m.def("int8_round", [](uintptr_t x, int type, int64_t rows, int64_t k, int64_t ldx, int bits, float input_scale,
                         int input_zero_point, uintptr_t y, int threads) {
    const int8::Range range{input_scale, input_zero_point};
    const MaybeReleaseGil gil(rows * k > kReleaseGil);
    int8::round_rows(int8::best_kernel(), pointer<const void>(x), static_cast<Type>(type), rows, k, ldx, bits,
                     range.or_null(), pointer<float>(y), threads);
  });
}

}  // namespace pycompress
