// The instructions of emulate_hopper.h but for the products.
#include "emulate_hopper.h"

#include <random>

#include "emulate_block.h"

namespace emulate {
namespace {

size_t offset_in_shared(const void* pointer, size_t bytes) {
  require(in_shared(pointer, bytes), "an address outside of the block's dynamic shared memory");
  return static_cast<size_t>(static_cast<const uint8_t*>(pointer) - shared_memory());
}

Mbarrier& mbarrier_at(Block& block, size_t offset) {
  const auto found = block.mbarriers.find(offset);
  if (found == block.mbarriers.end()) fail("uses an mbarrier that was not initialized");
  return found->second;
}

void complete_if_done(Mbarrier& barrier) {
  if (std::abs(barrier.bytes) >= 1 << 20) fail("more bytes are announced than an mbarrier counts");
  if (barrier.pending > 0 || barrier.bytes != 0) return;
  ++barrier.phase;
  barrier.pending = barrier.count;
}

void require_alive(const Block& block, const char* what) {
  if (block.returned == block.threads) fail(std::string(what) + " is for a block whose threads have all returned");
}

}  // namespace

// Bits 4 to 6 of an address in the shared window are combined with bits 7 to 9; in rows of 64 bytes, bits 4 and 5 with
// bits 7 and 8 (Figures 157 and 158).
size_t swizzled(size_t offset, int row_bytes) {
  const size_t address = offset + kSharedBase, mask = row_bytes == 128 ? 7 : 3;
  return (address ^ (address >> 7 & mask) << 4) - kSharedBase;
}

// --- mbarriers (9.7.13.15) -----------------------------------------------------------------------------------------

void init_barrier(const uint64_t* barrier, uint32_t arrivals) {
  const size_t offset = offset_in_shared(barrier, 8);
  require(offset % 8 == 0 && arrivals >= 1 && arrivals < 1 << 20,
          "mbarrier.init: an address or a count that it refuses");
  this_thread().block->mbarriers[offset] = {arrivals, arrivals, 0, 0};
}

void arrive(const uint64_t* barrier, int rank, int64_t bytes) {
  require(rank < static_cast<int>(cluster.blocks.size()), "mapa: the cluster has no such block");
  Block& block = rank < 0 ? *this_thread().block : *cluster.blocks[static_cast<size_t>(rank)];
  require_alive(block, "an arrival");
  Mbarrier& there = mbarrier_at(block, offset_in_shared(barrier, 8));
  if (there.pending == 0) fail("arrives at an mbarrier that waits for no more arrivals, but for bytes");
  there.bytes += bytes;
  --there.pending;
  complete_if_done(there);
}

void wait_barrier(const uint64_t* barrier, uint32_t parity) {
  const Mbarrier& here = mbarrier_at(*this_thread().block, offset_in_shared(barrier, 8));
  require(parity <= 1, "a parity is 0 or 1");
  wait_until([&here, parity] { return (here.phase & 1) != parity; },
             parity == 0 ? "an even phase of an mbarrier" : "an odd phase of an mbarrier");
}

// --- tiles (9.7.9.27.1.2) ------------------------------------------------------------------------------------------

namespace {

// The box as it will lie in shared memory, by offset from its beginning.
std::vector<uint8_t> tile_of(const TensorMap& map, int column, int row, size_t to) {
  std::vector<uint8_t> bytes(static_cast<size_t>(map.box_rows) * static_cast<size_t>(map.box_bytes), 0);
  for (int r = 0; r < map.box_rows; ++r)
    for (int c = 0; c < map.box_bytes; ++c) {
      const int64_t y = int64_t{row} + r, x = int64_t{column} + c;
      if (y < 0 || y >= map.rows || x < 0 || x >= map.columns) continue;
      bytes[swizzled(to + static_cast<size_t>(r * map.box_bytes + c), map.box_bytes) - to] =
          map.matrix[y * map.stride + x];
    }
  return bytes;
}

}  // namespace

void load_tile(uint16_t blocks, const void* shared, const TensorMap& map, int column, int row,
               const uint64_t* barrier) {
  const size_t bytes = static_cast<size_t>(map.box_rows) * static_cast<size_t>(map.box_bytes);
  const Range range{offset_in_shared(shared, bytes), offset_in_shared(shared, bytes) + bytes};
  require((range.begin + kSharedBase) % static_cast<size_t>(8 * map.box_bytes) == 0,
          "a swizzled tile's address is a multiple of eight of its rows");
  require(blocks != 0 && blocks >> cluster.blocks.size() == 0, "a tile for a block that the cluster has not");
  const size_t mbarrier = offset_in_shared(barrier, 8);
  for (const auto& block : cluster.blocks) {
    if ((blocks >> block->rank & 1) == 0) continue;
    require_alive(*block, "a tile");
    mbarrier_at(*block, mbarrier);
    for (const Read& read : block->reads)
      if (read.range.overlaps(range)) fail("a tile goes where products under way still read");
    for (const TileCopy& copy : cluster.copies)
      if (copy.block == block.get() && copy.range.overlaps(range)) fail("a tile goes where another is still to land");
    std::memset(block->shared + range.begin, kPoison, range.end - range.begin);
    cluster.copies.push_back({block.get(), range, mbarrier, tile_of(map, column, row, range.begin)});
  }
}

// The first, or the last, or any.
bool land_one() {
  if (cluster.copies.empty()) return false;
  static std::mt19937 random;
  size_t i = 0;
  if (options.threads == Order::descending) i = cluster.copies.size() - 1;
  if (options.threads == Order::random) i = random() % cluster.copies.size();
  const TileCopy copy = std::move(cluster.copies[i]);
  cluster.copies.erase(cluster.copies.begin() + static_cast<ptrdiff_t>(i));
  std::memcpy(copy.block->shared + copy.range.begin, copy.bytes.data(), copy.bytes.size());
  Mbarrier& barrier = mbarrier_at(*copy.block, copy.mbarrier);
  barrier.bytes -= static_cast<int64_t>(copy.bytes.size());
  complete_if_done(barrier);
  return true;
}

std::string check_cluster() {
  if (!cluster.copies.empty()) return "the block ended before all its tiles had landed";
  for (const auto& block : cluster.blocks) {
    if (!block->reads.empty()) return "the block ended before all products were waited for";
    for (const auto& [offset, barrier] : block->mbarriers)
      if (barrier.pending != barrier.count || barrier.bytes != 0)
        return "the block ended in the midst of a phase of the mbarrier at offset " + std::to_string(offset) + ": " +
               std::to_string(barrier.pending) + " of " + std::to_string(barrier.count) + " arrivals and " +
               std::to_string(barrier.bytes) + " bytes are missing";
  }
  return "";
}

// --- clusters and registers ----------------------------------------------------------------------------------------

uint32_t cluster_rank() { return this_thread().block->rank; }

void synchronize_cluster() {
  Barrier& here = cluster.barrier;
  const int threads = block_threads() * static_cast<int>(cluster.blocks.size());
  if (++here.arrived == threads) {
    here.arrived = 0;
    ++here.round;
    return;
  }
  wait_until([&here, round = here.round] { return here.round != round; }, "barrier.cluster");
}

// A launch gives each thread as many of the 65536 registers as all can have (a multiple of 8); the rest of them nobody
// may take (9.7.19.5).
void set_registers(int registers, bool more) {
  Block& block = *this_thread().block;
  const int given = std::min(65536 / block.threads / 8 * 8, 255);
  if (more ? registers < given : registers > given) fail("setmaxnreg in the wrong direction");
  if (!more) {
    block.registers_left += given - registers;
    return;
  }
  wait_until([&block, needed = registers - given] { return block.registers_left >= needed; }, "setmaxnreg.inc");
  block.registers_left -= registers - given;
}

}  // namespace emulate

namespace pycompress::gpu {

namespace {

TensorMap tensor_map_of(const void* matrix, int64_t rows, int64_t columns, int64_t stride, int box_rows,
                        int box_bytes) {
  if (reinterpret_cast<uintptr_t>(matrix) % 16 != 0 || stride % 16 != 0 || rows < 1 || columns < 1 || box_rows < 1 ||
      box_rows > 256 || rows > int64_t{1} << 32 || columns > int64_t{1} << 32 || stride >= int64_t{1} << 40)
    throw std::runtime_error("cuTensorMapEncodeTiled would refuse this matrix");
  return {static_cast<const uint8_t*>(matrix), rows, columns, stride, box_rows, box_bytes};
}

}  // namespace

TensorMap tensor_map(const void* matrix, int64_t rows, int64_t columns, int64_t stride, int box_rows) {
  return tensor_map_of(matrix, rows, columns, stride, box_rows, 128);
}
TensorMap tensor_map_64(const void* matrix, int64_t rows, int64_t columns, int64_t stride, int box_rows) {
  return tensor_map_of(matrix, rows, columns, stride, box_rows, 64);
}

}  // namespace pycompress::gpu
