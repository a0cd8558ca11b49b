// The weight-only part of _cuda; what cuda.cpp says about pointers and streams holds here too.
#include <cstring>

#include "../common/check.h"
#include "../cuda/devices.h"
#include "../weight_only/cuda.h"
#include "python.h"

namespace pycompress {
namespace {

namespace few = weight_only::cuda;

using Sizes =
    std::tuple<int, int64_t, int64_t, int, bool>;  // bits, n, k; of int4: group, whether it has no zero points

few::Packed shape_of(const Sizes& sizes) {
  const auto& [bits, n, k, group, symmetric] = sizes;
  check(bits == 8 || (bits == 4 && (group == 32 || group == 64 || group == 128)), "weight_only: ", bits,
        " bits in groups of ", group, ", expected 8, or 4 in groups of 32, 64 or 128");
  return {static_cast<few::Bits>(bits), n, k, bits == 4 ? group : 0, bits == 8 || symmetric};
}

// The weight that a buffer of so many bytes holds.
few::Packed packed_in(const char* op, const Sizes& sizes, int64_t packed_bytes) {
  const few::Packed shape = shape_of(sizes);
  check(shape.bytes() == packed_bytes, op, ": a packed weight ", shape.n, "x", shape.k, " has ", shape.bytes(),
        " bytes, this one ", packed_bytes);
  return shape;
}

few::Plan plan_of(const few::Packed& shape, int type, int64_t m, const std::string& kernel, int splits) {
  if (kernel.empty()) return few::plan(shape, static_cast<Type>(type), m, gpu::device().multiprocessors);
  int count = 0;
  const few::Kernel* all = few::kernels(&count);
  for (int i = 0; i < count; ++i)
    if (kernel == all[i].name) return few::plan(all[i], shape, m, splits);
  throw std::invalid_argument("no weight-only kernel for CUDA is named '" + kernel + "'");
}

// Bytes of the workspace that a call needs.
int64_t weight_only_workspace(int device, const Sizes& sizes, int type, int64_t m, const std::string& kernel,
                              int splits) {
  const gpu::DeviceGuard guard(device);
  return plan_of(shape_of(sizes), type, m, kernel, splits).workspace;
}

void weight_only_linear(int device, uintptr_t stream, const Sizes& sizes, uintptr_t x, int type, int64_t m, int64_t ldx,
                        uintptr_t packed, int64_t packed_bytes, uintptr_t weight_scale, uintptr_t bias, int activation,
                        uintptr_t y, uintptr_t workspace, const std::string& kernel, int splits) {
  const gpu::DeviceGuard guard(device);
  const few::Packed shape = packed_in("weight_only", sizes, packed_bytes);
  if (m == 0) return;
  few::linear({pointer<const void>(x), static_cast<Type>(type), m, ldx, pointer<const uint8_t>(packed), shape,
               pointer<const float>(weight_scale), pointer<const float>(bias), static_cast<Activation>(activation),
               pointer<void>(y), pointer<void>(workspace), pointer<CUstream_st>(stream)},
              plan_of(shape, type, m, kernel, splits));
}

int64_t weight_only_packed_bytes(const Sizes& sizes) { return shape_of(sizes).bytes(); }

void weight_only_pack(int device, uintptr_t stream, const Sizes& sizes, uintptr_t values, uintptr_t scale,
                      uintptr_t zero_point, uintptr_t packed, uintptr_t refused) {
  const gpu::DeviceGuard guard(device);
  few::pack({pointer<const uint8_t>(values), pointer<const uint16_t>(scale), pointer<const uint8_t>(zero_point)},
            shape_of(sizes), pointer<uint8_t>(packed), pointer<int32_t>(refused), pointer<CUstream_st>(stream));
}

void weight_only_unpack(int device, uintptr_t stream, const Sizes& sizes, uintptr_t packed, int64_t packed_bytes,
                        uintptr_t values, uintptr_t scale, uintptr_t zero_point) {
  const few::Packed shape = packed_in("weight_only_unpack", sizes, packed_bytes);
  const gpu::DeviceGuard guard(device);
  few::unpack(pointer<const uint8_t>(packed), shape,
              {pointer<uint8_t>(values), pointer<uint16_t>(scale), pointer<uint8_t>(zero_point)},
              pointer<CUstream_st>(stream));
}

py::list weight_only_kernels() {
  py::list rows;
  int count = 0;
  const few::Kernel* kernels = few::kernels(&count);
  for (int i = 0; i < count; ++i) {
    py::dict row;
    row["op"] = "weight_only";
    row["name"] = kernels[i].name;
    row["bits"] = static_cast<int>(kernels[i].bits);
    row["type"] = static_cast<int>(kernels[i].type);
    row["channels"] = kernels[i].tiles * 16;
    row["rows"] = kernels[i].columns * 8;
    row["warps"] = kernels[i].warps;
    row["stages"] = kernels[i].stages;
    rows.append(row);
  }
  return rows;
}

// (kernel, parts of k) that would run for m rows on a device with so many multiprocessors.
std::pair<std::string, int> weight_only_chosen_kernel(const Sizes& sizes, int type, int64_t m, int multiprocessors) {
  const few::Plan plan = few::plan(shape_of(sizes), static_cast<Type>(type), m, multiprocessors);
  return {plan.kernel->name, plan.splits};
}

}  // namespace

void bind_cuda_weight_only(py::module_& m) {
  m.def("weight_only_workspace", &weight_only_workspace);
  m.def("weight_only_linear", &weight_only_linear);
  m.def("weight_only_packed_bytes", &weight_only_packed_bytes);
  m.def("weight_only_pack", &weight_only_pack);
  m.def("weight_only_unpack", &weight_only_unpack);
  m.def("weight_only_kernels", &weight_only_kernels);
  m.def("weight_only_chosen_kernel", &weight_only_chosen_kernel);
}

}  // namespace pycompress
