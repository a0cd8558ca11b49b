"""Our kernels as custom ops of ONNX Runtime: every layer to the bit, threads, and nodes that do not fit."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

onnx = pytest.importorskip("onnx", reason="the extra pycompress[onnx] is not installed")
onnxruntime = pytest.importorskip("onnxruntime", reason="the extra pycompress[onnx] is not installed")

from contract.cases import CASES, Case  # noqa: E402

import pycompress as pc  # noqa: E402
from pycompress.onnx import kernels, library, lower, runs, session  # noqa: E402

if not kernels.has_library():
    pytest.skip("built without a compiler: there are no kernels to load", allow_module_level=True)

LINEAR = [case for case in CASES if case.kind.name == "linear"]


def free(model: Any) -> Any:
    """The same, with x and y of any shape."""
    for value in (model.graph.input[0], model.graph.output[0]):
        value.type.tensor_type.ClearField("shape")
    return model


def lowered(method: pc.methods.method.Method, n: int = 45, k: int = 77) -> Any:
    torch.manual_seed(0)
    (layer,) = pc.compress(nn.Sequential(nn.Linear(k, n)), method)
    return free(lower(layer, "kernels"))


# --- what they compute --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", LINEAR, ids=str)
def test_every_row_to_the_bit(case: Case) -> None:
    for i, activation in enumerate(case.activations):
        layer = case.layer(activation, bias=i % 2 == 0)
        assert runs(layer)
        model = lower(layer, "kernels")
        assert {node.domain for node in model.graph.node} == {"pycompress", ""}
        found = session(free(model), threads=1 + i % 2)
        for lead in [(5,), (2, 1, 3), (0,), (2, 0), ()] if i < 2 else [(67,)]:
            x = case.x(*lead)
            if lead == (5,):
                x[1, 2], x[3, 0] = torch.nan, torch.inf
            (y,) = found.run(None, {"x": x.numpy()})
            np.testing.assert_array_equal(y, layer(x).detach().numpy())


def test_layers_without_an_op_are_lowered_as_ever() -> None:
    layers = [case.layer("none", bias=True) for case in CASES if case.kind.name != "linear"]
    assert layers and not any(map(runs, layers))
    model = lower(next(layer for layer in layers if layer.kind.name == "conv2d"), "kernels")
    assert {node.domain for node in model.graph.node} == {""}


def test_one_session_in_many_threads_and_two_sessions() -> None:
    torch.manual_seed(0)
    model = lowered(pc.LowRank(16, residual=pc.Int8(), rank_guard=False), 96, 128)
    first, second = session(model, threads=2), session(model, threads=1)
    inputs = [np.random.default_rng(i).standard_normal((1 + 9 * i, 128), np.float32) for i in range(12)]
    expected = [second.run(None, {"x": x})[0] for x in inputs]
    wrong: list[int] = []

    def work(start: int) -> None:
        for _ in range(5):
            for i in [*range(start, len(inputs)), *range(start)]:
                if not np.array_equal(first.run(None, {"x": inputs[i]})[0], expected[i]):
                    wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    other = session(model)  # what is registered for one is still there when it goes
    del other
    assert np.array_equal(second.run(None, {"x": inputs[3]})[0], expected[3])


PLAIN = """
import sys
import numpy as np, onnxruntime
options = onnxruntime.SessionOptions()
options.register_custom_ops_library(sys.argv[1])
found = onnxruntime.InferenceSession(sys.argv[2], options, providers=["CPUExecutionProvider"])
x = np.linspace(-1, 1, 40 * 77, dtype=np.float32).reshape(40, 77)
np.save(sys.argv[3], found.run(None, {"x": x})[0])
assert not {"torch", "pycompress"} & set(sys.modules)
"""


def test_a_program_that_knows_only_the_runtime_and_the_library(tmp_path: Path) -> None:
    """As any other language does it: no torch, no Python of ours, the options that a session has by itself."""
    torch.manual_seed(0)
    (layer,) = pc.compress(nn.Sequential(nn.Linear(77, 45)), pc.Int4())
    onnx.save(free(lower(layer, "kernels")), tmp_path / "layer.onnx")
    subprocess.run(
        [sys.executable, "-c", PLAIN, library(), tmp_path / "layer.onnx", tmp_path / "y.npy"], check=True, cwd=tmp_path
    )
    x = torch.from_numpy(np.linspace(-1, 1, 40 * 77, dtype=np.float32).reshape(40, 77))
    np.testing.assert_array_equal(np.load(tmp_path / "y.npy"), layer(x).detach().numpy())


@pytest.mark.skipif(shutil.which("nm") is None, reason="nm is not installed")
def test_the_library_offers_one_function_and_needs_neither_torch_nor_python() -> None:
    def symbols(which: str) -> list[str]:
        found = subprocess.run(["nm", "-D", which, library()], capture_output=True, text=True, check=True).stdout
        return [line.split()[-1] for line in found.splitlines()]

    assert [name for name in symbols("--defined-only") if not name.startswith("_Z")] == ["RegisterCustomOps"]
    assert not [name for name in symbols("--undefined-only") if name.startswith(("Py", "Ort", "_ZN2at", "_ZN3c10"))]


def test_an_installation_without_kernels_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(kernels, "_LIBRARY", tmp_path / "_onnxruntime.so")
    with pytest.raises(RuntimeError, match=r"there is no _onnxruntime\.so, expected pycompress to be built with"):
        library()
    with pytest.raises(Exception, match="pycompress"):  # ONNX Runtime's own
        session(lowered(pc.Int8()))


# --- what does not fit --------------------------------------------------------------------------------------------------


def said(**attributes: Any) -> Callable[[Any], None]:
    """Gives the node other attributes; None: takes one away."""

    def change(model: Any) -> None:
        node = model.graph.node[0]
        kept = [one for one in node.attribute if one.name not in attributes]
        assert len(kept) + len(attributes) == len(node.attribute)
        new = [onnx.helper.make_attribute(name, v) for name, v in attributes.items() if v is not None]
        del node.attribute[:]
        node.attribute.extend([*kept, *new])

    return change


def holds(**constants: Any) -> Callable[[Any], None]:
    """Gives the model other constants."""

    def change(model: Any) -> None:
        for name, values in constants.items():
            (tensor,) = (one for one in model.graph.initializer if one.name == name)
            tensor.CopyFrom(onnx.numpy_helper.from_array(values, name))

    return change


def asked_for(name: str) -> Callable[[Any], None]:
    """Makes a constant the default of an input."""

    def change(model: Any) -> None:
        (tensor,) = (one for one in model.graph.initializer if one.name == name)
        model.graph.input.append(onnx.helper.make_tensor_value_info(name, tensor.data_type, list(tensor.dims)))

    return change


def without(place: int) -> Callable[[Any], None]:
    def change(model: Any) -> None:
        model.graph.node[0].input[place] = ""

    return change


I8, I4, SPARSE = pc.Int8(), pc.Int4(), pc.Sparse(0.3)
BESIDE = pc.LowRank(8, residual=pc.Int4(), rank_guard=False)
HOSTILE: list[tuple[Any, Callable[[Any], None], str]] = [
    (I8, said(activation_bits=9), "Int8Linear: int8_pack: activation_bits is 9, expected 7 or 8"),
    (I8, said(activation_bits=2**40), "activation_bits is 1099511627776, expected 0 to 2147483647"),
    (I8, said(activation_bits=-8), "activation_bits is -8, expected 0 to"),
    (I8, said(activation_bits=None), "the attribute activation_bits is missing or no integer"),
    (I8, said(activation_bits=8.0), "the attribute activation_bits is missing or no integer"),
    (I8, said(activation="tanh"), "activation is 'tanh', expected one of none, relu"),
    (I8, said(activation=1), "the attribute activation is missing or no text"),
    (I8, asked_for("values"), "values is computed or an input of the model, expected a constant"),
    (I8, holds(scale=np.ones(3, np.float32)), r"scale is float32 \[3\], expected \[45\]"),
    (I8, holds(bias=np.ones((45, 1), np.float32)), r"bias is float32 \[45, 1\], expected \[45\]"),
    (I8, holds(values=np.full((45, 77), -128, np.int8)), "a weight is -128"),
    (I8, holds(values=np.zeros((45, 7, 11), np.int8)), r"values is \[45, 7, 11\], expected \[n, k\]"),
    (I8, holds(values=np.zeros((0, 77), np.int8), scale=np.ones(0, np.float32)), "out_features is 0"),
    (I8, holds(values=np.zeros((1, 70000), np.int8), scale=np.ones(1, np.float32)), "in_features is 70000"),
    (I8, holds(values=np.zeros((45, 77), np.uint8)), "values"),  # the runtime's own check of types
    (I8, without(1), "input 1 is marked single"),  # and here
    (I4, said(group=0), "group is 0, expected 32, 64 or 128"),
    (I4, said(k=2**31 - 1), r"values is \[45, 39\], expected \[n, 1073741824\] for k = 2147483647"),
    (I4, said(k=0), r"values is \[45, 39\], expected \[n, 0\]"),
    (I4, holds(zero_point=np.zeros((45, 1), np.uint8)), r"zero_point is uint8 \[45, 1\], expected \[45, 2\]"),
    (SPARSE, holds(mask=np.full((45, 10), 255, np.uint8)), "row 0 of the mask has bits set behind k = 77"),
    (SPARSE, holds(mask=np.zeros((45, 9), np.uint8)), r"mask is \[45, 9\], expected \[n, 10\]"),
    (SPARSE, holds(values=np.ones(3, np.float32)), "the mask has 1040 ones, but there are 3 values"),
    (SPARSE, holds(values=np.ones(1040, np.float64)), "values"),
    (SPARSE, said(k=70000), "k is 70000, expected 1 to 65536"),
    (SPARSE, said(activation_bits=8), "activation_bits is 8, expected 7 or 8 for int8 weights, 0 for float32"),
    (BESIDE, said(residual="int8"), r"residual_values is uint8 \[45, 39\], expected int8"),
    (BESIDE, said(residual="dense"), "residual_weight is missing, expected a constant"),
    (BESIDE, said(residual="int2"), "residual is 'int2', expected dense, int8, int4, sparse or nothing"),
    (BESIDE, said(residual_activation_bits=16), "residual_activation_bits is 16"),
    (BESIDE, said(residual_k=76), r"residual_values is \[45, 39\], expected \[n, 38\]|the residual is \[45, 76\]"),
    (BESIDE, holds(down=np.zeros((0, 77), np.float32)), r"up is \[45, 8\], expected \[n, 0\]"),
    (BESIDE, holds(up=np.zeros((45, 9), np.float32)), r"up is \[45, 9\], expected \[n, 8\]"),
    (BESIDE, said(activation_bits=8), "activation_bits is 8, expected 7 or 8 for int8 factors, 0 for float32"),
]  # fmt: skip


@pytest.mark.parametrize(("method", "change", "match"), HOSTILE)
def test_nodes_that_do_not_fit(method: Any, change: Callable[[Any], None], match: str) -> None:
    model = lowered(method)
    session(model)  # as it was
    change(model)
    with pytest.raises(Exception, match=match):
        session(model)


@pytest.mark.parametrize("shape", [(3, 76), (), (77, 1)])
def test_inputs_that_do_not_fit(shape: tuple[int, ...]) -> None:
    found = session(lowered(pc.Int8()))
    with pytest.raises(Exception, match=rf"Int8Linear: x is \[{', '.join(map(str, shape))}\], expected \[\.\.\., 77\]"):
        found.run(None, {"x": np.zeros(shape, np.float32)})
    assert found.run(None, {"x": np.zeros((2, 77), np.float32)})[0].shape == (2, 45)


@pytest.mark.parametrize("threads", ["0", "two", "1025", "1 2", "9" * 40])
def test_an_entry_that_is_no_number_of_threads(threads: str) -> None:
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry(kernels.THREADS, threads)
    with pytest.raises(Exception, match=r"pycompress\.threads|[Bb]uffer|size"):
        options.register_custom_ops_library(library())


# --- other runtimes -----------------------------------------------------------------------------------------------------


class Runtime:
    """A runtime that has a function at the first three places, which makes, reads and gives up a status; nothing else of it may
    be called, so any other call ends the process."""

    def __init__(self, version: bytes, code: int = 2) -> None:
        self.messages: list[bytes] = []
        status = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_int, ctypes.c_char_p)
        text, number = (
            ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p),
            ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p),
        )
        self._text, self._version = ctypes.create_string_buffer(1000), ctypes.create_string_buffer(version)
        self._functions = [status(self._made), number(lambda _: code), text(lambda _: ctypes.addressof(self._text))]
        self._table = (ctypes.c_void_p * 276)(*(ctypes.cast(one, ctypes.c_void_p).value for one in self._functions))
        table, name = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_uint32), ctypes.CFUNCTYPE(ctypes.c_void_p)
        self._base = [table(lambda _: ctypes.addressof(self._table)), name(lambda: ctypes.addressof(self._version))]
        self.base = (ctypes.c_void_p * 2)(*(ctypes.cast(one, ctypes.c_void_p).value for one in self._base))

    def _made(self, _code: int, message: bytes) -> int:
        self.messages.append(message)
        self._text.value = message
        return 1


@pytest.mark.parametrize(
    ("version", "code", "match"),
    [
        (b"1.16.3", 2, b"ONNX Runtime is 1.16.3, expected 1.17 or a later 1.x"),
        (b"2.0.0", 2, b"ONNX Runtime is 2.0.0, expected 1.17"),
        (b"nightly", 2, b"ONNX Runtime is nightly, expected 1.17"),
        (b"1.99.0", 7, b"ONNX Runtime 1.99.0 has other functions than its API says"),
    ],
)
def test_a_runtime_that_is_another(version: bytes, code: int, match: bytes) -> None:
    runtime, register = Runtime(version, code), ctypes.CDLL(library()).RegisterCustomOps
    register.restype, register.argtypes = ctypes.c_void_p, [ctypes.c_void_p, ctypes.c_void_p]
    assert register(None, runtime.base) == 1
    assert match in runtime.messages[-1]
