// One OpenMP pool, shared with torch: linking to plain libgomp after `import torch` reuses the copy that torch loaded.
// Or the threads of a runtime that calls us, which has a pool of its own.
#pragma once

#include <cstddef>

namespace pycompress {

// How many threads a call that asked for `requested` may use: 1 in a forked child (libgomp's workers do not
// survive a fork, and a new region would wait for them for ever; GCC bug 60035) and inside another parallel region.
int usable_threads(int requested);

// Call once at import, so that a fork before the first use is noticed too.
void watch_fork();

using ParallelBody = void (*)(int thread, int threads, void* context);

// Runs body(thread, threads, context) once on each of `threads` threads; inline, without a region, where that is 1.
// The body must not throw.
void run_parallel(int threads, ParallelBody body, void* context);

// While it lives, the parallel regions of the thread that made it run on somebody else's threads, none of which has to
// be there: one of them may run several bodies of a region, one after the other.
class BorrowedThreads {
 public:
  // Calls each(context, i) once for every i below `count`, anywhere, and returns behind the last.
  using ForEach = void (*)(const void* owner, int count, void (*each)(void* context, size_t i), void* context);

  BorrowedThreads(ForEach for_each, const void* owner);
  ~BorrowedThreads();
  BorrowedThreads(const BorrowedThreads&) = delete;
  BorrowedThreads& operator=(const BorrowedThreads&) = delete;

  void run(int threads, ParallelBody body, void* context) const;

 private:
  const ForEach for_each_;
  const void* const owner_;
};

template <class F>
void parallel(int threads, F&& body) {
  run_parallel(threads, [](int t, int n, void* f) { (*static_cast<F*>(f))(t, n); }, &body);
}

}  // namespace pycompress
