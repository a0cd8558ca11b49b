// The table of the CUDA kernels, and which of them takes a problem.
#include <cstdlib>
#include <cstring>
#include <vector>

#include "../common/check.h"
#include "../cuda/launch.h"
#include "cuda_kernel_list.h"
#include "tiles.h"

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
    if (runs_on(kernel, arch) &&
        (best == nullptr || cycles(kernel, m, n, k, multiprocessors) < cycles(*best, m, n, k, multiprocessors)))
      best = &kernel;
  check(best != nullptr, "int8_linear: this device has compute capability ", arch / 10, ".", arch % 10,
        ", expected 8.0 or later");
  return *best;
}

void linear(const Problem& p, const Kernel* forced) {
  if (p.m == 0) return;
  const gpu::Device device = gpu::device();
  const Kernel& kernel =
      forced != nullptr ? *forced : chosen_kernel(p.m, p.n, p.k, device.arch, device.multiprocessors);
  check(runs_on(kernel, device.arch), "kernel ", kernel.name, " needs compute capability ", kernel.arch / 10, ".",
        kernel.arch % 10, ", this device has ", device.arch / 10, ".", device.arch % 10);
  kernel.run(p);
}

}  // namespace pycompress::int8::cuda
