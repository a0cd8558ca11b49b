"""What every op refuses, with a message that says what came, and what was expected; and that no buffer brings it down."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from packing import backend, backends  # noqa: F401
from torch import Tensor

from contract.packed import CASES, FEW, Case, K, everywhere, gathered, over
from pycompress import ops

Sample = Callable[[Sequence[Any], int], Sequence[Any]]
Change = Callable[[Tensor], Tensor]
Forked = Callable[..., Any]


@everywhere
def test_sizes_and_names_that_do_not_fit(case: Case) -> None:
    (packed, form, bias), x, name = case.made(), torch.randn(3, K), f"{case.name}_linear"
    linear, others = case.op.linear, case.others(form)
    for shape, seen in (((3, 100), "3, 100"), ((0, 100), "0, 100"), ((3, 0), ".*")):
        with pytest.raises(ValueError, match=rf"{name}: x is \[{seen}\], the packed weight expects k = {K}"):
            linear(torch.ones(shape), packed, form)
    scalar = case.made(4, 1)
    with pytest.raises(ValueError, match=f"{name}: x is a scalar"):
        linear(torch.tensor(1.0), *scalar)
    for activation in ("", "RELU", "tanh", "none "):
        with pytest.raises(
            ValueError, match=f"{name}: activation is '{activation}', expected one of none, relu, gelu, "
        ):
            linear(x, packed, form, None, activation)
    biases: list[Change] = [
        lambda b: b[:-1], lambda b: torch.cat([b, b]), lambda b: b[:0], lambda b: b[:, None], lambda b: b.sum(),
        lambda b: b.double(), lambda b: b.half(), lambda b: torch.stack([b, b], 1)[:, 0],
    ]  # fmt: skip
    for change in biases:
        with pytest.raises(ValueError, match=rf"{name}: bias is .*expected"):
            linear(x, packed, form, change(bias))
    with pytest.raises(ValueError, match=rf"{name}: bias is \[25\], expected \[24\]"):
        linear(x, packed, form, torch.ones(25))
    with pytest.raises(ValueError, match=rf"{name}: packed is torch.float32 .* from {case.name}_pack"):
        linear(x, packed.float(), form)
    for other, function in others.items():
        for shape in ((K,), (2, 3, K), ()):
            with pytest.raises(ValueError, match=f"{other}: x is"):
                function(torch.ones(shape), packed, form)
        if other != "int8_quantize":
            with pytest.raises(ValueError, match=f"the packed weight expects k = {K}"):
                function(torch.ones(3, 100), packed, form)


@everywhere
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_wrong_dtypes(case: Case, device: str) -> None:
    packed, form, _ = case.made()
    for dtype in (torch.int32, torch.int8, torch.uint8, torch.bool, torch.float64, torch.complex64):
        x = torch.ones(3, K, dtype=dtype, device=device)
        with pytest.raises(TypeError, match=f"{case.name}_linear: x is {dtype}, expected float32, bfloat16 or float16"):
            case.op.linear(x, packed.to(device), form)
        for name, function in case.others(form).items() if device == "cpu" else ():
            with pytest.raises(TypeError, match=f"{name}: x is {dtype}"):
                function(x, packed, form)


@everywhere
def test_missing_parts_and_settings(case: Case) -> None:
    w = case.weight(20, 30)
    parts, settings, given = w.parts(), w.settings(), {"layout": case.layout}
    expected = case.pack(w)[0]
    for name in parts:
        rest = {other: part for other, part in parts.items() if other != name}
        if not name.endswith("zero_point"):  # without it all are 8
            with pytest.raises(ValueError, match=name.removeprefix("residual_")):
                ops.pack(case.name, rest, w.shape, settings, **given)
    for name in settings:
        rest = {other: value for other, value in settings.items() if other != name}
        try:
            packed, _ = ops.pack(case.name, parts, w.shape, rest, **given)
        except ValueError as error:
            refused = str(error)
        else:
            refused = name * torch.equal(packed, expected)  # it is not needed
        assert name in refused
    for n, k in ((21, 30), (19, 30), (20, 48)):
        with pytest.raises(ValueError, match=r"_pack: .*expected"):
            ops.pack(case.name, parts, (n, k), settings, **given)
    with pytest.raises(
        RuntimeError, match=f"{case.name}_pack: the tensors are on meta, expected all of them on the CPU"
    ):
        ops.pack(case.name, parts, w.shape, settings, "meta")


# --- packed buffers that no pack made -------------------------------------------------------------------------------------


def uses(case: Case, packed: Tensor, form: str) -> dict[str, Callable[[], Any]]:
    x, others = torch.ones(3, ops.parse(form).k), case.others(form)
    if case.name == "int8":
        others = {"int8_depths": lambda _x, packed, form: ops.int8_depths(packed, form), **others}
    others.pop("int8_quantize", None)
    return {
        "linear": lambda: case.op.linear(x, packed, form),
        "one row": lambda: case.op.linear(x[:1], packed, form),
        "unpack": lambda: case.op.unpack(packed, form),
        "dense": lambda: case.op.dense(packed, form),
        **{name: lambda function=function: function(x, packed, form) for name, function in others.items()},  # type: ignore[misc]
    }


def outcomes(case: Case, packed: Tensor, form: str) -> dict[str, str]:
    """What each use of the buffer did: the name of its exception, or 'result'."""
    found = {}
    for name, use in uses(case, packed, form).items():
        try:
            use()
            found[name] = "result"
        except (ValueError, RuntimeError) as error:
            found[name] = type(error).__name__
    return found


def same_size(size: int) -> dict[str, Tensor]:
    noise = torch.randint(0, 256, (size,), dtype=torch.uint8)
    return {f"{size} zeros": torch.zeros_like(noise), f"{size} random bytes": noise}


def hostile(case: Case, packed: Tensor) -> dict[str, Tensor]:
    """What could come in the place of a packed weight [24, 40]."""
    size = len(packed)
    return {
        **{f"the first {length} bytes": packed[:length] for length in (0, 1, 7, 8, 40, 63, 64, 65, size // 2, size - 1)},
        **{name: other for length in (16, 64, 1000) for name, other in same_size(length).items()},
        **({} if case.in_torch else same_size(size)),
        "one byte more": torch.cat([packed, packed[:1]]), "too long": torch.cat([packed, packed]),
        "shifted": torch.cat([packed[:1], packed]), "float32": packed.float(), "two dimensions": packed[None],
        "int32 view": packed[: size // 4 * 4].clone().view(torch.int32),
        "every second byte": torch.stack([packed, packed], 1).flatten()[::2],
        "a matrix": torch.stack([packed, packed], 1),
        **{f"of {other}": other.made(24, 40)[0] for other in FEW if other.name != case.name},
    }  # fmt: skip


def headers(packed: Tensor, form: str) -> list[int]:
    """Where the bytes lie that a kernel trusts: at the start, and at that of a residual."""
    found = {*range(min(144, len(packed)))}
    if " + " in form and " residual=dense" not in form:
        inner = ops.low_rank_residual(packed, form)[0]
        start = max(bytes(packed.numpy()).find(bytes(inner.numpy())[:24]), 0)
        found |= {*range(start, start + 128)}
    return sorted(found)


@over(CASES)
def test_buffers_that_no_pack_made(case: Case, forked: Forked, sample: Sample) -> None:
    """A packed buffer is made by this process, but an exported program may carry one in a file: an error, never a crash."""

    def run() -> dict[str, dict[str, str]]:
        torch.set_num_threads(1)  # torch's own products hang in a forked child
        for position, value in itertools.product(sample(headers(packed, form), 8), (1, 0x7F, 0xFF)):
            edited = packed.clone()
            edited[position] = value
            outcomes(case, edited, form)
        return {name: outcomes(case, buffer, form) for name, buffer in broken.items()}

    for name in sample(case.backends, 2):
        with backends(name):
            packed, form, _ = case.made(24, 40)
            broken = hostile(case, packed)
            for what, found in forked(run).items():
                assert set(found.values()) == {"ValueError"}, (name, what, found)


def altered(form: str) -> list[tuple[str, str]]:
    """(key, a form that says something else of it)."""
    own = ops.parse(form)
    other: dict[str, Callable[[int], list[int]]] = {
        "n": lambda n: [n - 1, n + 1, 2 * n], "k": lambda k: [k - 8, k + 1], "nnz": lambda _: [1], "rank": lambda r: [r + 1],
        "bits": lambda bits: [40 - bits], "group": lambda group: [64 if group != 64 else 32],
        "symmetric": lambda symmetric: [1 - symmetric], "activation_bits": lambda bits: [15 - bits if 6 < bits < 9 else 7],
    }  # fmt: skip
    values = {"n": own.n, "k": own.k, **own.keys}
    return [
        (key, form.replace(f" {key}={values[key]}", f" {key}={value}", 1))
        for key in values.keys() & other for value in other[key](int(values[key]))
    ]  # fmt: skip


@over(CASES)
def test_a_form_that_is_not_the_buffers(case: Case, forked: Forked, sample: Sample) -> None:
    """What is unpacked is as large as the form says, so it must be what the buffer holds; nothing is read that is not there."""

    def run() -> list[str]:
        torch.set_num_threads(1)
        wrong, right = [], {name: gathered(use()) for name, use in uses(case, packed, form).items()}
        for what, other in [*altered(form), *theirs]:
            for name, use in uses(case, packed, other).items():
                try:
                    result = gathered(use())
                except (ValueError, RuntimeError):
                    continue
                except AttributeError as error:
                    if "has no key" in str(error):  # the form of another weight
                        continue
                    raise
                if what in {"n", "k"} or not all(itertools.starmap(_equal, zip(result, right[name], strict=True))):
                    wrong.append(f"{name} with {other}, not {form}")
        return wrong

    theirs = [(str(other), other.made(24, 40)[1]) for other in FEW if other.name != case.name]
    for name in sample(case.backends, 2):
        with backends(name):
            packed, form, _ = case.made(24, 40)
            assert not forked(run)


def _equal(a: Any, b: Any) -> bool:
    return torch.equal(a, b) if isinstance(a, Tensor) else bool(a == b)


@over(FEW)
def test_tensors_on_another_device_are_refused(case: Case, forked: Forked) -> None:
    """A meta tensor has no memory, so reading it would be a crash. (All of them on meta have a fake result.)"""
    packed, form, _ = case.made(24, 40)

    def run() -> dict[str, str]:
        nowhere = torch.ones(24, device="meta")
        calls = uses(case, packed.to("meta"), form)
        calls["bias"] = lambda: case.op.linear(torch.ones(3, 40), packed, form, nowhere)
        found = {}
        for name, call in calls.items():
            try:
                call()
                found[name] = "result"
            except (ValueError, RuntimeError, NotImplementedError):
                found[name] = "refused"
        return found

    found = forked(run)
    assert {name for name, what in found.items() if what == "result"} == {"unpack", "dense"}, found
