// pycompress._C: the CPU kernels. Pointers come as integers with their sizes; ops.py has checked what they point to.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "../common/isa.h"
#include "../common/parallel.h"
#include "../int8/gemm.h"
#include "../int8/pack.h"
#include "../peak/peak.h"
#include "dlpack.h"

namespace py = pybind11;
using namespace pycompress;

namespace {

template <class T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

// Giving the lock up and taking it back costs about 0.1 us, so only where the work is worth it.
constexpr int64_t kReleaseGil = 200'000;  // multiply-adds: about a microsecond

struct MaybeReleaseGil {
  PyThreadState* state;
  explicit MaybeReleaseGil(bool release) : state(release ? PyEval_SaveThread() : nullptr) {}
  ~MaybeReleaseGil() {
    if (state != nullptr) PyEval_RestoreThread(state);
  }
};

void int8_linear(uintptr_t x, int x_type, int64_t m, int64_t k, int64_t ldx, uintptr_t packed, int64_t packed_bytes,
                 int64_t n, uintptr_t weight_scale, uintptr_t bias, int activation, uintptr_t y, int y_type,
                 uintptr_t row_scale, uintptr_t zero_point, int threads) {
  const int8::Problem problem{pointer<const void>(x),
                              static_cast<int8::Type>(x_type),
                              m,
                              k,
                              ldx,
                              pointer<const uint8_t>(packed),
                              packed_bytes,
                              n,
                              pointer<const float>(weight_scale),
                              pointer<const float>(bias),
                              static_cast<int8::Activation>(activation),
                              pointer<void>(y),
                              static_cast<int8::Type>(y_type),
                              pointer<float>(row_scale),
                              pointer<int32_t>(zero_point),
                              threads};
  const MaybeReleaseGil gil(m * n * k > kReleaseGil);
  int8::linear(problem);
}

const dlpack::ExchangeTable* exchange = nullptr;

// Whether tensors can be read through this capsule (torch.Tensor.__dlpack_c_exchange_api__).
bool use_exchange(const py::object& capsule) {
  auto* table = static_cast<const dlpack::ExchangeTable*>(PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
  if (table == nullptr) throw py::error_already_set();
  if (table->major != 1) return false;
  exchange = table;
  return true;
}

bool read(py::handle object, dlpack::Tensor* tensor) {
  if (exchange->tensor_from_object(object.ptr(), tensor) != 0) {
    PyErr_Clear();
    return false;
  }
  return tensor->device_type == dlpack::kCpu && tensor->dense();
}

int8::Type type_of(const dlpack::Tensor& tensor) {
  if (tensor.is(dlpack::kFloat, 32)) return int8::Type::float32;
  if (tensor.is(dlpack::kBfloat, 16)) return int8::Type::bfloat16;
  return tensor.is(dlpack::kFloat, 16) ? int8::Type::float16 : int8::Type::int32;
}

// The short way for what is usual: dense float x, y of its dtype, operands of the right kind. Anything else is left
// alone (false), for ops.py to handle or to refuse.
bool int8_linear_tensors(py::handle x_object, py::handle packed_object, py::handle scale_object, py::handle bias_object,
                         int activation, py::handle y_object, int threads) {
  dlpack::Tensor x, packed, scale, bias{}, y;
  if (!read(x_object, &x) || !read(packed_object, &packed) || !read(scale_object, &scale) || !read(y_object, &y))
    return false;
  if (!bias_object.is_none() && !read(bias_object, &bias)) return false;
  const int8::Type type = type_of(x);
  const bool operands =
      packed.is(dlpack::kUInt, 8) && packed.ndim == 1 && scale.is(dlpack::kFloat, 32) && scale.ndim == 1 &&
      (bias_object.is_none() || (bias.is(dlpack::kFloat, 32) && bias.ndim == 1 && bias.shape[0] == scale.shape[0]));
  if (!operands || type == int8::Type::int32 || type_of(y) != type || x.ndim == 0 || y.ndim != x.ndim) return false;
  int64_t m = 1;
  for (int i = 0; i + 1 < x.ndim; ++i) m *= x.shape[i];
  const int64_t k = x.shape[x.ndim - 1], n = scale.shape[0];
  int64_t y_size = 1;
  for (int i = 0; i < y.ndim; ++i) y_size *= y.shape[i];
  if (y_size != m * n || (x.data == nullptr && m * k != 0)) return false;
  const int8::Problem problem{x.data == nullptr ? nullptr : x.pointer<const void>(),
                              type,
                              m,
                              k,
                              k,
                              packed.pointer<const uint8_t>(),
                              packed.shape[0],
                              n,
                              scale.pointer<const float>(),
                              bias_object.is_none() ? nullptr : bias.pointer<const float>(),
                              static_cast<int8::Activation>(activation),
                              y.pointer<void>(),
                              type,
                              nullptr,
                              nullptr,
                              threads};
  const MaybeReleaseGil gil(m * n * k > kReleaseGil);
  int8::linear(problem);
  return true;
}

py::bytes int8_pack(uintptr_t values, int64_t n, int64_t k, int activation_bits, const std::string& kernel,
                    int threads) {
  const int8::Kernel& chosen = kernel.empty() ? int8::best_kernel() : int8::kernel_named(kernel.c_str());
  std::vector<uint8_t> packed;
  {
    py::gil_scoped_release release;
    packed = int8::pack(chosen, pointer<const int8_t>(values), n, k, activation_bits, threads);
  }
  return py::bytes(reinterpret_cast<const char*>(packed.data()), packed.size());
}

py::dict int8_header(uintptr_t packed, int64_t bytes) {
  const int8::Header& header = int8::header_of(pointer<const uint8_t>(packed), bytes);
  const int8::Depths depths = int8::depths(pointer<const uint8_t>(packed), bytes);
  py::dict result;
  result["n"] = header.n;
  result["k"] = header.k;
  result["activation_bits"] = header.activation_bits;
  result["groups"] = depths.groups;
  result["items"] = py::make_tuple(depths.items[0], depths.items[1], depths.items[2]);
  return result;
}

py::list kernels() {
  int count = 0;
  const int8::Kernel* list = int8::kernels(&count);
  py::list result;
  for (int i = 0; i < count; ++i) {
    py::dict row;
    row["op"] = "int8";
    row["name"] = list[i].name;
    row["isa"] = isa_name(list[i].isa);
    row["mr"] = list[i].mr;
    row["nr"] = list[i].nr;
    row["kr"] = list[i].kr;
    row["available"] = isa_available(list[i].isa);
    result.append(row);
  }
  return result;
}

py::dict instruction_sets() {
  py::dict result;
  for (int i = 0; i < kIsaCount; ++i) result[isa_name(static_cast<Isa>(i))] = isa_detected(static_cast<Isa>(i));
  return result;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  watch_fork();
  isa_available(Isa::scalar);  // an unknown PYCOMPRESS_ISA fails here, at import, and not in the middle of a model
  m.def("int8_linear", &int8_linear);
  m.def("use_exchange", &use_exchange);
  m.def("int8_linear_tensors", &int8_linear_tensors);
  m.def("int8_pack", &int8_pack);
  m.def("int8_unpack", [](uintptr_t packed, int64_t bytes, uintptr_t values) {
    int8::unpack(pointer<const uint8_t>(packed), bytes, pointer<int8_t>(values));
  });
  m.def("int8_header", &int8_header);
  m.def("int8_quantize", [](uintptr_t x, int type, int64_t rows, int64_t k, int64_t ldx, int bits, uintptr_t q,
                            uintptr_t scale, uintptr_t zero_point) {
    int8::quantize(int8::best_kernel(), pointer<const void>(x), static_cast<int8::Type>(type), rows, k, ldx, bits,
                   pointer<uint8_t>(q), pointer<float>(scale), pointer<int32_t>(zero_point));
  });
  m.def("kernels", &kernels);
  m.def("instruction_sets", &instruction_sets);
  m.def("peak", [](const std::string& loop, double seconds, int threads) {
    py::gil_scoped_release release;
    return peak::operations(loop.c_str(), seconds, threads);
  });
  m.def("bandwidth", [](int64_t bytes, double seconds, int threads) {
    py::gil_scoped_release release;
    return peak::bandwidth(bytes, seconds, threads);
  });
}
