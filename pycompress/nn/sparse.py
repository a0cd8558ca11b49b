"""``SparseLinear``: an ``nn.Linear`` of whose weight only the non-zero part is kept and multiplied, in the sparse kernels.

``SparseLayer`` is what it has in common with the sparse convolution.
"""

from __future__ import annotations

from pycompress import ops
from pycompress.methods.sparse import Sparse
from pycompress.nn.layer import CompressedLayer, setting
from pycompress.nn.linear import CompressedLinear
from pycompress.weights import SparseWeight


class SparseLayer(CompressedLayer):
    """A layer with a sparse weight [n, k], in float32 or in int8.

    State: ``sparse_mask`` uint8 [n, ceil(k / 8)], ``sparse_values`` float32 or int8 [nnz], for int8 ``sparse_scale`` float32 [n].
    A state dict may bring more or fewer weights than the layer had.
    """

    weight_type = SparseWeight
    op = ops.OPS["sparse"]
    default_method = Sparse()  # keeps the zeros that are there

    bits: int = setting("bits", "Of a stored weight: 32 or 8.")
    activation_bits: int | None = setting("activation_bits", "7 or 8 for int8, None for float32.")
    nnz: int = setting("nnz", "How many weights are stored.")

    @property
    def density(self) -> float:
        """Share of the weights that are stored."""
        return self.nnz / (self.n * self.k)

    @property
    def format(self) -> str:
        """One of ``ops.SPARSE_FORMATS``, or the layout on a CUDA device: the one that packing chose; '' on the
        meta device, and where the layer was moved to a device that has no kernels for it.
        """
        packed_here = self.packed.is_cpu or (self.packed.is_cuda and self.has_cuda_kernels)
        return ops.parse(self.form).layout if packed_here else ""

    def _details(self) -> str:
        bits = f"bits={self.bits}" + (f", activation_bits={self.activation_bits}" if self.activation_bits else "")
        return f"density={self.density:.3g}, {bits}"

    @property
    def label(self) -> str:
        """What a table calls the method, e.g. ``sparse 20 % int8``."""
        return f"sparse {100 * self.density:.3g} %" + (" int8" if self.bits == 8 else "")


class SparseLinear(SparseLayer, CompressedLinear):
    """``act(x W^T + b)`` with a sparse weight; for int8, activations are quantized per row as they come.

    float32: NaN or Inf in x shows in those outputs whose row has a weight for it. int8: it gives a row of NaN.

    On a CUDA device float32 weights run whose values are all bfloat16 or all float16 numbers, on x of that type: those of a model
    in that type; and int8 weights that are 2:4 or in square blocks, on x of any type. Tensor cores take 2:4 and square blocks
    (``Sparse(pattern=...)``) at any number of rows; other float32 patterns are for few rows. Moving a weight there that does not
    run raises ValueError; nothing is rounded on the way. float32: NaN or Inf may show in all of its row.
    """

    has_cuda_kernels = True
