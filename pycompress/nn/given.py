"""What a static int8 convolution gives inside a module in which layers hand on (:mod:`pycompress.nn.handing`): bytes, floats with
their bytes beside them, or, where the model adds something behind it, a result that awaits what is added."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils._pytree import tree_map

from pycompress.ops.checks import Ints, nobody_looks
from pycompress.ops.cpu import int8_conv

Walked = tuple[Ints, Ints, Ints, Ints, int]  # kernel size, stride, sides, dilation, groups
_CLAIM = "_pycompress_claim"  # where a tensor that never leaves the module says what it stands for
_ADD, _ADD_TO = (torch.add, Tensor.add), Tensor.add_  # what `a + b` and `a += b` call
_RELU = (functional.relu, torch.relu, torch.relu_, Tensor.relu, Tensor.relu_)
_NOTHING = torch.empty(0, dtype=torch.float32, device="cpu")


@dataclass(frozen=True)
class Plan:
    """What a layer gives.

    Attributes:
        range: by what bytes are made; None where none are.
        alone: whether nobody wants floats beside the bytes.
        inside: whether layers alone read the result.
        into: whether the last of them may add to it in place.
        adds: whether something is added first.
        relu: whether a ReLU follows the sum.
    """

    range: int8_conv.Target | None
    alone: bool
    inside: bool
    into: bool
    adds: bool
    relu: bool


@dataclass(frozen=True)
class Claim:
    """Of a tensor that only layers inside the module read: its channels lie last, whatever they were to do.

    Attributes:
        channels_last: what they were to do.
        into: as the plan has it.
        beside: its bytes, by this range.
    """

    channels_last: bool
    into: bool
    beside: Tensor | None = None
    range: int8_conv.Target | None = None


def claim_of(x: Tensor) -> Claim | None:
    """None of every other tensor."""
    found: Claim | None = x.__dict__.get(_CLAIM)
    return found


def _as_claimed(x: Any) -> Any:
    """A value as the model's own code is to see it."""
    if isinstance(x, Awaited):
        return x.now()
    claim = claim_of(x) if type(x) is Tensor else None
    return x if claim is None or claim.channels_last else x.contiguous()


@dataclass(frozen=True)
class Convolution:
    """A call of a layer.

    Attributes:
        x: bytes, or float32 [N, C, H, W].
        channels_last: whether those of its result are to lie last.
    """

    layer: Any
    walk: Walked
    x: Tensor
    channels_last: bool

    @property
    def shape(self) -> tuple[int, ...]:
        """Of its result."""
        return tuple(int8_conv.shape_of(self.x, self.layer.form, *self.walk))

    def floats(self) -> Tensor:
        """Its result, as the layer gives it to everybody."""
        y: Tensor = self._run(int8_conv.hand_on, self.layer.activation, to=None, channels_last=self.channels_last)
        return y

    def give(self, plan: Plan, addend: Tensor | None = None) -> Tensor | None:
        """What the plan says; None where bytes alone cannot say it."""
        activation, beside = "relu" if plan.relu else self.layer.activation, None
        y: Tensor | None
        if plan.alone:
            y = self._run(int8_conv.hand_on, activation, to=plan.range, channels_last=True, addend=addend)
            if y is None:
                return None
        elif plan.range is not None and plan.inside:
            y, beside = self._run(int8_conv.hand_on_beside, activation, to=plan.range, addend=addend)
        else:
            last = self.channels_last or plan.inside
            y = self._run(int8_conv.hand_on, activation, to=None, channels_last=last, addend=addend)
        assert y is not None
        if plan.inside:
            y.__dict__[_CLAIM] = Claim(self.channels_last, plan.into, beside, plan.range)
        return y

    def _run(self, function: Callable[..., Any], activation: str, **options: Any) -> Any:
        own = self.layer._buffers
        return function(self.x, own["packed"], self.layer.form, own["bias"], *self.walk, activation, **options)


class Awaited(Tensor):
    """The result of a convolution before the model's own code has added to it; and then, where a ReLU follows, before that.

    Whatever else is done with it is done with what it stands for, which is computed then.
    """

    _call: Convolution
    _plan: Plan
    _addend: Tensor | None
    _now: Tensor | None

    @classmethod
    def of(cls, call: Convolution, plan: Plan) -> Awaited:
        self = Tensor._make_subclass(cls, _NOTHING)
        self.__dict__.update(_call=call, _plan=plan, _addend=None, _now=None)
        return self

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:  # fmt: skip
        with torch._C.DisableTorchFunctionSubclass():
            if func in _RELU and args and type(args[0]) is cls and args[0]._addend is not None and args[0]._plan.relu:
                return _sum(args[0]._call, args[0]._plan, args[0]._addend)
            if (func in _ADD or func is _ADD_TO) and len(args) == 2 and not kwargs:
                y = cls._added(*args, in_place=func is _ADD_TO)
                if y is not None:
                    return y
            if func is _ADD_TO and args and type(args[0]) is Tensor and claim_of(args[0]) is not None:
                y = args[0].add_(*map(_as_claimed, args[1:]), **(kwargs or {}))
                wanted = _as_claimed(y)
                del y.__dict__[_CLAIM]  # which says no more what it is
                return wanted
            return func(*tree_map(_as_claimed, args), **tree_map(_as_claimed, dict(kwargs or {})))

    def now(self) -> Tensor:
        """What it stands for."""
        own = self.__dict__
        if own["_now"] is None:
            y = own["_call"].floats()
            own["_now"] = y if own["_addend"] is None else y + _as_claimed(own["_addend"])
        result: Tensor = own["_now"]
        return result

    @classmethod
    def _added(cls, a: Any, b: Any, *, in_place: bool) -> Tensor | None:
        """The sum, or what still awaits its ReLU; None where torch has to add."""
        self, other = (a, b) if type(a) is cls else (b, a)
        own = self.__dict__
        if own["_addend"] is not None or own["_now"] is not None or type(other) is not Tensor:
            return None
        claim = claim_of(other)
        if in_place and self is not a and (claim is None or not claim.into):
            return None  # others would see the sum in it
        call, plan = own["_call"], own["_plan"]
        last = int8_conv.is_channels_last(other)
        same = (last if claim is None else claim.channels_last) == call.channels_last
        stays = last or (plan.inside and other.is_contiguous())  # else nothing is gained where the channels lie first
        if not (same and stays and other.dtype is torch.float32 and other.is_cpu and nobody_looks(other)):
            return None
        if tuple(other.shape) != call.shape or other.numel() == 0:
            return None
        if not plan.relu:
            return _sum(call, plan, other)
        total = self if in_place and self is a else cls.of(call, plan)  # else it goes on being what it is
        total.__dict__["_addend"] = other
        return total


def _sum(call: Convolution, plan: Plan, addend: Tensor) -> Tensor:
    y = call.give(plan, addend.contiguous(memory_format=torch.channels_last))
    if y is not None:
        return y
    y = call.floats() + _as_claimed(addend)
    return functional.relu(y) if plan.relu else y
