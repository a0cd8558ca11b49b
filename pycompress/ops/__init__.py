"""The ops of pycompress as torch sees them: schemas, fakes, checks. The only door to the native module ``_C``.

Every op is registered with ``torch.library`` (``define`` and ``impl``, the cheapest of its ways to dispatch), so that
``torch.compile(fullgraph=True)``, ``torch.export`` and ``FakeTensor`` work. The layers call the functions of this package.
"""

from pycompress.ops.int8 import int8_accumulate, int8_depths, int8_linear, int8_pack, int8_quantize, int8_unpack
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
    MAX_STEP,
    SPARSE_FORMATS,
    sparse_accumulate,
    sparse_conv2d,
    sparse_dense,
    sparse_header,
    sparse_linear,
    sparse_pack,
    sparse_unpack,
)

__all__ = [
    "ACTIVATIONS",
    "MAX_IN_FEATURES",
    "MAX_STEP",
    "SPARSE_FORMATS",
    "bandwidth",
    "extension_error",
    "instruction_sets",
    "int8_accumulate",
    "int8_depths",
    "int8_linear",
    "int8_pack",
    "int8_quantize",
    "int8_unpack",
    "kernels",
    "peak",
    "sparse_accumulate",
    "sparse_conv2d",
    "sparse_dense",
    "sparse_header",
    "sparse_linear",
    "sparse_pack",
    "sparse_unpack",
]
