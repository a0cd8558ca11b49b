"""The op ``pool``: a sentence as the mean of its tokens, and its direction."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from isa import isa  # noqa: F401
from torch import Tensor
from torch.nn.functional import normalize

from pycompress import ops
from pycompress.ops import cpu

pytestmark = pytest.mark.usefixtures("isa")

Same = Callable[[Tensor, Tensor], bool]
FLOATS = [torch.float32, torch.bfloat16, torch.float16]


def mask_of(batch: int, length: int) -> Tensor:
    return torch.arange(length) < torch.randint(0, length + 1, (batch, 1))


def exact(x: Tensor, mask: Tensor | None, unit: bool) -> Tensor:
    chosen = torch.ones(x.shape[:2]) if mask is None else mask
    wide = (x.double() * chosen[..., None].double()).sum(1) / chosen.double().sum(1, keepdim=True).clamp(min=1e-9)
    return normalize(wide, dim=1) if unit else wide


@pytest.mark.parametrize("d", [1, 7, 32, 67, 384])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("unit", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_close_to_float64(d: int, dtype: torch.dtype, unit: bool, masked: bool) -> None:
    """A rounding for every token and some more; of numbers of one sign, so that nothing is cancelled."""
    x, mask = (torch.rand(5, 9, d) + 0.1).to(dtype), mask_of(5, 9) if masked else None
    y, expected = ops.pool(x, mask, unit), exact(x, mask, unit)
    assert (y.dtype, y.shape) == (dtype, (5, d))
    steps = (
        (9 + 4) * 2.0**-23 + (d * 2.0**-23 if unit else 0) + (0 if dtype == torch.float32 else torch.finfo(dtype).eps)
    )
    assert ((y.double() - expected).abs() <= steps * expected.abs() + 1e-7 * (dtype == torch.float16)).all()


def test_every_kernel_and_thread_count_gives_the_same_bits(same: Same, two_threads: None) -> None:
    x, mask = torch.randn(7, 80, 97), mask_of(7, 80)
    for unit in (False, True):
        with ops.capped("scalar"):
            expected = ops.pool(x, mask, unit)
        for row in ops.kernels():
            if row["op"] == "pool" and row["available"]:
                for threads in (1, 2, 3):
                    torch.set_num_threads(threads)
                    with ops.forced("pool", row["name"]):
                        assert same(ops.pool(x, mask, unit), expected), (row["name"], threads)


def test_x_and_masks_of_any_strides_and_dtypes(same: Same) -> None:
    x, mask = torch.randn(4, 6, 24), mask_of(4, 6)
    expected = ops.pool(x, mask)
    for name, one in {
        "[length, batch, d]": x.transpose(0, 1).contiguous().transpose(0, 1),
        "inside wider rows": torch.nn.functional.pad(x, (3, 2))[..., 3:-2],
        "not dense": x.transpose(1, 2).contiguous().transpose(1, 2),
        "a negative view": torch._neg_view(-x),
    }.items():
        assert same(ops.pool(one, mask), expected), name
    for one in (mask.int(), mask.long(), mask.float(), mask.double(), mask.to(torch.int8), mask.T.contiguous().T):
        assert same(ops.pool(x, one), expected), one.dtype
    assert same(ops.pool(x, torch.ones(1, 1).expand(4, 6)), ops.pool(x))


def test_weights_that_are_no_choice() -> None:
    x, mask = torch.randn(3, 5, 16), torch.rand(3, 5)
    torch.testing.assert_close(ops.pool(x, mask).double(), exact(x, mask, False), rtol=1e-5, atol=1e-6)


def test_nothing_chosen_gives_zeros_and_nothing_is_hidden() -> None:
    x = torch.randn(2, 3, 16)
    x[1, 2, 5] = torch.nan
    y = ops.pool(x, torch.tensor([[0, 0, 0], [1, 1, 0]]), True)
    assert not y[0].any()
    assert y[1].isnan().all()
    assert ops.pool(x, torch.tensor([[0, 0, 0], [1, 1, 0]]))[1].isnan().nonzero().tolist() == [[5]]


@pytest.mark.parametrize("size", [(0, 3, 8), (2, 0, 8), (2, 3, 0)])
def test_empty(size: tuple[int, int, int]) -> None:
    y = ops.pool(torch.ones(size), torch.ones(size[:2]), True)
    assert y.shape == (size[0], size[2])
    assert not y.any()


def test_refusals() -> None:
    with pytest.raises(ValueError, match=r"x is \[3, 4\], expected \[batch, length, d\]"):
        ops.pool(torch.ones(3, 4))
    with pytest.raises(TypeError, match="x is torch"):
        ops.pool(torch.ones(2, 3, 4).long())
    with pytest.raises(ValueError, match=r"mask is \[2, 4\], expected \[2, 3\]"):
        ops.pool(torch.ones(2, 3, 4), torch.ones(2, 4))


def test_gradients_are_those_of_torch() -> None:
    x, mask = torch.randn(3, 5, 8, requires_grad=True), mask_of(3, 5)
    (expected,) = torch.autograd.grad(exact(x, mask, True).float()[:, 0].sum(), x)
    torch.testing.assert_close(torch.autograd.grad(ops.pool(x, mask, True)[:, 0].sum(), x)[0], expected)


def test_opcheck() -> None:
    torch.library.opcheck(torch.ops.pycompress.pool.default, (torch.randn(2, 5, 12), mask_of(2, 5), True))
    torch.library.opcheck(torch.ops.pycompress.pool.default, (torch.randn(2, 5, 12).half(), None, False))


def test_without_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    x, mask = torch.randn(2, 5, 12), mask_of(2, 5)
    expected = ops.pool(x, mask, True)
    monkeypatch.setattr(cpu.native, "reads_tensors", False)
    torch.testing.assert_close(ops.pool(x, mask, True), expected)
