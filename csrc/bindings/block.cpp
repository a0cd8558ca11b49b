#include "../block/block.h"

#include <vector>

#include "python.h"
#include "tensors.h"

namespace pycompress {
namespace {

using block::kNorms;
using block::kProducts;

// A tensor of floats or bools on the CPU, whatever its strides.
bool read_strided(py::handle object, dlpack::Tensor* tensor) {
  if (exchange->tensor_from_object(object.ptr(), tensor) != 0) {
    PyErr_Clear();
    return false;
  }
  return tensor->device_type == dlpack::kCpu;
}

bool is_float(const dlpack::Tensor& tensor) { return type_of(tensor) != Type::int32; }

// What a block is, and how its tensors are read. They come as ops/block.py has them: what does not fit is left alone
// (run() gives false), for ops/ to refuse.
class Block {
 public:
  Block(int heads, int head_size, float scale, bool pre_norm, bool rms, float eps_attention, float eps_mlp,
        int activation, bool causal, bool skips_padding, const std::vector<int>& weights)
      : shape_{heads,
               head_size,
               scale,
               pre_norm,
               rms,
               causal,
               skips_padding,
               {eps_attention, eps_mlp},
               static_cast<Activation>(activation),
               {}} {
    check(heads >= 1 && head_size >= 1 && weights.size() == kProducts, "block: ", heads, " heads of ", head_size,
          " with ", weights.size(), " products, expected at least one of each and ", static_cast<int>(kProducts),
          " products");
    for (int i = 0; i < kProducts; ++i) {
      const int weight = weights[static_cast<size_t>(i)];
      check(weight >= -1 && weight <= 4, "block: the weight of a product is ", weight, ", expected -1 to 4");
      shape_.weights[i] = static_cast<block::Weight>(weight);
    }
  }

  bool run(py::handle x, py::handle mask, py::handle bias, const py::list& tensors, py::handle y, int threads) const {
    block::Problem p;
    p.shape = shape_;
    p.threads = threads;
    dlpack::Tensor from, to;
    if (exchange == nullptr || tensors.size() != 2 * (kProducts + kNorms) || !pycompress::read(x, &from) ||
        !pycompress::read(y, &to) || from.ndim != 3 || to.ndim != 3 || !is_float(from) || type_of(to) != type_of(from))
      return false;
    for (int i = 0; i < 3; ++i)
      if (from.shape[i] != to.shape[i]) return false;
    p.type = type_of(from);
    p.batch = from.shape[0];
    p.length = from.shape[1];
    p.d = from.shape[2];
    const bool empty = p.batch * p.length == 0;
    p.x = empty ? nullptr : from.pointer<const void>();
    p.y = empty ? nullptr : to.pointer<void>();
    if (!read_mask(mask, p, &p.masks[0]) || !read_mask(bias, p, &p.masks[1]) || p.masks[1].is_bool) return false;
    size_t slot = 0;
    for (int i = 0; i < kProducts; ++i, slot += 2) {
      if (!read_product(tensors[slot], shape_.weights[i], &p.products[i])) return false;
      if (!read_values(tensors[slot + 1], p.products[i].n, &p.bias[i])) return false;
    }
    for (int i = 0; i < kNorms; ++i, slot += 2)
      if (!read_values(tensors[slot], p.d, &p.norm_weight[i]) || !read_values(tensors[slot + 1], p.d, &p.norm_shift[i]))
        return false;
    const MaybeReleaseGil gil(!empty);
    block::run(p);
    return true;
  }

 private:
  static bool read_values(py::handle object, int64_t n, block::Values* to) {
    if (object.is_none()) return true;
    dlpack::Tensor tensor;
    if (!pycompress::read(object, &tensor) || tensor.ndim != 1 || tensor.shape[0] != n || !is_float(tensor))
      return false;
    *to = {tensor.pointer<const void>(), type_of(tensor)};
    return true;
  }

  // [batch, heads, length, length], or what broadcasts to it.
  bool read_mask(py::handle object, const block::Problem& p, block::Mask* to) const {
    if (object.is_none()) return true;
    dlpack::Tensor tensor;
    if (!read_strided(object, &tensor) || tensor.ndim > 4) return false;
    to->is_bool = tensor.is(dlpack::kBool, 8);
    if (!to->is_bool && !is_float(tensor)) return false;
    to->type = to->is_bool ? Type::float32 : type_of(tensor);
    const int64_t sizes[4] = {p.batch, shape_.heads, p.length, p.length};
    int64_t dense_stride = 1;
    for (int i = 3, at = tensor.ndim - 1; at >= 0; --i, --at) {
      const int64_t size = tensor.shape[at], stride = tensor.strides == nullptr ? dense_stride : tensor.strides[at];
      if (size != 1 && size != sizes[i]) return false;
      to->stride[i] = size == 1 ? 0 : stride;
      dense_stride *= size;
    }
    to->data = tensor.pointer<const void>();
    return true;
  }

  static bool read_product(py::handle object, block::Weight weight, block::Product* to) {
    if (weight == block::Weight::none) return object.is_none();
    dlpack::Tensor tensor;
    if (object.is_none() || !read_strided(object, &tensor)) return false;
    to->weight = weight;
    if (weight == block::Weight::dense) {
      if (tensor.ndim != 2 || !is_float(tensor) ||
          (tensor.strides != nullptr && tensor.shape[1] != 1 && tensor.strides[1] != 1))
        return false;
      to->n = tensor.shape[0];
      to->k = tensor.shape[1];
      to->rows = tensor.pointer<const void>();
      to->type = type_of(tensor);
      to->ld = tensor.strides == nullptr ? to->k : tensor.strides[0];
      return true;
    }
    if (!tensor.is(dlpack::kUInt, 8) || tensor.ndim != 1 || !tensor.dense()) return false;
    to->packed = tensor.pointer<const uint8_t>();
    to->packed_bytes = tensor.shape[0];
    return block::read_packed(to);
  }

  block::Shape shape_;
};

}  // namespace

void bind_block(py::module_& m) {
  py::class_<Block>(m, "Block")
      .def(py::init<int, int, float, bool, bool, float, float, int, bool, bool, const std::vector<int>&>())
      .def("run", &Block::run);
}

}  // namespace pycompress
