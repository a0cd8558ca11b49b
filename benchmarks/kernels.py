"""The grids: `python benchmarks/kernels.py` measures int8, `--op int4` int4, `--op sparse` the sparse and
`--op low_rank` the low-rank layers; prints the table and writes benchmarks/results/<op>.jsonl.

Takes the options of `pycompress bench` (--help lists them).
"""

import argparse
import sys
from pathlib import Path

from pycompress import cli

RESULTS = Path(__file__).parent / "results"
GRIDS = {"int8": cli.bench.int8, "int4": cli.bench.int4, "sparse": cli.bench.sparse, "low_rank": cli.bench.low_rank}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--op", choices=GRIDS, default="int8")
    chosen, options = parser.parse_known_args(sys.argv[1:])
    GRIDS[chosen.op](["--output", str(RESULTS / f"{chosen.op}.jsonl"), *options], prog_name="kernels.py")
