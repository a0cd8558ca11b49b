// The 2:4 part of _cuda; what cuda.cpp says about pointers and streams holds here too.
#include "../sparse/structured/cuda.h"

#include "cuda_tiles.h"

namespace pycompress {
namespace {

namespace structured = sparse::cuda::structured;
using sparse::cuda::Element;

using Sizes = std::tuple<int64_t, int64_t, int>;  // n, k, element

structured::Packed shape_of(const Sizes& sizes) {
  const auto& [n, k, element] = sizes;
  return {n, k, static_cast<Element>(element)};
}

structured::Packed packed_of(const Sizes& sizes, int64_t packed_bytes) {
  const structured::Packed shape = shape_of(sizes);
  structured::check_packed(shape, packed_bytes);
  return shape;
}

int64_t structured_packed_bytes(const Sizes& sizes) { return shape_of(sizes).bytes(); }

void structured_pack(int device, uintptr_t stream, const Sizes& sizes, uintptr_t dense, uintptr_t packed,
                     uintptr_t refused) {
  const gpu::DeviceGuard guard(device);
  structured::pack(pointer<const void>(dense), shape_of(sizes), pointer<uint8_t>(packed), pointer<int32_t>(refused),
                   pointer<CUstream_st>(stream));
}

void structured_unpack(int device, uintptr_t stream, const Sizes& sizes, uintptr_t packed, int64_t packed_bytes,
                       uintptr_t dense) {
  const gpu::DeviceGuard guard(device);
  structured::unpack(pointer<const uint8_t>(packed), packed_of(sizes, packed_bytes), pointer<void>(dense),
                     pointer<CUstream_st>(stream));
}

py::list structured_kernels() {
  py::list rows;
  int count = 0;
  const structured::Kernel* kernels = structured::kernels(&count);
  for (int i = 0; i < count; ++i) rows.append(tiles_kernel("structured", kernels[i]));
  return rows;
}

std::string structured_chosen_kernel(const Sizes& sizes, int64_t m, int arch, int multiprocessors) {
  return structured::chosen_kernel(shape_of(sizes), m, arch, multiprocessors).name;
}

}  // namespace

void bind_cuda_structured(py::module_& m) {
  m.def("structured_linear",
        &tiles_linear<structured::Problem, Sizes, packed_of, structured::kernel_named, structured::linear>);
  m.def("structured_packed_bytes", &structured_packed_bytes);
  m.def("structured_pack", &structured_pack);
  m.def("structured_unpack", &structured_unpack);
  m.def("structured_kernels", &structured_kernels);
  m.def("structured_chosen_kernel", &structured_chosen_kernel);
}

}  // namespace pycompress
