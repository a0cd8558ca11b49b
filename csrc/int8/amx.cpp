// AMX (Sapphire Rapids and later): 32 rows x 32 channels, four tiles of 16 x 16 sums. `tdpbusd` adds 16 x 16 x 64 u8 *
// s8 products straight into 32 bits without saturating. Floor: one tdpbusd, 16384 products, in 16 cycles, beside which
// four tiles of operands are loaded for every four of them. A few rows behind the last tile, and a last half step of k,
// are those of avx512vnni.cpp; those of a strip take the tiles, too.
#include <immintrin.h>

#include "kernel_list.h"

namespace pycompress::int8 {
namespace {

constexpr int kMr = 32, kNr = 32, kTileRows = 16, kStep = 64, kFewRows = 4, kVnniRows = 12;

// What the tiles are: rows of 64 bytes, 16 of them; of the sums 0, 1 and the activations 4 as many as there are up to
// 16, of the sums 2, 3 and the activations 5 those behind. In memory that is there before the call: g++ takes the
// instruction to read no more than its first bytes.
struct alignas(64) Shapes {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
struct AllShapes {
  Shapes of[kMr + 1];  // by the rows
  constexpr AllShapes() : of{} {
    for (int rows = 1; rows < kMr; ++rows) {
      const auto count = static_cast<uint8_t>(rows % kTileRows);
      if (rows < kTileRows) of[rows].rows[0] = of[rows].rows[1] = of[rows].rows[4] = count;
      if (rows > kTileRows) of[rows].rows[2] = of[rows].rows[3] = of[rows].rows[5] = count;
    }
  }
};
constexpr AllShapes kShapes;

void begin() { _tile_loadconfig(&kShapes.of[kMr]); }

void end() { _tile_release(); }

// Sums 0, 1: the first 16 rows or fewer; 2, 3: the next 16; operands 4, 5: rows; 6, 7: channels.
template <bool kTwo>
inline void add_step(const uint8_t* a, ptrdiff_t lda, const int8_t* w) {
  constexpr ptrdiff_t kWeightStride = 4 * kNr;
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

template <bool kTwo>
inline void multiply(const uint8_t* a, ptrdiff_t lda, const int8_t* w, int steps, int32_t* c, bool accumulate) {
  constexpr ptrdiff_t kSumStride = 4 * kNr;
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
  for (int step = 0; step < steps; ++step, a += kStep, w += kStep * kNr) add_step<kTwo>(a, lda, w);
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

// The finished rows of the block before, a few after each step of this one: vectors and tiles work at once.
class Behind {
 public:
  Behind(const Strip& strip, int steps) : strip_(strip), steps_(steps) {}
  void begin(const int32_t* sums, int first, int rows) {
    sums_ = sums, first_ = first, rows_ = rows, done_ = step_ = 0;
  }
  void step() {
    ++step_;
    while (done_ < rows_ && done_ * steps_ < rows_ * step_) some();
  }
  void rest() {
    while (done_ < rows_) some();
  }

 private:
  void some() {
    const int rows = rows_ - done_ < strip_.slice ? rows_ - done_ : strip_.slice;
    strip_.finished(strip_.context, sums_ + done_ * 2 * kNr, first_ + done_, rows);
    done_ += rows;
  }

  const Strip& strip_;
  const int steps_;
  const int32_t* sums_ = nullptr;
  int first_ = 0, rows_ = 0, done_ = 0, step_ = 0;
};

// Rows from `a` on times one panel. `half`: of its last half step, with zeros behind, or null.
template <bool kTwo>
inline void multiply_pieces(const Strip& s, const uint8_t* a, const void* panel, const int8_t* half, int32_t* c,
                            Behind& behind) {
  constexpr ptrdiff_t kSumStride = 8 * kNr;
  const auto* w = static_cast<const int8_t*>(panel);
  _tile_zero(0);
  _tile_zero(1);
  if constexpr (kTwo) {
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int piece = 0; piece < s.pieces; ++piece, a += s.distance)
    for (int at = 0; at + kStep <= s.length; at += kStep, w += kStep * kNr) {
      add_step<kTwo>(a + at, s.lda, w);
      behind.step();
    }
  if (half != nullptr) {
    add_step<kTwo>(a - s.distance + s.length / kStep * kStep, s.lda, half);
    behind.step();
  }
  _tile_stored(0, c, kSumStride);
  _tile_stored(1, c + 16, kSumStride);
  if constexpr (kTwo) {
    _tile_stored(2, c + kTileRows * 2 * kNr, kSumStride);
    _tile_stored(3, c + kTileRows * 2 * kNr + 16, kSumStride);
  }
}

void strip(const Strip& s) {
  const int panels = s.panels[1] == nullptr ? 1 : 2, half = s.length % kStep != 0 ? 1 : 0;
  const int steps = s.pieces * (s.length / kStep) + half;
  alignas(64) int8_t halves[2][kStep * kNr];
  if (half != 0)
    for (int p = 0; p < panels; ++p) {
      __builtin_memcpy(halves[p], static_cast<const int8_t*>(s.panels[p]) + (steps - 1) * kStep * kNr, kStep / 2 * kNr);
      __builtin_memset(halves[p] + kStep / 2 * kNr, 0, kStep / 2 * kNr);
    }
  asm volatile("" ::: "memory");  // g++ does not know that a tile is read from memory
  Behind behind(s, panels * steps);
  for (int i = 0; i < s.rows; i += kMr) {
    const int rows = s.rows - i < kMr ? s.rows - i : kMr;
    int32_t* sums = s.sums + i / kMr % 2 * kMr * 2 * kNr;
    const bool odd = rows % kTileRows != 0;  // another shape takes as long as two steps
    if (odd) _tile_loadconfig(&kShapes.of[rows]);
    for (int p = 0; p < panels; ++p) {
      const int8_t* rest = half != 0 ? halves[p] : nullptr;
      if (rows > kTileRows)
        multiply_pieces<true>(s, s.a + i * s.lda, s.panels[p], rest, sums + p * kNr, behind);
      else
        multiply_pieces<false>(s, s.a + i * s.lda, s.panels[p], rest, sums + p * kNr, behind);
    }
    if (odd) begin();
    behind.rest();
    behind.begin(sums, i, rows);
  }
  behind.rest();
}

}  // namespace

const Kernel kAmx{"amx_32x32",     Isa::amx_int8, kMr,           kNr,   4,   Layout::dot4,
                  quantize_avx512, tile,          finish_avx512, begin, end, strip};

}  // namespace pycompress::int8
