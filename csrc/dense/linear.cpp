#include "linear.h"

#include "../common/check.h"
#include "expanded.h"

namespace pycompress::dense {
namespace {

Scratch& scratch() {
  static thread_local Scratch own;
  return own;
}

// Panels of a matrix [n][k].
struct Matrix {
  const Problem& p;
  const Kernel& kernel;

  void expand(int64_t panel, int64_t begin, int64_t length, float* to) const {
    const int64_t n = panel * kPanel;
    const int rows = static_cast<int>(std::min<int64_t>(kPanel, p.n - n));
    kernel.turn(value_of(p.weight, p.weight_type, n * p.ldw + begin), p.weight_type, p.ldw, rows, length, to);
  }
};

}  // namespace

void linear(const Problem& p) {
  check(p.n >= 1 && p.k >= 1, "dense linear: the weight is [", p.n, ", ", p.k, "], expected at least one of each");
  if (p.m == 0) return;
  const Matrix matrix{p, kernels().first()};
  linear_expanding({p.x, p.x_type, p.m, p.k, p.ldx, p.n, nullptr, p.bias, p.activation, p.y, p.y_type, p.threads},
                   matrix, scratch);
}

}  // namespace pycompress::dense
