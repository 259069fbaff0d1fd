"""``ipt-fast fid``: how like real images generated ones are."""

import argparse
import dataclasses
import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from .._files import atomic_write, is_record
from ..data.files import list_images
from ..data.io import fill_hidden, read_image
from ..data.npz import NpzImages, has_images
from ..evaluation.features import FeatureNetwork, Features, collect, open_features
from ..evaluation.generation import (
    FIGURES,
    Statistics,
    figures_of,
    read_statistics,
    statistics_of,
    write_statistics,
)
from ..evaluation.report import environment
from ._arguments import Subparsers
from ._outputs import Outputs, check_writable

_TITLES = {
    "fid": "FID",
    "sfid": "sFID",
    "inception_score": "Inception Score",
    "precision": "precision",
    "recall": "recall",
}
# What one image can fail with while the others go on.
_FAILURES = (ValueError, OSError, ImportError, MemoryError)


def add_parser(subparsers: Subparsers) -> None:
    parser = subparsers.add_parser(
        "fid",
        help="measure FID, sFID, Inception Score, precision and recall of generated images",
        description="Compare generated images with real ones, as ADM's evaluator does, by the features that a network "
        "has of them. Images are a folder, with its subfolders, or a .npz file with arr_0. Exit status: 0, 1 where "
        "some images could not be read, 2 for a wrong call.",
    )
    option = parser.add_argument
    option("samples", type=Path, metavar="SAMPLES", help="generated images: a folder or a .npz file")
    option("reference", type=Path, nargs="?", metavar="REFERENCE",
           help="real images, or a .npz file of their statistics; without it the Inception Score alone")  # fmt: skip
    option("--features", type=Path, required=True, metavar="FILE",
           help="network: TorchScript, torch.export (.pt2) or ONNX (.onnx); see docs/generation.md")  # fmt: skip
    option("--batch-size", type=int, default=32, metavar="N", help="images in the network at once (%(default)s)")
    option("--device", help="cpu, cuda ... (a GPU where there is one)")
    option("--json", type=Path, metavar="FILE", help="write the figures, settings, versions and hardware")
    option("--save-statistics", type=Path, metavar="FILE",
           help="write the statistics of SAMPLES to a .npz file, to be a REFERENCE of later calls")  # fmt: skip
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Measure and print; 0, or 1 where an image could not be read.

    Raises:
        ValueError: bad arguments, no images, or features that do not fit.
    """
    if args.batch_size < 1:
        raise ValueError(f"--batch-size must be at least 1; got {args.batch_size}")
    _check_outputs(args)
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        network = open_features(args.features, device)
    except ImportError as error:  # of an extra
        raise ValueError(str(error)) from error
    reference, failed = _reference(args, network) if args.reference else (None, 0)
    samples, more_failed = _features(args.samples, network, args.batch_size)
    figures = figures_of(samples, reference)
    count = len(samples.pool)
    if args.save_statistics:
        write_statistics(args.save_statistics, statistics_of(samples))
    print(f"{args.samples}: {count} images" + (f", compared with {args.reference}" if args.reference else ""))
    for figure in FIGURES:
        value = figures[figure]
        print(f"{_TITLES[figure]:<16} {'-' if value is None else f'{value:.4f}':>10}")
    if args.json:
        _write_record(args, figures, count, device)
    return 1 if failed + more_failed else 0


def _check_outputs(args: argparse.Namespace) -> None:
    for name, path in (("SAMPLES", args.samples), ("REFERENCE", args.reference)):
        if path is not None and not path.is_dir() and not (path.is_file() and path.suffix.lower() == ".npz"):
            raise ValueError(f"{name} must be a folder of images or a .npz file; got {path}")
    outputs = Outputs([args.features, *(path for path in (args.samples, args.reference) if path and path.is_file())])
    if args.json:
        outputs.claim("--json", args.json, _is_record)
        check_writable("--json", args.json)
    if args.save_statistics:
        if args.save_statistics.suffix.lower() != ".npz":
            raise ValueError(f"--save-statistics must be a .npz file; got {args.save_statistics}")
        outputs.claim("--save-statistics", args.save_statistics, _is_statistics)
        check_writable("--save-statistics", args.save_statistics)


def _reference(args: argparse.Namespace, network: FeatureNetwork) -> tuple[Statistics, int]:
    """What the reference is known to be, and how many of its images could not be read."""
    stored = read_statistics(args.reference) if args.reference.is_file() else None
    if stored is not None and not has_images(args.reference):
        return stored, 0
    features, failed = _features(args.reference, network, args.batch_size)
    if stored is None:
        return statistics_of(features), failed
    # ADM's files hold statistics of a whole data set, and a part of its images.
    return dataclasses.replace(stored, points=features.pool), failed


def _features(source: Path, network: FeatureNetwork, batch_size: int) -> tuple[Features, int]:
    images = NpzImages(source) if source.is_file() else _Folder(source)
    bar = tqdm(images, source.name, unit="image", leave=False, disable=None)
    features = collect(network, bar, batch_size)
    failed = getattr(images, "failed", 0)
    if failed:
        print(f"{source}: skipped {failed} of {len(images)} images, which cannot be read", file=sys.stderr)
    return features, failed


class _Folder:
    """The images of a folder and its subfolders that can be read, 8 bits each; others are named and counted.

    Their order is drawn, always alike: in that of their names the Inception Score of a part would be of few classes.
    """

    def __init__(self, folder: Path) -> None:
        self.paths, self.failed = list_images(folder, recursive=True), 0
        random.Random(0).shuffle(self.paths)

    def __len__(self) -> int:
        return len(self.paths)

    def __iter__(self) -> Iterator[np.ndarray]:
        for path in self.paths:
            try:
                pixels = fill_hidden(read_image(path)).pixels
            except _FAILURES as error:
                self.failed += 1
                tqdm.write(f"{path}: error: {error}", file=sys.stderr)
                continue
            yield pixels if pixels.dtype == np.uint8 else np.rint(pixels / 257).astype(np.uint8)


def _write_record(args: argparse.Namespace, figures: dict[str, float | None], count: int, device: str) -> None:
    content = {
        "samples": str(args.samples),
        "images": count,
        "reference": None if args.reference is None else str(args.reference),
        "figures": figures,
        "settings": {"features": str(args.features), "batch_size": args.batch_size, "device": device},
        "environment": environment(),
    }
    with atomic_write(args.json) as path:
        path.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def _is_record(path: Path) -> bool:
    return is_record(path, "figures", "settings", "environment")


def _is_statistics(path: Path) -> bool:
    try:
        return path.stat().st_size == 0 or read_statistics(path) is not None
    except ValueError:
        return False
