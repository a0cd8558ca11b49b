"""``LowRankConv2d``: an ``nn.Conv2d`` as a chain of smaller ones (see methods/low_rank_conv.py for the papers).

They run in torch's own convolutions (oneDNN): a k x k convolution with fewer channels is what these are made for.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn.functional import conv2d, pad

from pycompress.kinds import Conv2dGeometry
from pycompress.kinds.padded import last_first
from pycompress.methods.low_rank import LowRank
from pycompress.nn.conv import CompressedConv2d
from pycompress.nn.factors import FactorsLayer
from pycompress.nn.layer import setting
from pycompress.weights import LowRankConv2dWeight
from pycompress.weights.low_rank_conv import Ranks, composed


class LowRankConv2d(FactorsLayer, CompressedConv2d):
    """``act(conv2d(x, W) + b)`` with a low-rank float32 weight, computed in float32 and rounded once.

    State: ``low_rank_down`` and ``low_rank_up``, for tucker also ``low_rank_core``: the float32 weights of the convolutions. A
    state dict may bring other ranks. NaN or Inf in x shows in all outputs whose patch holds it.

    Attributes:
        stages: what the convolutions of the chain are besides their weights, in the order in which they run.
    """

    geometry: Conv2dGeometry
    weight_type = LowRankConv2dWeight
    default_method = LowRank(energy=0.95, rank_guard=False)

    def __init__(
        self,
        weight: LowRankConv2dWeight,
        geometry: Conv2dGeometry,
        bias: Tensor | None = None,
        activation: str = "none",
    ) -> None:
        super().__init__(weight, geometry, bias, activation)
        if weight.kernel_size != geometry.kernel_size:
            raise ValueError(
                f"LowRankConv2d: kernel_size is {geometry.kernel_size}, expected {weight.kernel_size} as in the weight"
            )

    def _derive(self) -> None:
        super()._derive()
        self.stages = tuple(
            _stages(self.decomposition, [tuple(shape) for shape in self._shapes.values()], self.geometry)
        )

    decomposition: str = setting("decomposition", "``channel``, ``spatial`` or ``tucker``.")

    @property
    def ranks(self) -> Ranks:
        """(r,), or (r_in, r_out) of tucker."""
        return tuple(self.settings["ranks"]) if "ranks" in self.settings else (self.settings["rank"],)

    @property
    def label(self) -> str:
        """What a table calls the method, e.g. ``low rank 24 spatial``."""
        return f"low rank {'x'.join(map(str, self.ranks))} {self.decomposition}"

    def product(self, x: Tensor) -> Tensor:
        x, last = self._image(x), len(self.stages) - 1
        for i, (weight, stage) in enumerate(zip(self._unpack().values(), self.stages, strict=True)):
            if any(stage.around):
                x = pad(x, last_first(stage.around))
            x = conv2d(x, weight, self.bias32 if i == last else None, stage.stride, stage.padding, stage.dilation)
        return x

    def dense(self) -> Tensor:
        return composed(tuple(self._unpack().values())).flatten(1)

    def _details(self) -> str:
        return f"decomposition={self.decomposition}, ranks={self.ranks}"


def _stages(decomposition: str, shapes: list[tuple[int, ...]], geometry: Conv2dGeometry) -> list[Conv2dGeometry]:
    """Without a bias between them, zeros around the input give zeros around what follows: where they are added does not matter.

    Args:
        shapes: of the factors, in the order in which they run.
    """
    walks: list[dict[str, Any]] = [{} for _ in shapes]
    for name, neutral in (("stride", 1), ("padding", 0), ("dilation", 1)):
        whole = (0, 0) if name == "padding" and any(geometry.repeated) else getattr(geometry, name)
        if decomposition != "spatial":
            walks[-2][name] = whole
        elif isinstance(whole, str):
            walks[0][name] = walks[1][name] = whole
        else:
            walks[0][name], walks[1][name] = (whole[0], neutral), (neutral, whole[1])
    top, bottom, left, right = geometry.around
    if decomposition != "spatial":
        walks[-2]["around"] = geometry.around
    else:
        walks[0]["around"], walks[1]["around"] = (top, bottom, 0, 0), (0, 0, left, right)
    return [Conv2dGeometry(size[1], (size[2], size[3]), **walk) for size, walk in zip(shapes, walks, strict=True)]
