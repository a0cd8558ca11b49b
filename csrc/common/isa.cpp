#include "isa.h"

#include <cstdlib>
#include <cstring>
#include <string>

#include "check.h"

#if defined(__x86_64__)
#include <cpuid.h>
#include <cstdint>
#endif

namespace pycompress {
namespace {

const char* const kNames[kIsaCount] = {"scalar", "avx2", "avx_vnni", "avx512_vnni"};

struct Detected {
  bool has[kIsaCount] = {true, false, false, false};

  Detected() {
#if defined(__x86_64__)
    unsigned a, b, c, d;
    if (!__get_cpuid(1, &a, &b, &c, &d)) return;
    const bool fma = c & (1u << 12), popcnt = c & (1u << 23), osxsave = c & (1u << 27), avx = c & (1u << 28),
               f16c = c & (1u << 29);
    if (!osxsave || !avx) return;
    // The operating system must save the registers too: bits 1-2 are xmm and ymm, 5-7 the AVX-512 state.
    uint32_t low, high;
    __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    const bool ymm = (low & 0x6) == 0x6, zmm = (low & 0xe6) == 0xe6;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return;
    const unsigned leaves = a;
    const bool avx2 = b & (1u << 5);
    const bool avx512 = (b & (1u << 16)) && (b & (1u << 30)) && (b & (1u << 31));  // F, BW, VL
    const bool vnni512 = c & (1u << 11);
    has[1] = ymm && avx2 && fma && f16c && popcnt;
    has[3] = has[1] && zmm && avx512 && vnni512;
    if (leaves >= 1 && __get_cpuid_count(7, 1, &a, &b, &c, &d)) has[2] = has[1] && (a & (1u << 4));
#endif
  }
};

const Detected& detected() {
  static const Detected instance;
  return instance;
}

int cap() {
  const char* name = std::getenv("PYCOMPRESS_ISA");
  if (name == nullptr || *name == '\0') return kIsaCount - 1;
  for (int i = 0; i < kIsaCount; ++i)
    if (std::strcmp(name, kNames[i]) == 0) return i;
  check(false, "PYCOMPRESS_ISA is '", name, "', expected scalar, avx2, avx_vnni or avx512_vnni");
  return 0;
}

}  // namespace

const char* isa_name(Isa isa) { return kNames[static_cast<int>(isa)]; }

bool isa_detected(Isa isa) { return detected().has[static_cast<int>(isa)]; }

bool isa_available(Isa isa) {
  static const int limit = cap();
  return static_cast<int>(isa) <= limit && isa_detected(isa);
}

}  // namespace pycompress
