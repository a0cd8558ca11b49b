"""Layers that share a weight go on sharing it, whatever becomes of their model; and processes that are handed it."""

from __future__ import annotations

import copy
import gc
import io
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_model, save_model
from torch import Tensor, multiprocessing, nn
from torch.utils.data import DataLoader, IterableDataset

from contract.cases import EACH_ROW, EVERY, ROWS, Case, Same, equal_states, state


def pair(case: Case) -> nn.ModuleDict:
    """Two layers with one weight and biases of their own."""
    a, b = case.layer("relu"), case.layer()
    b = case.layer_type.build(a.canonical(), b.geometry, b.bias)
    b.share(a)
    return nn.ModuleDict({"a": a, "b": b}).eval()


def tied(model: Any) -> bool:
    return model["a"].packed is model["b"].packed and model["a"].form == model["b"].form


def untied(case: Case) -> nn.ModuleDict:
    return nn.ModuleDict({"a": case.layer("relu"), "b": case.layer()}).eval()


def through_torch_save(value: Any) -> Any:
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=not isinstance(value, nn.Module))


COPIES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda value: pickle.loads(pickle.dumps(value)),
    "torch.save": through_torch_save,
}


@EVERY
def test_copies_share_among_themselves(case: Case, same: Same) -> None:
    model, x = pair(case), case.x()
    assert tied(model)
    for name, duplicate in COPIES.items():
        copied = duplicate(model)
        assert tied(copied) and copied["a"].packed is not model["a"].packed, name
        assert all(same(copied[which](x), model[which](x)) for which in "ab"), name
        two = duplicate([model["a"], model["b"]]) if name != "torch.save" else [copied["a"], copied["b"]]
        assert two[0].packed is two[1].packed, f"{name}, without a model around them"


@EACH_ROW
def test_a_state_dict_holds_a_shared_weight_once(case: Case, same: Same) -> None:
    model, x = pair(case), case.x()
    found = model.state_dict()
    for name in model["a"]._expected():
        assert found[f"a.{name}"] is found[f"b.{name}"], "the memory of one"
        assert model.state_dict()[f"a.{name}"] is found[f"a.{name}"], "and of the state dict before, while it is there"
    assert found["a.weight"].data_ptr() != found["b.weight"].data_ptr(), "but the marks are no shared tensors"
    for name, duplicate in COPIES.items():
        target = untied(case)
        target.load_state_dict(duplicate(found))
        assert tied(target), name
        assert all(same(target[which](x), model[which](x)) for which in "ab"), name
    own = untied(case).state_dict()
    assert not any(own[f"a.{name}"] is own[f"b.{name}"] for name in model["a"]._expected()), "equal is not the same"


@EACH_ROW
def test_what_was_written_into_is_not_given_again(case: Case) -> None:
    """It is a copy: a change of it must be seen by nobody else."""
    model = pair(case)
    found = model.state_dict()
    before = {name: tensor.clone() for name, tensor in found.items()}
    for name, tensor in found.items():
        if not name.endswith("bias"):  # that is the layer's own, as in any state dict
            tensor.zero_()
    assert equal_states(model.state_dict(), before)
    target = untied(case)
    target.load_state_dict(model.state_dict())
    source = state(model)
    for buffer in target.buffers():
        buffer.zero_()
    assert equal_states(state(model), source)
    again = untied(case)
    again.load_state_dict(before)
    assert equal_states(again.state_dict(), before)


MOVES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "dtype": lambda m: m.to(torch.bfloat16),
    "double": lambda m: m.double(),
    "meta": lambda m: m.to("meta"),
    "meta and back": lambda m: m.to("meta").to_empty(device="cpu"),
    "another device": lambda m: m._apply(lambda t: t.clone()),
    "shared memory": lambda m: m.share_memory(),
}


@EACH_ROW
def test_moves_keep_the_tie(case: Case, same: Same) -> None:
    x = case.x()
    for name, move in MOVES.items():
        model = pair(case)
        expected = model["b"](x)
        kept = model["a"].packed
        move(model)
        assert tied(model), name
        if name == "another device":
            assert model["a"].packed is not kept and same(model["b"](x), expected)
        if name == "meta and back":
            model.load_state_dict(pair(case).state_dict())
            assert tied(model), name


@EACH_ROW
def test_one_of_two_may_be_moved_alone(case: Case, same: Same) -> None:
    model, x = pair(case), case.x()
    expected = model["b"](x)
    model["a"].to_empty(device="cpu").packed.zero_()
    model["b"]._apply(lambda t: t.clone())
    assert same(model["b"](x), expected), "what another function left there is not taken for it"


@EACH_ROW
def test_safetensors_drops_the_second_and_loads_both(case: Case, tmp_path: Path, same: Same) -> None:
    model, x, path = pair(case), case.x(), str(tmp_path / "model.safetensors")
    save_model(model, path)
    target = pair(case)
    load_model(target, path)
    assert tied(target) and all(same(target[which](x), model[which](x)) for which in "ab")
    other = untied(case)
    before = state(other["b"])
    with pytest.raises(RuntimeError, match=r"Missing key.*\"b\."):
        load_model(other, path)
    assert equal_states(state(other["b"]), before), "its weight is in the file by no name of its own"


@EACH_ROW
def test_nothing_is_kept_alive(case: Case) -> None:
    from pycompress.nn.sharing import _entries

    gc.collect()
    before = len(_entries)
    model = pair(case)
    for _ in range(3):
        target = untied(case)
        target.load_state_dict(model.state_dict())
        copy.deepcopy(pickle.loads(pickle.dumps(target))).to("meta")
    del model, target
    gc.collect()
    assert len(_entries) <= before


# --- processes ----------------------------------------------------------------------------------------------------------


def inputs() -> list[Tensor]:
    torch.manual_seed(1)
    return [case.x() for case in ROWS]


def results(models: nn.ModuleList, given: list[Tensor]) -> list[Tensor]:
    with torch.no_grad():
        return [model[name](x) for model, x in zip(models, given, strict=True) for name in "ab"]


def child(models: nn.ModuleList, given: list[Tensor], queue: Any, back: Any) -> None:
    ties = [tied(model) for model in models]
    second = queue.get()  # pickled as for any other process
    back.put(
        pickle.dumps(
            (ties, [tied(m) for m in second], *([y.numpy() for y in results(m, given)] for m in (models, second)))
        )
    )


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_a_process_is_handed_a_model(method: str) -> None:
    models, given = nn.ModuleList(pair(case) for case in ROWS), inputs()
    expected = results(models, given)
    context = multiprocessing.get_context(method)
    queue, back = context.Queue(), context.SimpleQueue()
    process = context.Process(target=child, args=(models, given, queue, back))
    process.start()
    queue.put(models)
    first, second, *found = pickle.loads(back.get())
    process.join(timeout=60)
    assert process.exitcode == 0
    assert all(first) and all(second), "tied there, too"
    for ys in found:
        for y, wanted in zip(ys, expected, strict=True):
            torch.testing.assert_close(torch.from_numpy(y), wanted)
    for y, wanted in zip(results(models, given), expected, strict=True):
        assert torch.equal(y, wanted), "and the one here runs on"


class Computed(IterableDataset[list[Tensor]]):
    def __init__(self, models: nn.ModuleList) -> None:
        self.models = models

    def __iter__(self) -> Iterator[list[Tensor]]:
        yield results(self.models, inputs())


@pytest.mark.slow
def test_a_loader_hands_it_to_its_workers() -> None:
    models = nn.ModuleList(pair(case) for case in ROWS)
    (found,) = DataLoader(Computed(models), batch_size=None, num_workers=1, multiprocessing_context="spawn")
    for y, wanted in zip(found, results(models, inputs()), strict=True):
        torch.testing.assert_close(y, wanted)
