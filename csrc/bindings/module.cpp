// pycompress._C: the CPU kernels.
#include <string>
#include <type_traits>

#include "../block/block.h"
#include "../common/check.h"
#include "../common/kernels.h"
#include "../common/parallel.h"
#include "../conv/conv.h"
#include "../dense/gemm.h"
#include "../embed/embed.h"
#include "../int4/gemm.h"
#include "../int8/gemm.h"
#include "../peak/peak.h"
#include "../pool/pool.h"
#include "../recurrent/recurrent.h"
#include "../sparse/gemm.h"
#include "../weight_only/gemm.h"
#include "python.h"

namespace pycompress {
namespace {

// f(kernels) of every op.
template <class F>
void for_ops(F&& f) {
  f(int8::kernels());
  f(conv::kernels());
  f(sparse::kernels());
  f(dense::kernels());
  f(int4::kernels());
  f(weight_only::kernels());
  f(block::kernels());
  f(embed::kernels());
  f(pool::kernels());
  f(recurrent::kernels());
}

py::list kernels() {
  py::list result;
  for_ops([&](const auto& kernels) {
    for (const auto* kernel : kernels) {
      py::dict row;
      row["op"] = kernels.op;
      row["name"] = kernel->name;
      row["isa"] = isa_name(kernel->isa);
      row["mr"] = kernel->mr;
      row["nr"] = kernel->nr;
      row["kr"] = kernel->kr;
      row["available"] = kernels.runs(*kernel);
      if constexpr (std::is_same_v<decltype(kernel), const sparse::Kernel*>)
        row["format"] = sparse::format_name(kernel->format);
      result.append(row);
    }
  });
  return result;
}

std::string force_kernel(const std::string& op, const std::string& name) {
  const char* before = nullptr;
  std::string ops;
  for_ops([&](auto& kernels) {
    if (op == kernels.op) before = kernels.force(name.c_str());
    ops += (ops.empty() ? "" : ", ") + std::string(kernels.op);
  });
  check(before != nullptr, "force_kernel: the op is '", op, "', expected one of ", ops);
  return before;
}

py::dict instruction_sets() {
  py::dict result;
  for (const NamedIsa& known : kIsas) result[known.name] = isa_detected(known.isa);
  return result;
}

}  // namespace
}  // namespace pycompress

PYBIND11_MODULE(_C, m) {
  using namespace pycompress;
  watch_fork();
  isa_available(Isa::scalar);  // an unknown PYCOMPRESS_ISA fails here, at import, and not in the middle of a model
  bind_block(m);
  bind_conv(m);
  bind_embed(m);
  bind_int4(m);
  bind_int8(m);
  bind_low_rank(m);
  bind_pool(m);
  bind_recurrent(m);
  bind_sparse(m);
  m.def("kernels", &kernels);
  m.def("instruction_sets", &instruction_sets);
  m.def("cap_isa", [](const std::string& name) { return cap_isa(name.c_str()); });
  m.def("force_kernel", &force_kernel);
  m.def("peak", [](const std::string& loop, double seconds, int threads) {
    py::gil_scoped_release release;
    return peak::operations(loop.c_str(), seconds, threads);
  });
  m.def("bandwidth", [](int64_t bytes, double seconds, int threads) {
    py::gil_scoped_release release;
    return peak::bandwidth(bytes, seconds, threads);
  });
}
