"""``python -m benchmarks.attribution``: how far models look, as local attribution maps of many photos tell.

Of every photo the centre is taken, gets Gaussian noise, and the window in its middle is attributed. One CSV row for
each model and photo: the diffusion index, and the share of the attribution that lies farther than 32 pixels from the
window.
"""

import argparse
import csv
import pathlib
import statistics

import numpy as np
import torch

from ipt_fast._files import atomic_write
from ipt_fast.attribution import local_attribution_map
from ipt_fast.data.files import list_images
from ipt_fast.data.io import read_image
from ipt_fast.evaluation.protocols import get_protocol
from ipt_fast.models import open_model

COLUMNS = ("model", "image", "sigma", "crop", "window", "steps", "diffusion_index", "share_beyond_32")
FAR = 32  # pixels


def centre(path: pathlib.Path, size: int, sigma: float) -> torch.Tensor:
    """(3, size, size): the middle of a colour photo with noise of seed 0."""
    pixels = read_image(path).pixels
    height, width, channels = pixels.shape
    if channels != 3 or min(height, width) < size:
        raise ValueError(f"images must be colour photos of at least {size} pixels a side; got {path}, {pixels.shape}")
    top, left = (height - size) // 2, (width - size) // 2
    crop = pixels[top : top + size, left : left + size] / np.iinfo(pixels.dtype).max
    return torch.from_numpy(get_protocol("rgb").add_noise(crop, sigma)).permute(2, 0, 1)


def share_beyond(magnitude: torch.Tensor, window: tuple[int, int, int], distance: int) -> float:
    """The share of an attribution (H, W) that is more than ``distance`` rows or columns away from a window."""
    left, top, side = window
    near = magnitude[
        max(0, top - distance) : top + side + distance, max(0, left - distance) : left + side + distance
    ].sum()
    return 1 - (near / magnitude.sum()).item()


def measure(model: str, paths: list[pathlib.Path], args: argparse.Namespace) -> list[dict]:
    opened, rows = open_model(model), []
    begin = (args.crop - args.window) // 2
    for path in paths:
        found = local_attribution_map(
            opened, centre(path, args.crop, args.sigma), (begin, begin, args.window), steps=args.steps
        )
        values = (
            pathlib.Path(model).name,
            path.name,
            f"{args.sigma:g}",
            args.crop,
            args.window,
            args.steps,
            f"{found.diffusion_index:.3f}",
            f"{share_beyond(found.magnitude, found.window, FAR):.4f}",
        )
        rows.append(dict(zip(COLUMNS, values, strict=True)))
    return rows


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.attribution", description=__doc__)
    parser.add_argument("--model", nargs="+", required=True, help="folders of saved models")
    parser.add_argument("--data", nargs="+", required=True, help="folders of colour photos")
    parser.add_argument("--csv", type=pathlib.Path, required=True, help="file to write")
    parser.add_argument("--every", type=int, default=1, help="take every n-th photo of a folder")
    parser.add_argument("--sigma", type=float, default=50, help="of the noise, 0..255 scale")
    parser.add_argument("--crop", type=int, default=192, help="side of the part of a photo that is taken")
    parser.add_argument("--window", type=int, default=16, help="side of the window")
    parser.add_argument("--steps", type=int, default=20, help="of the integral")
    args = parser.parse_args(argv)
    paths = [path for folder in args.data for path in list_images(folder)[:: args.every]]
    rows = []
    for model in args.model:
        rows += (found := measure(model, paths, args))
        index, far = (statistics.mean(float(row[name]) for row in found) for name in COLUMNS[-2:])
        print(f"{found[0]['model']:<16} {len(found)} photos   diffusion index {index:.2f}   beyond {FAR} px {far:.1%}")
    with atomic_write(args.csv) as path, path.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
