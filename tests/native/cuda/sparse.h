// The suite of the CUDA sparse kernels.
#pragma once

namespace native {

void test_cuda_sparse();
void test_cuda_blocks();

}  // namespace native
