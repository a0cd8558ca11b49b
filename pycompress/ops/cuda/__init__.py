"""The ops on a CUDA device, a door (``ops/registry.py``) for each weight; ``native`` is the only one to ``_cuda``."""

from pycompress.ops.cuda.native import cuda_error, cuda_kernels

__all__ = ["cuda_error", "cuda_kernels"]
