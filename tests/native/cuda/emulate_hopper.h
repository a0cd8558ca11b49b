// The emulation of what csrc/cuda/hopper.cuh has: mbarriers, tiles brought by the tensor memory accelerator, clusters,
// named barriers, register reallocation and the products of warp groups. See emulate.h. It fails, with the thread,
// where
//   products read what a copy is still to bring, or a copy goes where products under way still read
//   the registers of sums are written before receive_products() (until then they are poison), or multiply() comes
//     without begin_products()
//   the warps of a group, or the lanes of a warp, issue different products
//   a phase gets more arrivals than it counts, or a barrier ends in the midst of one: bytes announced that no copy
//   brought, or too few of them; a copy, or an arrival, is for a block whose threads have returned
// Tiles land as options.tiles says: by default only when no thread can run any more, their target poison until then.
#pragma once

#include <cstdint>

#include "emulate.h"

namespace emulate {

struct TensorMap {
  const uint8_t* matrix;
  int64_t rows, columns, stride;
  int box_rows, box_bytes;
};

struct Product {  // wgmma
  Element type;
  bool sparse;
  int selector;  // of a sparse one, as the metadata
  uint32_t metadata;
  uint64_t a, b;
  bool accumulate;
  void* d = nullptr;  // n / 2 sums, int32 or float32
  int n = 0;
  // Whether the lanes of a warp, and the warps of a group, may issue it as theirs.
  bool same(const Product& o) const {
    return type == o.type && sparse == o.sparse && selector == o.selector && n == o.n && a == o.a && b == o.b &&
           accumulate == o.accumulate;
  }
};

// Of the block of that rank in the cluster; negative: this thread's own.
void init_barrier(const uint64_t* barrier, uint32_t arrivals);
void arrive(const uint64_t* barrier, int rank, int64_t bytes);
void wait_barrier(const uint64_t* barrier, uint32_t parity);
void load_tile(uint16_t blocks, const void* shared, const TensorMap& map, int column, int row, const uint64_t* barrier);
uint32_t cluster_rank();
void synchronize_cluster();
void set_registers(int registers, bool more);
void begin_products();
void multiply(const Product& product);
void commit_products();
void wait_products(int pending);
void receive_products(void* d);

}  // namespace emulate

namespace pycompress::gpu {

using TensorMap = emulate::TensorMap;
TensorMap tensor_map(const void* matrix, int64_t rows, int64_t columns, int64_t stride, int box_rows);
TensorMap tensor_map_64(const void* matrix, int64_t rows, int64_t columns, int64_t stride, int box_rows);
inline void prefetch(const TensorMap&) {}

template <auto kKernel, class... Arguments>
void launch_clusters(const char* name, int blocks, const Launch& at, Arguments... arguments) {
  try {
    emulate::run(at.grid, at.block, at.shared, [&] { kKernel(arguments...); }, static_cast<unsigned>(blocks));
  } catch (const std::exception& error) {
    throw std::runtime_error(std::string(name) + ": " + error.what());
  }
}

inline void init_barrier(uint64_t* barrier, uint32_t arrivals) { emulate::init_barrier(barrier, arrivals); }
inline void publish_barriers() {}
inline void publish_shared() {}
inline void arrive(uint64_t* barrier) { emulate::arrive(barrier, -1, 0); }
inline void arrive_at(uint64_t* barrier, uint32_t rank) { emulate::arrive(barrier, static_cast<int>(rank), 0); }
inline void arrive_expecting(uint64_t* barrier, uint32_t bytes) { emulate::arrive(barrier, -1, bytes); }
inline void wait(uint64_t* barrier, uint32_t parity) { emulate::wait_barrier(barrier, parity); }

inline void load_tile(void* shared, const TensorMap& map, int column, int row, uint64_t* barrier) {
  emulate::load_tile(static_cast<uint16_t>(1 << emulate::cluster_rank()), shared, map, column, row, barrier);
}
inline void load_tile_for(uint16_t blocks, void* shared, const TensorMap& map, int column, int row, uint64_t* barrier) {
  emulate::load_tile(blocks, shared, map, column, row, barrier);
}

inline uint32_t cluster_rank() { return emulate::cluster_rank(); }
inline void synchronize_cluster() { emulate::synchronize_cluster(); }
inline void synchronize(int id, int threads) { emulate::barrier(id, threads, 0, "bar.sync"); }

template <int kRegisters>
void take_registers() {
  static_assert(kRegisters % 8 == 0 && kRegisters >= 24 && kRegisters <= 256);
  emulate::set_registers(kRegisters, true);
}
template <int kRegisters>
void give_registers() {
  static_assert(kRegisters % 8 == 0 && kRegisters >= 24 && kRegisters <= 256);
  emulate::set_registers(kRegisters, false);
}

inline uint64_t descriptor_of(const void* shared, uint64_t swizzle, uint64_t eight_rows) {
  return (shared_address(shared) & 0x3ffff) >> 4 | uint64_t{1} << 16 | eight_rows >> 4 << 32 | swizzle << 62;
}
inline uint64_t descriptor(const void* shared) { return descriptor_of(shared, 1, 1024); }
inline uint64_t descriptor_64(const void* shared) { return descriptor_of(shared, 2, 512); }
constexpr uint64_t kNextK = 32 >> 4;

inline void begin_products() { emulate::begin_products(); }
inline void commit_products() { emulate::commit_products(); }
template <int kPending>
void wait_products() {
  emulate::wait_products(kPending);
}
template <class Sum, int kCount>
void receive_products(Sum (&d)[kCount]) {
  emulate::receive_products(d);
}

template <class Sum, int kCount>
void multiply_as(emulate::Product product, Sum (&d)[kCount]) {
  static_assert(kCount == 128 || kCount == 64 || kCount == 32 || kCount == 16);
  product.d = d;
  product.n = 2 * kCount;
  emulate::multiply(product);
}
template <int kCount>
void multiply(int32_t (&d)[kCount], uint64_t a, uint64_t b, bool accumulate) {
  multiply_as({emulate::Element::s8, false, 0, 0, a, b, accumulate}, d);
}
template <int kCount>
void multiply_f16(float (&d)[kCount], uint64_t a, uint64_t b, bool accumulate) {
  multiply_as({emulate::Element::f16, false, 0, 0, a, b, accumulate}, d);
}
template <int kCount>
void multiply_bf16(float (&d)[kCount], uint64_t a, uint64_t b, bool accumulate) {
  multiply_as({emulate::Element::bf16, false, 0, 0, a, b, accumulate}, d);
}
template <int kSelector, int kCount>
void multiply_sparse_f16(float (&d)[kCount], uint64_t a, uint64_t b, uint32_t metadata, bool accumulate) {
  multiply_as({emulate::Element::f16, true, kSelector, metadata, a, b, accumulate}, d);
}
template <int kSelector, int kCount>
void multiply_sparse_bf16(float (&d)[kCount], uint64_t a, uint64_t b, uint32_t metadata, bool accumulate) {
  multiply_as({emulate::Element::bf16, true, kSelector, metadata, a, b, accumulate}, d);
}
template <int kCount>
void multiply_sparse_s8(int32_t (&d)[kCount], uint64_t a, uint64_t b, uint32_t metadata, bool accumulate) {
  multiply_as({emulate::Element::s8, true, 0, metadata, a, b, accumulate}, d);
}

}  // namespace pycompress::gpu
