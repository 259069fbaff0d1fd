"""What the stages share: their arguments, the folders they write to, rows that are flushed at once."""

import argparse
import contextlib
import csv
import datetime
import json
import os
import pathlib
import re
import subprocess
import time
import traceback

import torch

ROOT = pathlib.Path(__file__).resolve().parents[2]
LOST = 3  # exit status of a process whose GPU is lost


def arguments(description, **more):
    """Of the command line. ``out``: for results; ``work``: for what need not be kept; ``only``: of labels."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--work", type=pathlib.Path, required=True)
    parser.add_argument("--only", type=re.compile, default=re.compile(""))
    parser.add_argument("--rehearse", action="store_true")
    for name, options in more.items():
        parser.add_argument(f"--{name}", **options)
    args = parser.parse_args()
    torch.backends.cudnn.allow_tf32 = False  # as products: everybody's float32 is float32
    args.out.mkdir(parents=True, exist_ok=True)
    args.work.mkdir(parents=True, exist_ok=True)
    return args


def write_line(path, text):
    """Append a line in one write, so that several processes may, and a kill leaves whole lines."""
    handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(handle, text.encode() + b"\n")
    finally:
        os.close(handle)


def write_json(path, value):
    write_line(path, json.dumps(value))


def wait_for(turn):
    """Until the driver has made the file ``turn``, if there is one to wait for."""
    while turn is not None and not turn.exists():
        time.sleep(0.05)


def read_json_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


class Table:
    """A CSV file to which rows are appended as they come."""

    def __init__(self, path, columns, shared):
        self.path, self.columns, self.shared = path, columns, shared
        with contextlib.suppress(FileExistsError), open(path, "x") as file:
            file.write(",".join(columns) + "\n")

    def add(self, **row):
        row = dict.fromkeys(self.columns, "") | self.shared | row
        text = [_shown(row.pop(name)) for name in self.columns]
        assert not row, f"unknown columns: {row}"
        write_line(self.path, _csv_line(text))
        print("  ".join(text[len(self.shared) :]), flush=True)


def _shown(value):
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _csv_line(values):
    class Line(list):
        write = list.append

    line = Line()
    csv.writer(line, lineterminator="").writerow(values)
    return "".join(line)


def commit():
    """Of the sources: what the bundle's maker wrote, or what git says."""
    if (kept := ROOT / "COMMIT").exists():
        return kept.read_text().strip()
    with contextlib.suppress(OSError):
        said = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True)
        return said.stdout.strip() or "unknown"
    return "unknown"


def environment(gpu):
    """The columns that all rows of a run share."""
    import triton

    return {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%MZ"),
        "commit": commit(),
        "gpu": gpu,
        "torch": torch.__version__,
        "triton": triton.__version__,
    }


@contextlib.contextmanager
def reported(label, failures):
    """A part whose failure is printed and counted, and does not stop the others."""
    try:
        yield
    except Exception as error:
        failures.append(label)
        print(f"FAILED: {label}: {type(error).__name__}: {error}\n{traceback.format_exc(limit=-6)}", flush=True)
        if is_lost(error):
            raise SystemExit(1) from error


def is_lost(error):
    """Whether nothing can run on the GPU any more in this process."""
    if not torch.cuda.is_available():
        return False
    try:
        torch.cuda.synchronize()
    except Exception:
        return True
    return "CUDA error" in str(error) and "launch failure" in str(error)
