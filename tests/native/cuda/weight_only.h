// The suites of the CUDA weight-only kernels.
#pragma once

namespace native {

void test_cuda_weight_only_layout();  // shuffle.h, packing on the device, the dequantization in registers, plans
void test_cuda_weight_only();         // the kernels

}  // namespace native
