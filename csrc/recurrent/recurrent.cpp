// The driver: the product of the input for some steps, then step by step the product of h and the gates.
#include "recurrent.h"

#include <algorithm>

#include "../common/check.h"
#include "../common/kernels.h"
#include "../common/parallel.h"
#include "../common/scratch.h"
#include "../int8/gemm.h"
#include "kernel_list.h"

namespace pycompress::recurrent {
namespace {

// Rows of x that are multiplied at once: enough that the weights are read from the cache, and few enough that their
// gates do not leave it.
constexpr int64_t kRows = 128, kGateBytes = 2 * 1024 * 1024;
constexpr int64_t kSerialUnits = 8192;  // of the gates of a step: about 30 us, against 1 to 2 for a parallel region

thread_local Scratch scratch;

void multiply(const void* x, Type type, int64_t rows, int64_t k, int64_t ldx, const Matrix& weight, int64_t n, float* y,
              int threads) {
  int8::Problem p{};
  p.x = x;
  p.x_type = type;
  p.m = rows;
  p.k = k;
  p.ldx = ldx;
  p.packed = weight.packed;
  p.packed_bytes = weight.packed_bytes;
  p.n = n;
  p.weight_scale = weight.scale;
  p.bias = weight.bias;
  p.activation = Activation::none;
  p.y = y;
  p.y_type = Type::float32;
  p.threads = threads;
  int8::linear(p);
}

void check_sizes(const Problem& p) {
  check(p.steps >= 1, "recurrent: there are ", p.steps, " steps, expected at least 1");
  int64_t rows = 0, before = p.batch;
  for (int64_t t = 0; t < p.steps; ++t) {
    const int64_t size = p.batch_sizes[t];
    check((t == 0 ? size == p.batch : size <= before) && size >= 0, "recurrent: batch_sizes[", t, "] is ", size,
          t == 0 ? ", expected " : ", expected 0 to ", before);
    rows += before = size;
  }
  check(rows == p.rows, "recurrent: x has ", p.rows, " rows, expected ", rows, " as batch_sizes adds up to");
}

// The gates of the rows of one step, whose first row of x and y is `row`.
void step(const Problem& p, const Kernel& kernel, int64_t rows, int64_t row, const float* gx, const float* gh) {
  const int64_t n = gates_of(p.cell) * p.size;
  const int threads =
      rows * p.size < kSerialUnits ? 1 : static_cast<int>(std::min<int64_t>(rows, usable_threads(p.threads)));
  parallel(threads, [&](int thread, int of) {
    for (int64_t b = rows * thread / of; b < rows * (thread + 1) / of; ++b) {
      float *h = p.h + b * p.size, *y = p.y + (row + b) * p.ldy;
      if (p.cell == Cell::lstm)
        kernel.lstm(gx + b * n, gh + b * n, p.size, p.c + b * p.size, h, y);
      else
        kernel.gru(gx + b * n, gh + b * n, p.size, h, y);
    }
  });
}

}  // namespace

Kernels<Kernel>& kernels() {
  static constexpr const Kernel* best_first[] = {
#if defined(PYCOMPRESS_X86)
      &kAvx512, &kAvx2,
#endif
      &kScalar};
  static Kernels<Kernel> all{"recurrent", best_first};
  return all;
}

void run(const Problem& p) {
  check_sizes(p);
  const Kernel& kernel = kernels().first();
  const int64_t n = gates_of(p.cell) * p.size;
  const int64_t most = std::max<int64_t>(1, std::min(kRows, kGateBytes / (n * 4)));
  const int64_t room = std::max(most, p.batch);  // a step is not cut
  auto* const gx = reinterpret_cast<float*>(scratch.reserve(static_cast<size_t>((room + p.batch) * n) * sizeof(float)));
  float* const gh = gx + room * n;

  const auto size_of_step = [&](int64_t i) { return p.batch_sizes[p.reverse ? p.steps - 1 - i : i]; };
  int64_t row = p.reverse ? p.rows : 0;  // where the next step begins; in reverse, where it ends
  for (int64_t done = 0; done < p.steps;) {
    int64_t end = done, rows = 0;
    while (end < p.steps && (end == done || rows + size_of_step(end) <= room)) rows += size_of_step(end++);
    const int64_t first = p.reverse ? row - rows : row;
    multiply(value_of(p.x, p.x_type, first * p.ldx), p.x_type, rows, p.k, p.ldx, p.input, n, gx, p.threads);
    for (; done < end; ++done) {
      const int64_t size = size_of_step(done);
      if (p.reverse) row -= size;
      multiply(p.h, Type::float32, size, p.size, p.size, p.hidden, n, gh, p.threads);
      step(p, kernel, size, row, gx + (row - first) * n, gh);
      if (!p.reverse) row += size;
    }
  }
}

}  // namespace pycompress::recurrent
