// Every int8 kernel against int64 arithmetic, at its own tile edges, on adversarial values, operands against guard
// pages. Exit status 0 when all agree; a line that reproduces the failure otherwise.
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <vector>

#include "int8/gemm.h"
#include "int8/kernel_list.h"
#include "int8/pack.h"

namespace pycompress::int8 {
extern const Kernel kAvxVnniEmulated;
extern const Kernel kAvx512VnniEmulated;
}  // namespace pycompress::int8

namespace {

using namespace pycompress;
using namespace pycompress::int8;

// Memory that ends exactly where an unmapped page begins: one byte too far is a fault.
template <class T>
class Guarded {
 public:
  explicit Guarded(size_t count) : count_(count) {
    const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    const size_t body = (count * sizeof(T) + page - 1) / page * page;
    size_ = body + page;
    base_ = static_cast<char*>(mmap(nullptr, size_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    if (base_ == MAP_FAILED || mprotect(base_ + body, page, PROT_NONE) != 0) std::abort();
    data_ = reinterpret_cast<T*>(base_ + body - count * sizeof(T));
  }
  Guarded(const Guarded&) = delete;
  Guarded& operator=(const Guarded&) = delete;
  ~Guarded() { munmap(base_, size_); }
  T* data() { return data_; }
  T& operator[](size_t i) { return data_[i]; }
  size_t size() const { return count_; }

 private:
  char* base_;
  T* data_;
  size_t size_, count_;
};

enum class Values { gaussian, uniform, extreme, runs };
const char* const kNames[] = {"gaussian", "uniform", "extreme", "runs"};

void fill(Guarded<int8_t>& w, Guarded<float>& x, Values values, int top, std::mt19937& random) {
  std::normal_distribution<float> normal;
  std::uniform_int_distribution<int> uniform(-top, top);
  int i = 0;
  for (size_t j = 0; j < w.size(); ++j, ++i) {
    int value = uniform(random);
    if (values == Values::gaussian) value = static_cast<int>(std::lrintf(normal(random) * 38));
    if (values == Values::extreme) value = random() % 2 ? top : -top;
    if (values == Values::runs)
      value = i / 64 % 2 ? top : -top;  // one sign over whole lanes: the worst for a 16-bit sum
    w[j] = static_cast<int8_t>(std::clamp(value, -top, top));
  }
  for (size_t j = 0; j < x.size(); ++j) {
    x[j] = normal(random);
    if (values == Values::extreme) x[j] = random() % 2 ? 1.0f : -1.0f;
    if (values == Values::runs) x[j] = 1.0f;  // every activation at its largest
  }
}

int failures = 0, cases = 0;

void run(const Kernel& kernel, int m, int n, int k, int bits, Values values, std::mt19937& random) {
  Guarded<int8_t> w(static_cast<size_t>(n) * k), unpacked(w.size());
  Guarded<float> x(static_cast<size_t>(m) * k), scale(static_cast<size_t>(m));
  Guarded<int32_t> y(static_cast<size_t>(m) * n), zero_point(static_cast<size_t>(m));
  Guarded<uint8_t> q(x.size());
  fill(w, x, values, 127, random);
  const std::vector<uint8_t> buffer = pack(kernel, w.data(), n, k, bits, 1);
  Guarded<uint8_t> packed(buffer.size());
  std::memcpy(packed.data(), buffer.data(), buffer.size());
  const auto fail = [&](const char* what) {
    ++failures;
    std::printf("FAILED %s: kernel=%s m=%d n=%d k=%d activation_bits=%d values=%s\n", what, kernel.name, m, n, k, bits,
                kNames[static_cast<int>(values)]);
  };
  ++cases;

  unpack(packed.data(), static_cast<int64_t>(packed.size()), unpacked.data());
  if (std::memcmp(unpacked.data(), w.data(), w.size()) != 0) fail("unpack");

  quantize(kernel, x.data(), Type::float32, m, k, k, bits, q.data(), scale.data(), zero_point.data());
  for (const int threads : {1, 2}) {
    std::memset(y.data(), 0x55, y.size() * 4);
    Problem problem{};
    problem.x = x.data();
    problem.m = m, problem.k = k, problem.ldx = k;
    problem.packed = packed.data();
    problem.packed_bytes = static_cast<int64_t>(packed.size());
    problem.n = n;
    problem.y = y.data();
    problem.y_type = Type::int32;
    problem.threads = threads;
    linear(problem, kernel);
    bool equal = true;
    for (int i = 0; i < m; ++i)
      for (int j = 0; j < n; ++j) {
        int64_t sum = 0;
        for (int p = 0; p < k; ++p)
          sum += (int64_t{q[static_cast<size_t>(i) * k + p]} - zero_point[static_cast<size_t>(i)]) *
                 w[static_cast<size_t>(j) * k + p];
        equal = equal && sum == y[static_cast<size_t>(i) * n + j];
      }
    if (!equal) fail(threads == 1 ? "1 thread" : "2 threads");
  }

  // The float epilogue in every type and activation, up to the guard pages; its values are tested from Python.
  for (const Type type : {Type::float32, Type::bfloat16, Type::float16})
    for (int activation = 0; activation <= 4; ++activation) {
      Guarded<float> weight_scale(static_cast<size_t>(n)), bias(static_cast<size_t>(n));
      Guarded<uint8_t> result(static_cast<size_t>(m) * n * (type == Type::float32 ? 4 : 2));
      Guarded<uint8_t> input(static_cast<size_t>(m) * k * (type == Type::float32 ? 4 : 2));
      for (size_t j = 0; j < bias.size(); ++j) weight_scale[j] = 0.01f, bias[j] = 1.0f;
      Problem problem{input.data(),
                      type,
                      m,
                      k,
                      k,
                      packed.data(),
                      static_cast<int64_t>(packed.size()),
                      n,
                      weight_scale.data(),
                      bias.data(),
                      static_cast<Activation>(activation),
                      result.data(),
                      type,
                      nullptr,
                      nullptr,
                      1};
      linear(problem, kernel);
      for (size_t j = 0; type == Type::float32 && activation == 0 && j < bias.size(); ++j) {
        float value;  // x is zero: the bias comes through as it is
        std::memcpy(&value, result.data() + 4 * j, 4);
        if (value != 1.0f) return fail("bias");
      }
    }
}

void refuse(const char* what, const std::vector<uint8_t>& bytes) {
  ++cases;
  std::vector<int8_t> values(1 << 16);
  try {
    unpack(bytes.data(), static_cast<int64_t>(bytes.size()), values.data());
  } catch (const std::exception&) {
    return;
  }
  ++failures;
  std::printf("FAILED: a packed weight that is %s was accepted\n", what);
}

}  // namespace

int main() {
  std::mt19937 random(1);
  std::vector<const Kernel*> kernels{&kScalar};
#if defined(PYCOMPRESS_X86)
  if (isa_available(Isa::avx2)) kernels.insert(kernels.end(), {&kAvx2, &kAvxVnniEmulated, &kAvx512VnniEmulated});
  if (isa_available(Isa::avx_vnni)) kernels.push_back(&kAvxVnni);
  if (isa_available(Isa::avx512_vnni)) kernels.push_back(&kAvx512Vnni);
#endif
  for (const Kernel* kernel : kernels) {
    const auto edges = [](int tile) {
      return std::vector<int>{1, std::max(1, tile - 1), tile, tile + 1, 2 * tile + 3};
    };
    for (const int m : edges(kernel->mr))
      for (const int n : edges(kernel->nr))
        for (const int k : {1, 3, 4, 5, 31, 32, 33, 67})
          for (const int bits : {7, 8}) run(*kernel, m, n, k, bits, static_cast<Values>(cases % 4), random);
    for (const int k : {kBlockK - 1, kBlockK, kBlockK + 1, 2 * kBlockK + 3})
      for (const int bits : {7, 8})
        for (int values = 0; values < 4; ++values)
          run(*kernel, kernel->mr + 1, kernel->nr + 1, k, bits, static_cast<Values>(values), random);
    run(*kernel, 130, 64, 300, 8, Values::gaussian, random);  // large enough for two threads
    run(*kernel, 2, 2, static_cast<int>(kMaxK), 8, Values::runs, random);
  }
  std::vector<uint8_t> packed = pack(kScalar, std::vector<int8_t>(64, 1).data(), 8, 8, 8, 1);
  refuse("cut short", {packed.begin(), packed.end() - 1});
  refuse("empty", {});
  packed[0] ^= 1;
  refuse("of unknown magic", packed);
  std::printf("%d passed, %d failed\n", cases - failures, failures);
  return failures == 0 ? 0 : 1;
}
