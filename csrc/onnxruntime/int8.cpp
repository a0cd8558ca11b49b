#include "../int8/gemm.h"

#include "../int8/pack.h"
#include "../weight_only/pack.h"
#include "op.h"

namespace pycompress::onnxruntime {

Weight int8_weight(const Node& node, const std::string& prefix) {
  const Tensor values = node.constant(prefix + "values", ElementType::int8);
  check(values.dims.size() == 2, prefix, "values is ", text_of(values.dims), ", expected [n, k]");
  Weight w{values.dims[0], values.dims[1], node.integer(prefix + "activation_bits"), {}, {}};
  w.scale = node.constant(prefix + "scale", ElementType::float32, {w.n}).copy<float>();
  const auto* from = values.as<int8_t>();
  const bool is_static = prefix.empty() && node.has("input_scale");
  if (w.activation_bits == 16) {
    check(!is_static, "input_scale is there, expected none where x stays in floating point");
    w.packed = weight_only::pack(from, w.n, w.k);
    return w;
  }
  int8::Range range{0, 0};
  if (is_static)
    range = {*node.constant("input_scale", ElementType::float32, {1}).as<float>(),
             *node.constant("input_zero_point", ElementType::uint8, {1}).as<uint8_t>()};
  w.packed =
      int8::pack(int8::best_kernel(), from, w.n, w.k, w.activation_bits, kPackingThreads, is_static ? &range : nullptr);
  return w;
}

namespace {

constexpr Input kInputs[] = {{"x", ElementType::float32, false},
                             {"values", ElementType::int8, false},         // [n, k]
                             {"scale", ElementType::float32, false},       // [n]
                             {"bias", ElementType::float32, true},         // [n]
                             {"input_scale", ElementType::float32, true},  // [1], of a static weight
                             {"input_zero_point", ElementType::uint8, true}};

void run(const Layer& layer, const float* x, int64_t m, float* y, int threads) {
  const Packed& packed = layer.packed;
  if (layer.activation_bits == 16)
    return weight_only::linear({x, Type::float32, m, layer.k, layer.k, packed.data(), packed.bytes(), layer.n,
                                layer.scale.data(), or_null(layer.bias), layer.activation, y, Type::float32, threads});
  int8::linear({x, Type::float32, m, layer.k, layer.k, packed.data(), packed.bytes(), layer.n, layer.scale.data(),
                or_null(layer.bias), layer.activation, y, Type::float32, nullptr, nullptr, threads});
}

}  // namespace

const Op kInt8Linear{"Int8Linear", inputs_of(kInputs), &int8_weight, &run};

}  // namespace pycompress::onnxruntime
