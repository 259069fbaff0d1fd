"""The append-only record: one CSV row per contender, with hardware, versions and commit."""

import csv
import datetime
import io
import pathlib
import subprocess

import torch

from ipt_fast import _extension
from ipt_fast._files import atomic_write
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
    """Add rows to the CSV at ``path``, with a header if it is new; replaced atomically."""
    path = pathlib.Path(path)
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\r\n")
    if not path.exists():
        writer.writeheader()
    writer.writerows(rows)
    before = path.read_bytes() if path.exists() else b""
    with atomic_write(path) as temporary:
        temporary.write_bytes(before + text.getvalue().encode())


def read(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))
