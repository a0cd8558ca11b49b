// Building and checking packed buffers: what every op's packer does alike.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

#include "check.h"
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

// How the buffers of a packer begin: with a Header that has a magic, a version, the checksum, and the buffer's bytes.
struct PackedFormat {
  char magic[8];
  uint32_t version;
  const char *what, *packer;  // for messages

  bool begins(const uint8_t* packed, int64_t bytes) const {
    return bytes >= static_cast<int64_t>(sizeof(magic)) && std::memcmp(packed, magic, sizeof(magic)) == 0;
  }

  // When all other fields are there.
  template <class Header>
  void seal(Header& header) const {
    std::memcpy(header.magic, magic, sizeof(magic));
    header.version = version;
    header.checksum = checksum_of(header);
  }

  // Throws std::invalid_argument where this packer of this version did not make the buffer.
  template <class Header>
  const Header& header_of(const uint8_t* packed, int64_t bytes) const {
    check(bytes >= static_cast<int64_t>(sizeof(Header)) && begins(packed, bytes), what,
          ": unknown format, expected what ", packer, " of this version returns");
    const Header& header = *reinterpret_cast<const Header*>(packed);
    check(header.version == version && header.checksum == checksum_of(header), what,
          ": its header was changed, or another version made it");
    check(header.bytes == static_cast<uint64_t>(bytes), what, ": ", bytes, " bytes, its header says ", header.bytes);
    return header;
  }
};

}  // namespace pycompress
