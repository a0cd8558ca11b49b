#include "../sparse/gemm.h"

#include "../common/round.h"
#include "../sparse/pack.h"
#include "op.h"

namespace pycompress::onnxruntime {

Weight sparse_weight(const Node& node, const std::string& prefix) {
  const int64_t k = node.integer(prefix + "k");
  check(k >= 1 && k <= kMaxK, prefix, "k is ", k, ", expected 1 to ", kMaxK);
  const Tensor mask = node.constant(prefix + "mask", ElementType::uint8);
  check(mask.dims.size() == 2 && mask.dims[0] >= 1 && mask.dims[1] == divide_up(k, 8), prefix, "mask is ",
        text_of(mask.dims), ", expected [n, ", divide_up(k, 8), "] for k = ", k);
  const Tensor values = node.constant(prefix + "values", ElementType::any);
  const bool is_float = values.type == ElementType::float32;
  check((is_float || values.type == ElementType::int8) && values.dims.size() == 1, prefix, "values is ",
        text_of(values.dims), ", expected float32 or int8 [nnz]");
  check(node.has(prefix + "scale") != is_float, prefix, "scale: expected one for int8 values alone");
  Weight w{mask.dims[0], k, node.integer(prefix + "activation_bits"), {}, {}};
  w.scale = node.floats(prefix + "scale", w.n);
  const auto* bits = mask.as<uint8_t>();
  w.packed = sparse::pack(sparse::format_for("", bits, w.n, k, is_float), bits, values.data, w.n, k, values.dims[0],
                          w.activation_bits, kPackingThreads);
  return w;
}

namespace {

constexpr Input kInputs[] = {{"x", ElementType::float32, false},
                             {"mask", ElementType::uint8, false},    // [n, ceil(k / 8)]
                             {"values", ElementType::any, false},    // float32 or int8 [nnz]
                             {"scale", ElementType::float32, true},  // [n], of int8 values
                             {"bias", ElementType::float32, true}};  // [n]

void run(const Layer& layer, const float* x, int64_t m, float* y, int threads) {
  sparse::linear({x, Type::float32, m, layer.k, layer.k, layer.packed.data(), layer.packed.bytes(), layer.n,
                  or_null(layer.scale), or_null(layer.bias), layer.activation, y, Type::float32, nullptr, nullptr,
                  threads});
}

}  // namespace

const Op kSparseLinear{"SparseLinear", inputs_of(kInputs), &sparse_weight, &run};

}  // namespace pycompress::onnxruntime
