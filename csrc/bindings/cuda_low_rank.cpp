// The low-rank part of _cuda; what cuda.cpp says about pointers and streams holds here too.
#include "../cuda/devices.h"
#include "../low_rank/cuda.h"
#include "python.h"

namespace pycompress {
namespace {

namespace factors = low_rank::cuda;

factors::Plan plan_of(const factors::Factors& shape, int type, int64_t m, const std::string& kernel, int splits) {
  const gpu::Device device = gpu::device();
  if (kernel.empty()) return factors::plan(shape, static_cast<Type>(type), m, device.arch, device.multiprocessors);
  for (const factors::Kernel* each : factors::cuda_kernels())
    if (kernel == each->name) return factors::plan(*each, shape, m, splits);
  throw std::invalid_argument("no low-rank kernel for CUDA is named '" + kernel + "'");
}

// The kernels take whole tiles of the rank.
factors::Factors shape_of(int64_t n, int64_t k, int64_t rank) {
  return {n, k, round_up<int64_t>(rank, factors::kTile)};
}

// Bytes of the workspace that a call needs.
int64_t low_rank_workspace(int device, int64_t n, int64_t k, int64_t rank, int type, int64_t m,
                           const std::string& kernel, int splits) {
  const gpu::DeviceGuard guard(device);
  return plan_of(shape_of(n, k, rank), type, m, kernel, splits).workspace;
}

void low_rank_linear(int device, uintptr_t stream, uintptr_t x, int type, int64_t m, int64_t ldx, int64_t n, int64_t k,
                     int64_t rank, uintptr_t packed, uintptr_t bias, int activation, uintptr_t y, uintptr_t workspace,
                     const std::string& kernel, int splits) {
  const gpu::DeviceGuard guard(device);
  const factors::Factors shape = shape_of(n, k, rank);
  factors::linear({pointer<const void>(x), static_cast<Type>(type), m, ldx, pointer<const uint16_t>(packed), shape,
                   pointer<const float>(bias), static_cast<Activation>(activation), pointer<void>(y),
                   pointer<void>(workspace), pointer<CUstream_st>(stream)},
                  plan_of(shape, type, m, kernel, splits));
}

py::list low_rank_kernels() {
  py::list rows;
  for (const factors::Kernel* kernel : factors::cuda_kernels()) {
    py::dict row;
    row["op"] = "low_rank";
    row["name"] = kernel->name;
    row["type"] = static_cast<int>(kernel->type);
    row["channels"] = kernel->channels;
    row["rows"] = kernel->rows;
    row["warps"] = kernel->warps;
    row["stages"] = kernel->stages;
    rows.append(row);
  }
  return rows;
}

}  // namespace

void bind_cuda_low_rank(py::module_& m) {
  m.def("low_rank_workspace", &low_rank_workspace);
  m.def("low_rank_linear", &low_rank_linear);
  m.def("low_rank_kernels", &low_rank_kernels);
}

}  // namespace pycompress
