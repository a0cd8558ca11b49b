// The tables of 2:4 kernels that files of one architecture add to the list in structured.cu, each best first.
#pragma once

#include "structured.h"

namespace pycompress::sparse::cuda::structured {

const Kernel* kernels_sm80(int* count);  // structured_sm80.cu
const Kernel* kernels_sm90(int* count);  // structured_sm90.cu

}  // namespace pycompress::sparse::cuda::structured
