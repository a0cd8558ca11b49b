// The weight-only part of _cuda; what cuda.cpp says about pointers and streams holds here too.
#include <cstring>

#include "../common/check.h"
#include "../cuda/devices.h"
#include "../weight_only/cuda.h"
#include "python.h"

namespace pycompress {
namespace {

namespace few = weight_only::cuda;

few::Packed shape_of(int bits, int64_t n, int64_t k, int group, bool symmetric) {
  return {static_cast<few::Bits>(bits), n, k, bits == 4 ? group : 0, bits == 8 || symmetric};
}

// The weight [n, k] that a buffer of so many bytes holds.
few::Packed packed_in(const char* op, int bits, int64_t packed_bytes, int64_t n, int64_t k) {
  const few::Packed shape = bits == 4 ? few::int4_of(packed_bytes, n, k) : few::Packed{few::Bits::eight, n, k};
  check((bits == 8 || shape.group != 0) && shape.bytes() == packed_bytes, op, ": no packed weight ", n, "x", k, " has ",
        packed_bytes, " bytes");
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
int64_t weight_only_workspace(int device, int bits, int64_t packed_bytes, int64_t n, int64_t k, int type, int64_t m,
                              const std::string& kernel, int splits) {
  const gpu::DeviceGuard guard(device);
  return plan_of(packed_in("weight_only", bits, packed_bytes, n, k), type, m, kernel, splits).workspace;
}

void weight_only_linear(int device, uintptr_t stream, int bits, uintptr_t x, int type, int64_t m, int64_t k,
                        int64_t ldx, uintptr_t packed, int64_t packed_bytes, int64_t n, uintptr_t weight_scale,
                        uintptr_t bias, int activation, uintptr_t y, uintptr_t workspace, const std::string& kernel,
                        int splits) {
  const gpu::DeviceGuard guard(device);
  const few::Packed shape = packed_in("weight_only", bits, packed_bytes, n, k);
  if (m == 0) return;
  few::linear({pointer<const void>(x), static_cast<Type>(type), m, ldx, pointer<const uint8_t>(packed), shape,
               pointer<const float>(weight_scale), pointer<const float>(bias), static_cast<Activation>(activation),
               pointer<void>(y), pointer<void>(workspace), pointer<CUstream_st>(stream)},
              plan_of(shape, type, m, kernel, splits));
}

int64_t weight_only_packed_bytes(int bits, int64_t n, int64_t k, int group, bool symmetric) {
  return shape_of(bits, n, k, group, symmetric).bytes();
}

void weight_only_pack(int device, uintptr_t stream, int bits, uintptr_t values, uintptr_t scale, uintptr_t zero_point,
                      int64_t n, int64_t k, int group, uintptr_t packed, uintptr_t refused) {
  const gpu::DeviceGuard guard(device);
  few::pack({pointer<const uint8_t>(values), pointer<const uint16_t>(scale), pointer<const uint8_t>(zero_point)},
            shape_of(bits, n, k, group, zero_point == 0), pointer<uint8_t>(packed), pointer<int32_t>(refused),
            pointer<CUstream_st>(stream));
}

void weight_only_unpack(int device, uintptr_t stream, int bits, uintptr_t packed, int64_t packed_bytes, int64_t n,
                        int64_t k, int group, uintptr_t values, uintptr_t scale, uintptr_t zero_point) {
  const few::Packed shape = shape_of(bits, n, k, group, zero_point == 0);
  check(shape.bytes() == packed_bytes, "weight_only_unpack: a packed weight ", n, "x", k, " has ", shape.bytes(),
        " bytes, this one ", packed_bytes);
  const gpu::DeviceGuard guard(device);
  few::unpack(pointer<const uint8_t>(packed), shape,
              {pointer<uint8_t>(values), pointer<uint16_t>(scale), pointer<uint8_t>(zero_point)},
              pointer<CUstream_st>(stream));
}

// (group, whether there are no zero points) of an int4 weight [n, k] in a buffer of so many bytes.
std::pair<int, bool> weight_only_int4_of(int64_t packed_bytes, int64_t n, int64_t k) {
  const few::Packed shape = packed_in("int4", 4, packed_bytes, n, k);
  return {shape.group, shape.symmetric};
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
std::pair<std::string, int> weight_only_chosen_kernel(int bits, int64_t n, int64_t k, int group, bool symmetric,
                                                      int type, int64_t m, int multiprocessors) {
  const few::Plan plan = few::plan(shape_of(bits, n, k, group, symmetric), static_cast<Type>(type), m, multiprocessors);
  return {plan.kernel->name, plan.splits};
}

}  // namespace

void bind_cuda_weight_only(py::module_& m) {
  m.def("weight_only_workspace", &weight_only_workspace);
  m.def("weight_only_linear", &weight_only_linear);
  m.def("weight_only_packed_bytes", &weight_only_packed_bytes);
  m.def("weight_only_pack", &weight_only_pack);
  m.def("weight_only_unpack", &weight_only_unpack);
  m.def("weight_only_int4_of", &weight_only_int4_of);
  m.def("weight_only_kernels", &weight_only_kernels);
  m.def("weight_only_chosen_kernel", &weight_only_chosen_kernel);
}

}  // namespace pycompress
