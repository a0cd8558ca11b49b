// The frame of the test programs: cases, failures and suites, one line each.
#include "report.h"

#include <unistd.h>

#include <csignal>
#include <cstdio>

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

int run(const std::vector<Suite>& suites) {
  std::setvbuf(stdout, nullptr, _IOLBF, 0);
  struct sigaction action{};
  action.sa_handler = on_fault;
  sigaction(SIGSEGV, &action, &before);
  for (const Suite& suite : suites) {
    const int cases_before = cases, failures_before = failures;
    suite.run();
    const int ran = cases - cases_before;
    std::printf("%s: %d cases, %d failures\n", suite.name, ran, failures - failures_before);
    if (ran == 0) ++failures;  // a suite that ran nothing has shown nothing
  }
  return failures == 0 ? 0 : 1;
}

}  // namespace native
