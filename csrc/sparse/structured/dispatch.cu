// The table of the 2:4 kernels, which of them takes a problem, and what is refused.
#include "cuda.h"

#include <cstdlib>
#include <cstring>
#include <vector>

#include "../../cuda/launch.h"
#include "cuda_kernel_list.h"

namespace pycompress::sparse::cuda::structured {
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

const Kernel* kernels(int* count) {
  *count = static_cast<int>(table().size());
  return table().data();
}

const Kernel& kernel_named(const char* name) {
  for (const Kernel& kernel : table())
    if (std::strcmp(kernel.name, name) == 0) return kernel;
  check(false, "no 2:4 kernel for CUDA is named '", name, "'");
  std::abort();
}

const Kernel& chosen_kernel(const Packed& shape, int64_t m, int arch, int multiprocessors) {
  const Kernel* best = nullptr;
  for (const Kernel& kernel : table())
    if (kernel.element == shape.element && runs_on(kernel, arch) &&
        (best == nullptr || cycles(kernel, shape, m, multiprocessors) < cycles(*best, shape, m, multiprocessors)))
      best = &kernel;
  check(best != nullptr, "sparse_linear: this device has compute capability ", arch / 10, ".", arch % 10,
        ", expected 8.0 or later");
  return *best;
}

void linear(const Problem& p, const Kernel* forced) {
  if (p.m == 0) return;
  check_problem(p);
  const gpu::Device device = gpu::device();
  const Kernel& kernel = forced != nullptr ? *forced : chosen_kernel(p.shape, p.m, device.arch, device.multiprocessors);
  check(kernel.element == p.shape.element, "sparse_linear: the packed weight is of type ",
        static_cast<int>(p.shape.element), ", which kernel ", kernel.name, " does not take");
  check(runs_on(kernel, device.arch), "kernel ", kernel.name, " needs compute capability ", kernel.arch / 10, ".",
        kernel.arch % 10, " and ", kernel.shared, " bytes of shared memory, this device has ", device.arch / 10, ".",
        device.arch % 10, " and ", gpu::max_shared(device.arch));
  kernel.run(p);
}

Packed packed_of(int64_t bytes, int64_t n, int64_t k) {
  check(n >= 1 && k >= 1 && k <= kMaxK && bytes % k == 0, "sparse: a packed 2:4 weight ", n, "x", k, " of ", bytes,
        " bytes, expected n >= 1, k from 1 to ", kMaxK, " and a multiple of k bytes");
  const Packed shape{n, k, static_cast<Element>(bytes / k % 4)};
  check(bytes / k % 4 <= 2 && shape.bytes() == bytes, "sparse: no packed 2:4 weight ", n, "x", k, " has ", bytes,
        " bytes");
  return shape;
}

}  // namespace pycompress::sparse::cuda::structured
