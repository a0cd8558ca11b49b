#include "../conv/conv.h"

#include "../common/check.h"
#include "../conv/pack.h"
#include "python.h"

namespace pycompress {
namespace {

struct Operands {
  uintptr_t x;
  int type;
  bool channels_last;
  int64_t images, channels, height, width;
  uintptr_t packed;
  int64_t packed_bytes, n;
  uintptr_t weight_scale, bias;
  int activation;
  int64_t stride_h, stride_w, pad_top, pad_left, dilation_h, dilation_w, out_h, out_w;
  uintptr_t y;
  int y_type;
};

conv::Convolution problem_of(const Operands& o, int threads) {
  conv::Convolution p{};
  p.x = pointer<const void>(o.x);
  p.type = static_cast<Type>(o.type);
  p.channels_last = p.y_channels_last = o.channels_last;
  p.images = o.images;
  p.channels = o.channels;
  p.height = o.height;
  p.width = o.width;
  p.packed = pointer<const uint8_t>(o.packed);
  p.packed_bytes = o.packed_bytes;
  p.n = o.n;
  p.weight_scale = pointer<const float>(o.weight_scale);
  p.bias = pointer<const float>(o.bias);
  p.activation = static_cast<Activation>(o.activation);
  p.stride_h = o.stride_h;
  p.stride_w = o.stride_w;
  p.pad_top = o.pad_top;
  p.pad_left = o.pad_left;
  p.dilation_h = o.dilation_h;
  p.dilation_w = o.dilation_w;
  p.out_h = o.out_h;
  p.out_w = o.out_w;
  p.y = pointer<void>(o.y);
  p.y_type = static_cast<Type>(o.y_type);
  p.threads = threads;
  return p;
}

bool run(const conv::Convolution& p) {
  const MaybeReleaseGil gil(p.images * p.out_h * p.out_w * p.n * p.channels > kReleaseGil);
  return conv::conv2d(p);
}

void int8_conv2d(uintptr_t x, int type, bool channels_last, int64_t images, int64_t channels, int64_t height,
                 int64_t width, uintptr_t packed, int64_t packed_bytes, int64_t n, uintptr_t weight_scale,
                 uintptr_t bias, int activation, int64_t stride_h, int64_t stride_w, int64_t pad_top, int64_t pad_left,
                 int64_t dilation_h, int64_t dilation_w, int64_t out_h, int64_t out_w, uintptr_t y, int y_type,
                 uintptr_t scale, uintptr_t zero_point, int threads) {
  conv::Convolution p = problem_of(
      {x,          type,         channels_last, images,     channels, height,   width,   packed,   packed_bytes,
       n,          weight_scale, bias,          activation, stride_h, stride_w, pad_top, pad_left, dilation_h,
       dilation_w, out_h,        out_w,         y,          y_type},
      threads);
  p.scale = pointer<float>(scale);
  p.zero_point = pointer<int32_t>(zero_point);
  run(p);
}

bool int8_conv2d_hand_on(uintptr_t x, int type, bool channels_last, int64_t images, int64_t channels, int64_t height,
                         int64_t width, uintptr_t packed, int64_t packed_bytes, int64_t n, uintptr_t weight_scale,
                         uintptr_t bias, int activation, int64_t stride_h, int64_t stride_w, int64_t pad_top,
                         int64_t pad_left, int64_t dilation_h, int64_t dilation_w, int64_t out_h, int64_t out_w,
                         uintptr_t y, int y_type, bool y_channels_last, float to_scale, int to_zero_point, int to_amax,
                         int64_t behind, uintptr_t addend, uintptr_t beside, int threads) {
  conv::Convolution p = problem_of(
      {x,          type,         channels_last, images,     channels, height,   width,   packed,   packed_bytes,
       n,          weight_scale, bias,          activation, stride_h, stride_w, pad_top, pad_left, dilation_h,
       dilation_w, out_h,        out_w,         y,          y_type},
      threads);
  p.y_channels_last = y_channels_last;
  if (to_scale > 0) p.to = int8::requantize(to_scale, to_zero_point, to_amax);
  p.behind = behind;
  p.addend = pointer<const float>(addend);
  p.beside = pointer<uint8_t>(beside);
  return run(p);
}

py::bytes int8_conv2d_pack(uintptr_t values, int64_t n, int64_t channels, int64_t groups, int64_t kernel_h,
                           int64_t kernel_w, int activation_bits, const std::string& kernel, int threads,
                           float input_scale, int input_zero_point) {
  const int8::Range range{input_scale, input_zero_point};
  const int8::Kernel& chosen = kernel.empty() ? int8::best_kernel() : int8::kernel_named(kernel.c_str());
  std::vector<uint8_t> packed;
  {
    py::gil_scoped_release release;
    packed = conv::pack(chosen, pointer<const int8_t>(values), n, channels, groups, kernel_h, kernel_w, activation_bits,
                        threads, range.or_null());
  }
  return py::bytes(reinterpret_cast<const char*>(packed.data()), packed.size());
}

py::dict int8_conv2d_header(uintptr_t packed, int64_t bytes) {
  const conv::Header& header = conv::header_of(pointer<const uint8_t>(packed), bytes);
  py::dict result;
  result["n"] = header.n;
  result["k"] = header.k();
  result["groups"] = header.groups;
  result["kernel_h"] = header.kernel_h;
  result["kernel_w"] = header.kernel_w;
  result["activation_bits"] = header.activation_bits;
  const int8::Range range = conv::fixed_range(header);
  result["input_scale"] = range.scale;
  result["input_zero_point"] = range.zero_point;
  return result;
}

}  // namespace

void bind_conv(py::module_& m) {
  m.def("int8_conv2d", &int8_conv2d);
  m.def("int8_conv2d_hand_on", &int8_conv2d_hand_on);
  m.def("int8_conv2d_pack", &int8_conv2d_pack);
  m.def("int8_conv2d_header", &int8_conv2d_header);
  m.def("int8_conv2d_unpack", [](uintptr_t packed, int64_t bytes, uintptr_t values) {
    conv::unpack(pointer<const uint8_t>(packed), bytes, pointer<int8_t>(values));
  });
}

}  // namespace pycompress
