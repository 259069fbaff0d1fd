"""The record: one CSV row per contender, with hardware, versions and commit. Runs append to it."""

import csv
import datetime
import io
import os
import pathlib
import subprocess

import torch

from benchmarks import measure, roofline
from ipt_fast import _extension
from ipt_fast._files import atomic_write
from ipt_fast.evaluation.report import cpu_name

FOLDER = pathlib.Path(__file__).parent / "results"
# Rows of 2026-11-21 have, in the place of the last two, the share of what a product and a copy by PyTorch reached.
COLUMNS = (
    "date", "commit", "cpu", "isa", "threads", "torch", "allocator", "case", "dtype", "direction", "contender",
    "median_ms", "times_faster", "gb_per_s", "gflop_per_s", "share_of_ceiling", "kind", "share_of_roofline",
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
    rows = [*(read(path) if path.exists() else []), *rows]
    write(path, [{name: row.get(name, "") for name in COLUMNS} for row in rows])


def is_ours(contender):
    """Whether a contender is ipt_fast in one of its forms, "ipt_fast" or "ipt_fast frozen"."""
    return contender.partition(" ")[0] == "ipt_fast"


def best_rival(medians):
    """The fastest of {contender: time} that is not ours."""
    return min((name for name in medians if not is_ours(name)), key=medians.get)


def times_faster(medians, name="ipt_fast"):
    """How many times as fast as the best rival ``name`` is, of {contender: seconds}."""
    return medians[best_rival(medians)] / medians[name]


def group(case, dtype_name, direction):
    """The heading of a case in pytest-benchmark's table."""
    return f"{case}, {direction}, {dtype_name}, {torch.get_num_threads()} threads"


def record(rows, case, dtype_name, direction, forward, left_out):
    """Add to pytest-benchmark's records, {contender: record}, and append them to the CSV IPT_FAST_BENCH_CSV names.

    Args:
        forward: the :class:`roofline.Work` of one forward.
        left_out: {contender: why it is not among ``rows``}.
    """
    if not rows:
        return
    work = forward * (3 if direction == "training" else 1)  # a backward is counted as two forwards
    medians = {name: row["median"] for name, row in rows.items()}
    for name, row in rows.items():
        row.extra_info["kind"] = roofline.kind()
        row.extra_info["share_of_roofline"] = roofline.share(work, measure.DTYPES[dtype_name], medians[name])
        if is_ours(name):
            row.extra_info["times_faster_than_best_rival"] = times_faster(medians, name)
            row.extra_info["left_out"] = left_out
    if path := os.environ.get("IPT_FAST_BENCH_CSV"):
        append_medians(path, case, dtype_name, direction, medians, work)


def append_medians(path, case, dtype_name, direction, medians, work):
    """Add one row per contender of {contender: seconds}, each with its rates and its share of the roofline.

    ``work`` is the :class:`roofline.Work` of the call; the roofline is measured in this run.
    """
    shared = {
        **environment(),
        "allocator": "tuned" if measure.memory_is_tuned() else "default",
        "case": case,
        "dtype": dtype_name,
        "direction": direction,
        "kind": roofline.kind(),
    }
    rows = []
    for name, median in medians.items():
        share = roofline.share(work, measure.DTYPES[dtype_name], median)
        measured = {
            "contender": name,
            "median_ms": f"{median * 1e3:.3f}",
            "times_faster": f"{times_faster(medians, name):.2f}" if is_ours(name) else "",
            "gb_per_s": f"{work.bytes / median / 1e9:.2f}",
            "gflop_per_s": f"{work.flops / median / 1e9:.2f}",
            "share_of_roofline": "" if share is None else f"{share:.3f}",
        }
        rows.append({**shared, **measured})
    append(path, rows)


def read(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))
