// Rows that become columns, eight by eight, for the kernels of every x86 instruction set. In an anonymous namespace,
// because each instruction-set file compiles its own copy and the linker must not merge them.
#pragma once

#include "../common/avx2_transpose.h"
#include "kernel.h"

namespace pycompress::block {
namespace {

// out[column][tile] (+)= scale * rows[queries][columns], zeros behind the last query; tile is a multiple of 8.
inline void turn_rows(const float* rows, ptrdiff_t ld, int queries, int columns, int tile, float scale, bool add,
                      float* out) {
  const __m256 factor = _mm256_set1_ps(scale);
  for (int q = 0; q < tile; q += 8)
    for (int c = 0; c < columns; c += 8) {
      const int width = columns - c < 8 ? columns - c : 8;
      const __m256i lanes = _mm256_cmpgt_epi32(_mm256_set1_epi32(width), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
      __m256 r[8];
#pragma GCC unroll 8
      for (int i = 0; i < 8; ++i)
        r[i] = q + i < queries ? _mm256_maskload_ps(rows + (q + i) * ld + c, lanes) : _mm256_setzero_ps();
      transpose(r);
      for (int i = 0; i < width; ++i) {
        float* at = out + (c + i) * tile + q;
        const __m256 scaled = _mm256_mul_ps(r[i], factor);
        _mm256_storeu_ps(at, add ? _mm256_add_ps(_mm256_loadu_ps(at), scaled) : scaled);
      }
    }
}

inline void turn(const float* rows, ptrdiff_t ld, int queries, int columns, int tile, bool add, float* out) {
  turn_rows(rows, ld, queries, columns, tile, 1.0f, add, out);
}

}  // namespace
}  // namespace pycompress::block
