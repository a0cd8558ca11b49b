"""A transformer block on the CPU (``csrc/block``): what is asked of its operands, the call, and the twin where there is none."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache, partial

import torch
from torch import Tensor
from torch.nn.functional import linear

from pycompress.ops.block_form import NORMS, PRODUCTS, parse_block
from pycompress.ops.checks import ACTIVATIONS, check, check_float
from pycompress.ops.cpu import native
from pycompress.ops.form import Form
from pycompress.reference import block as reference

Tensors = Sequence[Tensor | None]

_KINDS = ("dense", "int8", "int4", "sparse", "low_rank")  # of weights, in the order of their numbers in csrc/block
_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@lru_cache(maxsize=1 << 12)
def run_of(form: str) -> Callable[..., bool] | None:
    """``run(x, mask, bias, tensors, y, threads)`` of the native block, which says whether it took the tensors; None without one."""
    if not (native.reads_tensors and hasattr(native._C, "Block")):
        return None
    own = parse_block(form)
    kinds = {product: name for product, name, _ in own.parsed()}
    if not set(kinds.values()) <= set(_KINDS):
        return None
    numbers = [_KINDS.index(kinds[product]) if product in kinds else -1 for product in PRODUCTS]
    block = native._C.Block(
        own.heads, own.head_size, own.scale, own.pre_norm, own.norm == "rms_norm", *own.eps, ACTIVATIONS[own.activation],
        own.causal, own.skip_padding, numbers,
    )  # fmt: skip
    run: Callable[..., bool] = block.run
    return run


def block(x: Tensor, mask: Tensor | None, bias: Tensor | None, tensors: Tensors, form: str) -> Tensor:
    """The native block; the twin where there is none, or it cannot read these tensors."""
    run = run_of(form)
    if run is not None:
        x = x.contiguous()
        y = torch.empty_like(x)
        if run(x, mask, bias, tensors, y, torch.get_num_threads()):
            return y
    return twin(x, mask, bias, tensors, form)


def twin(x: Tensor, mask: Tensor | None, bias: Tensor | None, tensors: Tensors, form: str) -> Tensor:
    """The same in torch's operators, of our layers' products; rounded to x's dtype at the end."""
    own = parse_block(form)
    products = {}
    for product, name, parsed in own.parsed():
        at = 2 * PRODUCTS.index(product)
        products[product] = _product(name, parsed, tensors[at], tensors[at + 1])
    at = 2 * len(PRODUCTS)
    norms = [(tensors[at], tensors[at + 1]), (tensors[at + 2], tensors[at + 3])]
    return reference.block(x.float(), mask, bias, products, norms, own).to(x.dtype)


def _product(name: str, form: Form, weight: Tensor | None, bias: Tensor | None) -> Callable[[Tensor], Tensor]:
    if name == "dense":
        assert weight is not None
        return partial(linear, weight=weight, bias=bias)
    op = getattr(torch.ops.pycompress, f"{name}_linear").default
    return lambda x: op(x, weight, str(form), bias, "none")


def check_block(x: Tensor, mask: Tensor | None, bias: Tensor | None, tensors: Tensors, form: str) -> None:
    """Raises TypeError or ValueError where what came is not what the form says."""
    check_float("block", x)
    own = parse_block(form)
    forms = {product: (name, parsed) for product, name, parsed in own.parsed()}
    d = forms["query"][1].k
    check(x.dim() == 3 and x.shape[-1] == d, f"block: x is {list(x.shape)}, expected [batch, length, {d}]")
    count = 2 * (len(PRODUCTS) + len(NORMS))
    check(len(tensors) == count, f"block: there are {len(tensors)} tensors, expected {count}")
    for i, product in enumerate(PRODUCTS):
        weight, shift = tensors[2 * i : 2 * i + 2]
        if product not in forms:
            check(weight is None and shift is None, f"block: there is a {product}, expected None: the form has none")
            continue
        name, parsed = forms[product]
        _check_weight(product, name, parsed, weight)
        _check_vector(f"the bias of {product}", shift, parsed.n)
    for i, norm in enumerate(NORMS, len(PRODUCTS)):
        weight, shift = tensors[2 * i : 2 * i + 2]
        _check_vector(f"the weight of {norm}", weight, d)
        _check_vector(f"the shift of {norm}", shift, d)
        check(shift is None or own.norm == "layer_norm", f"block: {norm} has a shift, expected None of a rms_norm")
    batch, length = x.shape[:2]
    for name, tensor in (("mask", mask), ("bias", bias)):
        if tensor is None:
            continue
        floats = "bool or a float dtype" if name == "mask" else "a float dtype"
        known = tensor.dtype in _FLOATS or (name == "mask" and tensor.dtype == torch.bool)
        check(known, f"block: {name} is {tensor.dtype}, expected {floats}")
        target = (batch, own.heads, length, length)
        fits = tensor.dim() <= 4 and all(
            have in (1, want) for have, want in zip(reversed(tensor.shape), reversed(target), strict=False)
        )
        check(fits, f"block: {name} is {list(tensor.shape)}, expected it broadcastable to {list(target)}")


def _check_weight(product: str, name: str, form: Form, weight: Tensor | None) -> None:
    if name == "dense":
        fits = weight is not None and weight.dtype == torch.float32 and weight.shape == (form.n, form.k)
        fits = fits and weight is not None and (weight.stride(1) == 1 or form.k == 1)
        expected = f"torch.float32 {[form.n, form.k]} with dense rows"
    else:
        fits = weight is not None and weight.dtype == torch.uint8 and weight.dim() == 1 and weight.is_contiguous()
        expected = f"the dense torch.uint8 vector that was packed as {name}"
    check(fits, f"block: the weight of {product} is {_said(weight)}, expected {expected}")


def _check_vector(what: str, tensor: Tensor | None, n: int) -> None:
    fits = tensor is None or (tensor.dtype == torch.float32 and tensor.shape == (n,) and tensor.is_contiguous())
    check(fits, f"block: {what} is {_said(tensor)}, expected a dense torch.float32 {[n]} or None")


def _said(tensor: Tensor | None) -> str:
    return "None" if tensor is None else f"{tensor.dtype} {list(tensor.shape)}"
