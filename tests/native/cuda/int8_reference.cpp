#include "int8_reference.h"

#include <algorithm>
#include <set>

#include "int8/kernel_list.h"

namespace native {

void check_int8_sums(const cuda::Kernel& kernel, Int8Case& c) {
  begin(text("cuda kernel=", kernel.name, " ", c.name(), " sums"));
  Guarded<int32_t> y(Int8Case::size(c.m * c.n));
  y.fill(emulate::kPoison);
  kernel.run(c.problem(y.data(), Type::int32));
  int64_t wrong = 0;
  for (int64_t i = 0; i < c.m; ++i)
    for (int64_t j = 0; j < c.n; ++j) wrong += y[Int8Case::size(i * c.n + j)] != c.sum(i, j);
  expect(wrong == 0, text(wrong, " of ", c.m * c.n, " sums differ from int64"));
  expect(y.intact(), "a store outside of y");
}

void check_int8_epilogue(const cuda::Kernel& kernel, Int8Case& c, Activation activation, Type type, bool bias) {
  begin(text("cuda kernel=", kernel.name, " ", c.name(), " activation=", static_cast<int>(activation),
             " type=", static_cast<int>(type), " bias=", bias));
  const size_t bytes = Int8Case::size(c.m * c.n) * size_of(type);
  Guarded<uint8_t> y(bytes), expected(bytes);
  y.fill(emulate::kPoison);
  cuda::Problem problem = c.problem(y.data(), type);
  problem.activation = activation;
  if (bias) problem.bias = c.bias.data();
  kernel.run(problem);

  std::vector<int32_t> sums;
  for (int64_t i = 0; i < c.m; ++i)
    for (int64_t j = 0; j < c.n; ++j) sums.push_back(static_cast<int32_t>(c.sum(i, j)));
  const std::vector<int32_t> corrected(Int8Case::size(c.n), 0);  // the sums have the zero point in them
  const int8::Epilogue epilogue{corrected.data(), problem.weight_scale, problem.bias, 0,
                                c.scale.data(),   c.zero_point.data(),  activation,   type};
  int8::kScalar.finish(sums.data(), static_cast<int>(c.n), static_cast<int>(c.m), static_cast<int>(c.n), epilogue,
                       expected.data(), c.n);
  expect(std::equal(y.data(), y.data() + bytes, expected.data()), "y differs from the specification's");
  expect(y.intact(), "a store outside of y");
}

void check_int8_kernel(const cuda::Kernel& kernel) {
  const auto edges = [](int tile) { return std::set<int64_t>{1, tile - 1, tile, tile + 1, 2 * tile + 3}; };
  const int64_t deep = int64_t{kernel.bk} * (kernel.stages + 2) + 5;  // the ring goes round
  for (const int64_t m : edges(kernel.bm)) {
    Int8Case c(m, 19, 37);
    check_int8_sums(kernel, c);
  }
  for (const int64_t n : edges(kernel.bn)) {
    Int8Case c(9, n, 70);
    check_int8_sums(kernel, c);
  }
  for (const int64_t k : edges(kernel.bk)) {
    Int8Case c(7, 24, k);
    check_int8_sums(kernel, c);
  }
  Int8Case ring(kernel.bm + 1, kernel.bn + 2, deep), extreme(5, 8, deep, Values::extreme), vectors(11, 44, 65);
  check_int8_sums(kernel, ring);
  check_int8_sums(kernel, extreme);
  for (const emulate::Order order : {emulate::Order::descending, emulate::Order::random}) {
    emulate::options.threads = order;
    emulate::options.reversed_blocks = order == emulate::Order::descending;
    check_int8_sums(kernel, extreme);
    emulate::options = {};
  }
  for (const Type type : {Type::float32, Type::bfloat16, Type::float16})
    for (int activation = 0; activation < 5; ++activation)
      check_int8_epilogue(kernel, activation % 2 ? vectors : extreme, static_cast<Activation>(activation), type,
                          activation != 2);
}

}  // namespace native
