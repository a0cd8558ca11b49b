"""A block beside its original, on random input, before it is put in.

What is compared is twofold. First with dense products, those of the decompressed weights, in the original and in the op: nothing
is quantized then, so that they differ by the rounding of float32 alone, and what was read wrongly shows. ``_ROUNDING`` of the
largest number is a hundred times what rounding adds up to, and half of the rows are so small that a norm's ``eps`` counts.

Then the op as it will run beside the original as it ran. A product quantizes its rows, and where two floats that differ in the last
bit lie on both sides of a half, the integers differ by one: here and there one number of a row is off by a step of the quantizer,
at 7 bits some 0.04 of the row's standard deviation, which no bound on rounding covers. That is 0.04 / sqrt(d) of the row's norm,
and seldom; ``_STEPS`` of the norm of a sequence is what no sound block comes near, and what a broken one is far above.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from pycompress import ops
from pycompress.calls import evaluating
from pycompress.nn import CompressedLayer
from pycompress.nn.block import Description, Unfit, child_at, is_sdpa, operands_of
from pycompress.ops.block_form import parse_block
from pycompress.ops.cpu.block import run_of

_ROUNDING = 1e-4
_STEPS = 0.05
_BATCH, _LENGTH = 2, 11

Call = tuple[tuple[Any, ...], dict[str, Any]]
Calls = Callable[
    [nn.Module, Description, Tensor, Tensor, Tensor], list[Call]
]  # of x, padding bool [batch, length], position bias


def tried(module: nn.Module, description: Description, calls: Calls) -> Description:
    """The description, with the form in which the original returns.

    Args:
        calls: of the original forward, such as its model makes them.
    Raises:
        Unfit: block and original differ, or one of them fails.
    """
    tensors, (form, _) = operands_of(module, description)
    if min(tensor.shape[0] for tensor in tensors if tensor is not None) < 2:
        raise Unfit("it is one channel wide")
    try:
        parse_block(form)
    except ValueError as error:
        raise Unfit(str(error)) from error
    try:
        with evaluating(module), _in_float32(module):
            return _tried(module, description, calls)
    except Unfit:
        raise
    except Exception as error:  # whatever a new version of another library does
        raise Unfit(f"it cannot be tried: {type(error).__name__}: {error}") from error


def _tried(module: nn.Module, description: Description, calls: Calls) -> Description:
    tensors, forms = operands_of(module, description)
    draw = partial(
        torch.randn, generator=torch.Generator(device="cpu").manual_seed(0), dtype=torch.float32, device="cpu"
    )
    own, run = parse_block(forms[0]), run_of(forms[0])
    if run is None:
        raise Unfit("no native block runs here, which needs torch 2.10 and the package built by a compiler")
    x = draw(_BATCH, _LENGTH, next(own.parsed())[2].k)
    x[1] *= 1e-3
    padding = torch.zeros((_BATCH, _LENGTH), dtype=torch.bool, device="cpu")
    padding[0, -4:] = padding[1, -1] = True
    for args, kwargs in calls(module, description, x, padding, draw(1, own.heads, _LENGTH, _LENGTH)):
        operands = description.arguments(module, description, args, kwargs)
        if operands is None:
            raise Unfit("it is called in another way than is known here")
        causal = operands[3] and bool(description.attention) and is_sdpa(module, description)
        found = module(*args, **kwargs)
        description = replace(description, outputs=_outputs(found, operands[2]))
        with _dense_products(module):
            exact = _first(module(*args, **kwargs), description)
        y = ops.block(*operands[:3], *_with_dense_products(module, description, tensors, forms[causal]))
        _compare(y, exact, _largest, _ROUNDING)
        y = ops.block(*operands[:3], tensors, forms[causal])
        _compare(y, _first(found, description), torch.linalg.vector_norm, _STEPS)
        if not run(*operands[:3], tensors, torch.empty_like(y), 1):
            raise Unfit("the native block does not take its tensors")
    return description


def _with_dense_products(
    module: nn.Module, description: Description, tensors: list[Tensor | None], form: str
) -> tuple[list[Tensor | None], str]:  # fmt: skip
    """The tensors of the op, and its form, with decompressed weights in the places of packed ones."""
    tensors, forms = [*tensors], []
    for i, place in enumerate(description.products):
        layer = None if place is None else child_at(module, place.path)
        if isinstance(layer, CompressedLayer):
            tensors[2 * i] = layer.dense()
        weight = tensors[2 * i]
        forms.append("" if weight is None else f"dense n={weight.shape[0]} k={weight.shape[1]}")
    return tensors, str(replace(parse_block(form), products=tuple(forms)))


@contextmanager
def _dense_products(module: nn.Module) -> Iterator[None]:
    """Within, compressed layers give what their decompressed weights give."""

    def dense(layer: Any, args: tuple[Any, ...], _: Any) -> Tensor:
        return ops.DIFFERENTIABLE[layer.activation](linear(args[0], layer.dense(), layer.bias32))

    handles = [one.register_forward_hook(dense) for one in module.modules() if isinstance(one, CompressedLayer)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _in_float32(module: nn.Module) -> Iterator[None]:
    """Within, parameters are float32 ones."""
    tables = [one._parameters for one in module.modules()]
    before = [dict(table) for table in tables]
    for table in tables:
        for name, one in table.items():
            if one is not None and one.dtype != torch.float32:
                table[name] = nn.Parameter(one.detach().float(), requires_grad=False)
    try:
        yield
    finally:
        for table, entries in zip(tables, before, strict=True):
            table.update(entries)


def _outputs(found: Any, bias: Tensor | None) -> tuple[str, ...] | None:
    """What the original returns: None for y alone, else what the items are. Raises Unfit for anything else."""
    if isinstance(found, Tensor):
        return None
    if type(found) is not tuple or not found or not isinstance(found[0], Tensor):
        raise Unfit(f"it returns {type(found).__name__}, expected a tensor or a tuple that begins with one")
    kinds = ["y"]
    for one in found[1:]:
        if one is None:
            kinds.append("none")
        elif isinstance(one, Tensor) and bias is not None and one.shape == bias.shape and torch.equal(one, bias):
            kinds.append("bias")
        else:
            raise Unfit(f"it returns a {type(one).__name__} besides")
    return tuple(kinds)


def _first(found: Any, description: Description) -> Tensor:
    """y [batch, length, d] of what the original returned."""
    y: Tensor = found if description.outputs is None else found[0]
    return y.transpose(0, 1) if description.turned else y


def _largest(y: Tensor) -> Tensor:
    return y.abs().amax()


def _compare(y: Tensor, expected: Tensor, size: Callable[[Tensor], Tensor], bound: float) -> None:
    """Raises Unfit where they differ by more than a share of what is expected, sequence by sequence."""
    if y.shape != expected.shape:
        raise Unfit(f"it gives {list(expected.shape)}, expected {list(y.shape)}")
    for one, other in zip(y.double(), expected.double(), strict=True):
        error = float(size(one - other) / size(other))
        if not error <= bound:
            raise Unfit(f"it computes something else than is known here: the relative difference is {error:.2g}")
