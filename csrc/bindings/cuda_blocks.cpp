// The block sparse part of _cuda; what cuda.cpp says about pointers and streams holds here too, but for packing, which
// reads the host's memory.
#include "../sparse/blocks.h"

#include "../common/check.h"
#include "../cuda/devices.h"
#include "cuda_rows.h"

namespace pycompress {
namespace {

namespace blocks = sparse::cuda::blocks;
using sparse::cuda::Element;

// int8: the rows of x are quantized into the workspace first, as the weight's header says.
void blocks_linear(int device, uintptr_t stream, uintptr_t x, int x_type, int64_t m, int64_t k, int64_t ldx,
                   uintptr_t packed, int64_t packed_bytes, int64_t n, uintptr_t scale, uintptr_t bias, int activation,
                   uintptr_t y, int y_type, uintptr_t workspace, const std::string& kernel) {
  check(packed % 16 == 0, "sparse_linear: the packed weight is not aligned to 16 bytes, expected what sparse_pack ",
        "returns");
  const gpu::DeviceGuard guard(device);
  blocks::Problem problem{};
  problem.x = pointer<const void>(x), problem.ldx = ldx, problem.m = m;
  problem.shape = blocks::shape_of(packed_bytes, n, k);
  problem.packed = pointer<const uint8_t>(packed), problem.packed_bytes = packed_bytes;
  problem.scale = pointer<const float>(scale), problem.bias = pointer<const float>(bias);
  problem.activation = static_cast<int8::Activation>(activation);
  problem.y = pointer<void>(y), problem.y_type = static_cast<int8::Type>(y_type);
  problem.stream = pointer<CUstream_st>(stream);
  const blocks::Kernel* forced = kernel.empty() ? nullptr : &blocks::kernel_named(kernel.c_str());
  if (problem.shape.element == Element::int8)
    problem.rows = quantized_rows(x, x_type, m, k, ldx, packed, workspace, problem.stream);
  blocks::linear(problem, forced);
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
    py::dict row;
    row["op"] = "blocks";
    row["name"] = kernels[i].name;
    row["element"] = static_cast<int>(kernels[i].element);
    row["size"] = kernels[i].size;
    row["arch"] = kernels[i].arch;
    row["bn"] = kernels[i].bn;
    row["bm"] = kernels[i].bm;
    row["stages"] = kernels[i].stages;
    rows.append(row);
  }
  return rows;
}

std::string blocks_chosen_kernel(int64_t packed_bytes, int64_t m, int64_t n, int64_t k, int arch, int multiprocessors) {
  return blocks::chosen_kernel(blocks::shape_of(packed_bytes, n, k), packed_bytes, m, arch, multiprocessors).name;
}

}  // namespace

void bind_cuda_blocks(py::module_& m) {
  m.def("blocks_linear", &blocks_linear);
  m.def("blocks_pack", &blocks_pack);
  m.def("blocks_unpack", &blocks_unpack);
  m.def("blocks_kernels", &blocks_kernels);
  m.def("blocks_chosen_kernel", &blocks_chosen_kernel);
}

}  // namespace pycompress
