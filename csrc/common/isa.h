// Instruction sets: what the processor has, what the user allows.
#pragma once

#include <cstdint>

namespace pycompress {

// What code needs: features of one family of processors, a bit each. There is no order: Ice Lake has avx512_vnni and
// lacks avx_vnni. Code in plain C++ needs nothing.
struct Isa {
  enum class Family : uint32_t { none, x86, arm };
  Family family;
  uint32_t bits;

  static const Isa scalar, avx2, avx_vnni, avx512_vnni, amx_int8;
};
constexpr bool operator==(Isa a, Isa b) { return a.family == b.family && a.bits == b.bits; }
constexpr bool operator!=(Isa a, Isa b) { return !(a == b); }

inline constexpr Isa Isa::scalar{Family::none, 0};
inline constexpr Isa Isa::avx2{Family::x86, 1};  // with FMA, F16C and POPCNT
inline constexpr Isa Isa::avx_vnni{Family::x86, 1 | 2};
inline constexpr Isa Isa::avx512_vnni{Family::x86, 1 | 4};   // with F, BW and VL
inline constexpr Isa Isa::amx_int8{Family::x86, 1 | 4 | 8};  // with tiles, which the operating system grants

// Those with a name. A cap lets run what needs no other features than `allows` has, of its family.
struct NamedIsa {
  const char* name;
  Isa isa;
  uint32_t allows;
};
constexpr NamedIsa kIsas[] = {{"scalar", Isa::scalar, 0},
                              {"avx2", Isa::avx2, 1},
                              {"avx_vnni", Isa::avx_vnni, 1 | 2},
                              {"avx512_vnni", Isa::avx512_vnni, 1 | 2 | 4},
                              {"amx_int8", Isa::amx_int8, 1 | 2 | 4 | 8}};

const char* isa_name(Isa isa);

// The processor and its operating system can run `isa` (cpuid and xgetbv), whatever the cap says.
bool isa_detected(Isa isa);

// Detected, and let by the cap. The first call reads the cap from the environment variable PYCOMPRESS_ISA, and throws
// std::invalid_argument where that holds an unknown name.
bool isa_available(Isa isa);

// Caps what runs from now on, in all threads, by a name of kIsas or "": no cap. Returns the cap of before. Throws
// std::invalid_argument for another name, or where the processor lacks it.
const char* cap_isa(const char* name);

// The table of an op's kernels, best first (kernels.h, which files of an instruction set must not include).
template <class Kernel>
class Kernels;

}  // namespace pycompress
