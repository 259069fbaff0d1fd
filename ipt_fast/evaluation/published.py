"""The figures that the two papers print, to lay beside one's own.

``published.csv`` has them as printed. "IPT" is Chen et al., "Pre-Trained Image Processing Transformer", CVPR 2021:
tables 1 to 4, and 1 of the supplement. "IPT-V2" is Tu et al., "IPT-V2: Efficient Image Processing Transformer using
Hierarchical Attentions": tables 1, 2, 4, 5, its own row of 11, and of table 3 the one figure that section 4.2 repeats.
"""

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from .runner import Evaluation

# {data set of the tables: (images, what copies of it differ in)}
DATASETS = {
    "CBSD68": (68, ""),
    "BSD68": (68, ""),
    "Kodak24": (24, "copies hold whole photos of 768 x 512 or crops of 500 x 500"),
    "McMaster": (18, ""),
    "Urban100": (100, ""),
    "Set12": (12, ""),
    "SIDD": (1280, "the table is of the benchmark's crops of 256 x 256"),
    "DND": (1000, "the table is of the benchmark's crops of 512 x 512, whose targets are not public"),
    "GoPro": (1111, ""),
    "DPDD": (76, ""),
    "DPDD indoor": (37, ""),
    "DPDD outdoor": (39, ""),
    "Rain100H": (100, "there are an older and a newer Rain100H, with other streaks"),
    "Rain100L": (100, ""),
    "Test2800": (2800, ""),
    "Set5": (5, ""),
    "Set14": (14, ""),
    "B100": (100, ""),
}
TRAINING = {
    "IPT": "IPT was pre-trained on ImageNet and fine-tuned to each task",
    "IPT-V2": "IPT-V2 was trained for 300000 iterations on each task's own training set",
}


@dataclass(frozen=True)
class PublishedFigure:
    """A row of a table. PSNR is in dB, MAE in [0, 1]; None where the table has no such figure.

    Attributes:
        paper: "IPT" or "IPT-V2".
        table: its number.
        task: "denoise", "gray_denoise", "camera", "derain", "motion_deblur", "defocus_deblur", "dual_pixel_deblur" or
            "sr_x2" to "sr_x4".
        dataset: a key of DATASETS.
        level: sigma on the 0..255 scale, "x" and the magnification, or "".
        protocol: of `ipt_fast.evaluation.protocols` the one that the paper's programs, or those it follows, use.
        model: as the table names it.
    """

    paper: str
    table: str
    task: str
    dataset: str
    level: str
    protocol: str
    model: str
    psnr: float
    ssim: float | None
    mae: float | None
    lpips: float | None


@cache
def published_figures() -> tuple[PublishedFigure, ...]:
    """All rows of ``published.csv``."""
    with Path(__file__).with_name("published.csv").open(newline="", encoding="utf-8") as file:
        return tuple(
            PublishedFigure(
                **{name: row[name] for name in ("paper", "table", "task", "dataset", "level", "protocol", "model")},
                psnr=float(row["psnr"]),
                ssim=_number(row["ssim"]),
                mae=_number(row["mae"]),
                lpips=_number(row["lpips"]),
            )
            for row in csv.DictReader(file)
        )


def dataset_of(evaluation: Evaluation, name: str = "") -> str | None:
    """The data set of the tables that an evaluation is of: ``name``, or what a part of its folder's path is called.

    Raises:
        ValueError: the tables have no set of that name.
    """
    known = {each.lower(): each for each in DATASETS}
    if name:
        if name.lower() not in known:
            raise ValueError(f"--published must be one of {', '.join(DATASETS)}; got {name}")
        return known[name.lower()]
    parts = reversed(Path(evaluation.folder or evaluation.dataset).parts)
    return next((known[part.lower()] for part in parts if part.lower() in known), None)


def matching(
    evaluation: Evaluation, dataset: str, *, scale: int | None = None, two_views: bool = False
) -> list[PublishedFigure]:
    """The rows of a data set at the level of an evaluation, as the papers have them."""
    level = f"x{scale}" if scale else "" if evaluation.sigma is None else f"{evaluation.sigma:g}"
    wrong_task = "defocus_deblur" if two_views else "dual_pixel_deblur"
    return [
        row for row in published_figures() if (row.dataset, row.level) == (dataset, level) and row.task != wrong_task
    ]


def differences(evaluation: Evaluation, rows: Sequence[PublishedFigure], dataset: str) -> list[str]:
    """What keeps the published figures and those of an evaluation from being compared, as far as it is known."""
    images, note = DATASETS[dataset]
    found = []
    if len(evaluation.scores) != images:
        found.append(f"images: {len(evaluation.scores)} here, {images} there")
    if note:
        found.append(note)
    others = sorted({(row.paper, row.protocol) for row in rows if row.protocol != evaluation.protocol})
    found += [f"protocol: {evaluation.protocol} here, {protocol} in {paper}" for paper, protocol in others]
    return found + [TRAINING[paper] for paper in sorted({row.paper for row in rows})]


def format_published(
    model: str, evaluations: Sequence[Evaluation], name: str = "", *, scale: int | None = None, two_views: bool = False
) -> str:
    """The published rows of each evaluation's data set and level, the evaluation's own as the last, what differs below.

    Args:
        model: what the row of an evaluation is called.
        name: the data set that the images are of, or "" to go by their folder.
        scale: of super-resolution.
        two_views: whether the input was two views of a dual-pixel photo.
    """
    lines = []
    for evaluation in evaluations:
        dataset = dataset_of(evaluation, name)
        rows = matching(evaluation, dataset, scale=scale, two_views=two_views) if dataset else []
        level = f", x{scale}" if scale else "" if evaluation.sigma is None else f", sigma {evaluation.sigma:g}"
        if not rows or dataset is None:
            lines.append(f"published: nothing for {dataset or evaluation.dataset}{level}")
            continue
        width = max(len(each) for each in (model, *(row.model for row in rows)))
        title = f"published: {dataset}{level}".ljust(len(_start("", "", "", width)))
        lines.append(f"{title}{'PSNR':>8}{'SSIM':>8}{'MAE':>8}{'LPIPS':>8}")
        for row in rows:
            source = f"{row.paper}, {row.table if row.table.startswith('s') else 'table ' + row.table}"
            start = _start(source, row.task, row.model, width)
            lines.append(start + _cells((row.psnr, row.ssim, row.mae, row.lpips)))
        means = [
            evaluation.mean(figure) if figure in evaluation.figures else None
            for figure in ("psnr_output", "ssim_output", "mae_output", "lpips_output")
        ]
        lines.append(_start("here", "", model, width) + _cells(means))
        lines += [f"  differs: {difference}" for difference in differences(evaluation, rows, dataset)]
    return "\n".join(lines)


def _start(source: str, task: str, model: str, width: int) -> str:
    return f"  {source:<21} {task:<17} {model:<{width}}"


def _cells(figures: Sequence[float | None]) -> str:
    psnr, *others = figures
    return f"{psnr:>8.2f}" + "".join("       -" if each is None else f"{each:>8.3f}" for each in others)


def _number(text: str) -> float | None:
    return float(text) if text else None
