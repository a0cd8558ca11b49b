// The part of _cuda for single weights under a bitmap; what cuda.cpp says about pointers and streams holds here too,
// but for packing, which reads the host's memory.
#include "../common/check.h"
#include "../cuda/devices.h"
#include "../sparse/bitmap/cuda.h"
#include "../sparse/element.h"
#include "python.h"

namespace pycompress {
namespace {

namespace few = sparse::cuda;

using Sizes = std::tuple<int64_t, int64_t, int, int64_t, int>;  // n, k, element, bytes, those of the largest unit

few::Shape shape_of(const Sizes& sizes) {
  const auto& [n, k, element, bytes, unit_bytes] = sizes;
  return {sparse::cuda::type_of(static_cast<sparse::cuda::Element>(element)), n, k, bytes, unit_bytes};
}

few::Plan plan_of(const few::Shape& shape, int64_t m, const std::string& kernel, int splits) {
  if (kernel.empty()) return few::plan(shape, m, gpu::device().multiprocessors);
  int count = 0;
  const few::Kernel* all = few::cuda_kernels(&count);
  for (int i = 0; i < count; ++i)
    if (kernel == all[i].name) return few::plan(all[i], shape.n, m, splits);
  throw std::invalid_argument("no sparse kernel for CUDA is named '" + kernel + "'");
}

// Bytes of the workspace that a call needs.
int64_t bitmap_workspace(int device, const Sizes& sizes, int64_t m, const std::string& kernel, int splits) {
  const gpu::DeviceGuard guard(device);
  return plan_of(shape_of(sizes), m, kernel, splits).workspace;
}

void bitmap_linear(int device, uintptr_t stream, const Sizes& sizes, uintptr_t x, int type, int64_t m, int64_t ldx,
                   uintptr_t packed, uintptr_t bias, int activation, uintptr_t y, uintptr_t workspace,
                   const std::string& kernel, int splits) {
  check(packed % few::kChunk == 0, "sparse_linear: the packed weight is not aligned to ", few::kChunk,
        " bytes, expected what sparse_pack returns");
  const gpu::DeviceGuard guard(device);
  const few::Shape shape = shape_of(sizes);
  few::linear({pointer<const void>(x), static_cast<Type>(type), m, ldx, pointer<const uint8_t>(packed), shape,
               pointer<const float>(bias), static_cast<Activation>(activation), pointer<void>(y),
               pointer<void>(workspace), pointer<CUstream_st>(stream)},
              plan_of(shape, m, kernel, splits));
}

// The buffer, and how many bytes its largest unit has.
std::pair<py::bytes, int> bitmap_pack(uintptr_t mask, uintptr_t values, int64_t count, int element, int64_t n,
                                      int64_t k) {
  few::Packed packed;
  {
    py::gil_scoped_release release;
    packed = few::pack_bitmap(pointer<const uint8_t>(mask), pointer<const uint16_t>(values), count,
                              sparse::cuda::type_of(static_cast<sparse::cuda::Element>(element)), n, k);
  }
  return {py::bytes(reinterpret_cast<const char*>(packed.bytes.data()), packed.bytes.size()), packed.shape.unit_bytes};
}

void bitmap_unpack(int device, uintptr_t stream, const Sizes& sizes, uintptr_t packed, uintptr_t weight) {
  const gpu::DeviceGuard guard(device);
  few::dense(pointer<const uint8_t>(packed), shape_of(sizes), pointer<float>(weight), pointer<CUstream_st>(stream));
}

py::list bitmap_kernels() {
  py::list rows;
  int count = 0;
  const few::Kernel* kernels = few::cuda_kernels(&count);
  for (int i = 0; i < count; ++i) {
    py::dict row;
    row["op"] = "bitmap";
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
std::pair<std::string, int> bitmap_chosen_kernel(const Sizes& sizes, int64_t m, int multiprocessors) {
  const few::Plan plan = few::plan(shape_of(sizes), m, multiprocessors);
  return {plan.kernel->name, plan.splits};
}

}  // namespace

void bind_cuda_bitmap(py::module_& m) {
  m.def("bitmap_workspace", &bitmap_workspace);
  m.def("bitmap_linear", &bitmap_linear);
  m.def("bitmap_pack", &bitmap_pack);
  m.def("bitmap_unpack", &bitmap_unpack);
  m.def("bitmap_kernels", &bitmap_kernels);
  m.def("bitmap_chosen_kernel", &bitmap_chosen_kernel);
}

}  // namespace pycompress
