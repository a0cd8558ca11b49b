// The kernels of an op: the order is the preference, best first.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdlib>
#include <cstring>

#include "check.h"
#include "isa.h"

namespace pycompress {

template <class Kernel>
class Kernels {
 public:
  const char* const op;

  template <size_t kCount>
  constexpr Kernels(const char* op_, const Kernel* const (&best_first)[kCount])
      : op(op_), begin_(best_first), end_(best_first + kCount) {}

  const Kernel* const* begin() const { return begin_; }
  const Kernel* const* end() const { return end_; }

  // Whether it may run here: it is forced, or none is and the processor and the cap let it.
  bool runs(const Kernel& kernel) const {
    const Kernel* forced = forced_.load(std::memory_order_relaxed);
    return forced == nullptr ? isa_available(kernel.isa) : forced == &kernel;
  }

  // The first that runs and that `fits`, or null.
  template <class F>
  const Kernel* first(F&& fits) const {
    for (const Kernel* kernel : *this)
      if (fits(*kernel) && runs(*kernel)) return kernel;
    return nullptr;
  }
  const Kernel& first() const {
    return *first([](const Kernel&) { return true; });
  }

  // Throws std::invalid_argument where there is none, or where it cannot run here.
  const Kernel& named(const char* name) const {
    for (const Kernel* kernel : *this) {
      if (std::strcmp(kernel->name, name) != 0) continue;
      check(isa_available(kernel->isa), "kernel ", name, " needs ", isa_name(kernel->isa),
            ", which this processor lacks or PYCOMPRESS_ISA excludes");
      return *kernel;
    }
    check(false, "no ", op, " kernel is named '", name, "'");
    std::abort();
  }

  // From now on, in all threads, nothing but the kernel of this name runs for the op, whatever a later cap says; "":
  // the best, as ever. Returns the name that was forced before, or "". Throws as named() does.
  const char* force(const char* name) {
    const Kernel* before = forced_.exchange(*name == '\0' ? nullptr : &named(name));
    return before == nullptr ? "" : before->name;
  }

 private:
  const Kernel *const *begin_, *const *end_;
  std::atomic<const Kernel*> forced_{nullptr};
};

}  // namespace pycompress
