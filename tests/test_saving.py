"""What save() makes of the state of a model: stored as it is, or refused by its name before anything is written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from stored import equal_states, pieces
from torch import Tensor, nn
from typing_extensions import Self

import pycompress as pc
from pycompress.nn import CompressedLayer, Int8Linear
from pycompress.storage.reading import stored_dtype

Same = Callable[[Tensor, Tensor], bool]

DTYPES = [
    torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint32, torch.uint64,
    torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex32, torch.complex64, torch.complex128,
    torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz,
]  # fmt: skip


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "model.safetensors"


def model(table: Any = None, name: str = "table", *, persistent: bool = True) -> Any:
    made = pc.compress(nn.Sequential(nn.Linear(16, 16)), pc.Int8())
    if table is not None:
        made.register_buffer(name, table, persistent=persistent)
    return made


def place(table: Tensor, name: str = "table") -> Any:
    made = nn.Sequential(nn.Linear(16, 16))
    made.register_buffer(name, torch.zeros_like(table))
    return made


def bytes_of(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    size = int(torch.Size(shape).numel()) * dtype.itemsize
    numbers = torch.arange(1, size + 1, dtype=torch.uint8) % (2 if dtype == torch.bool else 120)
    return numbers.view(dtype).view(shape)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 0, 5), (1, 2, 1, 3)], ids=str)
def test_dtypes_and_shapes(dtype: torch.dtype, shape: tuple[int, ...], path: Path, same: Same) -> None:
    table = bytes_of(shape, dtype)
    if stored_dtype(dtype) is None:
        with pytest.raises(
            ValueError, match=rf"save: the state dict holds table, of {dtype}.*, which the file cannot hold"
        ):
            pc.save(model(table), path)
        assert not [*path.parent.iterdir()]
        return
    pc.save(model(table), path)
    target = place(table)
    assert pc.load(target, path) is target
    assert same(target.table, table)


def test_all_versions_of_safetensors_hold_the_common_ones() -> None:
    common = ["BOOL", "U8", "I8", "I16", "I32", "I64", "F16", "BF16", "F32", "F64", "F8_E4M3", "F8_E5M2"]
    assert set(common) <= {stored_dtype(dtype) for dtype in DTYPES}
    assert stored_dtype(torch.float4_e2m1fn_x2) is None if hasattr(torch, "float4_e2m1fn_x2") else True


def strided() -> dict[str, Tensor]:
    numbers, turned = torch.randn(4, 6), torch.randn(3, 3, dtype=torch.complex64)
    return {
        "transposed": numbers.T,
        "every second": numbers[:, ::2],
        "the end of another": numbers[2:],
        "expanded": numbers[:1].expand(4, 6),
        "channels last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "negated lazily": torch.view_as_real(turned.conj().resolve_conj())[..., 1].neg().contiguous(),
        "a negative bit": turned.conj().imag,
        "a number": torch.tensor(3.5),
        "nothing": torch.zeros(0, 4),
        "a gradient": nn.Parameter(numbers),
    }


@pytest.mark.parametrize("case", strided())
@pytest.mark.parametrize("persistent", [True, False])
def test_however_a_tensor_lies(case: str, persistent: bool, path: Path, same: Same) -> None:
    table = strided()[case]
    tensors, _ = pieces(path, model(table, persistent=persistent))
    assert same(tensors["table"], table.detach().clone(memory_format=torch.contiguous_format).resolve_neg())


def test_a_negative_bit_is_no_alias_of_what_it_negates(path: Path) -> None:
    turned = torch.randn(3, 3, dtype=torch.complex64)
    both = model(turned.imag)
    both.register_buffer("other", turned.conj().imag)
    tensors, plan = pieces(path, both)
    assert not plan["aliases"] and torch.equal(tensors["other"], -tensors["table"])


class Wrapped(Tensor):
    @staticmethod
    def __new__(cls, inner: Tensor) -> Self:
        made: Self = Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)  # type: ignore[attr-defined]
        made.inner = inner
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        unwrapped = [one.inner if isinstance(one, Wrapped) else one for one in args]
        return Wrapped(func(*unwrapped, **(kwargs or {})))


OTHERS: dict[str, tuple[Callable[[], Any], str]] = {
    "sparse": (lambda: torch.eye(3).to_sparse(), "a tensor of layout torch.sparse_coo"),
    "rows": (lambda: torch.eye(3).to_sparse_csr(), "a tensor of layout torch.sparse_csr"),
    "nested": (lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]), "a tensor of layout"),
    "jagged": (
        lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged), "a NestedTensor",
    ),
    "quantized": (lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8), "of torch.qint8"),
    "meta": (lambda: torch.ones(3, device="meta"), "on the meta device"),
    "a wrapper": (lambda: Wrapped(torch.ones(3)), "a Wrapped"),
}  # fmt: skip


@pytest.mark.parametrize("case", OTHERS)
@pytest.mark.filterwarnings("ignore")
def test_tensors_that_no_file_can_hold(case: str, path: Path) -> None:
    make, message = OTHERS[case]
    path.write_bytes(b"old")
    with pytest.raises(ValueError, match=f"save: the state dict holds table, {message}"):
        pc.save(model(make()), path)
    assert path.read_bytes() == b"old" and [*path.parent.iterdir()] == [path]
    pc.save(model(make(), persistent=False), path)  # made anew with the model, mostly
    assert "table" not in pieces(path)[0]


def test_a_layer_that_is_not_initialized_yet(path: Path) -> None:
    made = model()
    made.append(nn.LazyLinear(3))
    with pytest.raises(ValueError, match=r"save: the state dict holds 1\.\w+, which is not initialized yet"):
        pc.save(made, path)
    assert not path.exists()


@pytest.mark.parametrize("name", ["__metadata__", "a\ud800b"])
def test_names_that_no_file_can_hold(name: str, path: Path) -> None:
    with pytest.raises(ValueError, match=r"save: the state dict holds .*, expected another name"):
        pc.save(model(torch.ones(3), name), path)
    assert not path.exists()


@pytest.mark.parametrize(
    "name", ["with space", "ünï日本", "line\nbreak", 'a"b\\', "a\0b", "pycompress", "format", "*", "a[0]", "\u202e"]
)
def test_odd_names(name: str, path: Path) -> None:
    def build() -> Any:
        dense = nn.Sequential()
        dense.add_module(name, nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.BatchNorm1d(16)))
        dense.register_buffer("more" + name, torch.randn(3))
        return dense.eval()

    saved = pc.compress(build(), pc.Int8())
    pc.save(saved, path)
    for where in ("cpu", "meta"):
        with torch.device(where):
            target = build()
        assert equal_states(pc.load(target, path), saved)


def test_a_module_whose_name_has_a_dot(path: Path) -> None:
    def build() -> Any:
        dense = nn.Sequential()
        dense._modules["a.b"] = nn.Linear(16, 16)
        return dense

    saved = nn.Sequential()
    saved._modules["a.b"] = Int8Linear.from_dense(nn.Linear(16, 16))
    pc.save(saved, path)
    assert equal_states(pc.load(build(), path), saved)
    saved.a = nn.Sequential()
    saved.a.b = nn.Linear(16, 16)
    with pytest.raises(ValueError, match=r"several modules have the name 'a\.b'"):
        pc.save(saved, path)


def test_a_hook_that_takes_a_layers_tensors_away(path: Path) -> None:
    made = model()
    made[0]._register_state_dict_hook(lambda _, state, prefix, __: state.clear())
    with pytest.raises(ValueError, match=r"save: the state dict lacks 0\..*, expected no hook to take it away"):
        pc.save(made, path)
    assert not path.exists()


def test_many_tied_layers(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is compared with one other, not with all of them."""
    compared = []
    same_weight = CompressedLayer.same_weight
    monkeypatch.setattr(CompressedLayer, "same_weight", lambda *two: compared.append(two) or same_weight(*two))

    def build() -> nn.Sequential:
        layers = [nn.Linear(8, 8, bias=False) for _ in range(100)]
        for layer in layers[1:]:
            layer.weight = layers[0].weight
        return nn.Sequential(*layers)

    saved: Any = nn.Sequential(*(Int8Linear.from_dense(layer) for layer in build()))
    for layer in saved[1:]:
        layer.share(saved[0])
    tensors, _ = pieces(path, saved)
    assert len(tensors) == len(saved[0].canonical().tensors())
    loaded: Any = pc.load(build(), path)
    assert all(layer.packed is loaded[0].packed for layer in loaded)
    assert len(compared) <= 100
