"""Labels that flow through a model: which channel each number of each tensor belongs to.

Every number of an activation carries the label of the channel that it is of, or 0. What only moves numbers (views, transposes,
concatenations, shuffles) is done to the labels too; what combines numbers one by one makes their labels one; what sums over labels
that are alike passes them on. A parameter that meets labels, such as a norm's or a scale's, lies along them from then on. Whatever
else meets a label holds it: that channel has to stay.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

VIEWS = {"view", "_unsafe_view", "reshape", "_reshape_alias"}
MOVES = VIEWS | {
    "permute", "transpose", "t", "expand", "squeeze", "unsqueeze", "slice", "select", "split", "split_with_sizes", "unbind", "cat",
    "stack", "flip", "clone", "detach", "alias", "contiguous", "lift_fresh",
}  # fmt: skip
OVER_SPACE = {
    "max_pool1d_with_indices", "max_pool2d_with_indices", "max_pool3d_with_indices", "max_pool2d", "mkldnn_max_pool2d",
    "avg_pool1d", "avg_pool2d", "avg_pool3d", "adaptive_avg_pool1d", "adaptive_avg_pool2d", "_adaptive_avg_pool2d",
    "_adaptive_avg_pool3d", "adaptive_max_pool2d", "upsample_nearest1d", "upsample_nearest2d", "upsample_bilinear2d",
    "upsample_bicubic2d", "constant_pad_nd", "reflection_pad2d", "replication_pad2d",
}  # fmt: skip
SUMS = {"mean", "sum", "amax", "amin", "var", "std"}
ONE_BY_ONE = {"_to_copy", "native_dropout", "dropout", "hardswish_", "hardsigmoid", "copy_", "_prelu_kernel"}


class Labels:
    """Sets of labels that became one, and those that are held."""

    def __init__(self) -> None:
        self._parent = torch.zeros(1, dtype=torch.int64, device="cpu")
        self.reasons: dict[int, str] = {}  # of held labels

    def fresh(self, count: int) -> Tensor:
        """New labels, int64 [count]."""
        first = len(self._parent)
        new = torch.arange(first, first + count, dtype=torch.int64, device="cpu")
        self._parent = torch.cat([self._parent, new])
        return new

    def roots(self, labels: Tensor) -> Tensor:
        """The label that stands for each one's set."""
        while True:
            up = self._parent[labels]
            if torch.equal(up, labels):
                return up
            labels = up

    def join(self, a: Tensor, b: Tensor) -> None:
        """Makes labels of one shape one, pair by pair; what meets 0 is held."""
        pairs = torch.stack([a.flatten(), b.flatten()])
        pairs = pairs[:, pairs[0] != pairs[1]].unique(dim=1)
        for one, other in self.roots(pairs).T.tolist():
            x, y = (int(self.roots(torch.tensor(label, dtype=torch.int64, device="cpu"))) for label in (one, other))
            if x == 0 or y == 0:
                self.hold(
                    torch.tensor([x + y], dtype=torch.int64, device="cpu"), "it is combined with what has no channels"
                )
            elif x != y:
                self._parent[max(x, y)] = min(x, y)
        self._parent = self.roots(self._parent)

    def hold(self, labels: Tensor, reason: str) -> None:
        """These have to stay."""
        for label in labels.unique().tolist():
            if label:
                self.reasons.setdefault(label, reason)

    def held(self) -> dict[int, str]:
        """The reason of each set that is held, by its root."""
        found: dict[int, str] = {}
        for label, reason in self.reasons.items():
            found.setdefault(int(self.roots(torch.tensor(label, dtype=torch.int64, device="cpu"))), reason)
        return found


class Flow(TorchDispatchMode):
    """Follows a call of a model in its block.

    Attributes:
        labels: all.
        along: {id of a parameter or buffer: int64 of its shape, the label that each number lies along, or 0; -1: it was not met}.
        made: {id of a weight: int64 [n], the labels of its results}, in the order in which they were met.
        met: {id of a weight: int64 [its columns], the labels of its inputs}.
        otherwise: ids of parameters that something else makes use of, too.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.labels = Labels()
        own = [*model.parameters(), *model.buffers()]
        self.along = {id(one): torch.full(one.shape, -1, dtype=torch.int64, device="cpu") for one in own}
        self.made: dict[int, Tensor] = {}
        self.met: dict[int, Tensor] = {}
        self.otherwise: set[int] = set()
        # by id of a tensor: the tensor itself (lest another gets its id), and its labels; of views of parameters, which numbers
        self._of: dict[int, tuple[Tensor, Tensor]] = {}
        self._parts: dict[int, tuple[Tensor, int, Tensor]] = {
            id(one): (one, id(one), torch.arange(one.numel(), dtype=torch.int64, device="cpu").view(one.shape))
            for one in own
        }

    def of(self, tensor: Tensor) -> Tensor | None:
        """The labels of an activation; None where it has none."""
        found = self._of.get(id(tensor))
        return None if found is None else self.labels.roots(found[1])

    def hold(self, tensors: Iterable[Any], reason: str) -> None:
        for tensor in tensors:
            if isinstance(tensor, Tensor) and (labels := self.of(tensor)) is not None:
                self.labels.hold(labels, reason)
            elif isinstance(tensor, Tensor) and id(tensor) in self._parts:
                self.otherwise.add(self._parts[id(tensor)][1])

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        self._follow(func, args, kwargs, result)
        return result

    # --- what an operator makes of labels ---------------------------------------------------------------------------

    def _follow(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        tensors = [one for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor)]
        if not any(id(one) in self._of or id(one) in self._parts for one in tensors):
            return
        name = func._schema.name.split("::")[-1]
        own: dict[str, Callable[..., bool]] = {
            "convolution": self._convolution, "addmm": self._addmm, "mm": self._mm, "linear": self._linear,
            "native_batch_norm": self._batch_norm, "_native_batch_norm_legit_no_training": self._batch_norm,
            "cudnn_batch_norm": self._batch_norm,
        }  # fmt: skip
        done = False
        if name in own:
            done = own[name](args, kwargs, result)
        elif name in MOVES:
            done = self._moved(name, func, args, kwargs, result)
        elif name in OVER_SPACE:
            done = self._over_space(args[0], result)
        elif name in SUMS:
            done = self._summed(args, kwargs, result)
        elif torch.Tag.pointwise in func.tags or name in ONE_BY_ONE:
            done = self._one_by_one(tensors, result)
        if not done:
            self.hold(tensors, f"{name} meets it, through which channels are not followed")

    def _set(self, tensor: Tensor, labels: Tensor) -> None:
        if bool(labels.any()):
            self._of[id(tensor)] = (tensor, labels.reshape(tensor.shape))

    def _moved(self, name: str, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> bool:
        tensors = [one for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor)]
        results = [result] if isinstance(result, Tensor) else list(result)
        if len(tensors) == 1 and id(tensors[0]) in self._parts:
            _, owner, part = self._parts[id(tensors[0])]
            moved = _with(func, args, kwargs, {id(tensors[0]): part})
            for one, its in zip(results, [moved] if isinstance(moved, Tensor) else moved, strict=True):
                self._parts[id(one)] = (one, owner, its)
            return True
        if any(id(one) in self._parts for one in tensors):
            return False
        zero = torch.zeros((), dtype=torch.int64, device="cpu")
        labels = {id(one): zero.expand(one.shape) if (own := self.of(one)) is None else own for one in tensors}
        moved = _with(func, args, kwargs, labels)
        parts = [moved] if isinstance(moved, Tensor) else [*moved]
        if name in ("slice", "select", "unbind", "split", "split_with_sizes"):
            dim = (
                args[{"slice": 1, "select": 1, "unbind": 1}.get(name, 2)]
                if len(args) > 1 + name.startswith("split")
                else 0
            )
            if not alike_over(labels[id(tensors[0])], [kwargs.get("dim", dim)]):
                same = name.startswith("split") and len({part.shape for part in parts}) == 1
                if not same and parts[0].shape != tensors[0].shape:
                    return False
                for part in parts[1:]:  # such as chunks: each has to lose as many
                    self.labels.join(parts[0], part)
        for one, its in zip(results, parts, strict=True):
            several = [d for d in range(its.dim()) if not alike_over(its, [d])]
            if len(several) > 1 and name not in VIEWS:
                return False
            for d in sorted(several, key=lambda d: (its.shape[d], d))[:-1]:  # such as groups: each has to lose as many
                self.labels.join(its.narrow(d, 0, 1).expand_as(its), its)
            self._set(one, self.labels.roots(its))
        return True

    def _one_by_one(self, tensors: list[Tensor], result: Any) -> bool:
        y = result if isinstance(result, Tensor) else result[0]
        found = [(one, self.of(one)) for one in tensors]
        labels = [its.expand(y.shape) for _, its in found if its is not None]
        if not labels:
            return False
        for other in labels[1:]:
            self.labels.join(labels[0], other)
        own = self.labels.roots(labels[0])
        for one, its in found:
            if its is not None:
                continue
            if id(one) in self._parts and one.numel() > 1:
                _, owner, part = self._parts[id(one)]
                self._lay(owner, part.expand(y.shape), own)
            elif not alike_over(own, [d for d in range(y.dim()) if _size(one, d, y) > 1]):
                self.labels.hold(own, "it is combined with what has no channels")
        self._set(y, self.labels.roots(own))
        return True

    def _lay(self, owner: int, part: Tensor, labels: Tensor) -> None:
        """A parameter's numbers ``part`` lie along labels of the same shape."""
        along = self.along[owner].view(-1)
        numbers, labels = part.flatten(), labels.flatten()
        pairs = torch.stack([numbers, labels]).unique(dim=1)
        first = torch.zeros_like(along)
        first[pairs[0]] = pairs[1]
        self.labels.join(first[pairs[0]], pairs[1])
        before = along[pairs[0]]
        self.labels.join(before[before >= 0], pairs[1][before >= 0])
        along[pairs[0]] = pairs[1]

    def _channels(self, x: Tensor, dim: int) -> Tensor | None:
        """The label of each position in a dimension; None, and all are held, where others than that dimension tell them apart."""
        labels = self.of(x)
        if labels is None:
            return torch.zeros(x.shape[dim], dtype=torch.int64, device="cpu")
        rest = [d for d in range(x.dim()) if d != dim % x.dim()]
        if not alike_over(labels, rest):
            self.labels.hold(labels, "its positions are different channels")
            return None
        for d in sorted(rest, reverse=True):
            labels = labels.select(d, 0)
        return labels

    def _whole(self, tensor: Tensor | None) -> int | None:
        """The id of the parameter that a tensor is all of, as it lies."""
        found = None if tensor is None else self._parts.get(id(tensor))
        if found is None or found[2].shape != self.along[found[1]].shape:
            return None
        return (
            found[1]
            if torch.equal(found[2].flatten(), torch.arange(found[2].numel(), dtype=torch.int64, device="cpu"))
            else None
        )

    def _product(self, x: Tensor, dim: int, weight: int, bias: Tensor | None, y: Tensor, groups: int = 1) -> bool:
        channels = self._channels(x, dim)
        own = None if bias is None else self._whole(bias)
        if channels is None or (bias is not None and own is None):
            return False
        n = self.along[weight].shape[0]
        if groups == len(channels) > 1:  # depthwise: each passes its channel on
            results = channels.repeat_interleave(n // groups)
            if weight in self.made:
                self.labels.join(self.made[weight], results)
        else:
            results = self.made.get(weight)  # type: ignore[assignment]
            if results is None:
                results = self.made[weight] = self.labels.fresh(n)
            if groups > 1:  # each group has to lose as many
                for labels in (channels, results):
                    rows = labels.view(groups, -1)
                    self.labels.join(rows[:1].expand_as(rows), rows)
                channels = channels[: len(channels) // groups]
            if weight in self.met:
                self.labels.join(self.met[weight], channels)
            self.met[weight] = channels
        shape = self.along[weight].shape
        rows = results.view(-1, *[1] * (len(shape) - 1)).expand(shape)
        before = self.along[weight]
        self.labels.join(before[before >= 0], rows[before >= 0])
        self.along[weight] = rows.clone()
        if own is not None:
            self._lay(own, torch.arange(n, dtype=torch.int64, device="cpu"), results)
        where = [1] * y.dim()
        where[dim] = n
        self._set(y, self.labels.roots(results).view(where).expand(y.shape))
        return True

    def _convolution(self, args: tuple[Any, ...], _: Any, y: Tensor) -> bool:
        x, tensor, bias, *_, transposed, _, groups = args
        weight = self._whole(tensor)
        if weight is None or transposed:
            return False
        return self._product(x, 1 if x.dim() == tensor.dim() else 0, weight, bias, y, groups)

    def _linear(self, args: tuple[Any, ...], _: Any, y: Tensor) -> bool:
        x, tensor, bias = (*args, None)[:3]
        weight = self._whole(tensor)
        return weight is not None and self._product(x, x.dim() - 1, weight, bias, y)

    def _addmm(self, args: tuple[Any, ...], kwargs: dict[str, Any], y: Tensor) -> bool:
        bias, x, tensor = args
        return not kwargs and self._matrix(x, tensor, bias, y)

    def _mm(self, args: tuple[Any, ...], _: Any, y: Tensor) -> bool:
        return self._matrix(args[0], args[1], None, y)

    def _matrix(self, x: Tensor, tensor: Tensor, bias: Tensor | None, y: Tensor) -> bool:
        found = self._parts.get(id(tensor))
        if found is None or id(x) in self._parts:
            return False
        n, k = y.shape[1], x.shape[1]
        if self.along[found[1]].shape != (n, k) or not torch.equal(
            found[2], torch.arange(n * k, dtype=torch.int64, device="cpu").view(n, k).t()
        ):
            return False
        return self._product(x, 1, found[1], bias, y)

    def _batch_norm(self, args: tuple[Any, ...], _: Any, result: Any) -> bool:
        x = args[0]
        channels = self._channels(x, 1)
        if channels is None:
            return False
        for tensor in args[1:5]:
            if isinstance(tensor, Tensor):
                owner = self._whole(tensor)
                if owner is None:
                    return False
                self._lay(owner, torch.arange(len(channels), dtype=torch.int64, device="cpu"), channels)
        labels = self.of(x)
        if labels is not None:
            self._set(result[0], labels)
        return True

    def _over_space(self, x: Tensor, result: Any) -> bool:
        y = result if isinstance(result, Tensor) else result[0]
        dim = 1 if x.dim() > 3 or (x.dim() == 3 and y.dim() == 3 and x.shape[:2] == y.shape[:2]) else 0
        channels = self._channels(x, dim)
        if channels is None or x.shape[dim] != y.shape[dim]:
            return False
        where = [1] * y.dim()
        where[dim] = len(channels)
        self._set(y, channels.view(where).expand(y.shape))
        return True

    def _summed(self, args: tuple[Any, ...], kwargs: dict[str, Any], y: Tensor) -> bool:
        x = args[0]
        dims = kwargs.get("dim", args[1] if len(args) > 1 else None)
        labels = self.of(x)
        if labels is None or dims is None or isinstance(dims, bool):
            return False
        over = sorted({d % x.dim() for d in ([dims] if isinstance(dims, int) else dims)}, reverse=True)
        if not over or not alike_over(labels, over):
            return False
        for d in over:
            labels = labels.select(d, 0)
        self._set(y, labels)
        return True


def _with(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], other: dict[int, Tensor]) -> Any:
    """The operator on other tensors."""

    def swap(one: Any) -> Any:
        return other.get(id(one), one) if isinstance(one, Tensor) else one

    return func(*tree_map(swap, args), **tree_map(swap, kwargs))


def alike_over(labels: Tensor, dims: list[int]) -> bool:
    """Whether labels are the same all along these dimensions."""
    return all(bool((labels == labels.narrow(d, 0, 1)).all()) for d in dims if labels.shape[d] > 1)


def _size(tensor: Tensor, dim: int, y: Tensor) -> int:
    """Of a dimension of y in what is broadcast to it."""
    own = dim - (y.dim() - tensor.dim())
    return tensor.shape[own] if own >= 0 else 1
