// Single instructions of compute capability 9.0 (tensor memory accelerator, mbarriers, warp-group products) under plain
// names, in inline PTX (the numbers are sections of NVIDIA's PTX ISA 9.1). Under PYCOMPRESS_EMULATE the same names come
// from tests/native/cuda/emulate_hopper.h.
#pragma once

#include "device.cuh"

#if defined(PYCOMPRESS_EMULATE)
#include "emulate_hopper.h"
#else

#include <cuda.h>

#include <stdexcept>

#include "launch.h"

namespace pycompress::gpu {

// --- mbarriers (9.7.13.15): phases that complete when all arrivals and all announced bytes have come ---------------

__device__ inline void init_barrier(uint64_t* barrier, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;\n" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}
// After init_barrier, before others (the peers of the cluster, the copy engine) use the barriers.
__device__ inline void publish_barriers() {
  asm volatile("fence.mbarrier_init.release.cluster;\nfence.proxy.async.shared::cta;\n" ::: "memory");
}
__device__ inline void arrive(uint64_t* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];\n" ::"r"(shared_address(barrier)) : "memory");
}
// At the same barrier of block `rank` of the cluster.
__device__ inline void arrive_at(uint64_t* barrier, uint32_t rank) {
  asm volatile(
      "{\n.reg .b32 remote;\n"
      "mapa.shared::cluster.u32 remote, %0, %1;\n"
      "mbarrier.arrive.shared::cluster.b64 _, [remote];\n}\n" ::"r"(shared_address(barrier)),
      "r"(rank)
      : "memory");
}
// Arrives, and announces bytes that copies will bring in this phase.
__device__ inline void arrive_expecting(uint64_t* barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;\n" ::"r"(shared_address(barrier)), "r"(bytes)
               : "memory");
}
// Until the phase of this parity (0 for the first) has completed. A new barrier passes for 1.
__device__ inline void wait(uint64_t* barrier, uint32_t parity) {
  uint32_t done = 0;
  while (done == 0)
    asm volatile(
        "{\n.reg .pred p;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
        "selp.u32 %0, 1, 0, p;\n}\n"
        : "=r"(done)
        : "r"(shared_address(barrier)), "r"(parity)
        : "memory");
}

// --- tiles of tensors in global memory (5.5, 9.7.9.27.1.2) ---------------------------------------------------------

using TensorMap = CUtensorMap;  // a kernel's parameter, const __grid_constant__

// Tiles of `box_rows` rows x `box_bytes` bytes of a matrix of bytes [rows, columns] with row stride `stride` (bytes, a
// multiple of 16). The driver's function is asked of the runtime, so that nothing links to libcuda.
inline TensorMap tensor_map_of(const void* matrix, int64_t rows, int64_t columns, int64_t stride, int box_rows,
                               int box_bytes, CUtensorMapSwizzle swizzle) {
  static void* const encode = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found = cudaDriverEntryPointSymbolNotFound;
    check_cuda(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found),
               "cudaGetDriverEntryPointByVersion");
    if (found != cudaDriverEntryPointSuccess)
      throw std::runtime_error("the CUDA driver has no cuTensorMapEncodeTiled, which came with CUDA 12.0");
    return function;
  }();
  TensorMap map;
  const cuuint64_t dimensions[] = {static_cast<cuuint64_t>(columns), static_cast<cuuint64_t>(rows)};
  const cuuint64_t strides[] = {static_cast<cuuint64_t>(stride)};
  const cuuint32_t box[] = {static_cast<cuuint32_t>(box_bytes), static_cast<cuuint32_t>(box_rows)}, steps[] = {1, 1};
  const CUresult result = reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(encode)(
      &map, CU_TENSOR_MAP_DATA_TYPE_UINT8, 2, const_cast<void*>(matrix), dimensions, strides, box, steps,
      CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS) {
    std::ostringstream message;
    message << "cuTensorMapEncodeTiled: error " << result << " for a matrix of " << rows << " rows and " << columns
            << " columns, row stride " << stride << ", at " << matrix << ", in tiles of " << box_rows << " rows of "
            << box_bytes << " bytes";
    throw std::runtime_error(message.str());
  }
  return map;
}

// Rows of 128 bytes: a tile lies in shared memory with the swizzle of swizzled<128>() in tiles.h, and is zero
// outside of the matrix.
inline TensorMap tensor_map(const void* matrix, int64_t rows, int64_t columns, int64_t stride, int box_rows) {
  return tensor_map_of(matrix, rows, columns, stride, box_rows, 128, CU_TENSOR_MAP_SWIZZLE_128B);
}
// The same of rows of 64 bytes and swizzled<64>().
inline TensorMap tensor_map_64(const void* matrix, int64_t rows, int64_t columns, int64_t stride, int box_rows) {
  return tensor_map_of(matrix, rows, columns, stride, box_rows, 64, CU_TENSOR_MAP_SWIZZLE_64B);
}

__device__ inline void prefetch(const TensorMap& map) {
  asm volatile("prefetch.tensormap [%0];\n" ::"l"(&map) : "memory");
}

// The tile that begins at byte `column` of row `row` -> `shared` (aligned to 1024); its bytes, those outside of the
// matrix too, count at `barrier`. One thread.
__device__ inline void load_tile(void* shared, const TensorMap& map, int column, int row, uint64_t* barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], "
      "[%4];\n" ::"r"(shared_address(shared)),
      "l"(&map), "r"(column), "r"(row), "r"(shared_address(barrier))
      : "memory");
}
// The same into each block of the cluster whose bit is set in `blocks`, at the same offset, counted at its barrier.
__device__ inline void load_tile_for(uint16_t blocks, void* shared, const TensorMap& map, int column, int row,
                                     uint64_t* barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster [%0], "
      "[%1, {%2, %3}], [%4], %5;\n" ::"r"(shared_address(shared)),
      "l"(&map), "r"(column), "r"(row), "r"(shared_address(barrier)), "h"(blocks)
      : "memory");
}

// --- clusters (9.7.13.3) -------------------------------------------------------------------------------------------

__device__ inline uint32_t cluster_rank() {
  uint32_t rank;
  asm("mov.u32 %0, %%cluster_ctarank;\n" : "=r"(rank));
  return rank;
}
// All threads of all blocks of the cluster, whatever they did before.
__device__ inline void synchronize_cluster() {
  asm volatile("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;\n" ::: "memory");
}

// launch() of clusters of `blocks` blocks that follow each other.
template <auto kKernel, class... Parameters>
void launch_clusters(const char* name, int blocks, const Launch& at, Parameters... arguments) {
  allow_shared<kKernel>(name, at);
  cudaLaunchAttribute cluster{};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim.x = static_cast<unsigned>(blocks);
  cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = at.grid;
  config.blockDim = at.block;
  config.dynamicSmemBytes = at.shared;
  config.stream = at.stream;
  config.attrs = &cluster;
  config.numAttrs = 1;
  check_launch(cudaLaunchKernelEx(&config, kKernel, arguments...), name, at);
}

// --- parts of a block ----------------------------------------------------------------------------------------------

// Barrier `id` (1 to 15) of `threads` threads, whole warps (9.7.13.1).
__device__ inline void synchronize(int id, int threads) {
  asm volatile("bar.sync %0, %1;\n" ::"r"(id), "r"(threads) : "memory");
}
// Of each thread of the warp group, from those that the group before gave back (9.7.19.5).
template <int kRegisters>
__device__ inline void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;\n" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ inline void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;\n" ::"n"(kRegisters));
}

// After threads have written shared memory that products or copies will use (9.7.13.4).
__device__ inline void publish_shared() { asm volatile("fence.proxy.async.shared::cta;\n" ::: "memory"); }

// --- products of a warp group (9.7.15): asynchronous, the sums in registers, the operands in shared memory ---------

// Matrix descriptor (9.7.15.5.1.2.2) of rows of 128 bytes, swizzled as above, eight rows after each other in 1024
// bytes. The next 32 bytes of k: kNextK more.
__device__ inline uint64_t descriptor(const void* shared) {
  constexpr uint64_t kSwizzle128 = uint64_t{1} << 62, kEightRows = uint64_t{1024 >> 4} << 32, kUnused = 1 << 16;
  return (shared_address(shared) & 0x3ffff) >> 4 | kUnused | kEightRows | kSwizzle128;
}
// The same of rows of 64 bytes, swizzled as by tensor_map_64(), eight rows after each other in 512 bytes.
__device__ inline uint64_t descriptor_64(const void* shared) {
  constexpr uint64_t kSwizzle64 = uint64_t{2} << 62, kEightRows = uint64_t{512 >> 4} << 32, kUnused = 1 << 16;
  return (shared_address(shared) & 0x3ffff) >> 4 | kUnused | kEightRows | kSwizzle64;
}
constexpr uint64_t kNextK = 32 >> 4;

// Before the first multiply() after the threads have used the sums' registers.
__device__ inline void begin_products() { asm volatile("wgmma.fence.sync.aligned;\n" ::: "memory"); }
__device__ inline void commit_products() { asm volatile("wgmma.commit_group.sync.aligned;\n" ::: "memory"); }
template <int kPending>
__device__ inline void wait_products() {
  asm volatile("wgmma.wait_group.sync.aligned %0;\n" ::"n"(kPending) : "memory");
}
// After wait_products<0>(): the compiler may use the sums from here on, and not before.
template <int kCount>
__device__ inline void receive_products(int32_t (&d)[kCount]) {
#pragma unroll
  for (int32_t& sum : d) asm volatile("" : "+r"(sum)::"memory");
}
template <int kCount>
__device__ inline void receive_products(float (&d)[kCount]) {
#pragma unroll
  for (float& sum : d) asm volatile("" : "+f"(sum)::"memory");
}

// The numbers of 16, 32, 64 or 128 sums in an instruction, and the sums themselves, of constraint C.
#define PYCOMPRESS_REGISTERS_16 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define PYCOMPRESS_REGISTERS_32 \
  PYCOMPRESS_REGISTERS_16       \
  ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define PYCOMPRESS_REGISTERS_64                                                      \
  PYCOMPRESS_REGISTERS_32                                                            \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47" \
  ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define PYCOMPRESS_REGISTERS_128                                                                 \
  PYCOMPRESS_REGISTERS_64                                                                        \
  ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79"             \
  ", %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"             \
  ", %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111" \
  ", %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
#define PYCOMPRESS_SUMS(C, i)                                                                                      \
  C(d[i]), C(d[i + 1]), C(d[i + 2]), C(d[i + 3]), C(d[i + 4]), C(d[i + 5]), C(d[i + 6]), C(d[i + 7]), C(d[i + 8]), \
      C(d[i + 9]), C(d[i + 10]), C(d[i + 11]), C(d[i + 12]), C(d[i + 13]), C(d[i + 14]), C(d[i + 15])
#define PYCOMPRESS_SUMS_16(C) PYCOMPRESS_SUMS(C, 0)
#define PYCOMPRESS_SUMS_32(C) PYCOMPRESS_SUMS_16(C), PYCOMPRESS_SUMS(C, 16)
#define PYCOMPRESS_SUMS_64(C) PYCOMPRESS_SUMS_32(C), PYCOMPRESS_SUMS(C, 32), PYCOMPRESS_SUMS(C, 48)
#define PYCOMPRESS_SUMS_128(C) \
  PYCOMPRESS_SUMS_64(C), PYCOMPRESS_SUMS(C, 64), PYCOMPRESS_SUMS(C, 80), PYCOMPRESS_SUMS(C, 96), PYCOMPRESS_SUMS(C, 112)

// d[64, N] (+)= a[64, K] b[N, K]^T, N = 256, 128, 64 or 32 by d's N / 2 sums, K 32 bytes of a and b. Thread i has of
// rows 16 (i / 32) + i % 32 / 4 (j even) and 8 below (j odd) the columns 8 (j / 2) + 2 (i % 4) and the next, in d[2j],
// d[2j + 1] (9.7.15.5.1.1.3).
#define PYCOMPRESS_MULTIPLY(NAME, SUM, C, TYPES, SIGNS, N, COUNT, A, B, ACCUMULATE)                               \
  __device__ inline void NAME(SUM(&d)[COUNT], uint64_t a, uint64_t b, bool accumulate) {                          \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " ACCUMULATE ", 0;\nwgmma.mma_async.sync.aligned.m64n" N TYPES \
                 " {" PYCOMPRESS_REGISTERS_##COUNT "}, " A ", " B ", p" SIGNS ";\n}\n"                            \
                 : PYCOMPRESS_SUMS_##COUNT(C)                                                                     \
                 : "l"(a), "l"(b), "r"(static_cast<int>(accumulate)));                                            \
  }
#define PYCOMPRESS_MULTIPLY_ALL(NAME, SUM, C, TYPES, SIGNS)                           \
  PYCOMPRESS_MULTIPLY(NAME, SUM, C, TYPES, SIGNS, "256", 128, "%128", "%129", "%130") \
  PYCOMPRESS_MULTIPLY(NAME, SUM, C, TYPES, SIGNS, "128", 64, "%64", "%65", "%66")     \
  PYCOMPRESS_MULTIPLY(NAME, SUM, C, TYPES, SIGNS, "64", 32, "%32", "%33", "%34")      \
  PYCOMPRESS_MULTIPLY(NAME, SUM, C, TYPES, SIGNS, "32", 16, "%16", "%17", "%18")

// int8 to int32, wrapping: multiply(). float16 (bfloat16) to float32; 1, 1: nothing is negated, 0, 0: both are K-major.
PYCOMPRESS_MULTIPLY_ALL(multiply, int32_t, "+r", "k32.s32.s8.s8", "")
PYCOMPRESS_MULTIPLY_ALL(multiply_f16, float, "+f", "k16.f32.f16.f16", ", 1, 1, 0, 0")
PYCOMPRESS_MULTIPLY_ALL(multiply_bf16, float, "+f", "k16.f32.bf16.bf16", ", 1, 1, 0, 0")

// The same with a 2:4 sparse a (9.7.15.6): 32 bytes of what is stored of it meet 64 bytes of b, which begin at a
// multiple of 64 in their rows (2 kNextK a step). Warp w of the group has the metadata of rows 16w to 16w + 15, in the
// lanes and bits of mma_sp_f16 (kSelector 0 or 1) and mma_sp_s8.
#define PYCOMPRESS_SPARSE(NAME, SUM, C, TYPES, SIGNS, SELECTOR, N, COUNT, A, B, METADATA, WHICH, ACCUMULATE)         \
  __device__ inline void NAME(SUM(&d)[COUNT], uint64_t a, uint64_t b, uint32_t metadata, bool accumulate) {          \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " ACCUMULATE ", 0;\nwgmma.mma_async.sp.sync.aligned.m64n" N TYPES \
                 " {" PYCOMPRESS_REGISTERS_##COUNT "}, " A ", " B ", " METADATA ", " WHICH ", p" SIGNS ";\n}\n"      \
                 : PYCOMPRESS_SUMS_##COUNT(C)                                                                        \
                 : "l"(a), "l"(b), "r"(metadata), "n"(SELECTOR), "r"(static_cast<int>(accumulate)));                 \
  }
#define PYCOMPRESS_SPARSE_ALL(TEMPLATE, NAME, ...)                                                   \
  TEMPLATE PYCOMPRESS_SPARSE(NAME, __VA_ARGS__, "256", 128, "%128", "%129", "%130", "%131", "%132")  \
      TEMPLATE PYCOMPRESS_SPARSE(NAME, __VA_ARGS__, "128", 64, "%64", "%65", "%66", "%67", "%68")    \
          TEMPLATE PYCOMPRESS_SPARSE(NAME, __VA_ARGS__, "64", 32, "%32", "%33", "%34", "%35", "%36") \
              TEMPLATE PYCOMPRESS_SPARSE(NAME, __VA_ARGS__, "32", 16, "%16", "%17", "%18", "%19", "%20")

PYCOMPRESS_SPARSE_ALL(template <int kSelector>, multiply_sparse_f16, float, "+f", "k32.f32.f16.f16", ", 1, 1, 0, 0",
                      kSelector)
PYCOMPRESS_SPARSE_ALL(template <int kSelector>, multiply_sparse_bf16, float, "+f", "k32.f32.bf16.bf16", ", 1, 1, 0, 0",
                      kSelector)
PYCOMPRESS_SPARSE_ALL(, multiply_sparse_s8, int32_t, "+r", "k64.s32.s8.s8", "", 0)

#undef PYCOMPRESS_SPARSE_ALL
#undef PYCOMPRESS_SPARSE
#undef PYCOMPRESS_MULTIPLY_ALL
#undef PYCOMPRESS_MULTIPLY
#undef PYCOMPRESS_SUMS_128
#undef PYCOMPRESS_SUMS_64
#undef PYCOMPRESS_SUMS_32
#undef PYCOMPRESS_SUMS_16
#undef PYCOMPRESS_SUMS
#undef PYCOMPRESS_REGISTERS_128
#undef PYCOMPRESS_REGISTERS_64
#undef PYCOMPRESS_REGISTERS_32
#undef PYCOMPRESS_REGISTERS_16

}  // namespace pycompress::gpu

#endif
