// How a call is cut into tasks, and how threads take them: the same for linear layers and convolutions.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>

#include "../common/parallel.h"
#include "../common/round.h"
#include "gemm.h"
#include "pack.h"

namespace pycompress::sparse {

constexpr int64_t kSumBytes = 256 * 1024;  // sums of one task: they wait in the L2 while the blocks of k pass
constexpr int64_t kTasksPerThread = 4;
// Below this many operations a parallel region (1 to 2 us) costs more than the second thread brings.
constexpr double kSerialOperations = 1e5;

// The narrowest tile that holds `rows`, or the widest one.
inline int width_for(int64_t rows, const Kernel& kernel, int widest) {
  for (int width = 1; width < widest; width *= 2)
    if ((kernel.widths & static_cast<unsigned>(width)) != 0 && width >= rows) return width;
  return widest;
}

// Some rows (or positions of one image) times some blocks of channels.
struct Task {
  int64_t image, row, first_block, end_block;
  int rows, width;
};

// Rows are split first: then each is turned and quantized once. Channels are split too where that gives too few tasks,
// or sums that leave the L2. k is never split, so sums do not depend on the threads.
class Tasks {
 public:
  Tasks(const Header& header, const Kernel& kernel, int64_t images, int64_t rows, int threads) : kernel_(kernel) {
    rows_ = rows;
    width_ = width_for(rows, kernel, std::min(header.width, kernel.mr));
    blocks_ = header.n_blocks();
    tiles_ = divide_up(rows, width_);
    const double operations =
        2.0 * static_cast<double>(images * rows) * static_cast<double>(header.nonzeros + header.k + header.n);
    threads_ = operations < kSerialOperations ? 1 : usable_threads(threads);
    const int64_t fitting = std::max<int64_t>(1, kSumBytes / (4 * width_ * header.nb));
    const int64_t wanted = threads_ == 1 ? 1 : divide_up(kTasksPerThread * threads_, images * tiles_);
    task_blocks_ = std::min(fitting, divide_up(blocks_, std::min(wanted, blocks_)));
    parts_ = divide_up(blocks_, task_blocks_);
    count_ = images * tiles_ * parts_;
    threads_ = static_cast<int>(std::min<int64_t>(threads_, count_));
  }

  int width() const { return width_; }
  int64_t task_blocks() const { return task_blocks_; }

  // make_worker() on each thread, worker.run(task) for all tasks. Each thread begins with its own share, whose rows it
  // loads once, and then helps the others: the cores of a shared machine are not equally fast.
  template <class F>
  void run(F&& make_worker) const {
    const std::unique_ptr<std::atomic<int64_t>[]> next(new std::atomic<int64_t>[static_cast<size_t>(threads_)]);
    for (int t = 0; t < threads_; ++t) next[static_cast<size_t>(t)] = begin(t);
    parallel(threads_, [&](int thread, int) {
      auto worker = make_worker();
      for (int i = 0; i < threads_; ++i) {
        const int share = (thread + i) % threads_;
        for (int64_t t = next[static_cast<size_t>(share)]++; t < begin(share + 1);
             t = next[static_cast<size_t>(share)]++)
          worker.run(task(t));
      }
    });
  }

 private:
  int64_t begin(int thread) const { return count_ * thread / threads_; }

  Task task(int64_t t) const {
    Task task{t / parts_ / tiles_, t / parts_ % tiles_ * width_, t % parts_ * task_blocks_, 0, 0, 0};
    task.end_block = std::min(blocks_, task.first_block + task_blocks_);
    task.rows = static_cast<int>(std::min<int64_t>(width_, rows_ - task.row));
    task.width = width_for(task.rows, kernel_, width_);
    return task;
  }

  const Kernel& kernel_;
  int64_t rows_, blocks_, tiles_, task_blocks_, parts_, count_;
  int width_, threads_;
};

// sums (+)= blocks of the task . tile, and then finish(block) for each. The last block of a channel's positions and its
// results follow one another, so that sums and results are still in the cache; before(block) may fetch what comes.
template <class Before, class After>
void multiply(const uint8_t* packed, const Header& header, const Kernel& kernel, const Task& task, const uint8_t* tile,
              uint8_t* sums, Before&& before, After&& after) {
  const size_t step = static_cast<size_t>(header.kb) * static_cast<size_t>(task.width) *
                      (is_float(header.format) ? sizeof(float) : sizeof(uint8_t));
  const size_t block_sums = static_cast<size_t>(header.nb) * static_cast<size_t>(task.width) * 4;
  for (int64_t i = 0; i < header.k_blocks(); ++i)
    for (int64_t b = task.first_block; b < task.end_block; ++b) {
      const bool last = i + 1 == header.k_blocks();
      uint8_t* at = sums + static_cast<size_t>(b - task.first_block) * block_sums;
      if (last) before(b);
      kernel.tile(block_of(packed, header, b, i), tile + static_cast<size_t>(i) * step, task.width, at, i > 0);
      if (last) after(b, at);
    }
}

}  // namespace pycompress::sparse
