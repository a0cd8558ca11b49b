"""What :func:`validate` found: a record for each layer, one for the whole model, and the table of them."""

from __future__ import annotations

import dataclasses

WHOLE_MODEL = "(whole model)"
PERTURBATION = 2.0**-20  # relative; what activation_bound() allows for two evaluations


@dataclasses.dataclass(frozen=True)
class LayerRecord:
    """What was found for one layer. The figures are None for a layer that was never called."""

    name: str
    rows: int  # compared
    rows_seen: int  # more than ``rows`` where a limit cut them
    integers_equal: bool | None  # q and acc: native, ONNX Runtime and NumPy; None where there are none
    # How far y of two parties lies apart. For int8 weights after an exact activation in ulp_distance(); elsewhere, where values
    # near zero are billions of ulps from 0, as a share of what is allowed. The figure that does not apply is None.
    max_ulp: int | None
    share_of_bound: float | None
    relative_error: float | None  # the largest distance over the largest |y| of its row
    status: str  # "ok", "diverged" or "not called"
    reason: str  # why it diverged or was not compared, one line for each disagreement


@dataclasses.dataclass(frozen=True)
class ModelRecord:
    """The floating-point outputs of the whole model: native against every layer computed by ONNX Runtime."""

    tensors: int
    max_difference: float
    cosine: float  # the smallest over the tensors
    perturbed_cosine: float | None  # native against itself, perturbed; None where the outputs must be equal
    status: (
        str  # "ok", "diverged", or "undecided" where the model's own behaviour allows no verdict: the reason says why
    )
    reason: str


@dataclasses.dataclass(frozen=True)
class Report:
    """The result of :func:`validate`. ``str()`` gives a table whose last line is the verdict."""

    layers: list[LayerRecord]  # in the order of their first call, then those never called
    model: ModelRecord
    onnxruntime_version: str

    @property
    def first_divergence(self) -> str | None:
        """The layer that ran first of those that diverge, WHOLE_MODEL if only the outputs do, or None."""
        for record in self.layers:
            if record.status == "diverged":
                return record.name
        return WHOLE_MODEL if self.model.status == "diverged" else None

    @property
    def not_called(self) -> list[str]:
        """The layers that the run never reached."""
        return [record.name for record in self.layers if record.status == "not called"]

    @property
    def ok(self) -> bool:
        """True where nothing diverged, the whole model could be judged, and at least one layer was compared."""
        nothing_wrong = self.first_divergence is None and self.model.status == "ok"
        return nothing_wrong and any(record.rows for record in self.layers)

    @property
    def verdict(self) -> str:
        """One line: OK, DIVERGED, UNDECIDED or NOTHING COMPARED, and what was left out."""
        cut = [record.rows for record in self.layers if record.rows < record.rows_seen]
        left_out = f"; {len(cut)} layer(s) only in the first {max(cut)} rows" if cut else ""
        if self.not_called:
            left_out += f"; NOT CALLED and so not compared: {', '.join(self.not_called)}"
        if self.first_divergence is not None:
            return f"DIVERGED: first at {self.first_divergence}{left_out}"
        if self.model.status == "undecided":
            return f"UNDECIDED: {self.model.reason.splitlines()[0]}{left_out}"
        if not self.ok:
            return f"NOTHING COMPARED{left_out}"
        compared = len(self.layers) - len(self.not_called)
        version = self.onnxruntime_version
        return f"OK: {compared} layer(s) and the whole model agree with ONNX Runtime {version}{left_out}"

    def __str__(self) -> str:
        header = ("layer", "rows", "integers", "max ulp", "of bound", "relative error", "status")
        rows = [header, *(_cells(record) for record in self.layers)]
        widths = [max(len(row[i]) for row in rows) for i in range(len(header))]
        reasons = ["", *(record.reason for record in self.layers)]
        lines = []
        for row, reason in zip(rows, reasons, strict=True):
            cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
            lines.append("  ".join(cells).rstrip())
            lines += [f"    {line}" for line in reason.splitlines()]
        lines.append(
            f"whole model: {self.model.tensors} output(s), max difference {self.model.max_difference:.3g}, "
            f"cosine {self.model.cosine:.9f}, {self.model.status}"
        )
        if self.model.perturbed_cosine is not None:
            lines.append(
                f"    last bits of gelu, silu and float32 sums are amplified: moved by {PERTURBATION:.1g}, the native "
                f"model has cosine {self.model.perturbed_cosine:.9f} to itself"
            )
        lines += [f"    {line}" for line in self.model.reason.splitlines()]
        return "\n".join([*lines, self.verdict])


def _cells(record: LayerRecord) -> tuple[str, ...]:
    rows = str(record.rows) if record.rows == record.rows_seen else f"{record.rows} of {record.rows_seen}"
    integers = "-" if record.integers_equal is None else "equal" if record.integers_equal else "DIFFER"
    ulp = "-" if record.max_ulp is None else str(record.max_ulp)
    share = "-" if record.share_of_bound is None else f"{record.share_of_bound:.2f}"
    error = "-" if record.relative_error is None else f"{record.relative_error:.2g}"
    return record.name, rows, integers, ulp, share, error, record.status
