// The table of the kernels for halves, and which of them takes a problem.
#include "../common/check.h"
#include "halves_kernel_list.h"
#include "kernel_table.h"
#include "launch.h"

namespace pycompress::halves {
namespace {

const gpu::KernelTable<Kernel>& table() {
  static const gpu::KernelTable<Kernel> all("halves", {kernels_sm90, kernels_sm80});
  return all;
}

void check_problem(const Problem& p) {
  const auto misaligned = [](const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 != 0; };
  check(p.n >= 1 && p.k >= 1 && p.k <= kMaxK && p.k_pad >= p.k && p.k_pad % kPadK == 0, "halves: w is ", p.n, "x", p.k,
        " with ", p.k_pad, " values a row, expected n >= 1, k from 1 to ", kMaxK, ", rows of a multiple of ", kPadK);
  check(p.type == Type::float16 || p.type == Type::bfloat16, "halves: x is of type ", static_cast<int>(p.type),
        ", expected float16 or bfloat16");
  check(p.ldx >= p.k && p.ldx % 8 == 0 && !misaligned(p.x) && !misaligned(p.w), "halves: x at ", p.x, " with ", p.ldx,
        " values a row, w at ", p.w, ", expected both aligned to 16 bytes, rows of a multiple of 8 from ", p.k);
  check(p.ldy >= p.n, "halves: y has ", p.ldy, " values a row, expected at least ", p.n);
}

}  // namespace

const Kernel* kernels(int* count) { return table().all(count); }

const Kernel& kernel_named(const char* name) { return table().named(name); }

const Kernel& chosen_kernel(Type type, int64_t m, int64_t n, int64_t k, int arch, int multiprocessors) {
  return table().cheapest(
      arch, [&](const Kernel& kernel) { return kernel.type == type && gpu::runs_on(kernel, arch); },
      [&](const Kernel& kernel) { return gpu::cycles(kernel, m, n, k * 2, multiprocessors); });
}

void multiply(const Problem& p, const Kernel* forced) {
  check_problem(p);
  if (p.m == 0) return;
  const gpu::Device device = gpu::device();
  const Kernel& kernel =
      forced != nullptr ? *forced : chosen_kernel(p.type, p.m, p.n, p.k, device.arch, device.multiprocessors);
  check(kernel.type == p.type, "halves: kernel ", kernel.name, " for x of type ", static_cast<int>(p.type));
  gpu::check_runs_on(kernel, device.arch);
  kernel.run(p);
}

}  // namespace pycompress::halves
