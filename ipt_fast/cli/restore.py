"""``ipt-fast restore``: restore image files."""

import argparse
import sys
from pathlib import Path

import torch
from tqdm import tqdm

from .. import use_backend
from .._files import check_name
from .._precision import DTYPES
from ..evaluation.page import DEFAULT_SIZE
from ..inference import Restorer
from ..models.contract import describe
from ..ops._select import POLICIES, policy
from ..tiling import BLENDS
from ._arguments import MODELS_HELP, RAW_HELP, TILE_HELP, Subparsers, tile_size
from ._jobs import Job, make_writable, plan
from ._journal import Journal, digest_of_model
from ._models import MODEL_HELP, open_named
from ._page import check_page, write_restorations
from ._ray import check_ray, restore_on_ray
from ._results import Results
from ._work import DECISIVE, Work, restorer_options
from ._work import FAILURES as FAILURES  # it was defined here once


def add_parser(subparsers: Subparsers) -> None:
    parser = subparsers.add_parser(
        "restore",
        help="restore image files",
        description="Restore images: files, all images of a folder (without its subfolders) or all that match a quoted "
        "glob. 8 and 16 bit, gray, colour and alpha are kept, and so are the ICC profile and EXIF; the EXIF "
        "orientation is applied. What an earlier run made of the same image for the same folder, with the same model "
        "and options, is skipped; any other file that is there is an error, unless --overwrite is given. "
        "Exit status: 0, 1 where some images failed, 2 for a wrong call.",
        epilog=MODELS_HELP,
    )
    option = parser.add_argument
    option("input", nargs="+", metavar="IN", help="image file, folder, or quoted glob such as 'photos/*.jpg'")
    option("output", metavar="OUT", help="image file (for one image), whose suffix says the format, or folder")
    option("--model", default="ipt_v2_tiny", help=f"{MODEL_HELP} (%(default)s)")
    option("--checkpoint", type=Path, metavar="FILE", help="weights for the architecture that --model names")
    option("--raw-weights", action="store_true", help=RAW_HELP)
    option("--task", help="what to restore, for models of several tasks")
    option("--tile", type=tile_size, default="auto", help=TILE_HELP)
    option("--overlap", type=int, metavar="N", help="pixels that neighbouring tiles share (32)")
    option("--blend", choices=BLENDS, default="cosine", help="how tiles are joined (%(default)s)")
    option(
        "--self-ensemble", action="store_true", help="mean over 8 flips and transposes: 8 times slower, a little better"
    )
    option("--dtype", choices=("auto", *DTYPES), default="auto", help="precision of the model (%(default)s)")
    option("--device", help="cpu, cuda ... (a GPU where there is one)")
    option("--backend", choices=POLICIES, help="kernels to use (IPT_FAST_BACKEND, or auto)")
    option("--verbose", action="store_true", help="tell what a model of other people is, and how it is accelerated")
    option("--max-pixels", type=int, metavar="N", help="read images of up to N pixels (178956970)")
    option("--overwrite", action="store_true", help="restore again what is in OUT already, and replace it")
    option(
        "--compare", action="store_true", help="write NAME_compare.png too: versions side by side, with a zoomed crop"
    )
    option(
        "--target", type=Path, metavar="PATH", help="clean original, or a folder of them by the same names: prints PSNR"
    )
    option(
        "--noise", type=float, metavar="SIGMA", help="add Gaussian noise (0..255 scale, seed 0) first; IN is the target"
    )
    option("--html", type=Path, metavar="FILE", help="write a web page with a slider between before and after")
    option("--html-size", type=int, default=DEFAULT_SIZE, metavar="N", help="pixels a side on the page (%(default)s)")
    option(
        "--ray",
        action="store_true",
        help="on Ray Data: the cluster that runs or RAY_ADDRESS names, else one on this machine (the extra [ray])",
    )
    option("--ray-workers", type=int, metavar="N", help="with --ray: processes that restore (as many as have room)")
    option("--ray-cpus", type=float, metavar="N", help="with --ray: CPUs, and so threads, of a process (1)")
    option("--ray-gpus", type=float, metavar="N", help="with --ray: GPUs a process takes (1 where there are any, or 0)")
    parser.set_defaults(run=run, take_rest=_take_rest)


def _take_rest(args: argparse.Namespace, rest: list[str]) -> bool:
    """Files after an option that stands between files, which argparse leaves over; whether they are all of ``rest``."""
    if any(each.startswith("-") for each in rest):
        return False
    files: list[str] = [*args.input, args.output, *rest]
    args.input, args.output = files[:-1], files[-1]
    return True


def run(args: argparse.Namespace) -> int:
    """Restore as the parsed arguments say; 0, or 1 where an image failed.

    Raises:
        ValueError: bad arguments, nothing to restore, an output that is an input, or a folder that cannot be written.
        RuntimeError: the demanded backend cannot run the model.
    """
    if args.noise is not None and args.target:
        raise ValueError("--target must be left out with --noise, whose target is the input itself; got both")
    if args.noise is not None and not 0 <= args.noise < float("inf"):
        raise ValueError(f"--noise must be finite and at least 0; got {args.noise}")
    if args.max_pixels is not None and args.max_pixels < 1:
        raise ValueError(f"--max-pixels must be at least 1; got {args.max_pixels}")
    check_name(args.output)
    check_ray(args)
    args.backend = args.backend or policy()
    with use_backend(args.backend):
        return _run(args)


def _run(args: argparse.Namespace) -> int:
    jobs = plan(args)
    check_page(args, jobs)
    model = open_named(args)
    if args.noise is not None and describe(model).scale(args.task) > 1:
        raise ValueError(
            "--noise must be left out for a task that magnifies, as its target is the input itself; got "
            f"{args.task or args.model}"
        )
    journal, made_with = None, {}
    if jobs[0].destination != Path(args.output):  # which is a folder then
        options = {name: getattr(args, name) for name in DECISIVE}
        journal = Journal(jobs[0].destination.parent)
        made_with = {"model": digest_of_model(model), "options": options}
    elif args.ray:
        raise ValueError(f"OUT must be a folder with --ray; got {args.output}")
    results = Results(journal, made_with)
    # Made before anything is said, as it refuses wrong options; on Ray the workers do.
    work = None
    if not args.ray:
        device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
        work = Work(Restorer(model, device=device, **restorer_options(args)), args, made_with, results.write)
    pending, failed = [], {}
    for job in jobs:
        if args.overwrite or (found := results.found(job)) == "nothing":
            pending.append(job)
        elif found:
            failed[job] = found
            print(f"{job.source}: error: {found}", file=sys.stderr)
    if skipped := len(jobs) - len(pending) - len(failed):
        print(f"skipped {skipped} of {len(jobs)}: already restored (--overwrite restores them again)")
    if pending:
        if work is not None:
            work.restorer.try_one_pixel()
        make_writable(pending[0].destination)
        failed |= restore_on_ray(pending, model, args, made_with, results) if work is None else _restore(pending, work)
    if pending or failed:
        print(f"restored {len(jobs) - skipped - len(failed)}, skipped {skipped}, failed {len(failed)}")
    if args.html is not None:
        write_restorations(args, jobs, failed)
    return 1 if failed else 0


def _restore(jobs: list[Job], work: Work) -> dict[Job, str]:
    """Restore and print; the images that failed, and why."""
    failed = {}
    # Fractions of an image count, so that one large image has a progress and an ETA too.
    layout = "{desc}{percentage:3.0f}%|{bar}| {elapsed}<{remaining}"
    with tqdm(total=len(jobs), bar_format=layout, leave=False, disable=None) as bar:
        for index, job in enumerate(jobs):
            bar.set_description(f"{job.source.name} ({index + 1}/{len(jobs)})")
            work.restorer.progress = lambda done, total, index=index: _advance(bar, index + done / total)
            outcome = work.attempt(job)
            outcome.say(bar, job)
            if outcome.error:
                failed[job] = outcome.error
            _advance(bar, index + 1)
    return failed


def _advance(bar: tqdm, images: float) -> None:
    bar.n = images
    bar.refresh()
