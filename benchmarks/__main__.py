"""``python -m benchmarks``: the registry in a default process and with the tuned allocator, as CSV rows."""

import argparse
import os
import pathlib
import subprocess
import sys

from benchmarks import results
from benchmarks.measure import TUNED_ALLOCATOR


def main():
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--out", type=pathlib.Path, default=results.FOLDER, help="folder of cpu.csv")
    parser.add_argument("--select", default="", help="pytest -k expression, such as 'layer_norm and forward'")
    parser.add_argument("--rounds", type=int, default=7, help="timed rounds of every contender")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out (it takes most of the time)")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    csv = args.out / "cpu.csv"
    environment = {
        **os.environ,
        "IPT_FAST_BENCH_CSV": str(csv.resolve()),
        "IPT_FAST_BENCH_ROUNDS": str(args.rounds),
        "IPT_FAST_BENCH_COMPILE": "0" if args.no_compile else "1",
    }
    command = [sys.executable, "-m", "pytest", "benchmarks", "-q", "--benchmark-disable-gc", "-k", args.select]
    status = 0
    for name, allocator in (("default", {}), ("tuned", TUNED_ALLOCATOR)):
        print(f"== {name} allocator", flush=True)
        status |= subprocess.run(command, env={**environment, **allocator}).returncode
    if csv.exists():
        print(f"rows in {csv}; python -m benchmarks.performance makes docs/performance.md of those in the repository")
    return status


if __name__ == "__main__":
    sys.exit(main())
