// AVX2 and FMA: tiles of 16 or 8 queries, 12 sums of eight floats in registers.
#include "../common/avx2_vector.h"
#include "avx2_turn.h"
#include "kernel_list.h"
#include "vectors.h"

namespace pycompress::block {

const Kernel kAvx2{"avx2_16", Isa::avx2, 2 * kWidth, kWidth, 1, attend, turn, add_norm, multiply};

}  // namespace pycompress::block
