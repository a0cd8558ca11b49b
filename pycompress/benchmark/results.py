"""Records, the comparisons drawn from them, and the file that they are kept in."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pycompress.benchmark.environment import Environment
from pycompress.benchmark.harness import Timing, geometric_mean, ratio

Record = dict[str, Any]


def measured(record: Record, peers: Iterable[str]) -> bool:
    """Whether any of `peers` was timed beside this record's candidate."""
    return any(peer in record["time_ratio"] for peer in peers)


def best_ratio(record: Record, peers: Iterable[str]) -> float:
    """Time of the fastest of `peers` over that of this record's candidate: above 1 where they are slower.

    Peers that did not run are left out; raises ValueError where none did.
    """
    return float(min(record["time_ratio"][peer][0] for peer in peers if peer in record["time_ratio"]))


def microseconds(timing: Timing) -> Record:
    """What a record says about the time of a candidate: the median and the quartiles of its rounds."""
    return {"us": timing.median * 1e6, "us_quartiles": [value * 1e6 for value in timing.quartiles]}


def time_ratios(name: str, timings: Mapping[str, Timing], references: Iterable[str] | None = None) -> Record:
    """Median and quartiles of the time of each other candidate, or of the references, over that of this one."""
    others = timings if references is None else references
    return {other: list(ratio(timings[other], timings[name])) for other in others if other != name}


@dataclass(frozen=True)
class Comparison:
    """One line of the summary: a candidate against the best of some peers over part of the grid."""

    candidate: str
    against: str
    scope: str
    cells: int
    geometric_mean: float
    worst: float
    worst_cell: str

    def __str__(self) -> str:
        return (
            f"{self.candidate} against {self.against}, {self.scope} ({self.cells} cell(s)): "
            f"geometric mean {self.geometric_mean:.3f}x, worst {self.worst:.3f}x at {self.worst_cell}"
        )


def compare(
    records: Iterable[Record], candidate: str, peers: Sequence[str], *, against: str, scope: str
) -> Comparison | None:
    """`candidate` beside the fastest of `peers` over the cells of `records`; None where they never met.

    `against` and `scope` say in words who the peers are and which cells these.
    """
    ratios = {
        f"m={record['m']} k={record['k']} n={record['n']}": best_ratio(record, peers)
        for record in records
        if record["candidate"] == candidate and measured(record, peers)
    }
    if not ratios:
        return None
    worst = min(ratios, key=ratios.__getitem__)
    mean = geometric_mean(ratios.values())
    return Comparison(candidate, against, scope, len(ratios), mean, ratios[worst], worst)


def json_lines(environment: Environment, records: Iterable[Record]) -> str:
    """One JSON object per line: {"environment": ...} first, then the records."""
    return "".join(json.dumps(line) + "\n" for line in ({"environment": environment.as_dict()}, *records))


def write_json_lines(path: Path, environment: Environment, records: Iterable[Record]) -> None:
    """Write json_lines() to a file, whose folder is made where it is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json_lines(environment, records))
