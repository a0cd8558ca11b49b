// The driver: which rows and channels on which thread; weights become floats block by block.
#include "gemm.h"

#include "../common/check.h"
#include "../dense/expanded.h"
#include "../int4/pack.h"
#include "kernel_list.h"
#include "pack.h"

namespace pycompress::weight_only {
namespace {

static_assert(kPanel == dense::kPanel && kPanel == int4::kPanel);
static_assert(dense::kBlockK % 128 == 0, "a block begins a group");

Scratch& scratch() {
  static thread_local Scratch own;
  return own;
}

// A packed weight of either kind.
struct Source {
  const Problem& p;
  const Kernel& kernel;
  const Header* int8 = nullptr;
  const int4::Header* int4 = nullptr;

  Source(const Problem& problem, const Kernel& kernel_) : p(problem), kernel(kernel_) {
    if (is_packed(p.packed, p.packed_bytes))
      int8 = &header_of(p.packed, p.packed_bytes);
    else
      int4 = &int4::header_of(p.packed, p.packed_bytes);
  }
  int64_t n() const { return int8 != nullptr ? int8->n : int4->n; }
  int64_t k() const { return int8 != nullptr ? int8->k : int4->k; }

  // Whole units of int4.
  void expand(int64_t panel, int64_t begin, int64_t length, float* to) const {
    if (int8 != nullptr) {
      const auto* values = reinterpret_cast<const int8_t*>(p.packed + int8->values);
      return kernel.expand_int8(values + (panel * int8->k + begin) * kPanel, static_cast<int>(length), to);
    }
    kernel.expand_int4(int4::panel_of(p.packed, *int4, panel, begin / int4::kUnit, divide_up(length, int4::kUnit)), to);
  }
};

}  // namespace

Kernels<Kernel>& kernels() {
  static constexpr const Kernel* best_first[] = {
#if defined(PYCOMPRESS_X86)
      &kAvx2,
#endif
      &kScalar};
  static Kernels<Kernel> all{"weight_only", best_first};
  return all;
}

void linear(const Problem& p) {
  const Source source(p, kernels().first());
  const char* op = source.int8 != nullptr ? "int8_linear" : "int4_linear";
  check(p.k == source.k(), op, ": x is [", p.m, ", ", p.k, "], the packed weight expects k = ", source.k());
  check(p.n == source.n(), op, ": n is ", p.n, ", the packed weight has ", source.n(), " channels");
  check(p.x_type != Type::int32 && p.y_type != Type::int32, op,
        ": the packed weight keeps its activations as floats, there are no integers to give");
  if (p.m == 0) return;

  dense::linear_expanding(
      {p.x, p.x_type, p.m, p.k, p.ldx, p.n, p.weight_scale, p.bias, p.activation, p.y, p.y_type, p.threads}, source,
      scratch);
}

}  // namespace pycompress::weight_only
