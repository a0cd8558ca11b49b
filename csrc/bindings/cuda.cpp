// pycompress._cuda: the CUDA kernels. Pointers are addresses on the device, streams are cudaStream_t as integers; ops/
// has checked what they point to. Nothing here waits for the device.
#include "../int8/cuda.h"
#include "../common/check.h"
#include "../cuda/devices.h"
#include "cuda_rows.h"

namespace pycompress {
namespace {

namespace cuda8 = int8::cuda;

cuda8::Stream stream_of(uintptr_t stream) { return pointer<CUstream_st>(stream); }

// The bytes that a call's workspace needs.
int64_t int8_workspace(int64_t m, int64_t k) { return rows_bytes(m, k); }

// A packed weight [n, k].
cuda8::PackedShape shape_of(const char* op, int64_t n, int64_t k, uintptr_t packed, int64_t packed_bytes) {
  const cuda8::PackedShape shape{n, k};
  check(packed % 16 == 0, op, ": the packed weight is not aligned to 16 bytes, expected what int8_pack returns");
  check(n >= 1 && k >= 1 && shape.bytes() == packed_bytes, op, ": a packed weight ", n, "x", k, " has ", shape.bytes(),
        " bytes, this one ", packed_bytes);
  return shape;
}

// What stands in front of the layer: which, weight and bias of a norm, its eps, the gate and its row stride.
using BeforeTuple = std::tuple<int, uintptr_t, uintptr_t, float, uintptr_t, int64_t>;

cuda8::Input input_of(uintptr_t x, int x_type, int64_t m, int64_t k, int64_t ldx, const BeforeTuple& before,
                      int activation_bits) {
  const auto& [kind, weight, bias, eps, gate, ldg] = before;
  cuda8::Input input{};
  input.x = pointer<const void>(x);
  input.type = static_cast<Type>(x_type);
  input.m = m, input.k = k, input.ldx = ldx;
  input.activation_bits = activation_bits;
  input.before = static_cast<cuda8::Before>(kind);
  input.weight = pointer<const void>(weight), input.bias = pointer<const void>(bias), input.eps = eps;
  input.gate = pointer<const void>(gate), input.ldg = ldg;
  return input;
}

cuda8::Problem problem_of(uintptr_t stream, int64_t m, const cuda8::PackedShape& shape, uintptr_t packed,
                          uintptr_t weight_scale, uintptr_t bias, int activation, uintptr_t y, int y_type,
                          uintptr_t workspace) {
  return {rows_in(workspace, m, shape.k),
          m,
          shape.n,
          shape.k,
          pointer<const uint8_t>(packed),
          pointer<const float>(weight_scale),
          pointer<const float>(bias),
          static_cast<Activation>(activation),
          pointer<void>(y),
          static_cast<Type>(y_type),
          stream_of(stream)};
}

const cuda8::Kernel* forced(const std::string& kernel) {
  return kernel.empty() ? nullptr : &cuda8::kernel_named(kernel.c_str());
}

void int8_linear(int device, uintptr_t stream, uintptr_t x, int x_type, int64_t m, int64_t ldx,
                 const BeforeTuple& before, int64_t n, int64_t k, int activation_bits, uintptr_t packed,
                 int64_t packed_bytes, uintptr_t weight_scale, uintptr_t bias, int activation, uintptr_t y, int y_type,
                 uintptr_t workspace, const std::string& kernel) {
  const cuda8::PackedShape shape = shape_of("int8_linear", n, k, packed, packed_bytes);
  const gpu::DeviceGuard guard(device);
  const cuda8::Problem problem =
      problem_of(stream, m, shape, packed, weight_scale, bias, activation, y, y_type, workspace);
  const cuda8::Kernel* kernel_forced = forced(kernel);
  cuda8::quantize(input_of(x, x_type, m, k, ldx, before, activation_bits), problem.rows, problem.stream);
  cuda8::linear(problem, kernel_forced);
}

// The two halves of int8_linear alone, for benchmarks and validation.
void int8_quantize(int device, uintptr_t stream, uintptr_t x, int x_type, int64_t m, int64_t k, int64_t ldx,
                   const BeforeTuple& before, int activation_bits, uintptr_t workspace) {
  const gpu::DeviceGuard guard(device);
  cuda8::quantize(input_of(x, x_type, m, k, ldx, before, activation_bits), rows_in(workspace, m, k), stream_of(stream));
}

void int8_multiply(int device, uintptr_t stream, int64_t m, int64_t n, int64_t k, uintptr_t packed,
                   int64_t packed_bytes, uintptr_t weight_scale, uintptr_t bias, int activation, uintptr_t y,
                   int y_type, uintptr_t workspace, const std::string& kernel) {
  const cuda8::PackedShape shape = shape_of("int8_linear", n, k, packed, packed_bytes);
  const gpu::DeviceGuard guard(device);
  cuda8::linear(problem_of(stream, m, shape, packed, weight_scale, bias, activation, y, y_type, workspace),
                forced(kernel));
}

void int8_unsigned_rows(int device, uintptr_t stream, uintptr_t workspace, int64_t m, int64_t k, uintptr_t q) {
  const gpu::DeviceGuard guard(device);
  cuda8::unsigned_rows(rows_in(workspace, m, k), m, k, pointer<uint8_t>(q), stream_of(stream));
}

int64_t int8_packed_bytes(int64_t n, int64_t k) { return cuda8::PackedShape{n, k}.bytes(); }

void int8_pack(int device, uintptr_t stream, uintptr_t values, int64_t n, int64_t k, uintptr_t packed,
               uintptr_t refused) {
  const gpu::DeviceGuard guard(device);
  cuda8::pack(pointer<const int8_t>(values), n, k, pointer<uint8_t>(packed), pointer<int32_t>(refused),
              stream_of(stream));
}

void int8_unpack(int device, uintptr_t stream, uintptr_t packed, int64_t packed_bytes, int64_t n, int64_t k,
                 uintptr_t values) {
  shape_of("int8_unpack", n, k, packed, packed_bytes);
  const gpu::DeviceGuard guard(device);
  cuda8::unpack(pointer<const uint8_t>(packed), n, k, pointer<int8_t>(values), stream_of(stream));
}

py::list int8_kernels() {
  py::list rows;
  int count = 0;
  const cuda8::Kernel* kernels = cuda8::kernels(&count);
  for (int i = 0; i < count; ++i) {
    const cuda8::Kernel& kernel = kernels[i];
    py::dict row;
    row["op"] = "int8";
    row["name"] = kernel.name;
    row["arch"] = kernel.arch;
    row["bm"] = kernel.bm;
    row["bn"] = kernel.bn;
    row["bk"] = kernel.bk;
    row["stages"] = kernel.stages;
    rows.append(row);
  }
  return rows;
}

std::string int8_chosen_kernel(int64_t m, int64_t n, int64_t k, int arch, int multiprocessors) {
  return cuda8::chosen_kernel(m, n, k, arch, multiprocessors).name;
}

int compute_capability(int device) {
  const gpu::DeviceGuard guard(device);
  return gpu::device().arch;
}

}  // namespace
}  // namespace pycompress

PYBIND11_MODULE(_cuda, m) {
  using namespace pycompress;
  bind_cuda_bitmap(m);
  bind_cuda_blocks(m);
  bind_cuda_low_rank(m);
  bind_cuda_side_branch(m);
  bind_cuda_structured(m);
  bind_cuda_weight_only(m);
  m.def("compute_capability", &compute_capability);
  m.def("int8_workspace", &int8_workspace);
  m.def("int8_linear", &int8_linear);
  m.def("int8_quantize", &int8_quantize);
  m.def("int8_multiply", &int8_multiply);
  m.def("int8_unsigned_rows", &int8_unsigned_rows);
  m.def("int8_packed_bytes", &int8_packed_bytes);
  m.def("int8_pack", &int8_pack);
  m.def("int8_unpack", &int8_unpack);
  m.def("int8_kernels", &int8_kernels);
  m.def("int8_chosen_kernel", &int8_chosen_kernel);
}
