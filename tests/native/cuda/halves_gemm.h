// The suite of the CUDA GEMM of halves.
#pragma once

namespace native {

void test_cuda_halves();

}  // namespace native
