"""``python -m benchmarks.gpu.keep FOLDER``: the results of a check into the repository.

Rows go to the end of benchmarks/results/gpu_models.csv and gpu_kernels.csv; what was tuned replaces the card's file in
kernels/configs.
"""

import argparse
import csv
import pathlib
import shutil

from benchmarks import results
from benchmarks.gpu import kernels, models
from ipt_fast._files import atomic_write
from ipt_fast.kernels import _launch

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
        target, columns = TABLES[name]
        before = results.read(kept / target) if (kept / target).exists() else []
        with atomic_write(kept / target) as temporary, open(temporary, "w", newline="") as file:
            writer = csv.DictWriter(file, columns, lineterminator="\n")
            writer.writeheader()
            writer.writerows(before + rows)
    if (folder / "tuned.json").exists():
        configs.mkdir(exist_ok=True)
        shutil.copy(folder / "tuned.json", configs / _launch.path_of(gpus.pop()).name)


def main():
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.keep", description=__doc__)
    parser.add_argument("folder", type=pathlib.Path)
    keep(parser.parse_args().folder)


if __name__ == "__main__":
    main()
