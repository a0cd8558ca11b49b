// What the blocks of a cluster and their threads are in the midst of: shared by emulate.cpp, emulate_hopper.cpp and
// emulate_wgmma.cpp.
#pragma once

#include <deque>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "emulate_hopper.h"

namespace emulate {

struct Copy {  // cp.async
  void* shared;
  const void* global;
  int bytes, valid;
};

struct Meeting {
  const char* instruction = "";
  uint32_t arrived = 0;
  uint64_t round = 0;
  Lanes lanes = {};
};

struct Barrier {
  int threads = 0, arrived = 0, sum = 0, result = 0;
  uint64_t round = 0;
};

struct Range {  // of offsets in a block's dynamic shared memory
  size_t begin, end;
  bool overlaps(const Range& other) const { return begin < other.end && other.begin < end; }
};

struct Sums {  // what stands in registers that are poisoned until receive_products()
  std::vector<uint32_t> values;
  int under_way = 0;
};

struct Mbarrier {
  uint32_t count = 0, pending = 0;
  int64_t bytes = 0;  // announced and not yet come; below 0 where they came first
  uint64_t phase = 0;
};

struct Read {  // by a warp's products
  int warp;
  Range range;
};

struct Block;

struct Thread {
  int index = 0;  // in its block
  Block* block = nullptr;
  std::deque<std::vector<Copy>> copies = std::deque<std::vector<Copy>>(1);
  bool begun = false;  // begin_products() since the last wait
  std::deque<std::vector<Product>> products = std::deque<std::vector<Product>>(1);  // the last is not committed
  std::map<void*, Sums> sums;
};

struct Block {
  unsigned rank = 0;  // in its cluster
  Index index{};
  int threads = 0, returned = 0;
  uint8_t* shared = nullptr;
  std::map<std::pair<int, uint32_t>, Meeting> meetings;  // by warp and mask
  Barrier barriers[16];
  std::map<size_t, Mbarrier> mbarriers;  // by offset
  std::deque<Read> reads;
  std::map<int, std::vector<Product>> issued;  // by warp
  int registers_left = 0;
};

struct TileCopy {  // a tile on its way into a block
  Block* block;
  Range range;
  size_t mbarrier;
  std::vector<uint8_t> bytes;
};

struct Cluster {
  std::vector<std::unique_ptr<Block>> blocks;
  std::deque<TileCopy> copies;
  Barrier barrier;
};
extern Cluster cluster;

Thread& this_thread();
size_t shared_bytes();
bool in_shared(const void* pointer, size_t bytes);  // of this thread's block
size_t swizzled(size_t offset, int row_bytes);      // in the shared memory, of rows of 128 or 64 bytes
bool land_one();                                    // of the tiles under way; false where there is none
std::string check_cluster();                        // what is wrong with how it ended

}  // namespace emulate
