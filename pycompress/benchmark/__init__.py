"""The measuring harness, the peers and the grids of `pycompress bench` and of the scripts in benchmarks/.

harness: candidates take turns. environment: the machine. peers: who else takes part. int8, int4, sparse, low_rank: the
grids. grid, break_even: what these share. results: comparisons and the file.
"""

from pycompress.benchmark.environment import Environment
from pycompress.benchmark.harness import Timing, interleave, ratio
from pycompress.benchmark.peers import UnavailableError, ort_session, quantize_dynamic
from pycompress.benchmark.results import Record, json_lines, write_json_lines

__all__ = [
    "Environment",
    "Record",
    "Timing",
    "UnavailableError",
    "interleave",
    "json_lines",
    "ort_session",
    "quantize_dynamic",
    "ratio",
    "write_json_lines",
]
