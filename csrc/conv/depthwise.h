// Depthwise convolution over a vector type, written once: activations as whole numbers in float32, chains of fma that
// are exact below 2^24. In an anonymous namespace, because each instruction-set file compiles its own copy and the
// linker must not merge them.
#pragma once

#include "../common/activation.h"
#include "../common/float16.h"
#include "conv.h"
#include "phases.h"

namespace pycompress::conv {
namespace {

// Besides what activation.h asks of V, the file that includes this one has fma, larger (b where one is NaN), smaller,
// rounded (to whole numbers, half to even), and load_as<V, Type>, store_as<Type> and of_int8<V> of up to kWidth values.
template <Type kType>
struct OfType {
  static constexpr Type value = kType;
};

template <class V>
V quantized(V x, const Range& range, int amax) {
  const float zero = static_cast<float>(range.zero_point);
  const V low = V::of(-zero), high = V::of(static_cast<float>(amax) - zero);
  return smaller(larger(rounded(x * V::of(range.inverse)), low), high);  // of NaN the low end
}

// Whether all are finite.
template <class V, Type kType>
bool load_rows(const Depthwise& t, const Phases& phases) {
  const Convolution& p = *t.problem;
  V poison = V::of(0.0f);  // 0 where finite, NaN for ever after NaN or Inf
  Scalar scalar_poison{0.0f};
  const int64_t lanes = phases.lanes, step = p.channels_last ? p.channels : 1;
  const int64_t origin = p.channels_last ? t.image * p.height * p.width * p.channels + t.channel
                                         : (t.image * p.channels + t.channel) * p.height * p.width;
  for (int64_t a = 0; a < phases.count_h; ++a)
    for (int64_t b = 0; b < phases.count_w; ++b) {
      float* phase = t.room + (a * phases.count_w + b) * phases.size();
      for (int64_t i = 0; i < phases.height; ++i) {
        float* out = phase + i * phases.pitch * lanes;
        const int64_t y = (t.row + i) * p.stride_h + a - p.pad_top;
        int64_t first = 0, end = 0;  // of the pixels j that lie inside the image: left + j * stride_w
        const int64_t left = b - p.pad_left;
        if (y >= 0 && y < p.height) {
          first = left < 0 ? (-left + p.stride_w - 1) / p.stride_w : 0;
          end = left < p.width ? (p.width - left + p.stride_w - 1) / p.stride_w : 0;
          if (end > phases.pitch) end = phases.pitch;
          if (first > end) first = end;
        }
        for (int64_t j = 0; j < first * lanes; ++j) out[j] = 0.0f;
        const int64_t at = origin + (y * p.width + left) * step;
        if (p.channels_last) {
          for (int64_t j = first; j < end; ++j)
            for (int64_t c = 0; c < kChannels; c += V::kWidth) {
              const int64_t count = t.channels - c;
              const V v = count <= 0 ? V::of(0.0f) : load_as<V, kType>(p.x, at + j * p.stride_w * step + c, count);
              poison = fma(v, V::of(0.0f), poison);
              quantized(v, t.range, t.amax).store(out + j * lanes + c);
            }
        } else if (p.stride_w == 1) {
          for (int64_t j = first; j < end; j += V::kWidth) {
            const V x = load_as<V, kType>(p.x, at + j, end - j), v = quantized(x, t.range, t.amax);
            poison = fma(x, V::of(0.0f), poison);
            if (end - j >= V::kWidth) {
              v.store(out + j);
            } else {
              float rest[V::kWidth];
              v.store(rest);
              for (int64_t l = 0; l < end - j; ++l) out[j + l] = rest[l];
            }
          }
        } else {
          for (int64_t j = first; j < end; ++j) {
            const Scalar x{float_at(p.x, kType, at + j * p.stride_w)};
            scalar_poison = fma(x, Scalar{0.0f}, scalar_poison);
            out[j] = quantized(x, t.range, t.amax).value;
          }
        }
        for (int64_t j = end * lanes; j < phases.pitch * lanes; ++j) out[j] = 0.0f;
      }
      for (int64_t j = 0; j < Phases::kSlack * lanes; ++j) phase[phases.height * phases.pitch * lanes + j] = 0.0f;
    }
  float lanes_of[V::kWidth];
  poison.store(lanes_of);
  bool finite = scalar_poison.value == 0.0f;
  for (const float lane : lanes_of) finite = finite && lane == 0.0f;
  return finite;
}

template <class V>
V scaled(V sum, float image_scale, V weight_scale, const V* bias, Activation activation) {
  V v = (sum * V::of(image_scale)) * weight_scale;
  if (bias != nullptr) v = v + *bias;
  return activation == Activation::none ? v : activate(activation, v);
}

// The taps of a task, behind its phases in the room: their distances, and the weights, of `lanes` channels each.
struct Taps {
  int count;
  const int64_t* distance;
  const float* weight;
};

template <class V>
Taps taps_of(const Depthwise& t, const Phases& phases) {
  const int count = t.kernel_h * t.kernel_w;
  auto* distance = reinterpret_cast<int64_t*>(t.room + phases.floats());
  auto* weight = reinterpret_cast<float*>(distance + count);
  for (int r = 0; r < t.kernel_h; ++r)
    for (int s = 0; s < t.kernel_w; ++s) distance[r * t.kernel_w + s] = phases.distance(*t.problem, r, s);
  for (int tap = 0; tap < count; ++tap)
    for (int64_t c = 0; c < phases.lanes; ++c)
      weight[tap * phases.lanes + c] =
          c < t.channels ? static_cast<float>(t.weights[tap * t.problem->n + t.channel + c]) : 0.0f;
  return {count, distance, weight};
}

constexpr int kPixels = 8, kVectors = 4;  // pixels with the channels last, vectors along the line: at a time

template <class V, Type kType>
void channels_last(const Depthwise& t, const Phases& phases) {
  const Convolution& p = *t.problem;
  const Taps taps = taps_of<V>(t, phases);
  for (int64_t c = 0; c < t.channels; c += V::kWidth) {
    const int64_t count = t.channels - c, channel = t.channel + c;
    const V weight_scale =
        kType == Type::int32 ? V::of(0.0f) : load_as<V, Type::float32>(p.weight_scale, channel, count);
    const V bias = p.bias == nullptr ? V::of(0.0f) : load_as<V, Type::float32>(p.bias, channel, count);
    for (int64_t i = 0; i < t.rows; ++i)
      for (int64_t j = 0; j < p.out_w; j += kPixels) {
        const float* first = t.room + (i * phases.pitch + j) * kChannels + c;
        V sums[kPixels];
#pragma GCC unroll 8
        for (int n = 0; n < kPixels; ++n) sums[n] = V::of(0.0f);
        for (int tap = 0; tap < taps.count; ++tap) {
          const float* pixel = first + taps.distance[tap];
          const V w = V::load(taps.weight + tap * kChannels + c);
#pragma GCC unroll 8
          for (int n = 0; n < kPixels; ++n) sums[n] = fma(V::load(pixel + n * kChannels), w, sums[n]);
        }
        const int64_t at = ((t.image * p.out_h + t.row + i) * p.out_w + j) * p.n + channel;
        const int pixels = p.out_w - j < kPixels ? static_cast<int>(p.out_w - j) : kPixels;
        for (int n = 0; n < pixels; ++n)
          store_as<kType>(p.y, at + n * p.n,
                          kType == Type::int32 ? sums[n]
                                               : scaled(sums[n], t.range.scale, weight_scale,
                                                        p.bias == nullptr ? nullptr : &bias, p.activation),
                          count);
      }
  }
}

template <class V, Type kType>
void channels_first(const Depthwise& t, const Phases& phases) {
  const Convolution& p = *t.problem;
  const Taps taps = taps_of<V>(t, phases);
  const V weight_scale = V::of(kType == Type::int32 ? 0.0f : p.weight_scale[t.channel]);
  const V bias = V::of(p.bias == nullptr ? 0.0f : p.bias[t.channel]);
  const int64_t origin = ((t.image * p.n + t.channel) * p.out_h + t.row) * p.out_w;
  constexpr int kStep = kVectors * V::kWidth;
  static_assert(kStep <= Phases::kSlack);
  const int64_t end = (t.rows - 1) * phases.pitch + p.out_w;
  int64_t i = 0, j = 0;  // of the next result that is to be written
  for (int64_t first = 0; first < end; first += kStep) {
    V sums[kVectors];
#pragma GCC unroll 4
    for (int n = 0; n < kVectors; ++n) sums[n] = V::of(0.0f);
    for (int tap = 0; tap < taps.count; ++tap) {
      const float* pixel = t.room + taps.distance[tap] + first;
      const V w = V::of(taps.weight[tap]);
#pragma GCC unroll 4
      for (int n = 0; n < kVectors; ++n) sums[n] = fma(V::load(pixel + n * V::kWidth), w, sums[n]);
    }
    float results[kStep + V::kWidth];
    for (int n = 0; n < kVectors; ++n) {
      const V y = kType == Type::int32
                      ? sums[n]
                      : scaled(sums[n], t.range.scale, weight_scale, p.bias == nullptr ? nullptr : &bias, p.activation);
      y.store(results + n * V::kWidth);
    }
    const int64_t last = first + kStep < end ? first + kStep : end;
    while (i * phases.pitch + j < last) {  // what lies in one row of y at a time
      const int64_t at = i * phases.pitch + j, left = last - at < p.out_w - j ? last - at : p.out_w - j;
      for (int64_t l = 0; l < left; l += V::kWidth)
        store_as<kType>(p.y, origin + i * p.out_w + j + l, V::load(results + (at - first) + l), left - l);
      j += left;
      if (j == p.out_w) ++i, j = 0;
    }
  }
}

template <class V, Type kX>
bool depthwise_of(const Depthwise& t) {
  const Phases phases(*t.problem, t.kernel_h, t.kernel_w, t.rows);
  const bool finite = load_rows<V, kX>(t, phases);
  const auto run = [&](auto y_type) {
    constexpr Type kType = decltype(y_type)::value;
    if (t.problem->channels_last)
      channels_last<V, kType>(t, phases);
    else
      channels_first<V, kType>(t, phases);
  };
  if (t.problem->y_type == Type::int32)
    run(OfType<Type::int32>{});
  else
    run(OfType<kX>{});
  return finite;
}

template <class V>
bool depthwise(const Depthwise& t) {
  if (t.problem->type == Type::bfloat16) return depthwise_of<V, Type::bfloat16>(t);
  if (t.problem->type == Type::float16) return depthwise_of<V, Type::float16>(t);
  return depthwise_of<V, Type::float32>(t);
}

}  // namespace
}  // namespace pycompress::conv
