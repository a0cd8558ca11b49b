// What the values of a packed sparse weight are on CUDA.
#pragma once

#include <cstdint>

#include "../common/host_device.h"
#include "../common/types.h"

namespace pycompress::sparse::cuda {

enum class Element : int { bfloat16 = 0, float16 = 1, int8 = 2 };

PYCOMPRESS_HOST_DEVICE constexpr int bytes_of(Element element) { return element == Element::int8 ? 1 : 2; }
// Of the sums' result: halves are multiplied with their like; int8 sums are int32 first.
PYCOMPRESS_HOST_DEVICE constexpr Type type_of(Element element) {
  return element == Element::bfloat16 ? Type::bfloat16 : element == Element::float16 ? Type::float16 : Type::int32;
}

}  // namespace pycompress::sparse::cuda
