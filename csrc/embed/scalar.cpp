// The specification, and what runs where no other kernel can.
#include <cmath>

#include "../common/activation.h"
#include "../common/float16.h"
#include "kernel_list.h"
#include "row.h"

namespace pycompress::embed {
namespace {

void run(const Row& row) {
  for (int part = 0; part < row.parts; ++part)
    for (int64_t i = 0; i < row.d; ++i) {
      const float* scale = row.scale[part];
      const float value = scale == nullptr ? float_at(row.part[part], row.type[part], i)
                                           : static_cast<float>(static_cast<const int8_t*>(row.part[part])[i]) * *scale;
      row.sums[i] = part == 0 ? value : row.sums[i] + value;
    }
  if (row.weight != nullptr) normalize<Scalar>(row, [](float x) { return std::sqrt(x); });
  for (int64_t i = 0; i < row.d; ++i) put_float(row.y, row.y_type, i, row.sums[i]);
}

}  // namespace

const Kernel kScalar{"scalar", Isa::scalar, 1, 1, 1, run};

}  // namespace pycompress::embed
