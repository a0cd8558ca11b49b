// Instruction sets: what the processor has, what the user allows.
#pragma once

namespace pycompress {

// Ordered: PYCOMPRESS_ISA caps by this order. A processor need not have every level below its best one
// (Ice Lake has avx512_vnni without avx_vnni), so availability is asked level by level.
enum class Isa : int { scalar = 0, avx2 = 1, avx_vnni = 2, avx512_vnni = 3 };
constexpr int kIsaCount = 4;

const char* isa_name(Isa isa);

// The processor and its operating system can run `isa` (cpuid and xgetbv), whatever the cap says.
bool isa_detected(Isa isa);

// Detected, and not above the cap in the environment variable PYCOMPRESS_ISA (read once, at the first call).
// Throws std::invalid_argument where the variable holds an unknown name.
bool isa_available(Isa isa);

}  // namespace pycompress
