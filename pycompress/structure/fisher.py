"""What a model's results make of errors in its layers' results, by gradients: the diagonal of the Fisher information (Martens and
Grosse 2015, arXiv:1503.05671).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from pycompress.calls import Inputs, call_model, evaluating, uncompiled
from pycompress.kinds import Kind, kind_of
from pycompress.structure.depth import tensors_in

Scalar = Callable[[Any, Any], Tensor]  # of what the model returned, and the batch


def fisher(model: nn.Module, batches: Iterable[Inputs], loss: Scalar | None = None) -> dict[str, Tensor]:
    """For each linear layer and convolution the mean squares of gradients with respect to its results: float64 [n] by name.

    An error e of a layer's results then changes the loss, or the results of the model, by about the sum of e^2 times these.

    Args:
        model: runs in evaluation mode, with gradients; it is left as it was.
        batches: inputs as ``compress`` takes them; where a loss is given, (inputs, anything that it needs).
        loss: ``loss(result, anything)``, a scalar, or a tensor whose numbers all count alike (an embedding, say). None: all
            floating-point tensors that the model returns. No labels are needed for either of these: random signs are added up
            over the numbers, which has the squared Jacobian as its mean.
    Raises:
        ValueError: no batch, or none that led to a gradient.
    """
    model = uncompiled(model)
    kinds = {
        name: kind
        for name, module in model.named_modules()
        if (kind := kind_of(module)) is not None and not (kind.tokens or kind.recurrent)
    }
    sums: dict[str, Tensor] = {}
    generator = torch.Generator(device="cpu").manual_seed(0)
    count = 0
    for batch in batches:
        inputs, besides = batch if loss is not None and isinstance(batch, tuple) and len(batch) == 2 else (batch, batch)
        count += 1
        with evaluating(model, inputs), torch.enable_grad(), ExitStack() as hooks:
            for name, kind in kinds.items():
                handle = model.get_submodule(name).register_forward_hook(_watching(name, kind, sums))
                hooks.callback(handle.remove)
            result = call_model(model, inputs)
            outputs = tensors_in(result) if loss is None else [loss(result, besides)]
            signs = [
                torch.randint(0, 2, y.shape, generator=generator, dtype=torch.int64, device="cpu").to(y) * 2 - 1
                if y.dim()
                else torch.ones_like(y)
                for y in outputs
            ]
            torch.autograd.backward(
                [y for y in outputs if y.requires_grad],
                [s for y, s in zip(outputs, signs, strict=True) if y.requires_grad],
            )
    if not sums:
        raise ValueError(f"fisher: {count} batches led to no gradient of a layer, expected some")
    return {name: total / count for name, total in sums.items()}


def _watching(name: str, kind: Kind, sums: dict[str, Tensor]) -> Any:
    def hook(_: nn.Module, __: Any, y: Tensor) -> Tensor:
        y = y if y.requires_grad else y.detach().requires_grad_()

        def add(gradient: Tensor) -> None:
            rows = kind.results(gradient.detach().to(torch.float64))
            sums[name] = sums.get(name, 0.0) + rows.square().sum(dim=0)

        y.register_hook(add)
        return y

    return hook
