// The core without Python: every kernel against plain arithmetic, at its own tile edges, on adversarial values,
// operands against guard pages. Exit status 0 when all agree; for each failure a line that says what to reproduce.
// PYCOMPRESS_ISA=scalar runs the specifications alone.
#include "report.h"

int main() {
  using namespace native;
  return run({{"int8", test_int8},
              {"int8 conv", test_int8_conv},
              {"sparse kernels", test_sparse_kernels},
              {"sparse linear", test_sparse_linear},
              {"sparse conv", test_sparse_conv},
              {"dense", test_dense},
              {"low rank", test_low_rank},
              {"int4", test_int4},
              {"block", test_block},
              {"embed", test_embed},
              {"pool", test_pool},
              {"recurrent", test_recurrent},
              {"weight only", test_weight_only}});
}
