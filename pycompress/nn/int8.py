"""``Int8Linear``: an ``nn.Linear`` whose weight is int8 and whose product runs in the int8 kernels."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from pycompress import ops
from pycompress.methods.int8 import Int8, Int8Weight

_METHOD = Int8()


class _InputGradient(torch.autograd.Function):
    """Straight-through gradient for the input; the weight is fixed (Bengio et al. 2013, arXiv:1308.3432)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, packed: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(packed, scale)
        ctx.shape = scale.shape[0], x.shape[-1]
        return ops.int8_linear(x.detach(), packed, scale, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (grad,), (packed, scale) = grads, ctx.saved_tensors
        weight = ops.int8_unpack(packed, ctx.shape).to(torch.float32) * scale[:, None]
        return grad @ weight.to(grad.dtype), None, None, None


class Int8Linear(nn.Module):
    """``act(x W^T + b)`` with int8 weights; activations are quantized per row as they come.

    The module keeps the weight once, in the layout of the kernel that runs here (``packed``). What is canonical is derived from it:
    ``weight``, ``state_dict()``, pickles and saved files hold int8 [n, k], so they can be read on any processor.

    Args (of the class methods :meth:`from_dense` and :meth:`from_weight`, the ways to make one):
        activation: ``none``, ``relu``, ``gelu``, ``gelu_tanh`` or ``silu``, fused behind the product.

    Shapes:
        x [..., in_features] in float32, bfloat16 or float16 -> [..., out_features] in the same dtype. Scale and bias stay
        float32 whatever ``.to(dtype)`` says. A row with NaN or Inf gives a row of NaN.
    """

    weight_scale: Tensor
    bias: Tensor | None
    packed: Tensor

    def __init__(self, weight: Int8Weight, bias: Tensor | None = None, activation: str = "none") -> None:
        super().__init__()
        if activation not in ops.ACTIVATIONS:
            raise ValueError(f"Int8Linear: activation is {activation!r}, expected one of {', '.join(ops.ACTIVATIONS)}")
        self.out_features, self.in_features = weight.values.shape
        self.activation_bits, self.weight_bits = weight.activation_bits, weight.weight_bits
        self.activation = activation
        if bias is not None:
            if bias.shape != (self.out_features,):
                raise ValueError(f"Int8Linear: bias is {list(bias.shape)}, expected [{self.out_features}]")
            bias = bias.detach().to("cpu", torch.float32, copy=True)
            if not torch.isfinite(bias).all():
                raise ValueError("Int8Linear: the bias holds NaN or Inf, expected finite values")
        self.register_buffer("weight_scale", weight.scale.clone())
        self.register_buffer("bias", bias)
        self.register_buffer("packed", ops.int8_pack(weight.values, self.activation_bits), persistent=False)

    @classmethod
    def from_weight(cls, weight: Int8Weight, bias: Tensor | None = None, activation: str = "none") -> Int8Linear:
        """From a canonical weight; bias float [n] or None."""
        return cls(weight, bias, activation)

    @classmethod
    def from_dense(cls, dense: nn.Linear, method: Int8 = _METHOD, activation: str = "none") -> Int8Linear:
        """From an ``nn.Linear``. Raises ValueError where its weight holds NaN or Inf."""
        return cls(method.compress(dense.weight), dense.bias, activation)

    @property
    def weight(self) -> Tensor:
        """int8 [n, k], unpacked at each access."""
        shape = self.out_features, self.in_features
        if self.packed.is_meta:
            return torch.empty(shape, dtype=torch.int8, device="meta")
        return ops.int8_unpack(self.packed, shape)

    def canonical(self) -> Int8Weight:
        """The canonical weight, unpacked at each call."""
        return Int8Weight(self.weight, self.weight_scale, self.activation_bits, self.weight_bits)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - the name that nn.Linear gives it
        if input.requires_grad and torch.is_grad_enabled():
            return self._forward_with_gradient(input)
        own = self._buffers  # read directly: nn.Module.__getattr__ costs 0.4 us a name
        return ops.int8_linear(input, own["packed"], own["weight_scale"], own["bias"], self.activation)  # type: ignore[arg-type]

    def _forward_with_gradient(self, x: Tensor) -> Tensor:
        y: Tensor = _InputGradient.apply(x, self.packed, self.weight_scale, self.bias)
        return _DIFFERENTIABLE[self.activation](y)

    def extra_repr(self) -> str:
        bits = f"activation_bits={self.activation_bits}, weight_bits={self.weight_bits}"
        fused = "" if self.activation == "none" else f", activation={self.activation}"
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, {bits}{fused}"

    # --- state: canonical outside, packed inside ------------------------------------------------------------------

    def share(self, other: Int8Linear) -> None:
        """Use the packed weight of ``other``, whose canonical weight is the same (tied weights)."""
        self.packed, self.weight_scale = other.packed, other.weight_scale

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        destination[prefix + "weight"] = self.weight
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], strict: bool,  # noqa: ARG002
        missing_keys: list[str], unexpected_keys: list[str], error_msgs: list[str],
    ) -> None:  # fmt: skip
        own = {"weight": None, "weight_scale": self.weight_scale, "bias": self.bias}
        names = [name for name in own if name != "bias" or self.bias is not None]
        found = {name: state_dict[prefix + name] for name in names if prefix + name in state_dict}
        missing = [prefix + name for name in names if name not in found]
        if strict:
            missing_keys += missing
            unexpected_keys += [key for key in state_dict if key.startswith(prefix) and key[len(prefix) :] not in names]
        if not found:
            return
        try:  # all of it or nothing, also where load_state_dict(strict=False) forgives what is missing
            for name, value in found.items():
                if not isinstance(value, Tensor):
                    raise TypeError(f"{name} is {type(value).__name__}, expected a tensor")
            values = found["weight"].cpu() if "weight" in found else self.weight
            scale = found.get("weight_scale", self.weight_scale).detach().cpu()
            weight = Int8Weight(values, scale, self.activation_bits, self.weight_bits)
            if values.shape != (self.out_features, self.in_features):
                raise ValueError(f"weight is {list(values.shape)}, expected [{self.out_features}, {self.in_features}]")
            fresh = Int8Linear(weight, found.get("bias", self.bias), self.activation)
        except (TypeError, ValueError, RuntimeError) as error:
            error_msgs.append(f"{prefix}weight, weight_scale or bias: {error}")
            return
        if not missing:
            self.packed, self.weight_scale, self.bias = fresh.packed, fresh.weight_scale, fresh.bias

    def __getstate__(self) -> dict[str, Any]:
        # A pickle may be opened on another processor, so it holds the canonical weight.
        state = self.__dict__.copy()
        buffers = dict(state["_buffers"])
        buffers["packed"] = self.weight
        state["_buffers"] = buffers
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.packed = ops.int8_pack(self.packed, self.activation_bits)

    def __deepcopy__(self, memo: dict[int, Any]) -> Int8Linear:
        # Without the detour over __getstate__: nothing to unpack here, and layers that share a weight go on sharing it.
        copy = self.__class__.__new__(self.__class__)
        memo[id(self)] = copy
        copy.__dict__.update(deepcopy(self.__dict__, memo))
        return copy

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Int8Linear:  # noqa: ARG002
        # `.to(dtype)`, `.half()` and the like are meant for activations: scale and bias follow the device, not the dtype.
        for name, buffer in self._buffers.items():
            if buffer is None:
                continue
            moved = fn(buffer)
            self._buffers[name] = moved if moved.dtype == buffer.dtype else buffer.to(moved.device)
        return self


_DIFFERENTIABLE: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda y: y,
    "relu": nn.functional.relu,
    "gelu": nn.functional.gelu,
    "gelu_tanh": lambda y: nn.functional.gelu(y, approximate="tanh"),
    "silu": nn.functional.silu,
}
