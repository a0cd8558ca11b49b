// The products of warp groups in the emulation against the PTX ISA (9.1) and a dense reference, and each of their
// checks made to fail once.
#include "../report.h"
#include "emulate_hopper.h"
#include "emulate_test.h"

namespace native {
namespace {

using namespace pycompress::gpu;

// What is stored of a: 64 rows of 128 bytes, dense elements or those that are stored of 256 bytes' worth. b: 256 rows
// of 256 bytes.
constexpr int kRows = 64, kMaxN = 256, kBytesB = 256, kTileA = kRows * 128, kTileB = kMaxN * 128;
constexpr int kBarrier = kTileA + 2 * kTileB, kShared = kBarrier + 8;
alignas(16) uint8_t matrix_a[kRows * 128], matrix_b[kMaxN * kBytesB];

template <class T>
using SumOf = std::conditional_t<std::is_same_v<T, int8_t>, int32_t, float>;

template <class T>
void store(uint8_t* matrix, int index, int value) {
  T element;
  if constexpr (std::is_same_v<T, int8_t>)
    element = static_cast<int8_t>(value);
  else
    element = T(static_cast<float>(value));
  std::memcpy(matrix + static_cast<size_t>(index) * sizeof(T), &element, sizeof(T));
}

int value_b(int row, int k) { return element_value(200 + row, k); }

template <class T, bool kSparse>
void fill() {
  constexpr int kA = 128 / static_cast<int>(sizeof(T)), kB = kBytesB / static_cast<int>(sizeof(T));
  for (int row = 0; row < kRows; ++row)
    for (int i = 0; i < kA; ++i)
      store<T>(matrix_a, row * kA + i, kSparse ? stored_value(row, i) : element_value(row, i));
  for (int row = 0; row < kMaxN; ++row)
    for (int i = 0; i < kB; ++i) store<T>(matrix_b, row * kB + i, value_b(row, i));
}

// --- the instructions, by type --------------------------------------------------------------------------------------

template <class T, int kCount>
void multiply_dense(SumOf<T> (&d)[kCount], uint64_t a, uint64_t b, bool accumulate) {
  if constexpr (std::is_same_v<T, int8_t>)
    multiply(d, a, b, accumulate);
  else if constexpr (std::is_same_v<T, __half>)
    multiply_f16(d, a, b, accumulate);
  else
    multiply_bf16(d, a, b, accumulate);
}

// The metadata of 64 rows and of k from `k` on; step by step, halves have it in the other pair of lanes.
template <class T, int kSelector, int kCount>
void multiply_sparse(SumOf<T> (&d)[kCount], uint64_t a, uint64_t b, int k, bool accumulate) {
  const int lane = static_cast<int>(threadIdx.x) % 32, row = static_cast<int>(threadIdx.x) / 32 * 16;
  if constexpr (std::is_same_v<T, int8_t>)
    multiply_sparse_s8(d, a, b, metadata_of_bytes(lane, row, k), accumulate);
  else if constexpr (std::is_same_v<T, __half>)
    multiply_sparse_f16<kSelector>(d, a, b, metadata_of_halves(lane, row, k, kSelector), accumulate);
  else
    multiply_sparse_bf16<kSelector>(d, a, b, metadata_of_halves(lane, row, k, kSelector), accumulate);
}

// --- products -------------------------------------------------------------------------------------------------------

uint64_t* mbarrier() { return reinterpret_cast<uint64_t*>(dynamic_shared() + kBarrier); }

struct Maps {
  TensorMap a, b;
};

// One tile of a and `tiles` of b, which follow each other in k, to where the kernels look for them.
void bring(const Maps& maps, int tiles) {
  const int bytes_a = maps.a.box_rows * maps.a.box_bytes, bytes_b = maps.b.box_rows * maps.b.box_bytes;
  if (threadIdx.x == 0) {
    init_barrier(mbarrier(), 1);
    publish_barriers();
    arrive_expecting(mbarrier(), static_cast<uint32_t>(bytes_a + tiles * bytes_b));
    load_tile(dynamic_shared(), maps.a, 0, 0, mbarrier());
    for (int i = 0; i < tiles; ++i)
      load_tile(dynamic_shared() + kTileA + i * kTileB, maps.b, i * maps.b.box_bytes, 0, mbarrier());
  }
  __syncthreads();
  wait(mbarrier(), 0);
}

// 9.7.15.5.1.1.3: where thread i has element e of the sums.
int row_of_sum(int thread, int e) { return thread / 32 * 16 + thread % 32 / 4 + e / 2 % 2 * 8; }
int column_of_sum(int thread, int e) { return e / 4 * 8 + thread % 4 * 2 + e % 2; }

template <class Sum, int kCount>
void finish(Sum (&sums)[kCount], Sum* y) {
  wait_products<0>();
  receive_products(sums);
  const auto thread = static_cast<int>(threadIdx.x);
  for (int e = 0; e < kCount; ++e) y[row_of_sum(thread, e) * 2 * kCount + column_of_sum(thread, e)] = sums[e];
}

uint64_t descriptor_of_rows(const uint8_t* shared, int row_bytes) {
  return row_bytes == 128 ? descriptor(shared) : descriptor_64(shared);
}

// As many steps of k as a's tile has; three times, the second begins anew.
template <class T, int kN>
void dense_kernel(Maps maps, SumOf<T>* y) {
  bring(maps, 1);
  const uint64_t a = descriptor_of_rows(dynamic_shared(), maps.a.box_bytes);
  const uint64_t b = descriptor_of_rows(dynamic_shared() + kTileA, maps.b.box_bytes);
  SumOf<T> sums[kN / 2];
  for (SumOf<T>& sum : sums) sum = 5;
  for (const bool accumulate : {true, false, true}) {
    begin_products();
    for (int step = 0; step < maps.a.box_bytes / 32; ++step)
      multiply_dense<T>(sums, a + static_cast<uint64_t>(step) * kNextK, b + static_cast<uint64_t>(step) * kNextK,
                        accumulate || step > 0);
    commit_products();
  }
  finish(sums, y);
}

template <class T, int kN>
void sparse_kernel(Maps maps, SumOf<T>* y) {
  bring(maps, 2);
  constexpr int kStep = 64 / static_cast<int>(sizeof(T));  // of k
  const uint64_t a = descriptor(dynamic_shared());
  const uint64_t b[] = {descriptor(dynamic_shared() + kTileA), descriptor(dynamic_shared() + kTileA + kTileB)};
  SumOf<T> sums[kN / 2];
  for (SumOf<T>& sum : sums) sum = 5;
  for (const bool accumulate : {true, false, true}) {
    begin_products();
    for (int tile = 0; tile < 2; ++tile) {
      multiply_sparse<T, 0>(sums, a + static_cast<uint64_t>(2 * tile) * kNextK, b[tile], 2 * tile * kStep,
                            accumulate || tile > 0);
      multiply_sparse<T, 1>(sums, a + static_cast<uint64_t>(2 * tile + 1) * kNextK, b[tile] + 2 * kNextK,
                            (2 * tile + 1) * kStep, true);
    }
    commit_products();
  }
  finish(sums, y);
}

// Twice the products of a's rows by b's: the second of three passes forgot what came before it.
template <class Sum, class Value>
void check(const std::vector<Sum>& y, int n, int depth, Value value_a) {
  for (int row = 0; row < kRows; ++row)
    for (int column = 0; column < n; ++column) {
      int sum = 0;  // exact in float32 too
      for (int k = 0; k < depth; ++k) sum += value_a(row, k) * value_b(column, k);
      expect(y[static_cast<size_t>(row * n + column)] == static_cast<Sum>(2 * sum),
             text("row ", row, " column ", column));
    }
}

TensorMap map_of(const uint8_t* matrix, int rows, int stride, int box_bytes) {
  return box_bytes == 128 ? tensor_map(matrix, rows, stride, stride, rows)
                          : tensor_map_64(matrix, rows, stride, stride, rows);
}

template <class T, int kN>
void test_dense(const char* type, int bytes_a = 128, int bytes_b = 128) {
  begin(text("emulation: wgmma.m64n", kN, ".", type, " of rows of ", bytes_a, " and ", bytes_b, " bytes"));
  fill<T, false>();
  std::vector<SumOf<T>> y(kRows * kN);
  const Maps maps{map_of(matrix_a, kRows, 128, bytes_a), map_of(matrix_b, kN, kBytesB, bytes_b)};
  emulate::launch(1, 128, kShared, dense_kernel<T, kN>, maps, y.data());
  check(y, kN, bytes_a / static_cast<int>(sizeof(T)), element_value);
}

template <class T, int kN>
void test_sparse(const char* type) {
  begin(text("emulation: wgmma.sp.m64n", kN, ".", type));
  fill<T, true>();
  std::vector<SumOf<T>> y(kRows * kN);
  const Maps maps{map_of(matrix_a, kRows, 128, 128), map_of(matrix_b, kN, kBytesB, 128)};
  emulate::launch(1, 128, kShared, sparse_kernel<T, kN>, maps, y.data());
  check(y, kN, kBytesB / static_cast<int>(sizeof(T)), dense_value);
}

// --- what must fail -------------------------------------------------------------------------------------------------

enum class Fault {
  none,
  no_wait,
  no_begin,
  touched_sums,
  touched_behind_wait,
  early_receive,
  no_product_wait,
  early_release,
  misplaced_rows,
  behind_rows,
  other_swizzle,
  no_swizzle,
  base_offset,
  narrow_stride,
  outside,
  unlike_warps,
  unlike_lanes,
  unlike_types,
};

void load(const Maps& maps, int row) {
  load_tile(dynamic_shared(), maps.a, 0, row, mbarrier());
  load_tile(dynamic_shared() + kTileA, maps.b, 0, row, mbarrier());
}

uint64_t faulty_descriptor(Fault fault) {
  const uint64_t good = descriptor(dynamic_shared()), thread = threadIdx.x;
  switch (fault) {
    case Fault::misplaced_rows:
      return good + (128 >> 4);
    case Fault::behind_rows:
      return good + 7 * (16 >> 4);
    case Fault::other_swizzle:
      return good | uint64_t{3} << 62;
    case Fault::no_swizzle:
      return good & ~(uint64_t{3} << 62);
    case Fault::base_offset:
      return good | uint64_t{1} << 49;
    case Fault::narrow_stride:
      return good - (uint64_t{512 >> 4} << 32);
    case Fault::outside:
      return good + (kShared / 1024 * 1024 >> 4);
    case Fault::unlike_warps:
      return good + (thread >= 96 ? kNextK : 0);
    case Fault::unlike_lanes:
      return good + (thread == 5 ? kNextK : 0);
    default:
      return good;
  }
}

// A tile of rows and columns, multiplied once; then the next tile over it.
void faulty_kernel(Maps maps, Fault fault) {
  if (threadIdx.x == 0) {
    init_barrier(mbarrier(), 1);
    arrive_expecting(mbarrier(), 2 * kRows * 128);
    load(maps, 0);
  }
  __syncthreads();
  if (fault != Fault::no_wait) wait(mbarrier(), 0);
  float sums[32] = {};
  const uint64_t a = faulty_descriptor(fault), b = descriptor(dynamic_shared() + kTileA);
  if (fault != Fault::no_begin) begin_products();
  if (fault == Fault::unlike_types && threadIdx.x >= 32)
    multiply_f16(sums, a, b, false);
  else
    multiply_bf16(sums, a, b, false);
  commit_products();
  if (fault == Fault::touched_sums && threadIdx.x == 77) sums[3] = 1;
  if (fault == Fault::early_receive) receive_products(sums);
  if (fault == Fault::no_product_wait) return;
  if (fault != Fault::early_release) wait_products<0>();
  if (fault == Fault::touched_behind_wait && threadIdx.x == 77) sums[3] += 1;
  __syncthreads();
  if (threadIdx.x == 0) {
    arrive_expecting(mbarrier(), 2 * kRows * 128);
    load(maps, 8);
  }
  wait(mbarrier(), 1);
  if (fault == Fault::early_release) wait_products<0>();
  receive_products(sums);
}

// Until receive_products() all sums are NaN, also between the wait and it.
void poison_kernel(Maps maps, int* poisoned) {
  bring(maps, 1);
  float sums[16] = {};
  begin_products();
  multiply_bf16(sums, descriptor(dynamic_shared()), descriptor(dynamic_shared() + kTileA), true);
  commit_products();
  const bool before = std::all_of(sums, sums + 16, [](float sum) { return std::isnan(sum); });
  wait_products<0>();
  *poisoned += before && std::all_of(sums, sums + 16, [](float sum) { return std::isnan(sum); });
  receive_products(sums);
  *poisoned += std::none_of(sums, sums + 16, [](float sum) { return std::isnan(sum); });
}

enum class SparseFault { none, metadata, other_lane, selector, unlike_selectors, behind_rows };

// Metadata of the positions 0 and 1 throughout; in one thread of the last warp they are not valid.
void faulty_sparse_kernel(Maps maps, SparseFault fault) {
  bring(maps, 1);
  uint32_t metadata = 0x44444444;
  if (fault == SparseFault::metadata && threadIdx.x == 101) metadata = 0x44144444;
  if (fault == SparseFault::other_lane && threadIdx.x == 102) metadata = 0xffffffff;
  float sums[16] = {};
  const uint64_t a = descriptor(dynamic_shared());
  const uint64_t b = descriptor(dynamic_shared() + kTileA) + (fault == SparseFault::behind_rows ? 3 * kNextK : 0);
  begin_products();
  if (fault == SparseFault::selector)
    multiply_sparse_bf16<2>(sums, a, b, metadata, false);
  else if (fault == SparseFault::unlike_selectors && threadIdx.x >= 64)
    multiply_sparse_bf16<1>(sums, a, b, metadata, false);
  else
    multiply_sparse_bf16<0>(sums, a, b, metadata, false);
  commit_products();
  wait_products<0>();
  receive_products(sums);
}

void test_sparse_faults(const Maps& maps) {
  const auto launch = [&](SparseFault fault) { emulate::launch(1, 128, kShared, faulty_sparse_kernel, maps, fault); };
  begin("emulation: sparse products without fault");
  launch(SparseFault::none);
  begin("emulation: metadata that are not valid in a lane that is not looked at");
  launch(SparseFault::other_lane);
  refuses("emulation: metadata whose positions do not ascend", [&] { launch(SparseFault::metadata); });
  refuses("emulation: sparsity selector 2 of a group", [&] { launch(SparseFault::selector); });
  refuses("emulation: other selectors in two warps of the group", [&] { launch(SparseFault::unlike_selectors); });
  refuses("emulation: 64 bytes that go over their row's end", [&] { launch(SparseFault::behind_rows); });
}

void test_faults() {
  fill<__nv_bfloat16, false>();
  const Maps maps{map_of(matrix_a, kRows, 128, 128), tensor_map(matrix_b, kMaxN, kBytesB, kBytesB, kRows)};
  const auto launch = [&](Fault fault) { emulate::launch(1, 128, kShared, faulty_kernel, maps, fault); };
  begin("emulation: products without fault");
  launch(Fault::none);
  constexpr const char* kNames[] = {
      "none",
      "products of a tile that was not waited for",
      "multiply() without begin_products()",
      "sums written while products are under way",
      "sums written before receive_products()",
      "receive_products() while products are under way",
      "a return before the products are done",
      "a tile over one that products still read",
      "rows at no multiple of 1024",
      "32 bytes that go over their row's end",
      "a descriptor of the swizzle of 32 bytes",
      "a descriptor without a swizzle",
      "a descriptor with a base offset",
      "eight rows in 512 bytes",
      "products behind the shared memory",
      "other products in one warp of the group",
      "other products in one lane",
      "products of other types in one warp",
  };
  for (int i = 1; i <= static_cast<int>(Fault::unlike_types); ++i)
    refuses(text("emulation: ", kNames[i]), [&] { launch(static_cast<Fault>(i)); });
  begin("emulation: sums are poison until they are received");
  int poisoned = 0;
  emulate::launch(1, 128, kShared, poison_kernel, maps, &poisoned);
  expect(poisoned == 2 * 128, text(poisoned));
  test_sparse_faults(maps);
}

}  // namespace

void test_emulation_wgmma() {
  test_dense<int8_t, 256>("s8");
  test_dense<int8_t, 32>("s8");
  test_dense<__half, 128>("f16");
  test_dense<__half, 32>("f16");
  test_dense<__nv_bfloat16, 256>("bf16");
  test_dense<__nv_bfloat16, 64>("bf16");
  test_dense<int8_t, 64>("s8", 64, 64);
  test_dense<int8_t, 128>("s8", 64, 128);
  test_sparse<int8_t, 256>("s8");
  test_sparse<int8_t, 32>("s8");
  test_sparse<__half, 64>("f16");
  test_sparse<__half, 32>("f16");
  test_sparse<__nv_bfloat16, 256>("bf16");
  test_sparse<__nv_bfloat16, 128>("bf16");
  test_faults();
}

}  // namespace native
