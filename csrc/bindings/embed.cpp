#include "../embed/embed.h"

#include "python.h"
#include "tensors.h"

namespace pycompress {
namespace {

// [d] in any float type; None: null.
bool read_channels(py::handle object, int64_t d, embed::Channels* to) {
  *to = {nullptr, Type::float32};
  if (object.is_none()) return true;
  dlpack::Tensor tensor;
  if (!read(object, &tensor) || tensor.ndim != 1 || tensor.shape[0] != d) return false;
  *to = {tensor.pointer<const void>(), type_of(tensor)};
  return to->type != Type::int32;
}

// ids [1 or batch, 1 or length]; None: counted. Sizes grow to what all of them have in common.
bool read_ids(py::handle object, embed::Problem* p, embed::Ids* to) {
  if (object.is_none()) {
    *to = {nullptr, true, 0, 0};
    p->counts = true;
    return true;
  }
  dlpack::Tensor tensor;
  if (!read_strided(object, &tensor) || tensor.ndim != 2) return false;
  const bool wide = tensor.is(dlpack::kInt, 64);
  if (!wide && !tensor.is(dlpack::kInt, 32)) return false;
  if (tensor.data == nullptr && tensor.shape[0] * tensor.shape[1] != 0) return false;
  const auto fits = [](int64_t size, int64_t* common) {
    if (*common == 1) *common = size;
    return size == 1 || size == *common;
  };
  if (!fits(tensor.shape[0], &p->batch) || !fits(tensor.shape[1], &p->length)) return false;
  *to = {tensor.pointer<const void>(), wide, tensor.shape[0] == 1 ? 0 : tensor.stride(0),
         tensor.shape[1] == 1 ? 0 : tensor.stride(1)};
  return true;
}

// [rows, d], dense rows, of a float type; or of int8 with a scale float32 [rows].
bool read_table(py::handle object, py::handle scale_object, int64_t d, embed::Table* to) {
  dlpack::Tensor table, scale;
  if (!read_strided(object, &table) || table.ndim != 2 || table.shape[1] != d) return false;
  if (d > 1 && table.stride(1) != 1) return false;
  *to = {table.pointer<const void>(), type_of(table), table.shape[0], table.stride(0), nullptr};
  if (scale_object.is_none()) return to->type != Type::int32;
  if (!table.is(dlpack::kInt, 8) || !read(scale_object, &scale) || !scale.is(dlpack::kFloat, 32)) return false;
  to->scale = scale.pointer<const float>();
  return scale.ndim == 1 && scale.shape[0] == to->rows;
}

// What is usual: up to three tables, ids [1 or batch, 1 or length], y dense. Else false.
bool embed_tensors(const py::list& tables, const py::list& scales, const py::list& ids, int64_t padding,
                   py::handle weight, py::handle shift, float eps, bool norm, py::handle y, int threads) {
  embed::Problem p{};
  const size_t count = tables.size();
  if (count < 1 || count > embed::kMaxTables || scales.size() != count || ids.size() != count) return false;
  dlpack::Tensor to;
  if (ids[0].is_none() || !read(y, &to) || to.ndim != 3) return false;
  p.tables = static_cast<int>(count);
  p.batch = p.length = 1;
  p.d = to.shape[2];
  p.type = type_of(to);
  for (size_t i = 0; i < count; ++i)
    if (!read_table(tables[i], scales[i], p.d, &p.table[i]) || !read_ids(ids[i], &p, &p.ids[i])) return false;
  if (p.type == Type::int32 || to.shape[0] != p.batch || to.shape[1] != p.length) return false;
  if (!read_channels(weight, p.d, &p.weight) || !read_channels(shift, p.d, &p.shift)) return false;
  p.padding = padding;
  p.eps = eps;
  p.norm = norm;
  p.y = to.pointer<void>();
  p.threads = threads;
  const MaybeReleaseGil gil(p.batch * p.length * p.d > kReleaseGil / 10);
  embed::embed(p);
  return true;
}

}  // namespace

void bind_embed(py::module_& m) { m.def("embed_tensors", &embed_tensors); }

}  // namespace pycompress
