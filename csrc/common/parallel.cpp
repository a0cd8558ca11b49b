#include "parallel.h"

#if defined(_OPENMP)
#include <omp.h>
#include <pthread.h>

#include <atomic>
#endif

namespace pycompress {

#if defined(_OPENMP)
namespace {

std::atomic<bool> forked{false};

}  // namespace

void watch_fork() {
  static const int registered = pthread_atfork(nullptr, nullptr, [] { forked.store(true); });
  (void)registered;
}

int usable_threads(int requested) {
  if (requested <= 1 || forked.load(std::memory_order_relaxed) || omp_in_parallel()) return 1;
  return requested;
}

void run_parallel(int threads, ParallelBody body, void* context) {
  if (threads <= 1) return body(0, 1, context);
#pragma omp parallel num_threads(threads)
  body(omp_get_thread_num(), omp_get_num_threads(), context);
}
#else
void watch_fork() {}
int usable_threads(int) { return 1; }
void run_parallel(int, ParallelBody body, void* context) { body(0, 1, context); }
#endif

}  // namespace pycompress
