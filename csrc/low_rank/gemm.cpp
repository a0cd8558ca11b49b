// The driver: some rows at a time go through both products, and the second is made where the residual's op needs it.
#include "gemm.h"

#include <algorithm>
#include <atomic>

#include "../common/check.h"
#include "../common/kernels.h"
#include "../common/parallel.h"
#include "../common/prefetch.h"
#include "../common/round.h"
#include "../common/scratch.h"
#include "../int4/gemm.h"
#include "../int8/pack.h"
#include "../sparse/gemm.h"
#include "../sparse/pack.h"
#include "pack.h"

namespace pycompress::low_rank {
namespace {

// Positions at a time; up to here a panel, 32 KiB, passes all rows of a task at once.
constexpr int64_t kBlockK = 512;
// Panels that stay in the L1 beside a tile's rows, where they are short.
constexpr int64_t kGroupBytes = 16 * 1024, kMaxGroup = 8;
constexpr int kStepRows = 18;  // rows of y that are fetched while they are computed
constexpr int kMinTaskRows = 16, kMaxTaskRows = 64, kTasksPerThread = 4;
constexpr int64_t kRowUnit = 4;  // tasks have a multiple of it: the int8 tiles are four rows high
// Factors that leave the L2 between two tasks: then a task should have many rows.
constexpr uint64_t kStreamBytes = 1024 * 1024;
constexpr int kCopyRank = 64;  // from here on a copy of x into rows that do not collide pays
// Below this many operations a parallel region (1 to 2 us) costs more than the second thread brings.
constexpr double kSerialOperations = 1e5;

thread_local Scratch scratch;

const uint8_t* part_of(const uint8_t* packed, const Part& part) {
  return part.bytes == 0 ? nullptr : packed + part.offset;
}

// The parts of a packed weight, where they lie.
struct Factors {
  Factors(const uint8_t* packed, const Header& h)
      : header(h),
        down(part_of(packed, h.down)),
        up(part_of(packed, h.up)),
        residual(part_of(packed, h.residual)),
        down_scale(reinterpret_cast<const float*>(part_of(packed, h.down_scale))),
        up_scale(reinterpret_cast<const float*>(part_of(packed, h.up_scale))),
        residual_scale(reinterpret_cast<const float*>(part_of(packed, h.residual_scale))) {}

  bool is_float() const { return header.bits == 32; }
  // The residual's own op asks for what the factors give.
  bool is_joined() const { return header.residual_kind != Residual::none && header.residual_kind != Residual::dense; }

  // Tasks have a multiple of so many rows: the int8 tiles are four rows high. Tiles of a float32 sparse residual must
  // begin at the same rows on any number of threads, because one of a single row adds up in another order.
  int64_t row_unit() const {
    if (header.residual_kind != Residual::sparse) return kRowUnit;
    const sparse::Header& own = sparse::header_of(residual, static_cast<int64_t>(header.residual.bytes));
    return sparse::is_float(own.format) ? own.width : kRowUnit;
  }

  const Header& header;
  const uint8_t *down, *up, *residual;
  const float *down_scale, *up_scale, *residual_scale;
};

// Some rows of a call, on so many threads: x -> t -> y. The buffers are the calling thread's.
class Rows {
 public:
  Rows(const Problem& problem, const Factors& factors, const dense::Kernel& kernel, int64_t max_rows, int threads)
      : p_(problem), f_(factors), h_(factors.header), kernel_(kernel), threads_(threads) {
    const size_t rows = static_cast<size_t>(max_rows);
    ldt_ = f_.is_float() ? round_up<int64_t>(h_.rank, kPanel) : h_.rank;
    const bool reads_floats = f_.is_float() || h_.residual_kind == Residual::dense;
    // Rows a multiple of 4 KiB apart fall into the same sets of the L1.
    const bool collides = p_.ldx % 1024 == 0 && h_.rank >= kCopyRank && !is_few();
    const bool converts = reads_floats && (p_.x_type != Type::float32 || collides);
    ld_floats_ = converts ? round_up<int64_t>(h_.k, kPanel) + kPanel : p_.ldx;
    const bool stores_addend = !f_.is_float() && h_.residual_kind != Residual::none;
    if (!f_.is_float()) shape_ = {h_.k, int8::header_of(f_.down, static_cast<int64_t>(h_.down.bytes)).versions};
    const size_t t = round_up<size_t>(rows * static_cast<size_t>(ldt_), kPanel);
    const size_t x = converts ? rows * static_cast<size_t>(ld_floats_) : 0;
    const size_t addend = stores_addend ? round_up<size_t>(rows * static_cast<size_t>(h_.n), 16) : 0;
    const size_t bytes = f_.is_float() ? 0 : round_up<size_t>(rows * static_cast<size_t>(shape_.stride()), 64);
    t_ = reinterpret_cast<float*>(scratch.reserve((t + x + addend + 2 * rows) * 4 + bytes));
    x_room_ = converts ? t_ + t : nullptr;
    addend_ = t_ + t + x;
    bytes_ = reinterpret_cast<uint8_t*>(addend_ + addend);
    scale_ = reinterpret_cast<float*>(bytes_ + bytes);
    zero_point_ = reinterpret_cast<int32_t*>(scale_ + rows);
  }

  void run(int64_t row, int rows) {
    rows_ = rows;
    x_ = value_of(p_.x, p_.x_type, row * p_.ldx);
    y_ = value_of(p_.y, p_.y_type, row * p_.n);
    floats_ = static_cast<const float*>(x_);
    if (x_room_ != nullptr) {
      kernel_.load(x_, p_.x_type, p_.ldx, rows, h_.k, x_room_, ld_floats_);
      floats_ = x_room_;
    }
    if (f_.is_float())
      run_float();
    else
      run_int8();
    if (p_.intermediate != nullptr)
      for (int m = 0; m < rows; ++m) std::copy_n(t_ + m * ldt_, h_.rank, p_.intermediate + (row + m) * h_.rank);
  }

 private:
  bool is_few() const { return p_.m <= kFewRows; }

  // body(first, end) for all panels of a matrix [n, k], shared among the threads where they are worth it.
  template <class F>
  void for_panels(int64_t n, int64_t k, F&& body) const {
    const int64_t panels = divide_up(n, kPanel);
    if (threads_ == 1 || 4.0 * static_cast<double>(rows_ * n * k) < kSerialOperations) return body(int64_t{0}, panels);
    const int64_t tasks = std::min<int64_t>(panels, kTasksPerThread * threads_), step = divide_up(panels, tasks);
    std::atomic<int64_t> next{0};
    parallel(static_cast<int>(std::min<int64_t>(threads_, tasks)), [&](int, int) {
      for (int64_t first = step * next++; first < panels; first = step * next++)
        body(first, std::min(panels, first + step));
    });
  }

  // Positions of k in one block: as even as can be, up to kBlockK.
  int64_t block_of(int64_t k) const { return is_few() ? k : divide_up(k, divide_up(k, kBlockK)); }

  // How many panels of k positions stay in the L1 together.
  static int64_t group_of(int64_t k) { return std::clamp<int64_t>(kGroupBytes / (k * kPanel * 4), 1, kMaxGroup); }

  void multiply(const dense::Product& product) const { (is_few() ? kernel_.few : kernel_.many)(product); }

  // t = x down^T: blocks of k outside, so that the rows' share of one stays in the L2 while all panels pass, then as
  // many panels as stay in the L1 with it.
  void project() const {
    const auto* down = reinterpret_cast<const float*>(f_.down);
    const int64_t k = h_.k, length = block_of(k), group = group_of(length);
    for_panels(h_.rank, k, [&](int64_t first, int64_t end) {
      for (int64_t begin = 0; begin < k; begin += length)
        for (int64_t panel = first; panel < end; panel += group) {
          float* t = t_ + panel * kPanel;
          multiply({floats_ + begin, ld_floats_, rows_, down + (panel * k + begin) * kPanel, k * kPanel,
                    static_cast<int>(std::min(group, end - panel)), std::min(length, k - begin),
                    begin == 0 ? nullptr : t, ldt_, t, ldt_});
        }
    });
  }

  // The bias of some panels, padded, or null.
  const float* bias_of(int64_t panel, int count, float* room) const {
    if (p_.bias == nullptr) return nullptr;
    const int64_t n = panel * kPanel, columns = std::min<int64_t>(count * kPanel, p_.n - n);
    if (columns == count * kPanel) return p_.bias + n;
    std::fill(std::copy_n(p_.bias + n, columns, room), room + count * kPanel, 0.0f);
    return room;
  }

  // c[rows][count * kPanel] = bias + t up^T for some panels.
  void lift(int64_t panel, int count, int64_t row, int rows, float* c, ptrdiff_t ldc) const {
    float room[kMaxGroup * kPanel];
    const auto* up = reinterpret_cast<const float*>(f_.up) + panel * h_.rank * kPanel;
    const int64_t rank = h_.rank, length = block_of(rank);
    for (int64_t begin = 0; begin < rank; begin += length)
      multiply({t_ + row * ldt_ + begin, ldt_, rows, up + begin * kPanel, rank * kPanel, count,
                std::min(length, rank - begin), begin == 0 ? bias_of(panel, count, room) : c, begin == 0 ? 0 : ldc, c,
                ldc});
  }

  uint8_t* result(int64_t row, int64_t n) const { return value_of(y_, p_.y_type, row * p_.n + n); }

  void fetch(int64_t row, int rows, int64_t n, int columns) const {
    const int64_t y_size = static_cast<int64_t>(size_of(p_.y_type));
    prefetch_rows(result(row, n), rows, p_.n * y_size, columns * y_size);
  }

  // y = act(bias + t up^T), straight into y where nothing is left to do there. Some panels at a time, as many as stay
  // in the L1: then a row of y is written in longer pieces.
  void lift_all() const {
    const int64_t group = group_of(block_of(h_.rank));
    // Rows of y that are fetched while they are computed; all of them where a panel's blocks pass one after the other.
    const int step = block_of(h_.rank) == h_.rank ? kStepRows : kMaxTaskRows;
    for_panels(h_.n, h_.rank, [&](int64_t first, int64_t end) {
      for (int64_t panel = first; panel < end; panel += group) {
        const int count = static_cast<int>(std::min(group, end - panel));
        const int64_t n = panel * kPanel;
        const int columns = static_cast<int>(std::min<int64_t>(count * kPanel, h_.n - n));
        const bool direct =
            p_.y_type == Type::float32 && p_.activation == Activation::none && columns == count * kPanel;
        for (int row = 0; row < rows_; row += step) {
          const int rows = std::min(step, rows_ - row);
          fetch(row, rows, n, columns);
          if (direct) {
            lift(panel, count, row, rows, reinterpret_cast<float*>(result(row, n)), p_.n);
            continue;
          }
          alignas(64) float sums[kMaxTaskRows * kMaxGroup * kPanel];
          lift(panel, count, row, rows, sums, count * kPanel);
          kernel_.finish(sums, count * kPanel, rows, columns, p_.activation, p_.y_type, result(row, n), p_.n);
        }
      }
    });
  }

  // With a dense residual: its products go on where those of the factors end, at what start(panel, sums) writes.
  template <class F>
  void add_dense(F&& start) const {
    const auto* residual = reinterpret_cast<const float*>(f_.residual);
    const int64_t k = h_.k, length = block_of(k);
    for_panels(h_.n, k, [&](int64_t first, int64_t end) {
      alignas(64) float sums[kMaxTaskRows * kPanel];
      for (int64_t panel = first; panel < end; ++panel) {
        const int64_t n = panel * kPanel;
        const int columns = static_cast<int>(std::min<int64_t>(kPanel, h_.n - n));
        start(panel, columns, sums);
        for (int64_t begin = 0; begin < k; begin += length)
          multiply({floats_ + begin, ld_floats_, rows_, residual + (panel * k + begin) * kPanel, 0, 1,
                    std::min(length, k - begin), sums, kPanel, sums, kPanel});
        kernel_.finish(sums, kPanel, rows_, columns, p_.activation, p_.y_type, result(0, n), p_.n);
      }
    });
  }

  void run_float() {
    project();
    if (h_.residual_kind == Residual::none) return lift_all();
    if (h_.residual_kind == Residual::dense)
      return add_dense([&](int64_t panel, int, float* sums) { lift(panel, 1, 0, rows_, sums, kPanel); });
    join(nullptr, [](const void* self, int64_t row, int rows, int64_t n, int columns, float* room) {
      return static_cast<const Rows*>(self)->lifted(row, rows, n, columns, room);
    });
  }

  // What int8::Addend asks for: bias + t up^T for some rows and columns.
  const float* lifted(int64_t row, int rows, int64_t n, int columns, float* room) const {
    const int64_t first = n / kPanel, end = divide_up(n + columns, kPanel);
    lift(first, static_cast<int>(end - first), row, rows, room, int8::kAddendStride);
    return room + n % kPanel;
  }

  // int8 factors: two int8 products, of which the first, and an int8 residual, share one quantization of x.
  void run_int8() {
    const int amax = (1 << h_.activation_bits) - 1;
    int8::best_kernel().quantize(x_, p_.x_type, p_.ldx, rows_, shape_, amax, nullptr, bytes_, scale_, zero_point_);
    const int8::Quantized quantized{shape_, h_.activation_bits, bytes_, scale_, zero_point_};
    int8::linear({x_, p_.x_type, rows_, h_.k, p_.ldx, f_.down, static_cast<int64_t>(h_.down.bytes), h_.rank,
                  f_.down_scale, nullptr, Activation::none, t_, Type::float32, nullptr, nullptr, threads_, &quantized});
    const bool alone = h_.residual_kind == Residual::none;
    int8::linear({t_, Type::float32, rows_, h_.rank, h_.rank, f_.up, static_cast<int64_t>(h_.up.bytes), h_.n,
                  f_.up_scale, p_.bias, alone ? p_.activation : Activation::none, alone ? y_ : addend_,
                  alone ? p_.y_type : Type::float32, nullptr, nullptr, threads_});
    if (h_.residual_kind == Residual::dense)
      return add_dense([&](int64_t panel, int columns, float* sums) {
        for (int i = 0; i < rows_; ++i) std::copy_n(addend_ + i * p_.n + panel * kPanel, columns, sums + i * kPanel);
      });
    if (!alone)
      join(&quantized, [](const void* self, int64_t row, int rows, int64_t n, int columns, float* room) {
        return static_cast<const Rows*>(self)->stored(row, rows, n, columns, room);
      });
  }

  const float* stored(int64_t row, int rows, int64_t n, int columns, float* room) const {
    for (int i = 0; i < rows; ++i) std::copy_n(addend_ + (row + i) * p_.n + n, columns, room + i * int8::kAddendStride);
    return room;
  }

  // The residual's own op, which adds the low-rank part before it finishes.
  void join(const int8::Quantized* quantized, decltype(int8::Addend::tile) tile) const {
    const int8::Addend addend{this, tile};
    const int64_t bytes = static_cast<int64_t>(h_.residual.bytes);
    if (h_.residual_kind == Residual::int4)
      int4::linear({x_, p_.x_type, rows_, h_.k, p_.ldx, f_.residual, bytes, h_.n, nullptr, p_.activation, y_, p_.y_type,
                    threads_, quantized, &addend});
    else if (h_.residual_kind == Residual::int8)
      int8::linear({x_, p_.x_type, rows_, h_.k, p_.ldx, f_.residual, bytes, h_.n, f_.residual_scale, nullptr,
                    p_.activation, y_, p_.y_type, nullptr, nullptr, threads_, quantized, &addend});
    else
      sparse::linear({x_, p_.x_type, rows_, h_.k, p_.ldx, f_.residual, bytes, h_.n, f_.residual_scale, nullptr,
                      p_.activation, y_, p_.y_type, nullptr, nullptr, threads_, quantized, &addend});
  }

  const Problem& p_;
  const Factors& f_;
  const Header& h_;
  const dense::Kernel& kernel_;
  const int threads_;
  int8::ActivationShape shape_{};
  int rows_ = 0;
  const void* x_ = nullptr;
  void* y_ = nullptr;
  const float* floats_ = nullptr;  // x as float32
  ptrdiff_t ld_floats_, ldt_;
  float *t_, *x_room_, *addend_;
  uint8_t* bytes_;
  float* scale_;
  int32_t* zero_point_;
};

}  // namespace

void linear(const Problem& p) {
  const Header& header = header_of(p.packed, p.packed_bytes);
  check(p.k == header.k, "low_rank_linear: x is [", p.m, ", ", p.k, "], the packed weight expects k = ", header.k);
  check(p.n == header.n, "low_rank_linear: n is ", p.n, ", the packed weight has ", header.n, " channels");
  check(p.x_type != Type::int32 && p.y_type != Type::int32, "low_rank_linear: x or y is int32, expected a float type");
  if (p.m == 0) return;
  const Factors factors(p.packed, header);
  const dense::Kernel& kernel = dense::kernels().first();

  const uint64_t bytes = header.down.bytes + header.up.bytes;
  const double weights = static_cast<double>(bytes + header.residual.bytes);
  const int threads = static_cast<double>(p.m) * weights < kSerialOperations ? 1 : usable_threads(p.threads);
  // Rows are split first: then nothing of a row leaves its core. With too few of them each product's channels are.
  const int64_t unit = factors.row_unit(), fewest = bytes > kStreamBytes ? kMaxTaskRows : kMinTaskRows;
  if (p.m < threads * std::max<int64_t>(unit, fewest) || threads == 1) {
    const int64_t step = std::min<int64_t>(p.m, kMaxTaskRows);
    Rows rows(p, factors, kernel, step, threads);
    for (int64_t row = 0; row < p.m; row += step) rows.run(row, static_cast<int>(std::min(step, p.m - row)));
    return;
  }
  const int64_t per_thread = std::clamp<int64_t>(p.m / (threads * fewest), 1, kTasksPerThread);
  const int64_t step = std::min<int64_t>(kMaxTaskRows, round_up(divide_up(p.m, threads * per_thread), unit));
  const int64_t tasks = divide_up(p.m, step);
  // A call without rows looks at all parts: a thread of a region must not be the first to find one that was changed.
  if (!factors.is_float() || factors.is_joined()) Rows(p, factors, kernel, 0, 1).run(0, 0);
  std::atomic<int64_t> next{0};
  parallel(static_cast<int>(std::min<int64_t>(threads, tasks)), [&](int, int) {
    Rows rows(p, factors, kernel, step, 1);
    for (int64_t row = step * next++; row < p.m; row = step * next++)
      rows.run(row, static_cast<int>(std::min(step, p.m - row)));
  });
}

}  // namespace pycompress::low_rank
