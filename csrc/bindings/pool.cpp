#include "../pool/pool.h"

#include "python.h"
#include "tensors.h"

namespace pycompress {
namespace {

pool::Mask mask_type(const dlpack::Tensor& mask) {
  if (mask.is(dlpack::kBool, 8)) return pool::Mask::boolean;
  if (mask.is(dlpack::kInt, 32)) return pool::Mask::int32;
  if (mask.is(dlpack::kInt, 64)) return pool::Mask::int64;
  return mask.is(dlpack::kFloat, 32) ? pool::Mask::float32 : pool::Mask::none;
}

// What is usual: x [batch, length, d] of a float type, dense rows; mask None or [batch, length] of a type that is
// known.
bool pool_tensors(py::handle x, py::handle mask, bool normalize, py::handle y, int threads) {
  dlpack::Tensor from, to;
  if (!read_strided(x, &from) || !read(y, &to) || from.ndim != 3 || to.ndim != 2) return false;
  pool::Problem p{};
  p.type = type_of(from);
  p.batch = from.shape[0];
  p.length = from.shape[1];
  p.d = from.shape[2];
  if (p.type == Type::int32 || type_of(to) != p.type || to.shape[0] != p.batch || to.shape[1] != p.d) return false;
  if (p.d > 1 && from.stride(2) != 1) return false;
  p.of_batch = from.stride(0);
  p.of_position = from.stride(1);
  p.mask_type = pool::Mask::none;
  if (!mask.is_none()) {
    dlpack::Tensor chosen;
    if (!read_strided(mask, &chosen) || chosen.ndim != 2 || chosen.shape[0] != p.batch || chosen.shape[1] != p.length)
      return false;
    p.mask_type = mask_type(chosen);
    if (p.mask_type == pool::Mask::none) return false;
    p.mask = chosen.pointer<const void>();
    p.mask_of_batch = chosen.stride(0);
    p.mask_of_position = chosen.stride(1);
  }
  p.x = from.pointer<const void>();
  p.normalize = normalize;
  p.y = to.pointer<void>();
  p.threads = threads;
  const MaybeReleaseGil gil(p.batch * p.length * p.d > kReleaseGil / 10);
  pool::mean(p);
  return true;
}

}  // namespace

void bind_pool(py::module_& m) { m.def("pool_tensors", &pool_tensors); }

}  // namespace pycompress
