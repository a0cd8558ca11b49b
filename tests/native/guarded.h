// Arrays between two unmapped pages: a byte past the array on the one side, or before it on the other, is a fault.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstddef>
#include <cstdlib>
#include <cstring>

namespace native {

enum class Edge { end, begin };  // which end of the array lies against a page

template <class T>
class Guarded {
 public:
  // `gap` bytes are left between the array and the page, for addresses that are less aligned.
  explicit Guarded(size_t count, Edge edge = Edge::end, size_t gap = 0) : count_(count) {
    const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE)), bytes = count * sizeof(T);
    body_ = std::max(page, (bytes + gap + page - 1) / page * page);
    map_bytes_ = body_ + 2 * page;
    map_ = static_cast<char*>(mmap(nullptr, map_bytes_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    if (map_ == MAP_FAILED) std::abort();
    begin_ = map_ + page;
    if (mprotect(begin_, body_, PROT_READ | PROT_WRITE) != 0) std::abort();
    offset_ = edge == Edge::begin ? gap : body_ - bytes - gap;
    std::memset(begin_, kAround, body_);
  }
  Guarded(const Guarded&) = delete;
  Guarded& operator=(const Guarded&) = delete;
  ~Guarded() { munmap(map_, map_bytes_); }

  T* data() { return reinterpret_cast<T*>(begin_ + offset_); }
  const T* data() const { return reinterpret_cast<const T*>(begin_ + offset_); }
  T& operator[](size_t i) { return data()[i]; }
  const T& operator[](size_t i) const { return data()[i]; }
  size_t size() const { return count_; }
  size_t bytes() const { return count_ * sizeof(T); }

  void fill(int byte) { std::memset(begin_ + offset_, byte, bytes()); }

  // Whether nothing was written on the side that has no page beside it.
  bool intact() const {
    const auto around = [](char byte) { return byte == static_cast<char>(kAround); };
    return std::all_of(begin_, begin_ + offset_, around) &&
           std::all_of(begin_ + offset_ + bytes(), begin_ + body_, around);
  }

 private:
  static constexpr int kAround = 0xa5;
  char *map_, *begin_;
  size_t map_bytes_, body_, offset_, count_;
};

}  // namespace native
