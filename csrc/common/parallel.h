// One OpenMP pool, shared with torch: linking to plain libgomp after `import torch` reuses the copy that torch loaded.
#pragma once

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

template <class F>
void parallel(int threads, F&& body) {
  run_parallel(threads, [](int t, int n, void* f) { (*static_cast<F*>(f))(t, n); }, &body);
}

}  // namespace pycompress
