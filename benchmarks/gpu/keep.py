"""``python -m benchmarks.gpu.keep FOLDER``: the results of a check into the repository.

Rows go to the end of gpu_models.csv, gpu_kernels.csv and gpu_parity.csv in benchmarks/results; what was tuned replaces
the card's file in kernels/configs.
"""

import argparse
import csv
import pathlib
import shutil

from benchmarks import results
from benchmarks.gpu import kernels, models, stage
from ipt_fast._files import atomic_write
from ipt_fast.kernels import _launch

SHARED = models.COLUMNS[:5]
PARITY = (*SHARED, "backend", "operator", "case", "dtype", "shape", "passed", "error", "allowed", "seconds")
TABLES = {"models.csv": ("gpu_models.csv", models.COLUMNS), "kernels.csv": ("gpu_kernels.csv", kernels.COLUMNS)}


def keep(folder, kept=results.FOLDER, configs=_launch.CONFIGS):
    """Add what a check has left in ``folder``; raises ValueError if that was a rehearsal."""
    gpus = set()
    found = {name: results.read(folder / name) for name in TABLES if (folder / name).exists()}
    for rows in found.values():
        gpus |= {row["gpu"] for row in rows}
    if len(gpus) != 1 or gpus == {"rehearsal"}:
        raise ValueError(f"{folder} must have rows of one GPU; it has those of {sorted(gpus) or 'none'}")
    for name, rows in found.items():
        add(kept / TABLES[name][0], TABLES[name][1], rows)
    shared = {name: next(iter(found.values()))[0][name] for name in SHARED}
    add(
        kept / "gpu_parity.csv",
        PARITY,
        [row_of(line) | shared for line in stage.read_json_lines(folder / "parity.jsonl")],
    )
    if (folder / "tuned.json").exists():
        configs.mkdir(exist_ok=True)
        shutil.copy(folder / "tuned.json", configs / _launch.path_of(gpus.pop()).name)


def row_of(line):
    """A row of gpu_parity.csv, of a line of parity.jsonl."""
    shape = "x".join(map(str, line.get("shape", ())))
    return {name: line.get(name, "") for name in PARITY} | {"shape": shape}


def add(path, columns, rows):
    """Rows to the end of a CSV file, which is replaced atomically."""
    before = results.read(path) if path.exists() else []
    with atomic_write(path) as temporary, open(temporary, "w", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(before + rows)


def main():
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.keep", description=__doc__)
    parser.add_argument("folder", type=pathlib.Path)
    keep(parser.parse_args().folder)


if __name__ == "__main__":
    main()
