#include "node.h"

#include <cstdlib>
#include <new>
#include <stdexcept>

#include "../common/round.h"

namespace pycompress::onnxruntime {
namespace {

const char* name_of(ElementType type) {
  switch (type) {
    case ElementType::float32:
      return "float32";
    case ElementType::uint8:
      return "uint8";
    case ElementType::int8:
      return "int8";
    case ElementType::bfloat16:
      return "bfloat16";
    default:
      return "of another type";
  }
}

// What a function gives that is asked for the size first.
template <class F>
std::string text_from(Api api, F&& read) {
  size_t size = 0;
  ok(api, read(nullptr, &size));
  std::string text(size, '\0');
  ok(api, read(text.data(), &size));
  text.resize(std::strlen(text.c_str()));
  return text;
}

bool succeeded(Api api, Status* status) {
  if (status == nullptr) return true;
  api(kReleaseStatus, status);
  return false;
}

constexpr const char* kActivationNames[kActivations] = {"none", "relu",       "gelu",  "gelu_tanh",
                                                        "silu", "quick_gelu", "relu6", "hardswish"};

}  // namespace

void ok(Api api, Status* status) {
  if (status == nullptr) return;
  const bool invalid = api(kGetErrorCode, status) == kInvalidArgument;
  const std::string message = api(kGetErrorMessage, status);
  api(kReleaseStatus, status);
  if (invalid) throw std::invalid_argument(message);
  throw std::runtime_error(message);
}

int64_t Tensor::count() const {
  int64_t count = 1;
  for (const int64_t size : dims) count *= size;
  return count;
}

Tensor tensor_of(Api api, const Value* value) {
  TensorInfo* info = nullptr;
  ok(api, api(kGetTensorInfo, value, &info));
  const auto release = [api](TensorInfo* of) { api(kReleaseTensorInfo, of); };
  const std::unique_ptr<TensorInfo, decltype(release)> held(info, release);
  Tensor found{};
  size_t count = 0;
  ok(api, api(kGetElementType, info, &found.type));
  ok(api, api(kGetDimensionsCount, info, &count));
  found.dims.resize(count);
  ok(api, api(kGetDimensions, info, found.dims.data(), count));
  void* data = nullptr;
  ok(api, api(kGetTensorMutableData, const_cast<Value*>(value), &data));
  found.data = data;
  return found;
}

std::string text_of(const std::vector<int64_t>& dims) {
  std::string text = "[";
  for (const int64_t size : dims) text += (text.size() > 1 ? ", " : "") + std::to_string(size);
  return text + "]";
}

Node::Node(Api api, const KernelInfo* info, const char* op, Inputs inputs) : api_(api), info_(info), inputs_(inputs) {
  name_ = text_from(api, [&](char* text, size_t* size) { return api(kGetNodeName, info, text, size); });
  name_ = std::string(op) + (name_.empty() ? "" : " ") + name_;
}

int Node::integer(const std::string& name) const {
  int64_t value = 0;
  check(succeeded(api_, api_(kGetInteger, info_, name.c_str(), &value)), "the attribute ", name,
        " is missing or no integer");
  check(value >= 0 && value <= INT32_MAX, name, " is ", value, ", expected 0 to ", INT32_MAX);
  return static_cast<int>(value);
}

std::string Node::text(const std::string& name) const {
  size_t size = 0;
  check(succeeded(api_, api_(kGetText, info_, name.c_str(), nullptr, &size)), "the attribute ", name,
        " is missing or no text");
  return text_from(api_, [&](char* text, size_t* bytes) { return api_(kGetText, info_, name.c_str(), text, bytes); });
}

Activation Node::activation() const {
  const std::string wanted = text("activation");
  std::string known;
  for (int i = 0; i < kActivations; ++i) {
    if (wanted == kActivationNames[i]) return static_cast<Activation>(i);
    known += std::string(i > 0 ? ", " : "") + kActivationNames[i];
  }
  check(false, "activation is '", wanted, "', expected one of ", known);
  std::abort();
}

size_t Node::place(const std::string& input) const {
  for (size_t i = 0; i < inputs_.count; ++i)
    if (input == inputs_.begin[i].name) return i;
  throw std::logic_error(name_ + " has no input " + input);
}

bool Node::has(const std::string& input) const {
  const size_t index = place(input);
  size_t count = 0;
  ok(api_, api_(kGetInputCount, info_, &count));
  if (index >= count) return false;
  return !text_from(api_, [&](char* text, size_t* size) {
            return api_(kGetInputName, info_, index, text, size);
          }).empty();
}

Tensor Node::constant(const std::string& input, ElementType type) const {
  check(has(input), input, " is missing, expected a constant");
  int is_constant = 0;
  const Value* value = nullptr;
  ok(api_, api_(kGetConstantInput, info_, place(input), &is_constant, &value));
  check(is_constant != 0 && value != nullptr, input, " is computed or an input of the model, expected a constant");
  Tensor found = tensor_of(api_, value);
  check(type == ElementType::any || found.type == type, input, " is ", name_of(found.type), " ", text_of(found.dims),
        ", expected ", name_of(type));
  return found;
}

Tensor Node::constant(const std::string& input, ElementType type, const std::vector<int64_t>& dims) const {
  Tensor found = constant(input, type);
  check(found.dims == dims, input, " is ", name_of(found.type), " ", text_of(found.dims), ", expected ", text_of(dims));
  return found;
}

std::vector<float> Node::floats(const std::string& input, int64_t n) const {
  if (!has(input)) return {};
  return constant(input, ElementType::float32, {n}).copy<float>();
}

Packed::Packed(const std::vector<uint8_t>& bytes) : bytes_(static_cast<int64_t>(bytes.size())) {
  memory_.reset(static_cast<uint8_t*>(std::aligned_alloc(64, round_up<size_t>(bytes.size(), 64))));
  if (memory_ == nullptr) throw std::bad_alloc();
  std::memcpy(memory_.get(), bytes.data(), bytes.size());
}

void Packed::Free::operator()(uint8_t* memory) const { std::free(memory); }

}  // namespace pycompress::onnxruntime
