// The instructions of emulate_hopper.h.
#include "emulate_hopper.h"

#include <random>

#include "emulate_block.h"

namespace emulate {
namespace {

constexpr int kBoxBytes = 128;
constexpr int32_t kPoisonedSum = -1;

size_t offset_in_shared(const void* pointer, size_t bytes) {
  require(in_shared(pointer, bytes), "an address outside of the block's dynamic shared memory");
  return static_cast<size_t>(static_cast<const uint8_t*>(pointer) - shared_memory());
}

// The 128-byte swizzle of addresses in the shared window: bits 4 to 6 are combined with bits 7 to 9 (Figure 157).
size_t swizzled(size_t offset) {
  const size_t address = offset + kSharedBase;
  return (address ^ (address >> 7 & 7) << 4) - kSharedBase;
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
  std::vector<uint8_t> bytes(static_cast<size_t>(map.box_rows) * kBoxBytes, 0);
  for (int r = 0; r < map.box_rows; ++r)
    for (int c = 0; c < kBoxBytes; ++c) {
      const int64_t y = int64_t{row} + r, x = int64_t{column} + c;
      if (y < 0 || y >= map.rows || x < 0 || x >= map.columns) continue;
      bytes[swizzled(to + static_cast<size_t>(r * kBoxBytes + c)) - to] = map.matrix[y * map.stride + x];
    }
  return bytes;
}

}  // namespace

void load_tile(uint16_t blocks, const void* shared, const TensorMap& map, int column, int row,
               const uint64_t* barrier) {
  const Range range{offset_in_shared(shared, static_cast<size_t>(map.box_rows) * kBoxBytes),
                    offset_in_shared(shared, 1) + static_cast<size_t>(map.box_rows) * kBoxBytes};
  require((range.begin + kSharedBase) % 1024 == 0, "a swizzled tile's address is a multiple of 1024");
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

// --- products (9.7.15) ---------------------------------------------------------------------------------------------

namespace {

// A matrix descriptor (9.7.15.5.1.2.2), of the swizzle of 128 bytes alone.
struct Operand {
  size_t start;   // offset
  size_t stride;  // from eight rows to the next eight

  explicit Operand(uint64_t descriptor)
      : start(((descriptor & 0x3fff) << 4) - kSharedBase), stride((descriptor >> 32 & 0x3fff) << 4) {
    require(descriptor >> 62 == 1, "a matrix descriptor that is not of the swizzle of 128 bytes");
    require((descriptor >> 49 & 7) == 0 && ((start + kSharedBase) >> 7 & 7) == 0,
            "a matrix whose rows do not begin at a multiple of 1024");
    require((start & 127) + 32 <= 128, "a matrix of 32 bytes that goes over its rows' 128");
    require(stride % 1024 == 0, "a stride that is no multiple of 1024");
  }
  Range range(int rows) const {
    const size_t begin = start & ~size_t{127};
    return {begin, begin + static_cast<size_t>(rows / 8 - 1) * stride + 1024};
  }
  // 32 bytes of row `row`, K-major: ((8, m), (T, 2k)) : ((8T, SBO), (1, T)) in units of 16 bytes, then swizzled.
  void read(const uint8_t* shared, int row, int16_t* out) const {
    const auto r = static_cast<size_t>(row);
    for (size_t chunk = 0; chunk < 2; ++chunk) {
      const auto* from =
          reinterpret_cast<const int8_t*>(shared + swizzled(start + r / 8 * stride + r % 8 * 128 + chunk * 16));
      for (size_t i = 0; i < 16; ++i) out[chunk * 16 + i] = from[i];
    }
  }
};

int32_t dot(const int16_t* a, const int16_t* b) {
  int32_t sum = 0;
  for (int k = 0; k < 32; ++k) sum += a[k] * b[k];
  return sum;
}

// The 16 rows of `product` that its warp has (9.7.15.5.1.1.3).
void compute(const Block& block, int warp, Thread* const (&lanes)[32], size_t which) {
  const Product& product = lanes[0]->products.front()[which];
  const Operand a(product.a), b(product.b);
  int16_t rows[16][32], columns[256][32];
  for (int i = 0; i < 16; ++i) a.read(block.shared, warp % 4 * 16 + i, rows[i]);
  for (int i = 0; i < product.n; ++i) b.read(block.shared, i, columns[i]);
  for (int lane = 0; lane < 32; ++lane) {
    std::vector<int32_t>& sums = lanes[lane]->sums.at(lanes[lane]->products.front()[which].d).values;
    for (int i = 0; i < product.n / 2; ++i) {
      const int row = lane / 4 + i / 2 % 2 * 8, column = i / 4 * 8 + lane % 4 * 2 + i % 2;
      const int32_t before = product.accumulate ? sums[static_cast<size_t>(i)] : 0;
      sums[static_cast<size_t>(i)] =
          static_cast<int32_t>(static_cast<uint32_t>(before) + static_cast<uint32_t>(dot(rows[row], columns[column])));
    }
  }
}

// The other warps of the group must have issued, or issue later, the same.
void compare_with_group(Block& block, int warp, const Product& product) {
  std::vector<Product>& mine = block.issued[warp];
  mine.push_back(product);
  for (int other = warp / 4 * 4; other < warp / 4 * 4 + 4; ++other) {
    const std::vector<Product>& theirs = block.issued[other];
    if (theirs.size() >= mine.size() && !(theirs[mine.size() - 1] == product))
      fail("the warps of a group issue different products");
  }
}

void give_back(Thread& one, int32_t* d) {
  const auto found = one.sums.find(d);
  if (--found->second.under_way > 0) return;
  const std::vector<int32_t>& values = found->second.values;
  if (std::any_of(d, d + values.size(), [](int32_t sum) { return sum != kPoisonedSum; }))
    fail("the registers of sums were written while products were under way");
  std::copy(values.begin(), values.end(), d);
  one.sums.erase(found);
}

// The oldest group of the warp.
void finish_group(Thread* const (&lanes)[32]) {
  Block& block = *lanes[0]->block;
  const int warp = lanes[0]->index / 32;
  for (size_t i = 0; i < lanes[0]->products.front().size(); ++i) {
    for (const Thread* one : lanes)
      if (one->products.front().size() <= i || !(one->products.front()[i] == lanes[0]->products.front()[i]))
        fail("the lanes of a warp issue different products");
    compare_with_group(block, warp, lanes[0]->products.front()[i]);
    compute(block, warp, lanes, i);
    for (int operand = 0; operand < 2; ++operand)
      block.reads.erase(
          std::find_if(block.reads.begin(), block.reads.end(), [&](const Read& r) { return r.warp == warp; }));
  }
  for (Thread* one : lanes) {
    const std::vector<Product> group = std::move(one->products.front());
    one->products.pop_front();
    for (const Product& product : group) give_back(*one, product.d);
  }
}

// From the issue on, the operands are being read.
void begin_reading(const Range& range) {
  Block& block = *this_thread().block;
  if (range.end > shared_bytes()) fail("products read behind the shared memory");
  for (const TileCopy& copy : cluster.copies)
    if (copy.block == &block && copy.range.overlaps(range)) fail("products read what a tile is still to bring");
  if (lane() == 0) block.reads.push_back({thread() / 32, range});
}

}  // namespace

void begin_products() { this_thread().begun = true; }

void multiply(int32_t* d, int n, uint64_t a, uint64_t b, bool accumulate) {
  Thread& here = this_thread();
  if (!here.begun) fail("multiply() without begin_products() after the last wait");
  begin_reading(Operand(a).range(64));
  begin_reading(Operand(b).range(n));
  const auto [entry, is_new] = here.sums.try_emplace(d);
  if (is_new) {
    entry->second.values.assign(d, d + n / 2);
    std::fill_n(d, n / 2, kPoisonedSum);
  }
  ++entry->second.under_way;
  here.products.back().push_back({a, b, n, accumulate, d});
}

void commit_products() { this_thread().products.emplace_back(); }

void wait_products(int pending) {
  struct Argument {
    Thread* thread;
    int pending;
  } argument{&this_thread(), pending};
  meet(~0u, "wgmma.wait_group", argument, [](Argument*(&lanes)[32]) {
    Thread* threads[32];
    for (int i = 0; i < 32; ++i) threads[i] = lanes[i]->thread;
    const auto keep = static_cast<size_t>(lanes[0]->pending) + 1;
    while (threads[0]->products.size() > keep) finish_group(threads);
  });
  this_thread().begun = false;
}

}  // namespace emulate

namespace pycompress::gpu {

TensorMap tensor_map(const void* matrix, int64_t rows, int64_t columns, int64_t stride, int box_rows) {
  if (reinterpret_cast<uintptr_t>(matrix) % 16 != 0 || stride % 16 != 0 || rows < 1 || columns < 1 || box_rows < 1 ||
      box_rows > 256 || rows > int64_t{1} << 32 || columns > int64_t{1} << 32 || stride >= int64_t{1} << 40)
    throw std::runtime_error("cuTensorMapEncodeTiled would refuse this matrix");
  return {static_cast<const uint8_t*>(matrix), rows, columns, stride, box_rows};
}

}  // namespace pycompress::gpu
