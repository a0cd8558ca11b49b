// pycompress._C: the CPU kernels.
#include "../common/isa.h"
#include "../common/parallel.h"
#include "../int4/gemm.h"
#include "../int8/gemm.h"
#include "../low_rank/gemm.h"
#include "../peak/peak.h"
#include "../sparse/gemm.h"
#include "../weight_only/gemm.h"
#include "python.h"

namespace pycompress {
namespace {

template <class Kernel>
py::dict describe(const char* op, const Kernel& kernel) {
  py::dict row;
  row["op"] = op;
  row["name"] = kernel.name;
  row["isa"] = isa_name(kernel.isa);
  row["mr"] = kernel.mr;
  row["nr"] = kernel.nr;
  row["kr"] = kernel.kr;
  row["available"] = isa_available(kernel.isa);
  return row;
}

py::list kernels() {
  py::list result;
  int count = 0;
  const int8::Kernel* dense = int8::kernels(&count);
  for (int i = 0; i < count; ++i) result.append(describe("int8", dense[i]));
  const sparse::Kernel* sparse = sparse::kernels(&count);
  for (int i = 0; i < count; ++i) {
    py::dict row = describe("sparse", sparse[i]);
    row["format"] = sparse::format_name(sparse[i].format);
    result.append(row);
  }
  const low_rank::Kernel* factors = low_rank::kernels(&count);
  for (int i = 0; i < count; ++i) result.append(describe("low_rank", factors[i]));
  const int4::Kernel* groups = int4::kernels(&count);
  for (int i = 0; i < count; ++i) result.append(describe("int4", groups[i]));
  const weight_only::Kernel* weights = weight_only::kernels(&count);
  for (int i = 0; i < count; ++i) result.append(describe("weight_only", weights[i]));
  return result;
}

py::dict instruction_sets() {
  py::dict result;
  for (int i = 0; i < kIsaCount; ++i) result[isa_name(static_cast<Isa>(i))] = isa_detected(static_cast<Isa>(i));
  return result;
}

}  // namespace
}  // namespace pycompress

PYBIND11_MODULE(_C, m) {
  using namespace pycompress;
  watch_fork();
  isa_available(Isa::scalar);  // an unknown PYCOMPRESS_ISA fails here, at import, and not in the middle of a model
  bind_int4(m);
  bind_int8(m);
  bind_low_rank(m);
  bind_sparse(m);
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
