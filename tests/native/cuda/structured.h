// Problems for the CUDA 2:4 kernels, and what each kernel has to pass.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "../guarded.h"
#include "../report.h"
#include "halves.h"
#include "sparse/structured/cuda.h"

namespace native {

namespace int8 = pycompress::int8;
namespace structured = pycompress::sparse::cuda::structured;
using pycompress::sparse::cuda::Element;

// exact: small integers, whose float sums are exact. extreme: int8 of the largest magnitudes alone.
enum class Content { exact, normal, extreme };

// A weight [n, k] of which `share` of the groups of four have two non-zeros and the others fewer, packed on the device,
// and rows of x, all on guarded memory. int8 rows are as quantize() leaves them; what stands behind k is noise.
struct StructuredCase {
  structured::Packed shape;
  int64_t m;
  std::vector<double> weight;  // [n, k]
  HalfRows x;
  Guarded<int8_t> s;
  Guarded<float> row_scale, scale, bias;
  Guarded<int32_t> zero_point;
  Guarded<uint8_t> packed;

  StructuredCase(Element element, int64_t m, int64_t n, int64_t k, Content content = Content::exact,
                 double share = 0.8);

  bool is_int8() const { return shape.element == Element::int8; }
  std::string name() const;
  // y is of type_of(element): halves, or the sums.
  structured::Problem problem(void* y) const;
  // The sum of a value of y without bias, in float64, which is exact but for Content::normal; and that of the products'
  // magnitudes.
  double sum(int64_t row, int64_t channel, double* magnitude = nullptr) const;

 private:
  void fill(Content content, double share);
};

// Everything at the edges of a kernel's tile.
void check_structured_kernel(const structured::Kernel& kernel);

void test_cuda_structured_layout();  // metadata, pack, unpack, lengths, dispatch, what is refused
void test_cuda_structured();         // all kernels of the table
void test_cuda_structured_hopper();  // what is those of compute capability 9.0 alone

}  // namespace native
