// LSTMs and GRUs: the gates of every kernel against the specification, to the bit, operands against guard pages; and
// what the driver refuses.
#include "recurrent/recurrent.h"

#include <algorithm>
#include <cmath>
#include <random>
#include <stdexcept>
#include <vector>

#include "cases.h"
#include "guarded.h"
#include "int8/pack.h"
#include "recurrent/kernel_list.h"
#include "report.h"

namespace native {
namespace {

using namespace pycompress;
using recurrent::Cell;

// NaN has no sign and no payload here.
bool same(const Guarded<float>& a, const Guarded<float>& b) {
  for (size_t i = 0; i < a.size(); ++i)
    if (std::isnan(a[i]) ? !std::isnan(b[i]) : !all_equal(&a[i], &b[i], 1)) return false;
  return true;
}

// Sums of any size, some of them the ends of what the functions tell apart.
void fill(Guarded<float>& all, std::mt19937& random) {
  constexpr float kOdd[] = {0.0f, -0.0f, 1e-38f, -87.0f, -87.5f, 43.6f, 128.0f, -129.0f, 3e38f, -3e38f, INFINITY, NAN};
  std::normal_distribution<float> normal(0.0f, 4.0f);
  for (size_t i = 0; i < all.size(); ++i) all[i] = random() % 8 == 0 ? kOdd[random() % 12] : normal(random);
}

void run_gates(const recurrent::Kernel& kernel, Cell cell, int64_t size) {
  begin(text("recurrent kernel=", kernel.name, " cell=", static_cast<int>(cell), " size=", size));
  std::mt19937 random(static_cast<unsigned>(cases));
  const auto n = static_cast<size_t>(size);
  const size_t gates = n * static_cast<size_t>(recurrent::gates_of(cell));
  Guarded<float> gx(gates), gh(gates), h(n), c(n), y(n), expected_h(n), expected_c(n), expected_y(n);
  for (Guarded<float>* all : {&gx, &gh, &h, &c}) fill(*all, random);
  std::copy_n(h.data(), n, expected_h.data());
  std::copy_n(c.data(), n, expected_c.data());
  if (cell == Cell::lstm) {
    recurrent::kScalar.lstm(gx.data(), gh.data(), size, expected_c.data(), expected_h.data(), expected_y.data());
    kernel.lstm(gx.data(), gh.data(), size, c.data(), h.data(), y.data());
  } else {
    recurrent::kScalar.gru(gx.data(), gh.data(), size, expected_h.data(), expected_y.data());
    kernel.gru(gx.data(), gh.data(), size, h.data(), y.data());
  }
  expect(same(h, expected_h) && same(c, expected_c) && same(y, expected_y), "states");
  expect(same(h, y), "y is h");
  for (const Guarded<float>* all : {&gx, &gh, &h, &c, &y}) expect(all->intact(), "around the operands");
}

// One direction of a layer, forth and back, sequences of several lengths: operands against guard pages; what was there
// before in the thread's scratch changes nothing.
void run_driver(Cell cell, bool reverse, int threads) {
  begin(text("recurrent driver cell=", static_cast<int>(cell), " reverse=", reverse, " threads=", threads));
  constexpr int64_t k = 7, size = 9, batch = 3, rows = 6;
  const int64_t sizes[] = {3, 2, 1}, n = recurrent::gates_of(cell) * size;
  std::mt19937 random(5);
  std::vector<int8_t> values(static_cast<size_t>(n * size));
  for (int8_t& value : values) value = static_cast<int8_t>(random() % 255 - 127);
  const auto& kernel = int8::best_kernel();
  const auto input = int8::pack(kernel, values.data(), n, k, 8, 1),
             hidden = int8::pack(kernel, values.data(), n, size, 8, 1);
  std::vector<float> scale(static_cast<size_t>(n), 0.01f);
  Guarded<float> x(rows * k), h(batch * size), c(batch * size), y(rows * size), again(rows * size);
  std::normal_distribution<float> normal;
  for (size_t i = 0; i < x.size(); ++i) x[i] = normal(random);
  recurrent::Problem p{};
  p.cell = cell;
  p.x = x.data();
  p.x_type = Type::float32;
  p.rows = rows;
  p.k = p.ldx = k;
  p.input = {input.data(), static_cast<int64_t>(input.size()), scale.data(), nullptr};
  p.hidden = {hidden.data(), static_cast<int64_t>(hidden.size()), scale.data(), scale.data()};
  p.batch_sizes = sizes;
  p.steps = 3;
  p.batch = batch;
  p.size = p.ldy = size;
  p.reverse = reverse;
  p.h = h.data();
  p.c = cell == Cell::lstm ? c.data() : nullptr;
  p.threads = threads;
  for (Guarded<float>* out : {&y, &again}) {
    std::fill_n(h.data(), h.size(), 0.0f);
    std::fill_n(c.data(), c.size(), 0.0f);
    p.y = out->data();
    recurrent::run(p);
  }
  expect(same(y, again) && y.intact() && h.intact() && c.intact() && x.intact(), "run");
  // Where each sequence ends, forth at its last step, back at its first: rows 2, 4, 5, or 0, 1, 2.
  constexpr size_t kForth[] = {5, 4, 2};
  for (size_t b = 0; b < batch; ++b)
    expect(all_equal(&h[b * size], &y[(reverse ? b : kForth[b]) * size], size), text("the last state of ", b));

  const int64_t growing[] = {2, 3, 1};
  p.batch_sizes = growing;
  refuses("batch_sizes that do not begin with the batch", [&] { recurrent::run(p); });
  p.batch = 2;
  refuses("batch_sizes that grow", [&] { recurrent::run(p); });
  p.batch = batch;
  p.batch_sizes = sizes;
  p.rows = 7;
  refuses("more rows than batch_sizes", [&] { recurrent::run(p); });
  p.rows = rows;
  p.steps = 0;
  refuses("no steps", [&] { recurrent::run(p); });
}

}  // namespace

void test_recurrent() {
  for_available(recurrent::kernels(), [](const recurrent::Kernel& kernel) {
    for (const Cell cell : {Cell::lstm, Cell::gru})
      for (const int64_t size : {1, 7, 8, 9, 15, 16, 17, 31, 35}) run_gates(kernel, cell, size);
  });
  for (const Cell cell : {Cell::lstm, Cell::gru})
    for (const bool reverse : {false, true})
      for (const int threads : {1, 2}) run_driver(cell, reverse, threads);
}

}  // namespace native
