"""The peers, called the way their users call them, from Python to Python; and the layers that they are given.

The weights are Gaussian by default, as those of trained layers nearly are. `weights="uniform"` is nn.Linear's own
initialisation; it fills the int8 range evenly (mean |w| near 63 where a Gaussian has about 30), so fewer products
fit the 16-bit lane budget, the packed weight takes shallower kernels, and int8 looks slower than it is on a trained
model.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from pycompress.benchmark.harness import interleave
from pycompress.weights import Int4Weight
from pycompress.weights.int4 import pack_nibbles


class UnavailableError(Exception):
    """A peer that is not installed or does not run on this machine; the message says which."""


class Call(NamedTuple):
    """A layer bound to its input."""

    run: Callable[[], object]  # what is timed
    output: Callable[[], torch.Tensor]  # y [m, n] float32 of the last run
    weight_bytes: int | None = None  # what the layer's weight takes; None for 4 bytes a weight, or where nobody asks
    form: str = ""  # which of its ways to compute the layer takes, where it has several


Bind = Callable[[torch.Tensor], Call]  # a built layer: x float32 [m, k] -> Call
Build = Callable[[nn.Linear], Bind]  # a float32 linear layer -> the peer's own layer


def module_call(layer: nn.Module) -> Bind:
    """How torch layers are called: the module itself, under an inference_mode entered once by the caller."""

    def bind(x: torch.Tensor) -> Call:
        run = partial(layer, x)
        return Call(run, run)

    return bind


torch_fp32 = torch_two = module_call


def torch_dynamic(engine: str) -> Build:
    return lambda linear: module_call(quantize_dynamic(nn.Sequential(linear), engine)[0])


def quantize_dynamic(model: nn.Module, engine: str) -> Any:
    """A copy of `model` with its linear layers quantized by torch's own `quantize_dynamic`.

    The packed weights remember the engine that packed them, so the engine matters here and not at call time
    (measured: same bits and same speed whatever the engine is set to afterwards).
    """
    if engine not in torch.backends.quantized.supported_engines:
        raise UnavailableError(f"torch has no {engine} engine on this machine")
    before = torch.backends.quantized.engine
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch announces the end of torch.ao.quantization at every call
            torch.backends.quantized.engine = engine
            quantize: Any = torch.ao.quantization.quantize_dynamic
            return quantize(model, {nn.Linear}, dtype=torch.qint8)
    finally:
        torch.backends.quantized.engine = before


def ort_session(model: bytes | str, *, spinning: bool = False) -> Any:
    """An ONNX Runtime CPU session with as many threads as torch has.

    Without `spinning`, its workers stop spinning when a run ends, so that they do not slow down whoever is
    next.
    """
    try:
        import onnxruntime
    except ModuleNotFoundError as error:
        raise UnavailableError("not installed: onnxruntime") from error
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    if not spinning:
        options.add_session_config_entry("session.force_spinning_stop", "1")
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def ort_call(session: Any, n: int) -> Bind:
    """How a session is called where speed matters: inputs and outputs bound to preallocated buffers."""

    def bind(x: torch.Tensor) -> Call:
        from onnxruntime import OrtValue

        y = OrtValue.ortvalue_from_numpy(np.zeros((x.shape[0], n), np.float32))
        binding = session.io_binding()
        binding.bind_ortvalue_input("x", OrtValue.ortvalue_from_numpy(x.numpy()))
        binding.bind_ortvalue_output("y", y)
        return Call(partial(session.run_with_iobinding, binding), lambda: torch.from_numpy(y.numpy()))

    return bind


class Node(NamedTuple):
    """A node of an ONNX graph."""

    op: str
    inputs: list[str]
    outputs: list[str]
    domain: str = ""
    attributes: Mapping[str, Any] = MappingProxyType({})


def ort_fp32(linear: nn.Linear) -> Bind:
    weight, bias = _arrays(linear)
    nodes = [Node("MatMul", ["x", "weight"], ["product"]), Node("Add", ["product", "bias"], ["y"])]
    constants = {"weight": np.ascontiguousarray(weight.T), "bias": bias}
    return _ort_linear(linear.in_features, linear.out_features, nodes, constants)


class TwoLinears(nn.Module):
    """A float32 layer of low rank as a user writes it: k -> rank -> n, the bias in the second."""

    def __init__(self, k: int, rank: int, n: int, *, bias: bool = True) -> None:
        super().__init__()
        self.down = nn.Linear(k, rank, bias=False, dtype=torch.float32, device="cpu")
        self.up = nn.Linear(rank, n, bias=bias, dtype=torch.float32, device="cpu")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.up(self.down(x))
        return y


def ort_two(factors: TwoLinears) -> Bind:
    """Two MatMul and an Add."""
    down, (up, bias) = factors.down.weight.detach().numpy(), _arrays(factors.up)
    nodes = [
        Node("MatMul", ["x", "down"], ["t"]),
        Node("MatMul", ["t", "up"], ["product"]),
        Node("Add", ["product", "bias"], ["y"]),
    ]
    constants = {"down": np.ascontiguousarray(down.T), "up": np.ascontiguousarray(up.T), "bias": bias}
    return _ort_linear(down.shape[1], up.shape[0], nodes, constants)


def ort_int8(signed: bool, *, spinning: bool = False) -> Build:
    """DynamicQuantizeMatMul with a scale per output channel: u8 activations per tensor, weights s8 or u8.

    Where the processor has no VNNI, the s8 form adds pairs of products in saturating 16-bit lanes; the u8
    form is exact.
    """

    def build(linear: nn.Linear) -> Bind:
        weight, bias = _arrays(linear)
        scale = (np.abs(weight).max(axis=1) / 127).astype(np.float32)
        values = np.rint(weight / scale[:, None]).T
        kind, zero = (np.int8, 0) if signed else (np.uint8, 128)
        constants = {
            "weight": np.ascontiguousarray((values + zero).astype(kind)),
            "scale": scale,
            "zero_point": np.full(scale.shape, zero, kind),
            "bias": bias,
        }
        node = Node("DynamicQuantizeMatMul", ["x", *constants], ["y"], "com.microsoft")
        return _ort_linear(linear.in_features, linear.out_features, [node], constants, spinning=spinning)

    return build


def ort_int4(weight: Int4Weight, bias: torch.Tensor, *, accuracy_level: int, spinning: bool = False) -> Bind:
    """MatMulNBits, ONNX Runtime's own operator for 4-bit weights, on those of a canonical weight.

    With an accuracy level of 4 it rounds x to 8 bits, by rows and blocks; with 0 it computes in float32.
    """
    n, k = weight.shape
    blocks = weight.groups
    # Whole blocks, and integers in pairs across them, as the canonical weight has them: only a short last block is filled up.
    values = np.zeros((n, blocks * weight.group // 2), np.uint8)
    values[:, : weight.values.shape[1]] = weight.values.numpy()
    constants = {
        "weight": values.reshape(n, blocks, weight.group // 2),
        "scale": weight.scale.float().numpy().reshape(-1),
        "zero_point": pack_nibbles(weight.zero_points()).numpy().reshape(-1),
        "bias": bias.detach().numpy(),
    }
    attributes = {"K": k, "N": n, "bits": 4, "block_size": weight.group, "accuracy_level": accuracy_level}
    inputs = ["x", "weight", "scale", "zero_point", "", "bias"]  # nothing in the place of g_idx
    node = Node("MatMulNBits", inputs, ["y"], "com.microsoft", attributes)
    bind = _ort_linear(k, n, [node], constants, spinning=spinning)
    weight_bytes = sum(array.nbytes for array in constants.values())
    return lambda x: bind(x)._replace(weight_bytes=weight_bytes)


def torch_csr(linear: nn.Linear) -> Bind:
    """The weight as torch's CSR matrix (MKL), in the faster of its two forms for the number of rows.

    `F.linear` with the sparse weight, or `torch.addmm` on the transposed input, which is what
    `torch.mm(weight, x.t()).t()` becomes when the bias is not to cost a pass of its own. The indices are int32: torch
    converts int64 ones, which `to_sparse_csr` makes, at every call.
    """
    # In inference mode: its CSR matrices and those made outside do not mix.
    with torch.inference_mode(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls its CSR support a beta, once per process
        csr = linear.weight.detach().to_sparse_csr()
        crow, column, values = csr.crow_indices().int(), csr.col_indices().int(), csr.values()
        weight = torch.sparse_csr_tensor(crow, column, values, csr.shape, dtype=values.dtype, device=values.device)
    bias = linear.bias.detach()

    def bind(x: torch.Tensor) -> Call:
        forms: dict[str, Callable[[], torch.Tensor]] = {
            "F.linear": lambda: nn.functional.linear(x, weight, bias),
            "torch.addmm": lambda: torch.addmm(bias[:, None], weight, x.t()).t(),
        }
        with torch.inference_mode():
            timings = interleave(forms, rounds=3, min_time_s=0.002)
        fastest = min(forms, key=lambda form: timings[form].median)
        return Call(forms[fastest], forms[fastest], crow.nbytes + column.nbytes + values.nbytes, fastest)

    return bind


def _arrays(linear: nn.Linear) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """weight [n, k] and bias [n] of a layer that has both."""
    return linear.weight.detach().numpy(), linear.bias.detach().numpy()


def _ort_linear(
    k: int, n: int, nodes: list[Node], constants: dict[str, np.ndarray[Any, Any]], *, spinning: bool = False
) -> Bind:
    """A session for a graph x [m, k] -> y [m, n]."""
    try:
        from onnx import TensorProto, helper, numpy_helper
    except ModuleNotFoundError as error:
        raise UnavailableError("not installed: onnx") from error
    graph = helper.make_graph(
        [helper.make_node(op, inputs, outputs, domain=domain, **of) for op, inputs, outputs, domain, of in nodes],
        "linear",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["m", k])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["m", n])],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=8)
    return ort_call(ort_session(model.SerializeToString(), spinning=spinning), n)


def available(builds: Mapping[str, Build]) -> tuple[dict[str, Build], dict[str, str]]:
    """Split candidates into those that run here and, for the others, why not."""
    usable: dict[str, Build] = {}
    missing: dict[str, str] = {}
    for name, build in builds.items():
        try:
            build(dense_linear(16, 16))(torch.zeros(1, 16, dtype=torch.float32, device="cpu")).run()
            usable[name] = build
        except Exception as error:  # whatever keeps a peer from running is reported; it is no failure of ours
            missing[name] = str(error) or type(error).__name__
    return usable, missing


def dense_linear(k: int, n: int, weights: str = "gaussian") -> nn.Linear:
    """The same float32 layer at every call; weights "gaussian" (std 1/sqrt(k)) or "uniform" (+-1/sqrt(k))."""
    if weights not in ("gaussian", "uniform"):
        raise ValueError(f'weights is {weights!r}, expected "gaussian" or "uniform"')
    generator = torch.Generator(device="cpu").manual_seed(k * 65537 + n)
    return _filled(nn.Linear(k, n, dtype=torch.float32, device="cpu"), generator, weights)


def _filled(linear: nn.Linear, generator: torch.Generator, weights: str = "gaussian") -> nn.Linear:
    """The layer with random numbers, which need no gradient."""
    bound = linear.in_features**-0.5
    for parameter in linear.parameters():
        if weights == "gaussian":
            nn.init.normal_(parameter, std=bound, generator=generator)
        else:
            nn.init.uniform_(parameter, -bound, bound, generator=generator)
        parameter.requires_grad_(False)
    return linear


def two_linears(k: int, rank: int, n: int, *, bias: bool = True) -> TwoLinears:
    """The same layer of low rank at every call, Gaussian (std 1/sqrt of each factor's inputs)."""
    generator = torch.Generator(device="cpu").manual_seed(k * 65537 + n)
    factors = TwoLinears(k, rank, n, bias=bias)
    for linear in (factors.down, factors.up):
        _filled(linear, generator)
    return factors


def relative_error(y: torch.Tensor, expected: torch.Tensor) -> float:
    """|y - expected| / |expected| in the Frobenius norm."""
    return float(torch.linalg.norm((y - expected).double()) / torch.linalg.norm(expected.double()))
