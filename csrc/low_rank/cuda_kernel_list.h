// What the files of the three ways add to dispatch.cu.
#pragma once

#include <array>

#include "cuda.h"

namespace pycompress::low_rank::cuda {

// The cheapest plan of one way, and a rough count of the cycles that it takes.
struct Priced {
  Plan plan;
  double cycles;
};
constexpr double kLaunch = 4000;  // cycles from the end of one launch to the products of the next
// Some 14 bytes a cycle and multiprocessor come from the memory of an A100 or H100.
inline double memory_cycles(double bytes, int multiprocessors) { return bytes / (14.0 * multiprocessors); }

constexpr int kFewKernels = 8, kFusedKernels = 8, kWideKernels = 2;
std::array<const Kernel*, kFewKernels> kernels_few();      // few.cu
std::array<const Kernel*, kFusedKernels> kernels_fused();  // fused.cu
std::array<const Kernel*, kWideKernels> kernels_wide();    // wide.cu
// fused: for a rank_pad up to kFusedRank.
Priced price_few(const Factors& shape, Type type, int64_t m, int multiprocessors);
Priced price_fused(const Factors& shape, Type type, int64_t m, int arch, int multiprocessors);
Priced price_wide(const Factors& shape, Type type, int64_t m, int arch, int multiprocessors);

// The factors as halves of the type of x: as they are packed, or, for float16, converted by a launch into `room`, which
// has room_bytes().
const uint16_t* halves_of(const Problem& problem, void* room);  // convert.cu
inline int64_t room_bytes(const Factors& shape, Type type) { return type == Type::float16 ? shape.size() * 2 : 0; }
inline double convert_cycles(const Factors& shape, Type type, int multiprocessors) {
  const auto bytes = static_cast<double>(2 * room_bytes(shape, type));
  return bytes == 0 ? 0 : kLaunch + memory_cycles(bytes, multiprocessors);
}

// What the launches of fused.cu and wide.cu want of x.
void check_aligned(const Problem& problem);

}  // namespace pycompress::low_rank::cuda
