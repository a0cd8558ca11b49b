// The Hopper part of the emulation against the PTX ISA (9.1), and each of its checks made to fail once.
#include "emulate_hopper.h"
#include "../report.h"
#include "int8_reference.h"

namespace native {
namespace {

using namespace pycompress::gpu;

constexpr int kRows = 64, kStage = (kRows + 64) * 128, kShared = 2 * kStage + 64;
alignas(16) uint8_t matrix[200 * 160];

uint64_t* mbarrier(int i = 0) { return reinterpret_cast<uint64_t*>(dynamic_shared() + 2 * kStage) + i; }

TensorMap map_of(int box_rows, int64_t rows = 200, int64_t columns = 160) {
  return tensor_map(matrix, rows, columns, 160, box_rows);
}

void fill_matrix() {
  for (size_t i = 0; i < sizeof(matrix); ++i) matrix[i] = static_cast<uint8_t>(i * 7 + i / 160 * 13);
}

// Thread 0 brings a tile, all wait for it.
void bring(const TensorMap& map, void* to, int column, int row, int bytes) {
  if (threadIdx.x == 0) {
    init_barrier(mbarrier(), 1);
    arrive_expecting(mbarrier(), static_cast<uint32_t>(bytes));
    load_tile(to, map, column, row, mbarrier());
  }
  __syncthreads();
  wait(mbarrier(), 0);
}

// 9.7.9.27.1.2 and 5.5: chunk c of row r lies at chunk c ^ r % 8; zeros outside of the matrix.
void tile_kernel(TensorMap map, int column, int row, int* good) {
  bring(map, dynamic_shared(), column, row, kRows * 128);
  if (threadIdx.x != 0) return;
  for (int r = 0; r < kRows; ++r)
    for (int c = 0; c < 128; ++c) {
      const bool inside = row + r < map.rows && column + c < map.columns;
      const uint8_t expected = inside ? matrix[(row + r) * 160 + column + c] : 0;
      *good += dynamic_shared()[r * 128 + ((c / 16) ^ (r % 8)) * 16 + c % 16] == expected;
    }
}

void test_tiles() {
  for (const int column : {0, 128, 256})
    for (const int row : {0, 64, 136, 192, 256}) {
      begin(text("emulation: tile at row ", row, " column ", column));
      int good = 0;
      emulate::launch(1, 32, kShared, tile_kernel, map_of(kRows), column, row, &good);
      expect(good == kRows * 128, text(kRows * 128 - good, " bytes differ"));
    }
}

// 9.7.15.5.1.1.3: where thread i has element e of the sums.
int row_of_sum(int thread, int e) { return thread / 32 * 16 + thread % 32 / 4 + e / 2 % 2 * 8; }
int column_of_sum(int thread, int e) { return e / 4 * 8 + thread % 4 * 2 + e % 2; }

template <int kN>
void product_kernel(TensorMap a, TensorMap b, int32_t* y) {
  uint8_t *rows = dynamic_shared(), *columns = rows + kRows * 128;
  if (threadIdx.x == 0) {
    init_barrier(mbarrier(), 1);
    publish_barriers();
    arrive_expecting(mbarrier(), (kRows + kN) * 128);
    load_tile(rows, a, 0, 0, mbarrier());
    load_tile(columns, b, 0, 64, mbarrier());
  }
  __syncthreads();
  wait(mbarrier(), 0);
  int32_t sums[kN / 2];
  for (int i = 0; i < kN / 2; ++i) sums[i] = 5;
  for (const bool accumulate : {true, false, true}) {  // the second pass begins anew
    begin_products();
    for (int step = 0; step < 4; ++step)
      multiply(sums, descriptor(rows) + static_cast<uint64_t>(step) * kNextK,
               descriptor(columns) + static_cast<uint64_t>(step) * kNextK, accumulate || step > 0);
    commit_products();
  }
  wait_products<0>();
  receive_products(sums);
  const auto thread = static_cast<int>(threadIdx.x);
  for (int e = 0; e < kN / 2; ++e) y[row_of_sum(thread, e) * kN + column_of_sum(thread, e)] = sums[e];
}

template <int kN>
void test_products() {
  begin(text("emulation: wgmma.m64n", kN, "k32.s8"));
  std::vector<int32_t> y(kRows * kN);
  emulate::launch(1, 128, kShared, product_kernel<kN>, map_of(kRows), map_of(kN), y.data());
  for (int m = 0; m < kRows; ++m)
    for (int n = 0; n < kN; ++n) {
      int32_t sum = 0;
      for (int k = 0; k < 128; ++k)
        sum += static_cast<int8_t>(matrix[m * 160 + k]) * static_cast<int8_t>(matrix[(64 + n) * 160 + k]);
      expect(y[static_cast<size_t>(m * kN + n)] == 2 * sum, text("row ", m, " column ", n));
    }
}

// Block r of two brings the rows [32 r, 32 r + 32) of a tile for both; each sees all of it.
void multicast_kernel(TensorMap map, int* good) {
  const auto rank = static_cast<int>(cluster_rank());
  if (threadIdx.x == 0) {
    init_barrier(mbarrier(0), 1);
    init_barrier(mbarrier(1), 2);
  }
  synchronize_cluster();
  if (threadIdx.x == 0) {
    arrive_expecting(mbarrier(), kRows * 128);
    load_tile_for(3, dynamic_shared() + rank * 32 * 128, map, 0, rank * 32, mbarrier());
    arrive_at(mbarrier(1), 0);
    arrive_at(mbarrier(1), 1);
  }
  wait(mbarrier(), 0);
  wait(mbarrier(1), 0);
  if (threadIdx.x == 0)
    for (int r = 0; r < kRows; ++r)
      *good += std::memcmp(dynamic_shared() + r * 128 + (r % 8) * 16, matrix + r * 160, 16) == 0;
  synchronize_cluster();
}

void test_multicast() {
  begin("emulation: tiles for two blocks");
  int good = 0;
  emulate::run(2, 64, kShared, [&] { multicast_kernel(map_of(32), &good); }, 2);
  expect(good == 2 * kRows, "not all rows came to both blocks");
}

// Groups of threads on barriers of their own, and registers handed from one to the others.
void parts_kernel(int* order) {
  if (threadIdx.x < 128) {
    give_registers<40>();
    synchronize(1, 128);
  } else {
    take_registers<232>();
    for (int i = 0; i < 3; ++i) synchronize(2, 256);
  }
  atomicAdd(order, 1);
}

void greedy_kernel() { threadIdx.x < 128 ? give_registers<168>() : take_registers<240>(); }

// --- what must fail -------------------------------------------------------------------------------------------------

enum class Fault {
  none,
  too_few_bytes,
  too_many_bytes,
  no_wait,
  wrong_parity,
  no_begin,
  touched_sums,
  no_product_wait,
  early_release,
  extra_arrival,
  no_barrier,
  misplaced_tile,
  misplaced_rows,
  unlike_warps,
  unlike_lanes,
  early_return,
};

// A tile of rows and columns, multiplied once; then the next tile over it.
void faulty_kernel(TensorMap map, Fault fault) {
  uint8_t* rows = dynamic_shared();
  const bool first = threadIdx.x == 0;
  const auto load = [&](int row) {
    load_tile(rows, map, 0, row, mbarrier());
    load_tile(rows + kRows * 128, map, 0, row + 64, mbarrier());
  };
  if (first && fault != Fault::no_barrier) init_barrier(mbarrier(), 1);
  __syncthreads();
  if (first) {
    const int bytes = kStage + (fault == Fault::too_few_bytes ? -128 : fault == Fault::too_many_bytes ? 128 : 0);
    if (fault == Fault::misplaced_tile) rows += 128;
    arrive_expecting(mbarrier(), static_cast<uint32_t>(bytes));
    load(0);
    if (fault == Fault::extra_arrival) arrive(mbarrier());
  }
  if (fault == Fault::early_return) return;
  if (fault != Fault::no_wait) wait(mbarrier(), fault == Fault::wrong_parity);
  int32_t sums[32] = {};
  if (fault != Fault::no_begin) begin_products();
  uint64_t a = descriptor(rows);
  if (fault == Fault::misplaced_rows) a += 128 >> 4;
  if (fault == Fault::unlike_warps && threadIdx.x >= 96) a += kNextK;
  if (fault == Fault::unlike_lanes && threadIdx.x == 5) a += kNextK;
  multiply(sums, a, descriptor(rows + kRows * 128), false);
  commit_products();
  if (fault == Fault::touched_sums && threadIdx.x == 77) sums[3] = 1;
  if (fault == Fault::no_product_wait) return;
  if (fault != Fault::early_release) wait_products<0>();
  __syncthreads();
  if (first) {
    arrive_expecting(mbarrier(), kStage);
    load(8);
  }
  wait(mbarrier(), 1);
  if (fault == Fault::early_release) wait_products<0>();
}

void test_faults() {
  const auto launch = [](Fault fault) { emulate::launch(1, 128, kShared, faulty_kernel, map_of(kRows), fault); };
  begin("emulation: a kernel without fault");
  launch(Fault::none);
  constexpr const char* kNames[] = {
      "none",
      "fewer bytes announced than come",
      "more bytes announced than come",
      "products of a tile that was not waited for",
      "a wait for the other parity",
      "multiply() without begin_products()",
      "sums written while products are under way",
      "a return before the products are done",
      "a tile over one that products still read",
      "an arrival too many",
      "no mbarrier.init",
      "a tile at no multiple of 1024",
      "rows at no multiple of 1024",
      "other products in one warp of the group",
      "other products in one lane",
      "a return before the tile has landed",
  };
  for (int i = 1; i <= static_cast<int>(Fault::early_return); ++i)
    refuses(text("emulation: ", kNames[i]), [&] { launch(static_cast<Fault>(i)); });
  refuses("emulation: more registers than were given back", [] { emulate::launch(1, 384, 0, greedy_kernel); });
  refuses("emulation: a grid of half a cluster", [] { emulate::run(3, 32, 0, [] {}, 2); });
}

}  // namespace

void test_emulation_hopper() {
  fill_matrix();
  test_tiles();
  test_products<8>();
  test_products<64>();
  test_multicast();
  begin("emulation: parts of a block");
  int order = 0;
  emulate::launch(1, 384, 0, parts_kernel, &order);
  expect(order == 384, "not all threads came through");
  test_faults();
}

}  // namespace native
