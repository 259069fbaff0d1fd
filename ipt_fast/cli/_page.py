"""The web page of ``ipt-fast restore --html``, of the files as they are when the work is done."""

import argparse
from collections.abc import Mapping
from pathlib import Path

from .._files import is_stream, naming
from ..data.io import fill_hidden, read_image
from ..evaluation.page import Page, Panel, is_page, write_page
from ..evaluation.runner import dataset_names
from ._jobs import Job
from ._journal import NAME
from ._outputs import Outputs, check_writable, model_files
from ._work import FAILURES, degraded


def check_page(args: argparse.Namespace, jobs: list[Job]) -> None:
    """Raise ValueError unless ``--html`` is a file that can be written, and no input or result."""
    if args.html is None:
        return
    if args.html_size < 16:
        raise ValueError(f"--html-size must be at least 16; got {args.html_size}")
    if args.html.is_dir():
        raise ValueError(f"--html must be a file; got the folder {args.html}")
    reads = [path for job in jobs for path in (job.source, job.target, *job.results) if path is not None]
    weights = [] if args.checkpoint is None else [args.checkpoint]
    reads.append(jobs[0].destination.parent / NAME)
    Outputs([*reads, *model_files(args.model), *weights]).claim("--html", args.html, is_page)
    if args.html.parent.exists() or not _is_made(args.html.parent, jobs):
        check_writable("--html", args.html)


def _is_made(folder: Path, jobs: list[Job]) -> bool:
    """Whether a folder that is not there yet is that of the results, which will be made."""
    return folder.absolute() == jobs[0].destination.parent.absolute()


def write_restorations(args: argparse.Namespace, jobs: list[Job], failed: Mapping[Job, str]) -> None:
    """Write the page: every image with its result, those of earlier runs too, and why the others have none."""
    folders = dataset_names(list(dict.fromkeys(job.source.parent for job in jobs)))
    note = f"{args.model}{f', {args.task}' if args.task else ''}: {len(jobs) - len(failed)} of {len(jobs)} images"
    with naming(args.html), write_page(args.html, ", ".join(folders), note, size=args.html_size) as page:
        for job in jobs:
            if job in failed:
                page.fail(job.source.name, failed[job])
                continue
            try:
                _add(page, job, args)
            except FAILURES as error:
                page.fail(job.source.name, f"it is restored, but cannot be shown: {error}")


def _add(page: Page, job: Job, args: argparse.Namespace) -> None:
    if is_stream(job.destination):
        raise ValueError(f"{job.destination} cannot be read again")
    source, result = fill_hidden(read_image(job.source, args.max_pixels)), read_image(job.destination, args.max_pixels)
    panels = [
        Panel("Before", degraded(source, args.noise), source.alpha, source.icc_profile),
        Panel("After", result.pixels, result.alpha, result.icc_profile),
    ]
    if args.noise is not None:
        panels.append(Panel("Target", source.pixels, source.alpha, source.icc_profile))
    elif job.target is not None:
        target = read_image(job.target, args.max_pixels)
        panels.append(Panel("Target", target.pixels, target.alpha, target.icc_profile))
    height, width = result.pixels.shape[:2]
    page.add(job.source.name, panels, f"{width} x {height}")
