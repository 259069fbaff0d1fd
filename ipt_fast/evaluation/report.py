"""Evaluations as a table, as CSV rows that later runs add to, and as JSON with everything behind them."""

import codecs
import csv
import io
import json
import math
import platform
import re
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .._files import atomic_write, is_stream
from .._version import __version__
from .runner import FIGURES, Evaluation

CSV_COLUMNS = ("model", "dataset", "protocol", "sigma", "images", *FIGURES)


def format_table(evaluations: Sequence[Evaluation]) -> str:
    """One line for each evaluation with its mean PSNR (dB) and SSIM before and after."""
    lines = ["dataset        sigma  images   PSNR in  PSNR out   SSIM in  SSIM out"]
    for evaluation in evaluations:
        sigma = "-" if evaluation.sigma is None else f"{evaluation.sigma:g}"
        psnr_input, psnr_output, ssim_input, ssim_output = (evaluation.mean(figure) for figure in FIGURES)
        lines.append(
            f"{evaluation.dataset:<13} {sigma:>6} {len(evaluation.scores):>7} "
            f"{psnr_input:>9.2f} {psnr_output:>9.2f} {ssim_input:>9.4f} {ssim_output:>9.4f}"
        )
    return "\n".join(lines)


def read_csv(path: str | Path) -> bytes:
    """The content that `append_csv` adds to, empty where there is no file yet; raises as `append_csv` does."""
    path = Path(path)
    content = path.read_bytes() if path.is_file() and not is_stream(path) else b""
    if not _text(content).strip():
        return _mark(content)
    if b"\0" in content:
        raise ValueError(f"{path} must be a text file in UTF-8; got NUL bytes in it, give another file")
    try:
        rows = list(csv.reader(io.StringIO(_text(content), newline=""), strict=True))
    except csv.Error as error:
        raise ValueError(f"{path} must be a whole CSV file; got one with an error: {error}") from error
    if tuple(rows[0]) != CSV_COLUMNS:
        raise ValueError(
            f"{path} must have the columns {','.join(CSV_COLUMNS)}; got others, give another file: {rows[0]}"
        )
    return content


def append_csv(path: str | Path, model: str, evaluations: Sequence[Evaluation]) -> None:
    """Add one row of means for each evaluation to a CSV file, made where there is none; replaced atomically.

    The rows that are there stay, and so do notes among them and a byte-order mark; a last line that was not ended is,
    and all lines end as the first does. An evaluation in which no image could be scored has no means and gets no row.

    Raises:
        ValueError: the file exists and its columns are others than CSV_COLUMNS, or it is no whole text file.
    """
    content = read_csv(path)
    mark, before = _mark(content), _text(content)
    end = "\r\n" if before.partition("\n")[0].endswith("\r") else "\n"
    before = re.sub(r"\r\n|\r|\n", "\n", before)
    if before and not before.endswith("\n"):
        before += "\n"
    rows = io.StringIO()
    writer = csv.writer(rows, lineterminator="\n")
    if not before:
        writer.writerow(CSV_COLUMNS)
    for evaluation in evaluations:
        if not evaluation.scores:
            continue
        sigma = "" if evaluation.sigma is None else f"{evaluation.sigma:g}"
        means = [f"{evaluation.mean(figure):.4f}" for figure in FIGURES]
        writer.writerow([model, evaluation.dataset, evaluation.protocol, sigma, len(evaluation.scores), *means])
    text = (before + rows.getvalue()).replace("\n", end)
    with atomic_write(path) as temporary:
        temporary.write_bytes(mark + text.encode(errors="surrogateescape"))


def _mark(content: bytes) -> bytes:
    return codecs.BOM_UTF8 if content.startswith(codecs.BOM_UTF8) else b""


def _text(content: bytes) -> str:
    """Without a byte-order mark; bytes that are no UTF-8, as in names of old files, become them again when written."""
    return content.removeprefix(codecs.BOM_UTF8).decode(errors="surrogateescape")


def is_report(path: str | Path) -> bool:
    """Whether a file is what `write_json` writes, or empty."""
    try:
        content = json.loads(Path(path).read_bytes() or b"{}")
    except (ValueError, RecursionError):
        return False
    return content == {} or (isinstance(content, dict) and {"settings", "environment", "evaluations"} <= content.keys())


def write_json(path: str | Path, model: str, settings: dict, evaluations: Sequence[Evaluation]) -> None:
    """Write means, the scores of every image, the settings, versions and hardware; replaced atomically.

    What is not finite becomes null: the PSNR of equal images, and the means where no image could be scored.
    """
    content = {
        "model": model,
        "settings": settings,
        "environment": environment(),
        "evaluations": [
            {"mean": {figure: evaluation.mean(figure) for figure in FIGURES}, **asdict(evaluation)}
            for evaluation in evaluations
        ],
    }
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(_finite(content), indent=1, allow_nan=False) + "\n", encoding="utf-8")


def _finite(value: Any) -> Any:
    """`value` with None for every NaN and infinity in it, which JSON has no words for."""
    if isinstance(value, dict):
        return {name: _finite(each) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def environment() -> dict[str, str | int | None]:
    """Date, versions and hardware of this process, for the record of a measurement."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "ipt_fast": __version__,
        "torch": torch.__version__,
        "numpy": np.__version__,
        "platform": platform.platform(),
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def cpu_name() -> str:
    """The model of the processor, or its architecture where the system does not tell."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
