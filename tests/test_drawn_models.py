"""Models as people write them, drawn at random: what is done to one leaves its outputs close, or names what stands against it.

A drawn model is a chain of blocks, each of which does one thing that has made a compressed model silently wrong: it walks a
plain list of its layers, patches a forward, takes another path under a flag, keeps tensors between calls, writes into its input.
Whatever ``compress``, ``load``, ``validate`` and ``calibrate`` make of it, either the outputs stay close on every path through it,
or an error or a reason names the layer; and a model that was passed in computes afterwards what it did before.

`make drawn` draws 2,000 of them.
"""

from __future__ import annotations

import contextlib
import functools
import random
import sys
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from types import MethodType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import linear, relu

import pycompress as pc
from pycompress.methods.method import Method
from pycompress.plan import Plan

WIDTH, ROWS = 24, 5

# --- blocks: [rows, WIDTH] -> [rows, WIDTH] ---------------------------------------------------------------------------------


class Block(nn.Module):
    """Two layers and an activation; how they are called is what the blocks differ in."""

    def __init__(self, activation: Callable[[], nn.Module] = nn.ReLU) -> None:
        super().__init__()
        self.up, self.act, self.down = nn.Linear(WIDTH, WIDTH), activation(), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        h = self.up(x)
        h = self.act(h)
        return self.down(h)  # type: ignore[no-any-return]


class Nested(Block):
    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.act(self.up(x)))  # type: ignore[no-any-return]


class Chain(nn.Module):
    """A Sequential."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(x)  # type: ignore[no-any-return]


class ChainTwice(Chain):
    """Calls a layer of its Sequential by itself, too."""

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(x) + self.mlp[0](x)  # type: ignore[no-any-return]


class ChainOfFeatures(Chain):
    """Walks its Sequential, and keeps what comes between."""

    def forward(self, x: Tensor) -> Tensor:
        features = []
        for step in self.mlp:
            x = step(x)
            features.append(x)
        return torch.stack(features).sum(dim=0)


class ChainSliced(Chain):
    def forward(self, x: Tensor) -> Tensor:
        return self.mlp[1:](self.mlp[:1](x) * 0.5)  # type: ignore[no-any-return]


class Items(nn.Module):
    """Walks a ModuleList of Sequentials."""

    def __init__(self) -> None:
        super().__init__()
        self.items = nn.ModuleList(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU()) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for item in self.items:
            x = item(x) + x
        return x


class ItemsOpened(Items):
    def forward(self, x: Tensor) -> Tensor:
        for item in self.items:
            x = item[0](x) - item[1](x)
        return x


class Features(Block):
    """What comes before the activation counts as well."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.up(x)
        y = self.act(h)
        return self.down(y) + h  # type: ignore[no-any-return]


class Late(Block):
    def forward(self, x: Tensor) -> Tensor:
        h = self.up(x)
        scale = h.abs().amax()
        h = self.act(h)
        return self.down(h) / (1 + scale)  # type: ignore[no-any-return]


class ByName(Block):
    def forward(self, x: Tensor) -> Tensor:
        for name in ("up", "act", "down"):
            x = getattr(self, name)(x)
        return x


class ByChildren(Block):
    def forward(self, x: Tensor) -> Tensor:
        for child in self.children():
            x = child(x) * 0.9
        return x


class Listed(Block):
    """A plain list holds its layers."""

    def __init__(self) -> None:
        super().__init__()
        self.steps = [self.up, self.act, self.down]

    def forward(self, x: Tensor) -> Tensor:
        for step in self.steps:
            x = step(x)
        return x


class Held(Block):
    """Something else than a list does, and forward calls that."""

    def __init__(self, draw: random.Random) -> None:
        super().__init__()
        layers = [self.up, self.act, self.down]
        self.steps: Any = draw.choice(
            [
                lambda: tuple(layers),
                lambda: deque(layers),
                lambda: {"first": layers[0], "second": layers[1], "third": layers[2]},
                lambda: SimpleNamespace(first=layers[0], rest=[layers[1], layers[2]]),
                lambda: [[layers[0]], (layers[1], {"last": layers[2]})],
                lambda: [layer.forward for layer in layers],
                lambda: [layer.__call__ for layer in layers],
                lambda: {"all": [functools.partial(layer) for layer in layers]},
                lambda: [(lambda x, layer=layer: layer(x)) for layer in layers],
                lambda: [_calling(layer) for layer in layers],
                lambda: [_Call(layer) for layer in layers],
                lambda: [lambda x: self.up(x) * 1.0, lambda x: self.act(x) + 0, lambda x: self.down(x)[:]],
            ]
        )()

    def forward(self, x: Tensor) -> Tensor:
        for step in _flat(self.steps):
            x = step(x)
        return x


def _calling(layer: nn.Module) -> Callable[[Tensor], Tensor]:
    def call(x: Tensor) -> Tensor:
        return layer(x)  # type: ignore[no-any-return]

    return call


class _Call:
    __slots__ = ("layer",)

    def __init__(self, layer: nn.Module) -> None:
        self.layer = layer

    def __call__(self, x: Tensor) -> Tensor:
        return self.layer(x)  # type: ignore[no-any-return]


def _flat(value: Any) -> Iterator[Callable[[Tensor], Tensor]]:
    if callable(value):
        yield value
    else:
        items = (
            value.values()
            if isinstance(value, dict)
            else vars(value).values()
            if isinstance(value, SimpleNamespace)
            else value
        )
        for item in items:
            yield from _flat(item)


class HeldBeside(Block):
    """Calls its layers by their names, and once more what a list holds of them."""

    def __init__(self) -> None:
        super().__init__()
        self.more = [self.up]

    def forward(self, x: Tensor) -> Tensor:
        h = self.act(self.up(x))
        return self.down(h) + self.more[0](x)  # type: ignore[no-any-return]


class Shared(nn.Module):
    """One layer under two names, one activation behind two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first = self.second = nn.Linear(WIDTH, WIDTH)
        self.third, self.act = nn.Linear(WIDTH, WIDTH), nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.first(x))
        return self.act(self.third(self.second(x)))  # type: ignore[no-any-return]


class Tied(Block):
    def __init__(self) -> None:
        super().__init__()
        self.down.weight = self.up.weight


class Patched(Block):
    """A layer whose forward is its own."""

    def __init__(self, draw: random.Random) -> None:
        super().__init__()
        plain = self.up.forward
        self.up.forward = draw.choice(  # type: ignore[method-assign]
            [lambda x: 0.3 * plain(x), MethodType(lambda layer, x: linear(x, layer.weight * 0.3, layer.bias), self.up)]
        )


class PatchedActivation(Block):
    def __init__(self) -> None:
        super().__init__()
        self.act.forward = lambda x: relu(x) * 0.5  # type: ignore[method-assign]


class PatchedParent(Block):
    """It itself has a forward of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.forward = self.other  # type: ignore[method-assign]

    def other(self, x: Tensor) -> Tensor:
        return self.down(self.up(x)) - self.act(x)  # type: ignore[no-any-return]


class Hooked(Block):
    def __init__(self, draw: random.Random) -> None:
        super().__init__()
        which = draw.choice([self.up, self.act, self.down])
        add = draw.choice(["forward", "pre", "state", "load", "backward"])
        if add == "forward":
            which.register_forward_hook(lambda _module, _args, y: y * 0.5)
        elif add == "pre":
            which.register_forward_pre_hook(lambda _module, args: (args[0] * 0.5,))
        elif add == "state":
            which.register_state_dict_post_hook(lambda *_args: None) if hasattr(
                which, "register_state_dict_post_hook"
            ) else which._register_state_dict_hook(lambda *_args: None)
        elif add == "load":
            which.register_load_state_dict_post_hook(lambda *_args: None)
        else:
            which.register_full_backward_hook(lambda *_args: None)


class Flagged(Block):
    """Takes another path under a flag."""

    PATHS: Sequence[str] = ("plain", "bare", "features")

    def __init__(self) -> None:
        super().__init__()
        self.path = "plain"

    def forward(self, x: Tensor) -> Tensor:
        h = self.up(x)
        if self.path == "bare":
            return h  # type: ignore[no-any-return]
        y = self.down(self.act(h))
        return y + h if self.path == "features" else y  # type: ignore[no-any-return]


class Short(Block):
    """Leaves early, between the layer and its activation."""

    def __init__(self) -> None:
        super().__init__()
        self.path = "plain"

    def forward(self, x: Tensor) -> Tensor:
        h = self.up(x)
        h = h if self.path == "bare" else self.act(h)
        return self.down(h) if self.path != "features" else h  # type: ignore[no-any-return]


class Grad(Block):
    """Looks at whether gradients are recorded."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.up(x)
        return self.down(self.act(h) if torch.is_grad_enabled() else h)  # type: ignore[no-any-return]


class Trained(Block):
    def forward(self, x: Tensor) -> Tensor:
        h = self.up(x)
        if not self.training:
            h = self.act(h)
        return self.down(h)  # type: ignore[no-any-return]


class Keyword(Block):
    """Another way in, by a keyword and by a method."""

    def forward(self, x: Tensor, *, return_features: bool = False) -> Tensor:
        h = self.features(x)
        return h if return_features else self.down(self.act(h))  # type: ignore[no-any-return]

    def features(self, x: Tensor) -> Tensor:
        return self.up(x)  # type: ignore[no-any-return]


class Reached(nn.Module):
    """Reaches into a block past its forward."""

    def __init__(self) -> None:
        super().__init__()
        self.block = Block()

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x) + self.block.up(x)  # type: ignore[no-any-return]


class Reads(Block):
    """Computes with the weight of a layer itself."""

    def forward(self, x: Tensor) -> Tensor:
        h = linear(x.float(), self.up.weight.float(), self.up.bias)
        return self.down(self.act(h).to(self.down.weight.dtype))  # type: ignore[no-any-return]


class ReadsMore(Block):
    def forward(self, x: Tensor) -> Tensor:
        h = x @ self.up.weight.t()
        norm = self.down.weight.data.norm() + self.down.weight.shape[0]
        return self.down(h) / norm  # type: ignore[no-any-return]


class Counting(Block):
    """Counts its calls, and says so."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.register_buffer("shift", torch.linspace(0, 1, WIDTH), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(x) * (1 + float(self.calls)) + self.shift


class Keeping(Block):
    """Keeps what it computed, with its history."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: Any = None
        self.all: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        self.all.append(y)
        y = y if self.kept is None else y + 0.5 * self.kept
        self.kept = y
        return y


class Kept(Keeping):
    """Has run with gradients before."""

    def __init__(self) -> None:
        super().__init__()
        self(torch.ones(ROWS, WIDTH))


class Writing(Block):
    """Writes into its input."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            x.mul_(0.5)
        return super().forward(x)


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.utils.weight_norm(nn.Linear(WIDTH, WIDTH))  # type: ignore[no-untyped-call]
        self.norm, self.second = nn.BatchNorm1d(WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.norm(self.first(x)))  # type: ignore[no-any-return]


class Bare(nn.Module):
    """A parameter without a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix, self.up = nn.Parameter(torch.randn(WIDTH, WIDTH) / 5), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(x) @ self.matrix  # type: ignore[no-any-return]


class Subclass(nn.Module):
    class Half(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:  # noqa: A002
            return 0.5 * super().forward(input)

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = Subclass.Half(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x))  # type: ignore[no-any-return]


class Wrapped(nn.Module):
    """A low-rank adapter around a layer, as fine-tuning leaves it."""

    def __init__(self) -> None:
        super().__init__()
        self.base, self.a, self.b = (
            nn.Linear(WIDTH, WIDTH),
            nn.Linear(WIDTH, 2, bias=False),
            nn.Linear(2, WIDTH, bias=False),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.b(self.a(x.to(self.a.weight.dtype)))  # type: ignore[no-any-return]


DRAWS: list[Callable[[random.Random], nn.Module]] = [
    lambda draw: Block(draw.choice([nn.ReLU, nn.GELU, nn.SiLU, nn.Tanh])),
    *(Held, Held, Patched, Hooked),
    *(
        lambda _draw, kind=kind: kind()
        for kind in (
            Nested, Chain, ChainTwice, ChainOfFeatures, ChainSliced, Items, ItemsOpened, Features, Late, ByName, ByChildren, Listed,
            HeldBeside, Shared, Tied, PatchedActivation, PatchedParent, Flagged, Short, Grad, Trained, Keyword, Reached, Reads,
            ReadsMore, Counting, Keeping, Kept, Writing, Normed, Bare, Subclass, Wrapped,
        )
    ),
]  # fmt: skip


class Model(nn.Module):
    """A chain of blocks, with one that occurs twice now and then."""

    def __init__(self, draw: random.Random) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(draw.choice(DRAWS)(draw) for _ in range(draw.randint(1, 3)))
        if draw.random() < 0.2:
            self.blocks.append(self.blocks[0])
        self.head = nn.Linear(WIDTH, 7)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
            x = x / (x.detach().norm() / x.numel() ** 0.5 + 1e-3)
        return self.head(x)  # type: ignore[no-any-return]


# --- what is drawn ---------------------------------------------------------------------------------------------------------

# With how far outputs may move: the methods are gentle here, so that a lost or doubled activation stands out.
METHODS: list[tuple[Method, float]] = [
    (pc.Sparse(1.0), 1e-4),
    (pc.LowRank(WIDTH, rank_guard=False), 1e-3),
    (pc.Int8(16), 0.08),
    (pc.Int8(), 0.08),
]
ACTIONS = ["copy", "inplace", "examples"]


@dataclass
class Drawn:
    """All that a seed decides. ``model`` builds the same one each time, ``other`` one with other numbers."""

    seed: int
    method: Method = field(init=False)
    plan: Plan = field(init=False)
    tolerance: float = field(init=False)
    action: str = field(init=False)

    def __post_init__(self) -> None:
        draw = random.Random(self.seed)
        (self.method, self.tolerance), self.action = draw.choice(METHODS), draw.choice(ACTIONS)
        # The head is too small for the rank: now and then, that stops a compression half-way.
        self.plan = self.method if draw.random() < 0.1 else {"head": None, "*": self.method}

    def model(self, numbers: int = 0) -> Model:
        torch.manual_seed(numbers)
        return Model(random.Random(self.seed)).eval()

    def x(self) -> Tensor:
        return torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(self.seed))

    def __str__(self) -> str:
        blocks = ", ".join(type(block).__name__ for block in self.model().blocks)
        return f"seed {self.seed}: {self.method}, {self.action}: {blocks}"


def runs(drawn: Drawn, model: nn.Module) -> dict[str, Tensor]:
    """What a model gives on every path that its blocks have; it is not what it was afterwards."""
    found = {}
    torch.manual_seed(1)
    for path in Flagged.PATHS:
        for module in model.modules():
            if hasattr(module, "path"):
                module.path = path  # type: ignore[assignment]
        for mode in ("no gradient", "gradient", "training"):
            model.train(mode == "training")
            with contextlib.nullcontext() if mode == "gradient" else torch.no_grad():
                found[f"{path}, {mode}"] = model(drawn.x()).detach().clone()
    keyword = [module for module in model.modules() if isinstance(module, Keyword)]
    model.eval()
    for i, module in enumerate(keyword):
        found[f"features {i}"] = module(drawn.x(), return_features=True).detach()
    return found


def furthest(expected: dict[str, Tensor], actual: dict[str, Tensor]) -> tuple[float, str]:
    """The largest relative distance, and the path on which it is."""
    assert expected.keys() == actual.keys()
    far = {
        path: float((actual[path].double() - y.double()).norm() / (y.double().norm() + 1e-9))
        for path, y in expected.items()
    }
    worst = max(far, key=lambda path: (far[path] != far[path], far[path]))
    return far[worst], worst


def check(drawn: Drawn, folder: Path) -> str:
    """Does it all to one model. Returns what came of it: 'done', or what was refused."""
    expected = runs(drawn, drawn.model())

    def same(model: nn.Module, what: str) -> None:
        distance, path = furthest(expected, runs(drawn, model))
        assert distance == 0, f"{drawn}: {what} changed the model: {distance:.3g} ({path})"

    def close(model: nn.Module, what: str, reference: dict[str, Tensor], tolerance: float) -> None:
        distance, path = furthest(reference, runs(drawn, model))
        assert distance <= tolerance, f"{drawn}: {what}: outputs moved by {distance:.3g} ({path})"

    model = drawn.model()
    pc.calibrate(model, [drawn.x(), drawn.x()])
    same(model, "calibrate")

    model, x = drawn.model(), drawn.x()
    arguments: dict[str, Any] = {"inplace": drawn.action == "inplace"}
    if drawn.action == "examples":
        arguments["example_inputs"] = x
    try:
        compressed = pc.compress(model, drawn.plan, **arguments)
    except (ValueError, TypeError, RuntimeError) as error:
        _expect_a_name(drawn, error, model)
        same(model, "compress, which was refused,")
        return "compress was refused"
    assert torch.equal(x, drawn.x()), f"{drawn}: compress wrote into the inputs"
    for record in pc.summary(compressed).layers:
        assert record.method is not None or record.reason, f"{drawn}: {record.name} is dense without a reason"
    path = folder / "model.safetensors"
    again = pc.compress(drawn.model(), drawn.plan, **{**arguments, "inplace": True})
    if not pc.model.compressed_layers(again):
        close(compressed, "compress", expected, drawn.tolerance)
        return "nothing to compress"
    came = "done"
    try:
        report = pc.validate(again, x)
    except (ValueError, TypeError, RuntimeError) as error:
        _expect_a_name(drawn, error, again)
        came = "validate was refused"
    else:
        assert torch.equal(x, drawn.x()), f"{drawn}: validate wrote into the inputs"
        assert report.ok or report.verdict, f"{drawn}: {report}"
        assert "DIVERGED" not in report.verdict, f"{drawn}: {report}"
    pc.save(again, path)
    compressed_runs = runs(drawn, compressed)
    distance, where = furthest(expected, compressed_runs)
    assert distance <= drawn.tolerance, f"{drawn}: compress: outputs moved by {distance:.3g} ({where})"
    if not arguments["inplace"]:
        same(model, "compress")
    close(again, "in place, validated and saved, against the other one", compressed_runs, 1e-6)
    other = drawn.model(numbers=1)
    before = runs(drawn, drawn.model(numbers=1))
    try:
        loaded = pc.load(other, path)
    except (ValueError, TypeError, RuntimeError) as error:
        _expect_a_name(drawn, error, other)
        distance, where = furthest(before, runs(drawn, other))
        assert distance == 0, f"{drawn}: load, which was refused, changed the model: {distance:.3g} ({where})"
        return "load was refused"
    fresh = _with_state_of(drawn, loaded)
    close(fresh, "load", compressed_runs, 1e-6)
    return came


def _with_state_of(drawn: Drawn, loaded: nn.Module) -> nn.Module:
    """What no file holds: tensors that a model keeps as plain attributes are those of another model's numbers."""
    ours = dict(drawn.model().named_modules(remove_duplicate=False))
    for name, module in loaded.named_modules(remove_duplicate=False):
        if isinstance(module, Keeping):
            module.kept, module.all = ours[name].kept, ours[name].all
    return loaded


def _expect_a_name(drawn: Drawn, error: Exception, model: nn.Module) -> None:
    text, names = str(error), [name for name, _ in model.named_modules(remove_duplicate=False) if name]
    assert "the model" in text or any(name in text for name in names), f"{drawn}: refused without a name: {text}"


# --- tests -----------------------------------------------------------------------------------------------------------------


def _hold(seeds: range, folder: Path) -> None:
    came = [check(Drawn(seed), folder) for seed in seeds]
    assert came.count("done") > len(came) // 2, came  # most are not refused


def test_some_drawn_models(tmp_path: Path) -> None:
    _hold(range(20), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("start", range(20, 200, 60))
def test_many_drawn_models(start: int, tmp_path: Path) -> None:
    _hold(range(start, start + 60), tmp_path)


@pytest.mark.parametrize("kind", [Block, Nested, Chain, Items], ids=lambda kind: kind.__name__)
def test_plain_ones_are_fused_nevertheless(kind: type[nn.Module]) -> None:
    compressed = pc.compress(kind(), pc.Int8())
    assert any(record.activation != "none" for record in pc.summary(compressed).layers)


if __name__ == "__main__":  # how many; from which seed
    number, first = (int(text) for text in (sys.argv[1:] + ["2000", "0"][len(sys.argv) - 1 :]))
    with TemporaryDirectory() as where:
        came = Counter(check(Drawn(seed), Path(where)) for seed in range(first, first + number))
    print(f"{number} drawn models:", ", ".join(f"{count} {what}" for what, count in came.most_common()))
