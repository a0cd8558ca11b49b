"""The channels of convolutions, and features of linear layers, with all that depends on them: found by their :class:`Flow`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pycompress.calls import Inputs, call_model, evaluating
from pycompress.structure.depth import tensors_in
from pycompress.structure.flow import Flow, alike_over
from pycompress.structure.units import Input, Left, Slice, Units, Unplain, check_plain, joined
from pycompress.surgery import shared_parameters

_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def units_of(model: nn.Module, inputs: Inputs) -> tuple[list[Units], list[Left]]:
    """The channels that can go together, of all layers that a call of the model meets, and those that have to stay."""
    with evaluating(model, inputs):
        flow = Flow(model)
        with flow:
            result = call_model(model, inputs)
        flow.hold(tensors_in(result), "the model returns it")
    reading = _Reading(model, flow)
    found: list[Units] = []
    left: list[Left] = []
    for name, roots in reading.groups():
        parts = reading.alike(roots)
        for i, labels in enumerate(parts):
            own = name if len(parts) == 1 else f"{name}:{i}"
            try:
                found.append(reading.units(own, labels))
            except Unplain as reason:
                left.append(Left("channels", own, str(reason)))
    return found, left


class _Reading:
    """What a flow found, by the names of a model."""

    def __init__(self, model: nn.Module, flow: Flow) -> None:
        self.model, self.labels = model, flow.labels
        self.names: dict[int, str] = {}
        for path, module in model.named_modules():
            for name, tensor in (*module._parameters.items(), *module._buffers.items()):
                if tensor is not None:
                    self.names.setdefault(id(tensor), joined(path, name))
        self.made = {one: self.labels.roots(labels) for one, labels in flow.made.items()}
        # by the name of a tensor and a dimension: the label of each position, 0 where there is none
        self.places: dict[tuple[str, int], Tensor] = {}
        self.inputs = {self.names[one]: self.labels.roots(labels) for one, labels in flow.met.items()}
        shared = shared_parameters(model)
        for one, along in flow.along.items():
            labels = self.labels.roots(along.clamp(min=0))
            if one in flow.otherwise:
                self.labels.hold(labels, f"{self.names[one]} is used otherwise, too")
            if one in shared:
                self.labels.hold(labels, f"{self.names[one]} is shared by several modules")
            if not bool(labels.any()):
                continue
            dim = next(
                (d for d in range(labels.dim()) if alike_over(labels, [e for e in range(labels.dim()) if e != d])), None
            )
            if dim is None:
                self.labels.hold(labels, f"it lies in {self.names[one]} in several directions")
                continue
            for d in range(labels.dim() - 1, -1, -1):
                labels = labels if d == dim else labels.select(d, 0)
            self.places[self.names[one], dim] = labels
        for name, labels in self.inputs.items():
            self.places[name, 1] = labels
        self.held = self.labels.held()

    def groups(self) -> list[tuple[str, list[int]]]:
        """The labels of layers whose channels are the same, with the name of the first of these layers."""
        found: list[tuple[str, set[int]]] = []
        for one, roots in self.made.items():
            own = {label for label in roots.tolist() if label}
            name = self.names[one].rpartition(".")[0]
            for other in [group for group in found if group[1] & own]:
                found.remove(other)
                name, own = min(name, other[0], key=self._place), own | other[1]
            found.append((name, own))
        return [(name, sorted(own)) for name, own in sorted(found, key=lambda group: self._place(group[0]))]

    def _place(self, layer: str) -> int:
        return [self.names[one].rpartition(".")[0] for one in self.made].index(layer)

    def alike(self, roots: list[int]) -> list[Tensor]:
        """Parts of these labels that lie in the same tensors, each as often."""
        parts: dict[tuple[Any, ...], list[int]] = {}
        counts = {place: torch.bincount(labels, minlength=max(roots) + 1) for place, labels in self.places.items()}
        for root in roots:
            key = tuple((place, int(count[root])) for place, count in counts.items() if count[root])
            parts.setdefault(key, []).append(root)
        return [torch.tensor(part, dtype=torch.int64, device="cpu") for part in parts.values()]

    def units(self, name: str, labels: Tensor) -> Units:
        """Raises Unplain where they have to stay."""
        held = [self.held.get(label, "") for label in labels.tolist()]
        if all(held):
            raise Unplain(held[0])
        if len(labels) < 2:
            raise Unplain("there is one only")
        slices, inputs = [], []
        for (tensor, dim), own in self.places.items():
            positions = (own == labels[:, None]).nonzero()[:, 1]
            if not len(positions):
                continue
            positions = positions.view(len(labels), -1)
            slices.append(Slice(tensor, dim, positions))
            if tensor in self.inputs and dim == 1:
                layer = tensor.rpartition(".")[0]
                inputs.append(Input(layer, self._columns(layer, positions)))
        if not inputs:
            raise Unplain("no layer makes use of it")
        for tensor in {one.tensor.rpartition(".")[0] for one in slices if one.tensor in self.inputs}:
            check_plain(self.model, tensor, _LAYERS)
        return Units(
            "channels",
            name,
            len(labels),
            tuple(slices),
            tuple(inputs),
            held=torch.tensor([bool(r) for r in held], dtype=torch.bool, device="cpu"),
        )

    def _columns(self, layer: str, positions: Tensor) -> Tensor:
        """Of the matrix, of positions in the second dimension of the weight."""
        weight = self.model.get_submodule(layer)._parameters["weight"]
        assert weight is not None
        each = weight[0, 0].numel()
        return (positions[:, :, None] * each + torch.arange(each, dtype=torch.int64, device="cpu")).flatten(1)
