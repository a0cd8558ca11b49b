// The specification, and what runs where no other kernel can.
#include "gates.h"
#include "kernel_list.h"

namespace pycompress::recurrent {
namespace {

struct One {
  static Scalar load(const float* p, int) { return Scalar::load(p); }
  static void store(float* p, Scalar v, int) { v.store(p); }
};

}  // namespace

const Kernel kScalar{"scalar", Isa::scalar, 1, 1, 1, lstm_units<Scalar, One>, gru_units<Scalar, One>};

}  // namespace pycompress::recurrent
