// The core without Python: every kernel against plain arithmetic, at its own tile edges, on adversarial values,
// operands against guard pages. Exit status 0 when all agree; for each failure a line that says what to reproduce.
// PYCOMPRESS_ISA=scalar runs the specifications alone.
#include <unistd.h>

#include <csignal>
#include <cstdio>

#include "report.h"

namespace native {
namespace {

std::string current;
struct sigaction before;

// Says which case it was, then leaves the fault to whoever would have had it: the system, or AddressSanitizer.
void on_fault(int) {
  dprintf(STDOUT_FILENO, "FAILED by a fault: %s\n", current.c_str());
  sigaction(SIGSEGV, &before, nullptr);
}

}  // namespace

void begin(const std::string& which) {
  ++cases;
  current = which;
}

void expect(bool holds, const std::string& what) {
  if (holds) return;
  ++failures;
  std::printf("FAILED %s: %s\n", what.c_str(), current.c_str());
}

}  // namespace native

int main() {
  using namespace native;
  std::setvbuf(stdout, nullptr, _IOLBF, 0);
  struct sigaction action{};
  action.sa_handler = on_fault;
  sigaction(SIGSEGV, &action, &before);
  struct Suite {
    const char* name;
    void (*run)();
  };
  for (const Suite& suite : {Suite{"int8", test_int8}, Suite{"sparse kernels", test_sparse_kernels},
                             Suite{"sparse linear", test_sparse_linear}, Suite{"sparse conv", test_sparse_conv},
                             Suite{"low rank", test_low_rank}}) {
    const int cases_before = cases, failures_before = failures;
    suite.run();
    const int ran = cases - cases_before;
    std::printf("%s: %d cases, %d failures\n", suite.name, ran, failures - failures_before);
    if (ran == 0) ++failures;  // a suite that ran nothing has shown nothing
  }
  return failures == 0 ? 0 : 1;
}
