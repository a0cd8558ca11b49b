// The sparse part of _cuda; what cuda.cpp says about pointers and streams holds here too, but for packing, which reads
// the host's memory.
#include "../common/check.h"
#include "../cuda/devices.h"
#include "../sparse/bitmap/cuda.h"
#include "python.h"

namespace pycompress {
namespace {

namespace few = sparse::cuda;

few::Plan plan_of(int64_t packed_bytes, int64_t n, int64_t k, int64_t m, const std::string& kernel, int splits) {
  if (kernel.empty()) return few::plan(packed_bytes, n, k, m, gpu::device().multiprocessors);
  int count = 0;
  const few::Kernel* all = few::cuda_kernels(&count);
  for (int i = 0; i < count; ++i)
    if (kernel == all[i].name) return few::plan(all[i], n, m, splits);
  throw std::invalid_argument("no sparse kernel for CUDA is named '" + kernel + "'");
}

// Bytes of the workspace that a call needs.
int64_t sparse_workspace(int device, int64_t packed_bytes, int64_t n, int64_t k, int64_t m, const std::string& kernel,
                         int splits) {
  const gpu::DeviceGuard guard(device);
  return plan_of(packed_bytes, n, k, m, kernel, splits).workspace;
}

void sparse_linear(int device, uintptr_t stream, uintptr_t x, int type, int64_t m, int64_t k, int64_t ldx,
                   uintptr_t packed, int64_t packed_bytes, int64_t n, uintptr_t bias, int activation, uintptr_t y,
                   uintptr_t workspace, const std::string& kernel, int splits) {
  check(packed % few::kChunk == 0, "sparse_linear: the packed weight is not aligned to ", few::kChunk,
        " bytes, expected what sparse_pack returns");
  const gpu::DeviceGuard guard(device);
  few::linear({pointer<const void>(x), static_cast<Type>(type), m, k, ldx, pointer<const uint8_t>(packed), packed_bytes,
               n, pointer<const float>(bias), static_cast<Activation>(activation), pointer<void>(y),
               pointer<void>(workspace), pointer<CUstream_st>(stream)},
              plan_of(packed_bytes, n, k, m, kernel, splits));
}

// The type of the values of a packed weight.
int sparse_type(int64_t packed_bytes, int64_t k) { return static_cast<int>(few::type_of(packed_bytes, k)); }

py::bytes sparse_pack(uintptr_t mask, uintptr_t values, int64_t count, int type, int64_t n, int64_t k) {
  std::vector<uint8_t> packed;
  {
    py::gil_scoped_release release;
    packed = few::pack_bitmap(pointer<const uint8_t>(mask), pointer<const uint16_t>(values), count,
                              static_cast<Type>(type), n, k);
  }
  return py::bytes(reinterpret_cast<const char*>(packed.data()), packed.size());
}

void sparse_dense(int device, uintptr_t stream, uintptr_t packed, int64_t packed_bytes, int64_t n, int64_t k,
                  uintptr_t weight) {
  const gpu::DeviceGuard guard(device);
  few::dense(pointer<const uint8_t>(packed), packed_bytes, n, k, pointer<float>(weight), pointer<CUstream_st>(stream));
}

py::list sparse_kernels() {
  py::list rows;
  int count = 0;
  const few::Kernel* kernels = few::cuda_kernels(&count);
  for (int i = 0; i < count; ++i) {
    py::dict row;
    row["op"] = "sparse";
    row["name"] = kernels[i].name;
    row["type"] = static_cast<int>(kernels[i].type);
    row["channels"] = kernels[i].tiles * 16;
    row["rows"] = kernels[i].columns * 8;
    row["warps"] = kernels[i].warps;
    rows.append(row);
  }
  return rows;
}

// (kernel, parts of k) that would run for m rows on a device with so many multiprocessors.
std::pair<std::string, int> sparse_chosen_kernel(int64_t packed_bytes, int64_t n, int64_t k, int64_t m,
                                                 int multiprocessors) {
  const few::Plan plan = few::plan(packed_bytes, n, k, m, multiprocessors);
  return {plan.kernel->name, plan.splits};
}

}  // namespace

void bind_cuda_sparse(py::module_& m) {
  m.def("sparse_workspace", &sparse_workspace);
  m.def("sparse_linear", &sparse_linear);
  m.def("sparse_type", &sparse_type);
  m.def("sparse_pack", &sparse_pack);
  m.def("sparse_dense", &sparse_dense);
  m.def("sparse_kernels", &sparse_kernels);
  m.def("sparse_chosen_kernel", &sparse_chosen_kernel);
}

}  // namespace pycompress
