// The part of ONNX Runtime's C API that we use, declared here: its wheels come without headers.
//
// A library of custom ops is given an OrtApiBase, whose GetApi(version) returns a table of functions. The table is
// append-only: "NEVER remove or rearrange the members", says core/session/onnxruntime_c_api.cc, which asserts the place
// of the last function of every version (101 of version 1, 224, 238, 254 and 275 of 13, 14, 15 and 17). Functions and
// their arguments are documented at https://onnxruntime.ai/docs/api/c/struct_ort_api.html, OrtCustomOp at
// https://onnxruntime.ai/docs/api/c/struct_ort_custom_op.html. library.cpp tries the table before it registers
// anything.
#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>

namespace pycompress::onnxruntime {

struct Status;  // null: no error
struct SessionOptions;
struct CustomOpDomain;
struct KernelInfo;
struct KernelContext;
struct Value;
struct TensorInfo;  // OrtTensorTypeAndShapeInfo

constexpr uint32_t kApiVersion = 17;  // ONNX Runtime 1.17: the first that lends its threads to ops
constexpr uint32_t kOpVersion = 16;   // of CustomOp: kernels that return a status

enum ErrorCode : int { kFail = 1, kInvalidArgument = 2 };
enum class ElementType : int { any = 0, float32 = 1, uint8 = 2, int8 = 3, bfloat16 = 16 };
enum class Characteristic : int { required = 0, optional = 1 };

struct ApiBase {
  const void* const* (*get_api)(uint32_t version);
  const char* (*version)();
};
static_assert(sizeof(ApiBase) == 16);

// A function by its place in the table, with its type.
template <size_t kPlace, class F>
struct Function {};

class Api {
 public:
  explicit Api(const void* const* table) : table_(table) {}

  template <size_t kPlace, class R, class... Args>
  R operator()(Function<kPlace, R(Args...)>, std::common_type_t<Args>... args) const {
    return reinterpret_cast<R (*)(Args...)>(table_[kPlace])(args...);
  }

 private:
  const void* const* table_;
};

constexpr Function<0, Status*(int code, const char* message)> kCreateStatus;
constexpr Function<1, int(const Status*)> kGetErrorCode;
constexpr Function<2, const char*(const Status*)> kGetErrorMessage;
constexpr Function<26, Status*(const char* domain, CustomOpDomain**)> kCreateCustomOpDomain;
constexpr Function<27, Status*(CustomOpDomain*, const struct CustomOp*)> kCustomOpDomainAdd;
constexpr Function<28, Status*(SessionOptions*, CustomOpDomain*)> kAddCustomOpDomain;
constexpr Function<51, Status*(Value*, void** data)> kGetTensorMutableData;
constexpr Function<57, Status*(TensorInfo**)> kCreateTensorInfo;
constexpr Function<58, Status*(TensorInfo*, ElementType)> kSetElementType;
constexpr Function<59, Status*(TensorInfo*, const int64_t* dims, size_t count)> kSetDimensions;
constexpr Function<60, Status*(const TensorInfo*, ElementType*)> kGetElementType;
constexpr Function<61, Status*(const TensorInfo*, size_t* count)> kGetDimensionsCount;
constexpr Function<62, Status*(const TensorInfo*, int64_t* dims, size_t count)> kGetDimensions;
constexpr Function<65, Status*(const Value*, TensorInfo**)> kGetTensorInfo;
constexpr Function<86, Status*(const KernelInfo*, const char* name, int64_t*)> kGetInteger;
constexpr Function<87, Status*(const KernelInfo*, const char* name, char* text, size_t* size)> kGetText;
constexpr Function<90, Status*(const KernelContext*, size_t index, const Value**)> kGetInput;
constexpr Function<91, Status*(KernelContext*, size_t index, const int64_t* dims, size_t count, Value**)> kGetOutput;
constexpr Function<93, void(Status*)> kReleaseStatus;
constexpr Function<99, void(TensorInfo*)> kReleaseTensorInfo;
constexpr Function<101, void(CustomOpDomain*)> kReleaseCustomOpDomain;
constexpr Function<230, Status*(const KernelInfo*, size_t* count)> kGetInputCount;
constexpr Function<232, Status*(const KernelInfo*, size_t index, char* name, size_t* size)> kGetInputName;
constexpr Function<237, Status*(const SessionOptions*, const char* key, int* found)> kHasConfig;
constexpr Function<238, Status*(const SessionOptions*, const char* key, char* value, size_t* size)> kGetConfig;
constexpr Function<244, Status*(const KernelInfo*, char* name, size_t* size)> kGetNodeName;
constexpr Function<249, Status*(const KernelInfo*, size_t index, int* is_constant, const Value**)> kGetConstantInput;
constexpr Function<254, const char*()> kGetBuildInfo;
constexpr Function<274, Status*(const KernelContext*, void (*each)(void* context, size_t i), size_t count,
                                size_t batches, void* context)>
    kParallelFor;

// An op: what ONNX Runtime asks of it. It reads no further than kernel_compute_v2 where the version is kOpVersion.
struct CustomOp {
  uint32_t version;
  void* (*create_kernel)(const CustomOp*, const void* const* api, const KernelInfo*);
  const char* (*name)(const CustomOp*);
  const char* (*provider)(const CustomOp*);
  ElementType (*input_type)(const CustomOp*, size_t index);
  size_t (*input_count)(const CustomOp*);
  ElementType (*output_type)(const CustomOp*, size_t index);
  size_t (*output_count)(const CustomOp*);
  void (*kernel_compute)(void* kernel, KernelContext*);
  void (*kernel_destroy)(void* kernel);
  Characteristic (*input_characteristic)(const CustomOp*, size_t index);
  Characteristic (*output_characteristic)(const CustomOp*, size_t index);
  int (*input_memory)(const CustomOp*, size_t index);
  int (*variadic_input_min)(const CustomOp*);
  int (*variadic_input_homogeneous)(const CustomOp*);
  int (*variadic_output_min)(const CustomOp*);
  int (*variadic_output_homogeneous)(const CustomOp*);
  Status* (*create_kernel_v2)(const CustomOp*, const void* const* api, const KernelInfo*, void** kernel);
  Status* (*kernel_compute_v2)(void* kernel, KernelContext*);
  void* later[7];  // shape inference, versions, what may lie in place: null
};
static_assert(std::is_standard_layout_v<CustomOp>);
static_assert(offsetof(CustomOp, kernel_destroy) == 9 * sizeof(void*));      // the last of the first version
static_assert(offsetof(CustomOp, kernel_compute_v2) == 18 * sizeof(void*));  // of version 16
static_assert(sizeof(CustomOp) == 26 * sizeof(void*));                       // of version 18

}  // namespace pycompress::onnxruntime
