// Memory cut into pieces, each at the beginning of a cache line. The first pass, without memory, adds up what they
// need.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../common/round.h"

namespace pycompress::block {

class Pieces {
 public:
  explicit Pieces(uint8_t* memory) : memory_(memory) {}
  template <class T>
  T* take(int64_t count) {
    const size_t at = bytes_;
    bytes_ += round_up<size_t>(static_cast<size_t>(count) * sizeof(T), 64);
    return memory_ == nullptr ? nullptr : reinterpret_cast<T*>(memory_ + at);
  }
  size_t bytes() const { return bytes_; }

 private:
  uint8_t* memory_;
  size_t bytes_ = 0;
};

}  // namespace pycompress::block
