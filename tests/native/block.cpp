// What a transformer block does between its products: every kernel alone, against double and the bounds of the
// contract. And the driver, of dense products: which rows it computes, whatever the threads and the padding.
#include <algorithm>
#include <cmath>
#include <random>
#include <vector>

#include "block/block.h"
#include "block/kernel_list.h"
#include "cases.h"
#include "guarded.h"
#include "report.h"

namespace native {
namespace {

using namespace pycompress;
using namespace pycompress::block;

const double kRounding = static_cast<double>(FLT_EPSILON) / 2;

enum class Added { nothing, keys, scores, hidden };  // to the scores; hidden: keys of -inf, all of them for query 0

struct Heads {
  int queries, keys, head_size, ld;
  bool causal;
  Added added;
  int first_query;
  float scale;
  Guarded<float> q, k, v, mask, start, scores, turned, o;

  Heads(const Kernel& kernel, int m, int n, int d, bool is_causal, Added what, std::mt19937& random)
      : queries(m),
        keys(n),
        head_size(d),
        ld(d + cases % 5),
        causal(is_causal),
        added(what),
        first_query(is_causal ? cases % 4 : 0),
        scale(cases % 7 == 0 ? 3.0f : 1 / std::sqrt(static_cast<float>(d))),
        q(span(m, ld, d)),
        k(span(n, ld, d)),
        v(span(n, ld, d) + kOverread),
        mask(static_cast<size_t>(n)),
        start(area(m, n)),
        scores(area(n, kernel.tile_for(m))),
        turned(area(d, kernel.tile_for(m))),
        o(span(m, ld, d)) {
    std::normal_distribution<float> normal;
    for (Guarded<float>* all : {&q, &k, &v, &mask, &start})
      for (size_t i = 0; i < all->size(); ++i) (*all)[i] = normal(random);
    for (size_t i = v.size() - kOverread; i < v.size(); ++i) v[i] = std::nanf("");  // read, never used
    if (added == Added::hidden)
      for (int j = 0; j < keys; ++j) {
        if (j % 3 == 1) mask[static_cast<size_t>(j)] = -INFINITY;
        start[static_cast<size_t>(j)] = -INFINITY;
      }
    o.fill(0x55), scores.fill(0x55), turned.fill(0x55);
  }
  static size_t span(int rows, int ld, int length) { return static_cast<size_t>((rows - 1) * ld + length); }
  bool adds_keys() const { return added == Added::keys || added == Added::hidden; }
  bool adds_scores() const { return added == Added::scores || added == Added::hidden; }

  void run(const Kernel& kernel) {
    const int tile = kernel.tile_for(queries);
    if (adds_scores()) {
      kernel.turn(start.data(), keys, queries, keys, tile, false, scores.data());
      kernel.turn(start.data(), keys, queries, keys, tile, true, scores.data());
    }
    kernel.attend({q.data(), k.data(), v.data(), ld, ld, ld, queries, keys, head_size, scale, first_query, causal,
                   adds_keys() ? mask.data() : nullptr, adds_scores(), scores.data(), turned.data(), o.data(), ld});
  }

  // What was added to the score of a key and query.
  double sum_added(int query, int key) const {
    if (causal && key > first_query + query) return -INFINITY;
    return (adds_keys() ? double{mask[static_cast<size_t>(key)]} : 0) +
           (adds_scores() ? 2 * double{start[static_cast<size_t>(query * keys + key)]} : 0);
  }

  bool is_right() const {
    bool right = true;
    for (int i = 0; i < queries; ++i) {
      std::vector<double> s(static_cast<size_t>(keys));
      double top = -INFINITY, error = 0, total = 0;
      for (int j = 0; j < keys; ++j) {
        double dot = 0, size = 0;
        for (int c = 0; c < head_size; ++c) {
          const double term = double{q[static_cast<size_t>(i * ld + c)]} * double{k[static_cast<size_t>(j * ld + c)]};
          dot += term;
          size += std::fabs(term);
        }
        const double more = sum_added(i, j);
        s[static_cast<size_t>(j)] = double{scale} * dot + more;
        if (std::isinf(more)) continue;
        top = std::max(top, s[static_cast<size_t>(j)]);
        error = std::max(error, kRounding * (head_size + 5) * (std::fabs(double{scale}) * size + std::fabs(more)));
      }
      for (double& one : s) total += one = std::isinf(top) ? 0 : std::exp(one - top);
      const double share = std::exp(2 * error + 90 * kRounding) * (1 + 8 * kRounding) - 1;
      const double relative = (1 + share) / (1 - share) * (1 + gamma_of(2 * keys + 4)) - 1;
      for (int c = 0; c < head_size; ++c) {
        double exact = 0, size = 0;
        for (int j = 0; j < keys; ++j) {
          const double value = double{v[static_cast<size_t>(j * ld + c)]};
          exact += s[static_cast<size_t>(j)] * value;
          size += s[static_cast<size_t>(j)] * std::fabs(value);
        }
        const double found = double{o[static_cast<size_t>(i * ld + c)]};
        right = right && (total == 0 ? found == 0 : std::fabs(found - exact / total) <= relative * size / total);
      }
    }
    return right;
  }

  bool left_gaps() const {
    bool whole = o.intact() && scores.intact() && turned.intact();
    for (int i = 0; i + 1 < queries; ++i)
      for (int c = head_size; c < ld; ++c) {
        uint32_t bits;
        std::memcpy(&bits, &o[static_cast<size_t>(i * ld + c)], 4);
        whole = whole && bits == 0x55555555;
      }
    return whole;
  }
};

void run_attend(const Kernel& kernel, int queries, int keys, int head_size, bool causal, Added added) {
  begin(text("kernel=", kernel.name, " attend queries=", queries, " keys=", keys, " head_size=", head_size,
             " causal=", causal, " added=", static_cast<int>(added)));
  std::mt19937 random(static_cast<unsigned>(cases));
  Heads heads(kernel, queries, keys, head_size, causal, added, random);
  heads.run(kernel);
  expect(heads.is_right(), "attend");
  expect(heads.left_gaps(), "attend wrote elsewhere");
}

// A score that is NaN, or +inf, makes its query NaN, and no other one.
void run_poison(const Kernel& kernel, float value) {
  const int queries = kernel.mr - 1, keys = 19, head_size = 16;
  begin(text("kernel=", kernel.name, " attend with a score of ", value));
  std::mt19937 random(static_cast<unsigned>(cases));
  Heads heads(kernel, queries, keys, head_size, false, Added::scores, random);
  const int poisoned = queries / 2;
  heads.start[static_cast<size_t>(poisoned * keys + 7)] = value;
  heads.run(kernel);
  bool right = true;
  for (int i = 0; i < queries; ++i)
    for (int c = 0; c < head_size; ++c)
      right = right && std::isnan(heads.o[static_cast<size_t>(i * heads.ld + c)]) == (i == poisoned);
  expect(right, "NaN");
}

void run_add_norm(const Kernel& kernel, int rows, int n, bool residual, int which, float offset) {
  begin(text("kernel=", kernel.name, " add_norm rows=", rows, " n=", n, " residual=", residual, " norm=", which,
             " offset=", offset));
  std::mt19937 random(static_cast<unsigned>(cases));
  std::normal_distribution<float> normal;
  Guarded<float> sum(area(rows, n)), more(sum.size()), weight(static_cast<size_t>(n)), shift(weight.size()),
      y(sum.size());
  for (Guarded<float>* all : {&sum, &more, &weight, &shift})
    for (size_t i = 0; i < all->size(); ++i) (*all)[i] = normal(random) + offset;
  std::vector<float> before(sum.data(), sum.data() + sum.size());
  const bool rms = which == 2, bare = which == 3;
  const Norm norm{rms, 1e-5f, bare ? nullptr : weight.data(), rms || bare ? nullptr : shift.data()};
  kernel.add_norm(sum.data(), residual ? more.data() : nullptr, rows, n, which == 0 ? nullptr : &norm, y.data());
  bool added = true, right = true;
  for (size_t i = 0; i < sum.size(); ++i) added = added && sum[i] == (residual ? before[i] + more[i] : before[i]);
  expect(added && sum.intact(), "the sum");
  for (int row = 0; row < rows && which != 0; ++row) {
    const float* x = sum.data() + row * n;
    double mean = 0, size = 0, square = 0, squares_error = 0;
    for (int i = 0; i < n; ++i) mean += double{x[i]} / n, size += std::fabs(double{x[i]}) / n;
    if (rms) mean = 0;
    const double mean_error = rms ? 0 : gamma_of(n + 4) * size;
    for (int i = 0; i < n; ++i) {
      const double d = double{x[i]} - mean, d_error = mean_error + kRounding * (std::fabs(d) + mean_error);
      square += d * d / n;
      squares_error += ((2 * std::fabs(d) + d_error) * d_error + gamma_of(n + 4) * d * d) / n;
    }
    const double sigma = std::sqrt(square + double{norm.eps});
    const double sigma_error = squares_error / (square + double{norm.eps}) + 6 * kRounding;
    for (int i = 0; i < n; ++i) {
      const double d = double{x[i]} - mean, w = bare ? 1 : double{weight[static_cast<size_t>(i)]},
                   b = norm.shift == nullptr ? 0 : double{shift[static_cast<size_t>(i)]};
      const double exact = d / sigma * w + b;
      const double bound = std::fabs(w) / sigma * (mean_error + std::fabs(d) * sigma_error) * 1.01 +
                           4 * kRounding * (std::fabs(exact) + std::fabs(b));
      right = right && std::fabs(double{y[static_cast<size_t>(row * n + i)]} - exact) <= bound;
    }
  }
  expect(right && y.intact(), "the norm");
}

void run_multiply(const Kernel& kernel, int count) {
  begin(text("kernel=", kernel.name, " multiply count=", count));
  Guarded<float> x(static_cast<size_t>(count)), y(x.size());
  for (size_t i = 0; i < x.size(); ++i) x[i] = static_cast<float>(i) + 0.5f, y[i] = 3.0f - static_cast<float>(i);
  kernel.multiply(x.data(), y.data(), count);
  bool right = x.intact();
  for (size_t i = 0; i < x.size(); ++i) right = right && x[i] == (static_cast<float>(i) + 0.5f) * y[i];
  expect(right, "multiply");
}

void run_kernel(const Kernel& kernel) {
  int turn = 0;
  for (const int queries : {1, 2, 3, 5, 7, 8, 9, 11, 12, 13, 15, 16, 17, 23, 24, 25, 31, 32})
    for (const int keys : {1, 2, 3, 11, 12, 13, 25, 40})
      for (const int head_size : {1, 7, 8, 15, 16, 17, 24, 32, 33, 40, 64, 80, 128}) {
        ++turn;
        if (queries <= kernel.mr && (turn % 3 == 0 || keys == 13))
          run_attend(kernel, queries, keys, head_size, turn % 2 == 0, static_cast<Added>(turn / 2 % 4));
      }
  for (const float value : {std::nanf(""), INFINITY}) run_poison(kernel, value);
  for (const int n : {1, 2, 7, 8, 9, 15, 16, 17, 31, 32, 33, 64, 384, 387})
    for (int which = 0; which < 4; ++which) {
      run_add_norm(kernel, 3, n, n % 2 == 0, which, 0);
      run_add_norm(kernel, 1, n, n % 2 != 0, which, 4);
    }
  for (const int count : {1, 7, 8, 9, 15, 16, 17, 100}) run_multiply(kernel, count);
}

// --- the driver -----------------------------------------------------------------------------------------------------

enum class Hides { nothing, right, left, here_and_there };

// A block of dense products over sequences of these lengths in x [lengths][longest][d].
struct Whole {
  static constexpr int kHeads = 2, kHeadSize = 9, kInner = kHeads * kHeadSize, kD = 21, kWide = 35;
  std::vector<int> lengths;
  int longest;
  Guarded<uint8_t> shown;                    // [lengths][longest]
  Guarded<float> weights, bias, norm, x, y;  // bias: added to the scores, [heads][longest][longest]

  Whole(const std::vector<int>& all, Hides hides, std::mt19937& random)
      : lengths(all),
        longest(*std::max_element(all.begin(), all.end())),
        shown(all.size() * static_cast<size_t>(longest)),
        weights(area(4 * kInner + 2 * kWide, kD)),
        bias(area(kHeads * longest, longest)),
        norm(2 * kD),
        x(shown.size() * kD),
        y(x.size()) {
    std::normal_distribution<float> normal;
    for (Guarded<float>* of : {&weights, &bias, &norm, &x})
      for (size_t i = 0; i < of->size(); ++i) (*of)[i] = normal(random) / (of == &weights ? 5.0f : 1.0f);
    for (size_t s = 0; s < all.size(); ++s) {
      uint8_t* row = shown.data() + s * static_cast<size_t>(longest);
      for (int i = 0; i < longest; ++i)
        row[i] = hides == Hides::nothing || (hides == Hides::left ? i >= longest - all[s] : i < all[s]);
      if (hides == Hides::here_and_there) std::shuffle(row, row + longest, random);
    }
  }

  Problem problem(const float* from, int64_t batch, int64_t length, float* to, int threads) const {
    Problem p;
    p.shape = {kHeads, kHeadSize, 0.3f, true, false, true, true, {1e-5f, 1e-5f}, Activation::gelu, {}};
    const float* weight = weights.data();
    for (const int role : {kQuery, kKey, kValue, kOutput, kUp, kDown}) {
      Product& own = p.products[role];
      own.weight = Weight::dense;
      own.n = role == kOutput || role == kDown ? kD : role == kUp ? kWide : kInner;
      own.k = role == kOutput ? kInner : role == kDown ? kWide : kD;
      own.ld = own.k;
      own.rows = weight;
      weight += own.n * own.k;
    }
    for (Values& one : p.norm_weight) one = {norm.data(), Type::float32};
    for (Values& one : p.norm_shift) one = {norm.data() + kD, Type::float32};
    p.x = from;
    p.y = to;
    p.type = Type::float32;
    p.batch = batch;
    p.length = length;
    p.d = kD;
    p.threads = threads;
    return p;
  }

  void run(int threads) {
    y.fill(0x55);
    Problem p = problem(x.data(), static_cast<int64_t>(lengths.size()), longest, y.data(), threads);
    p.masks[0] = {shown.data(), Type::float32, true, {longest, 0, 0, 1}};
    p.masks[1] = {bias.data(), Type::float32, false, {0, int64_t{longest} * longest, longest, 1}};
    block::run(p);
  }

  // A sequence in x and y of its own, without its padding.
  bool is_as_alone(size_t s) const {
    const size_t first = s * static_cast<size_t>(longest);
    std::vector<int> at;
    bool right = true;
    for (int i = 0; i < longest; ++i) {
      const float* row = y.data() + (first + static_cast<size_t>(i)) * kD;
      if (shown[first + static_cast<size_t>(i)] != 0)
        at.push_back(i);
      else
        right = right && std::all_of(row, row + kD, [](float value) { return value == 0; });
    }
    const int n = static_cast<int>(at.size());
    if (n == 0) return right;
    Guarded<float> own_x(area(n, kD)), own_y(own_x.size()), own_bias(area(kHeads * n, n));
    for (int i = 0; i < n; ++i) {
      std::copy_n(x.data() + (first + static_cast<size_t>(at[i])) * kD, kD, own_x.data() + i * kD);
      for (int head = 0; head < kHeads; ++head)
        for (int j = 0; j < n; ++j)
          own_bias[area(head * n + i, n) + j] = bias[area(head * longest + at[i], longest) + at[j]];
    }
    Problem p = problem(own_x.data(), 1, n, own_y.data(), 1);
    p.masks[1] = {own_bias.data(), Type::float32, false, {0, int64_t{n} * n, n, 1}};
    block::run(p);
    for (int i = 0; i < n; ++i)
      right = right && all_equal(own_y.data() + i * kD, y.data() + (first + static_cast<size_t>(at[i])) * kD, kD);
    return right && own_y.intact();
  }
};

void run_whole(const std::vector<int>& lengths, Hides hides, int threads) {
  begin(text("block sequences=", lengths.size(), " hides=", static_cast<int>(hides), " threads=", threads));
  std::mt19937 random(static_cast<unsigned>(cases));
  Whole whole(lengths, hides, random);
  whole.run(threads);
  bool right = whole.y.intact();
  for (size_t s = 0; s < lengths.size(); ++s) right = right && whole.is_as_alone(s);
  expect(right, "a sequence differs from itself alone");
}

void run_wholes() {
  const std::vector<int> shapes[] = {{1},       {19},     {7, 0, 3}, {0, 5}, {40, 3, 17, 40, 0, 25, 1, 9, 33},
                                     {150, 20}, {600, 70}};
  for (const std::vector<int>& lengths : shapes)
    for (const Hides hides : {Hides::nothing, Hides::right, Hides::left, Hides::here_and_there})
      for (const int threads : {1, 2, 3}) run_whole(lengths, hides, threads);
}

}  // namespace

void test_block() {
  run_wholes();
  for_available(block::kernels(), run_kernel);
}

}  // namespace native
