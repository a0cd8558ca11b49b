// The table of the CUDA kernels, and which of them takes a problem.
#include <cstdlib>
#include <cstring>
#include <vector>

#include "../common/check.h"
#include "../cuda/launch.h"
#include "../cuda/tiles.h"
#include "cuda_kernel_list.h"

namespace pycompress::int8::cuda {
namespace {

const std::vector<Kernel>& table() {
  static const std::vector<Kernel> list = [] {
    std::vector<Kernel> all;
    for (const auto of_arch : {kernels_sm90, kernels_sm80}) {
      int count = 0;
      const Kernel* first = of_arch(&count);
      all.insert(all.end(), first, first + count);
    }
    return all;
  }();
  return list;
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

const Kernel* kernels(int* count) {
  *count = static_cast<int>(table().size());
  return table().data();
}

const Kernel& kernel_named(const char* name) {
  for (const Kernel& kernel : table())
    if (std::strcmp(kernel.name, name) == 0) return kernel;
  check(false, "no int8 kernel for CUDA is named '", name, "'");
  std::abort();
}

const Kernel& chosen_kernel(int64_t m, int64_t n, int64_t k, int arch, int multiprocessors) {
  const Kernel* best = nullptr;
  for (const Kernel& kernel : table())
    if (gpu::runs_on(kernel, arch) && (best == nullptr || gpu::cycles(kernel, m, n, k, multiprocessors) <
                                                              gpu::cycles(*best, m, n, k, multiprocessors)))
      best = &kernel;
  check(best != nullptr, "int8_linear: this device has compute capability ", arch / 10, ".", arch % 10,
        ", expected 8.0 or later");
  return *best;
}

void linear(const Problem& p, const Kernel* forced) {
  if (p.m == 0) return;
  if (p.branch.t != nullptr) check_branch(p);
  const gpu::Device device = gpu::device();
  const Kernel& kernel =
      forced != nullptr ? *forced : chosen_kernel(p.m, p.n, p.k, device.arch, device.multiprocessors);
  check(gpu::runs_on(kernel, device.arch), "kernel ", kernel.name, " needs compute capability ", kernel.arch / 10, ".",
        kernel.arch % 10, ", this device has ", device.arch / 10, ".", device.arch % 10);
  kernel.run(p);
}

}  // namespace pycompress::int8::cuda
