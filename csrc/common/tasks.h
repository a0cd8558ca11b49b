// How a product of rows with panels of channels is shared among threads, where each task turns the weights of its
// panels into another form before it multiplies.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>

#include "parallel.h"
#include "round.h"

namespace pycompress {

// Tasks have as many rows as may be, because each turns the weights anew; where that makes too few of them, the
// channels are split too, and more than one thread prepares the same rows. There are more tasks than threads, taken as
// they come: the cores of a shared machine are not equally fast. k is never split: no result depends on the threads.
struct Tasks {
  int64_t m, panels, rows, panel_tasks;
  int threads;

  // most_rows, unit: a task has at most so many rows, and a multiple of so many.
  Tasks(int64_t m_, int64_t panels_, int64_t k, int nr, int64_t most_rows, int64_t unit, int requested_threads)
      : m(m_), panels(panels_), threads(usable_threads(requested_threads)) {
    if (2.0 * static_cast<double>(m * nr) * static_cast<double>(panels * k) < kSerialOperations) threads = 1;
    rows = round_up(divide_up(m, divide_up(m, most_rows)), unit);
    panel_tasks = threads == 1 ? 1 : std::min(panels, divide_up(kTasksPerThread * threads, divide_up(m, rows)));
  }

  // make() gives a thread its worker: take(row, count) prepares rows, multiply(panel) computes those of a panel.
  template <class F>
  void run(F&& make) const {
    const int64_t task_panels = divide_up(panels, panel_tasks), tasks = divide_up(m, rows) * panel_tasks;
    std::atomic<int64_t> next{0};
    parallel(static_cast<int>(std::min<int64_t>(threads, tasks)), [&](int, int) {
      auto worker = make();
      for (int64_t t = next++; t < tasks; t = next++) {
        const int64_t row = t / panel_tasks * rows, first = t % panel_tasks * task_panels;
        worker.take(row, static_cast<int>(std::min(rows, m - row)));
        for (int64_t panel = first; panel < std::min(panels, first + task_panels); ++panel) worker.multiply(panel);
      }
    });
  }

 private:
  static constexpr int64_t kTasksPerThread = 4;
  // Below this many operations a parallel region (1 to 2 us) costs more than the second thread brings.
  static constexpr double kSerialOperations = 1.5e6;
};

}  // namespace pycompress
