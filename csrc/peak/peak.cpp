#include "peak.h"

#include <algorithm>
#include <chrono>
#include <cstring>
#include <vector>

#include "../common/check.h"
#include "../common/isa.h"
#include "../common/parallel.h"

namespace pycompress::peak {
namespace {

using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); }

volatile double sink;

#if defined(PYCOMPRESS_X86)
// Each thread repeats `turn` until its time is over; the sum of what they did over the time that they took.
template <class Turn>
double rate(double seconds, int threads, Turn turn) {
  threads = std::max(1, usable_threads(threads));
  std::vector<double> rates(static_cast<size_t>(threads), 0.0);
  parallel(threads, [&](int thread, int team) {
    double done = 0, elapsed = 0;
    const auto start = Clock::now();
    do {
      done += turn(thread, team);
      elapsed = seconds_since(start);
    } while (elapsed < seconds);
    rates[static_cast<size_t>(thread)] = done / elapsed * 1e-9;
  });
  double sum = 0;
  for (const double r : rates) sum += r;
  return sum;
}
#endif

}  // namespace

double operations(const char* loop, double seconds, int threads) {
  check(isa_available(Isa::avx2), "peak: the loops need AVX2, which this processor lacks or PYCOMPRESS_ISA excludes");
#if defined(PYCOMPRESS_X86)
  constexpr int64_t count = 20000;
  if (std::strcmp(loop, "fp32_fma") == 0) return rate(seconds, threads, [](int, int) { return fp32_fma(count); });
  if (std::strcmp(loop, "maddubs_d1") == 0) return rate(seconds, threads, [](int, int) { return maddubs<1>(count); });
  if (std::strcmp(loop, "maddubs_d2") == 0) return rate(seconds, threads, [](int, int) { return maddubs<2>(count); });
  if (std::strcmp(loop, "maddubs_d4") == 0) return rate(seconds, threads, [](int, int) { return maddubs<4>(count); });
  if (std::strcmp(loop, "maddubs_d8") == 0) return rate(seconds, threads, [](int, int) { return maddubs<8>(count); });
#endif
  check(false, "peak: loop is '", loop, "', expected fp32_fma, maddubs_d1, maddubs_d2, maddubs_d4 or maddubs_d8");
  return 0;
}

double bandwidth(int64_t bytes, double seconds, int threads) {
  check(isa_available(Isa::avx2),
        "bandwidth: the loop needs AVX2, which this processor lacks or PYCOMPRESS_ISA excludes");
  check(bytes >= 65536, "bandwidth: bytes is ", bytes, ", expected at least 65536");
#if defined(PYCOMPRESS_X86)
  const std::vector<uint8_t> data(static_cast<size_t>(bytes), 1);
  return rate(seconds, threads, [&](int thread, int team) {
    const int64_t share = bytes / team / 1024 * 1024;
    sink = read(data.data() + thread * share, share);
    return static_cast<double>(share);
  });
#else
  (void)seconds, (void)threads;
  return 0;
#endif
}

}  // namespace pycompress::peak
