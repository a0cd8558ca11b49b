#include "pool.h"

#include <algorithm>
#include <atomic>

#include "../common/kernels.h"
#include "../common/parallel.h"
#include "../common/partials.h"
#include "../common/round.h"
#include "../common/scratch.h"
#include "kernel_list.h"

namespace pycompress::pool {

Kernels<Kernel>& kernels() {
  static constexpr const Kernel* best_first[] = {
#if defined(PYCOMPRESS_X86)
      &kAvx2,
#endif
      &kScalar};
  static Kernels<Kernel> all{"pool", best_first};
  return all;
}

namespace {

constexpr int64_t kSerialFloats = 40'000;  // up to here a parallel region (1 to 2 us) costs more than it brings

float mask_at(const Problem& p, int64_t b, int64_t l) {
  const ptrdiff_t at = b * p.mask_of_batch + l * p.mask_of_position;
  switch (p.mask_type) {
    case Mask::none:
      return 1.0f;
    case Mask::boolean:
      return static_cast<const uint8_t*>(p.mask)[at] != 0 ? 1.0f : 0.0f;
    case Mask::int32:
      return static_cast<float>(static_cast<const int32_t*>(p.mask)[at]);
    case Mask::int64:
      return static_cast<float>(static_cast<const int64_t*>(p.mask)[at]);
    case Mask::float32:
      return static_cast<const float*>(p.mask)[at];
  }
  return 0.0f;
}

}  // namespace

void mean(const Problem& p) {
  const Kernel& kernel = kernels().first();
  const int64_t padded = round_up<int64_t>(p.d, kPartials);
  const int threads = p.batch * p.length * p.d < kSerialFloats ? 1 : usable_threads(p.threads);
  std::atomic<int64_t> taken{0};
  parallel(static_cast<int>(std::min<int64_t>(threads, p.batch)), [&](int, int) {
    static thread_local Scratch scratch;
    auto* const sums = reinterpret_cast<float*>(scratch.reserve(static_cast<size_t>(padded) * sizeof(float)));
    for (int64_t b = taken++; b < p.batch; b = taken++) {
      std::fill(sums, sums + padded, 0.0f);
      float count = 0.0f;
      for (int64_t l = 0; l < p.length; ++l) {
        const float mask = mask_at(p, b, l);
        kernel.add(value_of(p.x, p.type, b * p.of_batch + l * p.of_position), p.type, p.d, mask, sums);
        count += mask;
      }
      kernel.finish(sums, p.d, count, p.normalize, value_of(p.y, p.type, b * p.d), p.type);
    }
  });
}

}  // namespace pycompress::pool
