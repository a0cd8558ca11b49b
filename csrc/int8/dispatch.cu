// The table of the CUDA kernels, and which of them takes a problem.

#include "../common/check.h"
#include "../cuda/kernel_table.h"
#include "../cuda/launch.h"
#include "cuda_kernel_list.h"

namespace pycompress::int8::cuda {
namespace {

const gpu::KernelTable<Kernel>& table() {
  static const gpu::KernelTable<Kernel> all("int8", {kernels_sm90, kernels_sm80});
  return all;
}

void check_branch(const Problem& p) {
  const Branch& branch = p.branch;
  check(branch.type == Type::bfloat16 || branch.type == Type::float16, "int8_linear: a branch of type ",
        static_cast<int>(branch.type), ", expected float16 or bfloat16");
  check(branch.rank >= 1 && branch.rank <= branch.rank_pad && branch.rank_pad % kPadRank == 0,
        "int8_linear: a branch of rank ", branch.rank, " with ", branch.rank_pad,
        " values a row, expected at least 1, rows of a multiple of ", kPadRank);
  check(branch.up != nullptr && reinterpret_cast<uintptr_t>(branch.t) % 16 == 0 &&
            reinterpret_cast<uintptr_t>(branch.up) % 16 == 0,
        "int8_linear: the branch's t at ", branch.t, ", up at ", branch.up, ", expected both aligned to 16 bytes");
  check(p.weight_scale != nullptr && p.y_type != Type::int32, "int8_linear: a branch beside sums that are not scaled");
}

}  // namespace

const Kernel* kernels(int* count) { return table().all(count); }

const Kernel& kernel_named(const char* name) { return table().named(name); }

const Kernel& chosen_kernel(int64_t m, int64_t n, int64_t k, int arch, int multiprocessors) {
  return table().cheapest(
      arch, [&](const Kernel& kernel) { return gpu::runs_on(kernel, arch); },
      [&](const Kernel& kernel) { return gpu::cycles(kernel, m, n, k, multiprocessors); });
}

void linear(const Problem& p, const Kernel* forced) {
  if (p.m == 0) return;
  if (p.branch.t != nullptr) check_branch(p);
  const gpu::Device device = gpu::device();
  const Kernel& kernel =
      forced != nullptr ? *forced : chosen_kernel(p.m, p.n, p.k, device.arch, device.multiprocessors);
  gpu::check_runs_on(kernel, device.arch);
  kernel.run(p);
}

}  // namespace pycompress::int8::cuda
