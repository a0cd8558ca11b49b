// The tables of kernels that files of one architecture add to the list in halves.cu, each best first.
#pragma once

#include "halves.h"

namespace pycompress::halves {

const Kernel* kernels_sm80(int* count);  // halves_sm80.cu
const Kernel* kernels_sm90(int* count);  // halves_sm90.cu

}  // namespace pycompress::halves
