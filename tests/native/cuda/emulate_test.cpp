// The emulation against the PTX ISA (9.1): each element's place in a fragment is computed from the formulas that stand
// there, in their own form, and every check of the emulation is made to fail once.
#include "emulate.h"
#include "../report.h"
#include "int8_reference.h"

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

// Three groups of copies; what has not been waited for is poison, what lies behind `bytes` is zero.
void copies_kernel(const uint8_t* global, int* good) {
  uint8_t* shared = dynamic_shared();
  const auto poisoned = [](const uint8_t* p) {
    return std::all_of(p, p + 16, [](int v) { return v == emulate::kPoison; });
  };
  std::memset(shared, 0, 48);
  copy_async(shared, global);
  commit_copies();
  copy_async(shared + 16, global + 16, 5);
  commit_copies();
  copy_async(shared + 32, global + 32, 0);
  commit_copies();
  bool as_expected = poisoned(shared) && poisoned(shared + 16) && poisoned(shared + 32);
  wait_copies<2>();
  as_expected &= std::memcmp(shared, global, 16) == 0 && poisoned(shared + 16);
  wait_copies<1>();
  const uint8_t zeros[16] = {};
  as_expected &= std::memcmp(shared + 16, global + 16, 5) == 0 && std::memcmp(shared + 21, zeros, 11) == 0;
  as_expected &= poisoned(shared + 32);
  wait_copies<0>();
  as_expected &= std::memcmp(shared + 32, zeros, 16) == 0;
  *good += as_expected;
}

void test_copies() {
  begin("emulation: cp.async");
  alignas(16) uint8_t global[48];
  for (int i = 0; i < 48; ++i) global[i] = static_cast<uint8_t>(i + 1);
  int good = 0;
  emulate::launch(1, 1, 48, copies_kernel, global, &good);
  expect(good == 1, "the copies landed elsewhere, or at another time");
}

void warp_kernel(int* out) {
  const auto lane = static_cast<int>(threadIdx.x % 32);
  out[0] += __shfl_sync(~0u, lane, 5) == 5;
  out[1] += __shfl_xor_sync(~0u, lane, 3) == (lane ^ 3);
  out[2] += __shfl_down_sync(~0u, lane, 4) == (lane < 28 ? lane + 4 : lane);
  out[3] += __shfl_up_sync(~0u, lane, 4, 8) == (lane % 8 < 4 ? lane : lane - 4);
  out[4] += __ballot_sync(~0u, lane % 2) == 0xaaaaaaaau;
  out[5] += any_in_warp(lane == 31) && !any_in_warp(false) && __all_sync(~0u, 1) && !__all_sync(~0u, lane);
  if (lane < 16) out[6] += __shfl_sync(0xffffu, lane, lane ^ 1) == (lane ^ 1);
  out[7] += __syncthreads_count(lane < 3) == 6 && __syncthreads_or(lane == 9) && !__syncthreads_and(lane);
}

// Sums over a block in shared memory: static and dynamic, through atomics.
void block_kernel(int* total) {
  __shared__ int partial[64];
  auto* counter = reinterpret_cast<int*>(dynamic_shared());
  if (threadIdx.x == 0) *counter = 0;
  __syncthreads();
  partial[threadIdx.x] = static_cast<int>(threadIdx.x + blockIdx.x);
  atomicAdd(counter, 1);
  __syncthreads();
  if (threadIdx.x != 0) return;
  for (const int one : partial) *total += one;
  *total += *counter;
}

void test_threads() {
  for (const auto order : {emulate::Order::ascending, emulate::Order::descending, emulate::Order::random})
    for (const bool reversed : {false, true}) {
      begin(text("emulation: threads in order ", static_cast<int>(order), " reversed=", reversed));
      emulate::options.threads = order;
      emulate::options.reversed_blocks = reversed;
      int out[8] = {}, total = 0;
      emulate::launch(1, 64, 0, warp_kernel, out);
      for (int i = 0; i < 8; ++i) expect(out[i] == (i == 6 ? 32 : 64), text("warp operation ", i));
      emulate::launch(3, 64, 4, block_kernel, &total);
      expect(total == 3 * (63 * 32 + 64) + 64 * (0 + 1 + 2), "block");
    }
  emulate::options = {};
}

void divergent_kernel() { threadIdx.x < 16 ? __syncwarp() : void(__any_sync(~0u, 1)); }
void missing_kernel() {
  if (threadIdx.x < 32) __syncthreads();
}
void unaligned_kernel() { copy_async(dynamic_shared() + 8, dynamic_shared()); }
void outside_kernel(const void* global) { copy_async(dynamic_shared() + 16, global); }
void behind_kernel() { dynamic_shared()[16] = 1; }
void unwaited_kernel(const void* global) { copy_async(dynamic_shared(), global); }
void unlike_kernel() {
  uint32_t r[4];
  int32_t c[4] = {};
  if (threadIdx.x % 2) load_matrices(r, dynamic_shared());
  if (threadIdx.x % 2 == 0) mma_s8(c, {0, 0, 0, 0}, 0, 0);
}
void poison_kernel(int* poisoned) { *poisoned += dynamic_shared()[15] == emulate::kPoison; }

void test_failures() {
  alignas(16) const uint8_t global[16] = {};
  refuses("emulation: lanes at different instructions", [] { emulate::launch(1, 32, 0, divergent_kernel); });
  refuses("emulation: lanes at different matrix instructions", [] { emulate::launch(1, 32, 16, unlike_kernel); });
  refuses("emulation: a barrier that half of the threads miss", [] { emulate::launch(1, 64, 0, missing_kernel); });
  refuses("emulation: an unaligned copy", [] { emulate::launch(1, 1, 32, unaligned_kernel); });
  refuses("emulation: a copy behind the shared memory", [&] { emulate::launch(1, 1, 16, outside_kernel, global); });
  refuses("emulation: a store behind the shared memory", [] { emulate::launch(1, 1, 16, behind_kernel); });
  refuses("emulation: a copy without a wait", [&] { emulate::launch(1, 1, 16, unwaited_kernel, global); });
  refuses("emulation: 1025 threads", [] { emulate::launch(1, 1025, 0, behind_kernel); });
  begin("emulation: shared memory is poisoned for each block");
  int poisoned = 0;
  emulate::launch(2, 1, 16, poison_kernel, &poisoned);
  expect(poisoned == 2, "it was not");
}

}  // namespace

void test_emulation() {
  test_mma_s8();
  test_mma_16<__half>("f16");
  test_mma_16<__nv_bfloat16>("bf16");
  test_ldmatrix();
  test_copies();
  test_threads();
  test_failures();
}

}  // namespace native
