// What the suites of the CPU's kernels share: sizes, comparisons, the kernels that run here.
#pragma once

#include <cfloat>
#include <cstddef>
#include <cstdio>
#include <cstring>

#include "common/kernels.h"

namespace native {

inline size_t area(int rows, int columns) { return static_cast<size_t>(rows) * static_cast<size_t>(columns); }

template <class T>
bool all_equal(const T* a, const T* b, size_t count) {
  return std::memcmp(a, b, count * sizeof(T)) == 0;
}

// Relative error of q roundings.
inline double gamma_of(double q) {
  const double u = static_cast<double>(FLT_EPSILON) / 2;
  return q * u / (1 - q * u);
}

// f(kernel) for each that runs here, and a line for each that does not.
template <class Kernel, class F>
void for_available(const pycompress::Kernels<Kernel>& kernels, F&& f) {
  for (const Kernel* kernel : kernels)
    if (kernels.runs(*kernel))
      f(*kernel);
    else
      std::printf("skipped %s: it needs %s\n", kernel->name, pycompress::isa_name(kernel->isa));
}

}  // namespace native
