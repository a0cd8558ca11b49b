// The emulation's threads, warps and copies, and every check of them made to fail once.
#include "emulate_test.h"
#include "../report.h"

namespace native {
namespace {

using namespace pycompress::gpu;

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
void poison_kernel(int* poisoned) { *poisoned += dynamic_shared()[15] == emulate::kPoison; }

void test_failures() {
  alignas(16) const uint8_t global[16] = {};
  refuses("emulation: lanes at different instructions", [] { emulate::launch(1, 32, 0, divergent_kernel); });
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
  test_copies();
  test_threads();
  test_failures();
}

}  // namespace native
