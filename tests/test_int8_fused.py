"""int8_fused_linear: what it computes in front of the layer, on the CPU; tests/test_cuda.py has the device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from packing import pack_int8
from torch import Tensor, nn

from pycompress import ops
from pycompress.ops import cpu
from pycompress.ops.int8_fused import BEFORE

K, N = 40, 24
Same = Callable[[Tensor, Tensor], bool]


def case(before: str, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, dict[str, Any], Tensor]:
    """x, the operands of what stands in front, and what it makes of x in float64."""
    generator = torch.Generator().manual_seed(seed)
    x, gate = (torch.randn(2, 5, K, generator=generator).to(dtype) for _ in range(2))
    weight, shift = (torch.randn(K, generator=generator).to(dtype) for _ in range(2))
    wide, g = x.double(), gate.double()
    if before == "rms_norm":
        wide = wide / (wide.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight.double()
        return x, {"weight": weight}, wide
    if before == "layer_norm":
        wide = nn.functional.layer_norm(wide, (K,), weight.double(), shift.double(), 1e-5)
        return x, {"weight": weight, "shift": shift}, wide
    act = {
        "silu_gate": nn.functional.silu,
        "gelu_gate": nn.functional.gelu,
        "gelu_tanh_gate": lambda v: nn.functional.gelu(v, approximate="tanh"),
    }[before]
    return x, {"gate": gate}, act(g) * wide


@pytest.fixture
def weight() -> tuple[Tensor, Tensor, Tensor]:
    """int8 values, their scale, a bias."""
    return torch.randint(-127, 128, (N, K), dtype=torch.int8), torch.rand(N) + 0.5, torch.randn(N)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("before", BEFORE)
def test_it_is_the_layer_behind_what_stands_in_front(
    before: str, dtype: torch.dtype, weight: tuple[Tensor, Tensor, Tensor]
) -> None:
    """Against float64: a step of the quantizer, and the roundings to x's dtype, times the weights."""
    values, scale, bias = weight
    x, operands, expected = case(before, dtype)
    y = ops.int8_fused_linear(x, before, *pack_int8(values, 8, scale), bias, **operands)
    dense = values.double() * scale[:, None].double()
    eps = torch.finfo(dtype).eps
    step = (expected.amax(-1).clamp(min=0) - expected.amin(-1).clamp(max=0)) / 255
    reach = (expected.abs() * 4 * eps + step[..., None] * 1.01) @ dense.abs().T
    wide = expected @ dense.T + bias.double()
    assert y.dtype == dtype
    assert ((y.double() - wide).abs() <= reach + 2 * eps * wide.abs() + 1e-4).all()


@pytest.mark.parametrize("before", BEFORE)
def test_opcheck(before: str, weight: tuple[Tensor, Tensor, Tensor]) -> None:
    values, scale, bias = weight
    x, operands, _ = case(before, torch.float32)
    given = [operands.get(name) for name in ("weight", "shift")]
    torch.library.opcheck(
        torch.ops.pycompress.int8_fused_linear.default,
        (x, before, *given, 1e-5, operands.get("gate"), *pack_int8(values, 8, scale), bias, "silu"),
    )


def test_norms_without_weights(same: Same, weight: tuple[Tensor, Tensor, Tensor]) -> None:
    values, scale, _ = weight
    x, packed = torch.randn(3, K), pack_int8(values, 8, scale)
    normed = nn.functional.rms_norm(x, (K,), None, 1e-5)
    assert same(ops.int8_fused_linear(x, "rms_norm", *packed), ops.int8_linear(normed, *packed))
    normed = nn.functional.layer_norm(x, (K,), None, None, 1e-5)
    assert same(ops.int8_fused_linear(x, "layer_norm", *packed), ops.int8_linear(normed, *packed))


@pytest.mark.parametrize(
    ("before", "operands", "message"),
    [
        ("norm", {}, "before is 'norm', expected one of rms_norm"),
        ("silu_gate", {}, "silu_gate needs a gate"),
        ("rms_norm", {"gate": torch.ones(3, K)}, "rms_norm takes no gate"),
        ("rms_norm", {"shift": torch.ones(K)}, "rms_norm takes no shift"),
        ("gelu_gate", {"weight": torch.ones(K), "gate": torch.ones(3, K)}, "gelu_gate takes no weight"),
        ("layer_norm", {"weight": torch.ones(K + 1)}, r"weight is .*41.*, expected torch.float32 \[40\]"),
        ("silu_gate", {"gate": torch.ones(3, K, dtype=torch.float16)}, "expected torch.float32"),
    ],
)
def test_what_does_not_fit_is_refused(
    before: str, operands: dict[str, Tensor], message: str, weight: tuple[Tensor, Tensor, Tensor]
) -> None:
    values, scale, _ = weight
    with pytest.raises(ValueError, match=message):
        ops.int8_fused_linear(torch.randn(3, K), before, *pack_int8(values, 8, scale), **operands)  # type: ignore[arg-type]


@pytest.mark.parametrize("before", BEFORE)
def test_derivatives_and_autocast_are_those_of_both(
    before: str, weight: tuple[Tensor, Tensor, Tensor], same: Same
) -> None:
    values, scale, bias = weight
    x, operands, _ = case(before, torch.float32)
    packed, form = pack_int8(values, 8, scale)
    given = {name: operand.requires_grad_() for name, operand in {"x": x, **operands}.items()}

    def apart(x: Tensor, **operands: Tensor) -> Tensor:
        weight, shift, gate = (operands.get(name) for name in ("weight", "shift", "gate"))
        front = cpu.int8.before_layer(x, before, weight, shift, 1e-5, gate)
        return ops.int8_linear(front, packed, form, bias, "gelu")

    def fused(x: Tensor, **operands: Tensor) -> Tensor:
        return ops.int8_fused_linear(x, before, packed, form, bias, "gelu", **operands)

    assert same(fused(**given), apart(**given))
    found, expected = (torch.autograd.grad(f(**given).square().sum(), list(given.values())) for f in (fused, apart))
    torch.testing.assert_close(found, expected)
    rest = {name: operand.detach() for name, operand in operands.items()}
    along, right = (
        torch.func.jvp(lambda x, f=f: f(x, **rest), (x.detach(),), (x.detach() + 1,))[1] for f in (fused, apart)
    )
    torch.testing.assert_close(along, right)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        y = fused(**given)
        assert y.dtype == torch.bfloat16 and same(y, apart(**given))
