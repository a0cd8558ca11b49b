"""What models give for labelled batches, one batch after another: that of a generator is met once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pycompress.calls import Inputs, call_model, evaluating, tensors_in


@dataclass(frozen=True)
class Pair:
    """Two inputs of a model in one row of the data, such as two sentences: their outputs [n, d] are taken as [n, 2, d]."""

    first: Inputs
    second: Inputs


Batch = tuple[Inputs | Pair, Tensor | None]
Output = Callable[[Any], Tensor]


def batches_of(data: Iterable[Any]) -> Iterator[Batch]:
    """Raises TypeError for what is no (inputs, targets)."""
    if isinstance(data, Tensor | Mapping | str):
        raise TypeError(f"evaluate: data is {type(data).__name__}, expected an iterable of (inputs, targets)")
    for number, item in enumerate(data):
        if not isinstance(item, tuple | list) or len(item) != 2:
            what = f"of {len(item)}" if isinstance(item, tuple | list) else ""
            raise TypeError(
                f"evaluate: batch {number} of the data is a {type(item).__name__} {what}, expected (inputs, targets), with None "
                "where there are no targets"
            )
        inputs, targets = item
        if targets is not None and not isinstance(targets, Tensor):
            targets = torch.from_numpy(np.array(targets))
        yield inputs, None if targets is None else targets.detach().cpu()


def the_tensor(result: Any) -> Tensor:
    """A tensor that a model gave, the ``logits`` in what it gave, or the only floating-point tensor there."""
    if isinstance(result, Tensor):
        return result
    logits = result.get("logits") if isinstance(result, Mapping) else getattr(result, "logits", None)
    if isinstance(logits, Tensor):
        return logits
    found = {path: tensor for path, tensor in tensors_in(result) if tensor.is_floating_point()}
    if len(found) != 1:
        raise TypeError(
            f"evaluate: the model gives {type(result).__name__} with {', '.join(found) or 'no tensor'}, expected one tensor, or "
            "logits: output=lambda result: ... says which"
        )
    return next(iter(found.values()))


def run(model: nn.Module, inputs: Inputs | Pair, output: Output) -> Tensor:
    """The model's outputs on the CPU: it runs in evaluation mode, and is left as it was."""
    if isinstance(inputs, Pair):
        return torch.stack([run(model, one, output) for one in (inputs.first, inputs.second)], dim=1)
    with evaluating(model, inputs):
        found = output(call_model(model, inputs)).detach().cpu().clone()
    if found.dim() == 0:
        raise ValueError("evaluate: the model's output is a scalar, expected a row for each row of the inputs")
    return found


def placed(inputs: Inputs, change: Callable[[Any], Any]) -> Inputs:
    """The inputs with each of them changed."""
    if isinstance(inputs, Tensor):
        changed: Tensor = change(inputs)
        return changed
    if isinstance(inputs, Mapping):
        return {name: change(value) for name, value in inputs.items()}
    return [change(value) for value in inputs]


def resized(inputs: Inputs, rows: int, count: int) -> Inputs:
    """Inputs of so many rows: those that there are, again from the first when they are used up.

    Raises:
        ValueError: nothing in them has a row for each of ``rows``.
    """
    chosen = [i % rows for i in range(count)]
    met: list[Any] = []

    def change(value: Any) -> Any:
        if isinstance(value, Tensor) and value.dim() and len(value) == rows:
            met.append(value)
            return value[chosen]
        if isinstance(value, list) and len(value) == rows:  # of texts
            met.append(value)
            return [value[i] for i in chosen]
        return value

    result = placed(inputs, change)
    if not met:
        raise ValueError(f"nothing in the inputs has {rows} rows, as the outputs have: it cannot be made {count}")
    return result


def only_float(inputs: Inputs | Pair) -> tuple[Tensor, Callable[[Tensor], Inputs]]:
    """The one floating-point tensor in the inputs, and the inputs with another in its place.

    Raises:
        ValueError: there is none (tokens, texts), or several.
    """
    if isinstance(inputs, Pair):
        raise ValueError("the inputs are a Pair, expected one floating-point tensor")
    values = (
        [inputs] if isinstance(inputs, Tensor) else list(inputs.values() if isinstance(inputs, Mapping) else inputs)
    )
    found = [value for value in values if isinstance(value, Tensor) and value.is_floating_point()]
    if len(found) != 1:
        kinds = ", ".join(str(value.dtype) if isinstance(value, Tensor) else type(value).__name__ for value in values)
        raise ValueError(f"the inputs are {kinds}, expected one floating-point tensor among them")
    x = found[0]
    return x, lambda other: placed(inputs, lambda value: other if value is x else value)


def check_rows(outputs: Tensor, targets: Tensor | None, number: int) -> None:
    """Raises ValueError where a batch has no rows, or other rows of outputs than of targets."""
    if not len(outputs):
        raise ValueError(f"evaluate: batch {number} gives outputs {list(outputs.shape)}, expected at least one row")
    if targets is not None and (targets.dim() == 0 or len(targets) != len(outputs)):
        raise ValueError(
            f"evaluate: batch {number} has {len(outputs)} rows of outputs and targets {list(targets.shape)}, expected as many rows"
        )


def described(batch: Sequence[Tensor], who: str) -> str:
    """What keeps rows from being judged, or ''."""
    whole = torch.cat([rows.reshape(len(rows), -1).isnan().any(1) for rows in batch])
    if not bool(whole.any()):
        return ""
    first = int(whole.nonzero()[0])
    return f"the outputs of {who} hold NaN in {int(whole.sum())} of {len(whole)} rows, first in row {first}"
