"""What compress(), validate() and calibrate() run is left as it was: every place where a model, or a caller, may keep something."""

from __future__ import annotations

import dataclasses
import functools
import random
from collections import OrderedDict, UserDict, deque
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pycompress.calls import call_model, evaluating
from pycompress.state import unwatched

calls = 0
kept = torch.zeros(4)
registry: dict[str, list[int]] = {"calls": []}

Step = Callable[[Any], Any]  # (module) -> what this call adds; another number at each call, were its state not put back


class Counting(nn.Module):
    """Its result depends on what its step says, which keeps something somewhere."""

    def __init__(self, step: Step) -> None:
        super().__init__()
        self.layer, self.norm, self.table = nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Embedding(3, 4, max_norm=0.5)
        self.step = step

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x) + self.step(self)
        return y


# --- where a count can be kept ----------------------------------------------------------------------------------------


def in_an_attribute() -> Step:
    def step(module: Any) -> int:
        module.count = getattr(module, "count", 0) + 1
        return module.count

    return step


def in_a_global() -> Step:
    def step(_: Any) -> int:
        global calls  # noqa: PLW0603
        calls += 1
        return calls

    return step


def in_a_global_tensor() -> Step:
    return lambda _: kept.add_(1).clone()


def in_a_list_of_a_global() -> Step:
    def step(_: Any) -> int:
        registry["calls"].append(1)
        return len(registry["calls"])

    return step


def in_a_cell() -> Step:
    count = 0

    def step(_: Any) -> int:
        nonlocal count
        count += 1
        return count

    return step


def in_what_a_cell_holds() -> Step:
    counts, last = [0], torch.zeros(4)

    def step(_: Any) -> Tensor:
        counts[0] += 1
        last.add_(1)
        return last + counts[0]

    return step


def in_a_default() -> Step:
    def step(_: Any, counts: list[int] = []) -> int:  # noqa: B006
        counts.append(1)
        return len(counts)

    return step


def in_a_functions_attribute() -> Step:
    def step(_: Any) -> int:
        step.count = getattr(step, "count", 0) + 1  # type: ignore[attr-defined]
        return step.count  # type: ignore[attr-defined, no-any-return]

    return step


def in_a_partial() -> Step:
    def step(counts: list[int], _: Any) -> int:
        counts.append(1)
        return len(counts)

    return functools.partial(step, [])


class Keeps:
    count: ClassVar[int] = 0
    seen: ClassVar[list[int]] = []

    def step(self, _: Any) -> int:
        Keeps.count += 1
        self.seen.append(1)
        return self.count + len(self.seen)


def in_a_class() -> Step:
    return Keeps().step


class Slots:
    __slots__ = ("__private", "count")

    def __init__(self) -> None:
        self.count, self.__private = 0, 0

    def step(self, _: Any) -> int:
        self.count += 1
        self.__private += 2
        return self.count + self.__private


def in_slots() -> Step:
    return Slots().step


@dataclasses.dataclass(frozen=True, slots=True)
class Frozen:
    counts: list[int]


class Named(NamedTuple):
    inner: tuple[Frozen, ...]


def in_a_frozen_dataclass() -> Step:
    named = Named((Frozen([]),))

    def step(_: Any) -> int:
        named.inner[0].counts.append(1)
        return len(named.inner[0].counts)

    return step


def in_an_array() -> Step:
    array = np.zeros(3)

    def step(_: Any) -> float:
        array[1:] += 1
        return float(array.sum())

    return step


def in_bytes() -> Step:
    data = bytearray(2)

    def step(_: Any) -> int:
        data[1] += 1
        return data[1]

    return step


def in_every_container() -> Step:
    ordered, queue, names, user = OrderedDict(a=1, b=2), deque([1, 2], maxlen=2), {1}, UserDict({"a": 1})

    def step(_: Any) -> int:
        ordered.move_to_end("a")
        queue.append(queue[-1] + 1)
        names.add(len(names) + 1)
        user["a"] += 1
        return list(ordered).index("a") + queue[0] + len(names) + int(user["a"])

    return step


def in_random_states() -> Step:
    own, arrays, old, torchs = random.Random(0), np.random.default_rng(0), np.random.RandomState(0), torch.Generator()

    def step(_: Any) -> Tensor:
        drawn = [random.random(), np.random.rand(), own.random(), arrays.random(), old.rand()]
        return sum(drawn) + torch.rand(4, generator=torchs) + torch.rand(4)  # type: ignore[no-any-return]

    return step


def in_a_hidden_module() -> Step:
    """Which the model has in a list, so that no eval() reaches it."""
    hidden = [nn.Sequential(nn.BatchNorm1d(4), nn.Dropout())]

    def step(_: Any) -> Tensor:
        hidden[0][1].train(not hidden[0][1].training)
        return hidden[0](torch.ones(2, 4))[:1] + hidden[0][0].running_mean + int(hidden[0][1].training)  # type: ignore[no-any-return]

    return step


def in_a_parameter() -> Step:
    def step(module: Any) -> Tensor:
        module.layer.bias.data.add_(1)
        module.layer.weight.data = module.layer.weight.data * 2
        module.table(torch.tensor([0, 1]))
        return module.table.weight.sum() + module.layer.weight.sum()  # type: ignore[no-any-return]

    return step


def in_running_statistics() -> Step:
    def step(module: Any) -> Tensor:
        F.batch_norm(torch.ones(2, 4), module.norm.running_mean, module.norm.running_var, training=True)
        return module.norm.running_mean  # type: ignore[no-any-return]

    return step


def in_a_gradient() -> Step:
    def step(module: Any) -> Tensor:
        with torch.enable_grad():
            module.layer.weight.sum().backward()
        return module.layer.weight.grad.sum()  # type: ignore[no-any-return]

    return step


def in_a_tensors_shape() -> Step:
    tensor = torch.arange(6.0)

    def step(_: Any) -> int:
        tensor.resize_(len(tensor) - 1)
        return len(tensor)

    return step


def in_many_tensors_at_once() -> Step:
    tensors = [torch.zeros(4), torch.zeros(2)]

    def step(_: Any) -> Tensor:
        torch._foreach_add_(tensors, 1.0)
        torch.add(tensors[0], 1, out=tensors[0])
        tensors[1].numpy()  # its memory, but nothing is written
        return tensors[0] + tensors[1].sum()

    return step


class Scripted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        return x + self.count


def in_a_script() -> Step:
    scripted = torch.jit.script(Scripted())
    return lambda _: scripted(torch.zeros(4))


def under_a_transform() -> Step:
    last = torch.zeros(4)

    def step(_: Any) -> Tensor:
        y = torch.vmap(lambda row: row * 2)(torch.ones(3, 4)).sum(0)
        last.add_(torch.func.grad(lambda t: (t * t).sum())(y))
        return last.clone()

    return step


PLACES = [
    in_an_attribute, in_a_global, in_a_global_tensor, in_a_list_of_a_global, in_a_cell, in_what_a_cell_holds, in_a_default,
    in_a_functions_attribute, in_a_partial, in_a_class, in_slots, in_a_frozen_dataclass, in_an_array, in_bytes,
    in_every_container, in_random_states, in_a_hidden_module, in_a_parameter, in_running_statistics, in_a_gradient,
    in_a_tensors_shape, in_many_tensors_at_once, in_a_script, under_a_transform,
]  # fmt: skip


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
@pytest.mark.parametrize("hooked", [False, True], ids=["step", "hook"])
@pytest.mark.parametrize("place", PLACES, ids=lambda place: place.__name__)
def test_a_model_may_keep_its_state_anywhere(place: Callable[[], Step], hooked: bool) -> None:
    """The same result from each run, and from the first call after them: nothing of them is left."""
    step = place()
    model = Counting((lambda _: 0) if hooked else step)
    if hooked:
        model.layer.register_forward_hook(lambda _module, _args, y: y + step(model))
    x, runs = torch.randn(2, 4), []
    for _ in range(3):
        with evaluating(model, x):
            runs.append(model(x).clone())
    model.eval()
    with torch.no_grad():
        first, second = model(x), model(x)
    assert torch.equal(runs[0], runs[1]) and torch.equal(runs[0], runs[2])
    assert torch.equal(runs[0], first)
    assert not torch.equal(first, second), "it keeps nothing, so that nothing was shown"


# --- what the caller gives ------------------------------------------------------------------------------------------


class Holder:
    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


@dataclasses.dataclass(slots=True)
class Batch:
    tensor: Tensor


class Pair(NamedTuple):
    left: Tensor
    right: Tensor


def base() -> Tensor:
    return torch.arange(24.0).reshape(4, 6)


GIVEN: dict[str, Callable[[Tensor], tuple[Any, Callable[[Any], Tensor]]]] = {
    "a view of a larger one": lambda t: (t[1:, ::2], lambda given: given),
    "transposed": lambda t: (t.T, lambda given: given),
    "in an object": lambda t: (Holder(t), lambda given: given.tensor),
    "in a dataclass": lambda t: (Batch(t), lambda given: given.tensor),
    "in a named tuple": lambda t: (Pair(t[0], t[1:]), lambda given: given.right),
    "in nested containers": lambda t: ({"a": [(t,)]}, lambda given: given["a"][0][0]),
    "in a user's mapping": lambda t: (UserDict(a=t), lambda given: given["a"]),
    "that needs a gradient": lambda t: (t.requires_grad_(), lambda given: given),
}


@pytest.mark.parametrize("how", GIVEN)
def test_the_callers_tensors_may_be_written_to(how: str) -> None:
    class Writes(nn.Module):
        def forward(self, given: Any) -> Tensor:
            tensor = find(given)
            tensor.mul_(2)
            tensor[0].zero_()
            return tensor.add_(1).clone()

    whole = base()
    given, find = GIVEN[how](whole)
    with evaluating(Writes(), (given,)):
        y = call_model(Writes(), (given,))
        assert not torch.equal(whole, base())
    assert torch.equal(whole, base())
    assert torch.equal(y[-1], base_of(find, how)[-1] * 2 + 1)
    assert whole.requires_grad is (how == "that needs a gradient")


def base_of(find: Callable[[Any], Tensor], how: str) -> Tensor:
    return find(GIVEN[how](base())[0]).detach()


def test_a_tensor_may_change_in_every_other_way() -> None:
    class Changes(nn.Module):
        def forward(self, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
            a.requires_grad_()
            b.data = torch.zeros(3)
            c.unsqueeze_(0)
            with torch.enable_grad():
                (a * 2).sum().backward()
            c.extra = 1  # type: ignore[attr-defined]
            return a.detach()

    tensors = [base() for _ in range(3)]
    pointers = [tensor.data_ptr() for tensor in tensors]
    with evaluating(Changes(), tensors):
        Changes()(*tensors)
    assert [tensor.data_ptr() for tensor in tensors] == pointers
    assert all(torch.equal(tensor, base()) for tensor in tensors)
    assert not tensors[0].requires_grad and tensors[0].grad is None and not hasattr(tensors[2], "extra")


def test_arrays_and_generators_that_are_given() -> None:
    class Draws(nn.Module):
        def forward(self, array: Any, generator: Any) -> Tensor:
            array += 1
            return torch.rand(2, generator=generator)

    array, generator = np.zeros(3), torch.Generator()
    state = generator.get_state()
    with evaluating(Draws(), (array, generator)):
        Draws()(array, generator)
    assert array.tolist() == [0, 0, 0]
    assert torch.equal(generator.get_state(), state)


ODD: dict[str, Callable[[], Tensor]] = {
    "meta": lambda: torch.empty(3, device="meta"),
    "sparse": lambda: torch.eye(3).to_sparse(),
    "csr": lambda: torch.eye(3).to_sparse_csr(),
    "nested": lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
    "jagged": lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged),
    "quantized": lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8),
    "inference": lambda: torch.inference_mode()(torch.ones)(3),
    "complex": lambda: torch.ones(3, dtype=torch.complex64),
    "float8": lambda: torch.ones(3).to(torch.float8_e4m3fn),
    "expanded": lambda: torch.ones(1).expand(3),
    "subclass": lambda: torch.ones(3).as_subclass(Sub),
    "not contiguous": lambda: torch.ones(3, 3).T[1],
    "empty": lambda: torch.ones(0),
}


class Sub(Tensor):
    pass


def numbers(tensor: Tensor) -> str:
    return repr(tensor.values() if tensor.layout == torch.jagged else tensor)


@pytest.mark.filterwarnings("ignore:.*(nested|Sparse).*")
@pytest.mark.filterwarnings("ignore:.*quantize_per_tensor.*")
@pytest.mark.parametrize("kind", ODD)
def test_tensors_of_every_kind_may_lie_about(kind: str) -> None:
    """As buffers, in lists and as inputs; where torch can write to them, they are put back."""
    model = Counting(lambda module: (writes(module.odd), 0)[1])
    model.odd = ODD[kind]()
    nn.Module.register_buffer(model, "buffer", ODD[kind]())
    given = ODD[kind]()
    before = [numbers(tensor) for tensor in (model.odd, model.buffer, given)]

    def writes(tensor: Tensor) -> None:
        if kind not in {"meta", "expanded", "float8", "empty"}:
            with torch.inference_mode(tensor.is_inference()):
                if kind in {"csr", "jagged"}:
                    tensor.values().mul_(2)
                else:
                    tensor.copy_(tensor * 2 if kind != "quantized" else tensor.dequantize() * 0.5)
            assert numbers(tensor) != before[0]

    with evaluating(model, (given, [ODD[kind]()])):
        model(torch.ones(2, 4))
    assert [numbers(tensor) for tensor in (model.odd, model.buffer, given)] == before


def test_large_tensors_that_are_left_alone_are_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache of many gigabytes costs what a run writes into it."""
    model = Counting(lambda module: module.cache[3].add_(1).sum())
    model.cache = torch.zeros(1000, 100)
    copied: list[int] = []
    clone = Tensor.clone
    monkeypatch.setattr(Tensor, "clone", lambda self: copied.append(self.numel()) or clone(self))
    with evaluating(model):
        model(torch.ones(2, 4))
    assert copied == [100]
    assert not model.cache.any()


def test_timed_runs_are_not_watched() -> None:
    """After one that was: what they write over is known."""
    model, x = Counting(in_a_global_tensor()), torch.randn(2, 4)
    before = kept.clone()
    with evaluating(model, x):
        model(x)
        assert torch._C._len_torch_dispatch_stack() == 1
        with unwatched():
            assert torch._C._len_torch_dispatch_stack() == 0
            model(x)
        assert torch.equal(kept, before + 2)
    assert torch.equal(kept, before)


def test_a_long_chain_of_objects_is_no_recursion() -> None:
    chain: Any = None
    for _ in range(5000):
        chain = [chain]
    with evaluating(Counting(lambda _: 0), [chain]):
        pass


def test_it_holds_after_an_error_too() -> None:
    model, x = Counting(in_what_a_cell_holds()), base()

    def run() -> None:
        with evaluating(model, x):
            x.zero_()
            model.step(model)
            raise RuntimeError("half-way")

    with pytest.raises(RuntimeError, match="half-way"):
        run()
    assert torch.equal(x, base())
    assert model.step(model).tolist() == [2] * 4


def test_caches_of_transformers() -> None:
    transformers = pytest.importorskip("transformers", reason="the extra pycompress[demo] is not installed")
    config = transformers.LlamaConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2, vocab_size=20,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    for cache in (transformers.DynamicCache(config=config), transformers.StaticCache(config=config, max_cache_len=16)):
        tokens = torch.tensor([[1, 2, 3]])
        with torch.no_grad():
            model(tokens, past_key_values=cache, use_cache=True)
        length, keys = cache.get_seq_length(), cache.layers[0].keys.clone()
        inputs = transformers.BatchEncoding({"input_ids": tokens, "past_key_values": cache, "use_cache": True})
        runs = []
        for _ in range(2):
            with evaluating(model, inputs):
                runs.append(call_model(model, inputs).logits.clone())
        assert torch.equal(*runs)
        assert cache.get_seq_length() == length
        assert torch.equal(cache.layers[0].keys, keys)
