"""``ipt-fast restore``: restore image files."""

import argparse
import dataclasses
import sys
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from .. import use_backend
from .._files import atomic_write, check_name
from .._precision import DTYPES
from ..data.files import IMAGE_SUFFIXES, list_images, match_images
from ..data.io import Image, check_suffix, check_writable_as, fill_hidden, read_image, write_image
from ..data.resize import resized
from ..evaluation.figures import side_by_side, to_picture
from ..evaluation.metrics import psnr
from ..evaluation.protocols import get_protocol
from ..inference import Restorer
from ..models import create_model, load_checkpoint, open_model
from ..ops._select import POLICIES, policy
from ..tiling import BLENDS
from ._arguments import TILE_HELP, Subparsers, tile_size

# What one image can fail with while the others go on.
FAILURES = (ValueError, OSError, ImportError, RuntimeError, MemoryError)


def add_parser(subparsers: Subparsers) -> None:
    parser = subparsers.add_parser(
        "restore",
        help="restore image files",
        description="Restore an image, all images of a folder (without its subfolders) or all that match a quoted "
        "glob. 8 and 16 bit, gray, colour and alpha are kept, and so are the ICC profile and EXIF; the EXIF "
        "orientation is applied. "
        "Exit status: 0, 1 where some images failed, 2 for a wrong call.",
    )
    option = parser.add_argument
    option("input", metavar="IN", help="image file, folder, or quoted glob such as 'photos/*.jpg'")
    option("output", type=Path, metavar="OUT", help="image file (for one image) or folder; the suffix says the format")
    option("--model", default="ipt_v2_tiny", help="a model that ships, or a folder of a saved one (%(default)s)")
    option("--checkpoint", type=Path, metavar="FILE", help="weights for the architecture that --model names")
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
    option("--max-pixels", type=int, metavar="N", help="read images of up to N pixels (178956970)")
    option("--overwrite", action="store_true", help="restore again what is already in OUT, instead of skipping it")
    option(
        "--compare", action="store_true", help="write NAME_compare.png too: versions side by side, with a zoomed crop"
    )
    option(
        "--target", type=Path, metavar="PATH", help="clean original, or a folder of them by the same names: prints PSNR"
    )
    option(
        "--noise", type=float, metavar="SIGMA", help="add Gaussian noise (0..255 scale, seed 0) first; IN is the target"
    )
    parser.set_defaults(run=run)


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
    with use_backend(args.backend or policy()):
        return _run(args)


def _run(args: argparse.Namespace) -> int:
    jobs = _plan(args)
    pending = [job for job in jobs if args.overwrite or not all(path.exists() for path in _written(job[1], args))]
    if skipped := len(jobs) - len(pending):
        print(f"skipped {skipped} of {len(jobs)}: already restored (--overwrite restores them again)")
    if not pending:
        return 0
    restorer = Restorer(
        _open_model(args),
        task=args.task,
        tile=args.tile,
        overlap=args.overlap,
        blend=args.blend,
        self_ensemble=args.self_ensemble,
        dtype=args.dtype,
        device=args.device or ("cuda" if torch.cuda.is_available() else "cpu"),
    )
    if args.noise is not None and restorer.scale > 1:
        raise ValueError(
            f"--noise must be left out for a task that magnifies, as its target is the input itself; got {args.task}"
        )
    restorer.try_one_pixel()
    _make_writable(pending[0][1].parent)
    failed = 0
    # Fractions of an image count, so that one large image has a progress and an ETA too.
    layout = "{desc}{percentage:3.0f}%|{bar}| {elapsed}<{remaining}"
    with tqdm(total=len(pending), bar_format=layout, leave=False, disable=None) as bar:
        for index, (source, destination) in enumerate(pending):
            bar.set_description(f"{source.name} ({index + 1}/{len(pending)})")
            restorer.progress = lambda done, total, index=index: _advance(bar, index + done / total)
            try:
                with warnings.catch_warnings(record=True) as caught:
                    warnings.simplefilter("always", UserWarning)
                    message = _restore_file(source, destination, restorer, args)
                for warning in dict.fromkeys(str(warning.message) for warning in caught):
                    bar.write(f"{source}: warning: {warning}", file=sys.stderr)
                bar.write(message)
            except FAILURES as error:
                failed += 1
                bar.write(f"{source}: error: {error}", file=sys.stderr)
            _advance(bar, index + 1)
    print(f"restored {len(pending) - failed}, skipped {skipped}, failed {failed}")
    return 1 if failed else 0


def _restore_file(source: Path, destination: Path, restorer: Restorer, args: argparse.Namespace) -> str:
    """Restore one file and return the line to print about it."""
    image = fill_hidden(read_image(source, args.max_pixels))
    check_writable_as(destination, image, restorer.scale)
    top = np.iinfo(image.pixels.dtype).max
    pixels, target = image.pixels, _read_target(source, image, args, restorer.scale)
    if args.noise is not None:
        pixels = get_protocol("rgb").add_noise(image.pixels / top, args.noise)
    start = time.perf_counter()
    restored = restorer(pixels)
    seconds = time.perf_counter() - start
    if args.noise is not None:
        restored = np.rint(np.clip(restored, 0, 1) * np.float32(top)).astype(image.pixels.dtype)
    write_image(destination, dataclasses.replace(image, pixels=restored, alpha=restorer.magnify_alpha(image.alpha)))

    line = f"{source} -> {destination} ({seconds:.1f} s)"
    if restorer.scale > 1:
        pixels = np.clip(resized(_unit(pixels), restorer.scale), 0, 1)  # to look at and to compare with
    panels, captions = [("Input", pixels), ("Restored", restored)], ["", ""]
    if target is not None:
        captions = [f"{psnr(_unit(each), target, data_range=1):.2f} dB" for _, each in panels] + [""]
        line += f", PSNR {captions[0]} -> {captions[1]}"
        panels.append(("Target", target))
    if args.compare:
        with atomic_write(_comparison_path(destination)) as path:
            side_by_side([(title, to_picture(each)) for title, each in panels], captions=captions).save(path)
    return line


def _read_target(source: Path, image: Image, args: argparse.Namespace, scale: int) -> np.ndarray | None:
    """The clean original as floats in [0, 1], or None where none was given."""
    if args.noise is not None:
        return _unit(image.pixels)
    if args.target is None:
        return None
    path = args.target
    if path.is_dir():
        path = next((each for each in list_images(path) if each.stem == source.stem), None)
        if path is None:
            raise ValueError(
                f"--target must hold an image by the name of each input; got none for {source.stem} in {args.target}"
            )
    target = read_image(path, args.max_pixels).pixels
    shape = (scale * image.pixels.shape[0], scale * image.pixels.shape[1], image.pixels.shape[2])
    if target.shape != shape:
        raise ValueError(f"--target must have shape {shape}; got {target.shape} in {path}")
    return _unit(target)


def _plan(args: argparse.Namespace) -> list[tuple[Path, Path]]:
    """(source, destination) of every image."""
    sources = match_images(args.input)
    single_file = Path(args.input).is_file()
    to_file = args.output.suffix.lower() in IMAGE_SUFFIXES and not args.output.is_dir()
    if single_file and args.output.suffix and not args.output.is_dir():
        check_suffix(args.output)  # a typo is not the name of a new folder
    if to_file and not single_file:
        raise ValueError(f"OUT must be a folder for several images; got {args.output}")
    folder = args.output.parent if to_file else args.output
    jobs = [(source, args.output if to_file else folder / source.name) for source in sources]
    _check_target(args, single_file)
    _check_destinations(jobs, args)
    return jobs


def _check_target(args: argparse.Namespace, single_file: bool) -> None:
    if args.target is not None and not args.target.exists():
        raise ValueError(f"--target must be an image or a folder of images; got {args.target}, which is not there")
    if args.target is not None and args.target.is_file() and not single_file:
        raise ValueError(f"--target must be a folder for several images; got {args.target}")


def _check_destinations(jobs: list[tuple[Path, Path]], args: argparse.Namespace) -> None:
    """Raise where an input would be overwritten (always refused) or two images would become one file."""
    inputs = {source.resolve() for source, _ in jobs}
    if args.target is not None:
        inputs |= {path.resolve() for path in (list_images(args.target) if args.target.is_dir() else [args.target])}
    seen: dict[Path, Path] = {}
    for source, destination in jobs:
        for path in _written(destination, args):
            check_name(path)
            if path.resolve() in inputs:
                raise ValueError(f"OUT must not overwrite an input; got {path}")
            if path.resolve() in seen:
                raise ValueError(
                    f"OUT must have a place for each image; got {path} for both {source} and {seen[path.resolve()]}"
                )
            seen[path.resolve()] = source


def _written(destination: Path, args: argparse.Namespace) -> list[Path]:
    """The files that one image gives."""
    return [destination, _comparison_path(destination)] if args.compare else [destination]


def _make_writable(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(f"OUT must be a folder that can be written; got {folder} ({error.strerror})") from error


def _open_model(args: argparse.Namespace) -> torch.nn.Module:
    if args.checkpoint is None:
        return open_model(args.model)
    model = create_model(args.model)
    if model.shape_is_in_weights:
        raise ValueError(
            f"--checkpoint must be for a model whose name tells its shape; got {args.model}: make {args.checkpoint} a "
            "folder for --model first, with ipt-fast convert"
        )
    model.reparameterize()  # the merged form takes checkpoints of both forms
    return load_checkpoint(model, args.checkpoint)


def _comparison_path(destination: Path) -> Path:
    return destination.with_name(f"{destination.stem}_compare.png")


def _unit(pixels: np.ndarray) -> np.ndarray:
    return pixels if pixels.dtype.kind == "f" else pixels / np.float32(np.iinfo(pixels.dtype).max)


def _advance(bar: tqdm, images: float) -> None:
    bar.n = images
    bar.refresh()
