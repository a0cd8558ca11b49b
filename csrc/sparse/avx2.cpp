// AVX2 and FMA (Haswell ... Zen 3). A register holds 8 rows of x at one position; an element costs one broadcast of its
// weight and width / 8 multiplies with x from the L1.
//
// rows: two loads a cycle are the limit, so four weights are loaded at once and spread by in-lane shuffles, which run
// on a pipe that FMA leaves free; narrow tiles take several channels at once, for eight sums in flight (FMA takes four
// cycles, two start in each). The sums of the channel after next are prefetched: channels come in the order of their
// length, which no hardware prefetcher foresees.
#include "../common/avx2_transpose.h"
#include "../common/avx2_vector.h"
#include "../int8/kernel_list.h"
#include "kernel_list.h"

namespace pycompress::sparse {
namespace {

inline __m256 loads(const float* p) { return _mm256_loadu_ps(p); }

// --- tiles of x ---------------------------------------------------------------------------------------------------

// x[rows, k] -> out[k][width]
template <Type kType>
void load_columns(const void* x, ptrdiff_t ldx, int rows, int64_t k, int width, float* out) {
  if (width == 1) {
    int64_t i = 0;
    for (; i + 8 <= k; i += 8) _mm256_storeu_ps(out + i, load_floats<kType>(x, i));
    if (i < k) {
      alignas(32) float tail[8];
      _mm256_store_ps(tail, load_tail<kType>(x, i, static_cast<int>(k - i)));
      for (int j = 0; i + j < k; ++j) out[i + j] = tail[j];
    }
    return;
  }
  constexpr int kLine = kType == Type::float32 ? 16 : 32;  // positions in a cache line
  int64_t i = 0;
  for (; i + kLine <= k; i += kLine)
    for (int m = 0; m < width; m += 8) {
      // Rows often lie a multiple of 4 KiB apart, in the same L1 sets: each line is used up at once, and the next one
      // fetched, which no hardware prefetcher does for so many streams.
      for (int j = 0; j < 8 && m + j < rows; ++j)
        __builtin_prefetch(static_cast<const char*>(x) + ((m + j) * ldx + i) * (64 / kLine) + 64);
      for (int part = 0; part < kLine; part += 8) {
        const ptrdiff_t at = m * ldx + i + part;
        __m256 r[8];
        if (m + 8 <= rows) {
#pragma GCC unroll 8
          for (int j = 0; j < 8; ++j) r[j] = load_floats<kType>(x, at + j * ldx);
        } else {
#pragma GCC unroll 8
          for (int j = 0; j < 8; ++j) r[j] = m + j < rows ? load_floats<kType>(x, at + j * ldx) : _mm256_setzero_ps();
        }
        transpose(r);
#pragma GCC unroll 8
        for (int j = 0; j < 8; ++j) _mm256_storeu_ps(out + (i + part + j) * width + m, r[j]);
      }
    }
  for (; i < k; i += 8)
    for (int m = 0; m < width; m += 8) {
      const int left = static_cast<int>(k - i < 8 ? k - i : 8);
      alignas(32) float buffer[8][8];
      __m256 r[8];
#pragma GCC unroll 8
      for (int j = 0; j < 8; ++j)
        r[j] = m + j < rows ? load_tail<kType>(x, (m + j) * ldx + i, left) : _mm256_setzero_ps();
      transpose(r);
#pragma GCC unroll 8
      for (int j = 0; j < 8; ++j) _mm256_store_ps(buffer[j], r[j]);
      for (int j = 0; j < left; ++j) _mm256_storeu_ps(out + (i + j) * width + m, _mm256_load_ps(buffer[j]));
    }
}

void load_float(const void* x, Type type, ptrdiff_t ldx, int rows, int64_t k, int width, void* tile) {
  auto* out = static_cast<float*>(tile);
  if (type == Type::float32) load_columns<Type::float32>(x, ldx, rows, k, width, out);
  if (type == Type::bfloat16) load_columns<Type::bfloat16>(x, ldx, rows, k, width, out);
  if (type == Type::float16) load_columns<Type::float16>(x, ldx, rows, k, width, out);
}

// Four bytes are moved as one float: shuffles do not look at them. Quantized rows are padded up to 32 positions.
void load_groups(const void* x, Type, ptrdiff_t ldx, int rows, int64_t k, int width, void* tile) {
  load_columns<Type::float32>(x, ldx / 4, rows, (k + 3) / 4, width, static_cast<float*>(tile));
}

// uint8 [k][8] in natural order, or [k][32] with each position's rows in the order 0-3, 8-11, 16-19, 24-27, 4-7, ...,
// 28-31, which the byte shuffles of tile_quads turn into the natural one.
void load_bytes(const void* x, Type, ptrdiff_t ldx, int rows, int64_t k, int width, void* tile) {
  const __m256i gather = _mm256_broadcastsi128_si256(
      _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));  // byte j of four rows side by side
  const __m256i unlace = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
  auto* out = static_cast<uint8_t*>(tile);
  for (int64_t i = 0; i < k; i += 32) {  // eight groups of four positions at a time
    alignas(32) float groups[8 * 32];
    const int left = static_cast<int>(k - i < 32 ? k - i : 32);
    load_groups(static_cast<const uint8_t*>(x) + i, Type::float32, ldx, rows, left, width, groups);
    for (int g = 0; g < (left + 3) / 4; ++g) {
      const auto bytes = [&](int j) { return _mm256_shuffle_epi8(load256(groups + g * width + 8 * j), gather); };
      if (width == 8) {
        alignas(32) uint8_t four[32];
        store256(four, _mm256_permutevar8x32_epi32(bytes(0), unlace));
        for (int j = 0; j < 4 && 4 * g + j < left; ++j) __builtin_memcpy(out + (i + 4 * g + j) * 8, four + 8 * j, 8);
        continue;
      }
      const __m256i a = _mm256_unpacklo_epi32(bytes(0), bytes(1)), b = _mm256_unpackhi_epi32(bytes(0), bytes(1));
      const __m256i c = _mm256_unpacklo_epi32(bytes(2), bytes(3)), d = _mm256_unpackhi_epi32(bytes(2), bytes(3));
      const __m256i positions[4] = {_mm256_unpacklo_epi64(a, c), _mm256_unpackhi_epi64(a, c),
                                    _mm256_unpacklo_epi64(b, d), _mm256_unpackhi_epi64(b, d)};
      for (int j = 0; j < 4 && 4 * g + j < left; ++j) store256(out + (i + 4 * g + j) * 32, positions[j]);
    }
  }
}

// --- rows ---------------------------------------------------------------------------------------------------------

template <int kVectors>
inline __attribute__((always_inline)) void multiply_add(__m256 (&acc)[kVectors], __m256 w, const float* x) {
#pragma GCC unroll 8
  for (int v = 0; v < kVectors; ++v) acc[v] = _mm256_fmadd_ps(w, loads(x + 8 * v), acc[v]);
}

// kChannels channels of `count` weights each: sums (+)= weights . x.
template <int kChannels, int kVectors>
inline __attribute__((always_inline)) void run_channels(const uint8_t* index, const float* w, ptrdiff_t count,
                                                        const uint16_t* order, const float* x, float* sums,
                                                        bool accumulate) {
  constexpr int kWidth = 8 * kVectors;
  __m256 acc[kChannels][kVectors];
#pragma GCC unroll 4
  for (int c = 0; c < kChannels; ++c) {
    const float* next = sums + order[kChannels + (c < 2 ? c : 0)] * kWidth;
#pragma GCC unroll 4
    for (int v = 0; v < kVectors && c < 2; v += 2) __builtin_prefetch(next + 8 * v, 1);
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v)
      acc[c][v] = accumulate ? loads(sums + order[c] * kWidth + 8 * v) : _mm256_setzero_ps();
  }
  ptrdiff_t i = 0;
  for (; i + 4 <= count; i += 4) {
#pragma GCC unroll 4
    for (int c = 0; c < kChannels; ++c) {
      const __m256 four = _mm256_broadcast_ps(reinterpret_cast<const __m128*>(w + c * count + i));
      const uint8_t* at = index + c * count + i;
      multiply_add(acc[c], _mm256_permute_ps(four, 0x00), x + at[0] * kWidth);
      multiply_add(acc[c], _mm256_permute_ps(four, 0x55), x + at[1] * kWidth);
      multiply_add(acc[c], _mm256_permute_ps(four, 0xaa), x + at[2] * kWidth);
      multiply_add(acc[c], _mm256_permute_ps(four, 0xff), x + at[3] * kWidth);
    }
  }
  for (; i < count; ++i) {
#pragma GCC unroll 4
    for (int c = 0; c < kChannels; ++c)
      multiply_add(acc[c], _mm256_broadcast_ss(w + c * count + i), x + index[c * count + i] * kWidth);
  }
#pragma GCC unroll 4
  for (int c = 0; c < kChannels; ++c)
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) _mm256_storeu_ps(sums + order[c] * kWidth + 8 * v, acc[c][v]);
}

template <int kChannels, int kVectors>
void tile_width(const Block& block, const float* x, float* sums, bool accumulate) {
  const uint8_t* index = block.index;
  const auto* w = static_cast<const float*>(block.values);
  const uint16_t* order = block.order;
  for (int r = 0; r < block.run_count; ++r) {
    const ptrdiff_t count = block.runs[2 * r];
    int left = block.runs[2 * r + 1];
    for (; left >= kChannels; left -= kChannels) {
      run_channels<kChannels, kVectors>(index, w, count, order, x, sums, accumulate);
      index += kChannels * count;
      w += kChannels * count;
      order += kChannels;
    }
    for (; left > 0; --left, ++order) {
      run_channels<1, kVectors>(index, w, count, order, x, sums, accumulate);
      index += count;
      w += count;
    }
  }
}

inline float horizontal_sum(__m128 v) {
  v = _mm_add_ps(v, _mm_movehl_ps(v, v));
  return _mm_cvtss_f32(_mm_add_ss(v, _mm_movehdup_ps(v)));
}

// One row of x: four positions are fetched one by one into a register. `vgatherdps` takes half as long again on Zen 3.
// The last count % 4 are masked and not branched on: a misjudged branch costs more than a step.
void single_row(const Block& block, const float* x, float* sums, bool accumulate) {
  alignas(16) static constexpr int32_t kFirst[4][4] = {{0, 0, 0, 0}, {-1, 0, 0, 0}, {-1, -1, 0, 0}, {-1, -1, -1, 0}};
  const uint8_t* index = block.index;
  const auto* w = static_cast<const float*>(block.values);
  const uint16_t* order = block.order;
  const auto four = [x](size_t a, size_t b, size_t c, size_t d) {
    __m128 v = _mm_insert_ps(_mm_load_ss(x + a), _mm_load_ss(x + b), 0x10);
    v = _mm_insert_ps(v, _mm_load_ss(x + c), 0x20);
    return _mm_insert_ps(v, _mm_load_ss(x + d), 0x30);
  };
  for (int r = 0; r < block.run_count; ++r) {
    const ptrdiff_t count = block.runs[2 * r], full = count / 4 * 4;
    const __m128i first = _mm_load_si128(reinterpret_cast<const __m128i*>(kFirst[count % 4]));
    const uint32_t bytes = (1u << 8 * (count % 4)) - 1;  // positions behind them would lie anywhere
    for (int left = block.runs[2 * r + 1]; left > 0; --left, ++order, index += count, w += count) {
      __m128 sum = _mm_setzero_ps();
      for (ptrdiff_t i = 0; i < full; i += 4)
        sum = _mm_fmadd_ps(four(index[i], index[i + 1], index[i + 2], index[i + 3]), _mm_loadu_ps(w + i), sum);
      uint32_t last;
      __builtin_memcpy(&last, index + full, 4);
      last &= bytes;
      const __m128 rest = four(last & 255, last >> 8 & 255, last >> 16 & 255, 0);
      sum = _mm_fmadd_ps(_mm_and_ps(rest, _mm_castsi128_ps(first)), _mm_maskload_ps(w + full, first), sum);
      const float total = horizontal_sum(sum);
      sums[*order] = accumulate ? sums[*order] + total : total;
    }
  }
}

// For every mask of eight positions: lane i holds, with its sign bit set, the place among the stored weights of the one
// at position i; 0 where none is stored.
struct Places {
  alignas(32) int32_t lane[256][8];
  constexpr Places() : lane() {
    for (int mask = 0; mask < 256; ++mask)
      for (int i = 0, place = 0; i < 8; ++i)
        lane[mask][i] = mask >> i & 1 ? static_cast<int32_t>(0x80000000u | static_cast<unsigned>(place++)) : 0;
  }
};
constexpr Places kPlaces;

// One row of x and a dense weight: eight positions at a time, weights spread out by their bitmask. Positions without a
// weight are not read.
void single_row_by_bits(const Block& block, const float* x, float* sums, bool accumulate) {
  const auto* w = static_cast<const float*>(block.values);
  const uint8_t* bits = block.bits;
  const uint16_t* order = block.order;
  for (int r = 0; r < block.run_count; ++r)
    for (int left = block.runs[2 * r + 1]; left > 0; --left, ++order, bits += block.bits_per_channel) {
      __m256 acc[4];
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) acc[j] = _mm256_setzero_ps();
      for (int i = 0; i < block.bits_per_channel; i += 4) {
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) {
          const __m256i places = load256(kPlaces.lane[bits[i + j]]);
          const __m256 spread = _mm256_permutevar8x32_ps(loads(w), places);
          acc[j] = _mm256_fmadd_ps(spread, _mm256_maskload_ps(x + 8 * (i + j), places), acc[j]);
          w += __builtin_popcount(bits[i + j]);
        }
      }
      const __m256 sum = _mm256_add_ps(_mm256_add_ps(acc[0], acc[1]), _mm256_add_ps(acc[2], acc[3]));
      const float total = horizontal_sum(_mm_add_ps(_mm256_castps256_ps128(sum), _mm256_extractf128_ps(sum, 1)));
      sums[*order] = accumulate ? sums[*order] + total : total;
    }
}

void tile_rows(const Block& block, const void* tile, int width, void* sums, bool accumulate) {
  const auto* x = static_cast<const float*>(tile);
  auto* out = static_cast<float*>(sums);
  switch (width) {
    case 1:
      return (block.bits != nullptr ? single_row_by_bits : single_row)(block, x, out, accumulate);
    case 8:
      return tile_width<4, 1>(block, x, out, accumulate);
    case 16:
      return tile_width<4, 2>(block, x, out, accumulate);
    case 32:
      return tile_width<2, 4>(block, x, out, accumulate);
    default:
      return tile_width<1, 8>(block, x, out, accumulate);
  }
}

// --- panels: 16 channels share their positions, so kChannels of them share each load of x ---------------------------

template <int kChannels, int kVectors>
void panel_width(const Block& block, const float* x, float* sums, bool accumulate) {
  constexpr int kWidth = 8 * kVectors;
  const uint8_t* index = block.index;
  const auto* w = static_cast<const float*>(block.values);
  const uint16_t* order = block.order;
  for (int r = 0; r < block.run_count; ++r) {
    const ptrdiff_t count = block.runs[2 * r];
    for (int left = block.runs[2 * r + 1]; left > 0; --left, ++order, index += count, w += kPanel * count)
      for (int first = 0; first < kPanel; first += kChannels) {
        float* out = sums + (*order * kPanel + first) * kWidth;
        __m256 acc[kChannels][kVectors];
#pragma GCC unroll 8
        for (int c = 0; c < kChannels; ++c)
#pragma GCC unroll 4
          for (int v = 0; v < kVectors; ++v)
            acc[c][v] = accumulate ? loads(out + c * kWidth + 8 * v) : _mm256_setzero_ps();
        for (ptrdiff_t i = 0; i < count; ++i) {
          __m256 at[kVectors];
#pragma GCC unroll 4
          for (int v = 0; v < kVectors; ++v) at[v] = loads(x + index[i] * kWidth + 8 * v);
#pragma GCC unroll 8
          for (int c = 0; c < kChannels; ++c) {
            const __m256 weight = _mm256_broadcast_ss(w + i * kPanel + first + c);
#pragma GCC unroll 4
            for (int v = 0; v < kVectors; ++v) acc[c][v] = _mm256_fmadd_ps(weight, at[v], acc[c][v]);
          }
        }
#pragma GCC unroll 8
        for (int c = 0; c < kChannels; ++c)
#pragma GCC unroll 4
          for (int v = 0; v < kVectors; ++v) _mm256_storeu_ps(out + c * kWidth + 8 * v, acc[c][v]);
      }
  }
}

// One row of x: the channels lie side by side, so nothing has to be gathered. Four positions at once, in sums apart.
void panel_single_row(const Block& block, const float* x, float* sums, bool accumulate) {
  const uint8_t* index = block.index;
  const auto* w = static_cast<const float*>(block.values);
  const uint16_t* order = block.order;
  for (int r = 0; r < block.run_count; ++r) {
    const ptrdiff_t count = block.runs[2 * r];
    for (int left = block.runs[2 * r + 1]; left > 0; --left, ++order, index += count, w += kPanel * count) {
      float* out = sums + *order * kPanel;
      __m256 acc[4][2];
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) acc[j][0] = acc[j][1] = _mm256_setzero_ps();
      ptrdiff_t i = 0;
      for (; i + 4 <= count; i += 4) {
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) {
          const __m256 at = _mm256_broadcast_ss(x + index[i + j]);
          acc[j][0] = _mm256_fmadd_ps(at, loads(w + (i + j) * kPanel), acc[j][0]);
          acc[j][1] = _mm256_fmadd_ps(at, loads(w + (i + j) * kPanel + 8), acc[j][1]);
        }
      }
      for (; i < count; ++i) {
        const __m256 at = _mm256_broadcast_ss(x + index[i]);
        acc[0][0] = _mm256_fmadd_ps(at, loads(w + i * kPanel), acc[0][0]);
        acc[0][1] = _mm256_fmadd_ps(at, loads(w + i * kPanel + 8), acc[0][1]);
      }
#pragma GCC unroll 2
      for (int h = 0; h < 2; ++h) {
        __m256 total = _mm256_add_ps(_mm256_add_ps(acc[0][h], acc[1][h]), _mm256_add_ps(acc[2][h], acc[3][h]));
        if (accumulate) total = _mm256_add_ps(loads(out + 8 * h), total);
        _mm256_storeu_ps(out + 8 * h, total);
      }
    }
  }
}

void tile_panels(const Block& block, const void* tile, int width, void* sums, bool accumulate) {
  const auto* x = static_cast<const float*>(tile);
  auto* out = static_cast<float*>(sums);
  switch (width) {
    case 1:
      return panel_single_row(block, x, out, accumulate);
    case 8:
      return panel_width<8, 1>(block, x, out, accumulate);
    case 16:
      return panel_width<4, 2>(block, x, out, accumulate);
    default:
      return panel_width<2, 4>(block, x, out, accumulate);
  }
}

// --- quads --------------------------------------------------------------------------------------------------------

inline __m256i broadcast_quad(const int8_t* p) {
  int32_t quad;
  __builtin_memcpy(&quad, p, 4);
  return _mm256_set1_epi32(quad);
}

inline __m256i dot_add(__m256i acc, __m256i x, __m256i w) {
  return _mm256_add_epi32(acc, _mm256_madd_epi16(_mm256_maddubs_epi16(x, w), _mm256_set1_epi16(1)));
}

// Four positions of 32 rows are interleaved into four registers of 8 rows x 4 positions.
inline __attribute__((always_inline)) void quad_step(__m256i (&acc)[4], const uint8_t* x, const uint8_t* index,
                                                     const int8_t* w) {
  const __m256i a = load256(x + index[0] * 32), b = load256(x + index[1] * 32);
  const __m256i c = load256(x + index[2] * 32), d = load256(x + index[3] * 32);
  const __m256i ab = _mm256_unpacklo_epi8(a, b), cd = _mm256_unpacklo_epi8(c, d);
  const __m256i ab2 = _mm256_unpackhi_epi8(a, b), cd2 = _mm256_unpackhi_epi8(c, d);
  const __m256i quad = broadcast_quad(w);
  acc[0] = dot_add(acc[0], _mm256_unpacklo_epi16(ab, cd), quad);
  acc[1] = dot_add(acc[1], _mm256_unpackhi_epi16(ab, cd), quad);
  acc[2] = dot_add(acc[2], _mm256_unpacklo_epi16(ab2, cd2), quad);
  acc[3] = dot_add(acc[3], _mm256_unpackhi_epi16(ab2, cd2), quad);
}

// The same for 8 rows, into one register.
inline __attribute__((always_inline)) void quad_step(__m256i (&acc)[1], const uint8_t* x, const uint8_t* index,
                                                     const int8_t* w) {
  const auto rows = [x](uint8_t position) {
    return _mm_loadl_epi64(reinterpret_cast<const __m128i*>(x + position * 8));
  };
  const __m128i ab = _mm_unpacklo_epi8(rows(index[0]), rows(index[1]));
  const __m128i cd = _mm_unpacklo_epi8(rows(index[2]), rows(index[3]));
  acc[0] = dot_add(acc[0], _mm256_set_m128i(_mm_unpackhi_epi16(ab, cd), _mm_unpacklo_epi16(ab, cd)), broadcast_quad(w));
}

template <int kVectors>
void quads_width(const Block& block, const uint8_t* x, int32_t* sums, bool accumulate) {
  constexpr int kWidth = 8 * kVectors;
  const uint8_t* index = block.index;
  const auto* w = static_cast<const int8_t*>(block.values);
  const uint16_t* order = block.order;
  for (int r = 0; r < block.run_count; ++r) {
    const int count = block.runs[2 * r];
    for (int left = block.runs[2 * r + 1]; left > 0; --left, ++order) {
      int32_t* out = sums + *order * kWidth;
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; v += 2) __builtin_prefetch(sums + order[2] * kWidth + 8 * v, 1);
      __m256i acc[kVectors];
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) acc[v] = accumulate ? load256(out + 8 * v) : _mm256_setzero_si256();
      for (int i = 0; i < count; ++i, index += 4, w += 4) quad_step(acc, x, index, w);
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) store256(out + 8 * v, acc[v]);
    }
  }
}

void tile_quads(const Block& block, const void* tile, int width, void* sums, bool accumulate) {
  const auto* x = static_cast<const uint8_t*>(tile);
  auto* out = static_cast<int32_t*>(sums);
  return width == 8 ? quads_width<1>(block, x, out, accumulate) : quads_width<4>(block, x, out, accumulate);
}

template <int kVectors>
void quads4_width(const Block& block, const uint8_t* x, int32_t* sums, bool accumulate) {
  constexpr int kWidth = 8 * kVectors;
  const uint8_t* index = block.index;
  const auto* w = static_cast<const int8_t*>(block.values);
  const uint16_t* order = block.order;
  for (int r = 0; r < block.run_count; ++r) {
    const int count = block.runs[2 * r];
    for (int left = block.runs[2 * r + 1]; left > 0; --left, ++order) {
      int32_t* out = sums + *order * kWidth;
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; v += 2) __builtin_prefetch(sums + order[2] * kWidth + 8 * v, 1);
      __m256i acc[kVectors];
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) acc[v] = accumulate ? load256(out + 8 * v) : _mm256_setzero_si256();
      for (int i = 0; i < count; ++i, ++index, w += 4) {
        const __m256i quad = broadcast_quad(w);
        const uint8_t* at = x + *index * 4 * kWidth;
#pragma GCC unroll 8
        for (int v = 0; v < kVectors; ++v) acc[v] = dot_add(acc[v], load256(at + 32 * v), quad);
      }
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) store256(out + 8 * v, acc[v]);
    }
  }
}

void tile_quads4(const Block& block, const void* tile, int width, void* sums, bool accumulate) {
  const auto* x = static_cast<const uint8_t*>(tile);
  auto* out = static_cast<int32_t*>(sums);
  switch (width) {
    case 8:
      return quads4_width<1>(block, x, out, accumulate);
    case 16:
      return quads4_width<2>(block, x, out, accumulate);
    case 32:
      return quads4_width<4>(block, x, out, accumulate);
    default:
      return quads4_width<8>(block, x, out, accumulate);
  }
}

// --- epilogue -----------------------------------------------------------------------------------------------------

template <Type kType>
inline void store_result(__m256 value, uint8_t* y, int columns) {
  const auto result = converted<kType>(_mm256_setzero_si256(), value);
  if (columns >= 8) {
    __builtin_memcpy(y, &result, sizeof(result));
    return;
  }
  unsigned char buffer[sizeof(result)];
  __builtin_memcpy(buffer, &result, sizeof(result));
  for (size_t byte = 0; byte < static_cast<size_t>(columns) * sizeof(result) / 8; ++byte) y[byte] = buffer[byte];
}

template <Type kType>
void finish_columns(const float* sums, int width, int rows, int columns, const int8::Epilogue& e, uint8_t* y,
                    ptrdiff_t ldy) {
  constexpr int size = kType == Type::float32 ? 4 : 2;
  for (int n = 0; n < columns; n += 8, sums += 8 * width, y += 8 * size) {
    const int left = columns - n;
    // To add -0 changes nothing, not even a zero.
    const __m256 shared = e.bias == nullptr ? _mm256_set1_ps(-0.0f) : load_floats_up_to(e.bias + n, left);
    const auto bias = [&](int m) {
      return e.bias_stride == 0 ? shared : _mm256_loadu_ps(e.bias + m * e.bias_stride + n);
    };
    if (width == 1) {
      const Vector v{_mm256_add_ps(load_floats_up_to(sums, left), bias(0))};
      store_result<kType>(activate(e.activation, v).value, y, left);
      continue;
    }
    for (int m = 0; m < rows; m += 8) {
      __m256 r[8];
#pragma GCC unroll 8
      for (int j = 0; j < 8; ++j) r[j] = loads(sums + j * width + m);  // there is room for whole panels
      transpose(r);
      if (left >= 8 && m + 8 <= rows && e.activation == Activation::none) {
#pragma GCC unroll 8
        for (int j = 0; j < 8; ++j) store_result<kType>(_mm256_add_ps(r[j], bias(m + j)), y + (m + j) * ldy * size, 8);
        continue;
      }
      alignas(32) float turned[8][8];
#pragma GCC unroll 8
      for (int j = 0; j < 8; ++j) _mm256_store_ps(turned[j], r[j]);
      for (int j = 0; j < 8 && m + j < rows; ++j) {
        const Vector v{_mm256_add_ps(_mm256_load_ps(turned[j]), bias(m + j))};
        store_result<kType>(activate(e.activation, v).value, y + (m + j) * ldy * size, left);
      }
    }
  }
}

template <Type kType>
void finish_rows(const float* sums, int width, int rows, int columns, const int8::Epilogue& e, uint8_t* y,
                 ptrdiff_t ldy) {
  constexpr int size = kType == Type::float32 ? 4 : 2;
  for (int n = 0; n < columns; ++n, sums += width, y += ldy * size) {
    const __m256 bias = _mm256_set1_ps(e.bias == nullptr ? -0.0f : e.bias[n]);
    for (int m = 0; m < rows; m += 8) {
      const __m256 sum = width < 8 ? load_floats_up_to(sums, width) : loads(sums + m);
      const Vector v{_mm256_add_ps(sum, bias)};
      store_result<kType>(activate(e.activation, v).value, y + m * size, rows - m);
    }
  }
}

void finish_channels(const void* sums, int width, int rows, int columns, const int8::Epilogue& e, void* y,
                     ptrdiff_t ldy) {
  const auto* from = static_cast<const float*>(sums);
  auto* to = static_cast<uint8_t*>(y);
  if (e.type == Type::float32) finish_rows<Type::float32>(from, width, rows, columns, e, to, ldy);
  if (e.type == Type::bfloat16) finish_rows<Type::bfloat16>(from, width, rows, columns, e, to, ldy);
  if (e.type == Type::float16) finish_rows<Type::float16>(from, width, rows, columns, e, to, ldy);
}

void finish_float(const void* sums, int width, int rows, int columns, const int8::Epilogue& e, void* y, ptrdiff_t ldy) {
  const auto* from = static_cast<const float*>(sums);
  auto* to = static_cast<uint8_t*>(y);
  if (e.type == Type::float32) finish_columns<Type::float32>(from, width, rows, columns, e, to, ldy);
  if (e.type == Type::bfloat16) finish_columns<Type::bfloat16>(from, width, rows, columns, e, to, ldy);
  if (e.type == Type::float16) finish_columns<Type::float16>(from, width, rows, columns, e, to, ldy);
}

// Turns 16 channels x width rows around, for the epilogue of the int8 kernels.
void finish_int(const void* sums, int width, int rows, int columns, const int8::Epilogue& e, void* y, ptrdiff_t ldy) {
  alignas(32) int32_t turned[kMaxWidth * kPanel];
  const auto* from = static_cast<const float*>(sums);  // shuffles do not look at what they move
  for (int n = 0; n < columns; n += 8)
    for (int m = 0; m < rows; m += 8) {
      __m256 r[8];
#pragma GCC unroll 8
      for (int j = 0; j < 8; ++j) r[j] = n + j < columns ? loads(from + (n + j) * width + m) : _mm256_setzero_ps();
      transpose(r);
#pragma GCC unroll 8
      for (int j = 0; j < 8; ++j) store256(turned + (m + j) * kPanel + n, _mm256_castps_si256(r[j]));
    }
  int8::finish_avx2(turned, kPanel, rows, columns, e, y, ldy);
}

}  // namespace

const Kernel kAvx2Rows{"avx2_64x1", Isa::avx2,    Format::rows,   64, 1, 1, 64 | 32 | 16 | 8 | 1, load_float,
                       tile_rows,   finish_float, finish_channels};
const Kernel kAvx2Panels{"avx2_32x16", Isa::avx2,    Format::panels, 32, 16, 1, 32 | 16 | 8 | 1, load_float,
                         tile_panels,  finish_float, finish_channels};
const Kernel kAvx2Quads{"avx2_32x1x4", Isa::avx2,  Format::quads, 32,         1,      4,
                        32 | 8,        load_bytes, tile_quads,    finish_int, nullptr};
const Kernel kAvx2Quads4{"avx2_64x4",      Isa::avx2,   Format::quads4, 64,         1,      4,
                         64 | 32 | 16 | 8, load_groups, tile_quads4,    finish_int, nullptr};

}  // namespace pycompress::sparse
