// Embeddings and means: every kernel against the specification, to the bit, operands against guard pages; and the ways
// of the ids through the driver.
#include "embed/embed.h"

#include <algorithm>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "cases.h"
#include "common/float16.h"
#include "common/partials.h"
#include "common/round.h"
#include "embed/kernel_list.h"
#include "guarded.h"
#include "pool/kernel_list.h"
#include "report.h"

namespace native {
namespace {

using namespace pycompress;

// Floats of a type that end at a page.
struct Row {
  Type type;
  Guarded<uint8_t> bytes;
  Row(Type type_, int64_t d, std::mt19937& random) : type(type_), bytes(static_cast<size_t>(d) * size_of(type_)) {
    std::normal_distribution<float> normal;
    for (int64_t i = 0; i < d; ++i) put_float(bytes.data(), type, i, normal(random));
  }
};

void run_embed(const embed::Kernel& kernel, int64_t d, Type type, int parts, bool norm, bool integers) {
  begin(text("embed kernel=", kernel.name, " d=", d, " type=", static_cast<int>(type), " parts=", parts, " norm=", norm,
             " integers=", integers));
  std::mt19937 random(static_cast<unsigned>(cases));
  const auto padded = static_cast<size_t>(round_up<int64_t>(d, kPartials));
  Row first(type, d, random), second(Type::float32, d, random), third(type, d, random);
  Guarded<int8_t> values(static_cast<size_t>(d));
  for (size_t i = 0; i < values.size(); ++i) values[i] = static_cast<int8_t>(random() % 255 - 127);
  const float scale = 0.013f;
  Guarded<float> weight(padded), shift(padded), sums(padded);
  for (Guarded<float>* all : {&weight, &shift, &sums}) std::fill_n(all->data(), padded, 0.0f);
  for (size_t i = 0; i < static_cast<size_t>(d); ++i) weight[i] = 1.0f + static_cast<float>(i % 7), shift[i] = -0.5f;
  Guarded<uint8_t> y(static_cast<size_t>(d) * size_of(type)), expected(y.size());
  const void* words = integers ? static_cast<const void*>(values.data()) : first.bytes.data();
  embed::Row row{{words, second.bytes.data(), third.bytes.data()},
                 {type, Type::float32, type},
                 {integers ? &scale : nullptr, nullptr, nullptr},
                 parts,
                 d,
                 norm ? weight.data() : nullptr,
                 shift.data(),
                 1e-5f,
                 sums.data(),
                 expected.data(),
                 type};
  embed::kScalar.run(row);
  for (int again = 0; again < 2; ++again) {  // what is left in the scratch changes nothing
    row.y = y.data();
    kernel.run(row);
    expect(all_equal(y.data(), expected.data(), y.size()) && y.intact() && sums.intact(), "run");
  }
}

void run_pool(const pool::Kernel& kernel, int64_t d, Type type, bool normalize) {
  begin(text("pool kernel=", kernel.name, " d=", d, " type=", static_cast<int>(type), " normalize=", normalize));
  std::mt19937 random(static_cast<unsigned>(cases));
  const auto padded = static_cast<size_t>(round_up<int64_t>(d, kPartials));
  const auto mean = [&](const pool::Kernel& of, Guarded<uint8_t>& y) {
    std::mt19937 same_again(static_cast<unsigned>(cases));
    Guarded<float> sums(padded);
    std::fill_n(sums.data(), padded, 0.0f);
    for (const float mask : {1.0f, 0.0f, 1.0f, 0.25f})
      of.add(Row(type, d, same_again).bytes.data(), type, d, mask, sums.data());
    of.finish(sums.data(), d, 2.25f, normalize, y.data(), type);
    expect(y.intact() && sums.intact(), "around y and sums");
  };
  Guarded<uint8_t> y(static_cast<size_t>(d) * size_of(type)), expected(y.size());
  mean(pool::kScalar, expected);
  mean(kernel, y);
  expect(all_equal(y.data(), expected.data(), y.size()), "mean");
}

// Ids of either size, broadcast, counted, too large: for one thread and two.
void run_driver(int64_t batch, int64_t length, int threads) {
  begin(text("embed batch=", batch, " length=", length, " threads=", threads));
  constexpr int64_t d = 5;
  std::mt19937 random(7);
  const int64_t rows = batch * length;
  Guarded<float> words(10 * d), places(static_cast<size_t>((length + 2) * d)), y(static_cast<size_t>(rows * d));
  for (Guarded<float>* table : {&words, &places})
    for (size_t i = 0; i < table->size(); ++i) (*table)[i] = static_cast<float>(random() % 1000);
  Guarded<int64_t> tokens(static_cast<size_t>(rows));
  Guarded<int32_t> kind(static_cast<size_t>(length));
  for (size_t i = 0; i < tokens.size(); ++i) tokens[i] = static_cast<int64_t>(random() % 10);
  for (size_t i = 0; i < kind.size(); ++i) kind[i] = static_cast<int32_t>(random() % 10);
  embed::Problem p{};
  p.tables = 3;
  p.table[0] = p.table[1] = {words.data(), Type::float32, 10, d, nullptr};
  p.table[2] = {places.data(), Type::float32, length + 2, d, nullptr};
  p.ids[0] = {tokens.data(), true, length, 1};
  p.ids[1] = {kind.data(), false, 0, 1};
  p.ids[2] = {nullptr, true, 0, 0};
  p.counts = true, p.padding = 1, p.batch = batch, p.length = length, p.d = d;
  p.y = y.data(), p.type = Type::float32, p.threads = threads;
  embed::embed(p);
  bool right = true;
  for (int64_t b = 0, counted = 0; b < batch; ++b, counted = 0)
    for (int64_t l = 0; l < length; ++l) {
      const int64_t token = tokens[static_cast<size_t>(b * length + l)];
      const int64_t place = token == 1 ? 1 : 1 + ++counted;
      for (int64_t i = 0; i < d; ++i) {
        const float sum = words[static_cast<size_t>(token * d + i)] +
                          words[static_cast<size_t>(kind[static_cast<size_t>(l)] * d + i)] +
                          places[static_cast<size_t>(place * d + i)];
        right = right && y[static_cast<size_t>((b * length + l) * d + i)] == sum;
      }
    }
  expect(right && y.intact(), "sums");
  if (rows == 0) return;
  tokens[tokens.size() - 1] = 10;
  std::string message;
  try {
    embed::embed(p);
  } catch (const std::out_of_range& error) {
    message = error.what();
  }
  expect(message.find("10 among the ids of table 0, expected 0 to 9") != std::string::npos, "an id without a row");
}

}  // namespace

void test_embed() {
  const std::vector<int64_t> widths{1, 7, 8, 9, 31, 32, 33, 67, 384};
  for_available(embed::kernels(), [&](const embed::Kernel& kernel) {
    for (const int64_t d : widths)
      for (const Type type : {Type::float32, Type::bfloat16, Type::float16})
        for (const int parts : {1, 2, 3})
          for (const bool norm : {false, true})
            for (const bool integers : {false, true}) run_embed(kernel, d, type, parts, norm, integers);
  });
  for (const int threads : {1, 2})
    for (const int64_t batch : {0, 1, 3, 200})
      for (const int64_t length : {1, 2, 9, 50}) run_driver(batch, length, threads);
}

void test_pool() {
  for_available(pool::kernels(), [](const pool::Kernel& kernel) {
    for (const int64_t d : {1, 7, 8, 9, 31, 32, 33, 67, 384})
      for (const Type type : {Type::float32, Type::bfloat16, Type::float16})
        for (const bool normalize : {false, true}) run_pool(kernel, d, type, normalize);
  });
}

}  // namespace native
