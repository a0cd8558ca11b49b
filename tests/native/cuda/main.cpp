// The CUDA kernels' own source on the host (emulate.h). Exit status 0 when all agree; for each failure a line that says
// what to reproduce.
#include "../report.h"
#include "int8_reference.h"
#include "low_rank.h"
#include "sparse.h"
#include "weight_only.h"

int main() {
  using namespace native;
  return run({{"emulation", test_emulation},
              {"int8 quantize", test_cuda_int8_quantize},
              {"int8 pack", test_cuda_int8_pack},
              {"emulation of Hopper", test_emulation_hopper},
              {"int8 sm80", test_cuda_int8_sm80},
              {"int8 sm90", test_cuda_int8_hopper},
              {"weight-only layout", test_cuda_weight_only_layout},
              {"weight-only", test_cuda_weight_only},
              {"sparse", test_cuda_sparse},
              {"low rank", test_cuda_low_rank}});
}
