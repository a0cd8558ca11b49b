// The CUDA kernels' own source on the host (emulate.h). Exit status 0 when all agree; for each failure a line that says
// what to reproduce.
//
//   cuda_kernels            all suites
//   cuda_kernels SUITE...   these; cuda_kernels --list: their names
#include <cstdio>
#include <cstring>

#include "../report.h"
#include "branch.h"
#include "emulate_test.h"
#include "halves_gemm.h"
#include "int8_reference.h"
#include "low_rank.h"
#include "sparse.h"
#include "structured.h"
#include "weight_only.h"

namespace native {
namespace {

const std::vector<Suite> kSuites{{"emulation", test_emulation},
                                 {"emulation of warps' products", test_emulation_mma},
                                 {"int8 quantize", test_cuda_int8_quantize},
                                 {"int8 pack", test_cuda_int8_pack},
                                 {"emulation of Hopper", test_emulation_hopper},
                                 {"emulation of groups' products", test_emulation_wgmma},
                                 {"int8 sm80", test_cuda_int8_sm80},
                                 {"int8 sm90", test_cuda_int8_hopper},
                                 {"int8 branch", test_cuda_int8_branch},
                                 {"halves", test_cuda_halves},
                                 {"weight-only layout", test_cuda_weight_only_layout},
                                 {"weight-only", test_cuda_weight_only},
                                 {"sparse", test_cuda_sparse},
                                 {"2:4 layout", test_cuda_structured_layout},
                                 {"2:4", test_cuda_structured},
                                 {"2:4 sm90", test_cuda_structured_hopper},
                                 {"blocks", test_cuda_blocks},
                                 {"low rank", test_cuda_low_rank},
                                 {"side branch", test_cuda_side_branch}};

int run_named(int count, char** names) {
  std::vector<Suite> some;
  for (int i = 0; i < count; ++i)
    for (const Suite& suite : kSuites)
      if (std::strcmp(suite.name, names[i]) == 0) some.push_back(suite);
  if (static_cast<int>(some.size()) == count) return run(some);
  std::fputs("no suite of this name: see --list\n", stderr);
  return 2;
}

}  // namespace
}  // namespace native

int main(int argc, char** argv) {
  using namespace native;
  if (argc == 1) return run(kSuites);
  if (std::strcmp(argv[1], "--list") != 0) return run_named(argc - 1, argv + 1);
  for (const Suite& suite : kSuites) std::puts(suite.name);
  return 0;
}
