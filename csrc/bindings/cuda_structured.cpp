// The 2:4 part of _cuda; what cuda.cpp says about pointers and streams holds here too.
#include "../sparse/structured.h"

#include "../common/check.h"
#include "../cuda/devices.h"
#include "cuda_rows.h"

namespace pycompress {
namespace {

namespace structured = sparse::cuda::structured;
using sparse::cuda::Element;

structured::Packed shape_of(int64_t n, int64_t k, int element) { return {n, k, static_cast<Element>(element)}; }

// int8: the rows of x are quantized into the workspace first, as the weight's header says.
void structured_linear(int device, uintptr_t stream, uintptr_t x, int x_type, int64_t m, int64_t k, int64_t ldx,
                       uintptr_t packed, int64_t packed_bytes, int64_t n, uintptr_t scale, uintptr_t bias,
                       int activation, uintptr_t y, int y_type, uintptr_t workspace, const std::string& kernel) {
  check(packed % 16 == 0, "sparse_linear: the packed weight is not aligned to 16 bytes, expected what sparse_pack ",
        "returns");
  const gpu::DeviceGuard guard(device);
  structured::Problem problem{};
  problem.x = pointer<const void>(x), problem.ldx = ldx, problem.m = m;
  problem.shape = structured::packed_of(packed_bytes, n, k);
  problem.packed = pointer<const uint8_t>(packed);
  problem.scale = pointer<const float>(scale), problem.bias = pointer<const float>(bias);
  problem.activation = static_cast<int8::Activation>(activation);
  problem.y = pointer<void>(y), problem.y_type = static_cast<int8::Type>(y_type);
  problem.stream = pointer<CUstream_st>(stream);
  const structured::Kernel* forced = kernel.empty() ? nullptr : &structured::kernel_named(kernel.c_str());
  if (problem.shape.element == Element::int8)
    problem.rows = quantized_rows(x, x_type, m, k, ldx, packed, workspace, problem.stream);
  structured::linear(problem, forced);
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
  for (int i = 0; i < count; ++i) {
    py::dict row;
    row["op"] = "structured";
    row["name"] = kernels[i].name;
    row["element"] = static_cast<int>(kernels[i].element);
    row["arch"] = kernels[i].arch;
    row["bn"] = kernels[i].bn;
    row["bm"] = kernels[i].bm;
    row["stages"] = kernels[i].stages;
    rows.append(row);
  }
  return rows;
}

std::string structured_chosen_kernel(int64_t m, int64_t n, int64_t k, int element, int arch, int multiprocessors) {
  return structured::chosen_kernel(shape_of(n, k, element), m, arch, multiprocessors).name;
}

}  // namespace

void bind_cuda_structured(py::module_& m) {
  m.def("structured_linear", &structured_linear);
  m.def("structured_packed_bytes", &structured_packed_bytes);
  m.def("structured_pack", &structured_pack);
  m.def("structured_unpack", &structured_unpack);
  m.def("structured_kernels", &structured_kernels);
  m.def("structured_chosen_kernel", &structured_chosen_kernel);
}

}  // namespace pycompress
