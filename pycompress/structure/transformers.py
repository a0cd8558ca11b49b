"""The neurons and heads of transformer blocks, as the families of :mod:`pycompress.passes.blocks` read them."""

from __future__ import annotations

from copy import deepcopy

import torch
from torch import Tensor, nn

from pycompress.calls import evaluating
from pycompress.nn.block import Description, Unfit
from pycompress.passes.blocks import FAMILIES, Family
from pycompress.passes.blocks.reading import class_name
from pycompress.structure.cut import Cut, masked, tensor_at
from pycompress.structure.units import Input, Left, Number, Slice, Units, Unplain, check_plain, joined

# What attentions call the number of their heads, and the features of all of them together.
_HEADS, _WIDTHS = ("num_attention_heads", "num_heads", "n_heads"), ("all_head_size", "inner_dim", "dim", "embed_dim")
_BATCH, _LENGTH = 2, 5
_ROUNDING = 1e-4  # a hundred times what float32 adds up to here


def units_of(model: nn.Module, kind: str) -> tuple[list[Units], list[Left]]:
    """The neurons, or the heads, of all blocks that are known, and those that cannot shrink."""
    families = {name: family for family in FAMILIES for name in family.classes}
    read = {"neurons": _neurons, "heads": _heads}[kind]
    found: list[Units] = []
    left: list[Left] = []
    for name, module in model.named_modules():
        family = families.get(class_name(module))
        if family is None:
            continue
        try:
            description = family.read(module)
            units = read(model, name, description)
            _try(module, family, description, read(module, "", description))
        except (Unfit, Unplain) as reason:
            left.append(Left(kind, name, str(reason)))
        else:
            found.append(units)
    return found, left


def _paths(model: nn.Module, block: str, description: Description, products: tuple[int, ...]) -> list[str]:
    """The names of linear layers of a block, by the places of their products."""
    places = [description.products[i] for i in products]
    if any(place is not None and place.third is not None for place in places):
        raise Unplain("nn.MultiheadAttention takes as many features for its heads as its input has")
    names = [joined(block, place.path) for place in places if place is not None]
    for name in names:
        check_plain(model, name, (nn.Linear,))
    return names


def _neurons(model: nn.Module, block: str, description: Description) -> Units:
    *makers, down = _paths(model, block, description, (4, 5, 6))
    positions = torch.arange(tensor_at(model, f"{down}.weight").shape[1], dtype=torch.int64, device="cpu")[:, None]
    slices = [_rows(model, name, positions) for name in makers]
    return Units(
        "neurons", makers[0], len(positions), (*(s for both in slices for s in both), Slice(f"{down}.weight", 1, positions)),
        (Input(down, positions),),
    )  # fmt: skip


def _heads(model: nn.Module, block: str, description: Description) -> Units:
    if description.form.norm == "rms_norm" or description.family == "mpnet":
        raise Unplain("its position bias is made for all heads, of all blocks together")
    query, key, value, output = _paths(model, block, description, (0, 1, 2, 3))
    form = description.form
    positions = torch.arange(form.heads * form.head_size, dtype=torch.int64, device="cpu").view(
        form.heads, form.head_size
    )
    slices = [_rows(model, name, positions) for name in (query, key, value)]
    attention = query.rpartition(".")[0]
    own = vars(model.get_submodule(attention))
    numbers = [Number(attention, name) for name in _HEADS if own.get(name) == form.heads]
    numbers += [Number(attention, name, form.head_size) for name in _WIDTHS if own.get(name) == positions.numel()]
    return Units(
        "heads", attention, form.heads, (*(s for both in slices for s in both), Slice(f"{output}.weight", 1, positions)),
        (Input(output, positions),), tuple(numbers),
    )  # fmt: skip


def _rows(model: nn.Module, layer: str, positions: Tensor) -> list[Slice]:
    biased = model.get_submodule(layer)._parameters.get("bias") is not None
    return [Slice(f"{layer}.{name}", 0, positions) for name in ("weight", "bias")[: 1 + biased]]


def _try(module: nn.Module, family: Family, description: Description, units: Units) -> None:
    """Raises Unfit where a copy of the block without its first unit computes something else than one that does not use it."""
    if units.size < 2:
        raise Unfit("there is one only")
    stay = torch.arange(units.size, dtype=torch.int64, device="cpu") > 0
    small, dense = deepcopy(module), deepcopy(module)
    Cut.leaving(small, {units: stay}).apply(small)
    masked(dense, {units: stay})
    norm = tensor_at(module, f"{description.norms[0]}.weight")
    generator = torch.Generator(device="cpu").manual_seed(0)
    x = torch.randn((_BATCH, _LENGTH, len(norm)), generator=generator, dtype=torch.float32, device="cpu").to(norm)
    padding = torch.zeros((_BATCH, _LENGTH), dtype=torch.bool, device="cpu")
    padding[0, -2:] = True
    bias = torch.zeros(1, description.form.heads, _LENGTH, _LENGTH, dtype=torch.float32, device="cpu").to(x)
    try:
        with evaluating(small), evaluating(dense):
            for args, kwargs in family.calls(module, description, x, padding, bias):
                y, expected = (_first(one(*args, **kwargs)) for one in (small, dense))
                error = float((y - expected).norm() / expected.norm())
                if not error <= _ROUNDING:
                    raise Unfit(
                        f"it computes something else when it is smaller: the relative difference is {error:.2g}"
                    )
    except Unfit:
        raise
    except Exception as error:  # whatever a new version of another library does
        raise Unfit(f"it does not run when it is smaller: {type(error).__name__}: {error}") from error


def _first(result: object) -> Tensor:
    y = result if isinstance(result, Tensor) else result[0]  # type: ignore[index]
    assert isinstance(y, Tensor)
    return y
