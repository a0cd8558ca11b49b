"""Code beside a layer reads it as if it were dense: it gets what the dense layer would give, or an error; and changes nothing."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from contract.cases import EACH_ROW, EVERY, ROWS, Case, over, state
from pycompress import ops


def floats(layer: Any) -> Tensor:
    """What the weight means, made without it."""
    return layer.kind.as_weight(layer.canonical().decompress(), layer.geometry).to(layer.dtype)


def as_parents_do(module: Any, x: Tensor) -> Tensor:
    """The layer's product, by a parent that takes its weight and its other attributes."""
    if isinstance(x, Tensor) and not x.is_floating_point():
        return F.embedding(
            x,
            module.weight,
            module.padding_idx,
            module.max_norm,
            module.norm_type,
            module.scale_grad_by_freq,
            module.sparse,
        )
    if module.weight.dim() > 2:
        convolve = F.conv2d if module.weight.dim() == 4 else F.conv1d
        return convolve(x, module.weight, module.bias, module.stride, module.padding, module.dilation, module.groups)
    if x.dtype == torch.float32:
        return F.linear(x.float(), module.weight.float(), module.bias)
    return F.linear(x, module.weight, module.bias)


@EVERY
def test_a_parent_that_takes_the_weight_gets_the_dense_result(case: Case) -> None:
    made, x = case.layer(), case.x()
    dense = case.as_dense(made)
    torch.testing.assert_close(as_parents_do(made, x), as_parents_do(dense, x))
    assert torch.equal(made.weight, case.kind.stored(dense)) and torch.equal(made.weight, floats(made)), "to the bit"


@EVERY
def test_looking_at_the_weight_decompresses_nothing(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    made, dense = case.layer(), case.dense()
    for move in (lambda m: m, lambda m: m.half(), lambda m: m.to(torch.bfloat16), lambda m: m.double()):
        made, dense = move(made), move(dense)
        stored = case.kind.stored(dense)
        with monkeypatch.context() as patch:
            patch.setattr(type(made), "dense", None)
            patch.setattr(type(made), "canonical", None)
            for weight in (made.weight, made.weight.data, made.weight.detach()):
                for name in (
                    "shape",
                    "dtype",
                    "device",
                    "ndim",
                    "layout",
                    "is_cuda",
                    "is_meta",
                    "requires_grad",
                    "grad",
                    "nbytes",
                ):
                    expected = stored.detach() if name == "requires_grad" else stored
                    assert getattr(weight, name) == getattr(expected, name), name
                for call in (
                    Tensor.size,
                    Tensor.numel,
                    Tensor.dim,
                    Tensor.stride,
                    Tensor.is_contiguous,
                    Tensor.is_floating_point,
                ):
                    assert call(weight) == call(stored), call  # type: ignore[operator]
                assert weight.data_ptr() == made.packed.data_ptr() and isinstance(weight, Tensor)
                assert weight.mT.shape == stored.mT.shape and weight[0].shape == stored[0].shape
            assert made.weight is made.weight, "made once"
        assert made.weight.dtype == made.dtype == floats(made).dtype and torch.equal(made.weight, floats(made))


@EACH_ROW
def test_other_attributes_are_the_dense_layers(case: Case) -> None:
    made, dense = case.layer(), case.dense()
    said = made.kind.attributes(made.n, made.k, made.geometry)
    assert said
    for name, value in said.items():
        assert getattr(dense, name) == value == getattr(made, name), name
    ours = {"weight", "bias", "training", "dump_patches", "call_super_init", "T_destination"}
    for name in dir(dense):
        if not name.startswith("_") and not hasattr(nn.Module, name) and name not in ours and hasattr(made, name):
            assert getattr(made, name) == getattr(dense, name), f"{name} means something else"
    copied = pickle.loads(pickle.dumps(copy.deepcopy(made)))
    assert {name: getattr(copied, name) for name in said} == said and (copied.kind, copied.dtype) == (
        made.kind,
        made.dtype,
    )


@EACH_ROW
def test_a_layer_has_the_dtype_of_what_it_stands_for(case: Case) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        dense = case.dense().to(dtype)
        made = case.layer_type.from_dense(dense, case.method)
        other = case.twin(made)
        other.stand_for(dense)
        third = case.twin(made)
        third.stand_for(other)
        for one in (made, other, third, copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
            assert one.dtype == one.weight.dtype == dtype and one.kind == case.kind
            assert torch.equal(one.weight, floats(made))
        assert made.to(torch.float32).weight.dtype == torch.float32


# --- numbers ------------------------------------------------------------------------------------------------------------

USES: dict[str, Callable[[Tensor], Any]] = {
    "sum": lambda w: w.sum(),
    "matmul": lambda w: w.flatten(1) @ torch.ones(w[0].numel(), dtype=w.dtype),
    "clone": lambda w: w.clone(),
    "half": lambda w: w.half(),
    "numpy": lambda w: torch.from_numpy(w.detach().numpy().copy()),
    "list": lambda w: torch.tensor(w.tolist()),
    "rows": lambda w: w[1:3].contiguous(),
    "turned": lambda w: w.mT.mT.clone(),
    "views": lambda w: torch.cat([*w.flatten().chunk(3), *w.unbind(0)[0].flatten().split(2)]),
    "max": lambda w: w.max(dim=0).values,
    "compared": lambda w: w == 0,
    "item": lambda w: torch.tensor(w.flatten()[0].item()),
    "stacked": lambda w: torch.stack([w, w]),
    "copied": copy.copy,
    "copied deeply": copy.deepcopy,
    "pickled": lambda w: pickle.loads(pickle.dumps(w)),
    "foreach": lambda w: torch._foreach_mul([w], 2)[0],
    "vmap": torch.func.vmap(lambda row: row * 2),
    "added to another": lambda w: torch.zeros(w.shape).add_(w),
}


@EACH_ROW
def test_numbers_are_those_of_the_dense_weight(case: Case) -> None:
    made = case.layer()
    expected = floats(made)
    for name, use in USES.items():
        found = use(made.weight)
        assert torch.equal(found, use(expected)), name
    assert (
        repr(made.weight) == f"{expected!r}  # the dense weight of a {type(made).__name__}, which keeps it compressed"
    )
    with torch.inference_mode():
        inside = case.layer()
        assert torch.equal(inside.weight, floats(inside)) and torch.equal(made.weight, expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(made.weight + 0, expected), "the factors of a product are not rounded"
    factor = torch.ones((), requires_grad=True)
    (inside.weight * factor).sum().backward()
    assert factor.grad is not None


WRITES: dict[str, Callable[[Any, Tensor], Any]] = {
    "zero_": lambda w, _: w.zero_(),
    "copy_": lambda w, t: w.copy_(t),
    "+=": lambda w, t: w.__iadd__(t),
    "an initialisation": lambda w, _: nn.init.zeros_(w),
    "[0] =": lambda w, _: w.__setitem__(0, 1),
    "[index] =": lambda w, _: w.__setitem__(torch.tensor([0]), 1),
    "[0].zero_": lambda w, _: w[0].zero_(),
    "data =": lambda w, t: setattr(w, "data", t),
    "data +=": lambda w, t: w.data.add_(t),
    "data[0] =": lambda w, _: w.data.__setitem__(0, 1),
    "detached": lambda w, t: w.detach().mul_(t),
    "out=": lambda w, t: torch.add(t, t, out=w),
    "a view": lambda w, _: w.view(-1)[2:].zero_(),
    "turned": lambda w, _: w.mT.zero_(),
    "chunks": lambda w, _: w.chunk(2)[0].zero_(),
    "foreach": lambda w, _: torch._foreach_zero_([w]),
    "a gradient": lambda w, _: w.requires_grad_(),
    "requires_grad =": lambda w, _: setattr(w, "requires_grad", True),
    "a parameter": lambda w, _: nn.Parameter(w),
    "apply_": lambda w, _: w.apply_(abs),
    "resized": lambda w, _: w.resize_(1),
    "index_copy_": lambda w, t: w.index_copy_(0, torch.tensor([0]), t[:1]),
    "swapped": torch.utils.swap_tensors,
    "numpy": lambda w, _: w.numpy().fill(0),
}


@EACH_ROW
def test_nobody_writes_into_the_weight(case: Case) -> None:
    made = case.layer()
    before, weight, shape = state(made), floats(made), made.dense_shape
    for name, write in WRITES.items():
        for block in (torch.no_grad, torch.enable_grad):
            with block(), pytest.raises((RuntimeError, ValueError)) as error:
                write(made.weight, torch.ones(shape))
            if name not in {"swapped", "numpy"}:
                assert f"the dense weight of a {type(made).__name__}" in str(error.value), name
    for value in (weight, nn.Parameter(weight), None):
        with pytest.raises(AttributeError, match=f"{type(made).__name__}: weight is compressed"):
            made.weight = value
    assert torch.equal(made.weight, weight) and all(
        torch.equal(before[name], tensor) for name, tensor in state(made).items()
    )
    assert nn.Parameter(made.weight, requires_grad=False) is not made.weight and not isinstance(
        made.weight, nn.Parameter
    )


# --- it is no state -----------------------------------------------------------------------------------------------------


@EACH_ROW
def test_the_weight_is_in_no_state_and_keeps_nothing_alive(case: Case) -> None:
    made = case.layer()
    before = (set(vars(made)), list(made.state_dict()), set(made.__getstate__()))
    held = made.weight
    assert before == (set(vars(made)), list(made.state_dict()), set(made.__getstate__()))
    assert not list(made.parameters()) and copy.deepcopy(made).weight is not held
    gone = [weakref.ref(made), weakref.ref(made.packed)]
    gc.disable()
    try:
        del held, made
        assert [ref() for ref in gone] == [None, None], "at once, not when the collector comes"
    finally:
        gc.enable()


@EVERY
def test_the_weight_follows_the_layer(case: Case) -> None:
    made, other = case.layer(), case.layer()
    held, before = made.weight, floats(made)
    made.load_state_dict(other.state_dict())
    assert torch.equal(made.weight, floats(other)) and torch.equal(held, before), "what was read before stays as it was"
    made.to(torch.bfloat16)
    assert torch.equal(made.weight, floats(other).to(torch.bfloat16))
    made.to("meta")
    assert made.weight.is_meta and (made.weight.shape, made.weight.dtype) == (before.shape, torch.bfloat16)
    assert (made.weight + 1).is_meta


class Reads(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return as_parents_do(self.layer, x)


@EACH_ROW
def test_in_graphs_the_weight_is_made_by_an_operator(case: Case) -> None:
    torch._dynamo.reset()
    made, x = case.layer(), case.x()
    model = Reads(made)
    expected = model(x)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="aot_eager")(x), expected)
        torch.testing.assert_close(torch.export.export(model, (x,)).module()(x), expected)
        torch.testing.assert_close(torch.jit.trace(model, (x,))(x), expected)
    assert torch.func.functional_call(made, {}, (x,)).shape == expected.shape


@EACH_ROW
def test_kernels_take_no_lazy_weight_for_memory(case: Case) -> None:
    """It has none of its own: as the input of a layer it is what it means."""
    x = case.layer().weight
    eye = ops.pack(
        "int8",
        {"values": torch.eye(8, dtype=torch.int8), "scale": torch.ones(8)},
        (8, 8),
        {"activation_bits": 16, "weight_bits": 8},
    )
    x = x.flatten()[:8][None]
    torch.testing.assert_close(ops.int8_linear(x, *eye, None, "none"), x.clone())


@over([case for case in ROWS if case.kind.epilogue])
def test_the_bias_has_the_dtype_of_the_weight(case: Case) -> None:
    """A parent in bfloat16 gives both to one operator; what the layer adds is float32 all the same."""
    made, x = case.layer(), case.x()
    kept, expected = made.bias.clone(), made(x)
    assert made.bias is made.bias32 is made.state_dict(keep_vars=True)["bias"] and case.layer(bias=False).bias is None
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        made.to(dtype)
        as_dense = case.as_dense(made, dtype)
        assert made.bias.dtype == dtype and torch.equal(made.bias, kept.to(dtype)) and torch.equal(made.bias32, kept)
        torch.testing.assert_close(as_parents_do(made, x.to(dtype)), as_parents_do(as_dense, x.to(dtype)))
        for write in (made.bias.zero_, lambda: made.bias.data.add_(1), lambda: made.bias.__setitem__(0, 1)):
            with pytest.raises(
                RuntimeError, match=f"the dense bias of a {type(made).__name__}, which keeps it in float32"
            ):
                write()
        assert torch.equal(made(x), expected) and torch.equal(made.state_dict()["bias"], kept)
        torch._dynamo.reset()
        with torch.no_grad():
            compiled = torch.compile(Reads(made), fullgraph=True, backend="aot_eager")
            torch.testing.assert_close(compiled(x.to(dtype)), as_parents_do(as_dense, x.to(dtype)))
