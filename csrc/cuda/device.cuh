// Single instructions under plain names, in inline PTX (the numbers are sections of NVIDIA's PTX ISA). Under
// PYCOMPRESS_EMULATE the same names come from tests/native/cuda/emulate.h, which runs the kernels' source on the host.
#pragma once

#if defined(PYCOMPRESS_EMULATE)
#include "emulate.h"
#else

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace pycompress::gpu {

// The block's dynamic shared memory, aligned to 1024 bytes (what a 128-byte swizzle wants).
__device__ inline uint8_t* dynamic_shared() {
  extern __shared__ __align__(1024) uint8_t shared_memory[];
  return shared_memory;
}

__device__ inline uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// --- asynchronous copies, sm_80 (9.7.9.25.3)
// ---------------------------------------------------------------------------

// 16 bytes from global to shared memory, both aligned to 16: the first `bytes` (0 to 16) are read, the rest is 0.
__device__ inline void copy_async(void* shared, const void* global, int bytes = 16) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(shared_address(shared)), "l"(global), "r"(bytes)
               : "memory");
}
// The same for what is read once: it is the first to leave the L2 again. `policy` is evict_first().
__device__ inline uint64_t evict_first() {
  uint64_t policy;
  asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;\n" : "=l"(policy));
  return policy;
}
__device__ inline void copy_async_once(void* shared, const void* global, uint64_t policy) {
  asm volatile("cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2;\n" ::"r"(shared_address(shared)),
               "l"(global), "l"(policy)
               : "memory");
}
__device__ inline void commit_copies() { asm volatile("cp.async.commit_group;\n" ::: "memory"); }
// Waits until at most kPending groups of this thread are under way; others see them behind __syncthreads().
template <int kPending>
__device__ inline void wait_copies() {
  asm volatile("cp.async.wait_group %0;\n" ::"n"(kPending) : "memory");
}

// --- matrix fragments, sm_75 (9.7.14.5.15) and sm_80 (9.7.14.5)
// ---------------------------------------------------------

// Four 8x8 matrices of 16-bit elements: lane i gives the address of row i % 8 of matrix i / 8 (16 bytes, aligned), and
// gets elements 2 (i % 4) and the next of row i / 4 of each.
__device__ inline void load_matrices(uint32_t (&r)[4], const void* shared_row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(shared_row))
               : "memory");
}

// c[16, 8] += a[16, 32] b[32, 8], int8 to int32, wrapping. With g = lane / 4, t = lane % 4, bytes 4t to 4t + 3 of k:
//   a[0]: row g, k 0-15;  a[1]: row g + 8, k 0-15;  a[2], a[3]: the same, k 16-31;  b[0], b[1]: column g, k 0-15, 16-31
//   c[0], c[1]: row g, columns 2t, 2t + 1;  c[2], c[3]: row g + 8
__device__ inline void mma_s8(int32_t (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};\n"
      : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// c[16, 8] += a[16, 16] b[16, 8], float16 (bfloat16) to float32; the layout is that of mma_s8 with two elements of k
// for its four.
__device__ inline void mma_f16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};\n"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
__device__ inline void mma_bf16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};\n"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// The same with a 2:4 sparse a (9.7.14.6): of each four k two are stored, in ascending k, so that its registers are
// those of mma_f16 (mma_s8), half as wide as k. `metadata` has 4 bits a group of four k: the position of the first
// stored one, and << 2 the second's, which is larger. Groups of ascending k follow each other from the lowest bits. g,
// t as above.

// c[16, 8] += a[16, 32] b[32, 8]; b[i]: column g, k 8i + 2t and the next. Metadata of lanes t = 2 kSelector + c (the
// others' is not looked at): bits 0 to 15 are row g, k 16c to 16c + 15; bits 16 to 31 row g + 8, the same k.
template <int kSelector>
__device__ inline void mma_sp_f16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[4], uint32_t metadata) {
  static_assert(kSelector == 0 || kSelector == 1);
  asm volatile(
      "mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9, %10, %11}, {%0, %1, %2, %3}, %12, %13;\n"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(b[2]), "r"(b[3]), "r"(metadata),
        "n"(kSelector));
}
template <int kSelector>
__device__ inline void mma_sp_bf16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[4], uint32_t metadata) {
  static_assert(kSelector == 0 || kSelector == 1);
  asm volatile(
      "mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9, %10, %11}, {%0, %1, %2, %3}, %12, %13;\n"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(b[2]), "r"(b[3]), "r"(metadata),
        "n"(kSelector));
}

// c[16, 8] += a[16, 64] b[64, 8]; b[i]: column g, k 16i + 4t to 16i + 4t + 3. Metadata of lane t = 2c + h: row g + 8h,
// k 32c to 32c + 31.
__device__ inline void mma_sp_s8(int32_t (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[4], uint32_t metadata) {
  asm volatile(
      "mma.sp::ordered_metadata.sync.aligned.m16n8k64.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9, %10, %11}, {%0, %1, %2, %3}, %12, 0x0;\n"
      : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(b[2]), "r"(b[3]), "r"(metadata));
}

// --- within a warp
// ------------------------------------------------------------------------------------------------------

template <class T>
__device__ inline T shuffle_xor(T value, int mask) {
  return __shfl_xor_sync(0xffffffffu, value, mask);
}
__device__ inline bool any_in_warp(bool value) { return __any_sync(0xffffffffu, value) != 0; }

// --- bits
// -----------------------------------------------------------------------------------------------------------------

__device__ inline uint32_t bits_of(float value) { return __float_as_uint(value); }
__device__ inline float float_of(uint32_t bits) { return __uint_as_float(bits); }

}  // namespace pycompress::gpu

#endif
