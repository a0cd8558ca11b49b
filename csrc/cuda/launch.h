// Launching kernels: every launch is checked.
//
//   launch<kernel>("name", {grid, block, shared bytes, stream}, arguments...)
//
// Under PYCOMPRESS_EMULATE (the tests of the kernels' own source on the host) emulate.h has the same names.
#pragma once

#if defined(PYCOMPRESS_EMULATE)
#include "emulate.h"
#else

#include <cuda_runtime.h>

#include <atomic>
#include <cstdint>
#include <sstream>
#include <stdexcept>

#include "devices.h"

namespace pycompress::gpu {

struct Launch {
  dim3 grid, block;
  size_t shared;  // dynamic shared memory, bytes
  cudaStream_t stream;
};

// Becomes RuntimeError in Python.
inline void check_cuda(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // an error that does not stick must not come up again in someone else's call
  std::ostringstream message;
  message << what << ": " << cudaGetErrorName(error) << ": " << cudaGetErrorString(error);
  throw std::runtime_error(message.str());
}

inline void check_launch(cudaError_t error, const char* name, const Launch& at) {
  if (error == cudaSuccess) return;
  std::ostringstream message;
  message << "kernel " << name << ", grid " << at.grid.x << "x" << at.grid.y << "x" << at.grid.z << ", block "
          << at.block.x << "x" << at.block.y << "x" << at.block.z << ", " << at.shared << " bytes of shared memory";
  check_cuda(error, message.str().c_str());
}

// More than 48 KiB of dynamic shared memory has to be asked for, once per kernel and device. `bytes` is the same at
// every launch of a kernel that needs more than that.
template <auto kKernel>
void allow_shared(const char* name, const Launch& at) {
  static std::atomic<uint64_t> allowed{0};
  const uint64_t bit = uint64_t{1} << current_device();
  if (at.shared <= 48 * 1024 || (allowed.load(std::memory_order_relaxed) & bit) != 0) return;
  const auto bytes = static_cast<int>(at.shared);
  check_launch(cudaFuncSetAttribute(kKernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes), name, at);
  allowed.fetch_or(bit, std::memory_order_relaxed);
}

template <class T>
struct Given {  // keeps T out of the deduction, so that arguments convert as in any call
  using type = T;
};

template <class... Parameters>
cudaError_t start(void (*kernel)(Parameters...), const Launch& at, typename Given<Parameters>::type... arguments) {
  void* addresses[] = {&arguments...};
  return cudaLaunchKernel(reinterpret_cast<const void*>(kernel), at.grid, at.block, addresses, at.shared, at.stream);
}

template <auto kKernel, class... Arguments>
void launch(const char* name, const Launch& at, const Arguments&... arguments) {
  allow_shared<kKernel>(name, at);
  check_launch(start(kKernel, at, arguments...), name, at);
}

}  // namespace pycompress::gpu

#endif
