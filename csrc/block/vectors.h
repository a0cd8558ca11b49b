// The kernel of a block, written once over a vector type: avx2.cpp and avx512vnni.cpp define `Vector` (kWidth floats;
// load, store, of, fma, larger, where_less, + - * /, power_of_two, KEEP_IN_REGISTER) and include this. In an anonymous
// namespace, because each instruction-set file compiles its own copy and the linker must not merge them.
#pragma once

#include "kernel.h"

namespace pycompress::block {
namespace {

constexpr int kWidth = Vector::kWidth;
using Register = decltype(Vector::value);  // arrays of a struct stay in memory

template <int kValue>
struct Count {
  static constexpr int value = kValue;
};

// exp(x) for x <= 0, within 4 ulp down to exp(-87) and 0 below; NaN stays NaN. Taylor's series up to r^7 on |r| <=
// ln(2)/2.
inline Vector exponential(Vector x) {
  const Vector floor = Vector::of(-87.0f), magic = Vector::of(0x1.8p23f);
  const Vector at_least = larger(floor, x);
  const Vector n = fma(at_least, Vector::of(1.44269504f), magic) - magic;
  const Vector r = fma(n, Vector::of(2.12194440e-4f), fma(n, Vector::of(-0.693359375f), at_least));
  Vector p = fma(r, Vector::of(1.0f / 5040.0f), Vector::of(1.0f / 720.0f));
  p = fma(p, r, Vector::of(1.0f / 120.0f));
  p = fma(p, r, Vector::of(1.0f / 24.0f));
  p = fma(p, r, Vector::of(1.0f / 6.0f));
  p = fma(p, r, Vector::of(0.5f));
  p = fma(p, r, Vector::of(1.0f));
  p = fma(p, r, Vector::of(1.0f));
  return where_less(x, floor, Vector::of(0.0f), p * power_of_two(n));
}

// sum += x y, for one vector of y or two.
template <int kVectors>
inline __attribute__((always_inline)) void add_product(Register (&sum)[kVectors], Vector x, Vector y0, Vector y1) {
  sum[0] = fma(x, y0, Vector{sum[0]}).value;
  KEEP_IN_REGISTER(sum[0]);
  if constexpr (kVectors == 2) {
    sum[1] = fma(x, y1, Vector{sum[1]}).value;
    KEEP_IN_REGISTER(sum[1]);
  }
}

// noinline: g++ keeps the sums of what is inlined into more than one place in memory, at half the speed.

// scores[kKeys][kVectors * kWidth] of so many keys: turned queries times keys, which are read in place.
template <int kVectors, int kKeys>
__attribute__((noinline)) void score_keys(const Attention& a, const float* key, float* scores) {
  constexpr int kTile = kVectors * kWidth;
  Register sum[kKeys][kVectors];
#pragma GCC unroll 12
  for (int i = 0; i < kKeys; ++i)
#pragma GCC unroll 2
    for (int j = 0; j < kVectors; ++j)
      sum[i][j] = (a.started ? Vector::load(scores + i * kTile + j * kWidth) : Vector::of(0.0f)).value;
  const float* query = a.turned;
  for (int c = 0; c < a.head_size; ++c, query += kTile) {
    const Vector q0 = Vector::load(query), q1 = Vector::load(query + (kVectors - 1) * kWidth);
#pragma GCC unroll 12
    for (int i = 0; i < kKeys; ++i) {
      const Vector k = Vector::of(key[i * a.ldk + c]);
      add_product(sum[i], k, q0, q1);
    }
  }
#pragma GCC unroll 12
  for (int i = 0; i < kKeys; ++i)
#pragma GCC unroll 2
    for (int j = 0; j < kVectors; ++j) Vector{sum[i][j]}.store(scores + i * kTile + j * kWidth);
}

// o[kQueries][kVectors * kWidth] from column `c` on: values are read in place.
template <int kVectors, int kTile, int kQueries>
__attribute__((noinline)) void mix_values(const Attention& a, int keys, int query, int c, const float* inverse,
                                          float* o, ptrdiff_t ldo) {
  Register sum[kQueries][kVectors];
#pragma GCC unroll 12
  for (int i = 0; i < kQueries; ++i)
#pragma GCC unroll 2
    for (int j = 0; j < kVectors; ++j) sum[i][j] = Vector::of(0.0f).value;
  const float *value = a.v + c, *share = a.scores + query;
  for (int key = 0; key < keys; ++key, value += a.ldv, share += kTile) {
    const Vector v0 = Vector::load(value), v1 = Vector::load(value + (kVectors - 1) * kWidth);
#pragma GCC unroll 12
    for (int i = 0; i < kQueries; ++i) {
      const Vector p = Vector::of(share[i]);
      add_product(sum[i], p, v0, v1);
    }
  }
#pragma GCC unroll 12
  for (int i = 0; i < kQueries; ++i)
#pragma GCC unroll 2
    for (int j = 0; j < kVectors; ++j) (Vector{sum[i][j]} * Vector::of(inverse[i])).store(o + i * ldo + j * kWidth);
}

// Queries of a tile, kStep at a time, and columns of the head, two vectors at a time.
template <int kTile>
inline void mix(const Attention& a, int keys, const float* inverse) {
  constexpr int kStep = Vector::kSums / 2, kColumns = 2 * kWidth;
  for (int c = 0; c < a.head_size; c += kColumns) {
    const int columns = a.head_size - c < kColumns ? a.head_size - c : kColumns;
    for (int query = 0; query < a.queries;) {
      float room[kStep * kColumns];
      const bool whole = columns == kColumns || columns == kWidth;
      float* o = whole ? a.o + query * a.ldo + c : room;
      const ptrdiff_t ldo = whole ? a.ldo : kColumns;
      const int left = a.queries - query;
      int step = 1;
      const auto run = [&](auto vectors, auto queries) {
        step = decltype(queries)::value;
        mix_values<decltype(vectors)::value, kTile, decltype(queries)::value>(a, keys, query, c, inverse + query, o,
                                                                              ldo);
      };
      const auto run_step = [&](auto vectors) {
        if (left >= kStep)
          run(vectors, Count<kStep>{});
        else if (left >= kStep / 2)
          run(vectors, Count<kStep / 2>{});
        else if (left >= 2)
          run(vectors, Count<2>{});
        else
          run(vectors, Count<1>{});
      };
      if (columns <= kWidth)
        run_step(Count<1>{});
      else
        run_step(Count<2>{});
      for (int i = 0; !whole && i < step; ++i)
        __builtin_memcpy(a.o + (query + i) * a.ldo + c, room + i * kColumns, static_cast<size_t>(columns) * 4);
      query += step;
    }
  }
}

template <int kVectors>
void attend_tile(const Attention& a) {
  constexpr int kTile = kVectors * kWidth, kKeys = Vector::kSums / kVectors;
  turn_rows(a.q, a.ldq, a.queries, a.head_size, kTile, a.scale, false, a.turned);
  int keys = a.keys;
  if (a.causal && keys > a.first_query + a.queries) keys = static_cast<int>(a.first_query) + a.queries;

  int key = 0;
  for (; key + kKeys <= keys; key += kKeys) score_keys<kVectors, kKeys>(a, a.k + key * a.ldk, a.scores + key * kTile);
  for (; key + 2 <= keys; key += 2) score_keys<kVectors, 2>(a, a.k + key * a.ldk, a.scores + key * kTile);
  if (key < keys) score_keys<kVectors, 1>(a, a.k + key * a.ldk, a.scores + key * kTile);
  if (a.causal)
    for (int64_t j = a.first_query + 1; j < keys; ++j)
      for (int64_t i = 0; i < j - a.first_query && i < kTile; ++i) a.scores[j * kTile + i] = -__builtin_inff();

  // Never -inf, so that scores of -inf are that far below it: a query that sees no key has a sum of 0.
  Vector top[kVectors], sum[kVectors];
  for (int j = 0; j < kVectors; ++j) top[j] = Vector::of(-3.40282347e38f), sum[j] = Vector::of(0.0f);
  for (key = 0; key < keys; ++key)
#pragma GCC unroll 2
    for (int j = 0; j < kVectors; ++j) {
      float* at = a.scores + key * kTile + j * kWidth;
      Vector s = Vector::load(at);
      if (a.key_mask != nullptr) {
        s = s + Vector::of(a.key_mask[key]);
        s.store(at);
      }
      top[j] = larger(s, top[j]);
    }
  for (key = 0; key < keys; ++key)
#pragma GCC unroll 2
    for (int j = 0; j < kVectors; ++j) {
      float* at = a.scores + key * kTile + j * kWidth;
      const Vector p = exponential(Vector::load(at) - top[j]);
      p.store(at);
      sum[j] = sum[j] + p;
    }
  alignas(64) float inverse[kTile];
  for (int j = 0; j < kVectors; ++j) {
    const Vector zero = Vector::of(0.0f), one = Vector::of(1.0f);
    // NaN is not less: 1 / NaN stays.
    where_less(sum[j], Vector::of(1e-30f), zero, one / sum[j]).store(inverse + j * kWidth);
  }
  mix<kTile>(a, keys, inverse);
}

void attend(const Attention& a) {
  if (a.queries <= kWidth)
    attend_tile<1>(a);
  else
    attend_tile<2>(a);
}

// --- norms ----------------------------------------------------------------------------------------------------------

inline float total(Vector v) {
  alignas(64) float lanes[kWidth];
  v.store(lanes);
  for (int width = kWidth / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
  return lanes[0];
}

// The sum of f(i) over the vectors of n floats, the last one filled with zeros.
template <class F>
inline float sum_of(int n, F&& f) {
  Vector a = Vector::of(0.0f), b = a;
  int i = 0;
  for (; i + 2 * kWidth <= n; i += 2 * kWidth) {
    a = a + f(i, kWidth);
    b = b + f(i + kWidth, kWidth);
  }
  for (; i < n; i += kWidth) a = a + f(i, n - i < kWidth ? n - i : kWidth);
  return total(a + b);
}

void add_norm(float* sum, const float* residual, int rows, int n, const Norm* norm, float* y) {
  const float inverse_n = 1.0f / static_cast<float>(n);
  for (int row = 0; row < rows; ++row, sum += n, y += n) {
    if (residual != nullptr) {
      for (int i = 0; i < n; i += kWidth) {
        const int left = n - i;
        store_up_to(sum + i, load_up_to(sum + i, left) + load_up_to(residual + i, left), left);
      }
      residual += n;
    }
    if (norm == nullptr) continue;
    float mean = 0;
    if (!norm->rms) mean = sum_of(n, [&](int i, int left) { return load_up_to(sum + i, left); }) * inverse_n;
    const Vector center = Vector::of(mean);
    const float square = sum_of(n, [&](int i, int left) {
      const Vector d = only(load_up_to(sum + i, left) - center, left);
      return d * d;
    });
    const float deviation = __builtin_sqrtf(square * inverse_n + norm->eps);
    const Vector factor = Vector::of(1.0f / deviation);
    for (int i = 0; i < n; i += kWidth) {
      const int left = n - i;
      Vector v = (load_up_to(sum + i, left) - center) * factor;
      if (norm->weight != nullptr) v = v * load_up_to(norm->weight + i, left);
      if (norm->shift != nullptr) v = v + load_up_to(norm->shift + i, left);
      store_up_to(y + i, v, left);
    }
  }
}

void multiply(float* x, const float* y, int64_t count) {
  for (int64_t i = 0; i < count; i += kWidth) {
    const int left = count - i < kWidth ? static_cast<int>(count - i) : kWidth;
    store_up_to(x + i, load_up_to(x + i, left) * load_up_to(y + i, left), left);
  }
}

}  // namespace
}  // namespace pycompress::block
