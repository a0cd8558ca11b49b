"""Dense weights on any device, in torch's own operators: what stands beside a low-rank weight."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pycompress.ops.activation import DIFFERENTIABLE
from pycompress.ops.checks import activation_code, check, check_float
from pycompress.ops.form import Form, Sizes, parse, written

Parts = dict[str, Tensor]


def sizes(form: Form) -> Sizes:
    """Shape and dtype of what :func:`unpack` gives, on any device."""
    return {"weight": ((form.n, form.k), torch.float32)}


def pack(
    parts: Mapping[str, Tensor], shape: tuple[int, int], settings: Mapping[str, Any], layout: str = ""  # noqa: ARG001
) -> tuple[Tensor, str]:  # fmt: skip
    """weight float32 [n, k], finite. Raises ValueError for any other."""
    weight = parts["weight"]
    check(
        weight.dtype == torch.float32 and tuple(weight.shape) == tuple(shape),
        f"dense_pack: weight is {weight.dtype} {list(weight.shape)}, expected torch.float32 {list(shape)}",
    )
    weight = weight.detach().resolve_neg().contiguous()
    # In NumPy, which has no threads that a forked process would miss; on a CUDA device it comes from a checked weight.
    check(
        weight.is_cuda or bool(np.isfinite(weight.numpy()).all()),
        "dense_pack: weight holds NaN or Inf, expected finite values",
    )
    return weight.view(-1).view(torch.uint8).clone(), written("dense", *shape)


def _matrix(op: str, packed: Tensor, form: str) -> Tensor:
    """The weight float32 [n, k] in a packed one, whose bytes are its own and no more. Raises ValueError for any other."""
    n, k = parse(form).n, parse(form).k
    check(
        packed.dtype == torch.uint8 and packed.dim() == 1 and packed.is_contiguous() and packed.shape[0] == 4 * n * k,
        f"{op}: packed is {packed.dtype} {list(packed.shape)}, expected a dense torch.uint8 vector of "
        f"{4 * n * k} bytes from dense_pack",
    )
    return packed.view(torch.float32).view(n, k)


def unpack(packed: Tensor, form: str) -> Parts:
    return {"weight": dense(packed, form)}


def dense(packed: Tensor, form: str) -> Tensor:
    return _matrix("dense_dense", packed, form).clone()


def linear(x: Tensor, packed: Tensor, form: str, bias: Tensor | None, activation: str) -> Tensor:
    op = "dense_linear"
    check_float(op, x)
    activation_code(op, activation)
    check(packed.device == x.device, f"{op}: packed is on {packed.device}, expected {x.device}, where x is")
    weight = _matrix(op, packed, form)
    n, k = weight.shape
    check(x.dim() > 0, f"{op}: x is a scalar, expected [..., k]")
    check(x.shape[-1] == k, f"{op}: x is {list(x.shape)}, the packed weight expects k = {k}")
    if bias is not None:
        check(
            bias.dtype == torch.float32 and bias.dim() == 1 and bias.is_contiguous() and bias.device == x.device,
            f"{op}: bias is {bias.dtype} {list(bias.shape)} on {bias.device}, expected a dense float32 vector on {x.device}",
        )
        check(bias.shape[0] == n, f"{op}: bias is {list(bias.shape)}, expected [{n}]")
    y = torch.nn.functional.linear(x.to(torch.float32), weight, bias)
    return DIFFERENTIABLE[activation](y).to(x.dtype)
