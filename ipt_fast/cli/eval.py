"""``ipt-fast eval``: PSNR and SSIM of a model on folders of images."""

import argparse
import dataclasses
import sys
import textwrap
from pathlib import Path

import torch
from tqdm import tqdm

from .. import use_backend
from .._precision import DTYPES
from ..data.files import list_images
from ..evaluation.protocols import PROTOCOLS
from ..evaluation.report import append_csv, format_table, is_report, read_csv, write_json
from ..evaluation.runner import dataset_names, evaluate
from ..inference import Restorer
from ..models import open_model
from ..ops._select import POLICIES, policy
from ._arguments import MODELS_HELP, TILE_HELP, Subparsers, tile_size
from ._outputs import Outputs, check_writable, model_files


def add_parser(subparsers: Subparsers) -> None:
    protocols = "\n".join(f"  {protocol.name:<10} {protocol.description}" for protocol in PROTOCOLS.values())
    parser = subparsers.add_parser(
        "eval",
        help="measure PSNR and SSIM on folders of images",
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
    option("--sigma", nargs="+", type=float, default=[], metavar="S", help="noise levels on the 0..255 scale")
    option("--protocol", choices=list(PROTOCOLS), default="rgb", help="how the score is computed (%(default)s)")
    option("--crop", type=int, metavar="N", help="border pixels left out of the score (the magnification, else 0)")
    option("--limit", type=int, metavar="N", help="only the first N images of each folder")
    option("--csv", metavar="FILE", help="add a row of means for each folder and noise level")
    option("--json", metavar="FILE", help="write every image's scores, settings, versions and hardware")
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
    _check_reports(args)
    args.backend = args.backend or policy()
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    evaluations = []
    with use_backend(args.backend):
        restorer = Restorer(open_model(args.model), task=args.task, tile=args.tile, dtype=args.dtype, device=device)
        scale = restorer.scale if restorer.scale > 1 else None
        if scale is None and not (args.sigma or args.target):
            raise ValueError("--data must have either --sigma (clean images) or --target (a paired set); got neither")
        if scale is not None and (args.sigma or args.target):
            raise ValueError(
                f"--sigma and --target must be left out for a task that magnifies; got {args.task or args.model}"
            )
        crop = (scale or 0) if args.crop is None else args.crop
        restorer.try_one_pixel()
        names = args.data if args.target else dataset_names(args.data)
        for folder, dataset in zip(args.data, names, strict=True):
            for sigma in args.sigma or [None]:
                evaluation = evaluate(
                    restorer,
                    folder,
                    args.protocol,
                    sigma=sigma,
                    target=args.target,
                    scale=scale,
                    crop=crop,
                    limit=args.limit,
                    progress=lambda paths: tqdm(paths, unit="image", leave=False, disable=None),
                )
                if not args.target:
                    evaluation = dataclasses.replace(evaluation, dataset=dataset)
                for name, reason in evaluation.failures:
                    print(f"ipt-fast eval: {evaluation.dataset}/{name}: {reason}", file=sys.stderr)
                evaluations.append(evaluation)
    name = args.model if args.task is None else f"{args.model} {args.task}"
    print(f"{name}, protocol {args.protocol} ({PROTOCOLS[args.protocol].description})")
    print(format_table(evaluations))
    if args.csv:
        append_csv(args.csv, name, evaluations)
    if args.json:
        settings = {option: getattr(args, option) for option in ("task", "limit", "tile", "backend")}
        settings |= {"crop": crop, "dtype": str(restorer.dtype), "device": str(restorer.device)}
        write_json(args.json, name, settings, evaluations)
    return 1 if any(evaluation.failures for evaluation in evaluations) else 0


def _check_reports(args: argparse.Namespace) -> None:
    """Raise before the work is done, not after."""
    reports = [(name, Path(path)) for name, path in (("--csv", args.csv), ("--json", args.json)) if path]
    if not reports:
        return
    folders = [*args.data, *([args.target] if args.target else [])]
    outputs = Outputs([*(image for folder in folders for image in list_images(folder)), *model_files(args.model)])
    for name, path in reports:
        if path.is_dir():
            raise ValueError(f"{name} must be a file; got the folder {path}")
        outputs.claim(name, path, is_report if name == "--json" else None)
        check_writable(name, path)
    if args.csv:
        read_csv(args.csv)
