// The suite of the CUDA sparse kernels.
#pragma once

namespace native {

void test_cuda_sparse();

}  // namespace native
