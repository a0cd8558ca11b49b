// The specification, and what runs where no other kernel can.
#include "../common/activation.h"

namespace pycompress::recurrent {
namespace {

inline Scalar load_up_to(const float* p, int) { return Scalar::load(p); }
inline void store_up_to(float* p, Scalar v, int) { v.store(p); }

}  // namespace
}  // namespace pycompress::recurrent

#include "gates.h"
#include "kernel_list.h"

namespace pycompress::recurrent {

const Kernel kScalar{"scalar", Isa::scalar, 1, 1, 1, lstm_units<Scalar>, gru_units<Scalar>};

}  // namespace pycompress::recurrent
