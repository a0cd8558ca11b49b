// The driver of convolutions: unfolds tiles of positions, hands out blocks of channels, writes the results in place.
#include <algorithm>
#include <cstring>

#include "../common/check.h"
#include "../common/scratch.h"
#include "gemm.h"
#include "pack.h"
#include "tasks.h"

namespace pycompress::sparse {
namespace {

thread_local Scratch scratch;

class Worker {
 public:
  Worker(const Convolution& problem, const Header& header, const Kernel& kernel, int width, int64_t blocks)
      : p_(problem), header_(header), kernel_(kernel), pixels_(problem.channels * problem.height * problem.width) {
    const size_t rows = static_cast<size_t>(width);
    const size_t tile = rows * static_cast<size_t>(header.k) * sizeof(float);
    const size_t sums = rows * static_cast<size_t>(blocks * header.nb) * sizeof(float);
    const size_t image = p_.type == Type::float32 ? 0 : static_cast<size_t>(pixels_) * sizeof(float);
    tile_ = scratch.reserve(tile + sums + image);
    sums_ = tile_ + tile;
    converted_ = reinterpret_cast<float*>(sums_ + sums);
  }

  void run(const Task& task) {
    load(task);
    multiply(
        p_.packed, header_, kernel_, task, tile_, sums_, [](int64_t) {},
        [&](int64_t block, const uint8_t* sums) { finish(task, block, sums); });
  }

 private:
  void load(const Task& task) {
    if (task.image != image_) image_at(task.image);
    if (task.image == loaded_image_ && task.row == loaded_row_) return;
    loaded_image_ = task.image;
    loaded_row_ = task.row;
    auto* out = reinterpret_cast<float*>(tile_);
    for (int64_t c = 0; c < p_.channels; ++c)
      for (int64_t i = 0; i < p_.kernel_h; ++i)
        for (int64_t j = 0; j < p_.kernel_w; ++j, out += task.width) {
          unfold(pixels_at_ + c * p_.height * p_.width, i * p_.dilation_h - p_.pad_top, j * p_.dilation_w - p_.pad_left,
                 task, out);
          std::fill(out + task.rows, out + task.width, 0.0f);
        }
  }

  // The image as float32.
  void image_at(int64_t image) {
    image_ = image;
    const auto* x = value_of(p_.x, p_.type, image * pixels_);
    if (p_.type != Type::float32) {
      kernel_.load(x, p_.type, pixels_, 1, pixels_, 1, converted_);
      x = reinterpret_cast<const uint8_t*>(converted_);
    }
    pixels_at_ = reinterpret_cast<const float*>(x);
  }

  // What one position of the kernel, (top, left) from the first position of y, sees from the task's positions of y.
  void unfold(const float* channel, int64_t top, int64_t left, const Task& task, float* out) const {
    const int64_t end = task.row + task.rows;
    for (int64_t at = task.row; at < end;) {  // the rest of one row of y at a time
      const int64_t out_x = at % p_.out_w, count = std::min(p_.out_w - out_x, end - at);
      const int64_t y = at / p_.out_w * p_.stride_h + top, x = out_x * p_.stride_w + left;
      copy_row(y >= 0 && y < p_.height ? channel + y * p_.width : nullptr, x, count, out);
      at += count;
      out += count;
    }
  }

  // out[i] = row[x + i * stride_w], zero outside, and where there is no row.
  void copy_row(const float* row, int64_t x, int64_t count, float* out) const {
    const int64_t stride = p_.stride_w;
    const int64_t before = std::min(count, x < 0 ? divide_up(-x, stride) : 0);
    const int64_t last = x < p_.width ? divide_up(p_.width - x, stride) : 0;  // first i that lies behind the row
    const int64_t end = row != nullptr ? std::clamp(last, before, count) : before;
    std::fill(out, out + before, 0.0f);
    if (stride == 1) {
      if (end > before) std::memcpy(out + before, row + x + before, static_cast<size_t>(end - before) * sizeof(float));
    } else {
      for (int64_t i = before; i < end; ++i) out[i] = row[x + i * stride];
    }
    std::fill(out + end, out + count, 0.0f);
  }

  void finish(const Task& task, int64_t block, const uint8_t* sums) const {
    const int64_t n = block * header_.nb, positions = p_.out_h * p_.out_w;
    int8::Epilogue epilogue{};
    epilogue.bias = p_.bias == nullptr ? nullptr : p_.bias + n;
    epilogue.activation = p_.activation;
    epilogue.type = p_.type;
    auto* y = value_of(p_.y, p_.type, (task.image * p_.n + n) * positions + task.row);
    kernel_.finish_channels(sums, task.width, task.rows, static_cast<int>(std::min<int64_t>(header_.nb, p_.n - n)),
                            epilogue, y, positions);
  }

  const Convolution& p_;
  const Header& header_;
  const Kernel& kernel_;
  const int64_t pixels_;
  uint8_t *tile_, *sums_;
  float* converted_;
  const float* pixels_at_ = nullptr;
  int64_t image_ = -1, loaded_image_ = -1, loaded_row_ = -1;
};

}  // namespace

void conv2d(const Convolution& p) {
  const Header& header = header_of(p.packed, p.packed_bytes);
  check(p.type != Type::int32, "sparse_conv2d: x is int32, expected a float type");
  check(is_float(header.format), "sparse_conv2d: the packed weight is int8, expected float32");
  check(p.channels * p.kernel_h * p.kernel_w == header.k, "sparse_conv2d: ", p.channels, " channels and a kernel of ",
        p.kernel_h, "x", p.kernel_w, " make ", p.channels * p.kernel_h * p.kernel_w,
        " positions, the packed weight expects k = ", header.k);
  check(p.n == header.n, "sparse_conv2d: n is ", p.n, ", the packed weight has ", header.n, " channels");
  if (p.images == 0 || p.out_h == 0 || p.out_w == 0) return;
  const Kernel& kernel = kernel_for(header.format);
  const Tasks tasks(header, kernel, p.images, p.out_h * p.out_w, p.threads);
  tasks.run([&] { return Worker(p, header, kernel, tasks.width(), tasks.task_blocks()); });
}

}  // namespace pycompress::sparse
