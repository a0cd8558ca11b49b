"""How much of a model's result changes with an error in a layer, to first order: for all layers and candidates at once.

The error d that a compressed layer makes in its output changes the result by J d, J the derivative of the result by that output.
E[(v^T J d)^2] = ||J d||^2 for v with independent standard normal entries (Hutchinson 1990), and v^T J is what one backward pass
gives for every layer. So a pass and a run of each compressed layer on what it met stand for a run of the model for each of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pycompress.calls import Inputs, call_model, evaluating
from pycompress.nn import CompressedLayer
from pycompress.plan import Target
from pycompress.search.quality import shown

Pair = tuple[Target, CompressedLayer]

_PROBES = 4  # of each item of a batch: its estimate is off by sqrt(2 / 4) of itself, that of 64 of them by 9 %
_ITEMS = 64  # of all batches: those that come later are left out


class Probes:
    """One batch, run through a model: what layers met and gave, and what the result makes of changes there.

    Args:
        targets: the layers to watch; each by what it replaces.
    Raises:
        RuntimeError: the result has no derivative by any of them.
    """

    def __init__(self, model: nn.Module, targets: Iterable[Target], batch: Inputs) -> None:
        self._met: dict[nn.Module, list[Tensor]] = {}
        self._given: dict[nn.Module, list[Tensor]] = {}
        owners = [*targets]
        self._watch(owners)
        try:
            with evaluating(model, batch), torch.enable_grad():
                result, mask = shown(call_model(model, batch), batch)
                outputs = [y for own in self._given.values() for y in own]
                generator = torch.Generator(device="cpu").manual_seed(0)
                slopes = []
                for _ in range(_PROBES):
                    v = torch.randn(result.shape, generator=generator, dtype=result.dtype, device="cpu") * mask
                    slopes.append(torch.autograd.grad(result, outputs, v, retain_graph=True, allow_unused=True))
                self.items = result.shape[0] if result.dim() > 1 else 1
                self.size = float((result.detach().double() * mask).square().sum())
        finally:
            for handle in self._handles:
                handle.remove()
        self._slopes = {id(y): own for y, *own in zip(outputs, *slopes, strict=True) if own[0] is not None}

    def _watch(self, targets: list[Target]) -> None:
        self._handles: list[Any] = []
        for first, target in {target.first: target for target in targets}.items():
            self._handles.append(first.register_forward_pre_hook(self._note_input(target), with_kwargs=True))
        for last in dict.fromkeys(_last(target) for target in targets):
            self._handles.append(last.register_forward_hook(self._note_output))

    def _note_input(self, target: Target) -> Any:
        def note(module: nn.Module, args: tuple[Any, ...], keywords: dict[str, Any]) -> None:
            self._met.setdefault(module, []).append(target.kind.input_of(args, keywords).detach().clone())

        return note

    def _note_output(self, module: nn.Module, _: Any, y: Any) -> Any:
        if not isinstance(y, Tensor):  # (of a recurrent layer: a tuple)
            return None
        if not y.requires_grad:
            y.requires_grad_()
        self._given.setdefault(module, []).append(y)
        return y.clone()  # which what follows may change in place

    def change(self, target: Target, layer: CompressedLayer) -> float | None:
        """||J d||^2 over all items, for the layer in the target's place; None where nothing is known."""
        met, given = self._met.get(target.first, []), self._given.get(_last(target), [])
        if len(met) != len(given) or not given:
            return None
        total = torch.zeros(_PROBES, 1, dtype=torch.float64, device="cpu")
        with torch.no_grad():
            for x, y in zip(met, given, strict=True):
                if id(y) in self._slopes:
                    total = total + self._products(layer(x) - y.detach(), self._slopes[id(y)])
        return float(total.square().sum()) / _PROBES

    def _products(self, error: Tensor, slopes: list[Tensor]) -> Tensor:
        """v^T J d for each probe and, where they lie one behind another, each item of the batch; else for all items together."""
        apart = error.dim() > 1 and error.shape[0] % self.items == 0
        rows = error.reshape(self.items if apart else 1, -1)
        return torch.stack([torch.linalg.vecdot(rows, own.reshape(rows.shape)) for own in slopes]).double()


def _last(target: Target) -> nn.Module:
    return target.fused or target.last


def changes(
    model: nn.Module, made: Mapping[Any, Pair], batches: Sequence[Inputs]
) -> dict[Any, float]:  # fmt: skip
    """The expected ||J d||^2 of each compressed layer, as a share of the squares of the model's results; nothing of those of which
    nothing is known: whose layer no batch reached, or gives more than a tensor.

    Args:
        made: what takes whose place, by any key.
    """
    totals: dict[Any, float] = {}
    size, items = 0.0, 0
    for batch in batches:
        probes = Probes(model, [target for target, _ in made.values()], batch)
        for key, (target, layer) in made.items():
            if (change := probes.change(target, layer)) is not None:
                totals[key] = totals.get(key, 0.0) + change
        size, items = size + probes.size, items + probes.items
        if items >= _ITEMS:
            break
    return {key: total / size for key, total in totals.items()} if size > 0 else {}
