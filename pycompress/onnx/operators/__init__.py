"""The table of ONNX operators that :func:`pycompress.from_onnx` knows, each as one Python function of torch tensors.

By family, each in a file; :mod:`.operator` says what a row is. Beside these stand the recurrent ones, Constant and what is computed
of shapes, which the importer reads itself. The operators are specified at https://onnx.ai/onnx/operators/.
"""

from pycompress.onnx.operators.arithmetic import ARITHMETIC, PYTHON
from pycompress.onnx.operators.images import IMAGES
from pycompress.onnx.operators.indexing import INDEXING
from pycompress.onnx.operators.norms import NORMS
from pycompress.onnx.operators.operator import Row, Sizes, numbers, tensor_of
from pycompress.onnx.operators.pooling import POOLING
from pycompress.onnx.operators.products import PRODUCTS
from pycompress.onnx.operators.quantized import QUANTIZED
from pycompress.onnx.operators.reductions import REDUCTIONS
from pycompress.onnx.operators.shapes import SHAPES

__all__ = ["OPERATORS", "PYTHON", "Row", "Sizes", "numbers", "tensor_of"]

OPERATORS: dict[str, Row] = {
    **ARITHMETIC, **IMAGES, **INDEXING, **NORMS, **POOLING, **PRODUCTS, **QUANTIZED, **REDUCTIONS, **SHAPES,
}  # fmt: skip
