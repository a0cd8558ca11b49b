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
// rounded (to whole numbers, half to even), and load_as<V, Type>, store_as<Type> and store_bytes of up to kWidth
// values.
// Values that stay in registers: what is stored as vectors may, to the compiler, be anything that is read from memory.
template <class V>
struct Quantizer {
  V inverse, zero, low, high;
  Quantizer(const Range& range, int amax)
      : inverse(V::of(range.inverse)),
        zero(V::of(static_cast<float>(range.zero_point))),
        low(V::of(0.0f) - zero),
        high(V::of(static_cast<float>(amax)) - zero) {}
  V operator()(V x) const { return smaller(larger(rounded(x * inverse), low), high); }  // of NaN the low end
};

// One channel or some, whose rows of x are brought into the room one by one, as the rows of y come to need them.
template <class V, Type kX>
class Rows {
 public:
  Rows(const Depthwise& task, const Phases& phases, int64_t first, int64_t channels)
      : t_(task),
        p_(*task.problem),
        phases_(phases),
        channels_(channels),
        step_(p_.channels_last ? p_.channels : 1),
        origin_(p_.channels_last ? t_.image * p_.height * p_.width * p_.channels + first
                                 : (t_.image * p_.channels + first) * p_.height * p_.width) {
    for (int64_t i = 0; i < phases.count_h * phases.count_w; ++i)
      zero(t_.room + i * phases.size() + phases.height * phases.pitch * phases.lanes, Phases::kSlack * phases.lanes);
  }

  // All rows that row i of y reaches.
  void load(int64_t i) {
    for (const int64_t end = i * p_.stride_h + (t_.kernel_h - 1) * p_.dilation_h + 1; next_ < end; ++next_)
      for (int64_t b = 0; b < phases_.count_w; ++b) load_row(next_, b);
  }

  bool finite() const {
    float lanes[V::kWidth];
    poison_.store(lanes);
    bool finite = scalar_poison_.value == 0.0f;
    for (const float lane : lanes) finite = finite && lane == 0.0f;
    return finite;
  }

 private:
  static void zero(float* at, int64_t count) {
    for (int64_t i = 0; i < count; ++i) at[i] = 0.0f;
  }

  // As whole numbers.
  V integers(int64_t at, int64_t count, const Quantizer<V>& quantized, V& poison) const {
    const V x = load_as<V, kX>(p_.x, at, count);
    if constexpr (kX == Type::uint8) return x - quantized.zero;
    poison = fma(x, V::of(0.0f), poison);  // 0 where finite, NaN for ever after NaN or Inf
    return quantized(x);
  }

  // Row r of x as the task sees it, the pixels of phase b.
  void load_row(int64_t r, int64_t b) {
    const int64_t lanes = phases_.lanes, pitch = phases_.pitch;
    float* out = t_.room + (r % p_.stride_h * phases_.count_w + b) * phases_.size() + r / p_.stride_h * pitch * lanes;
    const int64_t y = t_.row * p_.stride_h + r - p_.pad_top, left = b - p_.pad_left;
    int64_t first = 0, end = 0;  // of the pixels j that lie inside the image: left + j * stride_w
    if (y >= 0 && y < p_.height) {
      first = left < 0 ? (-left + p_.stride_w - 1) / p_.stride_w : 0;
      end = left < p_.width ? (p_.width - left + p_.stride_w - 1) / p_.stride_w : 0;
      if (end > pitch) end = pitch;
      if (first > end) first = end;
    }
    zero(out, first * lanes);
    const Quantizer<V> quantized(t_.range, t_.amax);
    V poison = poison_;
    const int64_t at = origin_ + (y * p_.width + left) * step_;
    if (p_.channels_last) {
      const int64_t step = p_.stride_w * step_;
      for (int64_t c = 0; c < kChannels; c += V::kWidth)
        if (channels_ - c >= V::kWidth)
          for (int64_t j = first; j < end; ++j)
            integers(at + j * step + c, V::kWidth, quantized, poison).store(out + j * lanes + c);
        else
          for (int64_t j = first; j < end; ++j)
            (c < channels_ ? integers(at + j * step + c, channels_ - c, quantized, poison) : V::of(0.0f))
                .store(out + j * lanes + c);
    } else if (p_.stride_w == 1) {
      for (int64_t j = first; j < end; j += V::kWidth) {
        const V v = integers(at + j, end - j, quantized, poison);
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
        if constexpr (kX != Type::uint8) {
          const Scalar x{float_at(p_.x, kX, at + j * p_.stride_w)};
          scalar_poison_ = fma(x, Scalar{0.0f}, scalar_poison_);
          out[j] = Quantizer<Scalar>(t_.range, t_.amax)(x).value;
        }
      }
    }
    zero(out + end * lanes, (pitch - end) * lanes);
    poison_ = poison;
  }

  const Depthwise& t_;
  const Convolution& p_;
  const Phases& phases_;
  const int64_t channels_, step_, origin_;
  int64_t next_ = 0;
  V poison_ = V::of(0.0f);
  Scalar scalar_poison_{0.0f};
};

template <class V>
__attribute__((noinline)) V activated(Activation activation, V v) {
  return activate(activation, v);
}

// What becomes of the sums of some channels. By value: see Quantizer.
template <class V>
struct Finish {
  V image_scale, weight_scale, bias;
  bool adds;
  Activation activation;
  int8::Requantize to;

  Finish(const Depthwise& t, V weight_scale_, V bias_)
      : image_scale(V::of(t.range.scale)),
        weight_scale(weight_scale_),
        bias(bias_),
        adds(t.problem->bias != nullptr),
        activation(t.problem->activation),
        to(t.problem->to) {}
  V operator()(V sum) const {
    V v = (sum * image_scale) * weight_scale;
    if (adds) v = v + bias;
    if (activation == Activation::relu) return where_less(v, V::of(0.0f), V::of(0.0f), v);
    return activation == Activation::none ? v : activated(activation, v);
  }
  template <Type kType>
  void put(void* y, int64_t i, V sum, int64_t count) const {
    if constexpr (kType == Type::int32)
      store_as<kType>(y, i, sum, count);
    else if constexpr (kType == Type::uint8)
      store_bytes(static_cast<uint8_t*>(y) + i, (*this)(sum), to, count);
    else
      store_as<kType>(y, i, (*this)(sum), count);
  }
};

// The taps of a task, behind its phases in the room: their distances, and the weights, of `lanes` channels each.
struct Taps {
  int count;
  const int64_t* distance;
  const float* weight;
};

inline Taps taps_of(const Depthwise& t, const Phases& phases, int64_t first, int64_t channels) {
  const int count = t.kernel_h * t.kernel_w;
  auto* distance = reinterpret_cast<int64_t*>(t.room + phases.floats());
  auto* weight = reinterpret_cast<float*>(distance + count);
  for (int r = 0; r < t.kernel_h; ++r)
    for (int s = 0; s < t.kernel_w; ++s) distance[r * t.kernel_w + s] = phases.distance(*t.problem, r, s);
  for (int tap = 0; tap < count; ++tap)
    for (int64_t c = 0; c < phases.lanes; ++c)
      weight[tap * phases.lanes + c] =
          c < channels ? static_cast<float>(t.weights[tap * t.problem->n + first + c]) : 0.0f;
  return {count, distance, weight};
}

constexpr int kPixels = 8, kVectors = 4;  // pixels with the channels last, vectors along the line: at a time

// Up to kChannels channels from `first` on.
template <class V, Type kX, Type kType>
bool channels_last(const Depthwise& t, const Phases& phases, int64_t first, int64_t channels) {
  const Convolution& p = *t.problem;
  const Taps taps = taps_of(t, phases, first, channels);
  Rows<V, kX> rows(t, phases, first, channels);
  for (int64_t i = 0; i < t.rows; ++i) {
    rows.load(i);
    for (int64_t c = 0; c < channels; c += V::kWidth) {
      const int64_t count = channels - c < V::kWidth ? channels - c : V::kWidth;
      const V scale = kType == Type::int32 ? V::of(0.0f) : load_as<V, Type::float32>(p.weight_scale, first + c, count);
      const V bias = p.bias == nullptr ? V::of(0.0f) : load_as<V, Type::float32>(p.bias, first + c, count);
      const Finish<V> finish(t, scale, bias);
      for (int64_t j = 0; j < p.out_w; j += kPixels) {
        const float* pixels = t.room + (i * phases.pitch + j) * kChannels + c;
        V sums[kPixels];
#pragma GCC unroll 8
        for (int n = 0; n < kPixels; ++n) sums[n] = V::of(0.0f);
        for (int tap = 0; tap < taps.count; ++tap) {
          const float* pixel = pixels + taps.distance[tap];
          const V w = V::load(taps.weight + tap * kChannels + c);
#pragma GCC unroll 8
          for (int n = 0; n < kPixels; ++n) sums[n] = fma(V::load(pixel + n * kChannels), w, sums[n]);
        }
        const int64_t at = ((t.image * p.out_h + t.row + i) * p.out_w + j) * p.n + first + c;
#pragma GCC unroll 8
        for (int n = 0; n < kPixels; ++n)
          if (j + n < p.out_w) finish.template put<kType>(p.y, at + n * p.n, sums[n], count);
      }
    }
  }
  return rows.finite();
}

template <class V, Type kX, Type kType>
bool channels_first(const Depthwise& t, const Phases& phases) {
  const Convolution& p = *t.problem;
  const Taps taps = taps_of(t, phases, t.channel, 1);
  Rows<V, kX> rows(t, phases, t.channel, 1);
  rows.load(t.rows - 1);
  const Finish<V> finish(t, V::of(kType == Type::int32 ? 0.0f : p.weight_scale[t.channel]),
                         V::of(p.bias == nullptr ? 0.0f : p.bias[t.channel]));
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
#pragma GCC unroll 4
    for (int n = 0; n < kVectors; ++n)
      (kType == Type::int32 ? sums[n] : finish(sums[n])).store(results + n * V::kWidth);
    const int64_t last = first + kStep < end ? first + kStep : end;
    while (i * phases.pitch + j < last) {  // what lies in one row of y at a time
      const int64_t at = i * phases.pitch + j, left = last - at < p.out_w - j ? last - at : p.out_w - j;
      for (int64_t l = 0; l < left; l += V::kWidth)
        store_as<kType>(p.y, origin + i * p.out_w + j + l, V::load(results + (at - first) + l), left - l);
      j += left;
      if (j == p.out_w) ++i, j = 0;
    }
  }
  return rows.finite();
}

template <class V, Type kX, Type kType>
bool depthwise_as(const Depthwise& t) {
  const Phases phases(*t.problem, t.kernel_h, t.kernel_w, t.rows);
  if (!t.problem->channels_last) {
    if constexpr (kX != Type::uint8 && kType != Type::uint8) return channels_first<V, kX, kType>(t, phases);
    return false;
  }
  bool finite = true;
  for (int64_t c = 0; c < t.channels; c += kChannels) {
    const int64_t count = t.channels - c < kChannels ? t.channels - c : kChannels;
    finite &= channels_last<V, kX, kType>(t, phases, t.channel + c, count);
  }
  return finite;
}

template <class V, Type kX>
bool depthwise_of(const Depthwise& t) {
  if (t.problem->y_type == Type::int32) return depthwise_as<V, kX, Type::int32>(t);
  if constexpr (kX == Type::uint8 || kX == Type::float32) {  // between bytes and floats there is float32 alone
    if (t.problem->y_type == Type::uint8) return depthwise_as<V, kX, Type::uint8>(t);
    return depthwise_as<V, kX, Type::float32>(t);
  }
  return depthwise_as<V, kX, kX>(t);
}

template <class V>
bool depthwise(const Depthwise& t) {
  if (t.problem->type == Type::uint8) return depthwise_of<V, Type::uint8>(t);
  if (t.problem->type == Type::bfloat16) return depthwise_of<V, Type::bfloat16>(t);
  if (t.problem->type == Type::float16) return depthwise_of<V, Type::float16>(t);
  return depthwise_of<V, Type::float32>(t);
}

}  // namespace
}  // namespace pycompress::conv
