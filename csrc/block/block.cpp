// The driver: which rows on which thread, and what of them lies where.
#include "block.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <optional>

#include "../common/check.h"
#include "../common/kernels.h"
#include "../common/parallel.h"
#include "../common/round.h"
#include "../common/scratch.h"
#include "../dense/gemm.h"
#include "kernel_list.h"
#include "pieces.h"
#include "sequences.h"

namespace pycompress::block {
namespace {

constexpr int64_t kTaskRows = 128;    // rows that go from the attention to y together, at most: they stay in the L2
constexpr int64_t kMinTaskRows = 16;  // below, each product is shared out instead
constexpr int64_t kGroupRows = 128;   // rows of the sequences that make a task, unless one is longer
constexpr int64_t kMaxGroupRows = 512;
constexpr int kTasksPerThread = 2;

Scratch& call_scratch() {
  static thread_local Scratch own;
  return own;
}
Scratch& task_scratch() {
  static thread_local Scratch own;
  return own;
}
Scratch& head_scratch() {
  static thread_local Scratch own;
  return own;
}

// Queries, keys and values of rows [first, ...), one after the other; attention puts its result over the queries.
struct Projected {
  int64_t first = 0;
  float *q = nullptr, *k = nullptr, *v = nullptr;
};

// What a thread needs for one tile of scores.
struct HeadRoom {
  float *scores, *turned, *rows;

  HeadRoom(Pieces& pieces, int64_t length, int64_t head_size)
      : scores(pieces.take<float>(length * kMaxTile)),
        turned(pieces.take<float>(head_size * kMaxTile)),
        rows(pieces.take<float>(length * kMaxTile)) {}
};

class Call {
 public:
  explicit Call(const Problem& problem)
      : p_(problem),
        s_(problem.shape),
        kernel_(kernels().first()),
        floats_(dense::kernels().first()),
        inner_(int64_t{s_.heads} * s_.head_size),
        wide_(p_.products[kUp].n) {
    check_shapes();
    for (int i = 0; i < kProducts; ++i) {
      products_[i] = p_.products[i];
      if (products_[i].is_there()) check_product(products_[i]);
      units_[i] = row_unit(products_[i]);
    }
    unit_in_ = std::max({units_[kQuery], units_[kKey], units_[kValue]});
  }

  void run() {
    if (p_.batch * p_.length == 0) return;
    const Sequences sequences(p_);
    sequences_ = &sequences;
    rows_ = sequences.rows();
    threads_ = usable_threads(p_.threads);
    const bool by_sequence = makes_tasks(), by_row = rows_ >= threads_ * kMinTaskRows;
    reserve(!by_sequence);
    if (by_sequence)
      run_sequences();
    else
      run_shared(by_row);
  }

 private:
  // Rows of a thread, and everything that they become.
  struct Room {
    float *h, *s, *g, *wide, *gate;
    uint8_t* bytes;
    float* scale;
    int32_t* zero_point;
    HeadRoom head;
    Projected own;

    Room(Pieces& pieces, const Call& call, int64_t task_rows, int64_t group_rows)
        : h(pieces.take<float>(std::max(task_rows, group_rows) * call.p_.d)),
          s(pieces.take<float>(task_rows * call.p_.d)),
          g(pieces.take<float>(task_rows * call.p_.d)),
          wide(pieces.take<float>(task_rows * call.wide_)),
          gate(pieces.take<float>(call.products_[kGate].is_there() ? task_rows * call.wide_ : 0)),
          bytes(pieces.take<uint8_t>(std::max(task_rows, group_rows) * call.widest_stride())),
          scale(pieces.take<float>(std::max(task_rows, group_rows))),
          zero_point(pieces.take<int32_t>(std::max(task_rows, group_rows))),
          head(pieces, call.p_.length, call.s_.head_size) {
      if (group_rows > 0) own = projected(pieces, group_rows, call.inner_);
    }
  };

  HeadRoom head_room() const {
    Pieces sizes(nullptr);
    HeadRoom(sizes, p_.length, s_.head_size);
    Pieces pieces(head_scratch().reserve(sizes.bytes()));
    return HeadRoom(pieces, p_.length, s_.head_size);
  }

  static Projected projected(Pieces& pieces, int64_t rows, int64_t inner) {
    return {0, pieces.take<float>(rows * inner), pieces.take<float>(rows * inner),
            pieces.take<float>(rows * inner + kOverread)};
  }

  Room room(int64_t task_rows, int64_t group_rows) const {
    const int64_t rows = round_up<int64_t>(task_rows, kRowUnit),
                  group = group_rows == 0 ? 0 : round_up<int64_t>(group_rows, kRowUnit);
    Pieces sizes(nullptr);
    Room(sizes, *this, rows, group);
    Pieces pieces(task_scratch().reserve(sizes.bytes()));
    return Room(pieces, *this, rows, group);
  }

  void check_shapes() const {
    const int64_t n[kProducts] = {inner_, inner_, inner_, p_.d, wide_, wide_, p_.d};
    const int64_t k[kProducts] = {p_.d, p_.d, p_.d, inner_, p_.d, p_.d, wide_};
    static constexpr const char* names[kProducts] = {"query", "key", "value", "output", "up", "gate", "down"};
    check(p_.length < (1 << 24) && p_.d <= kMaxK && wide_ <= kMaxK, "block: x is [", p_.batch, ", ", p_.length, ", ",
          p_.d, "], and the products inside have ", wide_, " channels: too many");
    for (int i = 0; i < kProducts; ++i) {
      const Product& product = p_.products[i];
      check(product.is_there() || i == kGate, "block: there is no ", names[i], " product");
      check(!product.is_there() || (product.n == n[i] && product.k == k[i]), "block: the weight of ", names[i], " is [",
            product.n, ", ", product.k, "], expected [", n[i], ", ", k[i], "]");
    }
  }

  ptrdiff_t widest_stride() const {
    ptrdiff_t widest = 0;
    for (const Product& product : products_) {
      if (const auto own = quantization_of(product)) widest = std::max(widest, own->shape.stride());
    }
    return widest;
  }

  // Whether whole sequences make enough tasks, and none too large.
  bool makes_tasks() const {
    const int64_t longest = sequences_->longest();
    if (longest > kMaxGroupRows || rows_ < threads_ * kMinTaskRows) return false;
    return threads_ == 1 || rows_ >= longest * kTasksPerThread * threads_;
  }

  // What all threads read: vectors as float32, and the groups of sequences, or queries, keys and values that are
  // shared.
  void reserve(bool shares) {
    for (int pass = 0; pass < 2; ++pass) {
      Pieces pieces(pass == 0 ? nullptr : memory_);
      for (int i = 0; i < kProducts; ++i) products_[i].bias = as_floats(pieces, p_.bias[i], products_[i].n);
      for (int i = 0; i < kNorms; ++i) {
        norms_[i] = {s_.rms, s_.eps[i], as_floats(pieces, p_.norm_weight[i], p_.d),
                     as_floats(pieces, p_.norm_shift[i], p_.d)};
      }
      groups_ = pieces.take<int64_t>(shares ? 0 : sequences_->count() + 1);
      if (shares) shared_ = projected(pieces, round_up<int64_t>(rows_, kRowUnit), inner_);
      if (pass == 0) memory_ = call_scratch().reserve(pieces.bytes());
    }
  }

  const float* as_floats(Pieces& pieces, const Values& values, int64_t n) const {
    if (values.data == nullptr) return nullptr;
    if (values.type == Type::float32) return static_cast<const float*>(values.data);
    float* to = pieces.take<float>(n);
    if (to != nullptr) floats_.load(values.data, values.type, n, 1, n, to, n);
    return to;
  }

  // --- steps ---------------------------------------------------------------------------------------------------------

  // x of some rows as float32: where it is, or in `to`, with a whole unit of rows.
  const float* rows_of_x(int64_t row, int64_t rows, int unit, float* to) const {
    if (p_.type == Type::float32 && rows % unit == 0 && sequences_->adjacent(row, rows) == rows)
      return static_cast<const float*>(p_.x) + sequences_->row_in_x(row) * p_.d;
    sequences_->for_adjacent(row, rows, [&](int64_t in_x, int64_t i, int64_t n) {
      floats_.load(value_of(p_.x, p_.type, in_x * p_.d), p_.type, p_.d, static_cast<int>(n), p_.d, to + i * p_.d, p_.d);
    });
    std::fill_n(to + rows * p_.d, (round_up<int64_t>(rows, unit) - rows) * p_.d, 0.0f);
    return to;
  }

  // Queries, keys and values of rows [row, row + rows).
  void project(const Room& room, const Projected& to, int64_t row, int64_t rows, int threads) const {
    const float* h = rows_of_x(row, rows, unit_in_, room.h);
    if (s_.pre_norm) {
      if (h != room.h) std::copy_n(h, rows * p_.d, room.h);
      kernel_.add_norm(room.h, nullptr, static_cast<int>(rows), static_cast<int>(p_.d), &norms_[kAttentionNorm],
                       room.h);
      h = room.h;
    }
    const std::optional<int8::Quantized> q = quantized(room, {kQuery, kKey, kValue}, h, rows);
    float* const results[] = {to.q, to.k, to.v};
    for (int i = kQuery; i <= kValue; ++i)
      product(i, h, rows, Activation::none, results[i] + (row - to.first) * inner_, threads, q);
  }

  // The rows as two or more of the products quantize them, once.
  std::optional<int8::Quantized> quantized(const Room& room, std::initializer_list<int> roles, const float* h,
                                           int64_t rows) const {
    std::optional<Quantization> first;
    int alike = 0;
    for (const int role : roles) {
      const std::optional<Quantization> own = quantization_of(products_[role]);
      if (!first) first = own;
      alike += own && *own == *first;
    }
    if (alike < 2) return std::nullopt;
    const auto& [shape, bits, range] = *first;
    int8::best_kernel().quantize(h, Type::float32, p_.d, static_cast<int>(rows), shape, (1 << bits) - 1,
                                 range.or_null(), room.bytes, room.scale, room.zero_point);
    return int8::Quantized{shape, bits, room.bytes, room.scale, room.zero_point, range};
  }

  void product(int role, const float* x, int64_t rows, Activation activation, float* y, int threads,
               const std::optional<int8::Quantized>& q = std::nullopt) const {
    const Product& own = products_[role];
    multiply(own, x, round_up<int64_t>(rows, units_[role]), own.k, activation, y, threads, q ? &*q : nullptr);
  }

  // Attention of one head of a sequence, in the place of its queries: its keys and values stay in the L2 meanwhile.
  void attend(const Projected& at, const HeadRoom& room, const Sequence& sequence, int head) const {
    if (head == 0) clear_skipped(sequence);
    const int64_t first = (sequence.first - at.first) * inner_ + int64_t{head} * s_.head_size;
    for (int64_t query = 0; query < sequence.length; query += kernel_.mr) {
      const int queries = static_cast<int>(std::min(sequence.length - query, int64_t{kernel_.mr}));
      kernel_.attend({at.q + first + query * inner_, at.k + first, at.v + first, inner_, inner_, inner_, queries,
                      static_cast<int>(sequence.keys), s_.head_size, s_.scale, query, s_.causal, sequence.key_mask,
                      sequences_->start(kernel_, sequence, head, query, queries, room.rows, room.scores), room.scores,
                      room.turned, at.q + first + query * inner_, inner_});
    }
  }

  void clear_skipped(const Sequence& sequence) const {
    if (sequence.length == p_.length) return;
    sequences_->for_skipped(sequence, [&](int64_t in_x, int64_t n) {
      std::memset(value_of(p_.y, p_.type, in_x * p_.d), 0, static_cast<size_t>(n * p_.d) * size_of(p_.type));
    });
  }

  // From the attention's result to y.
  void finish(const Room& room, const Projected& at, int64_t row, int64_t rows, int threads) const {
    const int count = static_cast<int>(rows), d = static_cast<int>(p_.d);
    product(kOutput, at.q + (row - at.first) * inner_, rows, Activation::none, room.s, threads);
    const float* x = rows_of_x(row, rows, 1, room.h);
    float* h = room.g;  // what the MLP reads; s: what its result is added to
    kernel_.add_norm(room.s, x, count, d, &norms_[s_.pre_norm ? kMlpNorm : kAttentionNorm], h);
    const bool gated = products_[kGate].is_there();
    const std::optional<int8::Quantized> q = gated ? quantized(room, {kUp, kGate}, h, rows) : std::nullopt;
    product(kUp, h, rows, gated ? Activation::none : s_.activation, room.wide, threads, q);
    if (gated) {
      product(kGate, h, rows, s_.activation, room.gate, threads, q);
      kernel_.multiply(room.wide, room.gate, rows * wide_);
    }
    const float* residual = s_.pre_norm ? room.s : h;
    float* sum = room.h;
    product(kDown, room.wide, rows, Activation::none, sum, threads);
    const bool in_place = p_.type == Type::float32 && sequences_->adjacent(row, rows) == rows;
    float* to = in_place ? static_cast<float*>(p_.y) + sequences_->row_in_x(row) * p_.d : sum;
    if (s_.pre_norm) {
      kernel_.add_norm(sum, residual, count, d, nullptr, sum);
      if (to != sum) std::copy_n(sum, rows * p_.d, to);
    } else {
      kernel_.add_norm(sum, residual, count, d, &norms_[kMlpNorm], to);
    }
    if (in_place) return;
    sequences_->for_adjacent(row, rows, [&](int64_t in_x, int64_t i, int64_t n) {
      floats_.finish(sum + i * p_.d, p_.d, static_cast<int>(n), d, Activation::none, p_.type,
                     value_of(p_.y, p_.type, in_x * p_.d), p_.d);
    });
  }

  // --- ways to share the work ---------------------------------------------------------------------------------------

  // body(room, task) for tasks [0, count), taken as they come; make() gives a thread its room.
  template <class Make, class F>
  void for_tasks(int64_t count, Make&& make, F&& body) const {
    if (count == 0) return;
    std::atomic<int64_t> next{0};
    parallel(static_cast<int>(std::min<int64_t>(threads_, count)), [&](int, int) {
      const auto room = make();
      for (int64_t t = next++; t < count; t = next++) body(room, t);
    });
  }

  // Whole sequences in groups of about as many rows, but for those that are longer by themselves.
  int64_t make_groups(int64_t* most_rows) const {
    const Sequences& all = *sequences_;
    const int64_t share = divide_up(rows_, threads_ == 1 ? 1 : int64_t{kTasksPerThread} * threads_);
    int64_t count = 0;
    for (int64_t i = 0; i < all.count(); ++count) {
      int64_t rows = 0;
      groups_[count] = i;
      do rows += all[i++].length;
      while (i < all.count() && rows < share && rows + all[i].length <= kGroupRows);
      *most_rows = std::max(*most_rows, rows);
    }
    groups_[count] = all.count();
    return count;
  }

  void run_sequences() const {
    int64_t most_rows = 0;
    const int64_t count = make_groups(&most_rows);
    const auto make = [&] { return room(std::min(most_rows, kTaskRows), most_rows); };
    for_tasks(count, make, [&](const Room& room, int64_t task) {
      const Sequence *begin = &(*sequences_)[groups_[task]], *last = &(*sequences_)[groups_[task + 1] - 1];
      const int64_t first = begin->first, rows = last->first + last->length - first;
      Projected own = room.own;
      own.first = first;
      if (rows > 0) project(room, own, first, rows, 1);
      for (const Sequence* sequence = begin; sequence <= last; ++sequence)
        for (int head = 0; head < s_.heads; ++head) attend(own, room.head, *sequence, head);
      if (rows == 0) return;
      const int64_t step = round_up(divide_up(rows, divide_up(rows, kTaskRows)), int64_t{kRowUnit});
      for (int64_t row = first; row < first + rows; row += step)
        finish(room, own, row, std::min(step, first + rows - row), 1);
    });
  }

  // Rows are shared out, or with a few of them each product; in between, heads are.
  void run_shared(bool by_row) const {
    int64_t step = std::max<int64_t>(rows_, 1);
    if (by_row) {
      const int64_t fitting = std::min(divide_up(rows_, int64_t{threads_}), kTaskRows);
      const int64_t tasks = round_up(divide_up(rows_, fitting), int64_t{threads_});
      step = round_up(divide_up(rows_, tasks), int64_t{kRowUnit});
    }
    const int threads = by_row ? 1 : threads_;
    const auto make = [&] { return room(step, 0); };
    for_tasks(divide_up(rows_, step), make, [&](const Room& room, int64_t task) {
      project(room, shared_, task * step, std::min(step, rows_ - task * step), threads);
    });
    for_tasks(
        p_.batch * s_.heads, [&] { return head_room(); },
        [&](const HeadRoom& room, int64_t task) {
          attend(shared_, room, (*sequences_)[task / s_.heads], static_cast<int>(task % s_.heads));
        });
    for_tasks(divide_up(rows_, step), make, [&](const Room& room, int64_t task) {
      finish(room, shared_, task * step, std::min(step, rows_ - task * step), threads);
    });
  }

  const Problem& p_;
  const Shape& s_;
  const Kernel& kernel_;
  const dense::Kernel& floats_;
  const int64_t inner_, wide_;
  Product products_[kProducts];
  int units_[kProducts], unit_in_;
  Norm norms_[kNorms];
  int threads_ = 1;
  uint8_t* memory_ = nullptr;
  int64_t* groups_ = nullptr;  // where groups of sequences begin, and the last one ends
  const Sequences* sequences_ = nullptr;
  int64_t rows_ = 0;
  Projected shared_;
};

}  // namespace

Kernels<Kernel>& kernels() {
  static constexpr const Kernel* best_first[] = {
#if defined(PYCOMPRESS_X86)
      &kAvx512, &kAvx2,
#endif
      &kScalar};
  static Kernels<Kernel> all{"block", best_first};
  return all;
}

void run(const Problem& problem) { Call(problem).run(); }

}  // namespace pycompress::block
