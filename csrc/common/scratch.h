// Scratch memory of one thread. It grows to what the largest layer needs and stays, so that a call allocates nothing.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <new>

namespace pycompress {

class Scratch {
 public:
  ~Scratch() { std::free(memory_); }

  uint8_t* reserve(size_t bytes) {  // aligned to a cache line; what was there is lost
    if (bytes > size_) {
      std::free(memory_);
      size_ = (bytes + 4095) / 4096 * 4096;
      memory_ = std::aligned_alloc(64, size_);
      if (memory_ == nullptr) {
        size_ = 0;
        throw std::bad_alloc();
      }
    }
    return static_cast<uint8_t*>(memory_);
  }

 private:
  void* memory_ = nullptr;
  size_t size_ = 0;
};

}  // namespace pycompress
