"""``ipt-fast plot``: pictures of a model's embeddings and of its restorations."""

import argparse
from pathlib import Path

import numpy as np
import PIL.Image
import torch
from PIL import PngImagePlugin

from .._files import atomic_write
from ..data.degradations import degrade, find_task
from ..data.io import read_image
from ..data.resize import resized
from ..evaluation.embeddings import draw_positions, draw_tasks
from ..evaluation.figures import side_by_side, to_picture
from ..evaluation.metrics import psnr
from ..inference import Restorer
from ..models import open_model
from ..models._pretrained import PretrainedModel
from ._arguments import MODELS_HELP, Subparsers
from ._outputs import Outputs, check_writable, model_files

KINDS = ("positions", "tasks", "restorations")
_MARK = {"Software": "ipt-fast plot"}  # in the PNG, so that a picture can be drawn again in its place


def add_parser(subparsers: Subparsers) -> None:
    parser = subparsers.add_parser(
        "plot",
        help="draw a model's embeddings or restorations",
        description="positions, tasks: how alike the embeddings of an IPT are (figures 1 and 3 of its supplement). "
        "restorations: a clean image degraded, restored and itself, side by side with PSNR.",
        epilog=MODELS_HELP,
    )
    option = parser.add_argument
    option("kind", choices=KINDS, help="what to draw")
    option("output", type=Path, metavar="OUT", help="PNG file")
    option("--model", default="ipt_v2_tiny", help="a model that ships, or a folder of a saved one (%(default)s)")
    option("--image", type=Path, metavar="FILE", help="clean image, for restorations")
    option("--task", help="for restorations: one of the model's tasks; of a model without tasks denoise<σ> (denoise50)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Draw as the parsed arguments say; 0.

    Raises:
        ValueError: bad arguments, a model without such embeddings, or an OUT that holds something else.
    """
    if args.output.suffix.lower() != ".png":
        raise ValueError(f"OUT must be a .png file; got {args.output}")
    if (args.kind == "restorations") != (args.image is not None):
        raise ValueError(f"--image must be given for restorations, and for nothing else; got {args.kind}, {args.image}")
    reads = model_files(args.model) + ([args.image] if args.image else [])
    Outputs(reads).claim("OUT", args.output, _is_plot)
    check_writable("OUT", args.output)
    model = open_model(args.model)
    if args.kind == "restorations":
        picture = _restoration(model, args)
    else:
        picture = (draw_positions if args.kind == "positions" else draw_tasks)(model)
    mark = PngImagePlugin.PngInfo()
    for key, value in _MARK.items():
        mark.add_text(key, value)
    with atomic_write(args.output) as path:
        picture.save(path, pnginfo=mark)
    print(args.output)
    return 0


def _is_plot(path: Path) -> bool:
    try:
        with PIL.Image.open(path, formats=["PNG"]) as picture:
            return picture.info.items() >= _MARK.items()
    except OSError:
        return path.stat().st_size == 0


def _restoration(model: PretrainedModel, args: argparse.Namespace) -> PIL.Image.Image:
    pixels = read_image(args.image).pixels
    clean = torch.from_numpy(pixels.astype(np.float32) / np.iinfo(pixels.dtype).max).permute(2, 0, 1)
    tasks = model.contract.tasks
    restorer = Restorer(model, task=args.task if tasks else None)  # refuses to choose among several
    scale = restorer.scale
    task = args.task or (tasks[0] if tasks else "denoise50" if scale == 1 else f"sr_x{scale}")
    if find_task(task).scale != scale:
        kind = "keeps the size" if scale == 1 else f"enlarges {scale} times"
        raise ValueError(f"--task must be one that {kind}, as {args.model} does; got {task}")
    clean = clean[:, : clean.shape[1] // scale * scale, : clean.shape[2] // scale * scale]
    if 0 in clean.shape:
        raise ValueError(f"--image must have at least {scale} pixels a side for this task; got {args.image}")
    degraded = degrade(clean, task, torch.Generator().manual_seed(0)).permute(1, 2, 0).numpy()
    restored, target = restorer(degraded), clean.permute(1, 2, 0).numpy()
    shown = resized(degraded, scale) if scale > 1 else degraded
    panels = [("Input", shown), ("Restored", restored), ("Target", target)]
    captions = [f"{psnr(np.clip(each, 0, 1), target, data_range=1):.2f} dB" for _, each in panels[:2]] + [""]
    return side_by_side([(title, to_picture(each)) for title, each in panels], captions=captions)
