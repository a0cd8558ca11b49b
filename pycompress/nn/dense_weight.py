"""``LazyTensor``: the dense weight of a compressed layer, for code that looks at it: floats only where they are used."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

if TYPE_CHECKING:
    from typing_extensions import Self

_tracing, _transform, _modes = (
    torch._C._is_tracing,
    torch._C._functorch.peek_interpreter_stack,
    torch._C._len_torch_dispatch_stack,
)
_INNER_MODES = [getattr(torch._C._TorchDispatchModeKey, name) for name in ("FAKE", "PROXY", "FUNCTIONAL")]


def is_traced() -> bool:
    """Whether a tracer or a transform has to see how the floats are made; other modes may look at a lazy weight."""
    if _tracing() or _transform() is not None:
        return True
    return bool(_modes()) and any(torch._C._get_dispatch_mode(mode) is not None for mode in _INNER_MODES)


class LazyTensor(Tensor):
    """A tensor of the shape, dtype and device of a dense weight, which is decompressed where an operator takes its numbers.

    A view of it (``.data``, ``.T``, ``[0]``) is another one. What would write into it raises RuntimeError: the change would be
    lost.
    """

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]
    # Three of a tensor's own attributes: read here, they cost a twentieth of what torch takes to look for __torch_function__.
    __slots__ = ("device", "dtype", "floats", "memory", "shape", "subject")

    subject: str  # what it is, and why it cannot be written into
    memory: Tensor  # what the floats are made of
    floats: Callable[[], Tensor]  # what it stands for, made at each call

    def __new__(cls, subject: str, memory: Tensor, floats: Callable[[], Tensor], like: Tensor) -> Self:
        """like: on the meta device, of the shape, strides and dtype of the floats."""
        with torch.inference_mode(False):  # it outlives the block in which it is made
            made: Self = Tensor._make_wrapper_subclass(
                cls, like.shape, like.stride(), like.storage_offset(), dtype=like.dtype, device=memory.device
            )
        made.subject, made.memory, made.floats = subject, memory, floats
        made.shape, made.dtype, made.device = like.shape, like.dtype, memory.device
        return made

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        is_view = False
        for i, argument in enumerate(func._schema.arguments):
            value = args[i] if i < len(args) else kwargs.get(argument.name)
            if argument.alias_info is None or not any(isinstance(leaf, cls) for leaf in tree_leaves(value)):
                continue
            if argument.alias_info.is_write:
                next(leaf for leaf in tree_leaves(value) if isinstance(leaf, cls))._refuse(str(func))
            is_view = True
        if is_view:
            return args[0]._view(lambda tensor: func(tensor, *args[1:], **kwargs))
        args, kwargs = tree_map(lambda leaf: leaf.floats() if isinstance(leaf, cls) else leaf, (args, kwargs))
        return func(*args, **kwargs)

    def _view(self, of: Callable[[Tensor], Any]) -> Any:
        """The views, one or several, that a function makes of a tensor."""
        shapes = of(self._like())
        if isinstance(shapes, Tensor):
            return LazyTensor(self.subject, self.memory, lambda: of(self.floats()), shapes)
        return [
            LazyTensor(self.subject, self.memory, lambda i=i: of(self.floats())[i], like)  # type: ignore[misc]
            for i, like in enumerate(shapes)
        ]

    def _like(self) -> Tensor:
        return torch.empty_strided(self.shape, self.stride(), dtype=self.dtype, device="meta")

    def _refuse(self, what: str) -> NoReturn:
        raise RuntimeError(
            f"{what}: this is {self.subject}: the change would be lost. Change the dense layer before it is compressed, or put one "
            "with the change in its place."
        )

    # --- what does not go through operators -----------------------------------------------------------------------

    @property
    def data(self) -> Tensor:
        return self

    @data.setter
    def data(self, _value: Tensor) -> None:
        self._refuse("data = ...")

    def detach(self) -> Tensor:
        return LazyTensor(self.subject, self.memory, self.floats, self._like())

    @property
    def requires_grad(self) -> bool:
        return False

    @requires_grad.setter
    def requires_grad(self, value: bool) -> None:
        self.requires_grad_(value)

    def requires_grad_(self, requires_grad: bool = True) -> LazyTensor:
        if requires_grad:
            self._refuse("requires_grad")
        return self

    def data_ptr(self) -> int:
        """Of what it is made of: alike for layers that share it."""
        return self.memory.data_ptr()

    def untyped_storage(self) -> torch.UntypedStorage:
        """Of what it is made of."""
        return self.memory.untyped_storage()

    def apply_(self, *_: Any) -> NoReturn:
        self._refuse("apply_")

    map_ = map2_ = apply_  # type: ignore[assignment]

    def numpy(self, *, force: bool = False) -> Any:
        """Read-only."""
        array = self.floats().numpy(force=force)
        array.flags.writeable = False
        return array

    def tolist(self) -> Any:
        return self.floats().tolist()

    def __dlpack__(self, **keywords: Any) -> Any:
        return self.floats().__dlpack__(**keywords)

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        memo[id(self)] = copied = self.floats()
        return copied

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.floats().__reduce_ex__(protocol)

    def __repr__(self) -> str:  # type: ignore[override]
        return f"{self.floats()!r}  # {self.subject}"
