#include "parallel.h"

#if defined(_OPENMP)
#include <omp.h>
#include <pthread.h>

#include <atomic>
#endif

namespace pycompress {
namespace {

thread_local const BorrowedThreads* borrowed = nullptr;
thread_local bool inside = false;  // a body that runs on borrowed threads

#if defined(_OPENMP)
std::atomic<bool> forked{false};
#endif

}  // namespace

BorrowedThreads::BorrowedThreads(ForEach for_each, const void* owner) : for_each_(for_each), owner_(owner) {
  borrowed = this;
}
BorrowedThreads::~BorrowedThreads() { borrowed = nullptr; }

void BorrowedThreads::run(int threads, ParallelBody body, void* context) const {
  struct Region {
    int threads;
    ParallelBody body;
    void* context;
  } region{threads, body, context};
  const auto each = [](void* of, size_t i) {
    const Region& r = *static_cast<const Region*>(of);
    inside = true;
    r.body(static_cast<int>(i), r.threads, r.context);
    inside = false;
  };
  for_each_(owner_, threads, each, &region);
}

#if defined(_OPENMP)
void watch_fork() {
  static const int registered = pthread_atfork(nullptr, nullptr, [] { forked.store(true); });
  (void)registered;
}

int usable_threads(int requested) {
  if (requested <= 1 || inside) return 1;
  if (borrowed != nullptr) return requested;
  return forked.load(std::memory_order_relaxed) || omp_in_parallel() ? 1 : requested;
}

void run_parallel(int threads, ParallelBody body, void* context) {
  if (threads <= 1) return body(0, 1, context);
  if (borrowed != nullptr) return borrowed->run(threads, body, context);
#pragma omp parallel num_threads(threads)
  body(omp_get_thread_num(), omp_get_num_threads(), context);
}
#else
void watch_fork() {}
int usable_threads(int requested) { return inside || borrowed == nullptr ? 1 : requested; }
void run_parallel(int threads, ParallelBody body, void* context) {
  if (threads <= 1 || borrowed == nullptr) return body(0, 1, context);
  borrowed->run(threads, body, context);
}
#endif

}  // namespace pycompress
