"""``FactorsLayer``: a low-rank layer that runs as a chain of torch's own operators, which take its float32 factors as they are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pycompress.nn.layer import CompressedLayer


class FactorsLayer(CompressedLayer):
    """A layer for which no kernel of ours runs: ``packed`` is the float32 tensors of the canonical weight, one behind another."""

    def __init__(self, *args: Any, **keywords: Any) -> None:
        super().__init__(*args, **keywords)
        self._derive()

    def _derive(self) -> None:
        """Works out what follows from the settings, which a state dict may change: too slow for each call."""
        self._shapes = {name: torch.Size(size) for name, (size, _) in self._expected().items()}

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        self._derive()

    def _pack(self, tensors: Mapping[str, Tensor]) -> Tensor:
        return torch.cat([tensors[name].flatten() for name in self._expected()])

    def _unpack(self) -> dict[str, Tensor]:
        """Views of ``packed``."""
        parts = self.packed.split([size.numel() for size in self._shapes.values()])
        return {name: part.view(size) for part, (name, size) in zip(parts, self._shapes.items(), strict=True)}

    @property
    def weight(self) -> Tensor:
        """The dense layer's, float32, made at each access."""
        if self.packed.is_meta:
            return torch.empty(self.dense_shape, device="meta")
        return self.canonical().decompress().view(self.dense_shape)

    @property
    def bits(self) -> int:
        """Of a stored weight: 32."""
        return 32
