// Products whose weights become floats on the way: a block of a panel at a time, once for all rows of a task. How they
// do is the Source's: n(), k(), and expand(panel, begin, length, to), which writes positions [begin, begin + length) of
// a panel as float [length][kPanel] into room for kBlockK of them.
#pragma once

#include <algorithm>

#include "../common/kernels.h"
#include "../common/round.h"
#include "../common/scratch.h"
#include "../common/tasks.h"
#include "gemm.h"

namespace pycompress::dense {

constexpr int64_t kBlockK = 256;  // positions whose floats, 16 KiB, stay in the L1 while rows pass over them
constexpr int64_t kMaxTaskRows = 96;

// y[m, n] = act(x[m, k] . W[n, k]^T * scale[n] + bias[n]); row strides ldx, n.
struct Rows {
  const void* x;
  Type x_type;
  int64_t m, k, ldx, n;
  const float *scale, *bias;  // [n] or null
  Activation activation;
  void* y;
  Type y_type;
  int threads;
};

// One thread's share of a call.
template <class Source>
class ExpandingWorker {
 public:
  ExpandingWorker(const Rows& call, const Source& source, const Kernel& kernel, Scratch& scratch, int64_t rows)
      : p_(call), source_(source), kernel_(kernel) {
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
    kernel_.load(x, p_.x_type, p_.ldx, rows, p_.k, x_room_, p_.k);
    x_ = x_room_;
    ldx_ = p_.k;
  }

  void multiply(int64_t panel) {
    // By the rows of the call: those of a task depend on the threads.
    const auto sum = p_.m <= kFewRows ? kernel_.few : kernel_.many;
    for (int64_t begin = 0; begin < p_.k; begin += kBlockK) {
      const int64_t length = std::min<int64_t>(kBlockK, p_.k - begin);
      source_.expand(panel, begin, length, panel_);
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
        v = p_.scale == nullptr ? v + bias : v * p_.scale[n + c] + bias;
      }
    auto* y = value_of(p_.y, p_.y_type, row_ * p_.n + n);
    kernel_.finish(sums_, kPanel, rows_, columns, p_.activation, p_.y_type, y, p_.n);
  }

  const Rows& p_;
  const Source& source_;
  const Kernel& kernel_;
  float *panel_, *sums_, *x_room_;
  const float* x_ = nullptr;
  int64_t ldx_ = 0, row_ = -1;
  int rows_ = 0;
};

// scratch: a thread_local one of the op's, named by a function, because each thread has its own.
template <class Source>
void linear_expanding(const Rows& call, const Source& source, Scratch& (*scratch)()) {
  const Kernel& kernel = kernels().first();
  const Tasks tasks(call.m, divide_up(call.n, kPanel), call.k, kPanel, kMaxTaskRows, 1, call.threads);
  tasks.run([&] { return ExpandingWorker<Source>(call, source, kernel, scratch(), tasks.rows); });
}

}  // namespace pycompress::dense
