#include "../recurrent/recurrent.h"

#include "python.h"

namespace pycompress {
namespace {

using Weight = std::tuple<uintptr_t, int64_t, uintptr_t, uintptr_t>;  // packed, its bytes, scale, bias or 0

recurrent::Matrix matrix(const Weight& weight) {
  const auto& [packed, bytes, scale, bias] = weight;
  return {pointer<const uint8_t>(packed), bytes, pointer<const float>(scale), pointer<const float>(bias)};
}

void int8_recurrent(int cell, uintptr_t x, int x_type, int64_t rows, int64_t k, int64_t ldx, const Weight& input,
                    const Weight& hidden, uintptr_t batch_sizes, int64_t steps, int64_t batch, int64_t size,
                    bool reverse, uintptr_t h, uintptr_t c, uintptr_t y, int64_t ldy, int threads) {
  const recurrent::Problem problem{static_cast<recurrent::Cell>(cell),
                                   pointer<const void>(x),
                                   static_cast<Type>(x_type),
                                   rows,
                                   k,
                                   ldx,
                                   matrix(input),
                                   matrix(hidden),
                                   pointer<const int64_t>(batch_sizes),
                                   steps,
                                   batch,
                                   size,
                                   reverse,
                                   pointer<float>(h),
                                   pointer<float>(c),
                                   pointer<float>(y),
                                   ldy,
                                   threads};
  const MaybeReleaseGil gil(rows * size * (k + size) > kReleaseGil);
  recurrent::run(problem);
}

}  // namespace

void bind_recurrent(py::module_& m) { m.def("int8_recurrent", &int8_recurrent); }

}  // namespace pycompress
