// The side branch's part of _cuda; what cuda.cpp says about pointers and streams holds here too.
#include "../common/check.h"
#include "../cuda/devices.h"
#include "../low_rank/branch.h"
#include "python.h"

namespace pycompress {
namespace {

namespace branch = low_rank::branch;

// Bytes of the workspace that a call needs.
int64_t side_branch_workspace(int64_t n, int64_t k, int64_t rank, int64_t m) {
  return branch::workspace_bytes({n, k, rank}, m);
}

branch::Problem problem_of(uintptr_t stream, uintptr_t x, int x_type, int64_t m, int64_t ldx, int64_t n, int64_t k,
                           int64_t rank, int activation_bits, uintptr_t factors, uintptr_t residual,
                           uintptr_t workspace) {
  check((factors | residual) % 16 == 0 && workspace % branch::kAlign == 0,
        "low_rank_linear: the packed weight is not aligned to 16 bytes or the workspace to ", branch::kAlign);
  branch::Problem problem{};
  problem.x = pointer<const void>(x), problem.type = static_cast<Type>(x_type);
  problem.m = m, problem.ldx = ldx;
  problem.shape = {n, k, rank}, problem.activation_bits = activation_bits;
  problem.factors = pointer<const uint16_t>(factors), problem.residual = pointer<const uint8_t>(residual);
  problem.workspace = pointer<uint8_t>(workspace);
  problem.stream = pointer<CUstream_st>(stream);
  return problem;
}

void side_branch_linear(int device, uintptr_t stream, uintptr_t x, int x_type, int64_t m, int64_t ldx, int64_t n,
                        int64_t k, int64_t rank, int activation_bits, uintptr_t factors, uintptr_t residual,
                        uintptr_t weight_scale, uintptr_t bias, int activation, uintptr_t y, uintptr_t workspace,
                        const std::string& kernel) {
  const gpu::DeviceGuard guard(device);
  branch::Problem problem =
      problem_of(stream, x, x_type, m, ldx, n, k, rank, activation_bits, factors, residual, workspace);
  problem.weight_scale = pointer<const float>(weight_scale), problem.bias = pointer<const float>(bias);
  problem.activation = static_cast<Activation>(activation);
  problem.y = pointer<void>(y);
  branch::linear(problem, kernel.empty() ? nullptr : &int8::cuda::kernel_named(kernel.c_str()));
}

// Its first launch alone, for benchmarks and tests. It leaves s [m, k_pad], then aligned t [m, rank_pad], and behind it
// scale [m] and zero_point [m] in the workspace.
void side_branch_quantize(int device, uintptr_t stream, uintptr_t x, int x_type, int64_t m, int64_t ldx, int64_t n,
                          int64_t k, int64_t rank, int activation_bits, uintptr_t factors, uintptr_t residual,
                          uintptr_t workspace) {
  const gpu::DeviceGuard guard(device);
  branch::quantize_down(
      problem_of(stream, x, x_type, m, ldx, n, k, rank, activation_bits, factors, residual, workspace));
}

}  // namespace

void bind_cuda_side_branch(py::module_& m) {
  m.def("side_branch_workspace", &side_branch_workspace);
  m.def("side_branch_linear", &side_branch_linear);
  m.def("side_branch_quantize", &side_branch_quantize);
}

}  // namespace pycompress
