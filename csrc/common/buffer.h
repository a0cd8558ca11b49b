// Building and checking packed buffers: what every op's packer does alike.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

#include "round.h"

namespace pycompress {

template <class T>
void append(std::vector<uint8_t>& out, const T* values, size_t count) {
  const auto* bytes = reinterpret_cast<const uint8_t*>(values);
  out.insert(out.end(), bytes, bytes + count * sizeof(T));
}

// FNV-1a over a header but its checksum: an edited one must not send the kernels out of the buffer.
template <class Header>
uint32_t checksum_of(Header header) {
  static_assert(std::has_unique_object_representations_v<Header>, "padding between fields has no certain value");
  header.checksum = 0;
  unsigned char bytes[sizeof(Header)];
  std::memcpy(bytes, &header, sizeof(header));
  uint32_t hash = 2166136261u;
  for (const unsigned char byte : bytes) hash = (hash ^ byte) * 16777619u;
  return hash;
}

}  // namespace pycompress
