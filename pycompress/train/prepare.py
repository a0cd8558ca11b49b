"""``prepare``: a model whose layers train as their compressed ones compute, in whatever loop there is."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pycompress.calibration import Calibration
from pycompress.calls import uncompiled
from pycompress.kinds import Kind, pruned_names
from pycompress.methods.held import HeldFactors, held
from pycompress.methods.inputs import InputStatistics
from pycompress.methods.masks import BLOCKS, N_OF_M
from pycompress.methods.method import Method, Refused
from pycompress.methods.sparse import Sparse
from pycompress.nn.trained import can_train, canonical, factors, hold, holder, is_trained, train_as
from pycompress.passes import whole
from pycompress.plan import Plan, Target, settle_methods, targets_of
from pycompress.surgery import switch_off_fast_paths
from pycompress.train.choice import SELECTIONS, Choice, at
from pycompress.train.own import Own
from pycompress.train.ramps import Ramp
from pycompress.weights import LowRankWeight

ONCE = Ramp.constant()


@dataclass
class _Layer:
    """One weight that trains, under all the modules that have it."""

    names: list[str]
    modules: list[nn.Module]
    kind: Kind
    method: Method
    choice: Choice | HeldFactors

    @property
    def matrix(self) -> Tensor:
        """Whole, also where each process has a shard of it (FSDP): all of them ask for it then."""
        return _whole(self.kind.matrix(self.modules[0]))

    @torch.no_grad()
    def write(self, refitted: Tensor | None) -> None:
        """The values that stay are those that the method found; what goes keeps its own, and may come back."""
        if refitted is not None:
            module, matrix = self.modules[0], self.matrix
            values = torch.where(refitted != 0, refitted, matrix)
            value, stored = self.kind.as_weight(values, self.kind.geometry(module)), self.kind.stored(module)
            stored.copy_(_sharded_as(value, stored))


class Training:
    """What :func:`prepare` gives: where the compression of a training stands.

    Attributes:
        steps: of the training, in all.
        done: how many :meth:`step` has counted.
        left: the layers that stay dense, with the reasons.
    """

    def __init__(
        self, model: nn.Module, layers: list[_Layer], left: dict[str, str], steps: int, ramp: Ramp, l1: float, group: float,
        learn_scales: bool,
    ) -> None:  # fmt: skip
        self.steps, self.done, self.left = steps, 0, left
        self._model, self._layers, self._ramp = model, layers, ramp
        self._l1, self._group, self._learn_scales = l1, group, learn_scales
        gates = [layer.choice.gates for layer in layers if isinstance(layer.choice, Choice)]
        self._own = Own([one for one in gates if one is not None])
        self._begin_to_learn()

    @property
    def strength(self) -> float:
        """How far the ramp is, from 0 to 1."""
        return self._ramp.strength(self.done)

    @property
    def strength_chosen(self) -> float:
        """That by which was chosen last."""
        return self._ramp.strength(self._chosen())

    def step(self) -> None:
        """Call it behind each ``optimizer.step()``. Raises RuntimeError behind the last one."""
        if self.done >= self.steps:
            raise RuntimeError(
                f"Training: step {self.done + 1} of {self.steps}, expected no more: prepare has the number of steps"
            )
        self.done += 1
        self._own.step(1 - (self.done - 1) / self.steps)
        if self._ramp.due(self.done):
            self._choose()

    @property
    def _learns(self) -> bool:
        """From the end of the ramp on, grids stay, and their scales are learned."""
        return self._learn_scales and self.done >= self._ramp.end

    def _begin_to_learn(self) -> None:
        if self._learns:
            choices = [layer.choice for layer in self._layers if isinstance(layer.choice, Choice)]
            self._own.learn([parameter for choice in choices for parameter in choice.learn()])

    @torch.no_grad()
    def _choose(self) -> None:
        for layer in self._layers:
            if isinstance(layer.choice, HeldFactors):
                self._refactor(layer)
            else:
                over = self.done >= self._ramp.end
                if over and layer.choice.gated and layer.choice.gates is not None:
                    matrix = layer.matrix
                    layer.write(matrix * layer.choice.gates.expected(matrix.shape))
                layer.write(layer.choice.choose(layer.matrix.detach(), self.strength))
                layer.choice.open = not over
            for module in layer.modules:
                hold(module, layer.choice)
        self._begin_to_learn()

    def _refactor(self, layer: _Layer) -> None:
        """Takes the rank down to what the ramp has now: the factors of the best approximation to their product, in the same
        parameters, of which the first rows and columns count."""
        held_now, module = layer.choice, layer.modules[0]
        assert isinstance(held_now, HeldFactors)
        weight = canonical(module)
        assert isinstance(weight, LowRankWeight)
        method = at(layer.method, self.strength, weight.shape)
        down, up = held_now.images(*factors(module))
        rank = getattr(method, "rank", None)
        if not isinstance(rank, int) or rank >= held_now.rank:
            return
        chosen = method.compress(up @ down)
        assert isinstance(chosen, LowRankWeight)
        fresh = held(chosen)
        assert isinstance(fresh, HeldFactors)
        for parameter, value in zip(factors(module), chosen.factors(), strict=True):
            parameter.zero_()
            parameter[: value.shape[0], : value.shape[1]].copy_(value)
        layer.choice = fresh

    def penalty(self) -> Tensor:
        """What is to be added to the loss: 0 where no penalty was asked for."""
        total = torch.zeros((), dtype=torch.float32, device="cpu")
        for layer in self._layers:
            if not isinstance(layer.method, Sparse) or isinstance(layer.choice, HeldFactors):
                continue
            if layer.choice.gated and layer.choice.gates is not None:
                milder = at(layer.method, self.strength, layer.kind.shape(layer.modules[0]))
                assert isinstance(milder, Sparse)
                total = total + layer.choice.gates.penalty(density_of(milder))
            if self._l1:
                total = total + self._l1 * layer.matrix.abs().sum()
            if self._group:
                total = total + self._group * _group_norm(layer.matrix, BLOCKS.get(layer.method.pattern, (1, 1)))
        return total

    # --- to go on later -----------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs besides those of model and optimizer: tensors, numbers and strings."""
        own = {layer.names[0]: holder(layer.modules[0]).state() for layer in self._layers}
        numbers = {"done": self.done, "steps": self.steps, "learn_scales": self._learn_scales}
        return {**numbers, "layers": own, **self._own.state()}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on where another training of the same model and plan was, once the model has its parameters.

        Raises:
            ValueError: it is the state of another training.
        """
        names = {layer.names[0] for layer in self._layers}
        if set(state["layers"]) != names or state["steps"] != self.steps:
            raise ValueError(
                f"Training: the state is of {len(state['layers'])} layers and {state['steps']} steps, expected these "
                f"{len(names)} layers and {self.steps} steps"
            )
        if (learned := state.get("learn_scales", False)) != self._learn_scales:
            raise ValueError(f"Training: the state has learn_scales={learned}, expected {self._learn_scales}")
        self.done = int(state["done"])
        for layer in self._layers:
            if isinstance(layer.choice, Choice):
                layer.choice.choose(layer.matrix.detach(), self._ramp.strength(self._chosen()))
                layer.choice.open = self.done < self._ramp.end
            layer.choice.load(dict(state["layers"][layer.names[0]]))
            for module in layer.modules:
                hold(module, layer.choice)
        if self._learns:
            self._own.learn([parameter for layer in self._layers for parameter in layer.choice.learned()])
        self._own.load(state)

    def _chosen(self) -> int:
        """The step at which was chosen last."""
        return next((step for step in range(self.done, -1, -1) if self._ramp.due(step)), 0)

    def __repr__(self) -> str:
        return f"Training({len(self._layers)} layers, step {self.done} of {self.steps}, strength {self.strength:.2f})"


def _whole(matrix: Tensor) -> Tensor:
    found: Tensor = matrix.full_tensor() if hasattr(matrix, "full_tensor") else matrix  # a DTensor
    return found


def _sharded_as(value: Tensor, stored: Any) -> Tensor:
    if not hasattr(stored, "full_tensor"):
        return value
    sharded: Tensor = torch.distributed.tensor.distribute_tensor(value, stored.device_mesh, stored.placements)
    return sharded


def _group_norm(w: Tensor, block: tuple[int, int]) -> Tensor:
    """The sum of the norms of blocks, each times the root of its size (Yuan & Lin 2006)."""
    n, k = w.shape
    rows, columns = block
    padded = nn.functional.pad(w, (0, -k % columns, 0, -n % rows))
    blocks = padded.view(padded.shape[0] // rows, rows, padded.shape[1] // columns, columns)
    norms: Tensor = blocks.square().sum(dim=(1, 3)).add(1e-12).sqrt()  # its gradient at 0 is 0
    return norms.sum() * float((rows * columns) ** 0.5)


def density_of(method: Sparse) -> float:
    """The share of a weight that stays."""
    kept, group = N_OF_M.get(method.pattern, (1.0 if method.density is None else method.density, 1))
    return kept / group


def prepare(
    model: nn.Module,
    plan: Plan,
    *,
    steps: int,
    ramp: Ramp = ONCE,
    pull: float = 0.0,
    selection: str = "magnitude",
    l1: float = 0.0,
    group: float = 0.0,
    learn_scales: bool = False,
    calibration: Mapping[str, InputStatistics] | None = None,
) -> Training:
    """Makes of the layers that a plan names twins that train as the compressed ones will compute; in place.

    A layer stays the module that it is, by another class: its parameters, its state dict, hooks and ties are the same, and an
    optimizer that was made before goes on. In training mode it computes with the image of its weight (what compressing and
    decompressing makes of it) and rounds its input as the kernel does, to the bit; gradients go straight through both. In
    evaluation mode the compressed layer runs, to the bit that of the frozen model. ``compress(model)``, without a plan, freezes it.

    .. code-block:: python

        training = pc.prepare(model, pc.Sparse(density=0.2), steps=1000, ramp=pc.Ramp(0.1, 0.7))
        optimizer = torch.optim.AdamW(model.parameters(), 1e-4)
        for batch in batches:
            (model(batch).square().mean() + training.penalty()).backward()
            optimizer.step(), optimizer.zero_grad(), training.step()
        model = pc.compress(model.eval())

    Args:
        model: in float32, on the CPU.
        plan, calibration: as :func:`compress` takes them.
        steps: of the optimizer, in all.
        ramp: when the methods are how strong, and when they choose anew which weights stay, and which grids they lie on. Default:
            the whole strength, chosen once.
        pull: a share of the difference to its image that draws a weight there, added to its gradient while the ramp is not over
            (SR-STE, Zhou et al. 2021, arXiv:2102.04010: 2e-4).
        selection: what of a ``Sparse`` weight stays: the largest in ``magnitude``; those with the largest ``movement`` away from
            zero; or ``l0``: gates learn it while the ramp is not over, and :meth:`Training.penalty` holds their density to the
            ramp's (float32 values only; from 90 % of zeros on is where the latter two pay).
        learn_scales: from the end of the ramp on the scales of ``Int4`` weights are learned, too (LSQ, Esser et al. 2020,
            arXiv:1902.08153), in steps that come to rest with the training. Those of 8 bits grow with their weights anyway.
        l1, group: weights of the sum of magnitudes, and of that of the norms of a pattern's blocks, in :meth:`Training.penalty`.
    Returns:
        The :class:`Training`, whose :meth:`~Training.step` belongs behind each step of the optimizer.
    Raises:
        TypeError, ValueError: as :func:`compress`; a weight that is not float32 or pruned by torch.nn.utils.prune, a layer that is
            prepared already, another value of an argument. The model stays as it is then.
    """
    _check(steps, ramp, pull, selection, l1, group)
    if isinstance(calibration, Calibration) and calibration.running:
        raise ValueError("prepare: the calibration is still running, expected its `with` block to have ended")
    model = uncompiled(model)
    if twin := next((name for name, module in model.named_modules() if is_trained(module)), None):
        raise ValueError(f"prepare: {twin or 'the model'} is prepared already; compress(model) freezes it")
    ramp = ramp.of(steps)
    with whole.without(model):
        targets = targets_of(model, plan)
        settle_methods(targets, calibration)
    left = {target.name: target.record.reason for target in targets if target.method is None}
    made: list[tuple[_Layer, LowRankWeight | Tensor | None]] = []
    for users in _by_weight([target for target in targets if target.method is not None]):
        layer, start, reason = _layer(users, ramp, pull, selection, len(made))
        if layer is None:
            left |= {target.name: reason for target in users}
        else:
            made.append((layer, start))
    whole.remove(model)
    for layer, start in made:
        layer.write(start if isinstance(start, Tensor) else None)
        for module in layer.modules:
            train_as(module, layer.choice, start if isinstance(start, LowRankWeight) else None)
    switch_off_fast_paths(model)
    return Training(model, [layer for layer, _ in made], left, steps, ramp, l1, group, learn_scales)


def _check(steps: int, ramp: Ramp, pull: float, selection: str, l1: float, group: float) -> None:
    if type(steps) is not int or steps < 0:
        raise ValueError(f"prepare: steps is {steps!r}, expected a number from 0")
    if not isinstance(ramp, Ramp):
        raise TypeError(f"prepare: ramp is {ramp!r}, expected a pycompress.Ramp")
    if selection not in SELECTIONS:
        raise ValueError(f"prepare: selection is {selection!r}, expected one of {', '.join(SELECTIONS)}")
    for name, value in (("pull", pull), ("l1", l1), ("group", group)):
        if not value >= 0:
            raise ValueError(f"prepare: {name} is {value!r}, expected a number from 0")


def _by_weight(targets: list[Target]) -> Iterator[list[Target]]:
    """Those that have one weight, by one method, together."""
    groups: dict[tuple[Any, int], list[Target]] = {}
    for target in targets:
        groups.setdefault((target.key, id(target.method)), []).append(target)
    yield from groups.values()


def _layer(
    targets: list[Target], ramp: Ramp, pull: float, selection: str, seed: int
) -> tuple[_Layer | None, LowRankWeight | Tensor | None, str]:  # fmt: skip
    """What is to be trained, and factors or values to begin with, if there are any; or why it stays dense."""
    first = targets[0]
    for target in targets:
        dtype = target.kind.stored(target.module).dtype
        if dtype != torch.float32 or pruned_names(target.module):
            was = "pruned by torch.nn.utils.prune" if pruned_names(target.module) else str(dtype)
            raise ValueError(f"prepare: the weight of {target.name} is {was}, expected a float32 parameter")
    assert first.method is not None
    method = first.kind.fitted(first.method, first.module)
    names, modules = [target.name for target in targets], [target.module for target in targets]
    if first.kind.recurrent:
        return None, None, f"{first.kind.phrase} cannot be trained as its compressed layer"
    try:
        return _begun(first, method, names, modules, ramp, pull, selection, seed)
    except Refused as refused:
        return None, None, str(refused)


def _begun(
    first: Target, method: Method, names: list[str], modules: list[nn.Module], ramp: Ramp, pull: float, selection: str, seed: int
) -> tuple[_Layer | None, LowRankWeight | Tensor | None, str]:  # fmt: skip
    if method.name != "low_rank":
        choice = Choice(method, pull, selection, first.kind.shape(first.module), seed)
        start = choice.choose(first.dense.detach(), ramp.strength(0))
        choice.open = ramp.end > 0
        return _Layer(names, modules, first.kind, method, choice), start, ""
    if len(modules) > 1:
        return None, None, "several layers share its weight: factors would be trained apart"
    weight = at(method, ramp.strength(0), first.kind.shape(first.module)).compress(first.dense.detach())
    factors_held = held(weight)
    if not isinstance(factors_held, HeldFactors) or not can_train(first.module, factors_held):
        return None, None, f"its factors cannot be trained in a {type(first.module).__name__}"
    assert isinstance(weight, LowRankWeight)
    return _Layer(names, modules, first.kind, method, factors_held), weight, ""
