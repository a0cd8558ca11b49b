"""calibrate(): only what a plan needs, in float32 blocks whose error is bounded, kept on disk, saved, loaded and described."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import pycompress as pc
from pycompress.calibration import Calibration, products
from pycompress.calibration.sums import Sums
from pycompress.methods import InputStatistics, Int4, Int8, LowRank
from pycompress.methods.method import needs_of


def seen(rows: Tensor, **options: Any) -> InputStatistics:
    """Of a linear layer that met these rows."""
    return pc.calibrate(nn.Linear(rows.shape[1], 1).to(rows.dtype), [rows], **options)[""]


def relative_error(found: InputStatistics, rows: Tensor) -> float:
    """The largest error of the second moment's entries, over the roots of their diagonals."""
    exact = rows.double().T @ rows.double() / len(rows)
    root = exact.diagonal().sqrt().clamp(min=1e-300)
    return float(((found.moment("test", len(root)) - exact).abs() / root[:, None] / root).max())


# --- products -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 2, 95, 97, 200, 400])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_error_stays_in_its_bound(k: int, dtype: torch.dtype) -> None:
    """Rows of one sign and of very different features, in batches of any size."""
    rows = torch.rand(1500, k) * torch.logspace(-6, 6, k)
    model = nn.Linear(k, 1)
    found = pc.calibrate(model, rows.split([1, 700, 3, 511, 285]), dtype=dtype)[""]
    assert found.second_moment is not None and found.second_moment.dtype == dtype
    sums = 0 if dtype == torch.float64 else 8  # of blocks, and the division
    assert relative_error(found, rows) <= (products.BLOCK * products.BLOCKS + sums) * 2.0**-24
    assert relative_error(found, rows) <= 4e-6, "which is what it is, far below what it can be"


@pytest.mark.parametrize("k", [1, 3, 16, 33, 97, 384])
def test_the_same_bits_at_any_number_of_threads(k: int) -> None:
    rows, threads = torch.randn(1301, k), torch.get_num_threads()
    found = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            sums = Sums({0}, k, frozenset({"moments", "ranges"}), lambda k: torch.zeros(k, k, dtype=torch.float64))
            for some in rows.split(400):
                sums.add(some, float(some.abs().max()))
            found.append(sums.statistics())
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        for name, tensor in found[0].tensors().items():
            assert torch.equal(tensor, other.tensors()[name]), name


def test_the_tiles_cover_the_upper_triangle_once() -> None:
    for k in (1, 2, 95, 96, 97, 500):
        count = torch.zeros(k, k)
        for down, across in products.tiles(0, k):
            count[down, across] += 1
        assert bool((count.triu() == torch.ones(k, k).triu()).all())


@pytest.mark.parametrize("scale", [1e30, 1e-30, 1e19, 1e-22])
def test_squares_that_no_float32_holds(scale: float) -> None:
    """Outliers, and inputs so small that their squares would vanish."""
    rows = torch.randn(600, 5) * scale
    assert relative_error(seen(rows), rows) < 1e-6
    rows[:, 1:] /= scale  # one feature alone
    found = seen(rows)
    assert relative_error(found, rows) < 1e-6 if scale > 1 else bool((found.squares("test", 5)[1:] > 0).all())
    diagonal = seen(rows * scale if scale < 1 else rows, gather="diagonals").squares("test", 5)
    assert bool(torch.isfinite(diagonal).all())


def test_squares_that_no_float64_holds_are_an_error() -> None:
    model = nn.Sequential(nn.Linear(3, 1)).double()
    with pytest.raises(ValueError, match=r"the input of 0 holds 1e[+]200, whose square is too large for float64"):
        pc.calibrate(model, [torch.full((2, 3), 1e200, dtype=torch.float64)])


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("gather", ["moments", "diagonals", "ranges"])
def test_one_bad_number_among_many_is_an_error(bad: float, gather: str) -> None:
    rows = torch.randn(1200, 4)
    rows[700, 2] = bad
    with pytest.raises(ValueError, match="the input of the model holds NaN or Inf, expected finite values"):
        seen(rows, gather=gather)


@pytest.mark.parametrize("method", [LowRank(4, rank_guard=False), Int4()], ids=repr)
@pytest.mark.parametrize("what", ["dead", "duplicates", "one", "zeros", "outlier", "tiny"])
def test_degenerate_inputs_make_a_result(what: str, method: Any) -> None:
    torch.manual_seed(0)
    rows = torch.randn(1 if what == "one" else 50, 16)
    if what == "dead":
        rows[:, ::2] = 0
    elif what == "duplicates":
        rows[:, 8:] = rows[:, :8]
    elif what == "zeros":
        rows.zero_()
    elif what == "outlier":
        rows[7, 3] = 1e30
    elif what == "tiny":
        rows *= 1e-30
    model = nn.Sequential(nn.Linear(16, 16))
    made = pc.compress(model, method, calibration=pc.calibrate(model, [rows]))
    assert bool(torch.isfinite(made(torch.randn(3, 16))).all())


# --- parts ----------------------------------------------------------------------------------------------------------------


def test_what_is_gathered() -> None:
    rows = torch.randn(700, 6)
    exact = rows.double()
    square = exact.square().mean(dim=0)
    for gather in ("moments", "diagonals", "ranges", ("ranges", "diagonals"), ("moments", "diagonals")):
        found = seen(rows, gather=gather)
        parts = {gather} if isinstance(gather, str) else set(gather)
        assert set(found.gathered) == (parts - {"diagonals"} if "moments" in parts else parts)
        if parts & {"moments", "diagonals"}:
            torch.testing.assert_close(found.squares("test", 6), square, rtol=1e-6, atol=0)
            torch.testing.assert_close(found.mean, exact.mean(dim=0), rtol=0, atol=1e-6)
        if "ranges" in parts:
            low, high = found.range("test", 6)
            assert torch.equal(low, exact.amin(dim=0)) and torch.equal(high, exact.amax(dim=0))


def test_what_was_not_gathered_is_named() -> None:
    found = seen(torch.randn(9, 4), gather="ranges")
    with pytest.raises(ValueError, match="Int4: of the inputs ranges were gathered, expected moments"):
        Int4(inputs=found).compress(torch.randn(3, 4))
    with pytest.raises(ValueError, match="X: of the inputs ranges were gathered, expected diagonals"):
        found.squares("X", 4)
    with pytest.raises(ValueError, match="X: of the inputs moments were gathered, expected ranges"):
        seen(torch.randn(9, 4)).range("X", 4)
    for gather in ("all", (), ("moments", "more")):
        with pytest.raises(ValueError, match="expected one or several of moments, diagonals, ranges"):
            pc.calibrate(nn.Linear(4, 4), gather=gather)


class Squares:
    """A method that is content with mean squares."""

    name: ClassVar[str] = "sparse"
    needs: ClassVar[tuple[str, ...]] = ("diagonals",)

    def compress(self, weight: Tensor) -> Any:
        return pc.Sparse(0.5).compress(weight)


BY_MAGNITUDE = pc.Sparse(0.5, choose="magnitude")


def test_a_plan_says_what_is_gathered() -> None:
    model = nn.ModuleDict({name: nn.Linear(4, 4) for name in ("a", "b", "c", "d")})
    plan: dict[str, Any] = {"a": Squares(), "b": LowRank(2), "c": None, "*": BY_MAGNITUDE}
    with pc.calibrate(model, plan=plan) as found:
        for layer in model.values():
            layer(torch.randn(7, 4))
    assert {name: own.gathered for name, own in found.items()} == {"a": ("diagonals",), "b": ("moments",)}
    called: list[Tensor] = []
    batches = (called.append(x) or x for x in [torch.randn(2, 4)])  # type: ignore[func-returns-value]
    assert not pc.calibrate(nn.Sequential(nn.Linear(4, 4)), batches, plan=BY_MAGNITUDE)
    assert not called, "nothing is needed: the model is not run"
    with pytest.raises(ValueError, match="plan and gather='moments' were given"):
        pc.calibrate(model, plan=plan, gather="moments")
    with pytest.raises(TypeError, match=r"calibrate: the plan maps '[*]' to 3, expected a glob and a method"):
        pc.calibrate(model, plan=3)


def test_what_methods_need() -> None:
    assert needs_of(Squares()) == {"diagonals"}
    assert needs_of(LowRank(2)) == needs_of(Int4()) == needs_of(Int8()) == needs_of(pc.Sparse(0.5)) == {"moments"}
    assert needs_of(pc.Sparse(0.5, choose="wanda")) == {"diagonals"}
    assert needs_of(BY_MAGNITUDE) == frozenset()


def test_joined_parts() -> None:
    rows = torch.randn(40, 5)
    parts = [seen(some, gather=gather) for some in rows.split(20) for gather in [("diagonals", "ranges")]]
    joined, whole = InputStatistics.joined(parts), seen(rows, gather=("diagonals", "ranges"))
    for name, tensor in whole.tensors().items():
        torch.testing.assert_close(joined.tensors()[name], tensor, rtol=1e-6, atol=1e-7)
    mixed = InputStatistics.joined([seen(rows[:20]), parts[1]])
    assert mixed.gathered == ("diagonals",)
    torch.testing.assert_close(mixed.squares("test", 5), whole.squares("test", 5), rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    rows = torch.randn(900, 6).to(dtype)
    assert relative_error(seen(rows), rows) < 1e-6


def test_several_inputs() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 2), nn.Linear(4, 2)

        def forward(self, x: Tensor, *, other: Tensor) -> Tensor:
            y: Tensor = self.a(x) + self.b(other)
            return y

    x, other = torch.randn(6, 3), torch.randn(6, 4)
    model = Two()
    found = pc.calibrate(model, [{"x": x, "other": other}])
    assert relative_error(found["a"], x) < 1e-6 and relative_error(found["b"], other) < 1e-6


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_an_input_that_is_written_over_between_two_layers_is_another(mode: Any) -> None:
    model = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)})
    with pc.calibrate(model) as found, mode():
        for _ in range(3):
            x = torch.ones(5, 4)
            model["a"](x)
            model["b"](x.mul_(2))
    assert float(found["a"].squares("test", 4)[0]) == 1
    assert float(found["b"].squares("test", 4)[0]) == 4


# --- text that is generated -------------------------------------------------------------------------------------------------


def test_generated_text_counts_its_new_tokens() -> None:
    """The mask is [batch, past and new] then, the inputs of layers are [batch, new]."""
    transformers = pytest.importorskip("transformers", reason="the extra pycompress[demo] is not installed")
    config = transformers.GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=30, n_positions=32, bos_token_id=0)
    model = transformers.GPT2LMHeadModel(config).eval()
    ids, mask = torch.randint(1, 30, (2, 6)), torch.tensor([[1] * 6, [0] * 4 + [1] * 2])
    with pc.calibrate(model) as found:
        model.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=5,
            min_new_tokens=5,
            do_sample=False,
            pad_token_id=0,
            eos_token_id=0,
        )
    assert found["transformer.h.0.attn.c_attn"].rows == int(mask.sum()) + 2 * 4, "the last token is not read"
    assert found.calls == 5


def test_a_mask_longer_than_the_input_is_read_at_its_end() -> None:
    class Step(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
            y: Tensor = self.layer(x)
            return y

    mask = torch.tensor([[1, 1, 1, 0], [0, 0, 1, 1]])
    assert pc.calibrate(Step(), [(torch.randn(2, 1, 4), mask)])["layer"].rows == 1
    assert pc.calibrate(Step(), [(torch.randn(2, 2, 4), mask)])["layer"].rows == 3
    assert pc.calibrate(Step(), [(torch.randn(2, 4, 4), mask)])["layer"].rows == 5


# --- on disk, saved and loaded ------------------------------------------------------------------------------------------------


def test_moments_in_a_folder(tmp_path: Path) -> None:
    model, rows = nn.Sequential(nn.Linear(40, 30), nn.Tanh(), nn.Linear(30, 40)), torch.randn(700, 40)
    batches = list(rows.split(300))
    memory = pc.calibrate(model, batches)
    found = pc.calibrate(model, batches, folder=tmp_path)
    assert sum(file.stat().st_size for file in tmp_path.rglob("*.moment")) == 8 * (
        48 * 48 + 32 * 32
    )  # of multiples of 16
    for name, own in memory.items():
        assert torch.equal(own.second_moment, found[name].second_moment)  # type: ignore[arg-type]
    pc.compress(model, Int4(), calibration=found)
    del found
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="expected one that is there"):
        pc.calibrate(model, batches, folder=tmp_path / "none")
    with pytest.raises(ValueError, match=r"dtype is torch.float16, expected torch.float64 or torch.float32"):
        pc.calibrate(model, batches, dtype=torch.float16)


def calibration(**options: Any) -> Calibration:
    model = nn.Sequential(nn.Embedding(9, 6), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3))
    return pc.calibrate(model, [torch.randint(0, 9, (4, 5)) for _ in range(3)], description="numbers", **options)


@pytest.mark.parametrize("gather", ["moments", ("diagonals", "ranges")])
def test_saved_and_loaded(tmp_path: Path, gather: Any) -> None:
    saved = calibration(gather=gather)
    saved.save(tmp_path / "c")
    loaded = Calibration.load(tmp_path / "c")
    assert (loaded.text, loaded.calls, list(loaded)) == ("numbers", 3, list(saved))
    for name, own in saved.items():
        other = loaded[name]
        assert own.rows == other.rows and own.tensors().keys() == other.tensors().keys()
        assert all(torch.equal(tensor, other.tensors()[key]) for key, tensor in own.tensors().items())
    assert str(loaded.describe()) == str(saved.describe())


def test_layers_that_share_an_input_share_it_in_the_file(tmp_path: Path) -> None:
    model = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)})
    with pc.calibrate(model) as found:
        with pytest.raises(ValueError, match=r"Calibration.save: the calibration is still running"):
            found.save(tmp_path / "c")
        x = torch.randn(5, 4)
        model["a"](x), model["b"](x)
    found.save(tmp_path / "c")
    assert len(load_file(tmp_path / "c")) == 2
    loaded = Calibration.load(tmp_path / "c")
    assert loaded["a"] is loaded["b"]
    with pytest.raises(ValueError, match="nothing was gathered"):
        pc.calibrate(model, [], plan=Int8()).save(tmp_path / "d")


def spoiled(change: Callable[[dict[str, Tensor], dict[str, Any]], Any], path: Path) -> None:
    """A file in which something is not as it was written."""
    calibration().save(path)
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        plan = json.loads(file.metadata()["pycompress.calibration"])
    tensors = load_file(path)
    change(tensors, plan)
    save_file(tensors, path, {"pycompress.calibration": json.dumps(plan)})


HOSTILE: dict[str, tuple[Callable[[dict[str, Tensor], dict[str, Any]], Any], str]] = {
    "version": (lambda _, plan: plan.update(version=2), "has version 2, expected 1"),
    "rows": (lambda _, plan: plan.update(rows=[0, 1, 2]), "rows are not"),
    "more rows": (lambda _, plan: plan["rows"].append(3), "input 3: "),
    "layers": (lambda _, plan: plan["layers"].update(x=7), "layers are not"),
    "text": (lambda _, plan: plan.update(text=None), "text is None"),
    "a tensor": (lambda tensors, _: tensors.update({"0.more": torch.ones(1)}), "'0.more' is none of a calibration"),
    "a number": (lambda tensors, _: tensors.update({"9.mean": torch.ones(1)}), "'9.mean' is none of a calibration"),
    "a shape": (lambda tensors, _: tensors.update({"1.mean": torch.ones(7).double()}), "not of this size"),
    "a dtype": (lambda tensors, _: tensors.update({"1.mean": torch.ones(6)}), "is F32"),
    "missing": (lambda tensors, _: tensors.pop("1.mean"), "input 1: InputStatistics: mean is None"),
    "NaN": (lambda tensors, _: tensors["1.second_moment"].fill_(math.nan), "holds NaN or Inf"),
    "no symmetry": (lambda tensors, _: tensors["1.second_moment"][0].mul_(2), "is not symmetric"),
    "negative": (lambda tensors, _: tensors["1.second_moment"].neg_(), "mean squares are negative"),
    "counts": (lambda tensors, _: tensors["0.counts"].add_(1), "counts add up to"),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_a_file_that_is_no_calibration_is_refused(what: str, tmp_path: Path) -> None:
    change, message = HOSTILE[what]
    spoiled(change, tmp_path / "c")
    with pytest.raises(ValueError, match=message) as error:
        Calibration.load(tmp_path / "c")
    assert str(error.value).startswith(f"Calibration.load: {tmp_path / 'c'}: ")


def test_other_files(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "other")
    (tmp_path / "text").write_text("no file of this kind")
    for name, message in (("other", "no calibration in its metadata"), ("text", "no safetensors file")):
        with pytest.raises(ValueError, match=message):
            Calibration.load(tmp_path / name)
    with pytest.raises(OSError, match="none"):
        Calibration.load(tmp_path / "none")


# --- described ------------------------------------------------------------------------------------------------------------------


def test_a_description_warns() -> None:
    rows = torch.randn(1000, 200)
    rows[:, 5] = 0
    rows[:, 7] *= 100
    model = nn.ModuleDict(
        {"good": nn.Linear(20, 2), "odd": nn.Linear(200, 2), "few": nn.Linear(40, 2), "zero": nn.Linear(3, 2)}
    )
    with pc.calibrate(model, description="noise") as found:
        model["good"](torch.randn(1000, 20))
        model["odd"](rows)
        model["few"](torch.randn(30, 40))
        model["zero"](torch.zeros(99, 3))
    described = found.describe()
    good, odd, few, zero = described.layers
    assert (good.names, good.rows, good.features, good.dead, good.warnings) == (("good",), 1000, 20, 0, ())
    assert good.effective_rank is not None and 18 < good.effective_rank <= 20
    assert odd.dead == 1 and odd.dominant is not None and odd.dominant > 0.95
    assert odd.effective_rank is not None and odd.effective_rank < 1.2
    assert few.effective_rank is not None and few.effective_rank <= 30
    assert zero.effective_rank is None and zero.dominant is None
    assert [text.split(",")[0] for text in described.warnings] == [
        "odd: 1 of 200 features were always zero: nothing is known of their weights",
        f"odd: 2 of 200 features hold {odd.dominant:.0%} of all squares: they decide what counts as an error",
        "few: 30 rows for 40 features",
        "zero: all inputs are zero: they say nothing",
    ]
    text = str(described)
    assert text.startswith("4 inputs of layers, 0 calls of the model: noise\nlayer")
    assert all(warning in text for warning in described.warnings)
