// The suite of the CUDA low-rank kernels.
#pragma once

namespace native {

void test_cuda_low_rank();

}  // namespace native
