// 16 units at a time. The divisions bind: five for each vector of an LSTM, three of a GRU.
#include "../common/avx512_vector.h"
#include "gates.h"
#include "kernel_list.h"

namespace pycompress::recurrent {

const Kernel kAvx512{"avx512", Isa::avx512_vnni, 1, 16, 1, lstm_units<Vector>, gru_units<Vector>};

}  // namespace pycompress::recurrent
