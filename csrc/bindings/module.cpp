// pycompress._C: the CPU kernels. Pointers come as integers with their sizes; ops.py has checked what they point to.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "../common/isa.h"
#include "../common/parallel.h"
#include "../int8/gemm.h"
#include "../int8/pack.h"
#include "../peak/peak.h"

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
  isa_available(Isa::scalar);  // an unknown PYCOMPRESS_ISA fails here, at import, and not in the middle of a model
  m.def("int8_linear", &int8_linear);
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
