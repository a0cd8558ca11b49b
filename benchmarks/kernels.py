"""The int8 grid: `python benchmarks/kernels.py` measures it, prints the table and writes
benchmarks/results/int8.jsonl.

Takes the options of `pycompress bench int8` (--quick, --shapes, --rows, --rounds, --weights, --json,
--output).
"""

import sys
from pathlib import Path

from pycompress.cli import int8

RESULTS = Path(__file__).parent / "results"

if __name__ == "__main__":
    int8(["--output", str(RESULTS / "int8.jsonl"), *sys.argv[1:]], prog_name="kernels.py")
