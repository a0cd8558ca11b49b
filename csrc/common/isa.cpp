#include "isa.h"

#include <atomic>
#include <cstdlib>
#include <cstring>

#include "check.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__x86_64__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace pycompress {
namespace {

constexpr NamedIsa kNone{"", Isa::scalar, ~0u};

#if defined(__x86_64__)
// Linux hands out the tiles' registers to processes that ask for them (arch_prctl, Documentation/arch/x86/xstate.rst).
bool granted_tiles() {
#if defined(__linux__)
  constexpr long kRequest = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
#else
  return false;
#endif
}
#endif

Isa detect() {
#if defined(__x86_64__)
  unsigned a, b, c, d;
  if (!__get_cpuid(1, &a, &b, &c, &d)) return Isa::scalar;
  const bool fma = c & (1u << 12), popcnt = c & (1u << 23), osxsave = c & (1u << 27), avx = c & (1u << 28),
             f16c = c & (1u << 29);
  if (!osxsave || !avx) return Isa::scalar;
  // The operating system must save the registers too: bits 1-2 are xmm and ymm, 5-7 the AVX-512 state.
  uint32_t low, high;
  __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  const bool ymm = (low & 0x6) == 0x6, zmm = (low & 0xe6) == 0xe6, tiles = (low & 0x60000) == 0x60000;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return Isa::scalar;
  const unsigned leaves = a;
  const bool avx2 = b & (1u << 5);
  const bool avx512 = (b & (1u << 16)) && (b & (1u << 30)) && (b & (1u << 31));  // F, BW, VL
  const bool vnni512 = c & (1u << 11);
  const bool amx = (d & (1u << 24)) && (d & (1u << 25));  // TILE, INT8
  if (!ymm || !avx2 || !fma || !f16c || !popcnt) return Isa::scalar;
  Isa all = Isa::avx2;
  if (zmm && avx512 && vnni512) all.bits |= Isa::avx512_vnni.bits;
  if (zmm && avx512 && vnni512 && tiles && amx && granted_tiles()) all.bits |= Isa::amx_int8.bits;
  if (leaves >= 1 && __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a & (1u << 4))) all.bits |= Isa::avx_vnni.bits;
  return all;
#else
  return Isa::scalar;
#endif
}

// All that there is here.
Isa detected() {
  static const Isa all = detect();
  return all;
}

const NamedIsa* named(const char* what, const char* name) {
  if (name == nullptr || *name == '\0') return &kNone;
  for (const NamedIsa& isa : kIsas)
    if (std::strcmp(name, isa.name) == 0) return &isa;
  check(false, what, " is '", name, "', expected scalar, avx2, avx_vnni, avx512_vnni or amx_int8");
  return nullptr;
}

std::atomic<const NamedIsa*>& cap() {
  static std::atomic<const NamedIsa*> cap{named("PYCOMPRESS_ISA", std::getenv("PYCOMPRESS_ISA"))};
  return cap;
}

bool within(Isa isa, Isa::Family family, uint32_t bits) {
  return isa.bits == 0 || (isa.family == family && (isa.bits & ~bits) == 0);
}

}  // namespace

const char* isa_name(Isa isa) {
  for (const NamedIsa& named : kIsas)
    if (named.isa == isa) return named.name;
  return "unknown";
}

bool isa_detected(Isa isa) { return within(isa, detected().family, detected().bits); }

bool isa_available(Isa isa) {
  const NamedIsa& limit = *cap().load(std::memory_order_relaxed);
  // scalar allows nothing; else a cap of another family says nothing of this one's.
  const bool other = limit.allows != 0 && limit.isa.family != isa.family;
  return (other || (isa.bits & ~limit.allows) == 0) && isa_detected(isa);
}

const char* cap_isa(const char* name) {
  const NamedIsa* to = named("cap_isa: the instruction set", name);
  check(isa_detected(to->isa), "cap_isa: this processor lacks ", to->name);
  return cap().exchange(to)->name;
}

}  // namespace pycompress
