"""The ops of pycompress as torch sees them: schemas, fakes, checks. The only door to the native module ``_C``.

Every op is registered with ``torch.library`` (``define`` and ``impl``, the cheapest of its ways to dispatch), so that
``torch.compile(fullgraph=True)``, ``torch.export`` and ``FakeTensor`` work. The layers call the functions of this package.
"""

from pycompress.ops.cuda import cuda_error, cuda_kernels
from pycompress.ops.int4 import int4_dense, int4_header, int4_linear, int4_pack, int4_unpack
from pycompress.ops.int8 import int8_accumulate, int8_depths, int8_linear, int8_pack, int8_quantize, int8_unpack
from pycompress.ops.int8_fused import int8_fused_linear
from pycompress.ops.low_rank import (
    RESIDUALS,
    LowRankSizes,
    LowRankTensors,
    cuda_low_rank_sizes,
    low_rank_dense,
    low_rank_header,
    low_rank_intermediate,
    low_rank_linear,
    low_rank_pack,
    low_rank_unpack,
)
from pycompress.ops.native import (
    ACTIVATIONS,
    MAX_IN_FEATURES,
    bandwidth,
    extension_error,
    instruction_sets,
    kernels,
    peak,
)
from pycompress.ops.sparse import (
    CUDA_SPARSE_FORMATS,
    MAX_STEP,
    SPARSE_FORMATS,
    sparse_accumulate,
    sparse_conv2d,
    sparse_dense,
    sparse_format,
    sparse_header,
    sparse_linear,
    sparse_pack,
    sparse_unpack,
)

__all__ = [
    "ACTIVATIONS",
    "CUDA_SPARSE_FORMATS",
    "MAX_IN_FEATURES",
    "MAX_STEP",
    "RESIDUALS",
    "SPARSE_FORMATS",
    "LowRankSizes",
    "LowRankTensors",
    "bandwidth",
    "cuda_error",
    "cuda_kernels",
    "cuda_low_rank_sizes",
    "extension_error",
    "instruction_sets",
    "int4_dense",
    "int4_header",
    "int4_linear",
    "int4_pack",
    "int4_unpack",
    "int8_accumulate",
    "int8_depths",
    "int8_fused_linear",
    "int8_linear",
    "int8_pack",
    "int8_quantize",
    "int8_unpack",
    "kernels",
    "low_rank_dense",
    "low_rank_header",
    "low_rank_intermediate",
    "low_rank_linear",
    "low_rank_pack",
    "low_rank_unpack",
    "peak",
    "sparse_accumulate",
    "sparse_conv2d",
    "sparse_dense",
    "sparse_format",
    "sparse_header",
    "sparse_linear",
    "sparse_pack",
    "sparse_unpack",
]
