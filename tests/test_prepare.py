"""prepare: what trains is what is deployed."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pycompress import Int4, Int8, Known, LowRank, Ramp, Sparse, compress, prepare, save, summary
from pycompress.model import compressed_layers
from pycompress.nn import CompressedLayer
from pycompress.nn.trained import canonical, holder, is_trained
from pycompress.train import Training

PLANS: list[Any] = [
    Int8(), Int8(7), Int8(7, weight_bits=7), Int8(activation="static", observer=Known(-2.0, 3.0)), Int4(),
    Int4(64, symmetric=True), Sparse(0.3), Sparse(pattern="2:4"), Sparse(pattern="4:16", bits=8), Sparse(0.4, pattern="1x4"),
    LowRank(6, rank_guard=False), LowRank(6, bits=8, rank_guard=False),
    {"0": Sparse(0.5, bits=8), "2": Int4()},
]  # fmt: skip
OPTIMIZERS: list[Any] = [
    lambda ps: torch.optim.SGD(ps, 0.02, momentum=0.9, weight_decay=1e-2),
    lambda ps: torch.optim.AdamW(ps, 5e-3, weight_decay=1e-2),
    lambda ps: torch.optim.AdamW(ps, 5e-3, weight_decay=1e-2, fused=True),
]


def model() -> nn.Sequential:
    return nn.Sequential(nn.Linear(32, 48), nn.Tanh(), nn.Linear(48, 16))


def train(
    own: nn.Module, training: Training, optimizer: Any = None, steps: int | None = None, x: Tensor | None = None
) -> None:
    optimizer = optimizer or torch.optim.AdamW(own.parameters(), 5e-3)
    own.train()
    for _ in range(training.steps - training.done if steps is None else steps):
        given = torch.randn(12, 32) if x is None else x
        optimizer.zero_grad()
        ((own(given) - given[:, :16]).square().mean() + training.penalty()).backward()
        optimizer.step()
        training.step()


@pytest.mark.parametrize("plan", PLANS, ids=repr)
@pytest.mark.parametrize("ramp", [Ramp.constant(), Ramp(0, 0.8, every=5)], ids=["once", "ramp"])
def test_evaluated_it_is_the_compressed_model_before_during_and_after(plan: Any, ramp: Ramp) -> None:
    own, x = model(), torch.randn(5, 32)
    training = prepare(own, plan, steps=20, ramp=ramp)
    for steps in (0, 9, 11):
        train(own, training, steps=steps)
        frozen = compress(own.eval())
        assert torch.equal(own(x), frozen(x)), f"after {training.done} steps"
        assert len(compressed_layers(frozen)) == 2 and all(map(is_trained, (own[0], own[2])))
    assert "trained" in str(summary(frozen))
    for name, layer in compressed_layers(frozen).items():
        method = plan.get(name) if isinstance(plan, dict) else plan
        assert layer.weight_type.name == method.name


@pytest.mark.parametrize("plan", PLANS, ids=repr)
def test_the_simulation_is_the_compressed_layer_to_a_rounding(plan: Any) -> None:
    linear = nn.Linear(64, 40)
    prepare(linear, plan["2"] if isinstance(plan, dict) else plan, steps=1)
    x = torch.randn(7, 64)
    assert torch.allclose(linear.train()(x), linear.eval()(x), atol=2e-5)


@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=["sgd", "adamw", "fused adamw"])
@pytest.mark.parametrize("selection", ["magnitude", "movement"])
def test_what_is_pruned_is_zero_after_every_step(optimizer: Any, selection: str) -> None:
    own = model()
    made = optimizer(own.parameters())  # before the model is prepared: it goes on
    training = prepare(own, Sparse(0.2), steps=200, ramp=Ramp(20, 120, every=10), selection=selection, pull=2e-4)
    weight = own[0].weight
    before: list[int] = []
    for step in range(1, 201):
        train(own, training, made, steps=1)
        image = canonical(own[0]).decompress()
        choice: Any = holder(own[0])
        assert int((image != 0).sum()) <= int(choice.now.mask.sum()) and not image[choice.now.mask == 0].any()
        count = int(choice.now.mask.sum())
        assert count == round((1 - training.strength_chosen * 0.8) * 1536), step
        before.append(count)
        if step >= 120:
            assert count == round(0.2 * 1536)
    assert own[0].weight is weight and sorted(before, reverse=True) == before


def test_what_was_pruned_may_come_back_until_the_ramp_is_over() -> None:
    linear = nn.Linear(8, 1, bias=False)
    with torch.no_grad():
        linear.weight.copy_(torch.tensor([[1.0, 1, 1, 1, 0.1, 0.1, 0.1, 0.1]]))
    training = prepare(linear, Sparse(0.5), steps=40, ramp=Ramp.constant(end=20, every=5))
    optimizer = torch.optim.SGD(linear.parameters(), 0.05)
    for _ in range(40):
        x = torch.randn(16, 8)
        optimizer.zero_grad()
        (linear(x) - x[:, 4:].sum(1, keepdim=True)).square().mean().backward()
        optimizer.step()
        training.step()
    assert canonical(linear).decompress().ne(0).tolist() == [[False] * 4 + [True] * 4]


def test_state_dict_keys_parameters_pickle_and_copies_are_those_of_the_dense_model() -> None:
    own, x = model(), torch.randn(3, 32)
    keys, parameters = list(own.state_dict()), list(own.parameters())
    training = prepare(own, {"0": Int8(), "2": Sparse(0.3)}, steps=10)
    train(own, training, steps=3)
    assert list(own.state_dict()) == keys and all(a is b for a, b in zip(own.parameters(), parameters, strict=True))
    for other in (copy.deepcopy(own), pickle.loads(pickle.dumps(own))):
        assert torch.equal(other.eval()(x), own.eval()(x)) and is_trained(other[0])


def test_gates_come_to_the_density_that_is_asked_for() -> None:
    own, x = model(), torch.randn(12, 32)
    training = prepare(own, Sparse(0.1), steps=300, ramp=Ramp(0, 250, every=25), selection="l0")
    train(own, training, steps=200)
    frozen = compress(own.eval())
    assert torch.equal(frozen(x), own(x)), "gates are in the weight"
    gates: Any = holder(own[0])
    assert float(gates.gates.density().detach()) < 0.4
    train(own, training)
    assert not gates.gated
    for layer in compressed_layers(compress(own.eval())).values():
        count = layer.n * layer.k
        assert round(0.1 * count) - 2 <= round(layer.density * count) <= round(0.1 * count)  # type: ignore[operator]


@pytest.mark.parametrize("plan", [Int4(), Int4(64, symmetric=True)], ids=repr)
def test_learned_scales_come_nearer_and_are_what_is_stored(plan: Any) -> None:
    torch.manual_seed(0)
    dense, x = model(), torch.randn(64, 32)
    losses = []
    for learn_scales in (False, True):
        own = copy.deepcopy(dense)
        training = prepare(own, plan, steps=150, ramp=Ramp.constant(end=10, every=5), learn_scales=learn_scales)
        train(own, training, steps=9, x=x)
        assert not holder(own[0]).learned(), "the ramp is not over"
        train(own, training, steps=1, x=x)
        before = canonical(own[0]).scale  # type: ignore[attr-defined]
        train(own, training, x=x)
        frozen = compress(own.eval())
        assert torch.equal(own(x), frozen(x))
        after = frozen[0].canonical().scale
        assert torch.equal(before, after) is not learn_scales
        losses.append(float((own(x) - x[:, :16]).square().mean()))
    assert losses[1] < losses[0]


@pytest.mark.parametrize("plan", [Int4(), {"0": Int8(), "2": Int4(64, symmetric=True)}], ids=repr)
@pytest.mark.parametrize("at", [3, 14])
def test_a_checkpoint_goes_on_with_the_scales_that_were_learned(plan: Any, at: int) -> None:
    dense, x = model(), torch.randn(12, 32)

    def begun(learn_scales: bool = True) -> tuple[nn.Module, Training, Any]:
        own = copy.deepcopy(dense)
        training = prepare(own, plan, steps=20, ramp=Ramp(0, 8, every=4), learn_scales=learn_scales)
        return own, training, torch.optim.AdamW(own.parameters(), 5e-3)

    whole, training, optimizer = begun()
    train(whole, training, optimizer, x=x)
    first, training, optimizer = begun()
    train(first, training, optimizer, steps=at, x=x)
    state = copy.deepcopy((first.state_dict(), training.state_dict(), optimizer.state_dict()))
    second, training, optimizer = begun()
    second.load_state_dict(state[0])
    training.load_state_dict(state[1])
    optimizer.load_state_dict(state[2])
    assert torch.equal(second.eval()(x), first.eval()(x))
    train(second, training, optimizer, x=x)
    assert torch.equal(second.eval()(x), whole.eval()(x))
    _, other, _ = begun(learn_scales=False)
    with pytest.raises(ValueError, match="the state has learn_scales=True, expected False"):
        other.load_state_dict(state[1])


@pytest.mark.parametrize("selection", ["magnitude", "movement", "l0"])
@pytest.mark.parametrize("plan", [PLANS[3], PLANS[5], PLANS[7], PLANS[10]], ids=repr)
def test_a_checkpoint_in_mid_ramp_goes_on_with_equal_results(plan: Any, selection: str, tmp_path: Any) -> None:
    torch.manual_seed(0)
    dense, x = model(), torch.randn(12, 32)

    def begun() -> tuple[nn.Module, Training, Any]:
        own = copy.deepcopy(dense)
        training = prepare(own, plan, steps=30, ramp=Ramp(0, 20, every=6), selection=selection)
        return own, training, torch.optim.AdamW(own.parameters(), 5e-3)

    whole, training, optimizer = begun()
    train(whole, training, optimizer, x=x)
    first, training, optimizer = begun()
    train(first, training, optimizer, steps=14, x=x)
    state = {"model": first.state_dict(), "training": training.state_dict(), "optimizer": optimizer.state_dict()}
    torch.save(state, tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    second, training, optimizer = begun()
    second.load_state_dict(state["model"])
    training.load_state_dict(state["training"])
    optimizer.load_state_dict(state["optimizer"])
    train(second, training, optimizer, x=x)
    assert torch.equal(second.eval()(x), whole.eval()(x))
    with pytest.raises(ValueError, match="expected these 2 layers and 30 steps"):
        training.load_state_dict({**state["training"], "steps": 31})


def test_tied_weights_stay_tied() -> None:
    own = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16))
    own[2].weight = own[0].weight
    training = prepare(own, Int8(), steps=5)
    optimizer = torch.optim.SGD(own.parameters(), 0.05)
    for _ in range(5):
        own(torch.randn(4, 16)).square().sum().backward()
        optimizer.step()
        training.step()
    assert own[0].weight is own[2].weight and holder(own[0]) is holder(own[2])
    frozen, x = compress(own.eval()), torch.randn(3, 16)
    assert torch.equal(frozen(x), own(x))
    assert frozen[0].packed is frozen[2].packed


def test_torchs_fast_path_does_not_pass_twins_by() -> None:
    own, x = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).eval(), torch.randn(2, 5, 16)
    dense = own(x).detach()
    prepare(own, {"linear*": Int8(7)}, steps=1)
    with torch.no_grad():
        assert torch.equal(own(x), compress(own, blocks=False)(x)) and not torch.equal(own(x), dense)


def test_a_layer_that_cannot_be_compressed_is_left_with_its_reason() -> None:
    own = nn.Sequential(nn.Linear(8, 8), nn.Conv2d(4, 4, 3, groups=2))
    training = prepare(own, Sparse(0.5), steps=1)
    assert is_trained(own[0]) and not is_trained(own[1]) and "1" in training.left
    assert repr(training) == "Training(1 layers, step 0 of 1, strength 1.00)"
    refused = prepare(nn.Linear(8, 8), LowRank(8), steps=1)
    assert "break-even is rank 3" in refused.left["the model itself"]


def test_penalties_shrink_what_is_sparse() -> None:
    for options in ({"l1": 1e-2}, {"group": 1e-2}):
        own, other = model(), None
        other = copy.deepcopy(own)
        x = torch.randn(12, 32)
        for each, extra in ((own, options), (other, {})):
            train(each, prepare(each, Sparse(0.9, pattern="1x4"), steps=40, ramp=Ramp.constant(end=40), **extra), x=x)
        assert own[0].weight.abs().sum() < 0.9 * other[0].weight.abs().sum()
    linear = nn.Linear(6, 2, bias=False)
    training = prepare(linear, Sparse(0.5, pattern="1x4"), steps=1, group=1.0)
    w = linear.weight.detach().double()
    expected = 2 * (w[:, :4].square().sum(1).sqrt().sum() + w[:, 4:].square().sum(1).sqrt().sum())
    assert float(training.penalty()) == pytest.approx(float(expected), rel=1e-5)


def test_embeddings_and_convolutions_train() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tokens, self.conv, self.head = nn.Embedding(20, 8), nn.Conv2d(1, 4, 3), nn.Linear(4, 2)

        def forward(self, ids: Tensor) -> Tensor:
            return self.head(self.conv(self.tokens(ids)[:, None]).mean((2, 3)))  # type: ignore[no-any-return]

    own, ids = Net(), torch.randint(20, (3, 6))
    plan = {"tokens": Int8(embeddings=True), "conv": Sparse(0.5), "head": Int8()}
    training = prepare(own, plan, steps=4)
    optimizer = torch.optim.AdamW(own.parameters(), 1e-2)
    for _ in range(4):
        optimizer.zero_grad()
        own(ids).square().sum().backward()
        assert own.tokens.weight.grad is not None and own.conv.weight.grad is not None
        optimizer.step()
        training.step()
    frozen = compress(own.eval())
    assert torch.equal(frozen(ids), own(ids)) and len(compressed_layers(frozen)) == 3


def test_frozen_in_place_and_refused_where_it_makes_no_sense(tmp_path: Any) -> None:
    own = model()
    training = prepare(own, Int8(), steps=1)
    with pytest.raises(ValueError, match="prepared, expected compress"):
        save(own, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="expected no plan"):
        compress(own, Int8())
    with pytest.raises(ValueError, match="0 is prepared already"):
        prepare(own, Int8(), steps=1)
    x = torch.randn(2, 32)
    expected = own.eval()(x)
    assert compress(own, inplace=True) is own and isinstance(own[0], CompressedLayer)
    assert torch.equal(own(x), expected)
    with pytest.raises(TypeError, match="no layer of the model is prepared"):
        compress(model())
    training.step()
    with pytest.raises(RuntimeError, match="step 2 of 1"):
        training.step()


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"steps": -1}, "steps is -1"),
        ({"steps": 5, "ramp": Ramp(0, 9)}, "expected one that fits into 5 steps"),
        ({"steps": 5, "ramp": 3}, "ramp is 3"),
        ({"steps": 5, "pull": -1.0}, "pull is -1.0"),
        ({"steps": 5, "selection": "luck"}, "selection is 'luck'"),
    ],
)
def test_bad_arguments_are_named_and_leave_the_model(options: Any, text: str) -> None:
    own = model()
    with pytest.raises((TypeError, ValueError), match=text):
        prepare(own, Int8(), **options)
    assert not any(map(is_trained, own.modules()))
    half = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8).bfloat16())
    with pytest.raises(ValueError, match=r"the weight of 1 is torch\.bfloat16, expected a float32 parameter"):
        prepare(half, Int8(), steps=1)
    assert not is_trained(half[0])


def test_a_ramp_says_when_and_how_strong() -> None:
    ramp = Ramp(0.1, 0.5, every=10, start=0.2).of(100)
    assert (ramp.begin, ramp.end) == (10, 50)
    assert [ramp.strength(step) for step in (0, 9, 50, 99)] == [0.2, 0.2, 1.0, 1.0]
    assert ramp.strength(30) == pytest.approx(1 - 0.8 * 0.5**3)
    assert [step for step in range(101) if ramp.due(step)] == [10, 20, 30, 40, 50]
    assert Ramp.constant(5, 8, every=2).of(10).strength(5) == 1.0
    assert [Ramp(7, 12, every=4).of(20).due(step) for step in (6, 7, 11, 12, 13)] == [False, True, True, True, False]
    for bad in ({"begin": -1}, {"end": 1.5}, {"every": 0}, {"start": 2.0}, {"power": -1}):
        with pytest.raises(ValueError, match=f"Ramp: {next(iter(bad))}"):
            Ramp(**bad)
    with pytest.raises(TypeError, match="begin is '1'"):
        Ramp(begin="1")  # type: ignore[arg-type]


def test_methods_are_reached_by_milder_ones() -> None:
    shape = (48, 32)
    assert Sparse(0.2).at(0.5, shape) == Sparse(0.6) and Sparse(0.2).at(1, shape) == Sparse(0.2)
    assert Sparse(pattern="2:4").at(0.5, shape) == Sparse(0.75) and Sparse(pattern="2:4").at(1, shape) == Sparse(
        pattern="2:4"
    )
    assert Sparse(0.2, "1x4").at(0.0, shape) == Sparse(1.0, "1x4") and Sparse(None).at(0.3, shape) == Sparse(None)
    assert LowRank(8).at(0.5, shape).rank == 20 and LowRank(40).at(0.2, shape).rank == 32
    assert LowRank(energy=0.8).at(0.5, shape).energy == 0.9 and LowRank(error=0.2).at(0.5, shape).error == 0.1
    assert LowRank(share=0.5).at(0.5, shape).share == 0.75 and LowRank(8).at(1.0, shape) == LowRank(8)
    bits = [Int4().at(strength, shape) for strength in (0.2, 0.7, 1.0)]
    assert [getattr(method, "weight_bits", 4) for method in bits] == [8, 7, 4]
    assert [Int8(7, weight_bits=7).at(strength, shape).weight_bits for strength in (0.9, 1.0)] == [8, 7]
