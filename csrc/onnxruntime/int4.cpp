#include "../int4/gemm.h"

#include "../common/round.h"
#include "../int4/pack.h"
#include "../weight_only/gemm.h"
#include "op.h"

namespace pycompress::onnxruntime {

Weight int4_weight(const Node& node, const std::string& prefix) {
  const int64_t k = node.integer(prefix + "k");
  const int group = node.integer(prefix + "group"), bits = node.integer(prefix + "activation_bits");
  check(group == 32 || group == 64 || group == 128, prefix, "group is ", group, ", expected 32, 64 or 128");
  const Tensor values = node.constant(prefix + "values", ElementType::uint8);
  check(values.dims.size() == 2 && values.dims[1] == divide_up(k, 2), prefix, "values is ", text_of(values.dims),
        ", expected [n, ", divide_up(k, 2), "] for k = ", k);
  const int64_t n = values.dims[0], groups = divide_up(k, group);
  const Tensor scale = node.constant(prefix + "scale", ElementType::bfloat16, {n, groups});
  const uint8_t* zero_point = nullptr;
  if (node.has(prefix + "zero_point"))
    zero_point = node.constant(prefix + "zero_point", ElementType::uint8, {n, divide_up(groups, 2)}).as<uint8_t>();
  return {n,
          k,
          bits,
          int4::pack({values.as<uint8_t>(), scale.as<uint16_t>(), zero_point, n, k, group, bits}, kPackingThreads),
          {}};
}

namespace {

constexpr Input kInputs[] = {{"x", ElementType::float32, false},
                             {"values", ElementType::uint8, false},      // [n, ceil(k / 2)]
                             {"scale", ElementType::bfloat16, false},    // [n, groups]
                             {"bias", ElementType::float32, true},       // [n]
                             {"zero_point", ElementType::uint8, true}};  // [n, ceil(groups / 2)]

void run(const Layer& layer, const float* x, int64_t m, float* y, int threads) {
  const Packed& packed = layer.packed;
  if (layer.activation_bits == 16)
    return weight_only::linear({x, Type::float32, m, layer.k, layer.k, packed.data(), packed.bytes(), layer.n, nullptr,
                                or_null(layer.bias), layer.activation, y, Type::float32, threads});
  int4::linear({x, Type::float32, m, layer.k, layer.k, packed.data(), packed.bytes(), layer.n, or_null(layer.bias),
                layer.activation, y, Type::float32, threads});
}

}  // namespace

const Op kInt4Linear{"Int4Linear", inputs_of(kInputs), &int4_weight, &run};

}  // namespace pycompress::onnxruntime
