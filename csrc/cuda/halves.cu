// The table of the kernels for halves, and which of them takes a problem.
#include <cstdlib>
#include <cstring>
#include <vector>

#include "../common/check.h"
#include "halves_kernel_list.h"
#include "launch.h"
#include "tiles.h"

namespace pycompress::halves {
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

void check_problem(const Problem& p) {
  const auto misaligned = [](const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 != 0; };
  check(p.n >= 1 && p.k >= 1 && p.k <= kMaxK && p.k_pad >= p.k && p.k_pad % kPadK == 0, "halves: w is ", p.n, "x", p.k,
        " with ", p.k_pad, " values a row, expected n >= 1, k from 1 to ", kMaxK, ", rows of a multiple of ", kPadK);
  check(p.ldx >= p.k && p.ldx % 8 == 0 && !misaligned(p.x) && !misaligned(p.w), "halves: x at ", p.x, " with ", p.ldx,
        " values a row, w at ", p.w, ", expected both aligned to 16 bytes, rows of a multiple of 8 from ", p.k);
  check(p.ldy >= p.n, "halves: y has ", p.ldy, " values a row, expected at least ", p.n);
}

}  // namespace

const Kernel* kernels(int* count) {
  *count = static_cast<int>(table().size());
  return table().data();
}

const Kernel& kernel_named(const char* name) {
  for (const Kernel& kernel : table())
    if (std::strcmp(kernel.name, name) == 0) return kernel;
  check(false, "no kernel for halves is named '", name, "'");
  std::abort();
}

const Kernel& chosen_kernel(Type type, int64_t m, int64_t n, int64_t k, int arch, int multiprocessors) {
  const auto cost = [&](const Kernel& kernel) { return gpu::cycles(kernel, m, n, k * 2, multiprocessors); };
  const Kernel* best = nullptr;
  for (const Kernel& kernel : table())
    if (kernel.type == type && gpu::runs_on(kernel, arch) && (best == nullptr || cost(kernel) < cost(*best)))
      best = &kernel;
  check(best != nullptr, "halves: type ", static_cast<int>(type), " on compute capability ", arch / 10, ".", arch % 10,
        ", expected float16 or bfloat16, and 8.0 or later");
  return *best;
}

void multiply(const Problem& p, const Kernel* forced) {
  check_problem(p);
  if (p.m == 0) return;
  const gpu::Device device = gpu::device();
  const Kernel& kernel =
      forced != nullptr ? *forced : chosen_kernel(p.type, p.m, p.n, p.k, device.arch, device.multiprocessors);
  check(kernel.type == p.type, "halves: kernel ", kernel.name, " for x of type ", static_cast<int>(p.type));
  check(gpu::runs_on(kernel, device.arch), "kernel ", kernel.name, " needs compute capability ", kernel.arch / 10, ".",
        kernel.arch % 10, ", this device has ", device.arch / 10, ".", device.arch % 10);
  kernel.run(p);
}

}  // namespace pycompress::halves
