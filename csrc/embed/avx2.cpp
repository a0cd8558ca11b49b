// AVX2: a row is summed, normalized and rounded in the L1, eight floats at a time. With three tables that is 20 loads,
// adds and stores for eight floats, some 200 cycles for d = 384: for rows from memory the bandwidth binds.
#include "../common/avx2_vector.h"
#include "kernel_list.h"
#include "row.h"

namespace pycompress::embed {
namespace {

using V = Vector;

template <Type kType, bool kFirst>
void add_as(const void* x, int64_t d, float* sums) {
  int64_t i = 0;
  for (; i + 8 <= d; i += 8) {
    const V value{load_floats<kType>(x, i)};
    (kFirst ? value : V::load(sums + i) + value).store(sums + i);
  }
  if (i == d) return;
  const V value{load_tail<kType>(x, i, static_cast<int>(d - i))};  // sums are padded
  (kFirst ? value : V::load(sums + i) + value).store(sums + i);
}

template <bool kFirst>
void add_int8(const void* x, const float* scale, int64_t d, float* sums) {
  const V factor = V::of(*scale);
  for (int64_t i = 0; i < d; i += 8) {
    int64_t eight = 0;
    __builtin_memcpy(&eight, static_cast<const int8_t*>(x) + i, static_cast<size_t>(d - i < 8 ? d - i : 8));
    const V value{_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_cvtsi64_si128(eight)))};
    (kFirst ? value * factor : V::load(sums + i) + value * factor).store(sums + i);
  }
}

template <bool kFirst>
void add(const Row& row, int part) {
  const void* x = row.part[part];
  const Type type = row.type[part];
  if (row.scale[part] != nullptr) return add_int8<kFirst>(x, row.scale[part], row.d, row.sums);
  if (type == Type::float32) add_as<Type::float32, kFirst>(x, row.d, row.sums);
  if (type == Type::bfloat16) add_as<Type::bfloat16, kFirst>(x, row.d, row.sums);
  if (type == Type::float16) add_as<Type::float16, kFirst>(x, row.d, row.sums);
}

void run(const Row& row) {
  add<true>(row, 0);
  for (int part = 1; part < row.parts; ++part) add<false>(row, part);
  if (row.weight != nullptr) normalize<V>(row, [](float x) { return _mm_cvtss_f32(_mm_sqrt_ss(_mm_set_ss(x))); });
  put_floats(row.sums, row.d, row.y, row.y_type);
}

}  // namespace

const Kernel kAvx2{"avx2", Isa::avx2, 1, 8, 1, run};

}  // namespace pycompress::embed
