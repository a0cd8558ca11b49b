// The 2:4 part of _cuda; what cuda.cpp says about pointers and streams holds here too.
#include "../sparse/structured/cuda.h"

#include "cuda_tiles.h"

namespace pycompress {
namespace {

namespace structured = sparse::cuda::structured;
using sparse::cuda::Element;

structured::Packed shape_of(int64_t n, int64_t k, int element) { return {n, k, static_cast<Element>(element)}; }

structured::Problem empty_problem(int64_t packed_bytes, int64_t n, int64_t k) {
  structured::Problem problem{};
  problem.shape = structured::packed_of(packed_bytes, n, k);
  return problem;
}

int64_t structured_packed_bytes(int64_t n, int64_t k, int element) { return shape_of(n, k, element).bytes(); }

void structured_pack(int device, uintptr_t stream, uintptr_t dense, int64_t n, int64_t k, int element,
                     int activation_bits, uintptr_t packed, uintptr_t refused) {
  const gpu::DeviceGuard guard(device);
  structured::pack(pointer<const void>(dense), shape_of(n, k, element), activation_bits, pointer<uint8_t>(packed),
                   pointer<int32_t>(refused), pointer<CUstream_st>(stream));
}

void structured_unpack(int device, uintptr_t stream, uintptr_t packed, int64_t packed_bytes, int64_t n, int64_t k,
                       uintptr_t dense) {
  const gpu::DeviceGuard guard(device);
  structured::unpack(pointer<const uint8_t>(packed), structured::packed_of(packed_bytes, n, k), pointer<void>(dense),
                     pointer<CUstream_st>(stream));
}

py::list structured_kernels() {
  py::list rows;
  int count = 0;
  const structured::Kernel* kernels = structured::kernels(&count);
  for (int i = 0; i < count; ++i) rows.append(tiles_kernel("structured", kernels[i]));
  return rows;
}

std::string structured_chosen_kernel(int64_t m, int64_t n, int64_t k, int element, int arch, int multiprocessors) {
  return structured::chosen_kernel(shape_of(n, k, element), m, arch, multiprocessors).name;
}

}  // namespace

void bind_cuda_structured(py::module_& m) {
  m.def("structured_linear", &tiles_linear<empty_problem, structured::kernel_named, structured::linear>);
  m.def("structured_packed_bytes", &structured_packed_bytes);
  m.def("structured_pack", &structured_pack);
  m.def("structured_unpack", &structured_unpack);
  m.def("structured_kernels", &structured_kernels);
  m.def("structured_chosen_kernel", &structured_chosen_kernel);
}

}  // namespace pycompress
