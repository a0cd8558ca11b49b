#include "sequences.h"

#include <algorithm>
#include <cstring>
#include <limits>

#include "../common/float16.h"
#include "../common/scratch.h"
#include "pieces.h"

namespace pycompress::block {
namespace {

constexpr float kUnseen = -1e30f;  // what is added to a score to hide a key

Scratch& scratch() {
  static thread_local Scratch own;
  return own;
}

float value_at(const Mask& mask, int64_t i) {
  if (!mask.is_bool) return float_at(mask.data, mask.type, i);
  return static_cast<const uint8_t*>(mask.data)[i] != 0 ? 0.0f : -std::numeric_limits<float>::infinity();
}

// Whether keys have the same values from one place on as from another.
bool are_alike(const Mask& mask, int64_t one, int64_t other, int64_t keys) {
  if (one == other) return true;
  if (mask.stride[3] == 1) {
    const size_t size = mask.is_bool ? 1 : size_of(mask.type);
    const auto* bytes = static_cast<const uint8_t*>(mask.data);
    return std::memcmp(bytes + static_cast<size_t>(one) * size, bytes + static_cast<size_t>(other) * size,
                       static_cast<size_t>(keys) * size) == 0;
  }
  for (int64_t key = 0; key < keys; ++key)
    if (value_at(mask, one + key * mask.stride[3]) != value_at(mask, other + key * mask.stride[3])) return false;
  return true;
}

}  // namespace

Sequences::Sequences(const Problem& problem) : p_(problem) {
  const bool masked = p_.masks[0].data != nullptr || p_.masks[1].data != nullptr,
             skips = p_.shape.skips_padding && p_.masks[0].data != nullptr;
  uint8_t* memory = nullptr;
  float* key_masks = nullptr;
  for (int pass = 0; pass < 2; ++pass) {
    Pieces pieces(memory);
    all_ = pieces.take<Sequence>(p_.batch);
    key_masks = pieces.take<float>(masked ? p_.batch * p_.length : 0);
    rows_in_x_ = pieces.take<int64_t>(skips ? p_.batch * p_.length : 0);
    if (pass == 0) memory = scratch().reserve(pieces.bytes());
  }
  for (int64_t at = 0; at < p_.batch; ++at) {
    Sequence& s = all_[at];
    s = {at, at * p_.length, p_.length, p_.length, nullptr, {}};
    for (int i = 0; i < 2; ++i) s.is_in_key_mask[i] = p_.masks[i].data == nullptr || is_of_keys(p_.masks[i], at);
    if (skips) s.length = shown(s);
    rows_ += s.length;
  }
  if (skips)
    list_rows();
  else
    rows_in_x_ = nullptr;
  for (int64_t i = 0; masked && i < p_.batch; ++i) read_key_mask(&all_[i], key_masks + all_[i].first);
}

// Whether all queries of a sequence, and all heads, have the same mask.
bool Sequences::is_of_keys(const Mask& mask, int64_t at) const {
  const int64_t heads = mask.stride[1] == 0 ? 1 : p_.shape.heads, queries = mask.stride[2] == 0 ? 1 : p_.length;
  const int64_t first = at * mask.stride[0];
  for (int64_t head = 0; head < heads; ++head)
    for (int64_t query = 0; query < queries; ++query)
      if (!are_alike(mask, first, first + head * mask.stride[1] + query * mask.stride[2], p_.length)) return false;
  return true;
}

float Sequences::value_of_key(int mask, const Sequence& s, int64_t key) const {
  const Mask& one = p_.masks[mask];
  return value_at(one, s.at * one.stride[0] + key * one.stride[3]);
}

// How many keys the first mask shows; all, where it is more than padding: of queries or heads, or neither 0 nor hiding.
int64_t Sequences::shown(const Sequence& s) const {
  if (!s.is_in_key_mask[0]) return p_.length;
  int64_t count = 0;
  for (int64_t key = 0; key < p_.length; ++key) {
    const float value = value_of_key(0, s, key);
    if (value != 0 && !(value < kUnseen)) return p_.length;
    count += value == 0;
  }
  return count;
}

void Sequences::list_rows() {
  std::stable_sort(all_, all_ + p_.batch, [](const Sequence& a, const Sequence& b) { return a.length > b.length; });
  int64_t row = 0;
  for (Sequence* s = all_; s < all_ + p_.batch; ++s) {
    s->first = row;
    for (int64_t key = 0; key < p_.length; ++key)
      if (s->length == p_.length || value_of_key(0, *s, key) == 0) rows_in_x_[row++] = s->at * p_.length + key;
  }
}

// Masks of keys alone are added up once. Keys that they hide at the end of a sequence are not looked at; where they
// hide all keys, all are.
void Sequences::read_key_mask(Sequence* s, float* sum) const {
  bool adds = false;
  s->keys = 0;
  for (int64_t row = 0; row < s->length; ++row) {
    sum[row] = 0.0f;
    for (int i = 0; i < 2; ++i)
      if (p_.masks[i].data != nullptr && s->is_in_key_mask[i]) sum[row] += value_of_key(i, *s, position(*s, row));
    if (!(sum[row] < kUnseen)) s->keys = row + 1;
  }
  if (s->keys == 0) s->keys = s->length;
  for (int64_t row = 0; row < s->keys; ++row) adds = adds || sum[row] != 0;
  if (adds) s->key_mask = sum;
}

bool Sequences::start(const Kernel& kernel, const Sequence& s, int head, int64_t query, int queries, float* rows,
                      float* scores) const {
  bool started = false;
  for (int i = 0; i < 2; ++i) {
    const Mask& mask = p_.masks[i];
    if (mask.data == nullptr || s.is_in_key_mask[i]) continue;
    const int64_t at = s.at * mask.stride[0] + head * mask.stride[1];
    const int keys = static_cast<int>(s.keys);
    const float* from = static_cast<const float*>(mask.data) + at + query * mask.stride[2];
    ptrdiff_t ld = mask.stride[2];
    if (mask.is_bool || mask.type != Type::float32 || mask.stride[3] != 1 || s.length < p_.length) {
      for (int row = 0; row < queries; ++row)
        for (int key = 0; key < keys; ++key)
          rows[row * int64_t{keys} + key] =
              value_at(mask, at + position(s, query + row) * mask.stride[2] + position(s, key) * mask.stride[3]);
      from = rows;
      ld = keys;
    }
    kernel.turn(from, ld, queries, keys, kernel.tile_for(queries), started, scores);
    started = true;
  }
  return started;
}

}  // namespace pycompress::block
