// The specification of the two ways from integers to floats.
#include "../common/float16.h"
#include "../int4/pack.h"
#include "kernel_list.h"

namespace pycompress::weight_only {
namespace {

void expand_int8(const int8_t* panel, int positions, float* to) {
  for (int i = 0; i < positions * kPanel; ++i) to[i] = static_cast<float>(panel[i]);
}

void expand_int4(const int4::Panel& panel, float* to) {
  for (int i = 0; i < panel.units * int4::kUnit; ++i) {
    const int unit = i / int4::kUnit, group = unit / panel.group_units;
    for (int n = 0; n < kPanel; ++n) {
      const int byte = unit * int4::kUnitBytes + int4::nibble_byte(i % int4::kUnit, n);
      const int value = int4::nibble(panel.nibbles[byte], int4::is_high(i));
      const float scale = to_float(static_cast<uint32_t>(panel.scale[group * kPanel + n]) << 16);
      to[i * kPanel + n] = static_cast<float>(value - int4::zero_of(panel, group, n)) * scale;
    }
  }
}

}  // namespace

const Kernel kScalar{"scalar_16", Isa::scalar, 1, kPanel, 1, expand_int8, expand_int4};

}  // namespace pycompress::weight_only
