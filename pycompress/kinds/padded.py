"""A convolution into whose own padding the zeros go that a padding module puts around its input."""

from __future__ import annotations

from copy import copy

from torch import nn

Sides = tuple[int, ...]  # how much lies before and behind each dimension of an image: top, bottom, left, right

_ZEROS = (nn.ZeroPad1d, nn.ConstantPad1d, nn.ZeroPad2d, nn.ConstantPad2d)
_AROUND = "_pycompress_around"  # of a layer: the sides that it pads besides its own


def zeros_around(module: nn.Module) -> Sides | None:
    """What a padding module puts around an image; None for any other module, and for one that cuts, or pads with something else."""
    if type(module) not in _ZEROS or module.value != 0:
        return None
    sides = module.padding
    if not isinstance(sides, tuple) or not all(type(size) is int and size >= 0 for size in sides):
        return None
    return tuple(last_first(sides))


def last_first(sides: Sides) -> list[int]:
    """Sides as ``torch.nn.functional.pad`` takes them, which has the last dimension first; and the other way round."""
    return [size for at in range(len(sides) - 2, -1, -2) for size in sides[at : at + 2]]


def surrounded(layer: nn.Module, sides: Sides) -> nn.Module:
    """A layer like this one, with its tensors, that says that it pads these sides with zeros, too."""
    fresh = copy(layer)
    vars(fresh)[_AROUND] = sides
    return fresh


def around(layer: nn.Module) -> Sides | None:
    """What a layer says to pad besides its own, or None."""
    found = vars(layer).get(_AROUND)
    return found if isinstance(found, tuple) else None
