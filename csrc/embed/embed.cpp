#include "embed.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <sstream>
#include <stdexcept>

#include "../common/float16.h"
#include "../common/kernels.h"
#include "../common/parallel.h"
#include "../common/partials.h"
#include "../common/round.h"
#include "../common/scratch.h"
#include "kernel_list.h"

namespace pycompress::embed {

Kernels<Kernel>& kernels() {
  static constexpr const Kernel* best_first[] = {
#if defined(PYCOMPRESS_X86)
      &kAvx2,
#endif
      &kScalar};
  static Kernels<Kernel> all{"embed", best_first};
  return all;
}

namespace {

constexpr int64_t kSerialFloats = 40'000;  // up to here a parallel region (1 to 2 us) costs more than it brings
constexpr int64_t kTasksPerThread = 4;

// Goes over the rows of y in their order and says which rows of the tables they are made of.
class Walk {
 public:
  Walk(const Problem& p, int64_t row) : p_(p), batch_(row / p.length), position_(row % p.length) {
    for (int64_t l = 0; l < position_; ++l) tokens_ += token(l) != p.padding;
  }

  // Of the next row; the number of the table in which there is no such row, or -1.
  int next(int64_t (&id)[kMaxTables]) {
    int wrong = -1;
    for (int t = 0; t < p_.tables; ++t) {
      id[t] = p_.ids[t].data == nullptr ? counted() : id_at(p_.ids[t], position_);
      if (wrong < 0 && (id[t] < 0 || id[t] >= p_.table[t].rows)) wrong = t;
    }
    if (++position_ == p_.length) {
      position_ = tokens_ = 0;
      ++batch_;
    }
    return wrong;
  }

 private:
  int64_t id_at(const Ids& ids, int64_t position) const {
    const ptrdiff_t at = batch_ * ids.of_batch + position * ids.of_position;
    return ids.wide ? static_cast<const int64_t*>(ids.data)[at] : static_cast<const int32_t*>(ids.data)[at];
  }
  int64_t token(int64_t position) const { return p_.counts ? id_at(p_.ids[0], position) : p_.padding; }
  int64_t counted() {
    if (token(position_) == p_.padding) return p_.padding;
    return p_.padding + ++tokens_;
  }

  const Problem& p_;
  int64_t batch_, position_, tokens_ = 0;
};

int64_t value_size(const Table& table) {
  return table.scale != nullptr ? 1 : static_cast<int64_t>(size_of(table.type));
}

// One of the norm's vectors in float32, padded with zeros.
void load_channels(const Channels& channels, float otherwise, int64_t d, int64_t padded, float* to) {
  if (channels.data == nullptr) {
    std::fill(to, to + d, otherwise);
  } else if (channels.type == Type::float32) {
    std::memcpy(to, channels.data, static_cast<size_t>(d) * sizeof(float));
  } else {
    for (int64_t i = 0; i < d; ++i) to[i] = float_at(channels.data, channels.type, i);
  }
  std::fill(to + d, to + padded, 0.0f);
}

[[noreturn]] void refuse(const Problem& p) {
  Walk walk(p, 0);
  int64_t id[kMaxTables];
  for (int64_t row = 0;; ++row) {
    const int t = walk.next(id);
    if (t < 0) continue;
    std::ostringstream message;
    message << "embed: index out of range: " << id[t] << " among the ids of table " << t << ", expected 0 to "
            << p.table[t].rows - 1;
    throw std::out_of_range(message.str());
  }
}

}  // namespace

void embed(const Problem& p) {
  const int64_t rows = p.batch * p.length, padded = round_up<int64_t>(p.d, kPartials);
  if (rows == 0) return;
  static thread_local Scratch norm_scratch;
  float* const norm = reinterpret_cast<float*>(norm_scratch.reserve(static_cast<size_t>(2 * padded) * sizeof(float)));
  if (p.norm) {
    load_channels(p.weight, 1.0f, p.d, padded, norm);
    load_channels(p.shift, 0.0f, p.d, padded, norm + padded);
  }

  const Kernel& kernel = kernels().first();
  const int threads = rows * p.d * (p.tables + 1) < kSerialFloats ? 1 : usable_threads(p.threads);
  const int64_t task = threads == 1 ? rows : divide_up(rows, kTasksPerThread * threads), tasks = divide_up(rows, task);
  std::atomic<int64_t> taken{0};
  std::atomic<bool> wrong{false};
  parallel(static_cast<int>(std::min<int64_t>(threads, tasks)), [&](int, int) {
    static thread_local Scratch scratch;
    auto* const sums = reinterpret_cast<float*>(scratch.reserve(static_cast<size_t>(padded) * sizeof(float)));
    std::fill(sums, sums + padded, 0.0f);
    Row row{{}, {}, {}, p.tables, p.d, p.norm ? norm : nullptr, norm + padded, p.eps, sums, nullptr, p.type};
    for (int64_t t = taken++; t < tasks; t = taken++) {
      const int64_t first = t * task, last = std::min(rows, first + task);
      Walk walk(p, first);
      const void* coming[kMaxTables] = {};
      const float* scale[kMaxTables] = {};
      // Where the parts of the next row lie; the first table is the large one, of which nothing is in a cache.
      const auto look = [&] {
        int64_t id[kMaxTables];
        if (walk.next(id) >= 0) {
          wrong.store(true, std::memory_order_relaxed);
          return false;
        }
        for (int i = 0; i < p.tables; ++i) {
          const Table& table = p.table[i];
          coming[i] = static_cast<const uint8_t*>(table.data) + id[i] * table.stride * value_size(table);
          scale[i] = table.scale == nullptr ? nullptr : table.scale + id[i];
        }
        const auto* line = static_cast<const uint8_t*>(coming[0]);
        for (int64_t byte = 0; byte < p.d * value_size(p.table[0]); byte += 64) __builtin_prefetch(line + byte);
        return true;
      };
      bool there = look();
      for (int64_t r = first; r < last; ++r) {
        const bool usable = there;
        for (int i = 0; i < p.tables; ++i) {
          row.part[i] = coming[i];
          row.type[i] = p.table[i].type;
          row.scale[i] = scale[i];
        }
        if (r + 1 < last) there = look();
        if (!usable) continue;
        row.y = value_of(p.y, p.type, r * p.d);
        kernel.run(row);
      }
    }
  });
  if (wrong.load()) refuse(p);
}

}  // namespace pycompress::embed
