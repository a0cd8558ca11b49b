// A grid of thread blocks on the host, so that the kernels' own source runs in tests where there is no device.
//
//   #define PYCOMPRESS_EMULATE                         // before all includes; -I tests/native/cuda and the toolkit's
//   #include "../../../csrc/int8/gemm_sm80.cu"         // its launch<kernel>(...) runs the kernel here and returns
//   emulate::options.threads = emulate::Order::random; // and .reversed_blocks, .seed: all orders must give the same
//
// A block's threads are fibers on one OS thread: each runs until it waits (for a barrier, its warp, a copy), then the
// next in `options.threads` order runs, the warps along with each other or one far ahead of the others. Blocks run one
// after the other. What goes wrong throws std::runtime_error out of launch(), with the thread: a deadlock (and what
// each thread waits for), a warp whose lanes execute different instructions, an unaligned address, an access outside
// the shared memory by one of the instructions below, a copy that nobody waited for, sparsity metadata whose positions
// do not ascend. Shared memory is filled with kPoison before each block; it has exactly the bytes that the launch asked
// for, an unmapped page on the one side and watched bytes on the other.
//
// What a kernel's source may use:
//   threadIdx, blockIdx, blockDim, gridDim; __shared__ variables inside functions (no `extern`: see dynamic_shared();
//     they are static variables, so that they are poisoned in no way); __syncthreads and its relatives, __syncwarp,
//     __shfl_*_sync, __ballot_sync and the like, atomics, and the arithmetic intrinsics at the end of this file
//   the names of csrc/cuda/device.cuh and launch.h; Hopper's are in emulate_hopper.h
//   cuda_fp16.h and cuda_bf16.h as they are: their conversions and arithmetic have host versions
// Copies of cp.async land when the thread waits for their group, and the target is poison until then.
//
// Written from NVIDIA's PTX ISA 9.1; the numbers are its sections. Link emulate.cpp, emulate_mma.cpp,
// emulate_hopper.cpp and emulate_wgmma.cpp.
#pragma once

#if !defined(PYCOMPRESS_EMULATE)
#define PYCOMPRESS_EMULATE
#endif

// The toolkit's headers respect these. __shared__ is what the emulation needs; the rest is nothing to a host compiler.
#define __shared__ static
#define __global__
#define __device__
#define __host__
#define __constant__ static
#define __launch_bounds__(...)
#define __grid_constant__

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <stdexcept>
#include <string>
#include <type_traits>

namespace emulate {

enum class Order { ascending, descending, random };

enum class Landing { late, early, random };  // of tiles: when nobody can run, at once, at any time

struct Options {
  Order threads = Order::ascending;
  Landing tiles = Landing::late;
  bool reversed_blocks = false;
  uint32_t seed = 1;                   // of what is random
  int arch = 90, multiprocessors = 3;  // what gpu::device() says
};
inline Options options;

constexpr int kPoison = 0xff;  // NaN in every float type, -1 in every integer

[[noreturn]] void fail(const std::string& what);  // throws, which ends the launch

inline void require(bool holds, const char* what) {
  if (!holds) fail(what);
}

// Runs body() once per thread; the blocks of a cluster at the same time.
void run(dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& body, unsigned cluster = 1);

template <class... Parameters, class... Arguments>
void launch(dim3 grid, dim3 block, size_t shared_bytes, void (*kernel)(Parameters...), Arguments... arguments) {
  run(grid, block, shared_bytes, [&] { kernel(arguments...); });
}

// --- what the instructions are made of ------------------------------------------------------------------------------

struct Index {
  unsigned x, y, z;
};

int thread();  // of this block, x fastest
int block_threads();

// Lets others run until ready() holds. `what` is for the report of a deadlock.
void wait(bool (*ready)(void*), void* context, const char* what);
template <class F>
void wait_until(F ready, const char* what) {
  wait([](void* context) { return (*static_cast<F*>(context))(); }, &ready, what);
}

// All lanes of `mask` hand over an argument each; the last to come runs execute(lanes) for them all.
using Lanes = void* [32];
void meet(uint32_t mask, const char* instruction, void* argument, void (*execute)(Lanes& lanes));
template <class A, class F>
void meet(uint32_t mask, const char* instruction, A& argument, F) {
  static_assert(std::is_empty_v<F>, "the argument is all that it may use");
  meet(mask, instruction, static_cast<void*>(&argument), [](Lanes& lanes) {
    A* arguments[32];
    for (int i = 0; i < 32; ++i) arguments[i] = static_cast<A*>(lanes[i]);
    alignas(F) unsigned char empty[sizeof(F)] = {};
    (*reinterpret_cast<const F*>(empty))(arguments);
  });
}

// Named barrier `id` (9.7.13.1): until `threads` have come. Gives what `value` added up to.
int barrier(int id, int threads, int value, const char* instruction);

uint8_t* shared_memory();                            // of the block, dynamic
uint8_t* shared_at(uint32_t address, size_t bytes);  // fails outside
uint32_t shared_address(const void* pointer);        // as an address of the shared window

constexpr uint32_t kSharedBase = 1024;  // where the dynamic shared memory begins in the window

template <class T>
T shuffle(uint32_t mask, T value, int source, int width, const char* instruction) {
  struct Argument {
    T value;
    int source, width;
    T result;
  } argument{value, source, width, value};
  meet(mask, instruction, argument, [](Argument*(&lanes)[32]) {
    for (int i = 0; i < 32; ++i)
      if (lanes[i] != nullptr && lanes[i]->source >= 0) {
        const int from = lanes[i]->source;
        require(lanes[from] != nullptr, "a shuffle reads a lane that is not in its mask");
        lanes[i]->result = lanes[from]->value;
      }
  });
  return argument.result;
}

inline int lane() { return thread() % 32; }
uint32_t ballot(uint32_t mask, bool value, const char* instruction);

void load_matrices(uint32_t (&r)[4], const void* shared_row, bool transposed);
enum class Element { s8, f16, bf16 };
void mma(void* c, const uint32_t (&a)[4], const uint32_t (&b)[2], Element type);  // c: four sums, int32 or float32
void mma_sp(void* c, const uint32_t (&a)[4], const uint32_t (&b)[4], Element type, int selector, uint32_t metadata);
void copy_async(void* shared, const void* global, int bytes, int valid);
void commit_copies();
void wait_copies(int pending);

}  // namespace emulate

inline emulate::Index threadIdx, blockIdx, blockDim, gridDim;

// --- csrc/cuda/launch.h ---------------------------------------------------------------------------------------------

namespace pycompress::gpu {

struct Launch {
  dim3 grid, block;
  size_t shared;
  cudaStream_t stream;
};
struct Device {
  int arch, multiprocessors;
};
inline Device device() { return {emulate::options.arch, emulate::options.multiprocessors}; }
inline int current_device() { return 0; }
class DeviceGuard {
 public:
  explicit DeviceGuard(int) {}
};

template <auto kKernel, class... Arguments>
void launch(const char* name, const Launch& at, Arguments... arguments) {
  try {
    emulate::launch(at.grid, at.block, at.shared, kKernel, arguments...);
  } catch (const std::exception& error) {
    throw std::runtime_error(std::string(name) + ": " + error.what());
  }
}

// --- csrc/cuda/device.cuh -------------------------------------------------------------------------------------------

inline uint8_t* dynamic_shared() { return emulate::shared_memory(); }
inline uint32_t shared_address(const void* pointer) { return emulate::shared_address(pointer); }

inline void copy_async(void* shared, const void* global, int bytes = 16) {
  emulate::copy_async(shared, global, 16, bytes);
}
inline uint64_t evict_first() { return 0; }
inline void copy_async_once(void* shared, const void* global, uint64_t) { copy_async(shared, global); }
inline void commit_copies() { emulate::commit_copies(); }
template <int kPending>
void wait_copies() {
  emulate::wait_copies(kPending);
}

inline void load_matrices(uint32_t (&r)[4], const void* shared_row) { emulate::load_matrices(r, shared_row, false); }
inline void load_matrices_transposed(uint32_t (&r)[4], const void* shared_row) {
  emulate::load_matrices(r, shared_row, true);
}
inline void mma_s8(int32_t (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  emulate::mma(c, a, {b0, b1}, emulate::Element::s8);
}
inline void mma_f16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  emulate::mma(c, a, {b0, b1}, emulate::Element::f16);
}
inline void mma_bf16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  emulate::mma(c, a, {b0, b1}, emulate::Element::bf16);
}
template <int kSelector>
void mma_sp_f16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[4], uint32_t metadata) {
  emulate::mma_sp(c, a, b, emulate::Element::f16, kSelector, metadata);
}
template <int kSelector>
void mma_sp_bf16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[4], uint32_t metadata) {
  emulate::mma_sp(c, a, b, emulate::Element::bf16, kSelector, metadata);
}
inline void mma_sp_s8(int32_t (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[4], uint32_t metadata) {
  emulate::mma_sp(c, a, b, emulate::Element::s8, 0, metadata);
}

template <class T>
T shuffle_xor(T value, int mask) {
  return emulate::shuffle(~0u, value, emulate::lane() ^ mask, 32, "shuffle_xor");
}
inline bool any_in_warp(bool value) { return emulate::ballot(~0u, value, "any_in_warp") != 0; }

inline uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}
inline float float_of(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

}  // namespace pycompress::gpu

// --- CUDA C++: synchronization and warps ----------------------------------------------------------------------------

inline void __syncthreads() { emulate::barrier(0, emulate::block_threads(), 0, "__syncthreads"); }
inline int __syncthreads_count(int value) {
  return emulate::barrier(0, emulate::block_threads(), value != 0, "__syncthreads_count");
}
inline int __syncthreads_or(int value) { return __syncthreads_count(value) != 0; }
inline int __syncthreads_and(int value) { return __syncthreads_count(value) == emulate::block_threads(); }
inline void __syncwarp(unsigned mask = ~0u) {
  int nothing = 0;
  emulate::meet(mask, "__syncwarp", nothing, [](int*(&)[32]) {});
}
inline void __threadfence() {}
inline void __threadfence_block() {}

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32) {
  const int first = emulate::lane() / width * width;
  return emulate::shuffle(mask, value, first + (source & (width - 1)), width, "__shfl_sync");
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = 32) {
  const int source = emulate::lane() ^ lanes, first = emulate::lane() / width * width;
  return emulate::shuffle(mask, value, source < first + width ? source : -1, width, "__shfl_xor_sync");
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned by, int width = 32) {
  const int source = emulate::lane() + static_cast<int>(by), first = emulate::lane() / width * width;
  return emulate::shuffle(mask, value, source < first + width ? source : -1, width, "__shfl_down_sync");
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned by, int width = 32) {
  const int source = emulate::lane() - static_cast<int>(by), first = emulate::lane() / width * width;
  return emulate::shuffle(mask, value, source >= first ? source : -1, width, "__shfl_up_sync");
}
inline unsigned __ballot_sync(unsigned mask, int value) { return emulate::ballot(mask, value != 0, "__ballot_sync"); }
inline int __any_sync(unsigned mask, int value) { return emulate::ballot(mask, value != 0, "__any_sync") != 0; }
inline int __all_sync(unsigned mask, int value) { return emulate::ballot(mask, value == 0, "__all_sync") == 0; }

// --- CUDA C++: atomics (a fiber is not interrupted) -----------------------------------------------------------------

template <class T, class U>
T atomicAdd(T* address, U value) {
  const T before = *address;
  *address = before + static_cast<T>(value);
  return before;
}
template <class T, class U>
T atomicMax(T* address, U value) {
  const T before = *address;
  *address = std::max(before, static_cast<T>(value));
  return before;
}
template <class T, class U>
T atomicMin(T* address, U value) {
  const T before = *address;
  *address = std::min(before, static_cast<T>(value));
  return before;
}
template <class T, class U>
T atomicOr(T* address, U value) {
  const T before = *address;
  *address = before | static_cast<T>(value);
  return before;
}
template <class T, class U>
T atomicExch(T* address, U value) {
  const T before = *address;
  *address = static_cast<T>(value);
  return before;
}
template <class T, class U, class V>
T atomicCAS(T* address, U expected, V value) {
  const T before = *address;
  if (before == static_cast<T>(expected)) *address = static_cast<T>(value);
  return before;
}

// --- CUDA C++: arithmetic and loads (compile with -ffp-contract=off) ------------------------------------------------

using std::max;
using std::min;

inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __frcp_rn(float a) { return 1.0f / a; }
inline float __fsqrt_rn(float a) { return std::sqrt(a); }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float __int2float_rn(int value) { return static_cast<float>(value); }
inline float __uint2float_rn(unsigned value) { return static_cast<float>(value); }
inline int __float2int_rn(float value) { return static_cast<int>(std::lrintf(value)); }
inline unsigned __float_as_uint(float value) { return pycompress::gpu::bits_of(value); }
inline int __float_as_int(float value) { return static_cast<int>(pycompress::gpu::bits_of(value)); }
inline float __uint_as_float(unsigned bits) { return pycompress::gpu::float_of(bits); }
inline float __int_as_float(int bits) { return pycompress::gpu::float_of(static_cast<unsigned>(bits)); }
inline int __popc(unsigned value) { return __builtin_popcount(value); }
inline int __ffs(int value) { return __builtin_ffs(value); }
inline int __clz(int value) { return value == 0 ? 32 : __builtin_clz(static_cast<unsigned>(value)); }

// Byte i of the result is byte (selector >> 4i) & 7 of y:x, or its sign eight times where bit 3 is set (9.7.9.7, prmt).
inline unsigned __byte_perm(unsigned x, unsigned y, unsigned selector) {
  const uint64_t bytes = static_cast<uint64_t>(y) << 32 | x;
  unsigned result = 0;
  for (int i = 0; i < 4; ++i) {
    const unsigned pick = selector >> 4 * i & 15;
    unsigned byte = static_cast<unsigned>(bytes >> 8 * (pick & 7)) & 255;
    if (pick & 8) byte = byte & 128 ? 255 : 0;
    result |= byte << 8 * i;
  }
  return result;
}
inline int __dp4a(int a, int b, int c) {
  for (int i = 0; i < 4; ++i) c += static_cast<int8_t>(a >> 8 * i) * static_cast<int8_t>(b >> 8 * i);
  return c;
}

// Products of two halves are exact in double; the sum is rounded to float first, which changes it only where 24 bits do
// not hold it.
inline __half2 __hfma2(__half2 a, __half2 b, __half2 c) {
  const auto fma = [](__half x, __half y, __half z) {
    return __float2half_rn(
        static_cast<float>(static_cast<double>(__half2float(x)) * __half2float(y) + __half2float(z)));
  };
  return __halves2half2(fma(__low2half(a), __low2half(b), __low2half(c)),
                        fma(__high2half(a), __high2half(b), __high2half(c)));
}

template <class T>
T __ldg(const T* pointer) {
  return *pointer;
}
template <class T>
T __ldcs(const T* pointer) {
  return *pointer;
}
template <class T>
T __ldcg(const T* pointer) {
  return *pointer;
}
template <class T>
void __stcs(T* pointer, T value) {
  *pointer = value;
}
template <class T>
void __stcg(T* pointer, T value) {
  *pointer = value;
}
