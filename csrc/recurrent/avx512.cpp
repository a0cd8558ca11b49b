// 16 units at a time. The divisions bind: five for each vector of an LSTM, three of a GRU.
#include "../common/avx512_vector.h"
#include "gates.h"
#include "kernel_list.h"

namespace pycompress::recurrent {
namespace {

struct Some {
  static Vector load(const float* p, int count) { return load_up_to(p, count); }
  static void store(float* p, Vector v, int count) { store_up_to(p, v, count); }
};

}  // namespace

const Kernel kAvx512{"avx512", Isa::avx512_vnni, 1, 16, 1, lstm_units<Vector, Some>, gru_units<Vector, Some>};

}  // namespace pycompress::recurrent
