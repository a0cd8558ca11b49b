// The driver of linear layers: loads tiles of rows, hands out blocks of channels (tasks.h), writes the results.
#include "gemm.h"

#include <algorithm>

#include "../common/check.h"
#include "../common/kernels.h"
#include "../common/prefetch.h"
#include "../common/scratch.h"
#include "kernel_list.h"
#include "pack.h"
#include "tasks.h"

namespace pycompress::sparse {
namespace {

thread_local Scratch scratch;

// One thread's share of a call.
class Worker {
 public:
  Worker(const Problem& problem, const Header& header, const Kernel& kernel, int width, int64_t blocks)
      : p_(problem), header_(header), kernel_(kernel) {
    const size_t rows = static_cast<size_t>(width), k = static_cast<size_t>((header.k + 31) / 32 * 32);
    const size_t tile = rows * k * (is_float(header.format) ? 4 : 1);
    const size_t sums = static_cast<size_t>(blocks * header.nb) * rows * 4;
    const size_t bytes = is_float(header.format) ? 0 : static_cast<size_t>(shape().stride()) * rows;
    tile_ = scratch.reserve(tile + sums + (bytes + 63) / 64 * 64 + rows * 8);
    sums_ = tile_ + tile;
    room_.data = sums_ + sums;
    room_.scale = reinterpret_cast<float*>(room_.data + (bytes + 63) / 64 * 64);
    room_.zero_point = reinterpret_cast<int32_t*>(room_.scale + rows);
  }

  void run(const Task& task) {
    load(task);
    if (task.first_block == 0 && p_.row_scale != nullptr) std::copy_n(q_.scale, task.rows, p_.row_scale + task.row);
    if (task.first_block == 0 && p_.zero_point != nullptr)
      std::copy_n(q_.zero_point, task.rows, p_.zero_point + task.row);
    multiply(
        p_.packed, header_, kernel_, task, tile_, sums_, [&](int64_t block) { fetch(task, block); },
        [&](int64_t block, const uint8_t* sums) { finish(task, block, sums); });
  }

 private:
  int8::ActivationShape shape() const { return {header_.k, 1}; }

  uint8_t* result(const Task& task, int64_t n) const { return value_of(p_.y, p_.y_type, task.row * p_.n + n); }

  void fetch(const Task& task, int64_t block) const {
    const int64_t n = block * header_.nb, y_size = static_cast<int64_t>(size_of(p_.y_type));
    prefetch_rows(result(task, n), task.rows, p_.n * y_size, std::min<int64_t>(header_.nb, p_.n - n) * y_size);
  }

  // The tile stays for all tasks of the same rows.
  void load(const Task& task) {
    if (task.row == row_) return;
    row_ = task.row;
    if (is_float(header_.format))
      return kernel_.load(value_of(p_.x, p_.x_type, task.row * p_.ldx), p_.x_type, p_.ldx, task.rows, header_.k,
                          task.width, tile_);
    q_ = int8::quantized_rows(p_, int8::best_kernel(), shape(), header_.activation_bits, task.row, task.rows, room_);
    kernel_.load(q_.data, Type::float32, shape().stride(), task.rows, header_.k, task.width, tile_);
  }

  void finish(const Task& task, int64_t block, const uint8_t* sums) const {
    const int64_t first = block * header_.nb, end = std::min<int64_t>(first + header_.nb, p_.n);
    const auto* column_sums = reinterpret_cast<const int32_t*>(p_.packed + header_.column_sums);
    for (int64_t n = first; n < end; n += kPanel) {
      const int columns = static_cast<int>(std::min<int64_t>(kPanel, end - n));
      float room[kMaxWidth * int8::kAddendStride];
      const float* bias = p_.bias == nullptr ? nullptr : p_.bias + n;
      if (p_.addend != nullptr) bias = p_.addend->tile(p_.addend->context, task.row, task.rows, n, columns, room);
      const int8::Epilogue epilogue{column_sums + n,
                                    p_.weight_scale == nullptr ? nullptr : p_.weight_scale + n,
                                    bias,
                                    p_.addend == nullptr ? 0 : int8::kAddendStride,
                                    q_.scale,
                                    q_.zero_point,
                                    p_.activation,
                                    p_.y_type};
      kernel_.finish(sums + static_cast<size_t>((n - first) * task.width) * 4, task.width, task.rows, columns, epilogue,
                     result(task, n), p_.n);
    }
  }

  const Problem& p_;
  const Header& header_;
  const Kernel& kernel_;
  uint8_t *tile_, *sums_;
  int8::RowRoom room_;
  int8::Quantized q_;  // in the room, or where the caller quantized them
  int64_t row_ = -1;
};

}  // namespace

Kernels<Kernel>& kernels() {
  static constexpr const Kernel* best_first[] = {
#if defined(PYCOMPRESS_X86)
      &kAvx2Rows,   &kAvx2Panels,   &kAvx2Quads,   &kAvx2Quads4,
#endif
      &kScalarRows, &kScalarPanels, &kScalarQuads, &kScalarQuads4};
  static Kernels<Kernel> all{"sparse", best_first};
  return all;
}

const Kernel& kernel_for(Format format) {
  const Kernel* kernel = kernels().first([&](const Kernel& of) { return of.format == format; });
  check(kernel != nullptr, "sparse_linear: the kernel that is forced reads no weights packed as ", format_name(format));
  return *kernel;
}

void linear(const Problem& p) {
  const Header& header = header_of(p.packed, p.packed_bytes);
  check(p.k == header.k, "sparse_linear: x is [", p.m, ", ", p.k, "], the packed weight expects k = ", header.k);
  check(p.n == header.n, "sparse_linear: n is ", p.n, ", the packed weight has ", header.n, " channels");
  check(is_float(header.format) || p.weight_scale != nullptr || p.y_type == Type::int32,
        "sparse_linear: the packed weight is int8, expected a scale");
  check(!is_float(header.format) || (p.weight_scale == nullptr && p.y_type != Type::int32),
        "sparse_linear: the packed weight is float32, which has neither a scale nor integer sums");
  if (is_delegated(header.format)) {
    const int64_t inner = p.packed_bytes - static_cast<int64_t>(header.blocks);
    return int8::linear({p.x, p.x_type, p.m, p.k, p.ldx, p.packed + header.blocks, inner, p.n, p.weight_scale, p.bias,
                         p.activation, p.y, p.y_type, p.row_scale, p.zero_point, p.threads, p.quantized, p.addend});
  }
  const Kernel& kernel = kernel_for(header.format);
  if (p.m == 0) return;

  const Tasks tasks(header, kernel, 1, p.m, p.threads);
  tasks.run([&] { return Worker(p, header, kernel, tasks.width(), tasks.task_blocks()); });
}

}  // namespace pycompress::sparse
