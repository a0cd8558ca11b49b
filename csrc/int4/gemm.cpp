// The driver: which rows and channels on which thread, panels expanded block by block, or streamed for few rows.
#include "gemm.h"

#include <algorithm>

#include "../common/check.h"
#include "../common/kernels.h"
#include "../common/prefetch.h"
#include "../common/round.h"
#include "../common/scratch.h"
#include "../common/tasks.h"
#include "kernel_list.h"
#include "pack.h"

namespace pycompress::int4 {
namespace {

// Rows of a task: enough to pay for expanding the weights, and few enough for the L2.
constexpr int kMaxTaskRows = 64, kMinTaskRows = 16;
constexpr int64_t kActivationBytes = 512 * 1024;
constexpr int kActivationBits = 8;
constexpr int kFinishRows = 16;  // rows of results whose cache lines are fetched at once
constexpr int kBlockK = 1024;    // positions that are expanded at once: 16 KiB of a 32 KiB L1

thread_local Scratch scratch;

// One thread's share of a call: it quantizes some rows into its scratch, then multiplies them with panels of weights.
class Worker {
 public:
  Worker(const Problem& problem, const Header& header, const Kernel& kernel, int64_t rows)
      : p_(problem), header_(header), kernel_(kernel), shape_{header.k, 1} {
    const size_t q = round_up<size_t>(static_cast<size_t>(rows * shape_.stride()), 64), weights = kBlockK * kPanel;
    const size_t scales = weights / kUnit, v = static_cast<size_t>(rows) * kPanel, count = static_cast<size_t>(rows);
    room_.data = scratch.reserve(q + weights + (scales + v + 2 * count) * 4);
    expanded_.weights = reinterpret_cast<int8_t*>(room_.data + q);
    expanded_.scale = reinterpret_cast<float*>(expanded_.weights + weights);
    v_ = expanded_.scale + scales;
    room_.scale = v_ + v;
    room_.zero_point = reinterpret_cast<int32_t*>(room_.scale + count);
  }

  // Rows that are there already, from the task before, are not quantized again.
  void take(int64_t row, int rows) {
    if (row == row_) return;
    row_ = row;
    rows_ = rows;
    q_ = int8::quantized_rows(p_, int8::best_kernel(), shape_, kActivationBits, row, rows, room_);
  }

  void multiply(int64_t panel) {
    const int64_t units = header_.units();
    if (rows_ <= kernel_.mr && kernel_.stream != nullptr) {
      fetch(panel, 0, rows_);
      kernel_.stream(q_.data, shape_.stride(), rows_, panel_of(p_.packed, header_, panel, 0, units), v_);
      return finish(panel, 0, rows_);
    }
    constexpr int64_t step = kBlockK / kUnit;
    for (int64_t unit = 0; unit < units; unit += step) {
      const Panel block = panel_of(p_.packed, header_, panel, unit, std::min(step, units - unit));
      kernel_.expand(block, expanded_);
      const bool last = unit + step >= units;
      for (int row = 0; row < rows_; row += kFinishRows) {
        const int end = std::min(rows_, row + kFinishRows);
        if (last) fetch(panel, row, end);
        for (int i = row; i < end; i += kernel_.mr)
          kernel_.tile(q_.data + i * shape_.stride() + unit * kUnit, shape_.stride(), std::min(kernel_.mr, end - i),
                       block, expanded_, v_ + i * kPanel, unit > 0);
        if (last) finish(panel, row, end);
      }
    }
  }

 private:
  uint8_t* result(int64_t panel, int row) const {
    return value_of(p_.y, p_.y_type, (row_ + row) * p_.n + panel * kPanel);
  }

  void fetch(int64_t panel, int row, int end) const {
    prefetch_rows(result(panel, row), end - row, p_.n * static_cast<int64_t>(size_of(p_.y_type)), 1);
  }

  void finish(int64_t panel, int row, int end) const {
    const int64_t n = panel * kPanel;
    const int columns = static_cast<int>(std::min<int64_t>(kPanel, p_.n - n));
    float room[kFinishRows * int8::kAddendStride];
    const float* bias = p_.bias == nullptr ? nullptr : p_.bias + n;
    if (p_.addend != nullptr) bias = p_.addend->tile(p_.addend->context, row_ + row, end - row, n, columns, room);
    const Epilogue epilogue{reinterpret_cast<const float*>(p_.packed + header_.offsets) + n,
                            bias,
                            p_.addend == nullptr ? 0 : int8::kAddendStride,
                            q_.scale + row,
                            q_.zero_point + row,
                            p_.activation,
                            p_.y_type};
    kernel_.finish(v_ + row * kPanel, end - row, columns, epilogue, result(panel, row), p_.n);
  }

  const Problem& p_;
  const Header& header_;
  const Kernel& kernel_;
  const int8::ActivationShape shape_;
  int8::RowRoom room_;
  int8::Quantized q_;  // in the room, or where the caller quantized them
  Expanded expanded_;
  float* v_;
  int64_t row_ = -1;
  int rows_ = 0;
};

}  // namespace

Kernels<Kernel>& kernels() {
  static constexpr const Kernel* best_first[] = {
#if defined(PYCOMPRESS_X86)
      &kAvx512Vnni, &kAvxVnni, &kAvx2,
#endif
      &kScalar};
  static Kernels<Kernel> all{"int4", best_first};
  return all;
}

void linear(const Problem& p) { linear(p, kernels().first()); }

void linear(const Problem& p, const Kernel& kernel) {
  const Header& header = header_of(p.packed, p.packed_bytes);
  check(p.k == header.k, "int4_linear: x is [", p.m, ", ", p.k, "], the packed weight expects k = ", header.k);
  check(p.n == header.n, "int4_linear: n is ", p.n, ", the packed weight has ", header.n, " channels");
  check(header.activation_bits == 8, "int4_linear: the packed weight keeps its activations as floats");
  check(p.x_type != Type::int32 && p.y_type != Type::int32, "int4_linear: x or y is int32, expected a float type");
  if (p.m == 0) return;

  const int64_t most =
      std::clamp<int64_t>(kActivationBytes / int8::ActivationShape{header.k, 1}.stride(), kMinTaskRows, kMaxTaskRows);
  const Tasks tasks(p.m, header.panels(), p.k, kPanel, most, kernel.mr, p.threads);
  tasks.run([&] { return Worker(p, header, kernel, tasks.rows); });
}

}  // namespace pycompress::int4
