// The ops, each a linear layer: y float32 [..., n] of x float32 [..., k]. What is beside x are constants, the canonical
// tensors (pycompress/weights), which are packed as a session is made.
#pragma once

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "node.h"

namespace pycompress::onnxruntime {

// A weight that its op packed.
struct Weight {
  int64_t n, k;
  int activation_bits;  // 16: activations stay floats; 0: so do weights
  std::vector<uint8_t> packed;
  std::vector<float> scale;  // [n], or nothing
};

// `prefix`: of the names of its inputs and attributes, "" or "residual_".
Weight int8_weight(const Node& node, const std::string& prefix);
Weight int4_weight(const Node& node, const std::string& prefix);
Weight sparse_weight(const Node& node, const std::string& prefix);
Weight low_rank_weight(const Node& node, const std::string& prefix);

struct Layer {
  const int64_t n, k;
  const int activation_bits;
  const Packed packed;
  const std::vector<float> scale, bias;  // [n], or nothing
  const Activation activation;

  Layer(const Node& node, Weight weight)
      : n(weight.n),
        k(weight.k),
        activation_bits(weight.activation_bits),
        packed(weight.packed),
        scale(std::move(weight.scale)),
        bias(node.floats("bias", n)),
        activation(node.activation()) {}
};

struct Op {
  const char* name;
  Inputs inputs;
  Weight (*weight)(const Node& node, const std::string& prefix);
  // x [m, k], y [m, n]. Called by several threads at once.
  void (*run)(const Layer& layer, const float* x, int64_t m, float* y, int threads);
};
extern const Op kInt8Linear, kInt4Linear, kSparseLinear, kLowRankLinear;

constexpr int kPackingThreads = 1;  // a session is made on one

}  // namespace pycompress::onnxruntime
