// AMX (Sapphire Rapids and later): 32 rows x 32 channels, four tiles of 16 x 16 sums. `tdpbusd` adds 16 x 16 x 64 u8 *
// s8 products straight into 32 bits without saturating. Floor: one tdpbusd, 16384 products, in 16 cycles, beside which
// four tiles of operands are loaded for every four of them. A few rows behind the last tile, and a last half step of k,
// are those of avx512vnni.cpp.
#include <immintrin.h>

#include "kernel_list.h"

namespace pycompress::int8 {
namespace {

constexpr int kMr = 32, kNr = 32, kTileRows = 16, kStep = 64, kFewRows = 4, kVnniRows = 12;

// What the tiles are: rows of 64 bytes, 16 of them; of the sums 0, 1 and the activations 4 `rows`. In memory that is
// there before the call: g++ takes the instruction to read no more than its first bytes.
struct alignas(64) Shapes {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
struct AllShapes {
  Shapes of[kTileRows + 1];  // by the rows
  constexpr AllShapes() : of{} {
    for (int rows = 1; rows <= kTileRows; ++rows)
      of[rows].rows[0] = of[rows].rows[1] = of[rows].rows[4] = static_cast<uint8_t>(rows);
  }
};
constexpr AllShapes kShapes;

void begin() { _tile_loadconfig(&kShapes.of[kTileRows]); }

void end() { _tile_release(); }

// Sums 0, 1: the first 16 rows or fewer; 2, 3: the next 16; operands 4, 5: rows; 6, 7: channels.
template <bool kTwo>
inline void multiply(const uint8_t* a, ptrdiff_t lda, const int8_t* w, int steps, int32_t* c, bool accumulate) {
  constexpr ptrdiff_t kSumStride = 4 * kNr, kWeightStride = 4 * kNr;
  if (accumulate) {
    _tile_loadd(0, c, kSumStride);
    _tile_loadd(1, c + 16, kSumStride);
    if constexpr (kTwo) {
      _tile_loadd(2, c + kTileRows * kNr, kSumStride);
      _tile_loadd(3, c + kTileRows * kNr + 16, kSumStride);
    }
  } else {
    _tile_zero(0);
    _tile_zero(1);
    if constexpr (kTwo) {
      _tile_zero(2);
      _tile_zero(3);
    }
  }
  for (int step = 0; step < steps; ++step, a += kStep, w += kStep * kNr) {
    _tile_loadd(6, w, kWeightStride);
    _tile_loadd(7, w + 64, kWeightStride);
    _tile_loadd(4, a, lda);
    _tile_dpbusd(0, 4, 6);
    _tile_dpbusd(1, 4, 7);
    if constexpr (kTwo) {
      _tile_loadd(5, a + kTileRows * lda, lda);
      _tile_dpbusd(2, 5, 6);
      _tile_dpbusd(3, 5, 7);
    }
  }
  _tile_stored(0, c, kSumStride);
  _tile_stored(1, c + 16, kSumStride);
  if constexpr (kTwo) {
    _tile_stored(2, c + kTileRows * kNr, kSumStride);
    _tile_stored(3, c + kTileRows * kNr + 16, kSumStride);
  }
}

void tile(const uint8_t* a, ptrdiff_t lda, int rows, const void* panel, int length, int32_t* c, bool accumulate) {
  const auto* w = static_cast<const int8_t*>(panel);
  const int steps = length / kStep, rest = length % kStep;
  // Rows that no tile takes: a few alone are not worth another shape of the tiles.
  const int tail = rows % kTileRows, left = steps == 0 ? rows : tail < kFewRows ? tail : 0, done = rows - left;
  if (done == 2 * kTileRows) {
    multiply<true>(a, lda, w, steps, c, accumulate);
  } else if (done > 0) {
    const int whole = done / kTileRows * kTileRows;
    if (whole > 0) multiply<false>(a, lda, w, steps, c, accumulate);
    if (whole < done) {
      _tile_loadconfig(&kShapes.of[tail]);
      multiply<false>(a + whole * lda, lda, w, steps, c + whole * kNr, accumulate);
      begin();
    }
  }
  const auto by_vnni = [&](int first, int end, int position, bool add) {
    for (int i = first, count; i < end; i += count) {
      count = end - i < kVnniRows ? end - i : kVnniRows;
      tile_avx512_vnni(a + i * lda + position, lda, count, w + position * kNr, length - position, c + i * kNr, add);
    }
  };
  if (rest > 0) by_vnni(0, done, steps * kStep, true);
  by_vnni(done, rows, 0, accumulate);
}

}  // namespace

const Kernel kAmx{"amx_32x32",     Isa::amx_int8, kMr,           kNr,   4,  Layout::dot4,
                  quantize_avx512, tile,          finish_avx512, begin, end};

}  // namespace pycompress::int8
