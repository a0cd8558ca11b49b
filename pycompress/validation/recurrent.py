"""Recurrent layers beside ONNX Runtime and NumPy: the integers of every step, all that comes out, and the last states."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pycompress import ops
from pycompress.nn.int8_recurrent import Int8Recurrent
from pycompress.ops.cpu.recurrent import read
from pycompress.validation import formulas
from pycompress.validation.checks import MAX_ROWS, Check, disagreements
from pycompress.validation.formulas import Array, float32

Group = tuple[Tensor, list[Tensor]]  # x [steps, batch, k] and the states [layers * directions, batch, size]


class RecurrentCheck(Check):
    """int8 LSTMs and GRUs: everything must be equal. Of a packed sequence each one is compared alone, which is no other result."""

    exact, has_integers = True, True
    layer: Int8Recurrent

    def seen(self, args: tuple[Any, ...], keywords: Mapping[str, Any], y: Any) -> None:
        x, states, sizes = args
        assert not keywords
        self.calls += 1
        own = list(_groups(x.detach(), [one.detach() for one in states], sizes))
        results = list(_groups(y[0].detach(), [one.detach() for one in y[1:]], sizes))
        for (inputs, began), (output, ended) in zip(own, results, strict=True):
            steps, batch = inputs.shape[:2]
            self.rows_seen += steps * batch
            count = min(batch, max(1, (MAX_ROWS - self.rows) // steps)) if self.rows < MAX_ROWS else 0
            if count:
                self.rows += steps * count
                self._compare(
                    inputs[:, :count], [s[:, :count] for s in began], output[:, :count], [s[:, :count] for s in ended]
                )

    def _compare(self, x: Tensor, began: list[Tensor], y: Tensor, ended: list[Tensor]) -> None:
        layer = self.layer
        runtime, expected = self._session_run(x, began), formulas.recurrent(x, began, layer)
        rows, first = x.reshape(-1, x.shape[2]), read(layer.form).pieces[0]
        acc = ops.int8_accumulate(rows, first.of(layer.packed), first.form)[0]
        native = {"ih_l0_q": ops.int8_quantize(rows, layer.activation_bits)[0].numpy(), "ih_l0_acc": acc.numpy()}
        for name, integers in expected.items():
            if not name.endswith(("_q", "_acc")):
                continue
            own = {"native": native[name]} if name in native else {}
            found = {**own, "ONNX Runtime": runtime[name], "NumPy": integers}
            self.integer_reasons += disagreements(
                name, {who: one.reshape(-1, one.shape[-1]) for who, one in found.items()}
            )
        names = ("y", "h_n", "c_n")
        for name, one in zip(names, [y, *ended], strict=False):
            for other, reference in (("ONNX Runtime", runtime), ("NumPy", expected)):
                theirs = torch.from_numpy(np.ascontiguousarray(reference[name])).to(one.dtype).flatten(0, -2)
                mine = one.flatten(0, -2)
                self._compare_y(
                    {f"native {name}": mine, other: theirs}, torch.zeros(mine.shape, dtype=torch.float64, device="cpu")
                )

    def by_runtime(self, x: Tensor, states: list[Tensor], sizes: Tensor | None) -> list[Tensor]:
        """What ``run`` gives, computed by ONNX Runtime."""
        found = [self._session_run(*group) for group in _groups(x.detach(), [one.detach() for one in states], sizes)]
        names = ("y", "h_n", "c_n")[: 1 + len(states)]
        tensors = [[torch.from_numpy(one[name]).to(x.dtype) for name in names] for one in found]
        last = [torch.cat(ended, 1) for ended in list(zip(*tensors, strict=True))[1:]]
        if sizes is None:
            return [tensors[0][0], *last]
        y = [tensors[b][0][t, 0] for t, size in enumerate(sizes.tolist()) for b in range(size)]
        return [torch.stack(y), *last]

    def _session_run(self, x: Tensor, states: list[Tensor]) -> dict[str, Array]:
        names = [value.name for value in self.session.get_outputs()]
        given = {"x": float32(x), **{f"{name}_0": float32(s) for name, s in zip("hc", states, strict=False)}}
        return dict(zip(names, self.session.run(None, given), strict=True))


def _groups(x: Tensor, states: list[Tensor], sizes: Tensor | None) -> Iterator[Group]:
    """What is of one length: all, or the sequences that are packed, one by one."""
    if sizes is None:
        yield x, states
        return
    starts = (sizes.cumsum(0) - sizes).tolist()
    for b in range(int(sizes[0])):
        places = [start + b for start, size in zip(starts, sizes.tolist(), strict=True) if size > b]
        yield x[places][:, None], [one[:, b : b + 1] for one in states]
