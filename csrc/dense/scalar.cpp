// The specification, and what runs where no other kernel can: every result one chain of fused multiply-adds.
#include <cmath>

#include "../common/activation.h"
#include "../common/float16.h"
#include "kernel_list.h"

namespace pycompress::dense {
namespace {

void multiply(const Product& p) {
  for (int m = 0; m < p.rows; ++m)
    for (int n = 0; n < p.panel_count * kPanel; ++n) {
      const float* w = p.panels + n / kPanel * p.stride + n % kPanel;
      float sum = p.start == nullptr ? 0.0f : p.start[m * p.lds + n];
      for (int64_t k = 0; k < p.k; ++k) sum = std::fma(p.a[m * p.lda + k], w[k * kPanel], sum);
      p.c[m * p.ldc + n] = sum;
    }
}

void load(const void* x, Type type, ptrdiff_t ldx, int rows, int64_t k, float* out, ptrdiff_t ldo) {
  for (int m = 0; m < rows; ++m)
    for (int64_t i = 0; i < k; ++i) out[m * ldo + i] = float_at(x, type, m * ldx + i);
}

void finish(const float* c, ptrdiff_t ldc, int rows, int columns, Activation activation, Type type, void* y,
            ptrdiff_t ldy) {
  for (int m = 0; m < rows; ++m)
    for (int n = 0; n < columns; ++n)
      put_float(y, type, m * ldy + n, activate(activation, Scalar{c[m * ldc + n]}).value);
}

void turn(const void* rows, Type type, ptrdiff_t ld, int count, int64_t length, float* panel) {
  for (int64_t i = 0; i < length; ++i)
    for (int n = 0; n < kPanel; ++n) panel[i * kPanel + n] = n < count ? float_at(rows, type, n * ld + i) : 0.0f;
}

}  // namespace

const Kernel kScalar{"scalar_6x16", Isa::scalar, 6, kPanel, 1, multiply, multiply, load, finish, turn};

}  // namespace pycompress::dense
