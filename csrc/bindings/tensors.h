// The operands of a linear layer read from torch tensors through DLPack's exchange table: a tenth of what it costs to
// ask each tensor for its address in Python.
#pragma once

#include "../common/check.h"
#include "../int8/gemm.h"
#include "dlpack.h"
#include "python.h"

namespace pycompress {

inline const dlpack::ExchangeTable* exchange = nullptr;

// Whether tensors can be read through this capsule (torch.Tensor.__dlpack_c_exchange_api__).
inline bool use_exchange(const py::object& capsule) {
  auto* table = static_cast<const dlpack::ExchangeTable*>(PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
  if (table == nullptr) throw py::error_already_set();
  if (table->major != 1) return false;
  exchange = table;
  return true;
}

// On the CPU, of any strides.
inline bool read_strided(py::handle object, dlpack::Tensor* tensor) {
  if (exchange->tensor_from_object(object.ptr(), tensor) != 0) {
    PyErr_Clear();
    return false;
  }
  return tensor->device_type == dlpack::kCpu;
}

inline bool read(py::handle object, dlpack::Tensor* tensor) { return read_strided(object, tensor) && tensor->dense(); }

inline Type type_of(const dlpack::Tensor& tensor) {
  if (tensor.is(dlpack::kFloat, 32)) return Type::float32;
  if (tensor.is(dlpack::kBfloat, 16)) return Type::bfloat16;
  return tensor.is(dlpack::kFloat, 16) ? Type::float16 : Type::int32;
}

// The short way for what is usual: dense float x, y of its dtype, operands of the right kind. Anything else is left
// alone (read() gives false), for ops/ to handle or to refuse.
struct LinearTensors {
  const void* x;
  Type type;
  int64_t m, k, packed_bytes, n;
  const uint8_t* packed;
  const float* bias;  // or null
  void* y;

  // y is [..., n]; bias may be None; an activation that is none (below 0) is left alone, too.
  bool read(py::handle x_object, py::handle packed_object, py::handle bias_object, int activation,
            py::handle y_object) {
    dlpack::Tensor from, weight, to;
    if (activation < 0 || !pycompress::read(x_object, &from) || !pycompress::read(packed_object, &weight) ||
        !pycompress::read(y_object, &to))
      return false;
    type = type_of(from);
    if (!weight.is(dlpack::kUInt, 8) || weight.ndim != 1 || type == Type::int32 || type_of(to) != type ||
        from.ndim == 0 || to.ndim != from.ndim)
      return false;
    m = 1;
    for (int i = 0; i + 1 < from.ndim; ++i) m *= from.shape[i];
    k = from.shape[from.ndim - 1];
    n = to.shape[to.ndim - 1];
    int64_t y_size = 1;
    for (int i = 0; i < to.ndim; ++i) y_size *= to.shape[i];
    if (y_size != m * n || (from.data == nullptr && m * k != 0)) return false;
    x = from.data == nullptr ? nullptr : from.pointer<const void>();
    y = to.pointer<void>();
    packed = weight.pointer<const uint8_t>();
    packed_bytes = weight.shape[0];
    bias = nullptr;
    if (bias_object.is_none()) return true;
    dlpack::Tensor offset;
    if (!pycompress::read(bias_object, &offset) || !offset.is(dlpack::kFloat, 32) || offset.ndim != 1 ||
        offset.shape[0] != n)
      return false;
    bias = offset.pointer<const float>();
    return true;
  }

  // The scale float [n] that lies behind the packed weight, which is shorter by it from then on.
  const float* scale_behind() {
    packed_bytes -= n * static_cast<int64_t>(sizeof(float));
    check(packed_bytes >= 0, "packed weight: unknown format, expected ", n, " scales behind it");
    return reinterpret_cast<const float*>(packed + packed_bytes);
  }
};

}  // namespace pycompress
