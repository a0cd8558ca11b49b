"""``FactorsLayer``: a low-rank layer that runs as a chain of torch's own operators, which take its float32 factors as they are."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from pycompress import ops
from pycompress.nn.layer import CompressedLayer
from pycompress.ops.checks import check_float


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """To what torch casts there at the moment; None without autocast."""
    is_on = device.type in ("cpu", "cuda") and torch.is_autocast_enabled(device.type)
    return torch.get_autocast_dtype(device.type) if is_on else None


def uncast(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """``function(x)`` without autocast: in float32, where its operands are."""
    if autocast_dtype(x.device) is None:
        return function(x)
    with torch.autocast(x.device.type, enabled=False):
        return function(x)


class FactorsLayer(CompressedLayer):
    """A layer for which no kernel of ours runs: ``packed`` is the float32 tensors of the canonical weight, one behind another.

    It computes in float32, autocast or not, and rounds once: to x's dtype, under autocast to that which the dense layer gives.
    """

    def __init__(self, *args: Any, **keywords: Any) -> None:
        super().__init__(*args, **keywords)
        self._derive()

    def _derive(self) -> None:
        """Works out what follows from the settings, which a state dict may change: too slow for each call."""
        names = self.weight_type.names(self.settings)
        expected = self._expected()
        self._shapes = {name: torch.Size(expected[stored][0]) for name, stored in names.items()}

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        self._derive()

    def _pack(self, parts: Mapping[str, Tensor], device: torch.device | str = "cpu") -> tuple[Tensor, str]:
        return torch.cat([tensor.flatten() for tensor in parts.values()]).to(device), ""

    def _tensors(self) -> dict[str, Tensor]:
        return {name: tensor.clone() for name, tensor in super()._tensors().items()}  # each with memory of its own

    def _unpack(self) -> dict[str, Tensor]:
        """Views of ``packed``."""
        parts = self.packed.split([size.numel() for size in self._shapes.values()])
        return {name: part.view(size) for part, (name, size) in zip(parts, self._shapes.items(), strict=True)}

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - the name that dense layers give it
        self.check(input)
        y = uncast(self.product, input.float())
        return ops.DIFFERENTIABLE[self.activation](y).to(autocast_dtype(input.device) or input.dtype)

    def product(self, x: Tensor) -> Tensor:
        """What the activation follows, of float32 in float32. A subclass says what it is."""
        raise NotImplementedError

    def check(self, x: Tensor) -> None:
        """Raises TypeError for an input of another dtype than kernels read, and RuntimeError for one on another device.

        Of a weight on meta, and an input that is not, some of torch's operators make a result that nothing was written to.
        """
        check_float(type(self).__name__, x)
        if x.device != self.packed.device:
            raise RuntimeError(
                f"{type(self).__name__}: x is on {x.device}, expected {self.packed.device}, where the layer is"
            )

    @property
    def bits(self) -> int | None:
        """Of a stored weight: 32."""
        return 32
