// The float32 products: every kernel alone, load, products and finish, against the specification and double.
#include <random>

#include "cases.h"
#include "dense/kernel_list.h"
#include "sparse_weight.h"

namespace native {
namespace {

using namespace pycompress;
using namespace pycompress::dense;

// What the sums start from: zeros, one row for all, a row each, or what c holds.
enum class Start { zeros, shared, own, result };

// Operands of `multiply` against guard pages, NaN in all gaps.
struct Operands {
  int rows, panels, k, lda, ldc, lds;
  size_t stride;
  Start start;
  Guarded<float> a, weights, starts, initial;

  Operands(int m, int panel_count, int positions, Start from, std::mt19937& random)
      : rows(m),
        panels(panel_count),
        k(positions),
        lda(positions + cases % 4),
        ldc(columns() + cases % 3 * 8),
        lds(from == Start::shared ? 0 : columns() + cases % 2 * 8),
        stride(static_cast<size_t>(kPanel * (positions + cases % 3))),
        start(from),
        a(span(lda, positions)),
        weights(stride * static_cast<size_t>(panel_count - 1) + area(positions, kPanel)),
        starts(span(lds, columns())),
        initial(span(ldc, columns())) {
    const float nan = std::nanf("");
    for (Guarded<float>* all : {&a, &weights, &starts, &initial}) std::fill_n(all->data(), all->size(), nan);
    std::normal_distribution<float> normal;
    for (int row = 0; row < m; ++row) {
      for (int i = 0; i < k; ++i) a[static_cast<size_t>(row * lda + i)] = normal(random);
      for (int i = 0; i < columns(); ++i) starts[static_cast<size_t>(row * lds + i)] = normal(random);
      if (from == Start::result)
        for (int i = 0; i < columns(); ++i) initial[static_cast<size_t>(row * ldc + i)] = normal(random);
    }
    for (int panel = 0; panel < panels; ++panel)
      for (size_t i = 0; i < area(k, kPanel); ++i) weights[static_cast<size_t>(panel) * stride + i] = normal(random);
  }
  int columns() const { return panels * kPanel; }
  size_t span(int ld, int length) const { return static_cast<size_t>((rows - 1) * ld + length); }

  void run(Multiply multiply, Guarded<float>& c) const {
    std::memcpy(c.data(), initial.data(), c.bytes());
    Product product{};
    product.a = a.data(), product.lda = lda, product.rows = rows;
    product.panels = weights.data(), product.stride = static_cast<ptrdiff_t>(stride), product.panel_count = panels;
    product.k = k;
    if (start == Start::shared || start == Start::own) product.start = starts.data(), product.lds = lds;
    if (start == Start::result) product.start = c.data(), product.lds = ldc;
    product.c = c.data(), product.ldc = ldc;
    multiply(product);
  }
  double first(int row, int column) const {
    if (start == Start::zeros) return 0;
    const bool in_result = start == Start::result;
    return in_result ? initial[static_cast<size_t>(row * ldc + column)]
                     : starts[static_cast<size_t>(row * lds + column)];
  }
};

// Whether c is what double gives, within the roundings of a chain, and nothing lies between its rows.
bool is_product(const Operands& o, const Guarded<float>& c) {
  bool right = true;
  for (int row = 0; row < o.rows; ++row) {
    for (int column = 0; column < o.columns(); ++column) {
      double exact = o.first(row, column), magnitude = std::fabs(exact);
      const float* w = o.weights.data() + static_cast<size_t>(column / kPanel) * o.stride + column % kPanel;
      for (int i = 0; i < o.k; ++i) {
        const double product = double{o.a[static_cast<size_t>(row * o.lda + i)]} * double{w[i * kPanel]};
        exact += product;
        magnitude += std::fabs(product);
      }
      const double error = std::fabs(double{c[static_cast<size_t>(row * o.ldc + column)]} - exact);
      right = right && error <= gamma_of(o.k + 4) * magnitude;
    }
    for (int column = o.columns(); column < o.ldc && row + 1 < o.rows; ++column)
      right = right && std::isnan(c[static_cast<size_t>(row * o.ldc + column)]);
  }
  return right;
}

void run_multiply(const Kernel& kernel, int rows, int panels, int k, Start start) {
  begin(text("kernel=", kernel.name, " rows=", rows, " panels=", panels, " k=", k, " start=", static_cast<int>(start)));
  std::mt19937 random(static_cast<unsigned>(cases));
  const Operands operands(rows, panels, k, start, random);
  Guarded<float> c(operands.initial.size()), expected(c.size());
  operands.run(kScalar.many, expected);
  operands.run(kernel.many, c);
  expect(is_product(operands, expected), "the specification");
  expect(all_equal(c.data(), expected.data(), c.size()) && c.intact(), "many");
  if (rows > kFewRows) return;
  operands.run(kernel.few, c);
  expect(is_product(operands, c) && c.intact(), "few");
}

void run_load(const Kernel& kernel, Type type, int rows, int k) {
  begin(text("kernel=", kernel.name, " load of type=", static_cast<int>(type), " rows=", rows, " k=", k));
  std::mt19937 random(static_cast<unsigned>(cases));
  Input x(type, rows, k, k + cases % 4, cases % 2 ? Edge::end : Edge::begin, 1);
  for (int row = 0; row < rows; ++row)
    for (int i = 0; i < k; ++i) x.set(row, i, hard_value(static_cast<size_t>(row + i), random));
  const int ldo = k + cases % 3;
  Guarded<float> out(static_cast<size_t>((rows - 1) * ldo + k)), expected(out.size());
  out.fill(0x55), expected.fill(0x55);
  kernel.load(x.data(), type, x.ldx(), rows, k, out.data(), ldo);
  kScalar.load(x.data(), type, x.ldx(), rows, k, expected.data(), ldo);
  bool loaded = true;
  for (int row = 0; row < rows; ++row)
    for (int i = 0; i < k; ++i) {
      const float value = x.at(row, i);
      loaded = loaded && same(&value, &expected[static_cast<size_t>(row * ldo + i)], Type::float32, 1);
    }
  expect(loaded, "the specification of load");
  expect(same(out.data(), expected.data(), Type::float32, out.size()) && out.intact(), "load");
}

void run_finish(const Kernel& kernel, int rows, int columns, Type type, Activation activation) {
  begin(text("kernel=", kernel.name, " finish of rows=", rows, " columns=", columns, " type=", static_cast<int>(type),
             " activation=", static_cast<int>(activation)));
  std::mt19937 random(static_cast<unsigned>(cases));
  const int ldc = columns + cases % 3, ldy = columns + cases % 4;
  Guarded<float> c(static_cast<size_t>((rows - 1) * ldc + columns));
  for (size_t i = 0; i < c.size(); ++i) c[i] = hard_value(i, random);
  const size_t count = static_cast<size_t>((rows - 1) * ldy + columns);
  Guarded<uint8_t> y(count * size_of(type), cases % 2 ? Edge::end : Edge::begin), expected(y.size());
  y.fill(0x55), expected.fill(0x55);
  kernel.finish(c.data(), ldc, rows, columns, activation, type, y.data(), ldy);
  kScalar.finish(c.data(), ldc, rows, columns, activation, type, expected.data(), ldy);
  expect(same(y.data(), expected.data(), type, count) && y.intact(), "finish");
}

void run_turn(const Kernel& kernel, Type type, int count, int length) {
  begin(text("kernel=", kernel.name, " turn of type=", static_cast<int>(type), " rows=", count, " length=", length));
  std::mt19937 random(static_cast<unsigned>(cases));
  Input x(type, count, length, length + cases % 4, cases % 2 ? Edge::end : Edge::begin, 1);
  for (int row = 0; row < count; ++row)
    for (int i = 0; i < length; ++i) x.set(row, i, hard_value(static_cast<size_t>(row + i), random));
  Guarded<float> panel(area(length, kPanel));
  panel.fill(0x55);
  kernel.turn(x.data(), type, x.ldx(), count, length, panel.data());
  bool turned = panel.intact();
  for (int i = 0; i < length; ++i)
    for (int row = 0; row < kPanel; ++row) {
      const float value = row < count ? x.at(row, i) : 0.0f;
      turned = turned && same(&value, &panel[static_cast<size_t>(i * kPanel + row)], Type::float32, 1);
    }
  expect(turned, "turn");
}

void run_kernel(const Kernel& kernel) {
  int turn = 0;
  for (const int rows : {1, 2, 3, 4, 5, 6, 7, 11, 12, 13, 17, 18, 25, 64, 65})
    for (const int k : {1, 2, 3, 4, 5, 7, 8, 15, 16, 17, 31, 33, 128, 129}) {
      run_multiply(kernel, rows, 1 + turn % 3, k, static_cast<Start>(turn / 3 % 4));
      ++turn;
    }
  for (const int panels : {1, 2, 8})
    for (const int rows : {1, 2, 3, 6, 13})
      for (const Start start : {Start::zeros, Start::shared, Start::own, Start::result})
        run_multiply(kernel, rows, panels, 37, start);
  for (const Type type : {Type::float32, Type::bfloat16, Type::float16}) {
    for (const int k : {1, 7, 8, 9, 15, 16, 17, 31, 65})
      for (const int rows : {1, 2, 7}) run_load(kernel, type, rows, k);
    for (const int length : {1, 7, 8, 9, 16, 31, 256})
      for (const int count : {1, 7, 8, 9, 15, 16}) run_turn(kernel, type, count, length);
    for (const int rows : {1, 3, 18})
      for (const int columns : {1, 7, 8, 9, 15, 16, 17, 33, 128})
        for (int activation = 0; activation < kActivations; ++activation)
          run_finish(kernel, rows, columns, type, static_cast<Activation>(activation));
  }
}

}  // namespace

void test_dense() { for_available(dense::kernels(), run_kernel); }

}  // namespace native
