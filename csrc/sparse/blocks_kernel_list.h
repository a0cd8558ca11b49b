// The tables of block sparse kernels that files of one architecture add to the list in blocks.cu, each best first.
#pragma once

#include "blocks.h"

namespace pycompress::sparse::cuda::blocks {

const Kernel* kernels_sm80(int* count);  // blocks_sm80.cu
const Kernel* kernels_sm90(int* count);  // blocks_sm90.cu

}  // namespace pycompress::sparse::cuda::blocks
