"""``CompressedLinear``: what all compressed linear layers have in common, which is everything but the kernel."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from torch import Tensor

from pycompress import ops
from pycompress.kinds import LINEAR
from pycompress.nn.layer import CompressedLayer
from pycompress.weights import Weight

if TYPE_CHECKING:
    from typing_extensions import Self


class CompressedLinear(CompressedLayer):
    """``act(x W^T + b)`` with a compressed weight, made by :meth:`from_dense` or :meth:`from_weight`.

    Shapes:
        x [..., in_features] in float32, bfloat16 or float16 -> [..., out_features] in the same dtype.
    """

    kind = LINEAR
    op: ClassVar[ops.Op]

    @classmethod
    def from_weight(cls, weight: Weight, bias: Tensor | None = None, activation: str = "none") -> Self:
        """From a canonical weight; bias float [n] or None."""
        return cls(weight, bias, activation)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - the name that nn.Linear gives it
        own = self._buffers  # read directly: nn.Module.__getattr__ costs 0.4 us a name
        return self.op.linear(input, own["packed"], self.form, own["bias"], self.activation)
