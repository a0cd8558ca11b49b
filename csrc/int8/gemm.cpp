// The driver: which kernel, which rows and channels on which thread, blocks that fit the caches.
#include "gemm.h"

#include <algorithm>
#include <atomic>
#include <cstring>

#include "../common/check.h"
#include "../common/kernels.h"
#include "../common/parallel.h"
#include "../common/prefetch.h"
#include "../common/round.h"
#include "../common/scratch.h"
#include "kernel_list.h"
#include "pack.h"

namespace pycompress::int8 {
namespace {

// Quantized rows of one task, at most: they are walked block by block, so they need not fit the L2 as a whole.
constexpr ptrdiff_t kActivationBytes = 1024 * 1024;
// Rows of results whose cache lines are fetched at once: this many, rounded up to the kernel's tile (up to 16 rows).
constexpr int kFinishRows = 16;
constexpr int kMaxTaskRows = 64, kMinTaskRows = 16, kTasksPerThread = 4;
// Below this many operations a parallel region (1 to 2 us) costs more than the second thread brings.
constexpr double kSerialOperations = 1.5e6;
constexpr int64_t kSerialRounding = 1 << 14;  // numbers

thread_local Scratch scratch;

const Kernel& kernel_for(const Header& header) {
  bool known = false;
  const Kernel* kernel = kernels().first([&](const Kernel& of) {
    const bool reads = of.layout == header.layout && of.nr == header.nr;
    known = known || reads;
    return reads;
  });
  check(kernel != nullptr || known, "packed int8 weight: no kernel reads layout ", static_cast<uint32_t>(header.layout),
        " with panels of ", header.nr);
  check(kernel != nullptr,
        "packed int8 weight: it was packed for an instruction set that this processor lacks or PYCOMPRESS_ISA "
        "excludes, or for another kernel than the one that is forced; pack the canonical weight again here");
  return *kernel;
}

// One thread's share of a call: it quantizes some rows into its scratch, then multiplies them with panels of weights.
class Worker {
 public:
  Worker(const Problem& problem, const Header& header, const Kernel& kernel, int64_t max_rows, int64_t max_panels)
      : p_(problem), header_(header), kernel_(kernel), shape_{header.k, header.versions}, range_(range_of(header)) {
    const size_t rows = static_cast<size_t>(max_rows), nr = static_cast<size_t>(kernel.nr);
    const size_t sums = rows * nr * static_cast<size_t>(shape_.blocks() > 1 ? max_panels : 1);
    const size_t bytes = (static_cast<size_t>(shape_.stride()) * rows + 63) / 64 * 64;
    room_.data = scratch.reserve(bytes + (sums + 2 * rows) * 4);
    sums_ = reinterpret_cast<int32_t*>(room_.data + bytes);
    room_.scale = reinterpret_cast<float*>(sums_ + sums);
    room_.zero_point = reinterpret_cast<int32_t*>(room_.scale + rows);
    if (kernel.begin != nullptr) kernel.begin();
  }
  ~Worker() {
    if (kernel_.end != nullptr) kernel_.end();
  }
  Worker(const Worker&) = delete;
  Worker& operator=(const Worker&) = delete;

  // Rows that are there already, from the task before, are not quantized again.
  void quantize(int64_t row, int rows) {
    if (row == row_) return;
    row_ = row;
    rows_ = rows;
    q_ = quantized_rows(p_, kernel_, shape_, header_.activation_bits, row, rows, room_, range_);
  }

  // The thread that has the first panel of some rows hands out their scales.
  void report() const {
    if (p_.row_scale != nullptr) std::copy_n(q_.scale, rows_, p_.row_scale + row_);
    if (p_.zero_point != nullptr) std::copy_n(q_.zero_point, rows_, p_.zero_point + row_);
  }

  // Block by block of k, so that the rows' share of a block stays in L2 while all panels pass over it, and a panel's
  // share stays in L1 while the rows pass over it. The sums of all panels wait in between; a single block needs those
  // of one.
  void multiply(int64_t first, int64_t end) {
    const int last = shape_.blocks() - 1;
    for (int block = 0; block <= last; ++block)
      for (int64_t panel = first; panel < end; ++panel) {
        int32_t* sums = last == 0 ? sums_ : sums_ + (panel - first) * rows_ * kernel_.nr;
        if (block < last)
          add_block(panel, block, sums, 0, rows_);
        else
          finish(panel, sums);
      }
  }

 private:
  void add_block(int64_t panel, int block, int32_t* sums, int row, int end) const {
    const auto* blocks = reinterpret_cast<const uint64_t*>(p_.packed + header_.blocks) + panel * shape_.blocks();
    const uint8_t* weights = p_.packed + blocks[block];
    const ptrdiff_t stride = shape_.stride();
    const uint8_t* a = q_.data + shape_.offset(block);
    const int mr = kernel_.mr, nr = kernel_.nr, length = shape_.length(block);
    for (int i = row; i < end; i += mr)
      kernel_.tile(a + i * stride, stride, std::min(mr, end - i), weights, length, sums + i * nr, block > 0);
  }

  // The last block and the epilogue, some rows at a time. The lines of y are fetched while the sums are computed: a
  // store that misses would stall the next one.
  void finish(int64_t panel, int32_t* sums) const {
    const int nr = kernel_.nr, step = (kFinishRows + kernel_.mr - 1) / kernel_.mr * kernel_.mr;
    const int64_t n = panel * nr;
    const int columns = static_cast<int>(std::min<int64_t>(nr, header_.n - n));
    const auto* column_sums = reinterpret_cast<const int32_t*>(p_.packed + header_.column_sums);
    const size_t y_size = size_of(p_.y_type), y_stride = static_cast<size_t>(p_.n) * y_size;
    auto* y = static_cast<uint8_t*>(p_.y) + static_cast<size_t>(row_ * p_.n + n) * y_size;
    for (int i = 0; i < rows_; i += step) {
      const int count = std::min(step, rows_ - i);
      uint8_t* at = y + static_cast<size_t>(i) * y_stride;
      prefetch_rows(at, count, static_cast<int64_t>(y_stride), 1);
      add_block(panel, shape_.blocks() - 1, sums, i, i + count);
      float room[kMaxTaskRows * kAddendStride];  // of whole tiles: a step may have more than kFinishRows
      const float* bias = p_.bias == nullptr ? nullptr : p_.bias + n;
      if (p_.addend != nullptr) bias = p_.addend->tile(p_.addend->context, row_ + i, count, n, columns, room);
      const Epilogue epilogue{column_sums + n,
                              p_.weight_scale == nullptr ? nullptr : p_.weight_scale + n,
                              bias,
                              p_.addend == nullptr ? 0 : kAddendStride,
                              q_.scale + i,
                              q_.zero_point + i,
                              p_.activation,
                              p_.y_type};
      kernel_.finish(sums + i * nr, nr, count, columns, epilogue, at, p_.n);
    }
  }

  const Problem& p_;
  const Header& header_;
  const Kernel& kernel_;
  const ActivationShape shape_;
  const Range range_;
  RowRoom room_;
  Quantized q_;  // in the room, or where the caller quantized them
  int32_t* sums_;
  int64_t row_ = -1;
  int rows_ = 0;
};

}  // namespace

Kernels<Kernel>& kernels() {
  static constexpr const Kernel* best_first[] = {
#if defined(PYCOMPRESS_X86)
      &kAmx,   &kAvx512Vnni, &kAvxVnni, &kAvx2, &kAvx2Windows,
#endif
      &kScalar};
  static Kernels<Kernel> all{"int8", best_first};
  return all;
}

const Kernel& best_kernel() { return kernels().first(); }

const Kernel& kernel_named(const char* name) { return kernels().named(name); }

const Kernel* kernel_for(Layout layout) {
  return kernels().first([&](const Kernel& kernel) { return kernel.layout == layout; });
}

void linear(const Problem& p) { linear(p, kernel_for(header_of(p.packed, p.packed_bytes))); }

void linear(const Problem& p, const Kernel& kernel) {
  const Header& header = header_of(p.packed, p.packed_bytes);
  check(p.k == header.k, "int8_linear: x is [", p.m, ", ", p.k, "], the packed weight expects k = ", header.k);
  check(p.n == header.n, "int8_linear: the scale has ", p.n, " channels, the packed weight ", header.n);
  if (p.m == 0) return;

  int threads = usable_threads(p.threads);
  const double operations = 2.0 * static_cast<double>(p.m) * static_cast<double>(p.n) * static_cast<double>(p.k);
  if (operations < kSerialOperations) threads = 1;

  // Rows are split first, because then each row is quantized once; with too few of them the channels are split and
  // every thread quantizes the rows again, which is cheaper than a barrier. K is never split: sums do not depend on it.
  // There are more tasks than threads, taken as they come: the cores of a shared machine are not equally fast.
  const ActivationShape shape{header.k, header.versions};
  const int64_t panels = divide_up(p.n, kernel.nr);
  int64_t task_rows = std::clamp<int64_t>(kActivationBytes / shape.stride(), kMinTaskRows, kMaxTaskRows);
  int64_t panel_tasks = 1;
  if (p.m >= threads * kMinTaskRows)
    task_rows = std::clamp<int64_t>(divide_up(p.m, kTasksPerThread * threads), kMinTaskRows, task_rows);
  else if (threads > 1)
    panel_tasks = std::min<int64_t>(panels, kTasksPerThread * threads);
  const int64_t row_tasks = divide_up(p.m, task_rows);
  task_rows = divide_up(divide_up(p.m, row_tasks), kernel.mr) * kernel.mr;
  if (threads > 1 && divide_up(p.m, task_rows) < threads)  // whole tiles are fewer
    panel_tasks = std::min<int64_t>(panels, kTasksPerThread * threads);
  const int64_t task_panels = divide_up(panels, panel_tasks), tasks = divide_up(p.m, task_rows) * panel_tasks;

  std::atomic<int64_t> next{0};
  parallel(static_cast<int>(std::min<int64_t>(threads, tasks)), [&](int, int) {
    Worker worker(p, header, kernel, std::min(task_rows, p.m), task_panels);
    for (int64_t t = next++; t < tasks; t = next++) {
      const int64_t row = t / panel_tasks * task_rows, first = t % panel_tasks * task_panels;
      worker.quantize(row, static_cast<int>(std::min(task_rows, p.m - row)));
      if (first == 0) worker.report();
      worker.multiply(first, std::min(panels, first + task_panels));
    }
  });
}

namespace {

// A row may be a whole image: nothing is added up here.
void check_rows(const char* op, int bits, int64_t k, const Range* range) {
  constexpr int64_t kMost = 1 << 30;
  if (range != nullptr) check_range(op, *range, bits);
  check(bits == 7 || bits == 8, op, ": activation_bits is ", bits, ", expected 7 or 8");
  check(k >= 1 && k <= kMost, op, ": x has ", k, " columns, expected 1 to ", kMost);
}

}  // namespace

void quantize(const Kernel& kernel, const void* x, Type type, int64_t m, int64_t k, int64_t ldx, int bits,
              const Range* range, uint8_t* q, float* scale, int32_t* zero_point) {
  check_rows("int8_quantize", bits, k, range);
  const ActivationShape shape{static_cast<int>(k), 1};
  uint8_t* row = scratch.reserve(static_cast<size_t>(shape.stride()));
  for (int64_t i = 0; i < m; ++i) {
    const auto* at = value_of(x, type, i * ldx);
    kernel.quantize(at, type, ldx, 1, shape, (1 << bits) - 1, range, row, scale + i, zero_point + i);
    std::memcpy(q + i * k, row, static_cast<size_t>(k));
  }
}

void round_rows(const Kernel& kernel, const void* x, Type type, int64_t m, int64_t k, int64_t ldx, int bits,
                const Range* range, float* y, int threads) {
  check_rows("int8_round", bits, k, range);
  const ActivationShape shape{static_cast<int>(k), 1};
  const int used = m * k < kSerialRounding ? 1 : usable_threads(threads);
  parallel(used, [&](int thread, int count) {
    uint8_t* row = scratch.reserve(static_cast<size_t>(shape.stride()));
    float* out = y + m * thread / count * k;
    for (int64_t i = m * thread / count; i < m * (thread + 1) / count; ++i) {
      float scale = 0;
      int32_t zero_point = 0;
      kernel.quantize(value_of(x, type, i * ldx), type, ldx, 1, shape, (1 << bits) - 1, range, row, &scale,
                      &zero_point);
      for (int64_t j = 0; j < k; ++j) out[j] = static_cast<float>(row[j] - zero_point) * scale;
      out += k;
    }
  });
}

}  // namespace pycompress::int8
