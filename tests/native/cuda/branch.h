// The suite of the side branch beside the CUDA int8 GEMM.
#pragma once

namespace native {

void test_cuda_side_branch();

}  // namespace native
