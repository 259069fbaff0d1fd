"""``ipt-fast restore``: restore image files."""

import argparse
import dataclasses
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from .. import use_backend
from .._files import atomic_write, check_name, is_stream
from .._precision import DTYPES
from ..data.io import Image, check_writable_as, fill_hidden, read_image, write_image
from ..data.resize import resized
from ..evaluation.figures import side_by_side, to_picture
from ..evaluation.metrics import psnr
from ..evaluation.protocols import get_protocol
from ..inference import Restorer
from ..models import create_model, load_checkpoint, open_model
from ..ops._select import POLICIES, policy
from ..tiling import BLENDS
from ._arguments import MODELS_HELP, RAW_HELP, TILE_HELP, Subparsers, tile_size
from ._jobs import Job, make_writable, plan
from ._journal import Journal, digest_of_file, digest_of_model

# What one image can fail with while the others go on.
FAILURES = (ValueError, OSError, ImportError, RuntimeError, MemoryError)
# The options that make a result what it is, beside the source and the model; as given, so the same on any machine.
_DECISIVE = ("task", "tile", "overlap", "blend", "self_ensemble", "dtype", "noise")


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
    option("--model", default="ipt_v2_tiny", help="a model that ships, or a folder of a saved one (%(default)s)")
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
    with use_backend(args.backend or policy()):
        return _run(args)


def _run(args: argparse.Namespace) -> int:
    jobs = plan(args)
    model = _open_model(args)
    journal, made_with = None, {}
    if jobs[0].destination != Path(args.output):  # which is a folder then
        options = {name: getattr(args, name) for name in _DECISIVE}
        journal = Journal(jobs[0].destination.parent)
        made_with = {"model": digest_of_model(model), "options": options}
    restorer = Restorer(
        model,
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
    work = _Work(restorer, args, journal, made_with)
    pending, failed = [], 0
    for job in jobs:
        if args.overwrite or (found := work.found(job)) == "nothing":
            pending.append(job)
        elif found:
            failed += 1
            print(f"{job.source}: error: {found}", file=sys.stderr)
    if skipped := len(jobs) - len(pending) - failed:
        print(f"skipped {skipped} of {len(jobs)}: already restored (--overwrite restores them again)")
    if pending:
        restorer.try_one_pixel()
        make_writable(pending[0].destination)
        failed += _restore(pending, work)
    if pending or failed:
        print(f"restored {len(jobs) - skipped - failed}, skipped {skipped}, failed {failed}")
    return 1 if failed else 0


def _restore(jobs: list[Job], work: "_Work") -> int:
    """Restore and print; the number of images that failed."""
    failed = 0
    # Fractions of an image count, so that one large image has a progress and an ETA too.
    layout = "{desc}{percentage:3.0f}%|{bar}| {elapsed}<{remaining}"
    with tqdm(total=len(jobs), bar_format=layout, leave=False, disable=None) as bar:
        for index, job in enumerate(jobs):
            bar.set_description(f"{job.source.name} ({index + 1}/{len(jobs)})")
            work.restorer.progress = lambda done, total, index=index: _advance(bar, index + done / total)
            try:
                with warnings.catch_warnings(record=True) as caught:
                    warnings.simplefilter("always", UserWarning)
                    message = work.restore(job)
                for warning in dict.fromkeys(str(warning.message) for warning in caught):
                    bar.write(f"{job.source}: warning: {warning}", file=sys.stderr)
                bar.write(message)
            except FAILURES as error:
                failed += 1
                bar.write(f"{job.source}: error: {error}", file=sys.stderr)
            _advance(bar, index + 1)
    return failed


@dataclasses.dataclass
class _Work:
    """Restoring one image after the other, and the record of it.

    Attributes:
        journal: of a folder of results; a file that is the result of one image has none.
        made_with: the model and the options, as the journal has them.
    """

    restorer: Restorer
    args: argparse.Namespace
    journal: Journal | None
    made_with: dict[str, Any]

    def found(self, job: Job) -> str:
        """What stands where the results go: "" if it is they, "nothing" if one is missing, else what is wrong."""
        try:
            return self._found(job)
        except OSError as error:
            return str(error)

    def _found(self, job: Job) -> str:
        found = ""
        for path in job.results:
            if is_stream(path) or not path.exists():
                found = "nothing"
            elif path.is_dir():
                return f"{path} is a folder"
            elif self.journal is None:
                return f"{path} exists; --overwrite replaces it"
            elif not self.journal.holds(path, self._made_from(job, path)):
                return (
                    f"{path} exists, and is not known to be made of this image by this model with these options; "
                    "--overwrite replaces it"
                )
        return found

    def restore(self, job: Job) -> str:
        """Restore one file and return the line to print about it."""
        source, destination, args, restorer = job.source, job.destination, self.args, self.restorer
        if job.reason:
            raise ValueError(job.reason)
        if destination.is_dir():
            raise ValueError(f"{destination} is a folder")
        known = job.results if self.journal else []
        made_from = {path: self._made_from(job, path) for path in known}  # before the source can change
        image = fill_hidden(read_image(source, args.max_pixels))
        check_writable_as(destination, image, restorer.scale)
        top = np.iinfo(image.pixels.dtype).max
        pixels, target = image.pixels, _read_target(job, image, args, restorer.scale)
        if args.noise is not None:
            pixels = get_protocol("rgb").add_noise(image.pixels / top, args.noise)
        start = time.perf_counter()
        restored = restorer(pixels)
        seconds = time.perf_counter() - start
        if args.noise is not None:
            restored = np.rint(np.clip(restored, 0, 1) * np.float32(top)).astype(image.pixels.dtype)
        result = dataclasses.replace(image, pixels=restored, alpha=restorer.magnify_alpha(image.alpha))
        with atomic_write(destination) as path:
            write_image(path, result)
            self._record(destination, path, made_from)

        line = f"{source} -> {destination} ({seconds:.1f} s)"
        if restorer.scale > 1:
            pixels = np.clip(resized(_unit(pixels), restorer.scale), 0, 1)  # to look at and to compare with
        panels, captions = [("Input", pixels), ("Restored", restored)], ["", ""]
        if target is not None:
            captions = [f"{psnr(_unit(each), target, data_range=1):.2f} dB" for _, each in panels] + [""]
            line += f", PSNR {captions[0]} -> {captions[1]}"
            panels.append(("Target", target))
        if job.comparison is not None:
            with atomic_write(job.comparison) as path:
                side_by_side([(title, to_picture(each)) for title, each in panels], captions=captions).save(path)
                self._record(job.comparison, path, made_from)
        return line

    def _made_from(self, job: Job, result: Path) -> dict[str, Any]:
        """All that decides what a result is."""
        made_from = {"source": digest_of_file(job.source), **self.made_with}
        if result == job.comparison:
            made_from["compared_with"] = None if job.target is None else digest_of_file(job.target)
        return made_from

    def _record(self, result: Path, content: Path, made_from: dict[Path, dict[str, Any]]) -> None:
        if self.journal is None or is_stream(result):
            return
        try:
            self.journal.add(result, content, made_from[result])
        except OSError as error:
            warnings.warn(
                f"it is restored, but a later run will not know: no record could be kept: {error}", stacklevel=2
            )


def _read_target(job: Job, image: Image, args: argparse.Namespace, scale: int) -> np.ndarray | None:
    """The clean original as floats in [0, 1], or None where none was given."""
    if args.noise is not None:
        return _unit(image.pixels)
    if job.target is None:
        return None
    target = read_image(job.target, args.max_pixels).pixels
    shape = (scale * image.pixels.shape[0], scale * image.pixels.shape[1], image.pixels.shape[2])
    if target.shape != shape:
        raise ValueError(f"--target must have shape {shape}; got {target.shape} in {job.target}")
    return _unit(target)


def _open_model(args: argparse.Namespace) -> torch.nn.Module:
    if args.checkpoint is None:
        if args.raw_weights:
            raise ValueError("--raw-weights must be left out without --checkpoint, which it is about; got it alone")
        return open_model(args.model)
    model = create_model(args.model)
    if model.shape_is_in_weights:
        raise ValueError(
            f"--checkpoint must be for a model whose name tells its shape; got {args.model}: make {args.checkpoint} a "
            "folder for --model first, with ipt-fast convert"
        )
    model.reparameterize()  # the merged form takes checkpoints of both forms
    return load_checkpoint(model, args.checkpoint, average=False if args.raw_weights else None)


def _unit(pixels: np.ndarray) -> np.ndarray:
    return pixels if pixels.dtype.kind == "f" else pixels / np.float32(np.iinfo(pixels.dtype).max)


def _advance(bar: tqdm, images: float) -> None:
    bar.n = images
    bar.refresh()
