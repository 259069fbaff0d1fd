"""The record: one CSV row per contender, with hardware, versions and commit. Runs append to it."""

import csv
import datetime
import io
import os
import pathlib
import subprocess

import torch

from benchmarks import measure
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


def write(path, rows):
    """The CSV of ``rows``, dicts with the same keys; replaced atomically."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\r\n")
    writer.writeheader()
    writer.writerows(rows)
    with atomic_write(path) as temporary:
        temporary.write_bytes(text.getvalue().encode())


def append(path, rows):
    """Add rows to the CSV at ``path``, new or not."""
    path = pathlib.Path(path)
    write(path, [*(read(path) if path.exists() else []), *({name: row[name] for name in COLUMNS} for row in rows)])


def times_faster(medians):
    """How many times as fast as the best rival "ipt_fast" is, of {contender: seconds}."""
    return min(value for name, value in medians.items() if name != "ipt_fast") / medians["ipt_fast"]


def record(benchmark, case, dtype_name, direction, medians, forward):
    """Show the medians, {contender: seconds}, with the benchmark; append them to the CSV IPT_FAST_BENCH_CSV names.

    ``forward`` is (FLOPs, bytes) of one forward.
    """
    benchmark.extra_info.update({name: value * 1e3 for name, value in medians.items()})
    benchmark.extra_info["times_faster_than_best_rival"] = times_faster(medians)
    if path := os.environ.get("IPT_FAST_BENCH_CSV"):
        passes = 3 if direction == "training" else 1  # a backward is counted as two forwards
        work = [passes * amount for amount in forward]
        append_medians(path, case, dtype_name, direction, medians, work)


def append_medians(path, case, dtype_name, direction, medians, work):
    """Add one row per contender of {contender: seconds}, each with its rates and its share of the ceiling.

    ``work`` is (FLOPs, bytes) of the call; the ceilings are measured in this run.
    """
    ceilings = measure.ceilings(measure.DTYPES[dtype_name])
    floor = max(amount / ceiling for amount, ceiling in zip(work, ceilings, strict=True))
    shared = {
        **environment(),
        "allocator": "tuned" if measure.memory_is_tuned() else "default",
        "case": case,
        "dtype": dtype_name,
        "direction": direction,
    }
    rows = [
        {
            **shared,
            "contender": name,
            "median_ms": f"{median * 1e3:.3f}",
            "times_faster": f"{times_faster(medians):.2f}" if name == "ipt_fast" else "",
            "gb_per_s": f"{work[1] / median / 1e9:.2f}",
            "gflop_per_s": f"{work[0] / median / 1e9:.2f}",
            "share_of_ceiling": f"{floor / median:.3f}",
        }
        for name, median in medians.items()
    ]
    append(path, rows)


def read(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))
