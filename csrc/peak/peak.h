// What this machine can do at most: loops that only do the work a kernel is counted in, so that every benchmark figure
// can be read as a share of a limit measured in the same minute.
#pragma once

#include <cstdint>

namespace pycompress::peak {

// Operations (a multiply-add counts as two) per nanosecond, i.e. G op/s, over `threads` threads for about `seconds`.
// loop: "fp32_fma", or "maddubs_d1", "_d2", "_d4", "_d8": u8 * s8 products of which d are added in 16 bits
// before one widening. Throws std::invalid_argument for another name or where the processor has no AVX2.
double operations(const char* loop, double seconds, int threads);

// Read bandwidth in GB/s: each thread streams its own share of `bytes` again and again for about `seconds`.
double bandwidth(int64_t bytes, double seconds, int threads);

// The loops themselves (avx2.cpp): `count` rounds; they return the operations done.
double fp32_fma(int64_t count);
template <int kDepth>
double maddubs(int64_t count);
double read(const uint8_t* data, int64_t bytes);  // returns a value that depends on all of it

}  // namespace pycompress::peak
