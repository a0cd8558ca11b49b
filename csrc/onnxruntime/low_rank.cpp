#include "../low_rank/gemm.h"

#include "../low_rank/pack.h"
#include "op.h"

namespace pycompress::onnxruntime {
namespace {

using low_rank::Residual;

// What stands beside the factors, by the name of its weight.
struct Beside {
  const char* name;
  Residual kind;
  Weight (*weight)(const Node& node, const std::string& prefix);
};
constexpr Beside kBeside[] = {{"int8", Residual::int8, &int8_weight},
                              {"int4", Residual::int4, &int4_weight},
                              {"sparse", Residual::sparse, &sparse_weight}};

}  // namespace

Weight low_rank_weight(const Node& node, const std::string&) {
  const Tensor down = node.constant("down", ElementType::any);
  const bool is_float = down.type == ElementType::float32;
  check((is_float || down.type == ElementType::int8) && down.dims.size() == 2, "down is ", text_of(down.dims),
        ", expected float32 or int8 [r, k]");
  const int64_t rank = down.dims[0], k = down.dims[1];
  const Tensor up = node.constant("up", down.type);
  check(up.dims.size() == 2 && up.dims[1] == rank, "up is ", text_of(up.dims), ", expected [n, ", rank, "]");
  const int64_t n = up.dims[0];
  const std::vector<float> down_scale = node.floats("down_scale", rank), up_scale = node.floats("up_scale", n);
  const int bits = node.integer("activation_bits");
  low_rank::Weight w{
      down.data,         up.data,        n,       k, rank,   is_float ? 32 : 8, bits, or_null(down_scale),
      or_null(up_scale), Residual::none, nullptr, 0, nullptr};

  const std::string beside = node.text("residual");
  Weight residual{n, k, 0, {}, {}};
  for (const auto& [name, kind, weight] : kBeside) {
    if (beside != name) continue;
    residual = weight(node, "residual_");
    check(residual.activation_bits != 16, "residual_activation_bits is 16, expected what shares quantized rows");
    w.residual_kind = kind;
    w.residual = residual.packed.data();
    w.residual_bytes = static_cast<int64_t>(residual.packed.size());
    w.residual_scale = or_null(residual.scale);
  }
  if (beside == "dense") {
    w.residual_kind = Residual::dense;
    w.residual = node.constant("residual_weight", ElementType::float32, {n, k}).data;
  }
  check(beside.empty() || w.residual_kind != Residual::none, "residual is '", beside,
        "', expected dense, int8, int4, sparse or nothing");
  return {n, k, bits, low_rank::pack(w, kPackingThreads), {}};
}

namespace {

constexpr Input kInputs[] = {{"x", ElementType::float32, false},
                             {"down", ElementType::any, false},           // float32 or int8 [r, k]
                             {"up", ElementType::any, false},             // [n, r]
                             {"down_scale", ElementType::float32, true},  // [r], of int8 factors
                             {"up_scale", ElementType::float32, true},    // [n]
                             {"bias", ElementType::float32, true},        // [n]
                             // Of a residual, as its own op has them; of a dense one `weight`, float32 [n, k]:
                             {"residual_values", ElementType::any, true},
                             {"residual_scale", ElementType::any, true},
                             {"residual_zero_point", ElementType::uint8, true},
                             {"residual_mask", ElementType::uint8, true},
                             {"residual_weight", ElementType::float32, true}};

void run(const Layer& layer, const float* x, int64_t m, float* y, int threads) {
  low_rank::linear({x, Type::float32, m, layer.k, layer.k, layer.packed.data(), layer.packed.bytes(), layer.n,
                    or_null(layer.bias), layer.activation, y, Type::float32, nullptr, threads});
}

}  // namespace

const Op kLowRankLinear{"LowRankLinear", inputs_of(kInputs), &low_rank_weight, &run};

}  // namespace pycompress::onnxruntime
