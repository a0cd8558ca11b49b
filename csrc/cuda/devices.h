// The devices that kernels run on. No CUDA header is needed here.
#pragma once

namespace pycompress::gpu {

constexpr int kMaxDevices = 64;

int current_device();  // of the calling thread

struct Device {
  int arch;  // compute capability times ten
  int multiprocessors;
};
Device device();  // the current one; asked once

// The calling thread's device while this lives.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device);
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;
  ~DeviceGuard();

 private:
  const int before_, device_;
};

}  // namespace pycompress::gpu
