// The Hopper kernels' own source on the host: at the edges of their tiles, with tiles of operands that land late, early
// or in any order, and with as many blocks as make each compute several tiles.
#include "emulate_hopper.h"
#include "int8/cuda_kernel_list.h"
#include "int8_reference.h"

namespace native {
namespace {

// More tiles than blocks, in schedules that could uncover a missing wait; late tiles and threads in order are the
// default of all other cases.
void check_schedules(const cuda::Kernel& kernel) {
  const int64_t deep = int64_t{kernel.bk} * (kernel.stages + 1) + 64;
  Int8Case c(2 * kernel.bm + 3, 2 * kernel.bn + 5, deep);
  struct Schedule {
    emulate::Landing tiles;
    emulate::Order threads;
    int multiprocessors;
  };
  for (const Schedule& schedule : {Schedule{emulate::Landing::late, emulate::Order::descending, 4},
                                   Schedule{emulate::Landing::early, emulate::Order::random, 2},
                                   Schedule{emulate::Landing::random, emulate::Order::random, 3}}) {
    emulate::options.tiles = schedule.tiles;
    emulate::options.threads = schedule.threads;
    emulate::options.multiprocessors = schedule.multiprocessors;
    emulate::options.reversed_blocks = schedule.threads == emulate::Order::descending;
    check_int8_sums(kernel, c);
    emulate::options = {};
  }
}

void check_deep(const cuda::Kernel& kernel) {
  Int8Case c(3, 5, 16384, Values::extreme);
  check_int8_sums(kernel, c);
}

}  // namespace

void test_cuda_int8_hopper() {
  int count = 0;
  const cuda::Kernel* kernels = cuda::kernels_sm90(&count);
  for (int i = 0; i < count; ++i) {
    check_int8_kernel(kernels[i]);
    check_schedules(kernels[i]);
    check_deep(kernels[i]);
  }
}

}  // namespace native
