// The specification.
#include <algorithm>
#include <cmath>

#include "kernel_list.h"

namespace pycompress::block {
namespace {

constexpr int kTile = 8;

void turn(const float* rows, ptrdiff_t ld, int queries, int columns, int tile, bool add, float* out) {
  for (int c = 0; c < columns; ++c)
    for (int i = 0; i < tile; ++i) {
      const float value = i < queries ? rows[i * ld + c] : 0.0f;
      out[c * tile + i] = add ? out[c * tile + i] + value : value;
    }
}

void attend(const Attention& a) {
  for (int i = 0; i < a.queries; ++i) {
    const int keys = a.causal ? static_cast<int>(std::min<int64_t>(a.keys, a.first_query + i + 1)) : a.keys;
    float top = -3.40282347e38f, sum = 0;
    for (int j = 0; j < keys; ++j) {
      float s = a.started ? a.scores[j * kTile + i] : 0.0f;
      for (int c = 0; c < a.head_size; ++c) s = std::fma(a.k[j * a.ldk + c], a.q[i * a.ldq + c] * a.scale, s);
      if (a.key_mask != nullptr) s += a.key_mask[j];
      a.scores[j * kTile + i] = s;
      if (s > top) top = s;
    }
    for (int j = 0; j < keys; ++j) {
      float& s = a.scores[j * kTile + i];
      s = std::exp(s - top);
      sum += s;
    }
    const float inverse = sum < 1e-30f ? 0.0f : 1.0f / sum;
    for (int c = 0; c < a.head_size; ++c) {
      float o = 0;
      for (int j = 0; j < keys; ++j) o = std::fma(a.scores[j * kTile + i], a.v[j * a.ldv + c], o);
      a.o[i * a.ldo + c] = o * inverse;
    }
  }
}

void add_norm(float* sum, const float* residual, int rows, int n, const Norm* norm, float* y) {
  for (int row = 0; row < rows; ++row, sum += n, y += n) {
    if (residual != nullptr)
      for (int i = 0; i < n; ++i) sum[i] += residual[row * n + i];
    if (norm == nullptr) continue;
    float mean = 0, square = 0;
    for (int i = 0; i < n && !norm->rms; ++i) mean += sum[i];
    mean *= 1.0f / static_cast<float>(n);
    for (int i = 0; i < n; ++i) square += (sum[i] - mean) * (sum[i] - mean);
    const float factor = 1.0f / std::sqrt(square * (1.0f / static_cast<float>(n)) + norm->eps);
    for (int i = 0; i < n; ++i) {
      float v = (sum[i] - mean) * factor;
      if (norm->weight != nullptr) v *= norm->weight[i];
      if (norm->shift != nullptr) v += norm->shift[i];
      y[i] = v;
    }
  }
}

void multiply(float* x, const float* y, int64_t count) {
  for (int64_t i = 0; i < count; ++i) x[i] *= y[i];
}

}  // namespace

const Kernel kScalar{"scalar_8", Isa::scalar, kTile, kTile, 1, attend, turn, add_norm, multiply};

}  // namespace pycompress::block
