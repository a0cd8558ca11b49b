// The table of the 2:4 kernels, which of them takes a problem, and what is refused.
#include "cuda.h"

#include "../../cuda/kernel_table.h"
#include "../../cuda/launch.h"
#include "cuda_kernel_list.h"

namespace pycompress::sparse::cuda::structured {
namespace {

const gpu::KernelTable<Kernel>& table() {
  static const gpu::KernelTable<Kernel> all("2:4", {kernels_sm90, kernels_sm80});
  return all;
}

bool aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

void check_problem(const Problem& p) {
  const bool is_int8 = p.shape.element == Element::int8;
  check(aligned(p.packed), "sparse_linear: the packed weight is at ", static_cast<const void*>(p.packed),
        ", expected a multiple of 16");
  if (is_int8) {
    check((p.scale == nullptr) == (p.y_type == Type::int32), "sparse_linear: y is of type ", static_cast<int>(p.y_type),
          " and the weight has ", p.scale == nullptr ? "no scale" : "a scale", ", expected one unless y is int32");
    check(aligned(p.rows.s), "sparse_linear: the quantized rows are at ", static_cast<const void*>(p.rows.s),
          ", expected a multiple of 16");
    return;
  }
  check(p.y_type == type_of(p.shape.element), "sparse_linear: y is of type ", static_cast<int>(p.y_type),
        ", expected that of the packed weight, ", static_cast<int>(type_of(p.shape.element)));
  check(aligned(p.x) && p.ldx % 8 == 0, "sparse_linear: x is at ", p.x, " with row stride ", p.ldx,
        ", expected multiples of 16 bytes");
}

}  // namespace

const Kernel* kernels(int* count) { return table().all(count); }

const Kernel& kernel_named(const char* name) { return table().named(name); }

const Kernel& chosen_kernel(const Packed& shape, int64_t m, int arch, int multiprocessors) {
  return table().cheapest(
      arch, [&](const Kernel& kernel) { return kernel.element == shape.element && runs_on(kernel, arch); },
      [&](const Kernel& kernel) { return cycles(kernel, shape, m, multiprocessors); });
}

void linear(const Problem& p, const Kernel* forced) {
  if (p.m == 0) return;
  check_problem(p);
  const gpu::Device device = gpu::device();
  const Kernel& kernel = forced != nullptr ? *forced : chosen_kernel(p.shape, p.m, device.arch, device.multiprocessors);
  check(kernel.element == p.shape.element, "sparse_linear: the packed weight is of type ",
        static_cast<int>(p.shape.element), ", which kernel ", kernel.name, " does not take");
  gpu::check_runs_on(kernel, device.arch, kernel.shared);
  kernel.run(p);
}

void check_packed(const Packed& shape, int64_t bytes) {
  check(shape.n >= 1 && shape.n <= 1 << 24 && shape.k >= 1 && shape.k <= kMaxK, "sparse: the packed 2:4 weight is ",
        shape.n, "x", shape.k, ", expected n from 1 to ", 1 << 24, " and k from 1 to ", kMaxK);
  check(shape.bytes() == bytes, "sparse: a packed 2:4 weight ", shape.n, "x", shape.k, " has ", shape.bytes(),
        " bytes, this one ", bytes);
}

}  // namespace pycompress::sparse::cuda::structured
