// What ONNX Runtime loads: RegisterCustomOps, which adds the domain "pycompress" with our ops to a session's options.
#include <algorithm>
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <map>
#include <mutex>
#include <new>
#include <thread>
#include <utility>

#include "../common/isa.h"
#include "../common/parallel.h"
#include "op.h"

namespace pycompress::onnxruntime {
namespace {

constexpr const char* kDomain = "pycompress";
// An entry of the session's options: in how many parts a layer is cut. They run on the session's own threads, so this
// does not have to be said; where it says how many these are, no part is cut in vain.
constexpr const char* kThreads = "pycompress.threads";
constexpr int kMostThreads = 1024;
constexpr int kOldestMinor = static_cast<int>(kApiVersion);
constexpr const Op* kOps[] = {&kInt8Linear, &kInt4Linear, &kSparseLinear, &kLowRankLinear};

// No exception leaves the library.
template <class F>
Status* guarded(Api api, F&& body) {
  try {
    body();
    return nullptr;
  } catch (const std::invalid_argument& error) {
    return api(kCreateStatus, kInvalidArgument, error.what());
  } catch (const std::bad_alloc&) {
    return api(kCreateStatus, kFail, "pycompress: out of memory");
  } catch (const std::exception& error) {
    return api(kCreateStatus, kFail, error.what());
  } catch (...) {
    return api(kCreateStatus, kFail, "pycompress: an unknown exception");
  }
}

// Whose threads a call runs on. An error of ParallelFor is one of its arguments: then nothing ran yet.
struct Caller {
  Api api;
  KernelContext* context;

  static void for_each(const void* self, int count, void (*each)(void*, size_t), void* of) {
    const auto& [api, context] = *static_cast<const Caller*>(self);
    Status* status = api(kParallelFor, context, each, static_cast<size_t>(count), size_t{0}, of);
    if (status == nullptr) return;
    api(kReleaseStatus, status);
    for (int i = 0; i < count; ++i) each(of, static_cast<size_t>(i));
  }
};

struct Kernel {
  const Api api;
  const std::string name;
  const Op& op;
  const int threads;
  const Layer layer;

  void compute(KernelContext* context) const {
    const Value* input = nullptr;
    ok(api, api(kGetInput, context, size_t{0}, &input));
    Tensor x = tensor_of(api, input);
    if (x.dims.empty() || x.dims.back() != layer.k)
      check(false, name, ": x is ", text_of(x.dims), ", expected [..., ", layer.k, "]");
    x.dims.back() = layer.n;
    Value* output = nullptr;
    ok(api, api(kGetOutput, context, size_t{0}, x.dims.data(), x.dims.size(), &output));
    void* y = nullptr;
    ok(api, api(kGetTensorMutableData, output, &y));
    x.dims.pop_back();
    const Caller caller{api, context};
    const BorrowedThreads borrowed(&Caller::for_each, &caller);
    op.run(layer, x.as<float>(), x.count(), static_cast<float*>(y), threads);
  }
};

// An op as a session has it.
struct Entry {
  const Op* op;
  int threads;
};
struct Registered : CustomOp, Entry {};
const Registered& registered(const CustomOp* op) { return *static_cast<const Registered*>(op); }

Status* create(const CustomOp* self, const void* const* table, const KernelInfo* info, void** kernel) {
  const Api api(table);
  return guarded(api, [&] {
    const auto& [op, threads] = static_cast<const Entry&>(registered(self));
    const Node node(api, info, op->name, op->inputs);
    try {
      *kernel = new Kernel{api, node.name(), *op, threads, Layer(node, op->weight(node, ""))};
    } catch (const std::invalid_argument& error) {
      check(false, node.name(), ": ", error.what());
    }
  });
}

Registered with_callbacks(const Op* op, int threads) {
  Registered made{};
  made.version = kOpVersion;
  made.name = [](const CustomOp* self) { return registered(self).op->name; };
  made.provider = [](const CustomOp*) -> const char* { return nullptr; };  // the CPU
  made.input_type = [](const CustomOp* self, size_t i) { return registered(self).op->inputs.begin[i].type; };
  made.input_count = [](const CustomOp* self) { return registered(self).op->inputs.count; };
  made.output_type = [](const CustomOp*, size_t) { return ElementType::float32; };
  made.output_count = [](const CustomOp*) { return size_t{1}; };
  made.kernel_destroy = [](void* kernel) { delete static_cast<Kernel*>(kernel); };
  made.input_characteristic = [](const CustomOp* self, size_t i) {
    return registered(self).op->inputs.begin[i].optional ? Characteristic::optional : Characteristic::required;
  };
  made.output_characteristic = [](const CustomOp*, size_t) { return Characteristic::required; };
  made.input_memory = [](const CustomOp*, size_t) { return 0; };  // the default
  made.variadic_input_min = [](const CustomOp*) { return 1; };
  made.variadic_input_homogeneous = [](const CustomOp*) { return 1; };
  made.variadic_output_min = [](const CustomOp*) { return 1; };
  made.variadic_output_homogeneous = [](const CustomOp*) { return 1; };
  made.create_kernel_v2 = create;
  made.kernel_compute_v2 = [](void* self, KernelContext* context) {
    const auto& kernel = *static_cast<const Kernel*>(self);
    return guarded(kernel.api, [&] { kernel.compute(context); });
  };
  made.op = op;
  made.threads = threads;
  return made;
}

// What is registered has to outlive every session: it stays, once for each number of threads.
struct Domain {
  CustomOpDomain* domain = nullptr;
  Registered ops[std::size(kOps)];
};

CustomOpDomain* domain_for(Api api, const void* const* table, int threads) {
  static auto& domains = *new std::map<std::pair<const void*, int>, Domain>;
  static std::mutex mutex;
  const std::lock_guard lock(mutex);
  Domain& found = domains[{table, threads}];
  if (found.domain != nullptr) return found.domain;
  CustomOpDomain* made = nullptr;
  ok(api, api(kCreateCustomOpDomain, kDomain, &made));
  for (size_t i = 0; i < std::size(kOps); ++i) {
    found.ops[i] = with_callbacks(kOps[i], threads);
    ok(api, api(kCustomOpDomainAdd, made, &found.ops[i]));
  }
  return found.domain = made;
}

int threads_of(Api api, const SessionOptions* options) {
  int there = 0;
  ok(api, api(kHasConfig, options, kThreads, &there));
  if (there == 0) return std::clamp(static_cast<int>(std::thread::hardware_concurrency()), 1, kMostThreads);
  char text[16] = {};
  size_t size = sizeof(text);
  ok(api, api(kGetConfig, options, kThreads, text, &size));
  char* end = text;
  const long threads = std::strtol(text, &end, 10);
  check(end != text && *end == '\0' && threads >= 1 && threads <= kMostThreads, kThreads, " is '", text,
        "', expected 1 to ", kMostThreads);
  return static_cast<int>(threads);
}

// Tries the table where a wrong place would show: no kernel is registered with functions that are others than we think.
// Of what is called here nothing depends on a session; what is only there for a node lies between tried places.
bool is_as_declared(Api api) {
  constexpr const char* message = "pycompress tries a status";
  Status* status = api(kCreateStatus, kInvalidArgument, message);
  if (status == nullptr || api(kGetErrorCode, status) != kInvalidArgument ||
      std::strcmp(api(kGetErrorMessage, status), message) != 0)
    return false;
  api(kReleaseStatus, status);

  const int64_t dims[] = {3, 5, 7};
  int64_t read[3] = {};
  size_t count = 0;
  ElementType type{};
  TensorInfo* info = nullptr;
  const bool fits =
      api(kCreateTensorInfo, &info) == nullptr && api(kSetElementType, info, ElementType::bfloat16) == nullptr &&
      api(kSetDimensions, info, dims, size_t{3}) == nullptr && api(kGetElementType, info, &type) == nullptr &&
      type == ElementType::bfloat16 && api(kGetDimensionsCount, info, &count) == nullptr && count == 3 &&
      api(kGetDimensions, info, read, count) == nullptr && std::equal(dims, dims + 3, read);
  if (!fits) return false;
  api(kReleaseTensorInfo, info);

  CustomOpDomain* domain = nullptr;  // 26, and the last function of version 1
  if (api(kCreateCustomOpDomain, "pycompress.tried", &domain) != nullptr || domain == nullptr) return false;
  api(kReleaseCustomOpDomain, domain);
  return std::strstr(api(kGetBuildInfo), "ORT") != nullptr;  // the last one of version 15
}

bool is_version(const char* version) {
  int major = 0, minor = 0;
  return std::sscanf(version, "%d.%d.", &major, &minor) == 2 && major == 1 && minor >= kOldestMinor;
}

Status* register_ops(SessionOptions* options, const ApiBase* base) {
  const char* version = base->version() == nullptr ? "unknown" : base->version();
  const void* const* table = base->get_api(is_version(version) ? kApiVersion : 1);
  if (table == nullptr) return nullptr;  // no error can be made without it; a session will not know our ops
  const Api api(table);
  return guarded(api, [&] {
    check(is_version(version), "pycompress: ONNX Runtime is ", version, ", expected 1.", kOldestMinor,
          " or a later 1.x");
    static std::atomic<const void*> tried{nullptr};
    check(tried == table || is_as_declared(api), "pycompress: ONNX Runtime ", version,
          " has other functions than its API says, expected those of version ", kApiVersion);
    tried = table;
    isa_available(Isa::scalar);  // an unknown PYCOMPRESS_ISA fails here
    ok(api, api(kAddCustomOpDomain, options, domain_for(api, table, threads_of(api, options))));
  });
}

}  // namespace
}  // namespace pycompress::onnxruntime

extern "C" __attribute__((visibility("default"))) pycompress::onnxruntime::Status* RegisterCustomOps(
    pycompress::onnxruntime::SessionOptions* options, const pycompress::onnxruntime::ApiBase* base) {
  return pycompress::onnxruntime::register_ops(options, base);
}
