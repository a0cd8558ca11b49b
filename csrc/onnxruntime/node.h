// What a node of a graph says, read as its kernel is made. Whatever does not fit is an error with values: a file may
// come from anywhere.
#pragma once

#include <cstdint>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "../common/check.h"
#include "../common/types.h"
#include "api.h"

namespace pycompress::onnxruntime {

struct Input {
  const char* name;
  ElementType type;
  bool optional;
};
struct Inputs {
  const Input* begin;
  size_t count;
};
template <size_t kCount>
constexpr Inputs inputs_of(const Input (&inputs)[kCount]) {
  return {inputs, kCount};
}

// Throws what a status says, as std::invalid_argument or std::runtime_error.
void ok(Api api, Status* status);

// A tensor. The data are the runtime's.
struct Tensor {
  ElementType type;
  std::vector<int64_t> dims;
  const void* data;

  int64_t count() const;
  template <class T>
  const T* as() const {
    return static_cast<const T*>(data);
  }
  template <class T>
  std::vector<T> copy() const {
    return std::vector<T>(as<T>(), as<T>() + count());
  }
};
Tensor tensor_of(Api api, const Value* value);
std::string text_of(const std::vector<int64_t>& dims);  // [8, 64]

class Node {
 public:
  Node(Api api, const KernelInfo* info, const char* op, Inputs inputs);

  const std::string& name() const { return name_; }  // for messages: of the op and of the node

  // Attributes, all of which have to be there.
  int integer(const std::string& name) const;
  std::string text(const std::string& name) const;
  Activation activation() const;

  bool has(const std::string& input) const;
  // An input that has to be a constant of this type; `any`: of one of the op's types.
  Tensor constant(const std::string& input, ElementType type) const;
  // And of this shape.
  Tensor constant(const std::string& input, ElementType type, const std::vector<int64_t>& dims) const;
  // float [n], or nothing where the input is left out.
  std::vector<float> floats(const std::string& input, int64_t n) const;

 private:
  size_t place(const std::string& input) const;

  Api api_;
  const KernelInfo* info_;
  Inputs inputs_;
  std::string name_;
};

// What a packer made, where kernels want it: at the beginning of a cache line.
class Packed {
 public:
  explicit Packed(const std::vector<uint8_t>& bytes);
  const uint8_t* data() const { return memory_.get(); }
  int64_t bytes() const { return bytes_; }

 private:
  struct Free {
    void operator()(uint8_t* memory) const;
  };
  std::unique_ptr<uint8_t, Free> memory_;
  int64_t bytes_;
};

inline const float* or_null(const std::vector<float>& values) { return values.empty() ? nullptr : values.data(); }

}  // namespace pycompress::onnxruntime
