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

from .._files import atomic_write, is_record, is_stream
from .._version import __version__
from .runner import FIGURES, MORE_FIGURES, Evaluation

CSV_COLUMNS = ("model", "dataset", "protocol", "sigma", "images", *FIGURES)
LONG_CSV_COLUMNS = (*CSV_COLUMNS, *MORE_FIGURES)  # of a table that has MAE or LPIPS
IMAGE_COLUMNS = ("model", "dataset", "protocol", "sigma", "image", *FIGURES, *MORE_FIGURES)


def format_table(evaluations: Sequence[Evaluation]) -> str:
    """One line for each evaluation with its mean PSNR (dB) and SSIM before and after, and MAE and LPIPS if measured."""
    lines = ["dataset        sigma  images   PSNR in  PSNR out   SSIM in  SSIM out"]
    more = [figure for figure in MORE_FIGURES if any(figure in each.figures for each in evaluations)]
    for figure in more:
        name, side = figure.split("_")
        lines[0] += f"{name.upper() + (' in' if side == 'input' else ' out'):>11}"
    for evaluation in evaluations:
        sigma = "-" if evaluation.sigma is None else f"{evaluation.sigma:g}"
        psnr_input, psnr_output, ssim_input, ssim_output = (evaluation.mean(figure) for figure in FIGURES)
        lines.append(
            f"{evaluation.dataset:<13} {sigma:>6} {len(evaluation.scores):>7} "
            f"{psnr_input:>9.2f} {psnr_output:>9.2f} {ssim_input:>9.4f} {ssim_output:>9.4f}"
            + "".join(
                f"{evaluation.mean(each):>11.4f}" if each in evaluation.figures else f"{'-':>11}" for each in more
            )
        )
    return "\n".join(lines)


def read_csv(path: str | Path, columns: Sequence[str] = CSV_COLUMNS) -> bytes:
    """The content that `append_csv` adds to, empty where there is no file yet; raises as `append_csv` does.

    Args:
        columns: those that are needed: CSV_COLUMNS, or LONG_CSV_COLUMNS where MAE or LPIPS are measured.
    """
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
    if tuple(rows[0]) not in (tuple(columns), LONG_CSV_COLUMNS):
        raise ValueError(f"{path} must have the columns {','.join(columns)}; got others, give another file: {rows[0]}")
    return content


def append_csv(path: str | Path, model: str, evaluations: Sequence[Evaluation]) -> None:
    """Add one row of means for each evaluation to a CSV file, made where there is none; replaced atomically.

    The rows that are there stay, and so do notes among them and a byte-order mark; a last line that was not ended is,
    and all lines end as the first does. An evaluation in which no image could be scored has no means and gets no row.
    A new file has LONG_CSV_COLUMNS where MAE or LPIPS were measured, else CSV_COLUMNS.

    Raises:
        ValueError: the file exists and its columns are others than those, or it is no whole text file.
    """
    more = any(set(MORE_FIGURES) & set(evaluation.figures) for evaluation in evaluations)
    content = read_csv(path, LONG_CSV_COLUMNS if more else CSV_COLUMNS)
    mark, before = _mark(content), _text(content)
    end = "\r\n" if before.partition("\n")[0].endswith("\r") else "\n"
    before = re.sub(r"\r\n|\r|\n", "\n", before)
    if before and not before.endswith("\n"):
        before += "\n"
    rows = io.StringIO()
    writer = csv.writer(rows, lineterminator="\n")
    long = more or tuple(next(csv.reader(io.StringIO(before)), ())) == LONG_CSV_COLUMNS
    if not before:
        writer.writerow(LONG_CSV_COLUMNS if long else CSV_COLUMNS)
    for evaluation in evaluations:
        if not evaluation.scores:
            continue
        columns = (*FIGURES, *MORE_FIGURES) if long else FIGURES
        means = [f"{evaluation.mean(each):.4f}" if each in evaluation.figures else "" for each in columns]
        images = len(evaluation.scores)
        writer.writerow([model, evaluation.dataset, evaluation.protocol, _sigma(evaluation), images, *means])
    text = (before + rows.getvalue()).replace("\n", end)
    with atomic_write(path) as temporary:
        temporary.write_bytes(mark + text.encode(errors="surrogateescape"))


def write_image_csv(path: str | Path, model: str, evaluations: Sequence[Evaluation]) -> None:
    """Write a row of scores for each image, with IMAGE_COLUMNS; replaced atomically. What was not measured is empty."""
    rows = io.StringIO()
    writer = csv.writer(rows, lineterminator="\n")
    writer.writerow(IMAGE_COLUMNS)
    for evaluation in evaluations:
        for score in evaluation.scores:
            scores = [getattr(score, figure) for figure in (*FIGURES, *MORE_FIGURES)]
            known = ["" if value is None else f"{value:.4f}" for value in scores]
            writer.writerow([model, evaluation.dataset, evaluation.protocol, _sigma(evaluation), score.image, *known])
    with atomic_write(path) as temporary:
        temporary.write_bytes(rows.getvalue().encode(errors="surrogateescape"))


def is_image_csv(path: str | Path) -> bool:
    """Whether a file is what `write_image_csv` writes, or empty."""
    with Path(path).open("rb") as file:
        line = file.readline(1000)
    return line.strip() in (b"", ",".join(IMAGE_COLUMNS).encode())


def _sigma(evaluation: Evaluation) -> str:
    return "" if evaluation.sigma is None else f"{evaluation.sigma:g}"


def _mark(content: bytes) -> bytes:
    return codecs.BOM_UTF8 if content.startswith(codecs.BOM_UTF8) else b""


def _text(content: bytes) -> str:
    """Without a byte-order mark; bytes that are no UTF-8, as in names of old files, become them again when written."""
    return content.removeprefix(codecs.BOM_UTF8).decode(errors="surrogateescape")


def is_report(path: str | Path) -> bool:
    """Whether a file is what `write_json` writes, or empty."""
    return is_record(path, "settings", "environment", "evaluations")


def write_json(path: str | Path, model: str, settings: dict, evaluations: Sequence[Evaluation], **more: Any) -> None:
    """Write means, the scores of every image, the settings, versions and hardware, and `more`; replaced atomically.

    What is not finite becomes null: the PSNR of equal images, and the means where no image could be scored.
    """
    content = {
        "model": model,
        "settings": settings,
        "environment": environment(),
        "evaluations": [
            {"mean": {figure: evaluation.mean(figure) for figure in evaluation.figures}, **asdict(evaluation)}
            for evaluation in evaluations
        ],
        **more,
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
