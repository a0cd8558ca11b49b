// What the bindings of 2:4 and of block sparse weights have in common: problems alike, and tables of kernels.
#pragma once

#include <string>

#include "../common/check.h"
#include "../cuda/devices.h"
#include "../sparse/element.h"
#include "cuda_rows.h"

namespace pycompress {

// kShapeOf(sizes, packed_bytes) gives the shape of a packed weight. int8: the rows of x are quantized into the
// workspace first.
template <class Problem, class Sizes, auto kShapeOf, auto kKernelNamed, auto kLinear>
void tiles_linear(int device, uintptr_t stream, const Sizes& sizes, int activation_bits, uintptr_t x, int x_type,
                  int64_t m, int64_t ldx, uintptr_t packed, int64_t packed_bytes, uintptr_t scale, uintptr_t bias,
                  int activation, uintptr_t y, int y_type, uintptr_t workspace, const std::string& kernel) {
  check(packed % 16 == 0, "sparse_linear: the packed weight is not aligned to 16 bytes, expected what sparse_pack ",
        "returns");
  const gpu::DeviceGuard guard(device);
  Problem problem{};
  problem.shape = kShapeOf(sizes, packed_bytes);
  problem.x = pointer<const void>(x), problem.ldx = ldx, problem.m = m;
  problem.packed = pointer<const uint8_t>(packed);
  problem.scale = pointer<const float>(scale), problem.bias = pointer<const float>(bias);
  problem.activation = static_cast<Activation>(activation);
  problem.y = pointer<void>(y), problem.y_type = static_cast<Type>(y_type);
  problem.stream = pointer<CUstream_st>(stream);
  const auto* forced = kernel.empty() ? nullptr : &kKernelNamed(kernel.c_str());
  if (problem.shape.element == sparse::cuda::Element::int8)
    problem.rows = quantized_rows(x, x_type, m, problem.shape.k, ldx, activation_bits, workspace, problem.stream);
  kLinear(problem, forced);
}

template <class Kernel>
py::dict tiles_kernel(const char* op, const Kernel& kernel) {
  py::dict row;
  row["op"] = op;
  row["name"] = kernel.name;
  row["element"] = static_cast<int>(kernel.element);
  row["arch"] = kernel.arch;
  row["bn"] = kernel.bn;
  row["bm"] = kernel.bm;
  row["stages"] = kernel.stages;
  return row;
}

}  // namespace pycompress
