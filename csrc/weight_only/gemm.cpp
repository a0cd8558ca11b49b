// The driver: which rows and channels on which thread; weights become floats block by block.
#include "gemm.h"

#include <algorithm>

#include "../common/check.h"
#include "../common/kernels.h"
#include "../common/round.h"
#include "../common/scratch.h"
#include "../common/tasks.h"
#include "../dense/gemm.h"
#include "../int4/pack.h"
#include "kernel_list.h"
#include "pack.h"

namespace pycompress::weight_only {
namespace {

static_assert(kPanel == dense::kPanel && kPanel == int4::kPanel);
static_assert(kBlockK % 128 == 0, "a block begins a group");

constexpr int kMaxTaskRows = 96;

thread_local Scratch scratch;

// A packed weight of either kind.
struct Source {
  const Problem& p;
  const Header* int8 = nullptr;
  const int4::Header* int4 = nullptr;

  explicit Source(const Problem& problem) : p(problem) {
    if (is_packed(p.packed, p.packed_bytes))
      int8 = &header_of(p.packed, p.packed_bytes);
    else
      int4 = &int4::header_of(p.packed, p.packed_bytes);
  }
  int64_t n() const { return int8 != nullptr ? int8->n : int4->n; }
  int64_t k() const { return int8 != nullptr ? int8->k : int4->k; }

  // Positions [begin, begin + length) of a panel as float [length][kPanel]; room for whole units.
  void expand(const Kernel& kernel, int64_t panel, int64_t begin, int64_t length, float* to) const {
    if (int8 != nullptr) {
      const auto* values = reinterpret_cast<const int8_t*>(p.packed + int8->values);
      return kernel.expand_int8(values + (panel * int8->k + begin) * kPanel, static_cast<int>(length), to);
    }
    kernel.expand_int4(int4::panel_of(p.packed, *int4, panel, begin / int4::kUnit, divide_up(length, int4::kUnit)), to);
  }
};

// One thread's share of a call.
class Worker {
 public:
  Worker(const Source& source, const Kernel& kernel, const dense::Kernel& product, int64_t rows)
      : source_(source), p_(source.p), kernel_(kernel), product_(product) {
    const int64_t converted = p_.x_type == Type::float32 ? 0 : rows * p_.k;
    auto* room = reinterpret_cast<float*>(
        scratch.reserve(static_cast<size_t>(kBlockK * kPanel + rows * kPanel + converted) * sizeof(float)));
    panel_ = room;
    sums_ = panel_ + kBlockK * kPanel;
    x_room_ = sums_ + rows * kPanel;
  }

  void take(int64_t row, int rows) {
    if (row == row_) return;
    row_ = row;
    rows_ = rows;
    const auto* x = value_of(p_.x, p_.x_type, row * p_.ldx);
    if (p_.x_type == Type::float32) {
      x_ = reinterpret_cast<const float*>(x);
      ldx_ = p_.ldx;
      return;
    }
    product_.load(x, p_.x_type, p_.ldx, rows, p_.k, x_room_, p_.k);
    x_ = x_room_;
    ldx_ = p_.k;
  }

  void multiply(int64_t panel) {
    // By the rows of the call: those of a task depend on the threads.
    const auto sum = p_.m <= dense::kFewRows ? product_.few : product_.many;
    for (int64_t begin = 0; begin < p_.k; begin += kBlockK) {
      const int64_t length = std::min<int64_t>(kBlockK, p_.k - begin);
      source_.expand(kernel_, panel, begin, length, panel_);
      sum({x_ + begin, ldx_, rows_, panel_, 0, 1, length, begin == 0 ? nullptr : sums_, kPanel, sums_, kPanel});
    }
    finish(panel);
  }

 private:
  void finish(int64_t panel) {
    const int64_t n = panel * kPanel;
    const int columns = static_cast<int>(std::min<int64_t>(kPanel, p_.n - n));
    for (int i = 0; i < rows_; ++i)
      for (int c = 0; c < columns; ++c) {
        float& v = sums_[i * kPanel + c];
        const float bias = p_.bias == nullptr ? 0.0f : p_.bias[n + c];
        v = p_.weight_scale == nullptr ? v + bias : v * p_.weight_scale[n + c] + bias;
      }
    auto* y = value_of(p_.y, p_.y_type, row_ * p_.n + n);
    product_.finish(sums_, kPanel, rows_, columns, p_.activation, p_.y_type, y, p_.n);
  }

  const Source& source_;
  const Problem& p_;
  const Kernel& kernel_;
  const dense::Kernel& product_;
  float *panel_, *sums_, *x_room_;
  const float* x_ = nullptr;
  int64_t ldx_ = 0, row_ = -1;
  int rows_ = 0;
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
  const Source source(p);
  const char* op = source.int8 != nullptr ? "int8_linear" : "int4_linear";
  check(p.k == source.k(), op, ": x is [", p.m, ", ", p.k, "], the packed weight expects k = ", source.k());
  check(p.n == source.n(), op, ": n is ", p.n, ", the packed weight has ", source.n(), " channels");
  check(p.x_type != Type::int32 && p.y_type != Type::int32, op,
        ": the packed weight keeps its activations as floats, there are no integers to give");
  if (p.m == 0) return;

  const Kernel& kernel = kernels().first();
  const dense::Kernel& product = dense::kernels().first();
  const Tasks tasks(p.m, divide_up(p.n, kPanel), p.k, kPanel, kMaxTaskRows, 1, p.threads);
  tasks.run([&] { return Worker(source, kernel, product, tasks.rows); });
}

}  // namespace pycompress::weight_only
