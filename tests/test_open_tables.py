"""Somebody else's number format, method and kind of layer: each one module, and one line in a table."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import conv1d

import pycompress as pc
from pycompress.kinds import KINDS, Kind, kind_of
from pycompress.methods.method import Method
from pycompress.nn import LAYERS, PlainLinear, register
from pycompress.nn.plain import PlainLayer
from pycompress.weights import WEIGHTS, Field, Setting, Weight
from pycompress.weights.rules import one_of, positive

pytestmark = pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")


# --- a number format ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False, repr=False)
class SignWeight(Weight):
    """The signs of a weight, and one scale a row: XNOR-Net (Rastegari et al. 2016, arXiv:1603.05279)."""

    name: ClassVar[str] = "signs"
    fields: ClassVar[tuple[Field, ...]] = (
        Field("signs", torch.bool, "n, k"),
        Field("scale", torch.float32, "n", positive),
    )
    options: ClassVar[tuple[Setting, ...]] = (Setting("mean", one_of("row", "all")),)

    signs: Tensor
    scale: Tensor
    mean: str

    @property
    def shape(self) -> tuple[int, int]:
        return self.signs.shape[0], self.signs.shape[1]

    def decompress(self) -> Tensor:
        return torch.where(self.signs, self.scale[:, None], -self.scale[:, None])


class SignLinear(PlainLinear):
    weight_type = SignWeight


# --- a method -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Signs:
    """The best signs and scales in the mean square."""

    name: ClassVar[str] = "signs"

    mean: str = "row"

    def compress(self, weight: Tensor) -> SignWeight:
        size = weight.detach().float().abs()
        scale = size.mean(1) if self.mean == "row" else size.mean().repeat(len(size))
        return SignWeight(weight >= 0, scale.clamp(min=1e-6), self.mean)


# --- a kind of layer ----------------------------------------------------------------------------------------------------


class Pointwise(Kind):
    """An ``nn.Conv1d`` with a kernel of one: x [N, c, length] -> [N, n, length]."""

    name, dense = "pointwise", nn.Conv1d
    phrase, plural = "a pointwise Conv1d", "pointwise convolutions"
    dims = 2

    def misfit(self, module: nn.Module) -> str:
        assert isinstance(module, nn.Conv1d)
        plain = (module.kernel_size, module.stride, module.padding, module.groups) == ((1,), (1,), (0,), 1)
        return super().misfit(module) or ("" if plain else "it is not pointwise")

    def weight_shape(self, n: int, k: int, geometry: Any) -> tuple[int, ...]:
        return n, k, 1

    def describe(self, n: int, k: int, geometry: Any) -> str:
        return f"{k}, {n}"

    def accepts(self, module: nn.Module, x: Tensor) -> bool:
        return x.dim() in (2, 3) and x.shape[-2] == self.shape(module)[1]

    def rows(self, x: Tensor, geometry: Any, chosen: Tensor | None = None) -> Tensor:
        return super().rows(x.transpose(-1, -2).reshape(-1, x.shape[-2]), geometry, chosen)

    def results(self, y: Tensor) -> Tensor:
        return super().results(y.transpose(-1, -2))

    def sizes(self, n: int, k: int, geometry: Any) -> tuple[tuple[int | str, ...], tuple[int | str, ...]]:
        return ("items", k, "length"), ("items", n, "length")


class SignPointwise(PlainLayer):
    kind, weight_type = Pointwise(), SignWeight

    def product(self, x: Tensor) -> Tensor:
        return conv1d(x, self.dense()[:, :, None], self.bias32)

    def lower(self, graph: Any, x: str) -> str:
        operands = [x, graph.weight("weight", self.weight.numpy())]
        if self.bias32 is not None:
            operands.append(graph.constant("bias", self.bias32.numpy()))
        return graph.activation(graph.node("Conv", *operands, kernel_shape=[1]), self)


# --- the lines in the tables --------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def tables() -> Iterator[None]:
    """Puts them in, and leaves the tables as they were."""
    before = dict(LAYERS), list(KINDS), dict(WEIGHTS)
    register(SignLinear)
    register(SignPointwise)
    yield
    for table, contents in ((LAYERS, before[0]), (WEIGHTS, before[2])):
        table.clear()
        table.update(contents)
    KINDS[:] = before[1]


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Sequential(nn.Conv1d(6, 10, 1), nn.ReLU())
        self.wide = nn.Conv1d(10, 10, 3, padding=1)
        self.up, self.act = nn.Linear(12, 20), nn.GELU()
        self.tied, self.down = nn.Linear(20, 20, bias=False), nn.Linear(20, 20)
        self.down.weight = self.tied.weight

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down(self.tied(self.act(self.up(self.wide(self.mix(x))))))
        return y


def model() -> Model:
    torch.manual_seed(0)
    return Model().eval()


def test_compressed_saved_loaded_summarised_and_validated(tmp_path: Path) -> None:
    dense, x = model(), torch.randn(5, 6, 12)
    made = pc.compress(dense, Signs())
    assert isinstance(made.mix[0], SignPointwise) and isinstance(made.up, SignLinear)
    assert type(made.wide) is nn.Conv1d and isinstance(made.mix[1], nn.Identity)
    assert made.tied.packed is made.down.packed
    torch.testing.assert_close(made.up.weight, Signs().compress(dense.up.weight).decompress())
    assert made(x).shape == dense(x).shape

    found = {record.name: record for record in pc.summary(made).layers}
    assert (found["up"].method, found["up"].activation, found["up"].shape) == ("signs", "gelu", (20, 12))
    assert (found["mix.0"].label, found["mix.0"].bytes) == ("signs", 10 * 6 + 4 * 10 + 4 * 10)
    assert found["wide"].reason == "it is not pointwise"
    assert found["down"].bytes == 4 * 20, "its weight is the other's"
    assert "signs+gelu" in str(pc.summary(made))

    path = tmp_path / "model.safetensors"
    pc.save(made, path)
    for target in (model(), made):
        loaded = pc.load(target, path)
        assert torch.equal(loaded(x), made(x))
        assert loaded.tied.packed is loaded.down.packed
        assert loaded.up.settings == {"mean": "row"}

    report = pc.validate(made, x)
    assert report.ok, str(report)
    assert [record.name for record in report.layers] == ["mix.0", "up", "tied", "down"]
    assert all(record.rows and record.share_of_bound <= 1 for record in report.layers)  # type: ignore[operator]


def test_a_wrong_layer_is_found() -> None:
    made = pc.compress(nn.Sequential(nn.Linear(12, 20)), Signs())
    native = made[0].forward
    made[0].forward = lambda x: native(x) * (1 + 1e-5)
    report = pc.validate(made, torch.randn(9, 12))
    assert report.first_divergence == "0"
    assert "native and ONNX Runtime differ" in report.layers[0].reason
    assert "native and NumPy differ" in report.layers[0].reason


def test_what_the_tables_do_not_have_stays_dense() -> None:
    images = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4, 4))
    found = pc.summary(pc.compress(images, Signs())).layers
    assert found[0].reason == "signs takes pointwise convolutions and linear layers only"
    lines = nn.Sequential(nn.Conv1d(3, 4, 1), nn.Linear(4, 4))
    found = pc.summary(pc.compress(lines, pc.Int8())).layers
    assert [record.reason for record in found] == [
        "int8 takes linear layers, convolutions, 1-D convolutions, embeddings, LSTMs and GRUs only",
        "",
    ]


def test_calibrated_measured_and_saved_as_a_state_dict() -> None:
    dense, x = model(), torch.randn(5, 6, 12)
    calibration = pc.calibrate(dense, [x])
    rows = x.transpose(1, 2).reshape(-1, 6).double()
    torch.testing.assert_close(calibration["mix.0"].second_moment, rows.T @ rows / len(rows), rtol=1e-6, atol=1e-6)
    made = pc.compress(dense, {"mix.0": Signs("all"), "*": None}, example_inputs=x, only_if_faster=True)
    assert pc.summary(made).layers[0].us is not None
    layer = SignPointwise.from_dense(dense.mix[0], Signs())
    again = SignPointwise.from_dense(nn.Conv1d(6, 10, 1), Signs())
    again.load_state_dict(layer.state_dict())
    assert set(layer.state_dict()) == {"signs_signs", "signs_scale", "weight", "bias"}
    assert torch.equal(again(x), layer(x))
    with pytest.raises(TypeError, match="SignPointwise: the dense layer is Linear, expected Conv1d"):
        SignPointwise.from_dense(nn.Linear(4, 4), Signs())


def test_a_plain_layer_keeps_tensors_of_any_dtype() -> None:
    method: Method = Signs()
    layer = SignLinear.from_dense(nn.Linear(7, 3), method)
    assert layer.packed.dtype == torch.uint8 and layer.packed.numel() == 32 + 16
    assert kind_of(nn.Linear(3, 3)) is layer.kind
    assert layer.half()(torch.randn(2, 7).half()).dtype == torch.float16
    assert repr(layer) == "SignLinear(in_features=7, out_features=3, bias=True, mean=row)"


def test_plain_layers_compile_as_one_graph() -> None:
    torch._dynamo.reset()
    made, x = pc.compress(model(), Signs()), torch.randn(2, 6, 12)
    with torch.no_grad():
        assert torch.equal(torch.compile(made, fullgraph=True, backend="aot_eager")(x), made(x))
    layer = SignLinear.from_dense(nn.Linear(7, 3), Signs())
    assert torch.equal(layer.dense(), layer.canonical().decompress())
    torch.library.opcheck(torch.ops.pycompress.plain_dense.default, (layer.packed, *layer._said))
