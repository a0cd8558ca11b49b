// The block sparse part of _cuda; what cuda.cpp says about pointers and streams holds here too, but for packing, which
// reads the host's memory.
#include "../sparse/blocks/cuda.h"

#include "cuda_tiles.h"

namespace pycompress {
namespace {

namespace blocks = sparse::cuda::blocks;
using sparse::cuda::Element;

blocks::Problem empty_problem(int64_t packed_bytes, int64_t n, int64_t k) {
  blocks::Problem problem{};
  problem.shape = blocks::shape_of(packed_bytes, n, k);
  problem.packed_bytes = packed_bytes;
  return problem;
}

py::bytes blocks_pack(uintptr_t mask, uintptr_t values, int64_t count, int element, int size, int activation_bits,
                      int64_t n, int64_t k) {
  std::vector<uint8_t> packed;
  {
    py::gil_scoped_release release;
    packed = blocks::pack(pointer<const uint8_t>(mask), pointer<const void>(values), count,
                          static_cast<Element>(element), size, activation_bits, n, k);
  }
  return py::bytes(reinterpret_cast<const char*>(packed.data()), packed.size());
}

void blocks_unpack(int device, uintptr_t stream, uintptr_t packed, int64_t packed_bytes, int64_t n, int64_t k,
                   uintptr_t dense) {
  const gpu::DeviceGuard guard(device);
  blocks::unpack(pointer<const uint8_t>(packed), blocks::shape_of(packed_bytes, n, k), pointer<void>(dense),
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

std::string blocks_chosen_kernel(int64_t packed_bytes, int64_t m, int64_t n, int64_t k, int arch, int multiprocessors) {
  return blocks::chosen_kernel(blocks::shape_of(packed_bytes, n, k), packed_bytes, m, arch, multiprocessors).name;
}

}  // namespace

void bind_cuda_blocks(py::module_& m) {
  m.def("blocks_linear", &tiles_linear<empty_problem, blocks::kernel_named, blocks::linear>);
  m.def("blocks_pack", &blocks_pack);
  m.def("blocks_unpack", &blocks_unpack);
  m.def("blocks_kernels", &blocks_kernels);
  m.def("blocks_chosen_kernel", &blocks_chosen_kernel);
}

}  // namespace pycompress
