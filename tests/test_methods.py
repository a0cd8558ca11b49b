"""Int8().compress: the canonical rules of the weights, and what is refused."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import pycompress as pc
from pycompress.methods.int8 import Int8
from pycompress.profiles import Profile
from pycompress.weights import Int8Weight

TOP = {7: 63, 8: 127}
TINY = torch.finfo(torch.float32).tiny


@pytest.mark.parametrize("bits", [7, 8])
@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (40, 48), (17, 1)])
def test_symmetric_per_row(bits: int, shape: tuple[int, int]) -> None:
    w = torch.randn(shape) * torch.logspace(-6, 6, shape[0])[:, None]
    weight = Int8(weight_bits=bits).compress(w)
    top = TOP[bits]
    assert weight.values.dtype == torch.int8
    assert weight.scale.dtype == torch.float32
    assert (weight.weight_bits, weight.activation_bits) == (bits, 8)
    rms = w.double().square().mean(1).sqrt()
    expected = torch.maximum(w.double().abs().amax(1), rms * 127 / 34) / top
    torch.testing.assert_close(weight.scale.double(), expected, rtol=2**-22, atol=0)
    exact = (w.double() / weight.scale.double()[:, None]).round().clamp(-top, top)
    # The quotient is rounded to float32 before it is rounded to an integer, which can only tip a near tie.
    off = exact != weight.values
    tie = ((w.double() / weight.scale.double()[:, None]).abs() % 1 - 0.5).abs()
    assert (tie[off] < top * 2**-23).all()


@pytest.mark.parametrize("bits", [7, 8])
def test_error_at_most_half_a_step(bits: int) -> None:
    w = torch.randn(64, 300)
    weight = Int8(weight_bits=bits).compress(w)
    error = (weight.decompress().double() - w.double()).abs()
    # Half a step, and the roundings of scale, quotient and product: three times half an ulp of the largest weight.
    assert (error <= weight.scale.double()[:, None] * (0.5 + 3 * TOP[bits] * 2**-24)).all()


def test_rounds_half_to_even() -> None:
    w = torch.zeros(1, 40)
    w[0, :7] = torch.tensor([127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5])
    weight = Int8().compress(w)
    assert weight.scale.tolist() == [1.0]
    assert weight.values[0, :7].tolist() == [127, 0, 2, 2, 0, -2, -2]


@pytest.mark.parametrize("bits", [7, 8])
def test_a_row_with_an_outlier_takes_the_whole_range(bits: int) -> None:
    w = torch.randn(8, 100)
    w[:, 3] = 50.0
    weight = Int8(weight_bits=bits).compress(w)
    assert (weight.values[:, 3] == TOP[bits]).all()
    assert torch.equal(weight.scale, torch.full((8,), 50.0) / TOP[bits])


@pytest.mark.parametrize("bits", [7, 8])
def test_seven_bit_activations_leave_every_row_the_whole_range(bits: int) -> None:
    """Their products leave room for any weights, so no row gets coarser steps than it needs."""
    w = torch.rand(16, 300) - 0.5
    weight = Int8(activation_bits=7, weight_bits=bits).compress(w)
    assert torch.equal(weight.scale, w.abs().amax(1) / TOP[bits])
    assert (weight.values.abs().amax(1) == TOP[bits]).all()


@pytest.mark.parametrize("bits", [7, 8])
def test_rows_that_fill_their_range_stay_below_a_root_mean_square(bits: int) -> None:
    """So that pairs of weights fit the 16-bit lanes of the AVX2 kernels."""
    for w in (torch.rand(16, 300) - 0.5, torch.ones(16, 300), torch.randn(16, 300)):
        integers = Int8(weight_bits=bits).compress(w).values.double()
        assert (integers.square().mean(1).sqrt() <= 34 * TOP[bits] / 127 + 0.5).all()


def test_fit() -> None:
    """A profile of its own, or none: each row takes the whole range."""
    w = torch.rand(16, 300) - 0.5
    assert torch.equal(Int8(fit="none").compress(w).values, Int8(7).compress(w).values)
    assert Int8() == Int8(fit="avx2") != Int8(fit="none")
    assert torch.equal(
        Int8(fit="avx2").compress(w).values, Int8(fit=Profile("mine", largest_rms=34 / 127)).compress(w).values
    )
    tight = Int8(fit=Profile("mine", largest_rms=0.1)).compress(w).values.double()
    assert (tight.square().mean(1).sqrt() <= 12.7 + 0.5).all()
    assert repr(Int8(7)) == "Int8(activation_bits=7, weight_bits=8)"
    assert repr(Int8(fit="none")) == "Int8(activation_bits=8, weight_bits=8, fit='none')"


def test_rows_of_zeros() -> None:
    w = torch.randn(4, 8)
    w[1], w[3] = 0.0, -0.0
    weight = Int8().compress(w)
    assert (weight.scale > 0).all()
    assert not weight.values[[1, 3]].any()
    assert torch.equal(weight.decompress()[1], torch.zeros(8))


@pytest.mark.parametrize("largest", [1e-45, 1e-40, TINY, 100 * TINY, 126 * TINY, 128 * TINY, 1e-30, 3e38])
def test_extreme_rows(largest: float) -> None:
    w = torch.tensor([[largest, -largest, largest / 2, 0.0]])
    weight = Int8().compress(w)
    assert ((weight.scale >= TINY) & torch.isfinite(weight.scale)).all()
    assert torch.isfinite(weight.decompress()).all()
    error = (weight.decompress().double() - w.double()).abs().max()
    if weight.values.any():
        assert error <= float(weight.scale) * 0.501, "half a step"
    else:
        assert error <= 127 * TINY


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_float_dtypes(dtype: torch.dtype) -> None:
    w = torch.randn(8, 16).to(dtype)
    weight, expected = Int8().compress(w), Int8().compress(w.float())
    assert torch.equal(weight.values, expected.values)
    assert torch.equal(weight.scale, expected.scale)


def test_non_contiguous_and_parameters() -> None:
    w = torch.nn.Parameter(torch.randn(16, 8))
    transposed = w.T
    weight = Int8().compress(transposed)
    assert torch.equal(weight.values, Int8().compress(transposed.detach().contiguous()).values)
    assert not weight.scale.requires_grad


def test_does_not_write_to_the_weight() -> None:
    w = torch.randn(8, 16)
    before = w.clone()
    Int8().compress(w)
    assert torch.equal(w, before)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_nan_and_inf_are_refused(value: float) -> None:
    w = torch.randn(4, 8)
    w[2, 3] = value
    with pytest.raises(ValueError, match=r"\[4, 8\].*holds 1 NaN or Inf"):
        Int8().compress(w)


def test_a_float64_weight_beyond_float32_is_refused() -> None:
    with pytest.raises(ValueError, match="NaN or Inf"):
        Int8().compress(torch.full((2, 2), 1e300, dtype=torch.float64))


@pytest.mark.parametrize(
    "weight", [torch.randn(8), torch.randn(2, 3, 4), torch.tensor(1.0), torch.ones(2, 2, dtype=torch.int32)]
)
def test_not_a_matrix_of_floats(weight: Tensor) -> None:
    with pytest.raises(TypeError, match="expected floating point"):
        Int8().compress(weight)


def test_complex_weight() -> None:
    with pytest.raises(TypeError, match="complex64"):
        Int8().compress(torch.ones(2, 2, dtype=torch.complex64))


def test_meta_weight() -> None:
    with pytest.raises(ValueError, match="meta device"):
        Int8().compress(torch.empty(2, 2, device="meta"))


@pytest.mark.parametrize("shape", [(0, 4), (4, 0)])
def test_empty_weights_compress_to_empty_ones(shape: tuple[int, int]) -> None:
    weight = Int8().compress(torch.empty(shape))
    assert weight.values.shape == shape
    assert weight.decompress().shape == shape


@pytest.mark.parametrize(("field", "expected"), [("activation_bits", "7, 8 or 16"), ("weight_bits", "7 or 8")])
@pytest.mark.parametrize("bits", [0, 4, 6, 9, 32, -8, 8.0, 16.0, True, None, "8"])
def test_number_of_bits(field: str, expected: str, bits: object) -> None:
    with pytest.raises(ValueError, match=f"{field} is {bits!r}, expected {expected}"):
        Int8(**{field: bits})
    settings = {"activation_bits": 8, "weight_bits": 8, field: bits}
    with pytest.raises(ValueError, match=f"Int8Weight: {field} is {bits!r}, expected {expected}"):
        Int8Weight.expected((2, 3), settings)


@pytest.mark.parametrize("bits", [7, 8])
def test_weight_only(bits: int) -> None:
    """Activations in floating point: the integers of 7-bit activations, which leave every row the whole range."""
    w = torch.rand(16, 300) - 0.5
    weight, seven = Int8(16, bits).compress(w), Int8(7, bits).compress(w)
    assert weight.activation_bits == 16
    assert torch.equal(weight.values, seven.values)
    assert torch.equal(weight.scale, seven.scale)
    settings = weight.settings()
    assert settings == {"activation_bits": 16, "weight_bits": bits}
    again = Int8Weight.from_tensors((16, 300), weight.tensors(), settings)
    assert torch.equal(again.decompress(), weight.decompress())
    with pytest.raises(ValueError, match="weight_bits is 16"):
        Int8(weight_bits=16)


def test_method_is_a_value() -> None:
    assert Int8.name == "int8"
    assert pc.Int8 is Int8
    assert Int8() == Int8(activation_bits=8, weight_bits=8)
    assert hash(Int8(7)) == hash(Int8(7))
    with pytest.raises(AttributeError):
        Int8().activation_bits = 7  # type: ignore[misc]


def test_a_good_canonical_weight() -> None:
    values = torch.tensor([[-127, 0, 127], [1, 2, 3]], dtype=torch.int8)
    weight = Int8Weight(values, torch.tensor([2.0, 0.5]), 8, 8)
    assert torch.equal(weight.decompress(), torch.tensor([[-254.0, 0.0, 254.0], [0.5, 1.0, 1.5]]))
    with pytest.raises(AttributeError):
        weight.values = values  # type: ignore[misc]
