// The kernels of an op on CUDA: what the files of each architecture add, best first where the tiles are alike.
#pragma once

#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <vector>

#include "../common/check.h"
#include "tiles.h"

namespace pycompress::gpu {

template <class Kernel>
class KernelTable {
 public:
  // what: the op, for messages
  KernelTable(const char* what, std::initializer_list<const Kernel* (*)(int* count)> files) : what_(what) {
    for (const auto of_file : files) {
      int count = 0;
      const Kernel* first = of_file(&count);
      all_.insert(all_.end(), first, first + count);
    }
  }

  const Kernel* all(int* count) const {
    *count = static_cast<int>(all_.size());
    return all_.data();
  }

  const Kernel& named(const char* name) const {
    for (const Kernel& kernel : all_)
      if (std::strcmp(kernel.name, name) == 0) return kernel;
    check(false, "no ", what_, " kernel for CUDA is named '", name, "'");
    std::abort();
  }

  // Of those that `fits` the one of the least cost, the first of equals.
  template <class Fits, class Cost>
  const Kernel& cheapest(int arch, Fits&& fits, Cost&& cost) const {
    const Kernel* best = nullptr;
    double least = 0;
    for (const Kernel& kernel : all_) {
      if (!fits(kernel)) continue;
      const double here = cost(kernel);
      if (best != nullptr && here >= least) continue;
      best = &kernel;
      least = here;
    }
    check(best != nullptr, what_, ": this device has compute capability ", arch / 10, ".", arch % 10,
          ", expected 8.0 or later");
    return *best;
  }

 private:
  const char* what_;
  std::vector<Kernel> all_;
};

// shared: bytes that a block of the kernel has.
template <class Kernel>
void check_runs_on(const Kernel& kernel, int arch, int shared = 0) {
  check(runs_on(kernel, arch) && shared <= max_shared(arch), "kernel ", kernel.name, " needs compute capability ",
        kernel.arch / 10, ".", kernel.arch % 10, " and ", shared, " bytes of shared memory, this device has ",
        arch / 10, ".", arch % 10, " and ", max_shared(arch));
}

}  // namespace pycompress::gpu
