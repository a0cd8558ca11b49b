// What the bindings of all ops share. Pointers come as integers with their sizes; ops/ has checked what they point to.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

namespace pycompress {

namespace py = pybind11;

template <class T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

// Giving the lock up and taking it back costs about 0.1 us, so only where the work is worth it.
constexpr int64_t kReleaseGil = 200'000;  // multiply-adds: about a microsecond

struct MaybeReleaseGil {
  PyThreadState* state;
  explicit MaybeReleaseGil(bool release) : state(release ? PyEval_SaveThread() : nullptr) {}
  ~MaybeReleaseGil() {
    if (state != nullptr) PyEval_RestoreThread(state);
  }
};

void bind_block(py::module_& m);
void bind_cuda_blocks(py::module_& m);
void bind_cuda_low_rank(py::module_& m);
void bind_cuda_side_branch(py::module_& m);
void bind_cuda_bitmap(py::module_& m);
void bind_cuda_structured(py::module_& m);
void bind_cuda_weight_only(py::module_& m);
void bind_conv(py::module_& m);
void bind_embed(py::module_& m);
void bind_int4(py::module_& m);
void bind_int8(py::module_& m);
void bind_low_rank(py::module_& m);
void bind_pool(py::module_& m);
void bind_recurrent(py::module_& m);
void bind_sparse(py::module_& m);

}  // namespace pycompress
