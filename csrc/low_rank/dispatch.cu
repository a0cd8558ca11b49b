// The table of the CUDA kernels, and which of the three ways takes a problem.
#include "../common/check.h"
#include "../cuda/launch.h"
#include "cuda_kernel_list.h"

namespace pycompress::low_rank::cuda {

const std::vector<const Kernel*>& cuda_kernels() {
  static const std::vector<const Kernel*> all = [] {
    std::vector<const Kernel*> list;
    const auto add = [&](const auto& of_way) { list.insert(list.end(), of_way.begin(), of_way.end()); };
    add(kernels_few());
    add(kernels_fused());
    add(kernels_wide());
    return list;
  }();
  return all;
}

Plan plan(const Factors& shape, Type type, int64_t m, int arch, int multiprocessors) {
  check(type == Type::float16 || type == Type::bfloat16, "low_rank_linear: x is of type ", static_cast<int>(type),
        ", expected float16 or bfloat16");
  Priced best = price_few(shape, type, m, multiprocessors);
  if (m <= kMaxRows) return best.plan;
  const auto consider = [&](const Priced& other) {
    if (other.cycles < best.cycles) best = other;
  };
  if (shape.rank <= kFusedRank) consider(price_fused(shape, type, m, arch, multiprocessors));
  consider(price_wide(shape, type, m, arch, multiprocessors));
  return best.plan;
}

Plan plan(const Kernel& kernel, const Factors& shape, int64_t m, int splits) {
  return kernel.plan(kernel, shape, m, splits);
}

void linear(const Problem& p, const Plan& plan) {
  const Factors& shape = p.shape;
  check(shape.n >= 1 && shape.k >= 1 && shape.k <= kMaxK && shape.rank >= kTile && shape.rank % kTile == 0,
        "low_rank_linear: the packed weight is ", shape.n, "x", shape.k, " of rank ", shape.rank,
        ", expected n >= 1, k from 1 to ", kMaxK, " and a multiple of ", kTile);
  check(plan.down.kernel->type == p.type && plan.up.kernel->type == p.type, "low_rank_linear: kernels ",
        plan.down.kernel->name, " and ", plan.up.kernel->name, " for x of type ", static_cast<int>(p.type));
  if (p.m == 0) return;
  check(p.workspace != nullptr || plan.workspace == 0, "low_rank_linear: no workspace, expected ", plan.workspace,
        " bytes");
  plan.down.kernel->run(p, plan);
}

}  // namespace pycompress::low_rank::cuda
