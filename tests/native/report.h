// What the suites count, and the suites themselves. A failure prints one line that says which case it was.
#pragma once

#include <sstream>
#include <string>
#include <vector>

namespace native {

inline int cases = 0, failures = 0;

template <class... Parts>
std::string text(const Parts&... parts) {
  std::ostringstream out;
  (out << ... << parts);
  return out.str();
}

// The next case. `which` says how to reproduce it, in the line of a failure as in that of a fault at a guard page.
void begin(const std::string& which);

// Prints a line unless `holds`.
void expect(bool holds, const std::string& what);

// Counts as a case: f() must throw std::exception.
template <class F>
void refuses(const std::string& what, F&& f) {
  begin(what);
  bool refused = false;
  try {
    f();
  } catch (const std::exception&) {
    refused = true;
  }
  expect(refused, "accepted");
}

struct Suite {
  const char* name;
  void (*run)();
};
int run(const std::vector<Suite>& suites);  // what main() returns: 0 when all agree

void test_int8();            // the kernels of int8_linear, end to end
void test_int8_conv();       // int8_conv2d, end to end
void test_sparse_kernels();  // load, tile and finish of each sparse kernel against the specification
void test_sparse_linear();   // sparse_linear, end to end
void test_sparse_conv();     // sparse_conv2d, end to end
void test_dense();           // the float32 products, each kernel alone
void test_low_rank();        // low_rank_linear, end to end
void test_int4();            // the kernels of int4_linear, each alone and end to end
void test_block();           // the driver of blocks, and what lies between products, each kernel alone
void test_embed();           // embeddings: each kernel alone, and the ways of the ids
void test_pool();            // means: each kernel alone
void test_recurrent();       // LSTMs and GRUs: the gates of each kernel alone, and the driver
void test_weight_only();     // integer weights on float activations: their kernels alone and end to end

}  // namespace native
