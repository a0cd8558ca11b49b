// 8 units at a time. The divisions bind: five for each vector of an LSTM, three of a GRU.
#include "../common/avx2_vector.h"
#include "gates.h"
#include "kernel_list.h"

namespace pycompress::recurrent {

const Kernel kAvx2{"avx2", Isa::avx2, 1, 8, 1, lstm_units<Vector>, gru_units<Vector>};

}  // namespace pycompress::recurrent
