// Mbarriers, tiles, clusters and parts of a block in the emulation against the PTX ISA (9.1), and each of the checks
// made to fail once.
#include "emulate_hopper.h"
#include "../report.h"
#include "emulate_test.h"

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

// 9.7.9.27.1.2 and 5.5: chunk c of row r lies at chunk c ^ r % 8, in rows of 64 bytes at c ^ r / 2 % 4; zeros outside
// of the matrix.
template <int kBytes>
void tile_kernel(TensorMap map, int column, int row, int* good) {
  bring(map, dynamic_shared(), column, row, kRows * kBytes);
  if (threadIdx.x != 0) return;
  for (int r = 0; r < kRows; ++r)
    for (int c = 0; c < kBytes; ++c) {
      const bool inside = row + r < map.rows && column + c < map.columns;
      const uint8_t expected = inside ? matrix[(row + r) * 160 + column + c] : 0;
      const int chunk = (c / 16) ^ (kBytes == 128 ? r % 8 : r / 2 % 4);
      *good += dynamic_shared()[r * kBytes + chunk * 16 + c % 16] == expected;
    }
}

template <int kBytes>
void test_tiles() {
  const TensorMap map = kBytes == 128 ? map_of(kRows) : tensor_map_64(matrix, 200, 160, 160, kRows);
  for (const int column : {0, 128, 256})
    for (const int row : {0, 64, 136, 192, 256}) {
      begin(text("emulation: tile of rows of ", kBytes, " bytes at row ", row, " column ", column));
      int good = 0;
      emulate::launch(1, 32, kShared, tile_kernel<kBytes>, map, column, row, &good);
      expect(good == kRows * kBytes, text(kRows * kBytes - good, " bytes differ"));
    }
}

void misplaced_kernel(TensorMap map) { bring(map, dynamic_shared() + 256, 0, 0, kRows * 64); }

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
  wrong_parity,
  extra_arrival,
  no_barrier,
  misplaced_tile,
  two_tiles,
  early_return,
};

void faulty_kernel(TensorMap map, Fault fault) {
  uint8_t* rows = dynamic_shared();
  const bool first = threadIdx.x == 0;
  if (first && fault != Fault::no_barrier) init_barrier(mbarrier(), 1);
  __syncthreads();
  if (first) {
    const int bytes = kStage + (fault == Fault::too_few_bytes ? -128 : fault == Fault::too_many_bytes ? 128 : 0);
    if (fault == Fault::misplaced_tile) rows += 128;
    arrive_expecting(mbarrier(), static_cast<uint32_t>(bytes));
    load_tile(rows, map, 0, 0, mbarrier());
    load_tile(rows + (fault == Fault::two_tiles ? kRows * 64 : kRows * 128), map, 0, 64, mbarrier());
    if (fault == Fault::extra_arrival) arrive(mbarrier());
  }
  if (fault != Fault::early_return) wait(mbarrier(), fault == Fault::wrong_parity);
}

void test_faults() {
  const auto launch = [](Fault fault) { emulate::launch(1, 128, kShared, faulty_kernel, map_of(kRows), fault); };
  begin("emulation: a kernel without fault");
  launch(Fault::none);
  constexpr const char* kNames[] = {
      "none",
      "fewer bytes announced than come",
      "more bytes announced than come",
      "a wait for the other parity",
      "an arrival too many",
      "no mbarrier.init",
      "a tile at no multiple of 1024",
      "a tile over one that is still to land",
      "a return before the tile has landed",
  };
  for (int i = 1; i <= static_cast<int>(Fault::early_return); ++i)
    refuses(text("emulation: ", kNames[i]), [&] { launch(static_cast<Fault>(i)); });
  refuses("emulation: a tile of rows of 64 bytes at no multiple of 512",
          [] { emulate::launch(1, 32, kShared, misplaced_kernel, tensor_map_64(matrix, 200, 160, 160, kRows)); });
  refuses("emulation: more registers than were given back", [] { emulate::launch(1, 384, 0, greedy_kernel); });
  refuses("emulation: a grid of half a cluster", [] { emulate::run(3, 32, 0, [] {}, 2); });
}

}  // namespace

void test_emulation_hopper() {
  fill_matrix();
  test_tiles<128>();
  test_tiles<64>();
  test_multicast();
  begin("emulation: parts of a block");
  int order = 0;
  emulate::launch(1, 384, 0, parts_kernel, &order);
  expect(order == 384, "not all threads came through");
  test_faults();
}

}  // namespace native
