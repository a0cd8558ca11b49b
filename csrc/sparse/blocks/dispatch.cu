// The table of the block sparse kernels, and which of them takes a problem.
#include <algorithm>
#include <cmath>

#include "../../common/check.h"
#include "../../cuda/kernel_table.h"
#include "../../cuda/launch.h"
#include "cuda_kernel_list.h"

namespace pycompress::sparse::cuda::blocks {
namespace {

const gpu::KernelTable<Kernel>& table() {
  static const gpu::KernelTable<Kernel> all("block sparse", {kernels_sm90, kernels_sm80});
  return all;
}

bool runs_on(const Kernel& kernel, int arch) {
  return gpu::runs_on(kernel, arch) && kernel.shared <= gpu::max_shared(arch);
}

bool takes(const Kernel& kernel, const Shape& shape) {
  return kernel.element == shape.element && (kernel.size == kBlock) == (shape.size == kBlock);
}

// Of what could be stored, the share that is.
double density_of(const Shape& shape) {
  const int64_t channels = shape.parts() * shape.part_channels(), bytes = shape.steps() * shape.step_bytes();
  const auto all = static_cast<double>(channels * bytes);
  return std::fmin(1, static_cast<double>(shape.stored * shape.stored_bytes()) / all);
}

}  // namespace

const Kernel* kernels(int* count) { return table().all(count); }

const Kernel& kernel_named(const char* name) { return table().named(name); }

// As in csrc/cuda/tiles.h: a multiprocessor computes its tiles one after the other, each step of k bound by the tensor
// cores or by what the L2 delivers (32 bytes a cycle while all are reading, up to 64 for one of few). A step of which a
// tile has nothing is skipped.
double cycles(const Kernel& kernel, const Shape& shape, double density, int64_t m, int multiprocessors) {
  const int64_t tiles = divide_up(m, kernel.bm) * divide_up(shape.n, kernel.bn), rows = std::min<int64_t>(m, kernel.bm);
  const int64_t busy = std::min<int64_t>(tiles, multiprocessors), step = shape.step_bytes();
  const double bytes_per_cycle = std::fmin(64, 32.0 * multiprocessors / static_cast<double>(busy));
  const double products_per_cycle = kernel.arch >= 90 ? 4096 : 2048;  // times bytes
  const double in_step = static_cast<double>(kernel.bn * step) / (shape.size * shape.size * bytes_of(shape.element));
  const double used = 1 - std::pow(1 - density, in_step), stored = density * static_cast<double>(step);
  const double compute = kernel.bn * kernel.bm * stored / products_per_cycle;
  const double load = (kernel.bn * stored + static_cast<double>(rows * step) * used) / bytes_per_cycle;
  return static_cast<double>(divide_up(tiles, multiprocessors) * shape.steps()) * std::fmax(compute, load);
}

const Kernel& chosen_kernel(const Shape& shape, int64_t m, int arch, int multiprocessors) {
  const double density = density_of(shape);
  return table().cheapest(
      arch, [&](const Kernel& kernel) { return runs_on(kernel, arch) && takes(kernel, shape); },
      [&](const Kernel& kernel) { return cycles(kernel, shape, density, m, multiprocessors); });
}

void linear(const Problem& p, const Kernel* forced) {
  if (p.m == 0) return;
  const gpu::Device device = gpu::device();
  const Kernel& kernel = forced != nullptr ? *forced : chosen_kernel(p.shape, p.m, device.arch, device.multiprocessors);
  gpu::check_runs_on(kernel, device.arch, kernel.shared);
  check(takes(kernel, p.shape), "kernel ", kernel.name, " takes no blocks of size ", p.shape.size, " and type ",
        static_cast<int>(p.shape.element));
  const bool halves = p.shape.element != Element::int8;
  check(!halves || p.y_type == type_of(p.shape.element), "sparse_linear: x is of type ", static_cast<int>(p.y_type),
        ", the packed weight of type ", static_cast<int>(type_of(p.shape.element)));
  check(!halves || (reinterpret_cast<uintptr_t>(p.x) % 16 == 0 && p.ldx % 8 == 0), "sparse_linear: x is at ", p.x,
        " with row stride ", p.ldx, ", expected multiples of 16 bytes and of 8");
  check(reinterpret_cast<uintptr_t>(p.packed) % 16 == 0, "sparse_linear: the packed weight is at ",
        static_cast<const void*>(p.packed), ", expected a multiple of 16");
  kernel.run(p);
}

}  // namespace pycompress::sparse::cuda::blocks
