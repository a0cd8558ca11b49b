#include "../common/check.h"
#include "../sparse/gemm.h"
#include "../sparse/pack.h"
#include "python.h"
#include "tensors.h"

namespace pycompress {
namespace {

void sparse_linear(uintptr_t x, int x_type, int64_t m, int64_t k, int64_t ldx, uintptr_t packed, int64_t packed_bytes,
                   int64_t n, uintptr_t weight_scale, uintptr_t bias, int activation, uintptr_t y, int y_type,
                   uintptr_t row_scale, uintptr_t zero_point, int threads) {
  const sparse::Problem problem{pointer<const void>(x),
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
  sparse::linear(problem);
}

// Behind int8 weights lies their scale; the header stands at the front of the buffer in any case.
bool has_scale(const LinearTensors& t) {
  return sparse::is_packed(t.packed, t.packed_bytes) &&
         !sparse::is_float(reinterpret_cast<const sparse::Header*>(t.packed)->format);
}

bool sparse_linear_tensors(py::handle x, py::handle packed, py::handle bias, int activation, py::handle y,
                           int threads) {
  LinearTensors t;
  if (!t.read(x, packed, bias, activation, y)) return false;
  const float* scale = has_scale(t) ? t.scale_behind() : nullptr;
  const MaybeReleaseGil gil(t.m * t.n * t.k > kReleaseGil);
  sparse::linear({t.x, t.type, t.m, t.k, t.k, t.packed, t.packed_bytes, t.n, scale, t.bias,
                  static_cast<Activation>(activation), t.y, t.type, nullptr, nullptr, threads});
  return true;
}

py::bytes sparse_pack(uintptr_t mask, uintptr_t values, int64_t n, int64_t k, int64_t nonzeros, int bits,
                      int activation_bits, const std::string& format, int threads) {
  check(bits == 32 || bits == 8, "sparse_pack: bits is ", bits, ", expected 32 or 8");
  std::vector<uint8_t> packed;
  {
    py::gil_scoped_release release;
    const auto* bitmask = pointer<const uint8_t>(mask);
    packed = sparse::pack(sparse::format_for(format.c_str(), bitmask, n, k, bits == 32), bitmask,
                          pointer<const void>(values), n, k, nonzeros, activation_bits, threads);
  }
  return py::bytes(reinterpret_cast<const char*>(packed.data()), packed.size());
}

py::dict sparse_header(uintptr_t packed, int64_t bytes) {
  const sparse::Header& header = sparse::header_of(pointer<const uint8_t>(packed), bytes);
  py::dict result;
  result["n"] = header.n;
  result["k"] = header.k;
  result["nnz"] = header.nonzeros;
  result["bits"] = sparse::is_float(header.format) ? 32 : 8;
  result["activation_bits"] = header.activation_bits;
  result["format"] = sparse::format_name(header.format);
  return result;
}

void sparse_conv2d(uintptr_t x, int type, int64_t images, int64_t channels, int64_t height, int64_t width,
                   uintptr_t packed, int64_t packed_bytes, int64_t n, uintptr_t bias, int activation, int64_t kernel_h,
                   int64_t kernel_w, int64_t stride_h, int64_t stride_w, int64_t pad_top, int64_t pad_left,
                   int64_t dilation_h, int64_t dilation_w, int64_t out_h, int64_t out_w, uintptr_t y, int threads) {
  const sparse::Convolution problem{pointer<const void>(x),
                                    static_cast<Type>(type),
                                    images,
                                    channels,
                                    height,
                                    width,
                                    pointer<const uint8_t>(packed),
                                    packed_bytes,
                                    n,
                                    pointer<const float>(bias),
                                    static_cast<Activation>(activation),
                                    kernel_h,
                                    kernel_w,
                                    stride_h,
                                    stride_w,
                                    pad_top,
                                    pad_left,
                                    dilation_h,
                                    dilation_w,
                                    out_h,
                                    out_w,
                                    pointer<void>(y),
                                    threads};
  const MaybeReleaseGil gil(images * out_h * out_w * n * channels * kernel_h * kernel_w > kReleaseGil);
  sparse::conv2d(problem);
}

}  // namespace

void bind_sparse(py::module_& m) {
  m.def("sparse_linear", &sparse_linear);
  m.def("sparse_linear_tensors", &sparse_linear_tensors);
  m.def("sparse_conv2d", &sparse_conv2d);
  m.def("sparse_pack", &sparse_pack);
  m.def("sparse_header", &sparse_header);
  m.def("sparse_unpack", [](uintptr_t packed, int64_t bytes, uintptr_t mask, uintptr_t values) {
    py::gil_scoped_release release;
    sparse::unpack(pointer<const uint8_t>(packed), bytes, pointer<uint8_t>(mask), pointer<void>(values));
  });
}

}  // namespace pycompress
