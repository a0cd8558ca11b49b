// The matrix instructions of a warp against the PTX ISA (9.1): each element's place in a fragment is computed from the
// formulas that stand there, in their own form, and every check of the emulation is made to fail once.
#include <limits>

#include "../report.h"
#include "emulate_test.h"

namespace native {
namespace {

using namespace pycompress::gpu;

// 9.7.14.5.10, m16n8k32 with .s8: element i of 16 (a), 8 (b) and 4 (c).
int row_a(int lane, int i) { return (i < 4 || (8 <= i && i < 12)) ? lane >> 2 : (lane >> 2) + 8; }
int column_a(int lane, int i) { return lane % 4 * 4 + (i & 3) + (i < 8 ? 0 : 16); }
int row_b(int lane, int i) { return lane % 4 * 4 + (i & 3) + (i < 4 ? 0 : 16); }
int column_b(int lane, int) { return lane >> 2; }
int row_c(int lane, int i) { return i < 2 ? lane >> 2 : (lane >> 2) + 8; }
int column_c(int lane, int i) { return lane % 4 * 2 + (i & 1); }
// 9.7.14.5.8, m16n8k16 with .f16 and .bf16: element i of 8 (a) and 4 (b); c as above.
int row_a16(int lane, int i) { return ((0 <= i && i < 2) || (4 <= i && i < 6)) ? lane >> 2 : (lane >> 2) + 8; }
int column_a16(int lane, int i) { return lane % 4 * 2 + (i & 1) + (i < 4 ? 0 : 8); }
int row_b16(int lane, int i) { return lane % 4 * 2 + (i & 1) + (i < 2 ? 0 : 8); }

int value(int i, int j) { return (i * 37 + j * 11) % 255 - 127; }

void mma_s8_kernel(int32_t* c) {
  const auto lane = static_cast<int>(threadIdx.x);
  int8_t a[16], b[8];
  int32_t fragment[4];
  for (int i = 0; i < 16; ++i) a[i] = static_cast<int8_t>(value(row_a(lane, i), column_a(lane, i)));
  for (int i = 0; i < 8; ++i) b[i] = static_cast<int8_t>(value(column_b(lane, i) + 50, row_b(lane, i)));
  for (int i = 0; i < 4; ++i) fragment[i] = row_c(lane, i) * 8 + column_c(lane, i);
  uint32_t registers_a[4], registers_b[2];
  std::memcpy(registers_a, a, sizeof(a));
  std::memcpy(registers_b, b, sizeof(b));
  mma_s8(fragment, registers_a, registers_b[0], registers_b[1]);
  for (int i = 0; i < 4; ++i) c[row_c(lane, i) * 8 + column_c(lane, i)] = fragment[i];
}

void test_mma_s8() {
  begin("emulation: mma.m16n8k32.s8");
  int32_t c[128];
  emulate::launch(1, 32, 0, mma_s8_kernel, c);
  for (int m = 0; m < 16; ++m)
    for (int n = 0; n < 8; ++n) {
      int32_t sum = m * 8 + n;
      for (int k = 0; k < 32; ++k) sum += value(m, k) * value(n + 50, k);
      expect(c[m * 8 + n] == sum, text("row ", m, " column ", n));
    }
}

template <class T>
void mma_16_kernel(float* c) {
  const auto lane = static_cast<int>(threadIdx.x);
  T a[8], b[4];
  float fragment[4] = {0.5f, 0.5f, 0.5f, 0.5f};
  for (int i = 0; i < 8; ++i) a[i] = T(static_cast<float>(value(row_a16(lane, i), column_a16(lane, i))));
  for (int i = 0; i < 4; ++i) b[i] = T(static_cast<float>(value(column_b(lane, i) + 50, row_b16(lane, i))));
  uint32_t registers_a[4], registers_b[2];
  std::memcpy(registers_a, a, sizeof(a));
  std::memcpy(registers_b, b, sizeof(b));
  if constexpr (std::is_same_v<T, __half>)
    mma_f16(fragment, registers_a, registers_b[0], registers_b[1]);
  else
    mma_bf16(fragment, registers_a, registers_b[0], registers_b[1]);
  for (int i = 0; i < 4; ++i) c[row_c(lane, i) * 8 + column_c(lane, i)] = fragment[i];
}

template <class T>
void test_mma_16(const char* type) {
  begin(text("emulation: mma.m16n8k16.", type));
  float c[128];
  emulate::launch(1, 32, 0, mma_16_kernel<T>, c);
  for (int m = 0; m < 16; ++m)
    for (int n = 0; n < 8; ++n) {
      float sum = 0.5f;  // all values and sums are exact in float32, the operands in both types
      for (int k = 0; k < 16; ++k) sum += static_cast<float>(value(m, k) * value(n + 50, k));
      expect(c[m * 8 + n] == sum, text("row ", m, " column ", n));
    }
}

// 9.7.14.5.15: lane i of four consecutive ones that load a row gets its elements 2 (i % 4) and the next.
template <bool kTransposed>
void ldmatrix_kernel(uint32_t (*registers)[4]) {
  const auto lane = static_cast<int>(threadIdx.x);
  auto* rows = reinterpret_cast<uint16_t*>(dynamic_shared());
  for (int i = 0; i < 8; ++i) rows[lane * 8 + i] = static_cast<uint16_t>(lane * 8 + i);
  __syncwarp();
  if constexpr (kTransposed)
    load_matrices_transposed(registers[lane], rows + lane * 8);
  else
    load_matrices(registers[lane], rows + lane * 8);
}

void test_ldmatrix() {
  begin("emulation: ldmatrix");
  uint32_t plain[32][4], transposed[32][4];
  emulate::launch(1, 32, 512, ldmatrix_kernel<false>, plain);
  emulate::launch(1, 32, 512, ldmatrix_kernel<true>, transposed);
  for (unsigned lane = 0; lane < 32; ++lane)
    for (unsigned matrix = 0; matrix < 4; ++matrix) {
      const unsigned first = matrix * 64 + lane / 4 * 8 + lane % 4 * 2, across = matrix * 64 + lane % 4 * 16 + lane / 4;
      expect(plain[lane][matrix] == (first | (first + 1) << 16), text("lane ", lane));
      expect(transposed[lane][matrix] == (across | (across + 8) << 16), text("transposed, lane ", lane));
    }
}

// 9.7.14.6.2: element i of a's 8 (halves) or 16 (bytes) is one of those that are stored of a chunk of four: of row
// groupID or groupID + 8 as without sparsity, of columns firstcol to lastcol, each chunk's in order.
template <class T>
int row_of_stored(int lane, int i) {
  return std::is_same_v<T, int8_t> ? row_a(lane, i) : row_a16(lane, i);
}
template <class T>
int first_column(int lane, int i) {
  const int thread_in_group = lane % 4;
  if constexpr (std::is_same_v<T, int8_t>)  // m16n8k64: eight columns, two chunks
    return (i < 8 ? thread_in_group * 8 : thread_in_group * 8 + 32) + i % 4 / 2 * 4;
  else  // m16n8k32: four columns
    return i < 4 ? thread_in_group * 4 : thread_in_group * 4 + 16;
}
// Element i of b's 8 (m16n8k32) or 16 (m16n8k64).
template <class T>
int row_of_b(int lane, int i) {
  constexpr int kPart = 4 / static_cast<int>(sizeof(T));  // elements of a register
  return lane % 4 * kPart + i % kPart + i / kPart * (4 * kPart);
}

template <class T>
uint32_t lanes_metadata(int lane, int selector) {
  if constexpr (std::is_same_v<T, int8_t>)
    return metadata_of_bytes(lane, 0, 0);
  else
    return metadata_of_halves(lane, 0, 0, selector);
}

template <class T>
using SumOf = std::conditional_t<std::is_same_v<T, int8_t>, int32_t, float>;

template <class T, int kSelector>
void multiply_sparse(SumOf<T> (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[4], uint32_t metadata) {
  if constexpr (std::is_same_v<T, int8_t>)
    mma_sp_s8(c, a, b, metadata);
  else if constexpr (std::is_same_v<T, __half>)
    mma_sp_f16<kSelector>(c, a, b, metadata);
  else
    mma_sp_bf16<kSelector>(c, a, b, metadata);
}

template <class T>
T typed(int value) {
  if constexpr (std::is_same_v<T, int8_t>)
    return static_cast<int8_t>(value);
  else
    return T(static_cast<float>(value));
}

template <class T>
constexpr int kDepth = 64 / static_cast<int>(sizeof(T));  // k of one instruction

template <class T, int kSelector>
void mma_sp_kernel(SumOf<T>* c) {
  const auto lane = static_cast<int>(threadIdx.x);
  constexpr int kStored = 16 / static_cast<int>(sizeof(T));  // a thread's elements of a, and of b
  T a[kStored], b[kStored];
  SumOf<T> fragment[4];
  for (int i = 0; i < kStored; ++i) {
    const int row = row_of_stored<T>(lane, i), k = first_column<T>(lane, i);
    a[i] = typed<T>(element_value(row, k + stored_positions(row, k / 4)[static_cast<size_t>(i % 2)]));
    b[i] = typed<T>(element_value(100 + column_b(lane, i), row_of_b<T>(lane, i)));
  }
  for (int i = 0; i < 4; ++i) fragment[i] = static_cast<SumOf<T>>(row_c(lane, i) * 8 + column_c(lane, i));
  uint32_t registers_a[4], registers_b[4];
  std::memcpy(registers_a, a, sizeof(a));
  std::memcpy(registers_b, b, sizeof(b));
  multiply_sparse<T, kSelector>(fragment, registers_a, registers_b, lanes_metadata<T>(lane, kSelector));
  for (int i = 0; i < 4; ++i) c[row_c(lane, i) * 8 + column_c(lane, i)] = fragment[i];
}

template <class T, int kSelector>
void test_mma_sp(const char* name) {
  begin(text("emulation: ", name, " selector ", kSelector));
  SumOf<T> c[128];
  emulate::launch(1, 32, 0, mma_sp_kernel<T, kSelector>, c);
  for (int m = 0; m < 16; ++m)
    for (int n = 0; n < 8; ++n) {
      int sum = m * 8 + n;  // exact in float32 too
      for (int k = 0; k < kDepth<T>; ++k) sum += dense_value(m, k) * element_value(100 + n, k);
      expect(c[m * 8 + n] == static_cast<SumOf<T>>(sum), text("row ", m, " column ", n));
    }
}

// Infinities where b meets nothing that is stored of a: they are in no sum.
void unselected_kernel(float* c) {
  const __nv_bfloat16 one(1.0f), infinity(std::numeric_limits<float>::infinity());
  const __nv_bfloat16 a[8] = {one, one, one, one, one, one, one, one};
  const bool selected = threadIdx.x % 2 == 0;  // k 2t and 2t + 1: positions 0, 1 of groups, or 2, 3
  __nv_bfloat16 b[8];
  for (__nv_bfloat16& value : b) value = selected ? one : infinity;
  float fragment[4] = {};
  uint32_t registers_a[4], registers_b[4];
  std::memcpy(registers_a, a, sizeof(a));
  std::memcpy(registers_b, b, sizeof(b));
  mma_sp_bf16<0>(fragment, registers_a, registers_b, 0x44444444);
  for (int i = 0; i < 4; ++i) c[threadIdx.x * 4 + i] = fragment[i];
}

void test_unselected() {
  begin("emulation: what mma.sp does not select of b");
  float c[128];
  emulate::launch(1, 32, 0, unselected_kernel, c);
  for (const float sum : c) expect(sum == 16, text(sum));
}

// One group's bits of one lane, in a product that is valid but for them.
template <class T>
void metadata_kernel(uint32_t bits, int group, int at) {
  const auto lane = static_cast<int>(threadIdx.x);
  uint32_t metadata = lanes_metadata<T>(lane, 0);
  if (lane == at) metadata = (metadata & ~(15u << 4 * group)) | bits << 4 * group;
  SumOf<T> c[4] = {};
  multiply_sparse<T, 0>(c, {0, 0, 0, 0}, {0, 0, 0, 0}, metadata);
}

// All 16 values of four bits: the six ascending pairs are accepted, the others refused.
template <class T>
void test_metadata(const char* name) {
  for (uint32_t bits = 0; bits < 16; ++bits) {
    const bool valid = (bits & 3) < bits >> 2;
    const auto launch = [bits] {
      emulate::launch(1, 32, 0, metadata_kernel<T>, bits, static_cast<int>(bits % 8), 4 + static_cast<int>(bits % 2));
    };
    const std::string what = text("emulation: ", name, " metadata ", bits);
    if (!valid) {
      refuses(what, launch);
      continue;
    }
    begin(what);
    launch();
  }
}

void selector_kernel() {
  float c[4] = {};
  mma_sp_f16<2>(c, {0, 0, 0, 0}, {0, 0, 0, 0}, 0x44444444);
}
void unlike_selectors_kernel() {
  float c[4] = {};
  if (threadIdx.x % 4 < 2) mma_sp_f16<0>(c, {0, 0, 0, 0}, {0, 0, 0, 0}, 0x44444444);
  if (threadIdx.x % 4 >= 2) mma_sp_f16<1>(c, {0, 0, 0, 0}, {0, 0, 0, 0}, 0x44444444);
}
void sparse_and_dense_kernel() {
  float c[4] = {};
  if (threadIdx.x < 16) mma_sp_bf16<0>(c, {0, 0, 0, 0}, {0, 0, 0, 0}, 0x44444444);
  if (threadIdx.x >= 16) mma_bf16(c, {0, 0, 0, 0}, 0, 0);
}
void unlike_kernel() {
  uint32_t r[4];
  int32_t c[4] = {};
  if (threadIdx.x % 2) load_matrices(r, dynamic_shared());
  if (threadIdx.x % 2 == 0) mma_s8(c, {0, 0, 0, 0}, 0, 0);
}
void unaligned_row_kernel() {
  uint32_t r[4];
  load_matrices(r, dynamic_shared() + 8);
}
void row_outside_kernel() {
  uint32_t r[4];
  load_matrices(r, dynamic_shared() + 16);
}

void test_failures() {
  refuses("emulation: lanes at different matrix instructions", [] { emulate::launch(1, 32, 16, unlike_kernel); });
  refuses("emulation: lanes at a sparse and a dense one", [] { emulate::launch(1, 32, 0, sparse_and_dense_kernel); });
  refuses("emulation: lanes of unlike selectors", [] { emulate::launch(1, 32, 0, unlike_selectors_kernel); });
  refuses("emulation: sparsity selector 2", [] { emulate::launch(1, 32, 0, selector_kernel); });
  refuses("emulation: an unaligned row of ldmatrix", [] { emulate::launch(1, 32, 32, unaligned_row_kernel); });
  refuses("emulation: a row of ldmatrix outside", [] { emulate::launch(1, 32, 16, row_outside_kernel); });
}

}  // namespace

void test_emulation_mma() {
  test_mma_s8();
  test_mma_16<__half>("f16");
  test_mma_16<__nv_bfloat16>("bf16");
  test_ldmatrix();
  test_mma_sp<int8_t, 0>("mma.sp.m16n8k64.s8");
  test_mma_sp<__half, 0>("mma.sp.m16n8k32.f16");
  test_mma_sp<__half, 1>("mma.sp.m16n8k32.f16");
  test_mma_sp<__nv_bfloat16, 0>("mma.sp.m16n8k32.bf16");
  test_mma_sp<__nv_bfloat16, 1>("mma.sp.m16n8k32.bf16");
  test_unselected();
  test_metadata<int8_t>("s8");
  test_metadata<__half>("f16");
  test_failures();
}

}  // namespace native
