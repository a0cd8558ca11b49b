#include "gemm.h"

#include "../common/kernels.h"
#include "kernel_list.h"

namespace pycompress::dense {

Kernels<Kernel>& kernels() {
  static constexpr const Kernel* best_first[] = {
#if defined(PYCOMPRESS_X86)
      &kAvx2,
#endif
      &kScalar};
  static Kernels<Kernel> all{"dense", best_first};
  return all;
}

}  // namespace pycompress::dense
