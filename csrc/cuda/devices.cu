#include "devices.h"

#include "launch.h"

namespace pycompress::gpu {
namespace {

int attribute(cudaDeviceAttr which, int device) {
  int value = 0;
  check_cuda(cudaDeviceGetAttribute(&value, which, device), "cudaDeviceGetAttribute");
  return value;
}

}  // namespace

int current_device() {
  int device = 0;
  check_cuda(cudaGetDevice(&device), "cudaGetDevice");
  if (device >= kMaxDevices) throw std::runtime_error("more than 64 CUDA devices");
  return device;
}

Device device() {
  static std::atomic<int> known[kMaxDevices];  // arch << 16 | multiprocessors
  const int current = current_device();
  int both = known[current].load(std::memory_order_relaxed);
  if (both == 0) {
    const int arch = attribute(cudaDevAttrComputeCapabilityMajor, current) * 10 +
                     attribute(cudaDevAttrComputeCapabilityMinor, current);
    both = arch << 16 | attribute(cudaDevAttrMultiProcessorCount, current);
    known[current].store(both, std::memory_order_relaxed);
  }
  return {both >> 16, both & 0xffff};
}

DeviceGuard::DeviceGuard(int device) : before_(current_device()), device_(device) {
  if (device_ != before_) check_cuda(cudaSetDevice(device_), "cudaSetDevice");
}

DeviceGuard::~DeviceGuard() {
  if (device_ != before_) cudaSetDevice(before_);
}

}  // namespace pycompress::gpu
