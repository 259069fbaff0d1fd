"""The append-only record: one CSV row per contender, with hardware, versions and commit."""

import csv
import datetime
import os
import pathlib
import subprocess

import torch

from ipt_fast import _extension
from ipt_fast.evaluation.report import cpu_name

FOLDER = pathlib.Path(__file__).parent / "results"
COLUMNS = (
    "date", "commit", "cpu", "isa", "threads", "torch", "allocator", "case", "dtype", "direction", "contender",
    "median_ms", "times_faster", "gb_per_s", "gflop_per_s", "share_of_ceiling",
)  # fmt: skip


def environment():
    """The columns that one run shares."""
    root = FOLDER.parent.parent
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=root, capture_output=True, text=True)
    return {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%MZ"),
        "commit": commit.stdout.strip() or "unknown",
        "cpu": cpu_name(),
        "isa": f"{torch.backends.cpu.get_cpu_capability()}/{_extension.isa() or 'no extension'}",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def append(path, rows):
    """Add rows to the CSV at ``path``, with a header if it is new. One write, so that no row is ever half there."""
    path = pathlib.Path(path)
    new = not path.exists()
    with open(path, "a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        if new:
            writer.writeheader()
        writer.writerows(rows)
        file.flush()
        os.fsync(file.fileno())


def read(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))
