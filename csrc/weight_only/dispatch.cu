// Which kernel runs, and in how many parts of k.
#include <algorithm>

#include "../common/check.h"
#include "../cuda/launch.h"
#include "cuda.h"

namespace pycompress::weight_only::cuda {
namespace {

// What clearing the counters and handing sums over costs, in bytes that a multiprocessor could have read meanwhile:
// 2.5 us at 25 bytes a nanosecond (3.3 TB/s over 132).
constexpr int64_t kHandOver = 64 * 1024;

// The bytes that the busiest multiprocessor reads; those of x come from the L2, at about half the price.
int64_t cost(const Kernel& kernel, const Packed& shape, int64_t m, int splits, int multiprocessors) {
  const int64_t blocks = plan(kernel, shape, m, splits).blocks * splits;
  const int64_t channels = kernel.tiles * 16, rows = std::min<int64_t>(m, kernel.columns * 8);
  const int64_t step = channels * kStep * static_cast<int>(shape.bits) / 8 + rows * kStep;
  const int64_t steps = divide_up(shape.k_pad() / kStep, splits);
  return divide_up(blocks, multiprocessors) * steps * step + (splits > 1 ? kHandOver : 0);
}

// The narrowest kernels that take all rows at once, or the widest.
int columns_for(const Packed& shape, Type type, int64_t m) {
  int count = 0, best = 0;
  const Kernel* all = kernels(&count);
  for (const Kernel* kernel = all; kernel != all + count; ++kernel) {
    if (kernel->bits != shape.bits || kernel->type != type) continue;
    const bool fits = kernel->columns * 8 >= m, best_fits = best * 8 >= m;
    if (best == 0 || (fits ? !best_fits || kernel->columns < best : !best_fits && kernel->columns > best))
      best = kernel->columns;
  }
  return best;
}

}  // namespace

Plan plan(const Kernel& kernel, const Packed& shape, int64_t m, int splits) {
  const int64_t rows = kernel.columns * 8, channels = kernel.tiles * 16;
  const int64_t blocks = divide_up(m, rows) * divide_up(shape.n, channels);
  return {&kernel, splits, blocks, splits == 1 ? 0 : 4 * blocks * (splits * rows * channels + 1)};
}

Plan plan(const Packed& shape, Type type, int64_t m, int multiprocessors) {
  check(type == Type::float16 || type == Type::bfloat16, "weight_only: x is of type ", static_cast<int>(type),
        ", expected float16 or bfloat16");
  const int columns = columns_for(shape, type, m);
  const int most = static_cast<int>(std::min<int64_t>(kMaxSplits, shape.k_pad() / kStep));
  Plan best{};
  int64_t least = INT64_MAX;
  int count = 0;
  const Kernel* all = kernels(&count);
  for (const Kernel* kernel = all; kernel != all + count; ++kernel) {
    if (kernel->bits != shape.bits || kernel->type != type || kernel->columns != columns) continue;
    for (int splits = 1; splits <= most; ++splits) {
      const int64_t costs = cost(*kernel, shape, m, splits, multiprocessors);
      if (costs >= least) continue;
      least = costs;
      best = plan(*kernel, shape, m, splits);
    }
  }
  return best;
}

void linear(const Problem& problem) {
  if (problem.m == 0) return;
  linear(problem, plan(problem.shape, problem.type, problem.m, gpu::device().multiprocessors));
}

void linear(const Problem& problem, const Plan& plan) {
  const Packed& shape = problem.shape;
  check(shape.n >= 1 && shape.k >= 1 && shape.k <= kMaxK, "weight_only: the packed weight is ", shape.n, "x", shape.k,
        ", expected n >= 1 and k from 1 to ", kMaxK);
  check(plan.kernel->type == problem.type && plan.kernel->bits == shape.bits, "weight_only: kernel ", plan.kernel->name,
        " for x of type ", static_cast<int>(problem.type), " and ", static_cast<int>(shape.bits), "-bit weights");
  check(plan.blocks < INT32_MAX, "weight_only: ", problem.m, " rows and ", shape.n, " channels are too many");
  check(plan.workspace == 0 || problem.workspace != nullptr, "weight_only: no workspace, expected ", plan.workspace,
        " bytes");
  if (problem.m > 0) plan.kernel->run(problem, plan.splits);
}

}  // namespace pycompress::weight_only::cuda
