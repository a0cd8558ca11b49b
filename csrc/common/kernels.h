// What the tables of kernels of all ops have in common: the order is the preference, best first.
#pragma once

#include <array>
#include <cstddef>

#include "isa.h"

namespace pycompress {

// The kernels of a table one after the other, for callers that run over all of them.
template <class Kernel, size_t kCount>
std::array<Kernel, kCount> listed(const Kernel* const (&table)[kCount]) {
  std::array<Kernel, kCount> list{};
  for (size_t i = 0; i < kCount; ++i) list[i] = *table[i];
  return list;
}

// The first that can run here and that `fits`, or null.
template <class Kernel, size_t kCount, class F>
const Kernel* first_available(const Kernel* const (&table)[kCount], F&& fits) {
  for (const Kernel* kernel : table)
    if (fits(*kernel) && isa_available(kernel->isa)) return kernel;
  return nullptr;
}

}  // namespace pycompress
