// AVX-512 (the F, BW and VL of its VNNI machines): tiles of 32 or 16 queries, 24 sums of 16 floats in registers.
#include "../common/avx512_vector.h"
#include "avx2_turn.h"
#include "kernel_list.h"
#include "vectors.h"

namespace pycompress::block {

const Kernel kAvx512{"avx512_32", Isa::avx512_vnni, 2 * kWidth, kWidth, 1, attend, turn, add_norm, multiply};

}  // namespace pycompress::block
