// Two products for ranks above kFusedRank and many rows, each by the kernels of csrc/cuda/halves.h; t in the workspace.
//
// Floor: 2 m rank (k + n) operations at the tensor cores' peak, or the bytes of x, t (twice) and y at the memory's
// bandwidth; two launches.
#include <algorithm>

#include "../cuda/halves.h"
#include "../cuda/tiles.h"
#include "cuda_kernel_list.h"

namespace pycompress::low_rank::cuda {
namespace {

int64_t between_bytes(const Factors& shape, int64_t m) { return m * shape.rank_pad() * 2; }

Plan forced(const Kernel& kernel, const Factors& shape, int64_t m, int) {
  const Part part{&kernel, 1, 1};
  return {part, part, room_bytes(shape, kernel.type) + between_bytes(shape, m)};
}

void run(const Problem& p, const Plan&) {
  check_aligned(p);
  const Factors& shape = p.shape;
  const uint16_t* factors = halves_of(p, p.workspace);
  void* t = static_cast<uint8_t*>(p.workspace) + room_bytes(shape, p.type);
  const int64_t rank = shape.rank_pad();
  halves::multiply(
      {p.x, p.type, p.m, rank, shape.k, p.ldx, factors, shape.k_pad(), nullptr, Activation::none, t, rank, p.stream});
  halves::multiply({t, p.type, p.m, shape.n, rank, rank, factors + shape.up_begin(), rank, p.bias, p.activation, p.y,
                    shape.n, p.stream});
}

constexpr Kernel kTable[kWideKernels] = {{"wide_bf16", Type::bfloat16, 0, 0, 0, 0, forced, run},
                                         {"wide_f16", Type::float16, 0, 0, 0, 0, forced, run}};

// Of one product: its kernel's cycles, or those of the memory.
double cycles(Type type, int64_t m, int64_t n, int64_t k, int arch, int multiprocessors) {
  const halves::Kernel& kernel = halves::chosen_kernel(type, m, n, k, arch, multiprocessors);
  const double bytes = 2.0 * static_cast<double>(m * k + n * k + m * n);
  return kLaunch + std::max(gpu::cycles(kernel, m, n, 2 * k, multiprocessors), memory_cycles(bytes, multiprocessors));
}

}  // namespace

std::array<const Kernel*, kWideKernels> kernels_wide() { return {&kTable[0], &kTable[1]}; }

Priced price_wide(const Factors& shape, Type type, int64_t m, int arch, int multiprocessors) {
  const Kernel& kernel = kTable[type == Type::float16];
  return {forced(kernel, shape, m, 1), convert_cycles(shape, type, multiprocessors) +
                                           cycles(type, m, shape.rank_pad(), shape.k, arch, multiprocessors) +
                                           cycles(type, m, shape.n, shape.rank_pad(), arch, multiprocessors)};
}

}  // namespace pycompress::low_rank::cuda
