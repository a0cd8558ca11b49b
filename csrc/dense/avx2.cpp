// AVX2 and FMA: six rows x 16 channels, 12 sums in registers. Per position two loads of weights, six broadcasts of x
// and 12 FMAs: 8 of 12 load slots, so the FMAs bind and the floor is their peak. Up to three rows the weights are read
// once and used as often as there are rows: then their bandwidth binds, and phases hide the latency of the FMAs.
#include "../common/avx2_transpose.h"
#include "../common/avx2_vector.h"
#include "kernel_list.h"

namespace pycompress::dense {
namespace {

constexpr int kMr = 6;

// kRows rows of one panel: sums of `k` positions; position p goes to chain p % kPhases.
template <int kRows, int kPhases>
inline void panel_rows(const float* a, ptrdiff_t lda, const float* panel, int64_t k, const float* start, ptrdiff_t lds,
                       float* c, ptrdiff_t ldc) {
  __m256 sum[kPhases][kRows][2];
#pragma GCC unroll 6
  for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j) {
      sum[0][i][j] = start == nullptr ? _mm256_setzero_ps() : _mm256_loadu_ps(start + i * lds + 8 * j);
#pragma GCC unroll 4
      for (int s = 1; s < kPhases; ++s) sum[s][i][j] = _mm256_setzero_ps();
    }
  for (; k >= kPhases; k -= kPhases, a += kPhases, panel += kPhases * kPanel)
#pragma GCC unroll 4
    for (int s = 0; s < kPhases; ++s) {
      const __m256 w0 = _mm256_loadu_ps(panel + s * kPanel), w1 = _mm256_loadu_ps(panel + s * kPanel + 8);
#pragma GCC unroll 6
      for (int i = 0; i < kRows; ++i) {
        const __m256 x = _mm256_broadcast_ss(a + i * lda + s);
        sum[s][i][0] = _mm256_fmadd_ps(x, w0, sum[s][i][0]);
        sum[s][i][1] = _mm256_fmadd_ps(x, w1, sum[s][i][1]);
        KEEP_IN_REGISTER(sum[s][i][0]);
        KEEP_IN_REGISTER(sum[s][i][1]);
      }
    }
  for (; k > 0; --k, ++a, panel += kPanel)
#pragma GCC unroll 6
    for (int i = 0; i < kRows; ++i) {
      const __m256 x = _mm256_broadcast_ss(a + i * lda);
      sum[0][i][0] = _mm256_fmadd_ps(x, _mm256_loadu_ps(panel), sum[0][i][0]);
      sum[0][i][1] = _mm256_fmadd_ps(x, _mm256_loadu_ps(panel + 8), sum[0][i][1]);
    }
#pragma GCC unroll 6
  for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j) {
      __m256 total = sum[0][i][j];
      if constexpr (kPhases == 2) total = _mm256_add_ps(total, sum[1][i][j]);
      if constexpr (kPhases == 4)
        total = _mm256_add_ps(_mm256_add_ps(total, sum[1][i][j]), _mm256_add_ps(sum[2][i][j], sum[3][i][j]));
      _mm256_storeu_ps(c + i * ldc + 8 * j, total);
    }
}

// Rows [row, row + kRows) of all panels.
template <int kRows, int kPhases>
void rows(const Product& p, int row) {
  for (int i = 0; i < p.panel_count; ++i)
    panel_rows<kRows, kPhases>(p.a + row * p.lda, p.lda, p.panels + i * p.stride, p.k,
                               p.start == nullptr ? nullptr : p.start + row * p.lds + i * kPanel, p.lds,
                               p.c + row * p.ldc + i * kPanel, p.ldc);
}

using Rows = void (*)(const Product& product, int row);

// All panels for the rows of a tile, and then the next: tiles of about one height, so that none is left thin.
void many(const Product& p) {
  static constexpr Rows table[kMr] = {rows<1, 1>, rows<2, 1>, rows<3, 1>, rows<4, 1>, rows<5, 1>, rows<6, 1>};
  for (int row = 0, tiles = (p.rows + kMr - 1) / kMr; tiles > 0; --tiles) {
    const int height = (p.rows - row) / tiles;
    table[height - 1](p, row);
    row += height;
  }
}

void few(const Product& p) {
  static constexpr Rows table[kFewRows] = {rows<1, 4>, rows<2, 2>, rows<3, 2>};
  table[p.rows - 1](p, 0);
}

template <Type kType>
void load_as(const void* x, ptrdiff_t ldx, int rows, int64_t k, float* out, ptrdiff_t ldo) {
  for (int m = 0; m < rows; ++m, out += ldo) {
    int64_t i = 0;
    for (; i + 8 <= k; i += 8) _mm256_storeu_ps(out + i, load_floats<kType>(x, m * ldx + i));
    if (i == k) continue;
    alignas(32) float tail[8];
    _mm256_store_ps(tail, load_tail<kType>(x, m * ldx + i, static_cast<int>(k - i)));
    for (int j = 0; i + j < k; ++j) out[i + j] = tail[j];
  }
}

void load(const void* x, Type type, ptrdiff_t ldx, int rows, int64_t k, float* out, ptrdiff_t ldo) {
  if (type == Type::float32) load_as<Type::float32>(x, ldx, rows, k, out, ldo);
  if (type == Type::bfloat16) load_as<Type::bfloat16>(x, ldx, rows, k, out, ldo);
  if (type == Type::float16) load_as<Type::float16>(x, ldx, rows, k, out, ldo);
}

template <Type kType>
void finish_as(const float* c, ptrdiff_t ldc, int rows, int columns, Activation activation, uint8_t* y, ptrdiff_t ldy) {
  constexpr int size = kType == Type::float32 ? 4 : 2;
  for (int m = 0; m < rows; ++m, c += ldc, y += ldy * size)
    for (int n = 0; n < columns; n += 8) {
      const Vector v{load_floats_up_to(c + n, columns - n)};
      const auto result = converted<kType>(__m256i{}, activate(activation, v).value);
      const size_t bytes = static_cast<size_t>(columns - n < 8 ? (columns - n) * size : 8 * size);
      __builtin_memcpy(y + n * size, &result, bytes);
    }
}

void finish(const float* c, ptrdiff_t ldc, int rows, int columns, Activation activation, Type type, void* y,
            ptrdiff_t ldy) {
  auto* at = static_cast<uint8_t*>(y);
  if (type == Type::float32) finish_as<Type::float32>(c, ldc, rows, columns, activation, at, ldy);
  if (type == Type::bfloat16) finish_as<Type::bfloat16>(c, ldc, rows, columns, activation, at, ldy);
  if (type == Type::float16) finish_as<Type::float16>(c, ldc, rows, columns, activation, at, ldy);
}

template <Type kType>
void turn_as(const void* rows, ptrdiff_t ld, int count, int64_t length, float* panel) {
  for (int64_t i = 0; i < length; i += 8)
    for (int n = 0; n < kPanel; n += 8) {
      const int left = static_cast<int>(length - i < 8 ? length - i : 8);
      __m256 r[8];
#pragma GCC unroll 8
      for (int j = 0; j < 8; ++j) {
        const ptrdiff_t at = (n + j) * ld + i;
        r[j] = n + j >= count ? _mm256_setzero_ps()
               : left == 8    ? load_floats<kType>(rows, at)
                              : load_tail<kType>(rows, at, left);
      }
      transpose(r);
      for (int j = 0; j < left; ++j) _mm256_storeu_ps(panel + (i + j) * kPanel + n, r[j]);
    }
}

void turn(const void* rows, Type type, ptrdiff_t ld, int count, int64_t length, float* panel) {
  if (type == Type::float32) turn_as<Type::float32>(rows, ld, count, length, panel);
  if (type == Type::bfloat16) turn_as<Type::bfloat16>(rows, ld, count, length, panel);
  if (type == Type::float16) turn_as<Type::float16>(rows, ld, count, length, panel);
}

}  // namespace

const Kernel kAvx2{"avx2_6x16", Isa::avx2, kMr, kPanel, 1, many, few, load, finish, turn};

}  // namespace pycompress::dense
