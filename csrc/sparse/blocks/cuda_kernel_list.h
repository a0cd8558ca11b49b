// The tables of block sparse kernels that files of one architecture add to the list in dispatch.cu, each best first.
#pragma once

#include "cuda.h"

namespace pycompress::sparse::cuda::blocks {

const Kernel* kernels_sm80(int* count);  // gemm_sm80.cu
const Kernel* kernels_sm90(int* count);  // gemm_sm90.cu

}  // namespace pycompress::sparse::cuda::blocks
