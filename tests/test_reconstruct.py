"""reconstruct: what a compressed model is trained to be, and stays."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pycompress import Int4, Int8, LowRank, Sparse, compress, reconstruct, summary
from pycompress.model import compressed_layers
from pycompress.train.calls import Calls, output
from pycompress.train.fit import order
from pycompress.train.losses import closeness, divergence, mean_cosine, relative

WIDTH = 16
PLANS = [
    Sparse(0.4),
    Sparse(pattern="2:4", bits=8),
    Int4(),
    LowRank(4, bits=8, rank_guard=False),
    {"*.up": Sparse(0.4), "*": LowRank(4, residual=Int8(), rank_guard=False)},
]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)
        self.norm, self.dropout = nn.LayerNorm(WIDTH), nn.Dropout(0.5)

    def forward(self, x: Tensor, scale: Tensor | None = None) -> tuple[Tensor]:
        y = self.dropout(self.down(torch.relu(self.up(x))))
        return (self.norm(x + y if scale is None else x + y * scale),)


class Model(nn.Module):
    """Blocks one behind another; the result of ``twice`` as large an input where that is asked for, so that they are no chain."""

    def __init__(self, blocks: int = 2, between: float = 1.0) -> None:
        super().__init__()
        self.blocks, self.head, self.between = (
            nn.ModuleList([Block() for _ in range(blocks)]),
            nn.Linear(WIDTH, 8),
            between,
        )

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        for block in self.blocks:
            (x,) = block(x * self.between if self.between != 1 else x, scale=x.new_ones(1))
        return self.head(x)  # type: ignore[no-any-return]


def batches(count: int = 5) -> list[Tensor]:
    return [torch.randn(3, 6, WIDTH) for _ in range(count)]


def error(model: nn.Module, dense: nn.Module, x: Tensor) -> float:
    with torch.no_grad():
        return float((model(x) - dense(x)).norm() / dense(x).norm())


def trained(model: nn.Module, plan: Any, given: list[Any], **options: Any) -> Any:
    return reconstruct(model, plan, given, **{"blocks": "blocks.*", "steps": 12, "lr": 3e-3, "whole": 0.5, **options})


@pytest.mark.parametrize("plan", PLANS, ids=repr)
def test_it_comes_closer_in_the_same_format(plan: Any) -> None:
    dense, given = Model().eval(), batches()
    before, state = compress(dense, plan), copy.deepcopy(dense.state_dict())
    after = trained(dense, plan, given, steps=40)
    x = torch.randn(20, 6, WIDTH)
    assert error(after, dense, x) < error(before, dense, x)
    assert all(torch.equal(dense.state_dict()[name], value) for name, value in state.items()), "the original"
    for name, layer in compressed_layers(after).items():
        weight, start = layer.canonical(), compressed_layers(before)[name].canonical()
        assert type(weight) is type(start) and layer.activation == compressed_layers(before)[name].activation
        if isinstance(plan, Sparse):
            assert bool((weight.decompress()[start.decompress() == 0] == 0).all())
        note = next(record for record in summary(after).layers if record.name == name).note
        assert ("reconstructed, " in note) is (name != "head")
    assert not torch.equal(after.blocks[0].norm.weight, dense.blocks[0].norm.weight)
    assert not torch.equal(after.blocks[0].up.bias, dense.blocks[0].up.bias)
    assert compressed_layers(after)["head"].same_weight(compressed_layers(before)["head"]), "outside of the blocks"


def test_scores_are_those_of_the_result() -> None:
    dense, given, told = Model().eval(), batches(), []
    after = trained(
        dense, Int8(7), given, held_out=0.2, progress=lambda now, model: told.append((now, model(given[2])))
    )
    with torch.no_grad():
        measured = float(closeness(after(given[2]), dense(given[2]), None))
        ours, theirs = given[2], given[2]
        for block, other in zip(after.blocks, dense.blocks, strict=True):
            (ours,), (theirs,) = block(ours, ours.new_ones(1)), other(theirs, theirs.new_ones(1))
            measured += float(relative(ours, theirs, None)) / len(dense.blocks)
    assert measured == pytest.approx(told[-1][0].score, rel=1e-5)
    assert [now.block for now, _ in told[:1]] == ["blocks.0"] and told[-1][0].block == ""
    assert told[-1][0].score <= told[-1][0].first


def test_the_seed_decides() -> None:
    dense, given = Model().eval(), batches()
    one, same, other = (trained(dense, Sparse(0.4), given, seed=seed) for seed in (1, 1, 2))
    first, second, third = (torch.cat([p.flatten() for p in m.state_dict().values()]) for m in (one, same, other))
    assert torch.equal(first, second) and not torch.equal(first, third)


def test_every_epoch_has_an_order_of_its_own() -> None:
    steps = [order("0/1", step, 7) for step in range(21)]
    assert all(sorted(steps[i : i + 7]) == [*range(7)] for i in (0, 7, 14))
    assert steps[:7] != steps[7:14] != steps[14:]


class Stop(Exception):
    pass


def stopping(at: int, error: type[BaseException]) -> Callable[..., None]:
    """Ends a training at its so manieth score."""
    scores = iter(range(1000))

    def progress(*_: Any) -> None:
        if next(scores) == at:
            raise error

    return progress


@pytest.mark.parametrize("at", [0, 13, 30])
def test_it_goes_on_where_it_was_interrupted(at: int, tmp_path: Path) -> None:
    dense, given, path = Model().eval(), batches(), tmp_path / "training"
    whole = trained(dense, Sparse(0.4), given, steps=24)
    with pytest.raises(Stop):
        trained(dense, Sparse(0.4), given, steps=24, checkpoint=path, progress=stopping(at, Stop))
    resumed = trained(dense, Sparse(0.4), given, steps=24, checkpoint=path)
    for name, value in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name
    assert str(summary(resumed)) == str(summary(whole))
    with pytest.raises(ValueError, match="checkpoint of another training"):
        trained(dense, Sparse(0.3), given, steps=24, checkpoint=path)
    path.write_bytes(b"no")
    with pytest.raises(ValueError, match="is no checkpoint of a training"):
        trained(dense, Sparse(0.4), given, steps=24, checkpoint=path)


def test_an_interrupt_ends_it_well() -> None:
    dense, given = Model().eval(), batches()
    after = trained(dense, Sparse(0.4), given, progress=stopping(4, KeyboardInterrupt))
    assert "steps, interrupted" in str(summary(after))
    before = compressed_layers(compress(dense, Sparse(0.4)))
    same = [name for name, layer in compressed_layers(after).items() if layer.same_weight(before[name])]
    assert same == ["blocks.1.up", "blocks.1.down", "head"], "the first block was trained, the others not yet"


def test_minutes() -> None:
    dense, given = Model().eval(), batches()
    after = trained(dense, Sparse(0.4), given, steps=None, minutes=0.01)
    assert "reconstructed, " in str(summary(after))
    untouched = trained(dense, Sparse(0.4), given, steps=None, minutes=0)
    assert torch.equal(untouched(given[0]), compress(dense, Sparse(0.4))(given[0]))


@pytest.mark.parametrize("between", [1.0, 0.5])
def test_inputs_are_those_that_the_model_gives(between: float) -> None:
    """Whether they are carried on from block to block, or the model runs again."""
    model, given = Model(3, between).eval(), batches(3)
    calls = Calls(model, given, None)
    seen: list[Tensor] = []
    model.blocks[2].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    for block in model.blocks:
        found = calls.of(block)
    with torch.no_grad():
        seen.clear()
        for x, call in zip(given, found, strict=True):
            model(x)
            assert torch.equal(call.args[0], seen[-1])
            assert torch.equal(model.head(output(model.blocks[2], call)), model(x))


def test_padding_does_not_count() -> None:
    dense, mask = Model().eval(), torch.ones(3, 6, dtype=torch.int64)
    mask[:, 4:] = 0
    given = [{"x": x, "attention_mask": mask} for x in batches(4)]
    (call, *_) = Calls(dense, given, "attention_mask").of(dense.blocks[0])
    assert call.mask is not None and torch.equal(call.mask, mask.bool())
    noisy = [
        {**batch, "x": torch.where(mask[..., None] == 1, batch["x"], 100 * torch.randn(3, 6, WIDTH))} for batch in given
    ]
    one, other = (trained(dense, Sparse(0.4), inputs, mask="attention_mask") for inputs in (given, noisy))
    assert torch.allclose(one(given[0]["x"]), other(given[0]["x"]), atol=1e-4)


def test_losses() -> None:
    y, target = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    mask = torch.tensor([[True, True, False], [True, False, False]])
    far = torch.where(mask[..., None], y, 1e6)
    for loss in (relative, mean_cosine, divergence):
        assert float(loss(target, target, mask)) == pytest.approx(0, abs=1e-6)
        assert torch.allclose(loss(far, target, mask), loss(y, target, mask))
        assert float(loss(y, target, None)) > 0
    rows = torch.cat([y[0, :2], y[1, :1]]), torch.cat([target[0, :2], target[1, :1]])
    assert float(relative(y, target, mask)) == pytest.approx(
        float((rows[0] - rows[1]).square().sum() / rows[1].square().sum())
    )
    assert torch.equal(closeness({"logits": y}, {"logits": target}, mask), divergence(y, target, mask))


def test_the_whole_model_alone() -> None:
    dense, given = Model().eval(), batches()
    after = reconstruct(dense, Sparse(0.4), given, steps=20, lr=3e-3)
    assert error(after, dense, given[0]) < error(compress(dense, Sparse(0.4)), dense, given[0])
    assert all(record.note.endswith("reconstructed, 20 steps") for record in summary(after).layers)


class Twice(Model):
    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return super().forward(super().forward(x, attention_mask).repeat(1, 1, 2))  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": None}, "minutes is None, steps is None, expected exactly one"),
        ({"minutes": 1}, "minutes is 1, steps is 12, expected exactly one"),
        ({"steps": -1}, "steps is -1, expected a number from 0"),
        ({"whole": 2}, "whole is 2, held_out is 0.1, expected shares"),
        ({"blocks": "layers.*"}, r"the glob 'layers.\*' matches no module; there are blocks, blocks.0"),
    ],
)
def test_wrong_arguments(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        trained(Model().eval(), Sparse(0.4), batches(), **options)


def test_models_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="there are 1 batches, expected at least 2"):
        trained(Model().eval(), Sparse(0.4), batches(1))
    with pytest.raises(ValueError, match=r"a batch calls blocks.0 2 times, expected one call"):
        trained(Twice().eval(), Sparse(0.4), batches())
    with pytest.raises(ValueError, match=r"is torch\.bfloat16, expected float32"):
        trained(Model().bfloat16().eval(), Sparse(0.4), [x.bfloat16() for x in batches()])
