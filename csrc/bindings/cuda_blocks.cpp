// The block sparse part of _cuda; what cuda.cpp says about pointers and streams holds here too, but for packing, which
// reads the host's memory.
#include "../sparse/blocks/cuda.h"

#include "cuda_tiles.h"

namespace pycompress {
namespace {

namespace blocks = sparse::cuda::blocks;
using sparse::cuda::Element;

using Sizes = std::tuple<int64_t, int64_t, int, int, int64_t>;  // n, k, element, size of a block, how many are stored

blocks::Shape shape_of(const Sizes& sizes, int64_t packed_bytes) {
  const auto& [n, k, element, size, stored] = sizes;
  const blocks::Shape shape{static_cast<Element>(element), size, n, k, stored};
  blocks::check_packed(shape, packed_bytes);
  return shape;
}

// The buffer, and how many blocks or fragments are stored in it.
std::pair<py::bytes, int64_t> blocks_pack(uintptr_t mask, uintptr_t values, int64_t count, int element, int size,
                                          int64_t n, int64_t k) {
  blocks::Packed packed;
  {
    py::gil_scoped_release release;
    packed = blocks::pack(pointer<const uint8_t>(mask), pointer<const void>(values), count,
                          static_cast<Element>(element), size, n, k);
  }
  return {py::bytes(reinterpret_cast<const char*>(packed.bytes.data()), packed.bytes.size()), packed.shape.stored};
}

void blocks_unpack(int device, uintptr_t stream, const Sizes& sizes, uintptr_t packed, int64_t packed_bytes,
                   uintptr_t dense) {
  const gpu::DeviceGuard guard(device);
  blocks::unpack(pointer<const uint8_t>(packed), shape_of(sizes, packed_bytes), pointer<void>(dense),
                 pointer<CUstream_st>(stream));
}

py::list blocks_kernels() {
  py::list rows;
  int count = 0;
  const blocks::Kernel* kernels = blocks::kernels(&count);
  for (int i = 0; i < count; ++i) {
    py::dict row = tiles_kernel("blocks", kernels[i]);
    row["size"] = kernels[i].size;
    rows.append(row);
  }
  return rows;
}

std::string blocks_chosen_kernel(const Sizes& sizes, int64_t m, int arch, int multiprocessors) {
  return blocks::chosen_kernel(shape_of(sizes, INT64_MAX), m, arch, multiprocessors).name;
}

}  // namespace

void bind_cuda_blocks(py::module_& m) {
  m.def("blocks_linear", &tiles_linear<blocks::Problem, Sizes, shape_of, blocks::kernel_named, blocks::linear>);
  m.def("blocks_pack", &blocks_pack);
  m.def("blocks_unpack", &blocks_unpack);
  m.def("blocks_kernels", &blocks_kernels);
  m.def("blocks_chosen_kernel", &blocks_chosen_kernel);
}

}  // namespace pycompress
