"""``ipt-fast eval``: PSNR, SSIM, MAE and LPIPS of a model on folders of images."""

import argparse
import contextlib
import dataclasses
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from tqdm import tqdm

from .. import use_backend
from .._precision import DTYPES
from ..data.files import list_images
from ..evaluation.lpips import load_lpips
from ..evaluation.page import DEFAULT_SIZE, Page, Panel, is_page, write_page
from ..evaluation.protocols import PROTOCOLS, get_protocol
from ..evaluation.published import DATASETS, dataset_of, differences, format_published, matching
from ..evaluation.report import (
    CSV_COLUMNS,
    LONG_CSV_COLUMNS,
    append_csv,
    format_table,
    is_image_csv,
    is_report,
    read_csv,
    write_image_csv,
    write_json,
)
from ..evaluation.runner import PAIRINGS, Evaluation, Shown, dataset_names, evaluate
from ..inference import Restorer
from ..models import open_model
from ..ops._select import POLICIES, policy
from ._arguments import MODELS_HELP, TILE_HELP, Subparsers, tile_size
from ._outputs import Outputs, check_writable, model_files


def add_parser(subparsers: Subparsers) -> None:
    protocols = "\n".join(f"  {protocol.name:<10} {protocol.description}" for protocol in PROTOCOLS.values())
    parser = subparsers.add_parser(
        "eval",
        help="measure PSNR, SSIM, MAE and LPIPS on folders of images",
        description="Restore every image of one or more folders and print mean PSNR (dB) and SSIM before and after.\n"
        "Clean images get Gaussian noise (--sigma) or, for a task that magnifies, are shrunk; degraded ones are\n"
        "compared with --target.\n\n"
        f"protocols:\n{protocols}",
        epilog=textwrap.fill(MODELS_HELP, 100),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    option = parser.add_argument
    option("--model", default="ipt_v2_tiny", help="a model that ships, or a folder of a saved one (%(default)s)")
    option("--task", help="of a model with several tasks: which; any of its denoising heads takes any --sigma")
    option("--data", nargs="+", required=True, metavar="FOLDER", help="clean images, or the inputs of a paired set")
    option("--target", metavar="FOLDER", help="targets of a paired set, by the same names (the suffix may differ)")
    option("--second-view", metavar="FOLDER", help="right views of dual-pixel photos, --data being the left ones")
    option("--pair-by", choices=PAIRINGS, default="name", help="how files of the folders belong together (%(default)s)")
    option("--sigma", nargs="+", type=float, default=[], metavar="S", help="noise levels on the 0..255 scale")
    option("--protocol", choices=list(PROTOCOLS), default="rgb", help="how the score is computed (%(default)s)")
    option("--crop", type=int, metavar="N", help="border pixels left out of the score (the magnification, else 0)")
    option("--limit", type=int, metavar="N", help="only the first N images of each folder")
    option(
        "--lpips",
        nargs="+",
        metavar="PATH",
        help="measure LPIPS, too: files of weights (torchvision's AlexNet, and the published heads) or their folder",
    )
    option(
        "--published",
        nargs="?",
        const="",
        metavar="SET",
        help="print both papers' figures for the data set, which the folder's name says, or SET: "
        + ", ".join(DATASETS),
    )
    option("--csv", metavar="FILE", help="add a row of means for each folder and noise level")
    option("--per-image", metavar="FILE", help="write a CSV row of scores for each image")
    option("--json", metavar="FILE", help="write every image's scores, settings, versions and hardware")
    option("--html", metavar="FILE", help="write a web page with a slider between versions of each image")
    option("--html-size", type=int, default=DEFAULT_SIZE, metavar="N", help="pixels a side on the page (%(default)s)")
    option("--tile", type=tile_size, default="auto", help=TILE_HELP)
    option("--dtype", choices=("auto", *DTYPES), default="auto", help="precision of the model (%(default)s)")
    option("--device", help="cpu, cuda ... (a GPU where there is one)")
    option("--backend", choices=POLICIES, help="kernels to use (IPT_FAST_BACKEND, or auto)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Evaluate and print; 0, or 1 where an image of a folder could not be evaluated.

    Raises:
        ValueError: bad arguments, a folder without images, or a report that cannot be written.
        RuntimeError: the demanded backend cannot run the model.
    """
    if args.sigma and args.target:
        raise ValueError("--data must have either --sigma (clean images) or --target (a paired set); got both")
    if args.target and len(args.data) > 1:
        raise ValueError(f"--data must be one folder with --target; got {len(args.data)}")
    if args.second_view and not args.target:
        raise ValueError(f"--second-view must be left out without --target; got {args.second_view}")
    if args.pair_by != "name" and not args.target:
        raise ValueError(f"--pair-by must be left out without --target; got {args.pair_by}")
    if args.published and args.published.lower() not in map(str.lower, DATASETS):
        raise ValueError(f"--published must be one of {', '.join(DATASETS)}; got {args.published}")
    _check_reports(args)
    args.backend = args.backend or policy()
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    name = args.model if args.task is None else f"{args.model} {args.task}"
    lpips = load_lpips(args.lpips) if args.lpips else None
    with use_backend(args.backend):
        restorer = Restorer(open_model(args.model), task=args.task, tile=args.tile, dtype=args.dtype, device=device)
        scale = restorer.scale if restorer.scale > 1 else None
        if scale is None and not (args.sigma or args.target):
            raise ValueError("--data must have either --sigma (clean images) or --target (a paired set); got neither")
        if scale is not None and (args.sigma or args.target):
            raise ValueError(
                f"--sigma and --target must be left out for a task that magnifies; got {args.task or args.model}"
            )
        channels = restorer.contract.in_channels
        if channels is not None and (channels == 6) != (args.second_view is not None):
            allowed = "given" if channels == 6 else "left out"
            got = f"got {args.second_view}"
            raise ValueError(f"--second-view must be {allowed} for a model of {channels} channels; {got}")
        args.crop = (scale or 0) if args.crop is None else args.crop
        restorer.try_one_pixel()
        distance = lpips.to(restorer.device).compare if lpips else None
        note = f"protocol {args.protocol}: {PROTOCOLS[args.protocol].description}"
        with _page(args, name, note) as page:
            evaluations = _evaluate(args, restorer, scale, distance, page)
    print(f"{name}, protocol {args.protocol} ({PROTOCOLS[args.protocol].description})")
    print(format_table(evaluations))
    two_views = args.second_view is not None
    if args.published is not None:
        print(format_published(name, evaluations, args.published, scale=scale, two_views=two_views))
    if args.csv:
        append_csv(args.csv, name, evaluations)
    if args.per_image:
        write_image_csv(args.per_image, name, evaluations)
    if args.json:
        settings = {option: getattr(args, option) for option in ("task", "limit", "tile", "backend", "crop")}
        settings |= {"dtype": str(restorer.dtype), "device": str(restorer.device)}
        more = {} if args.published is None else {"published": _published(args, evaluations, scale)}
        write_json(args.json, name, settings, evaluations, **more)
    return 1 if any(evaluation.failures for evaluation in evaluations) else 0


def _evaluate(
    args: argparse.Namespace,
    restorer: Restorer,
    scale: int | None,
    lpips: Callable | None,
    page: Page | None,
) -> list[Evaluation]:
    """An evaluation for each folder and noise level, in order."""
    evaluations = []
    names = args.data if args.target else dataset_names(args.data)
    for folder, dataset in zip(args.data, names, strict=True):
        for sigma in args.sigma or [None]:
            if page:
                page.section(dataset, "" if sigma is None else f"Gaussian noise of sigma {sigma:g}")
            evaluation = evaluate(
                restorer,
                folder,
                args.protocol,
                sigma=sigma,
                target=args.target,
                scale=scale,
                crop=args.crop,
                limit=args.limit,
                progress=lambda paths: tqdm(paths, unit="image", leave=False, disable=None),
                second_view=args.second_view,
                pair_by=args.pair_by,
                lpips=lpips,
                show=_shower(page) if page else None,
            )
            if not args.target:
                evaluation = dataclasses.replace(evaluation, dataset=dataset)
            for name, reason in evaluation.failures:
                print(f"ipt-fast eval: {evaluation.dataset}/{name}: {reason}", file=sys.stderr)
                if page:
                    page.fail(name, reason)
            evaluations.append(evaluation)
    return evaluations


@contextlib.contextmanager
def _page(args: argparse.Namespace, title: str, note: str) -> Iterator[Page | None]:
    if not args.html:
        yield None
        return
    with write_page(args.html, title, note, size=args.html_size) as page:
        yield page


def _shower(page: Page) -> Callable[[Shown], None]:
    def show(shown: Shown) -> None:
        panels = (("Input", shown.before), ("Restored", shown.after), ("Target", shown.target))
        score = shown.score
        note = f"{score.psnr_input:.2f} → {score.psnr_output:.2f} dB"
        note += f", SSIM {score.ssim_input:.3f} → {score.ssim_output:.3f}"
        if score.lpips_output is not None:
            note += f", LPIPS {score.lpips_input:.3f} → {score.lpips_output:.3f}"
        page.add(score.image, [Panel(title, pixels) for title, pixels in panels], note)

    return show


def _published(args: argparse.Namespace, evaluations: list[Evaluation], scale: int | None) -> list[dict]:
    """For each evaluation the rows of the papers and what differs."""
    found = []
    for evaluation in evaluations:
        dataset = dataset_of(evaluation, args.published)
        two_views = args.second_view is not None
        rows = matching(evaluation, dataset, scale=scale, two_views=two_views) if dataset else []
        differs = differences(evaluation, rows, dataset) if dataset else []
        found.append({"dataset": dataset, "rows": [dataclasses.asdict(row) for row in rows], "differs": differs})
    return found


def _check_reports(args: argparse.Namespace) -> None:
    """Raise before the work is done, not after."""
    if args.html_size < 16:
        raise ValueError(f"--html-size must be at least 16; got {args.html_size}")
    kinds = {"--csv": None, "--per-image": is_image_csv, "--json": is_report, "--html": is_page}
    paths = {name: getattr(args, name[2:].replace("-", "_")) for name in kinds}
    reports = [(name, Path(path)) for name, path in paths.items() if path]
    if not reports:
        return
    folders = [*args.data, *(each for each in (args.target, args.second_view) if each)]
    weights = [Path(path) for path in args.lpips or []]
    outputs = Outputs(
        [*(image for folder in folders for image in list_images(folder)), *model_files(args.model), *weights]
    )
    for name, path in reports:
        if path.is_dir():
            raise ValueError(f"{name} must be a file; got the folder {path}")
        outputs.claim(name, path, kinds[name])
        check_writable(name, path)
    if args.csv:
        more = get_protocol(args.protocol).takes_mae or args.lpips
        read_csv(args.csv, LONG_CSV_COLUMNS if more else CSV_COLUMNS)
