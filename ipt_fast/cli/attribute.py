"""``ipt-fast attribute``: which pixels of a photo a model restores a part of it from."""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .._files import atomic_write, is_record
from ..attribution import Attribution, local_attribution_map
from ..data.io import fill_hidden, read_image
from ..evaluation.attributions import draw_attributions
from ..evaluation.protocols import get_protocol
from ..evaluation.report import environment
from ..models import open_model
from ..models.contract import describe
from ._arguments import MODELS_HELP, Subparsers
from ._outputs import Outputs, check_writable, model_files
from ._pictures import is_picture_of, save_picture


def add_parser(subparsers: Subparsers) -> None:
    parser = subparsers.add_parser(
        "attribute",
        help="show which pixels a model restores a part of a photo from",
        description="Local attribution maps (LAM; Gu and Dong, CVPR 2021) of one window of a model's output: the "
        "picture shows for each model its output with the window, the attribution of every pixel of the input, and it "
        "on the input. The diffusion index is 100 where all pixels have a like share, and near 0 where few have all.",
        epilog=MODELS_HELP,
    )
    option = parser.add_argument
    option("image", type=Path, metavar="IMAGE", help="the photo, as the model is to get it")
    option("--model", nargs="+", default=["ipt_v2_tiny"], metavar="M",
           help="models that ship, or folders of saved ones (ipt_v2_tiny)")  # fmt: skip
    option("--window", type=int, nargs=3, required=True, metavar=("X", "Y", "SIZE"),
           help="left, top and side of the square in the output, in pixels")  # fmt: skip
    option("--out", type=Path, required=True, metavar="OUT", help="PNG file for the picture")
    option("--json", type=Path, metavar="FILE", help="write the diffusion indices, settings, versions and hardware")
    option("--task", help="what to restore, for models of several tasks")
    option("--noise", type=float, default=0.0, metavar="SIGMA", help="add Gaussian noise (0..255 scale, seed 0) first")
    option("--sigma", type=float, default=1.2, help="Gaussian blur at the beginning of the path, pixels (%(default)s)")
    option("--steps", type=int, default=50, metavar="N", help="of the integral along the path (%(default)s)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Attribute and draw as the parsed arguments say; 0.

    Raises:
        ValueError: bad arguments, a window outside, a flat image, or an output that is something else already.
    """
    if args.out.suffix.lower() != ".png":
        raise ValueError(f"--out must be a .png file; got {args.out}")
    if not 0 <= args.noise < float("inf"):
        raise ValueError(f"--noise must be finite and at least 0; got {args.noise}")
    outputs = Outputs([args.image, *(path for model in args.model for path in model_files(model))])
    outputs.claim("--out", args.out, lambda path: is_picture_of(path, "attribute"))
    check_writable("--out", args.out)
    if args.json:
        outputs.claim("--json", args.json, _is_record)
        check_writable("--json", args.json)
    image = _read(args)
    found = [(name, _attribute(name, image, args)) for name in args.model]
    drawn = [(name, each.output, each.magnitude, each.window, each.diffusion_index) for name, each in found]
    save_picture(draw_attributions(image, drawn), args.out, "attribute")
    print("diffusion index  model")
    for name, attribution in found:
        print(f"{attribution.diffusion_index:15.3f}  {name}")
    print(args.out)
    if args.json:
        _write_record(args, found)
    return 0


def _read(args: argparse.Namespace) -> Tensor:
    """The photo with its noise, (C, H, W) float32."""
    pixels = fill_hidden(read_image(args.image)).pixels
    values = pixels.astype(np.float32) / np.float32(np.iinfo(pixels.dtype).max)
    if args.noise:
        values = get_protocol("rgb").add_noise(values, args.noise)
    return torch.from_numpy(np.asarray(values, np.float32)).permute(2, 0, 1)


def _attribute(name: str, image: Tensor, args: argparse.Namespace) -> Attribution:
    model = open_model(name)
    if describe(model).in_channels == 3 and len(image) == 1:  # as `restore` does
        image = image.expand(3, -1, -1)
    left, top, side = args.window
    return local_attribution_map(model, image, (left, top, side), task=args.task, sigma=args.sigma, steps=args.steps)


def _write_record(args: argparse.Namespace, found: list[tuple[str, Attribution]]) -> None:
    content = {
        "image": str(args.image),
        "settings": {name: getattr(args, name) for name in ("window", "task", "noise", "sigma", "steps")},
        "environment": environment(),
        "attributions": [
            {
                "model": name,
                "diffusion_index": attribution.diffusion_index,
                "sum": attribution.values.double().sum().item(),
                "change": attribution.change,
            }
            for name, attribution in found
        ],
    }
    with atomic_write(args.json) as path:
        path.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def _is_record(path: Path) -> bool:
    return is_record(path, "settings", "environment", "attributions")
