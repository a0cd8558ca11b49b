// The 2:4 kernels of compute capability 9.0 on the host, in what is theirs alone: blocks that compute several tiles one
// after the other, clusters of which the last has too few channels, tiles of operands that land late, early or in any
// order.
#include "sparse/structured/cuda_kernel_list.h"
#include "structured.h"

namespace native {
namespace {

struct Schedule {
  const char* name;
  emulate::Landing tiles;
  emulate::Order threads;
  int clusters;  // that share the tiles
};

template <class Value>
void check_schedule(const structured::Kernel& kernel, const StructuredCase& c, const std::vector<Value>& expected,
                    const Schedule& schedule) {
  begin(text(kernel.name, " ", c.name(), " tiles land ", schedule.name, ", clusters=", schedule.clusters));
  Guarded<Value> y(expected.size());
  y.fill(emulate::kPoison);
  emulate::options.tiles = schedule.tiles;
  emulate::options.threads = schedule.threads;
  emulate::options.multiprocessors = schedule.clusters * kernel.cluster;
  emulate::options.reversed_blocks = schedule.threads == emulate::Order::descending;
  kernel.run(c.problem(y.data()));
  emulate::options = {};
  int64_t wrong = 0;
  for (size_t i = 0; i < expected.size(); ++i) wrong += y[i] != expected[i];
  expect(wrong == 0, text(wrong, " of ", expected.size(), " values differ"));
  expect(y.intact(), "a store outside of y");
}

// Four tiles of fewer clusters, and more blocks of k than the rings have.
template <class Value>
void check_schedules(const structured::Kernel& kernel) {
  const int64_t block = structured::Packed{1, 1, kernel.element}.block_k();
  const StructuredCase c(kernel.element, kernel.bm + 3, kernel.bn * kernel.cluster + 5,
                         (kernel.stages / 2 + 1) * block + 24);
  std::vector<Value> expected;
  for (int64_t row = 0; row < c.m; ++row)
    for (int64_t channel = 0; channel < c.shape.n; ++channel) {
      const double sum = c.sum(row, channel);
      expected.push_back(c.is_int8() ? static_cast<Value>(sum) : static_cast<Value>(half_bits(sum, c.x.type)));
    }
  for (const Schedule& schedule : {Schedule{"late", emulate::Landing::late, emulate::Order::descending, 2},
                                   Schedule{"early", emulate::Landing::early, emulate::Order::random, 1},
                                   Schedule{"at random", emulate::Landing::random, emulate::Order::random, 3}})
    check_schedule(kernel, c, expected, schedule);
}

}  // namespace

void test_cuda_structured_hopper() {
  int count = 0;
  const structured::Kernel* kernels = structured::kernels_sm90(&count);
  for (int i = 0; i < count; ++i)
    kernels[i].element == Element::int8 ? check_schedules<int32_t>(kernels[i]) : check_schedules<uint16_t>(kernels[i]);
}

}  // namespace native
