// The CUDA block sparse kernels' own source on the host: packed and dense again, exact sums, float64 within the bound
// of csrc/sparse/blocks/cuda.h, several orders of threads and blocks.
#include <algorithm>
#include <set>

#include "blocks_case.h"
#include "common/activation.h"
#include "emulate_hopper.h"
#include "sparse.h"
#include "sparse/blocks/schedule.h"

namespace native {
namespace {

namespace int8 = pycompress::int8;
using pycompress::Scalar;

constexpr Element kElements[] = {Element::bfloat16, Element::float16, Element::int8};

// --- packing
// ------------------------------------------------------------------------------------------------------------

void test_unpack(const blocks::Shape& shape, Present present) {
  const BlockWeight weight(shape, present, shape.element == Element::int8 ? Content::integers : Content::reals);
  begin(text("blocks unpack ", weight.name(), " present=", static_cast<int>(present)));
  const size_t width = shape.element == Element::int8 ? 1 : 4;
  Guarded<uint8_t> dense(size(shape.n * shape.k) * width);
  dense.fill(emulate::kPoison);
  blocks::unpack(weight.packed.data(), weight.shape, dense.data(), nullptr);
  int64_t wrong = 0;
  for (size_t i = 0; i < weight.dense.size(); ++i) {
    float value;
    if (width == 4) std::memcpy(&value, dense.data() + i * 4, 4);
    const double got = width == 4 ? static_cast<double>(value) : static_cast<int8_t>(dense[i]);
    wrong += got != weight.dense[i];
  }
  expect(wrong == 0, text(wrong, " other weights"));
  expect(dense.intact(), "a store outside");
}

template <class T>
T read(const BlockWeight& weight, int64_t at) {
  T value;
  std::memcpy(&value, weight.packed.data() + at, sizeof value);
  return value;
}

// What the kernels rely on: as much stored as is present, parts once each, by descending work.
void test_index(const blocks::Shape& shape) {
  const BlockWeight weight(shape, Present::uneven, Content::integers);
  begin(text("blocks index ", weight.name()));
  blocks::check_packed(weight.shape, static_cast<int64_t>(weight.packed.size()));
  const int64_t size = shape.size;
  std::set<std::pair<int64_t, int64_t>> there;
  for (int64_t i = 0; i < shape.n * shape.k; ++i)
    if (weight.dense[static_cast<size_t>(i)] != 0) there.insert({i / shape.k / size, i % shape.k / size});
  const auto present = static_cast<int64_t>(there.size());
  const int64_t bytes = present * size * size * bytes_of(shape.element),
                stored = weight.shape.stored * shape.stored_bytes();
  expect(shape.element == Element::int8 && size == 16 ? stored >= bytes && stored <= 2 * bytes : stored == bytes,
         text(stored, " bytes stored for ", bytes));
  std::set<uint32_t> parts;
  int64_t before = INT64_MAX;
  for (int64_t i = 0; i < shape.parts(); ++i) {
    const auto part = read<uint32_t>(weight, shape.order() + i * 4);
    parts.insert(part);
    if (part >= shape.parts() || size != blocks::kBlock) continue;
    const int64_t work = int64_t{read<uint32_t>(weight, shape.start() + part * 4 + 4)} -
                         read<uint32_t>(weight, shape.start() + part * 4);
    expect(work <= before, text("part ", part, " comes too late"));
    before = work;
  }
  expect(static_cast<int64_t>(parts.size()) == shape.parts() && *parts.rbegin() == shape.parts() - 1,
         "not each part once");
}

void test_refused() {
  const uint8_t mask[2] = {5, 1};
  const int8_t values[4] = {1, 2, 3, -128};
  const auto pack = [&](int64_t count, int size, int64_t n, int64_t k) {
    return blocks::pack(mask, values, count, Element::int8, size, n, k);
  };
  begin("blocks: what is refused");
  const blocks::Packed packed = pack(3, 16, 2, 3);
  refuses("too few values", [&] { pack(2, 16, 2, 3); });
  refuses("too many values, one of them -128", [&] { pack(4, 16, 2, 3); });
  refuses("blocks of size 48", [&] { pack(3, 48, 2, 3); });
  refuses("no channels", [&] { pack(0, 16, 0, 3); });
  refuses("k too large", [&] { pack(0, 16, 1, 65537); });
  const auto bytes = static_cast<int64_t>(packed.bytes.size());
  const auto with = [&](auto&& change, int64_t fewer = 0) {
    blocks::Shape shape = packed.shape;
    change(shape);
    blocks::check_packed(shape, bytes - fewer);
  };
  with([](blocks::Shape&) {});
  expect(bytes % 16 == 0, "a length that is no multiple of 16");
  refuses("a buffer of no k", [&] { with([](blocks::Shape& shape) { shape.k = 0; }); });
  refuses("blocks of another size", [&] { with([](blocks::Shape& shape) { shape.size = 48; }); });
  refuses("more channels than fit", [&] { with([](blocks::Shape& shape) { shape.n = 100000; }); });
  refuses("more blocks than fit", [&] { with([](blocks::Shape& shape) { shape.stored += 4; }); });
  refuses("a buffer that is too short", [&] { with([](blocks::Shape&) {}, 64); });

  BlockCase c({Element::bfloat16, 64, 5, 40}, 3, Present::all);
  uint16_t y[15];
  const auto run = [&](auto&& change, const char* kernel = nullptr) {
    blocks::Problem p = c.problem(y, Type::bfloat16);
    change(p);
    blocks::linear(p, kernel != nullptr ? &blocks::kernel_named(kernel) : nullptr);
  };
  run([](blocks::Problem& p) { p.m = 0, p.y = nullptr; });
  run([](blocks::Problem&) {});
  for (int i = 0; i < 15; ++i) expect(y[i] == half_bits(c.sum(i / 5, i % 5), Type::bfloat16), text("sum ", i));
  refuses("x of another type", [&] { run([](blocks::Problem& p) { p.y_type = Type::float16; }); });
  refuses("rows that are not aligned", [&] { run([](blocks::Problem& p) { p.ldx += 4; }); });
  refuses("x that is not aligned", [&] { run([](blocks::Problem& p) { p.x = static_cast<const char*>(p.x) + 8; }); });
  refuses("a kernel of another type", [&] { run([](blocks::Problem&) {}, "sm80_f16_64x64"); });
  refuses("a kernel of another size", [&] { run([](blocks::Problem&) {}, "sm80_bf16_128x64"); });
  refuses("an unknown kernel", [&] { run([](blocks::Problem&) {}, "sm80_bf16_48x64"); });
}

void test_dispatch() {
  for (const Element element : kElements)
    for (const int size : {64, 32, 16})
      for (const int arch : {80, 86, 89, 90, 100, 120})
        for (const int64_t m : {1, 16, 64, 512, 4096}) {
          blocks::Shape shape{element, size, 4096, 4096};
          shape.stored = 4096 * 4096 * bytes_of(element) / 5 / shape.stored_bytes();
          const blocks::Kernel& kernel = blocks::chosen_kernel(shape, m, arch, 132);
          begin(text("blocks dispatch ", kernel.name, " size=", size, " arch=", arch, " m=", m));
          expect(kernel.element == element && (kernel.size == 64) == (size == 64), "of another weight");
          expect(kernel.arch <= arch && (kernel.arch != 90 || arch == 90), "of another device");
          expect(kernel.shared <= 99 * 1024 || (arch != 86 && arch != 89 && arch != 120), "too much shared memory");
          expect(m > 16 || kernel.bm <= 64, "wastes most of its rows");
          expect(m < 4096 || kernel.bm >= 128, "too small");
        }
  refuses("blocks dispatch: compute capability 7.5",
          [] { blocks::chosen_kernel({Element::int8, 64, 64, 64, 1}, 1, 75, 40); });
}

// Each tile once, whatever the groups and the blocks of threads; the tiles of a group together.
void test_schedule() {
  for (const int parts : {1, 5, 64})
    for (const int tiles_m : {1, 7, 8})
      for (const int group : {1, 3, 8}) {
        const blocks::Schedule schedule{parts, tiles_m, std::min(group, tiles_m)};
        for (const int64_t threads : {1, 4, 132}) {
          begin(text("blocks schedule parts=", parts, " tiles=", tiles_m, " group=", group, " blocks=", threads));
          std::set<std::pair<int, int>> seen;
          int64_t count = 0;
          for (int64_t mine = 0; mine < threads; ++mine)
            schedule.for_each(mine, threads, [&](blocks::Schedule::Tile tile) {
              expect(tile.rank >= 0 && tile.rank < parts && tile.m >= 0 && tile.m < tiles_m, "no such tile");
              seen.emplace(tile.rank, tile.m);
              ++count;
            });
          expect(count == schedule.count() && static_cast<int64_t>(seen.size()) == count, "a tile twice, or left out");
        }
        for (int64_t i = 1; i < schedule.count(); ++i) {
          const auto before = schedule.tile(i - 1), here = schedule.tile(i);
          const bool same = here.m / schedule.group == before.m / schedule.group;
          expect(same ? here.rank >= before.rank : here.m > before.m && here.rank == 0, "not in descending order");
        }
      }
}

// --- the kernels
// --------------------------------------------------------------------------------------------------------

std::vector<uint8_t> run(const blocks::Kernel& kernel, BlockCase& c, Type type, const float* bias,
                         Activation activation) {
  Guarded<uint8_t> y(size(c.m * c.weight.shape.n) * size_of(type));
  y.fill(emulate::kPoison);
  blocks::Problem p = c.problem(y.data(), type);
  p.bias = bias, p.activation = activation;
  blocks::linear(p, &kernel);
  expect(y.intact(), "a store outside of y");
  return {y.data(), y.data() + y.size()};
}

// Of integers every sum is exact, so y is known to the bit.
std::vector<uint8_t> expected_of(const BlockCase& c, Type type, const float* bias, Activation activation) {
  const int64_t n = c.weight.shape.n;
  std::vector<uint8_t> y(size(c.m * n) * size_of(type));
  if (c.is_int8()) {
    std::vector<int32_t> sums;
    for (int64_t i = 0; i < c.m * n; ++i) sums.push_back(static_cast<int32_t>(c.sum(i / n, i % n)));
    const std::vector<int32_t> corrected(size(n), 0);  // the sums have the zero point in them
    const int8::Epilogue epilogue{corrected.data(),   c.scale.data(),      bias,       0,
                                  c.row_scale.data(), c.zero_point.data(), activation, type};
    int8::kScalar.finish(sums.data(), static_cast<int>(n), static_cast<int>(c.m), static_cast<int>(n), epilogue,
                         y.data(), n);
    return y;
  }
  for (int64_t i = 0; i < c.m * n; ++i) {
    const double sum = c.sum(i / n, i % n) + (bias != nullptr ? static_cast<double>(bias[i % n]) : 0);
    const float value = activate(activation, Scalar{static_cast<float>(sum)}).value;
    const uint16_t bits = half_bits(static_cast<double>(value), type);
    std::memcpy(y.data() + i * 2, &bits, 2);
  }
  return y;
}

void check_exact(const blocks::Kernel& kernel, BlockCase& c, Type type, bool with_bias = false,
                 Activation activation = Activation::none) {
  begin(text(kernel.name, " ", c.name(), " y=", static_cast<int>(type), " bias=", with_bias,
             " activation=", static_cast<int>(activation)));
  const float* bias = with_bias ? c.bias.data() : nullptr;
  const std::vector<uint8_t> y = run(kernel, c, type, bias, activation),
                             expected = expected_of(c, type, bias, activation);
  const size_t width = size_of(type);
  int64_t wrong = 0;
  for (size_t i = 0; i < y.size(); i += width) wrong += !std::equal(&y[i], &y[i] + width, &expected[i]);
  expect(wrong == 0, text(wrong, " of ", y.size() / width, " values differ"));
}

// Random values: within the bound of csrc/sparse/blocks/cuda.h.
void check_bound(const blocks::Kernel& kernel, const blocks::Shape& shape) {
  BlockCase c(shape, std::min(kernel.bm, 40), Present::half, Content::reals);
  begin(text(kernel.name, " ", c.name(), " against float64"));
  const Type type = type_of(shape.element);
  const std::vector<uint8_t> y = run(kernel, c, type, nullptr, Activation::none);
  const double relative = 0x1p-23 * (17 * (std::ceil(static_cast<double>(shape.k) / 16) + 1) + 8);
  int64_t wrong = 0;
  for (int64_t i = 0; i < c.m * shape.n; ++i) {
    uint16_t bits;
    std::memcpy(&bits, y.data() + i * 2, 2);
    double magnitude;
    const double expected = c.sum(i / shape.n, i % shape.n, &magnitude),
                 got = static_cast<double>(half_value(bits, type));
    wrong += !(std::fabs(got - expected) <= relative * magnitude + unit_roundoff(type) * std::fabs(expected));
  }
  expect(wrong == 0, text(wrong, " values outside the bound"));
}

void check_orders(const blocks::Kernel& kernel, BlockCase& c, Type type) {
  for (const emulate::Order order : {emulate::Order::descending, emulate::Order::random}) {
    emulate::options.threads = order;
    emulate::options.tiles = order == emulate::Order::random ? emulate::Landing::random : emulate::Landing::early;
    emulate::options.reversed_blocks = order == emulate::Order::descending;
    check_exact(kernel, c, type);
    emulate::options = {};
  }
}

std::set<int64_t> edges(int64_t tile) { return {1, tile - 1, tile, tile + 1, 2 * tile + 3}; }

void check_kernel(const blocks::Kernel& kernel, int size) {
  const Element element = kernel.element;
  const bool is_int8 = element == Element::int8;
  const Type plain = is_int8 ? Type::int32 : type_of(element);
  const auto shape = [&](int64_t n, int64_t k) { return blocks::Shape{element, size, n, k}; };
  const int64_t step = shape(1, 1).step_bytes() / bytes_of(element);
  for (const int64_t m : edges(kernel.bm)) {
    BlockCase c(shape(37, step + 9), m, Present::half);
    check_exact(kernel, c, plain);
  }
  for (const int64_t n : edges(kernel.bn)) {
    BlockCase c(shape(n, step), 5, n % 2 != 0 ? Present::half : Present::uneven);
    check_exact(kernel, c, plain);
  }
  for (const int64_t edge : {int64_t{size}, step})
    for (const int64_t k : edges(edge)) {
      BlockCase c(shape(44, k), 3, k % 2 != 0 ? Present::half : Present::all);
      check_exact(kernel, c, plain);
    }
  const int64_t deep = step * (kernel.stages + 3) + 5;  // the ring goes round
  for (const Present present : {Present::none, Present::all, Present::uneven}) {
    BlockCase c(shape(3 * size + 1, deep), 9, present, Content::extremes);
    check_exact(kernel, c, plain);
    if (present == Present::uneven) check_orders(kernel, c, plain);
  }
  BlockCase vectors(shape(2 * kernel.bn, deep), kernel.bm + 1, Present::uneven), some(shape(22, 70), 11, Present::half);
  check_exact(kernel, vectors, is_int8 ? Type::bfloat16 : plain, true);
  for (const Type type : {Type::float32, Type::bfloat16, Type::float16})
    for (int activation = 0; activation < 5; ++activation)
      if (is_int8 || type == plain)
        check_exact(kernel, some, type, activation % 2 == 0, static_cast<Activation>(activation));
  if (!is_int8) check_bound(kernel, shape(kernel.bn + 7, 3 * step + 24));
}

}  // namespace

void test_cuda_blocks() {
  for (const Element element : kElements)
    for (const int size : {64, 32, 16}) {
      for (const int64_t n : {1, 15, 33, 64, 129, 300})
        for (const int64_t k : {1, 16, 65, 200})
          test_unpack({element, size, n, k}, n % 2 == 0 ? Present::half : Present::all);
      test_unpack({element, size, 70, 90}, Present::none);
      test_index({element, size, 300, 1000});
      test_index({element, size, 1024, 256});
    }
  test_refused();
  test_dispatch();
  test_schedule();
  int count = 0;
  const blocks::Kernel* all = blocks::kernels(&count);
  for (int i = 0; i < count; ++i) {
    if (all[i].size == blocks::kBlock) check_kernel(all[i], 64);
    if (all[i].size == blocks::kBlock) continue;
    check_kernel(all[i], 32);
    check_kernel(all[i], 16);
  }
}

}  // namespace native
