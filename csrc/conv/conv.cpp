// The driver: ranges, quantized images, rows of them copied for each tile, which thread does what.
#include "conv.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <vector>

#include "../common/check.h"
#include "../common/float16.h"
#include "../common/kernels.h"
#include "../common/parallel.h"
#include "../common/round.h"
#include "../common/scratch.h"
#include "../int8/pack.h"
#include "kernel_list.h"
#include "pack.h"
#include "phases.h"

namespace pycompress::conv {
namespace {

constexpr double kSerialOperations = 1.5e6;  // as int8/gemm.cpp
constexpr int64_t kTaskRows = 64, kFewRows = 16, kTasksPerThread = 4;
constexpr int64_t kStripRows = 256, kStripBytes = 1 << 19;  // of a task of strips, and what its rows may take at most
constexpr int kSlice = 8;                                   // rows of a strip that are finished at once
constexpr int64_t kBoth = 1 << 20;          // bytes of images that are read for their ends, then from the L2
constexpr int64_t kTogether = 1 << 20;      // bytes of quantized images that are computed at once: they stay in the L2
constexpr int64_t kRoomFloats = 48 * 1024;  // of a depthwise task
constexpr int64_t kTaskChannels = 64;       // of a depthwise task where they lie last: as bytes a cache line of a pixel
constexpr int64_t kChunk = 1 << 15;         // values of an image whose extremes one thread finds at a time

thread_local Scratch scratch, images_room;

// What the whole image is: the quantizer of int8/gemm.h for one long row.
Range range_of(const Extremes& e, int amax) {
  Range range{e.finite ? 0.0f : NAN, 0.0f, 0};
  const float half = 0.5f * e.high - 0.5f * e.low, half_max = 0.5f * static_cast<float>(amax);
  if (!e.finite || half < 0x1p-100f) return range;
  range.inverse = half_max / half;
  range.scale = half / half_max;
  const int zero = static_cast<int>(std::nearbyint(-e.low * range.inverse));
  range.zero_point = std::clamp(zero, 0, amax);
  return range;
}

// As tasks of `threads`, taken as they come: the cores of a shared machine are not equally fast.
template <class F>
void each(int64_t tasks, int threads, F&& f) {
  std::atomic<int64_t> next{0};
  parallel(static_cast<int>(std::min<int64_t>(threads, tasks)), [&](int, int) {
    for (int64_t t = next++; t < tasks; t = next++) f(t);
  });
}

// What the images are quantized by, and which of them are found to hold NaN or Inf while they are.
struct Ranges {
  std::vector<Range> of;
  std::vector<std::atomic<bool>> broken;
  explicit Ranges(int64_t images, Range all = {})
      : of(static_cast<size_t>(images), all), broken(static_cast<size_t>(images)) {
    for (auto& one : broken) one.store(false, std::memory_order_relaxed);
  }
  bool settle(int64_t image) {  // whether it was broken
    const bool was = broken[static_cast<size_t>(image)];
    if (was) of[static_cast<size_t>(image)].scale = NAN;
    return was;
  }
};

// Of images [first, first + images).
std::vector<Extremes> extremes_of(const Convolution& p, const Kernel& kernel, int64_t first, int64_t images,
                                  int threads) {
  const int64_t count = p.channels * p.height * p.width, chunks = divide_up(count, kChunk);
  std::vector<Extremes> found(static_cast<size_t>(images * chunks));
  each(images * chunks, threads, [&](int64_t t) {
    const int64_t at = t % chunks * kChunk;
    found[static_cast<size_t>(t)] =
        kernel.extremes(value_of(p.x, p.type, (first + t / chunks) * count + at), p.type, std::min(kChunk, count - at));
  });
  std::vector<Extremes> result(static_cast<size_t>(images), Extremes{0, 0, true});
  for (size_t t = 0; t < found.size(); ++t) {
    Extremes& all = result[t / static_cast<size_t>(chunks)];
    all = {std::min(all.low, found[t].low), std::max(all.high, found[t].high), all.finite && found[t].finite};
  }
  return result;
}

// Each image's own.
void find_ranges(const Convolution& p, const Kernel& kernel, int amax, int64_t first, int64_t images, int threads,
                 Ranges& ranges) {
  const std::vector<Extremes> extremes = extremes_of(p, kernel, first, images, threads);
  for (size_t i = 0; i < extremes.size(); ++i) ranges.of[static_cast<size_t>(first) + i] = range_of(extremes[i], amax);
}

// Bytes of an image that the positions of y reach, its zeros around it included.
struct Reach {
  int64_t height, width;
};
Reach reach_of(const Convolution& p, const Header& header) {
  return {(p.out_h - 1) * p.stride_h + (header.kernel_h - 1) * p.dilation_h + 1,
          (p.out_w - 1) * p.stride_w + (header.kernel_w - 1) * p.dilation_w + 1};
}

// Whether the rows and columns of an image that lie beyond the reach of y are finite: nobody else looks there.
bool finite_beyond(const Convolution& p, const Reach& reach, const Kernel& kernel, int64_t image) {
  const int64_t rows = std::clamp<int64_t>(reach.height - p.pad_top, 0, p.height);
  const int64_t columns = std::clamp<int64_t>(reach.width - p.pad_left, 0, p.width);
  const int64_t planes = p.channels_last ? 1 : p.channels, step = p.channels_last ? p.channels : 1;
  const auto finite = [&](int64_t at, int64_t count) {
    return count == 0 || kernel.extremes(value_of(p.x, p.type, at * step), p.type, count * step).finite;
  };
  for (int64_t plane = image * planes; plane < (image + 1) * planes; ++plane) {
    const int64_t begin = plane * p.height * p.width;
    for (int64_t y = 0; y < rows; ++y)
      if (!finite(begin + y * p.width + columns, p.width - columns)) return false;
    if (!finite(begin + rows * p.width, (p.height - rows) * p.width)) return false;
  }
  return true;
}

// Those of a static weight, of which nobody looks for the ends of an image. Else they are to be found.
Ranges ranges_of(const Convolution& p, const Header& header, const Kernel& kernel, int threads) {
  const int8::Range fixed = fixed_range(header);
  Ranges ranges = fixed.or_null() == nullptr ? Ranges(p.images)
                                             : Ranges(p.images, {fixed.scale, 1.0f / fixed.scale, fixed.zero_point});
  const Reach reach = reach_of(p, header);
  if (p.type == Type::uint8 || fixed.or_null() == nullptr) return ranges;
  const bool all_met = reach.height >= p.pad_top + p.height && reach.width >= p.pad_left + p.width;
  if (all_met) return ranges;
  each(p.images, threads, [&](int64_t i) {
    if (!finite_beyond(p, reach, kernel, i)) ranges.broken[static_cast<size_t>(i)] = true;
  });
  return ranges;
}

// --- depthwise ----------------------------------------------------------------------------------------------------

// A broken image, as it is where its range is not finite.
void fill_broken(const Convolution& p, int64_t image) {
  const int64_t count = p.n * p.out_h * p.out_w;
  for (int64_t i = image * count; i < (image + 1) * count; ++i)
    if (p.y_type == Type::uint8)
      static_cast<uint8_t*>(p.y)[i] = 0;
    else if (p.y_type == Type::int32)
      static_cast<int32_t*>(p.y)[i] = 0;
    else
      put_float(p.y, p.y_type, i, NAN);
}

void convolve_alone(const Convolution& p, const Header& header, const Kernel& kernel, int amax, Ranges& ranges,
                    int threads) {
  const int64_t all = divide_up(p.channels, kChannels);
  const int64_t own = p.channels_last ? kChannels * divide_up(all, divide_up(all, kTaskChannels / kChannels)) : 1;
  const int64_t blocks = divide_up(p.channels, own);
  int64_t rows = p.out_h;  // of y in a task: as many as its room has space for, and enough tasks for all threads
  while (rows > 1 && depthwise_room(p, header.kernel_h, header.kernel_w, rows) > kRoomFloats) rows = divide_up(rows, 2);
  while (rows > 4 && p.images * blocks * divide_up(p.out_h, rows) < kTasksPerThread * threads)
    rows = divide_up(rows, 2);
  const int64_t bands = divide_up(p.out_h, rows);
  const size_t room = static_cast<size_t>(depthwise_room(p, header.kernel_h, header.kernel_w, rows)) * sizeof(float);
  each(p.images * blocks * bands, threads, [&](int64_t t) {
    const int64_t image = t / (blocks * bands), channel = t / bands % blocks * own, row = t % bands * rows;
    const bool finite = kernel.depthwise(
        {&p, header.kernel_h, header.kernel_w, amax, ranges.of[static_cast<size_t>(image)], image, channel,
         std::min(own, p.channels - channel), row, std::min(rows, p.out_h - row),
         reinterpret_cast<const int8_t*>(p.packed + header.parts), reinterpret_cast<float*>(scratch.reserve(room))});
    if (!finite) ranges.broken[static_cast<size_t>(image)] = true;
  });
  for (int64_t i = 0; i < p.images; ++i)
    if (ranges.settle(i)) fill_broken(p, i);
}

// --- by the int8 product ------------------------------------------------------------------------------------------

// The images as bytes, with the channels last and their zeros around them.
struct Bytes {
  int64_t height, width, channels;
  const uint8_t* data;
  int64_t size() const { return height * width * channels; }
};

// Rows [row, row + rows) of an image with its zeros; whether all are finite.
bool quantize_rows(const Convolution& p, const Kernel& kernel, int amax, const Range& range, int64_t image, int64_t row,
                   int64_t rows, const Bytes& bytes, uint8_t* to) {
  const auto zero = static_cast<uint8_t>(range.zero_point);
  const int64_t line = bytes.width * bytes.channels, before = std::min(p.pad_left, bytes.width);
  const int64_t left = before * p.channels, inside = std::min(p.width, bytes.width - before);
  bool finite = true;
  for (int64_t i = row; i < row + rows; ++i) {
    uint8_t* out = to + i * line;
    const int64_t y = i - p.pad_top;
    if (y < 0 || y >= p.height) {
      std::memset(out, zero, static_cast<size_t>(line));
      continue;
    }
    std::memset(out, zero, static_cast<size_t>(left));
    std::memset(out + left + inside * p.channels, zero, static_cast<size_t>(line - left - inside * p.channels));
    if (p.type == Type::uint8)
      std::memcpy(out + left, value_of(p.x, p.type, (image * p.height + y) * p.width * p.channels),
                  static_cast<size_t>(inside * p.channels));
    else if (p.channels_last)
      finite &= kernel.quantize(value_of(p.x, p.type, (image * p.height + y) * p.width * p.channels), p.type,
                                p.channels, inside, 1, p.channels, range, amax, out + left, p.channels);
    else
      finite &= kernel.quantize(value_of(p.x, p.type, (image * p.channels * p.height + y) * p.width), p.type,
                                p.channels, inside, p.height * p.width, 1, range, amax, out + left, p.channels);
  }
  return finite;
}

// Copies in steps of 16 bytes: up to 15 behind the end are written, and read.
inline void copy(const uint8_t* from, int64_t count, uint8_t* to) {
  for (int64_t i = 0; i < count; i += 16) std::memcpy(to + i, from + i, 16);
}

constexpr int64_t kStep = 64;  // positions of k that tiles take at once

// Whether the rows of the kernel are multiplied where they lie in the image, none of them copied: pixel by pixel, so
// the kernel takes no wider steps; and in pieces of k of which tiles read no byte too many.
bool slides(const Convolution& p, const Header& header, const int8::Header& part, const Bytes& bytes) {
  return header.groups == 1 && header.kernel_h * header.kernel_w > 1 && p.stride_h == 1 && p.stride_w == 1 &&
         p.dilation_w == 1 && part.layout == int8::Layout::dot4 && header.kernel_w * bytes.channels % kStep == 0;
}

// Whether a row of the kernel is at most one step of a tile, as in first layers: it is multiplied where it lies, too,
// with the bytes behind it, which meet zeros. That takes more products than rows copied together, and no copies.
bool narrow(const Convolution& p, const Header& header, const int8::Kernel& product, const Bytes& bytes) {
  return product.strip != nullptr && header.groups == 1 && header.kernel_h * header.kernel_w > 1 && p.dilation_w == 1 &&
         header.kernel_w * bytes.channels < kStep && p.out_w >= kTaskRows / 2;
}

// One thread's share: rows of a group, a position each, times panels of its weights.
class Worker {
 public:
  Worker(const Convolution& p, const Header& header, const Kernel& kernel, const int8::Header& part,
         const int8::Kernel& product, const Bytes& bytes, const Range* ranges, int64_t first_image, int64_t max_rows,
         int64_t max_panels, std::atomic<bool>& finite)
      : p_(p),
        header_(header),
        kernel_(kernel),
        part_(part),
        product_(product),
        bytes_(bytes),
        ranges_(ranges),
        first_image_(first_image),
        finite_(finite),
        shape_{part.k, part.versions},
        in_place_(is_in_place()),
        slides_(slides(p, header, part, bytes)),
        narrow_(!slides_ && narrow(p, header, product, bytes)),
        stride_(in_place_ ? bytes.channels : round_up<int64_t>(shape_.stride(), kStep)) {
    const size_t rows = static_cast<size_t>(max_rows), nr = static_cast<size_t>(product.nr);
    const size_t tile = 2 * static_cast<size_t>(product.mr) * 2 * nr;
    const size_t sums =
        product.strip != nullptr ? tile : rows * nr * static_cast<size_t>(shape_.blocks() > 1 ? max_panels : 1);
    const size_t turned = product.strip != nullptr ? tile : rows * nr;
    const size_t copied = in_place_ || slides_ || narrow_ ? 0 : (static_cast<size_t>(stride_) * rows + 63) / 64 * 64;
    const size_t line = (static_cast<size_t>(shape_.stride()) + 127) / 64 * 64;
    const size_t spread = narrow_ ? static_cast<size_t>(divide_up(part.n, product.nr) * spread_size()) : 0;
    uint8_t* room = scratch.reserve(copied + line + (sums + turned + 2 * rows) * 4 + spread);
    copied_ = room;
    line_ = room + copied;
    spread_ = line_ + line;
    sums_ = reinterpret_cast<int32_t*>(spread_ + spread);
    turned_ = sums_ + sums;
    scale_ = reinterpret_cast<float*>(turned_ + turned);
    zero_point_ = reinterpret_cast<int32_t*>(scale_ + rows);
    if (narrow_) spread_weights();
    if (product.begin != nullptr) product.begin();
  }
  ~Worker() {
    if (product_.end != nullptr) product_.end();
  }
  Worker(const Worker&) = delete;
  Worker& operator=(const Worker&) = delete;

  // Rows are positions of y from `row` on, those of all images in a line; or, where they slide, the pixels of one image
  // that a position begins at, those at the end of a line among them, which are none of y. A group's channels are `own`
  // bytes from `channel` on.
  void load(int64_t image, int64_t row, int rows, int64_t channel, int64_t own) {
    if (image == image_ && row == row_) return;
    image_ = image;
    row_ = row;
    rows_ = rows;
    const int64_t positions = p_.out_h * p_.out_w;
    for (int i = 0, end; i < rows; i = end) {  // the rows of one image at a time
      end = slides_ ? rows : static_cast<int>(std::min<int64_t>(rows, i + positions - (row + i) % positions));
      const Range& range = ranges_[slides_ ? image : (row + i) / positions];
      std::fill(scale_ + i, scale_ + end, range.scale);
      std::fill(zero_point_ + i, zero_point_ + end, range.zero_point);
    }
    data_ = bytes_.data + image * bytes_.size() + row * bytes_.channels;
    if (in_place_ || slides_ || narrow_) return;
    data_ = copied_;
    for (int i = 0; i < rows;) {  // those of one line of an image at a time
      const int64_t at = row + i, position = at % positions, y = position / p_.out_w, x = position % p_.out_w;
      const uint8_t* from = bytes_.data + at / positions * bytes_.size() + channel +
                            (y * p_.stride_h * bytes_.width + x * p_.stride_w) * bytes_.channels;
      const int end = static_cast<int>(std::min<int64_t>(rows, i + p_.out_w - x));
      for (; i < end; ++i, from += p_.stride_w * bytes_.channels) {
        uint8_t* to = shape_.versions == 1 ? copied_ + i * stride_ : line_;
        unfold(from, own, to);
        if (shape_.versions != 1) kernel_.reorder(line_, shape_, copied_ + i * stride_);
      }
    }
  }

  // All of some images, one after the other under two panels at a time, which come from afar once.
  void multiply_images(int64_t image, int64_t images, int rows, int64_t first, int64_t end, int64_t first_channel) {
    for (int64_t panel = first; panel < end; panel += 2)
      for (int64_t i = image; i < image + images; ++i) {
        load(i, 0, rows, 0, bytes_.channels);
        multiply_strips(panel, std::min(end, panel + 2), first_channel);
      }
  }

  // Two panels over all rows, whose sums are finished as they come.
  void multiply_strips(int64_t first, int64_t end, int64_t first_channel) {
    for (int64_t panel = first; panel < end; panel += 2)
      if (!narrow_)
        multiply_strip(panel, end, first_channel, 0, rows_);
      else
        for (int i = 0, next; i < rows_; i = next) {  // a line of y at a time
          next = static_cast<int>(std::min<int64_t>(rows_, i + p_.out_w - (row_ + i) % p_.out_w));
          multiply_strip(panel, end, first_channel, i, next - i);
        }
  }

  // As int8/gemm.cpp: block by block of k, so that a panel's share stays in the L1 while the rows pass over it.
  void multiply(int64_t first, int64_t end, int64_t first_channel) {
    if (product_.strip != nullptr) return multiply_strips(first, end, first_channel);
    const int last = shape_.blocks() - 1;
    for (int block = 0; block <= last; ++block)
      for (int64_t panel = first; panel < end; ++panel) {
        int32_t* sums = last == 0 ? sums_ : sums_ + (panel - first) * rows_ * product_.nr;
        if (block == last && p_.addend != nullptr && !slides_) prefetch_addend(first_channel + panel * product_.nr);
        if (slides_)
          slide_over_block(panel, block, sums);
        else
          add_block(panel, block, sums);
        if (block == last) finish(panel, sums, first_channel, 0, rows_);
      }
  }

 private:
  bool is_in_place() const {
    return header_.kernel_h == 1 && header_.kernel_w == 1 && header_.groups == 1 && p_.stride_h == 1 &&
           p_.stride_w == 1 && bytes_.height == p_.out_h && bytes_.width == p_.out_w && part_.versions == 1;
  }

  void unfold(const uint8_t* from, int64_t own, uint8_t* to) const {
    const int64_t line = bytes_.width * bytes_.channels;
    const bool whole = p_.dilation_w == 1 && own == bytes_.channels;  // a row of the kernel lies in one piece
    const int64_t count = whole ? header_.kernel_w * own : own, pieces = whole ? 1 : header_.kernel_w;
    for (int r = 0; r < header_.kernel_h; ++r, from += p_.dilation_h * line)
      for (int64_t s = 0; s < pieces; ++s, to += count) copy(from + s * p_.dilation_w * bytes_.channels, count, to);
  }

  void multiply_strip(int64_t panel, int64_t end, int64_t first_channel, int first, int rows) const {
    struct Context {
      const Worker* worker;
      int64_t panel, first_channel;
      int first;
    } context{this, panel, first_channel, first};
    const int last = shape_.blocks() - 1;
    int8::Strip strip{};
    strip.a = data_ + first * stride_, strip.lda = stride_, strip.pieces = 1;
    strip.length = static_cast<int>(shape_.offset(last)) + shape_.length(last);
    if (slides_ || narrow_) {
      const int64_t position = row_ + first, y = position / p_.out_w, image = y / p_.out_h;
      strip.lda = p_.stride_w * bytes_.channels;
      strip.distance = p_.dilation_h * bytes_.width * bytes_.channels;
      strip.pieces = header_.kernel_h;
      strip.length = static_cast<int>(narrow_ ? kStep : header_.kernel_w * bytes_.channels);
      strip.a = slides_ ? data_
                        : bytes_.data + image * bytes_.size() +
                              (y % p_.out_h * p_.stride_h * bytes_.width + position % p_.out_w * p_.stride_w) *
                                  bytes_.channels;
    }
    strip.rows = rows;
    for (int64_t i = 0; i < std::min<int64_t>(2, end - panel); ++i)
      strip.panels[i] = narrow_ ? spread_ + (panel + i) * spread_size() : weights_of(panel + i, 0);
    strip.sums = sums_;
    strip.slice = p_.y_channels_last ? kSlice : product_.mr;  // of those of one channel as many as can be side by side
    strip.context = &context;
    strip.finished = [](const void* given, const int32_t* sums, int row, int count) {
      const auto& of = *static_cast<const Context*>(given);
      of.worker->finish(of.panel, sums, of.first_channel, of.first + row, count);
    };
    product_.strip(strip);
  }

  int64_t spread_size() const { return header_.kernel_h * kStep * product_.nr; }

  // The weights of a narrow kernel, zeros behind each of its rows.
  void spread_weights() const {
    const int64_t nr = product_.nr, panels = divide_up(part_.n, nr), own = header_.kernel_w * bytes_.channels;
    std::memset(spread_, 0, static_cast<size_t>(panels * spread_size()));
    for (int64_t panel = 0; panel < panels; ++panel)
      for (int64_t k = 0; k < part_.k; ++k) {
        const int64_t to = k / own * kStep + k % own;
        const uint8_t* from = weights_of(panel, 0) + k / 4 * nr * 4 + k % 4;
        uint8_t* at = spread_ + panel * spread_size() + to / 4 * nr * 4 + to % 4;
        for (int64_t c = 0; c < nr; ++c) at[4 * c] = from[4 * c];
      }
  }

  // Its rows lie far from each other, so that nothing else would fetch them before the product is done.
  void prefetch_addend(int64_t n) const {
    constexpr int64_t kLine = 64 / sizeof(float);
    const float* row = p_.addend + (first_image_ * p_.out_h * p_.out_w + row_) * p_.n + n;
    const int64_t columns = std::min<int64_t>(product_.nr, p_.n - n);
    for (int i = 0; i < rows_; ++i, row += p_.n)
      for (int64_t c = 0; c < columns; c += kLine) __builtin_prefetch(row + c);
  }

  const uint8_t* weights_of(int64_t panel, int block) const {
    const uint8_t* base = reinterpret_cast<const uint8_t*>(&part_);
    return base + (reinterpret_cast<const uint64_t*>(base + part_.blocks) + panel * shape_.blocks())[block];
  }

  void add_block(int64_t panel, int block, int32_t* sums) const {
    const uint8_t* a = data_ + shape_.offset(block);
    for (int i = 0; i < rows_; i += product_.mr)
      product_.tile(a + i * stride_, stride_, std::min(product_.mr, rows_ - i), weights_of(panel, block),
                    shape_.length(block), sums + i * product_.nr, block > 0);
  }

  // A row of the kernel after the other, of which the block has a part: each lies in the image as it is.
  void slide_over_block(int64_t panel, int block, int32_t* sums) const {
    const int64_t begin = int64_t{block} * int8::kBlockK, end = std::min<int64_t>(begin + int8::kBlockK, shape_.k);
    const int64_t piece = header_.kernel_w * bytes_.channels, line = bytes_.width * bytes_.channels;
    const uint8_t* weights = weights_of(panel, block);
    for (int i = 0; i < rows_; i += product_.mr)
      for (int64_t k = begin, next; k < end; k = next) {
        const int64_t row = k / piece;
        next = std::min(end, (row + 1) * piece);
        product_.tile(data_ + i * bytes_.channels + row * p_.dilation_h * line + k % piece, bytes_.channels,
                      std::min(product_.mr, rows_ - i), weights + (k - begin) * product_.nr, static_cast<int>(next - k),
                      sums + i * product_.nr, k > 0);
      }
  }

  // Of the rows that were loaded, `count` from `first` on, whose sums these are.
  void finish(int64_t panel, const int32_t* sums, int64_t first_channel, int first, int count) const {
    const int64_t positions = p_.out_h * p_.out_w;
    if (!slides_) return finish_rows(panel, sums, first_channel, first, count, first_image_ * positions + row_ + first);
    const int64_t begin = row_ + first;
    for (int64_t i = begin; i < begin + count;) {  // what of each line is a position
      const int64_t y = i / bytes_.width, x = i % bytes_.width,
                    end = std::min(y * bytes_.width + p_.out_w, begin + count);
      if (i < end)
        finish_rows(panel, sums + (i - begin) * width(), first_channel, static_cast<int>(i - row_),
                    static_cast<int>(end - i), (first_image_ + image_) * positions + y * p_.out_w + x);
      i = (y + 1) * bytes_.width;
    }
  }

  // Channels that are finished at once.
  int width() const { return product_.strip != nullptr ? 2 * product_.nr : product_.nr; }

  // `rows` from `first` on, which are the positions from `at` on of all images.
  void finish_rows(int64_t panel, const int32_t* sums, int64_t first_channel, int first, int rows, int64_t at) const {
    const int nr = width();
    const int64_t inside = panel * product_.nr, n = first_channel + inside, positions = p_.out_h * p_.out_w;
    const int columns = static_cast<int>(std::min<int64_t>(nr, part_.n - inside));
    const auto* column_sums =
        reinterpret_cast<const int32_t*>(reinterpret_cast<const uint8_t*>(&part_) + part_.column_sums);
    bool finite = true;
    const int8::Epilogue epilogue{column_sums + inside,
                                  p_.weight_scale == nullptr ? nullptr : p_.weight_scale + n,
                                  p_.bias == nullptr ? nullptr : p_.bias + n,
                                  0,
                                  scale_ + first,
                                  zero_point_ + first,
                                  p_.activation,
                                  p_.y_type,
                                  p_.to,
                                  p_.addend == nullptr ? nullptr : p_.addend + at * p_.n + n,
                                  p_.beside == nullptr ? nullptr : p_.beside + at * p_.n + n,
                                  &finite};
    if (p_.y_channels_last) {
      product_.finish(sums, nr, rows, columns, epilogue, value_of(p_.y, p_.y_type, at * p_.n + n), p_.n);
      if (!finite) finite_ = false;
      return;
    }
    product_.finish(sums, nr, rows, columns, epilogue, turned_, nr);
    const size_t size = size_of(p_.y_type);
    for (int i = 0; i < rows;) {  // the rows of one image at a time
      const int64_t image = (at + i) / positions, position = (at + i) % positions;
      const int count = static_cast<int>(std::min<int64_t>(rows - i, positions - position));
      kernel_.transpose(value_of(turned_, p_.y_type, i * nr), nr, count, columns, size,
                        value_of(p_.y, p_.y_type, (image * p_.n + n) * positions + position), positions);
      i += count;
    }
  }

  const Convolution& p_;
  const Header& header_;
  const Kernel& kernel_;
  const int8::Header& part_;
  const int8::Kernel& product_;
  const Bytes& bytes_;
  const Range* ranges_;
  const int64_t first_image_;
  std::atomic<bool>& finite_;  // all y of which bytes were made here
  const int8::ActivationShape shape_;
  const bool in_place_, slides_, narrow_;
  const int64_t stride_;
  uint8_t *copied_, *line_, *spread_;
  const uint8_t* data_ = nullptr;
  int32_t *sums_, *turned_, *zero_point_;
  float* scale_;
  int64_t image_ = -1, row_ = -1;
  int rows_ = 0;
};

const int8::Kernel& product_for(const int8::Header& part) {
  const int8::Kernel* found = int8::kernels().first(
      [&](const int8::Kernel& kernel) { return kernel.layout == part.layout && kernel.nr == part.nr; });
  check(found != nullptr,
        "packed int8 convolution: it was packed for an instruction set that this processor lacks or PYCOMPRESS_ISA "
        "excludes, or for another kernel than the one that is forced; pack the canonical weight again here");
  return *found;
}

// Rows of a task, so that they stay in the L2 while the weights pass over them: with few, these come from afar again.
// Floats of y, of which 256 bytes are written in each row, went faster with few (benchmarks/NOTES.md).
int64_t strip_rows(const Convolution& p, bool sliding, const Bytes& bytes, const int8::Header& part) {
  if (p.y_type != Type::uint8) return kTaskRows;
  return std::clamp<int64_t>(kStripBytes / (sliding ? bytes.channels : part.k), kTaskRows, kStripRows);
}

// Images [first, first + images), which are quantized into `bytes`, by one group of channels after the other.
void convolve(const Convolution& p, const Header& header, const Kernel& kernel, const Bytes& bytes, const Range* ranges,
              int64_t first, int64_t images, int threads, std::atomic<bool>& finite) {
  const int64_t own = header.channels / header.groups, out = header.n / header.groups;
  const Part front = part_of(p.packed, header, 0);
  const int8::Kernel& product = product_for(int8::header_of(front.packed, front.bytes));
  const int8::Header& part = *reinterpret_cast<const int8::Header*>(front.packed);
  const bool sliding = slides(p, header, part, bytes);
  // Rows of a chunk: of all images together, or of each.
  int64_t chunks = sliding ? images : 1, chunk_images = 1;
  const int64_t m = sliding ? (p.out_h - 1) * bytes.width + p.out_w : images * p.out_h * p.out_w;
  const int64_t panels = divide_up(out, product.nr);
  const bool strips = product.strip != nullptr;
  const int64_t most = strips ? strip_rows(p, sliding, bytes, part) : kTaskRows;
  int64_t rows = std::clamp<int64_t>(divide_up(chunks * m, kTasksPerThread * threads), kFewRows, most);
  int64_t panel_tasks = 1;
  if (chunks * m < threads * kFewRows && threads > 1)
    panel_tasks = std::min<int64_t>(panels, kTasksPerThread * threads);
  rows = round_up<int64_t>(divide_up(m, divide_up(m, rows)), product.mr);
  if (!sliding && narrow(p, header, product, bytes)) rows = round_up(rows, p.out_w);
  const int64_t row_tasks = divide_up(m, rows);
  if (strips && sliding && row_tasks == 1) {
    chunk_images = std::clamp<int64_t>(divide_up(images, threads), 1, std::max<int64_t>(1, 2 * kStripRows / m));
    chunks = divide_up(images, chunk_images);
  }
  if (threads > 1 && chunks * row_tasks * header.groups < threads)
    panel_tasks = std::min<int64_t>(panels, kTasksPerThread * threads);
  const int64_t task_panels = round_up<int64_t>(divide_up(panels, panel_tasks), strips ? 2 : 1);
  panel_tasks = divide_up(panels, task_panels);
  const int64_t group_tasks = chunks * row_tasks * panel_tasks;
  std::atomic<int64_t> next{0};
  const int team = static_cast<int>(std::min<int64_t>(threads, group_tasks * header.groups));
  parallel(team, [&](int, int) {
    int64_t t = next++;
    while (t < group_tasks * header.groups) {
      const int64_t group = t / group_tasks;
      const Part packed = part_of(p.packed, header, group);
      Worker worker(p, header, kernel, *reinterpret_cast<const int8::Header*>(packed.packed), product, bytes, ranges,
                    first, std::min(rows, m), task_panels, finite);
      for (; t < (group + 1) * group_tasks; t = next++) {
        const int64_t inside = t % group_tasks, task = inside / panel_tasks, row = task % row_tasks * rows,
                      panel = inside % panel_tasks * task_panels;
        const int64_t chunk = task / row_tasks * chunk_images, end = std::min(panels, panel + task_panels);
        const int count = static_cast<int>(std::min(rows, m - row));
        if (chunk_images > 1) {
          worker.multiply_images(chunk, std::min(chunk_images, images - chunk), count, panel, end, group * out);
          continue;
        }
        worker.load(chunk, row, count, group * own, own);
        worker.multiply(panel, end, group * out);
      }
    }
  });
}

// As many images at once as stay in the cache: quantized, then multiplied.
// Returns whether all y of which bytes were made beside floats, or behind an addend, are finite.
bool convolve_all(const Convolution& p, const Header& header, const Kernel& kernel, int amax, Ranges& ranges,
                  int threads) {
  std::atomic<bool> finite{true};
  const Reach reach = reach_of(p, header);
  const bool bare = p.pad_top == 0 && p.pad_left == 0 && reach.height <= p.height && reach.width <= p.width;
  if (p.type == Type::uint8 && bare && p.behind >= kBehind) {  // they lie there
    const Bytes bytes{p.height, p.width, p.channels, static_cast<const uint8_t*>(p.x)};
    convolve(p, header, kernel, bytes, ranges.of.data(), 0, p.images, threads, finite);
    return finite;
  }
  Bytes bytes{reach.height, reach.width, p.channels, nullptr};
  const int64_t together = std::clamp<int64_t>(kTogether / bytes.size(), 1, p.images);
  uint8_t* room = images_room.reserve(static_cast<size_t>(together * bytes.size() + kBehind));
  bytes.data = room;
  const int64_t band = std::max<int64_t>(1, kChunk / (bytes.width * bytes.channels)),
                bands = divide_up(bytes.height, band);
  const bool own = fixed_range(header).or_null() == nullptr;  // a range of its own for each image
  const int64_t image_bytes = p.channels * p.height * p.width * static_cast<int64_t>(size_of(p.type));
  const int64_t both = std::max<int64_t>(1, kBoth / image_bytes);
  for (int64_t first = 0; first < p.images; first += together) {
    const int64_t images = std::min(together, p.images - first);
    for (int64_t begin = 0, count; begin < images; begin += count) {
      count = own ? std::min(both, images - begin) : images;
      if (own) find_ranges(p, kernel, amax, first + begin, count, threads, ranges);
      each(count * bands, threads, [&](int64_t t) {
        const int64_t i = begin + t / bands, row = t % bands * band;
        const auto image = static_cast<size_t>(first + i);
        if (!quantize_rows(p, kernel, amax, ranges.of[image], first + i, row, std::min(band, bytes.height - row), bytes,
                           room + i * bytes.size()))
          ranges.broken[image] = true;
      });
    }
    for (int64_t i = 0; i < images; ++i)
      if (ranges.settle(first + i))
        std::memset(room + i * bytes.size(), ranges.of[static_cast<size_t>(first + i)].zero_point,
                    static_cast<size_t>(bytes.size()));
    convolve(p, header, kernel, bytes, ranges.of.data() + first, first, images, threads, finite);
  }
  return finite;
}

}  // namespace

int64_t depthwise_room(const Convolution& problem, int kernel_h, int kernel_w, int64_t rows) {
  const Phases phases(problem, kernel_h, kernel_w, rows);
  return phases.floats() + static_cast<int64_t>(kernel_h) * kernel_w * (2 + phases.lanes);  // and the taps
}

Kernels<Kernel>& kernels() {
  static constexpr const Kernel* best_first[] = {
#if defined(PYCOMPRESS_X86)
      &kAvx512, &kAvx2,
#endif
      &kScalar};
  static Kernels<Kernel> all{"int8_conv2d", best_first};
  return all;
}

// With an activation that only cuts off, in bytes: the bounds do it, since rounding keeps the order.
Convolution with_bounds(const Convolution& given) {
  Convolution p = given;
  if (p.y_type != Type::uint8) return p;
  if (p.activation == Activation::relu || p.activation == Activation::relu6) {
    p.to.low = std::max(p.to.low, 0.0f);
    if (p.activation == Activation::relu6) p.to.high = std::min(p.to.high, 6 * p.to.inverse);
    p.activation = Activation::none;
  }
  return p;
}

bool conv2d(const Convolution& given) {
  const Convolution p = with_bounds(given);
  const Header& header = header_of(p.packed, p.packed_bytes);
  check(p.channels == header.channels && p.n == header.n, "int8_conv2d: x has ", p.channels, " channels and y ", p.n,
        ", the packed weight expects ", header.channels, " and ", header.n);
  check(p.type != Type::uint8 || (p.channels_last && fixed_range(header).or_null() != nullptr),
        "int8_conv2d: x is bytes, expected a static weight and the channels last");
  check(p.y_type != Type::uint8 || (p.y_channels_last && p.to.inverse > 0),
        "int8_conv2d: y is bytes, expected their range and the channels last");
  const bool as_lies = p.y_channels_last && (p.y_type == Type::float32 || (p.y_type == Type::uint8 && !p.beside));
  check((p.addend == nullptr && p.beside == nullptr) ||
            (as_lies && !header.depthwise() && (p.beside == nullptr || p.to.inverse > 0)),
        "int8_conv2d: there is an addend, or bytes beside y; expected y of float32 with the channels last, or bytes "
        "behind an addend, a range for bytes, and more than one channel in a group");
  check(!header.depthwise() || p.y_channels_last == p.channels_last,
        "int8_conv2d: expected x and y of a depthwise convolution in one memory format");
  if (p.images == 0 || p.out_h == 0 || p.out_w == 0) return true;
  const Kernel& kernel = kernels().first();
  const int amax = (1 << header.activation_bits) - 1;
  int threads = usable_threads(p.threads);
  const double operations =
      2.0 * static_cast<double>(p.images * p.out_h * p.out_w) * static_cast<double>(p.n * header.k());
  if (operations < kSerialOperations) threads = 1;
  Ranges ranges = ranges_of(p, header, kernel, threads);
  if (header.depthwise() && fixed_range(header).or_null() == nullptr)
    find_ranges(p, kernel, amax, 0, p.images, threads, ranges);
  bool finite = true;
  if (header.depthwise())
    convolve_alone(p, header, kernel, amax, ranges, threads);
  else
    finite = convolve_all(p, header, kernel, amax, ranges, threads);
  for (int64_t i = 0; i < p.images; ++i) {
    finite = finite && !std::isnan(ranges.of[static_cast<size_t>(i)].scale);
    if (p.scale != nullptr) p.scale[i] = ranges.of[static_cast<size_t>(i)].scale;
    if (p.zero_point != nullptr) p.zero_point[i] = ranges.of[static_cast<size_t>(i)].zero_point;
  }
  return finite;
}

}  // namespace pycompress::conv
