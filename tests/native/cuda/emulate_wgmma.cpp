// The products of emulate_hopper.h: wgmma, dense and 2:4 sparse (9.7.15).
#include "emulate_block.h"
#include "emulate_hopper.h"
#include "emulate_mma.h"

namespace emulate {
namespace {

constexpr uint32_t kPoisonedSum = 0xffbfffff;  // a signaling NaN: arithmetic gives a quiet one

// A matrix descriptor (9.7.15.5.1.2.2) of the swizzle of 128 or of 64 bytes, which are a row of a tile.
struct Operand {
  size_t row_bytes;
  size_t start;   // offset
  size_t stride;  // from eight rows to the next eight

  Operand(uint64_t descriptor, size_t bytes)  // of each row
      : row_bytes(descriptor >> 62 == 1 ? 128 : 64),
        start(((descriptor & 0x3fff) << 4) - kSharedBase),
        stride((descriptor >> 32 & 0x3fff) << 4) {
    require(descriptor >> 62 == 1 || descriptor >> 62 == 2,
            "a matrix descriptor that is not of the swizzle of 128 or of 64 bytes");
    require((descriptor >> 49 & 7) == 0 && (start + kSharedBase) % (8 * row_bytes) < row_bytes,
            "a matrix whose rows do not begin at a multiple of eight of them");
    require(start % row_bytes + bytes <= row_bytes, "a matrix that goes over its rows' end");
    require(stride % (8 * row_bytes) == 0, "a stride that is no multiple of eight rows");
  }
  Range range(int rows) const {
    const size_t begin = start - start % row_bytes;
    return {begin, begin + static_cast<size_t>(rows / 8 - 1) * stride + 8 * row_bytes};
  }
  // `bytes` of row `row`, K-major: ((8, m), (T, 2k)) : ((8T, SBO), (1, T)) in units of 16 bytes, then swizzled.
  void read(const uint8_t* shared, int row, size_t bytes, uint8_t* out) const {
    const auto r = static_cast<size_t>(row);
    const size_t from = start + r / 8 * stride + r % 8 * row_bytes;
    for (size_t i = 0; i < bytes; i += 16)
      std::memcpy(out + i, shared + swizzled(from + i, static_cast<int>(row_bytes)), 16);
  }
};

constexpr size_t kBytesA = 32;  // of a row, as stored
size_t bytes_b(const Product& product) { return product.sparse ? 64 : 32; }

// The 16 rows of a product that its warp has (9.7.15.5.1.1.3).
void compute(const Block& block, int warp, Thread* const (&lanes)[32], size_t which) {
  const Product& product = lanes[0]->products.front()[which];
  const Operand a(product.a, kBytesA), b(product.b, bytes_b(product));
  uint32_t metadata[32], *sums[32];
  for (int lane = 0; lane < 32; ++lane) {
    const Product& part = lanes[lane]->products.front()[which];
    metadata[lane] = part.metadata;
    sums[lane] = lanes[lane]->sums.at(part.d).values.data();
  }
  uint8_t bytes_a[16][kBytesA];
  for (int i = 0; i < 16; ++i) a.read(block.shared, warp % 4 * 16 + i, kBytesA, bytes_a[i]);
  const Rows rows = product.sparse ? sparse_rows(bytes_a, product.type, metadata, product.selector)
                                   : dense_rows(bytes_a, product.type);
  const int element = element_bytes(product.type), count = static_cast<int>(bytes_b(product)) / element;
  for (int column = 0; column < product.n; ++column) {
    uint8_t bytes[64];
    double values[64];
    Sixteen products;
    b.read(block.shared, column, bytes_b(product), bytes);
    for (int k = 0; k < count; ++k) values[k] = widened(bytes + k * element, product.type);
    multiply(rows, values, products);
    for (int i = 0; i < 16; ++i) {
      uint32_t& sum = sums[i % 8 * 4 + column % 8 / 2][column / 8 * 4 + i / 8 * 2 + column % 2];
      sum = added(product.accumulate ? sum : 0, products[i], product.type);
    }
  }
}

// The other warps of the group must have issued, or issue later, the same.
void compare_with_group(Block& block, int warp, const Product& product) {
  std::vector<Product>& mine = block.issued[warp];
  mine.push_back(product);
  for (int other = warp / 4 * 4; other < warp / 4 * 4 + 4; ++other) {
    const std::vector<Product>& theirs = block.issued[other];
    if (theirs.size() >= mine.size() && !theirs[mine.size() - 1].same(product))
      fail("the warps of a group issue different products");
  }
}

// The oldest group of the warp.
void finish_group(Thread* const (&lanes)[32]) {
  Block& block = *lanes[0]->block;
  const int warp = lanes[0]->index / 32;
  for (size_t i = 0; i < lanes[0]->products.front().size(); ++i) {
    for (const Thread* one : lanes)
      if (one->products.front().size() <= i || !one->products.front()[i].same(lanes[0]->products.front()[i]))
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
    for (const Product& product : group) --one->sums.at(product.d).under_way;
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

void multiply(const Product& product) {
  Thread& here = this_thread();
  if (!here.begun) fail("multiply() without begin_products() after the last wait");
  begin_reading(Operand(product.a, kBytesA).range(64));
  begin_reading(Operand(product.b, bytes_b(product)).range(product.n));
  const auto [entry, is_new] = here.sums.try_emplace(product.d);
  if (is_new) {
    std::vector<uint32_t> sums(static_cast<size_t>(product.n / 2), kPoisonedSum);
    entry->second.values = sums;
    std::memcpy(entry->second.values.data(), product.d, sums.size() * 4);
    std::memcpy(product.d, sums.data(), sums.size() * 4);
  }
  ++entry->second.under_way;
  here.products.back().push_back(product);
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

void receive_products(void* d) {
  Thread& here = this_thread();
  const auto found = here.sums.find(d);
  if (found == here.sums.end()) return;  // there were none
  const auto& [values, under_way] = found->second;
  require(under_way == 0, "receive_products() of sums whose products are under way");
  for (size_t i = 0; i < values.size(); ++i) {
    uint32_t sum;
    std::memcpy(&sum, static_cast<const uint8_t*>(d) + 4 * i, 4);
    require(sum == kPoisonedSum, "the registers of sums were written before receive_products()");
  }
  std::memcpy(d, values.data(), values.size() * 4);
  here.sums.erase(found);
}

}  // namespace emulate
