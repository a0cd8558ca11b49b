// Reading a torch tensor without torch's headers: the C exchange table of DLPack 1.x, which torch.Tensor offers as
// `__dlpack_c_exchange_api__`. The declarations follow https://dmlc.github.io/dlpack/latest/c_api.html; a tensor costs
// some tens of nanoseconds this way, against 0.1 us for each attribute that Python asks for.
#pragma once

#include <Python.h>

#include <cstdint>

namespace pycompress::dlpack {

constexpr int32_t kCpu = 1;
enum Code : uint8_t { kInt = 0, kUInt = 1, kFloat = 2, kBfloat = 4, kBool = 6 };

struct Tensor {
  void* data;
  int32_t device_type, device_id;
  int32_t ndim;
  uint8_t code, bits;
  uint16_t lanes;
  const int64_t* shape;
  const int64_t* strides;  // in elements; null: dense
  uint64_t byte_offset;

  template <class T>
  T* pointer() const {
    return reinterpret_cast<T*>(static_cast<char*>(data) + byte_offset);
  }
  bool is(uint8_t wanted_code, uint8_t wanted_bits) const { return code == wanted_code && bits == wanted_bits; }
  int64_t stride(int i) const {  // in elements
    int64_t result = 1;
    for (int j = ndim - 1; strides == nullptr && j > i; --j) result *= shape[j];
    return strides == nullptr ? result : strides[i];
  }
  bool dense() const {
    int64_t stride = 1;
    for (int i = ndim - 1; strides != nullptr && i >= 0; --i) {
      if (shape[i] != 1 && strides[i] != stride) return false;
      stride *= shape[i];
    }
    return true;
  }
};

struct ExchangeTable {
  uint32_t major, minor;
  const ExchangeTable* previous;
  void* managed_tensor_allocator;
  void* managed_tensor_from_object;
  void* managed_tensor_to_object;
  int (*tensor_from_object)(void* object, Tensor* out);  // borrows; 0, or -1 with a Python exception set
  void* current_work_stream;
};

}  // namespace pycompress::dlpack
