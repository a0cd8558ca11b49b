// The driver: which rows and channels on which thread, panels expanded block by block, or streamed for few rows.
#include "gemm.h"

#include <algorithm>

#include "../common/check.h"
#include "../common/kernels.h"
#include "../common/round.h"
#include "../common/scratch.h"
#include "../common/tasks.h"
#include "kernel_list.h"
#include "pack.h"

namespace pycompress::int4 {
namespace {

const Kernel* const kKernels[] = {
#if defined(PYCOMPRESS_X86)
    &kAvx512Vnni, &kAvxVnni, &kAvx2,
#endif
    &kScalar};

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
    q_room_ = scratch.reserve(q + weights + (scales + v + 2 * count) * 4);
    expanded_.weights = reinterpret_cast<int8_t*>(q_room_ + q);
    expanded_.scale = reinterpret_cast<float*>(expanded_.weights + weights);
    v_ = expanded_.scale + scales;
    own_scale_ = v_ + v;
    own_zero_point_ = reinterpret_cast<int32_t*>(own_scale_ + count);
    q_ = q_room_;
    scale_ = own_scale_;
    zero_point_ = own_zero_point_;
  }

  // Rows that are there already, from the task before, are not quantized again.
  void take(int64_t row, int rows) {
    if (row == row_) return;
    row_ = row;
    rows_ = rows;
    if (p_.quantized != nullptr && p_.quantized->fits(shape_, kActivationBits)) {
      q_ = p_.quantized->data + row * shape_.stride();
      scale_ = p_.quantized->scale + row;
      zero_point_ = p_.quantized->zero_point + row;
      return;
    }
    const auto* x = static_cast<const uint8_t*>(p_.x) + static_cast<size_t>(row * p_.ldx) * size_of(p_.x_type);
    int8::best_kernel().quantize(x, p_.x_type, p_.ldx, rows, shape_, (1 << kActivationBits) - 1, q_room_, own_scale_,
                                 own_zero_point_);
  }

  void multiply(int64_t panel) {
    const int64_t units = header_.units();
    if (rows_ <= kernel_.mr && kernel_.stream != nullptr) {
      fetch(panel, 0, rows_);
      kernel_.stream(q_, shape_.stride(), rows_, panel_of(p_.packed, header_, panel, 0, units), v_);
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
          kernel_.tile(q_ + i * shape_.stride() + unit * kUnit, shape_.stride(), std::min(kernel_.mr, end - i), block,
                       expanded_, v_ + i * kPanel, unit > 0);
        if (last) finish(panel, row, end);
      }
    }
  }

 private:
  uint8_t* result(int64_t panel, int row) const {
    return static_cast<uint8_t*>(p_.y) + static_cast<size_t>((row_ + row) * p_.n + panel * kPanel) * size_of(p_.y_type);
  }

  // A store that misses would stall the next one.
  void fetch(int64_t panel, int row, int end) const {
    for (; row < end; ++row) __builtin_prefetch(result(panel, row), 1);
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
                            scale_ + row,
                            zero_point_ + row,
                            p_.activation,
                            p_.y_type};
    kernel_.finish(v_ + row * kPanel, end - row, columns, epilogue, result(panel, row), p_.n);
  }

  const Problem& p_;
  const Header& header_;
  const Kernel& kernel_;
  const int8::ActivationShape shape_;
  uint8_t* q_room_;
  Expanded expanded_;
  float *v_, *own_scale_;
  int32_t* own_zero_point_;
  const uint8_t* q_;  // in the room, or where the caller quantized them
  const float* scale_;
  const int32_t* zero_point_;
  int64_t row_ = -1;
  int rows_ = 0;
};

}  // namespace

const Kernel* kernels(int* count) {
  static const auto list = listed(kKernels);
  *count = static_cast<int>(list.size());
  return list.data();
}

const Kernel& best_kernel() {
  return *first_available(kKernels, [](const Kernel&) { return true; });
}

void linear(const Problem& p) { linear(p, best_kernel()); }

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
