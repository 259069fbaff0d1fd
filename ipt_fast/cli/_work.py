"""Restoring one image file after the other, as the options of ``ipt-fast restore`` say."""

import argparse
import contextlib
import dataclasses
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from ..data.io import Image, check_writable_as, fill_hidden, read_image, write_image
from ..data.resize import resized
from ..evaluation.figures import side_by_side, to_picture
from ..evaluation.metrics import psnr
from ..evaluation.protocols import get_protocol
from ..inference import Restorer
from ._jobs import Job

# What one image can fail with while the others go on.
FAILURES = (ValueError, OSError, ImportError, RuntimeError, MemoryError)
# The options that make a result what it is, beside the source and the model; as given, so the same on any machine.
DECISIVE = ("task", "tile", "overlap", "blend", "self_ensemble", "dtype", "noise")


@dataclasses.dataclass
class Outcome:
    """What is to be said about one image.

    Attributes:
        message: about what was done, or "".
        warnings: what to warn of.
        error: why it failed, or "".
    """

    message: str = ""
    warnings: list[str] = dataclasses.field(default_factory=list)
    error: str = ""

    def say(self, bar: tqdm, job: Job) -> None:
        """Print it above a bar of progress."""
        for warning in self.warnings:
            bar.write(f"{job.source}: warning: {warning}", file=sys.stderr)
        if self.error:
            bar.write(f"{job.source}: error: {self.error}", file=sys.stderr)
        else:
            bar.write(f"{job.source} -> {job.destination} {self.message}")


@contextlib.contextmanager
def caught() -> Iterator[Outcome]:
    """An outcome that has, when the block ends, what the block warned of, and what one image can fail with."""
    outcome = Outcome()
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always", UserWarning)
        try:
            yield outcome
        except FAILURES as error:
            outcome.error = str(error) or type(error).__name__
    outcome.warnings = list(dict.fromkeys(str(warning.message) for warning in found))


@dataclasses.dataclass
class Work:
    """Restoring images.

    Attributes:
        restorer: what restores the pixels.
        args: the options of the command.
        made_with: the model and the options, as the journal has them.
        write: called with a result's path and what it is made from; yields the path to write to.
    """

    restorer: Restorer
    args: argparse.Namespace
    made_with: dict[str, Any]
    write: Callable[[Path, dict[str, Any]], AbstractContextManager[Path]]

    def attempt(self, job: Job) -> Outcome:
        """Restore one file; what it fails with becomes a part of the outcome."""
        with caught() as outcome:
            outcome.message = self.restore(job)
        return outcome

    def restore(self, job: Job) -> str:
        """Restore one file and return what is to be said of it."""
        source, destination, args, restorer = job.source, job.destination, self.args, self.restorer
        if job.reason:
            raise ValueError(job.reason)
        if destination.is_dir():
            raise ValueError(f"{destination} is a folder")
        made_from = {path: job.made_from(path, self.made_with) for path in job.results}  # before the source can change
        image = fill_hidden(read_image(source, args.max_pixels))
        check_writable_as(destination, image, restorer.scale)
        top = np.iinfo(image.pixels.dtype).max
        pixels, target = degraded(image, args.noise), read_target(job, image, args, restorer.scale)
        start = time.perf_counter()
        restored = restorer(pixels)
        seconds = time.perf_counter() - start
        if args.noise is not None:
            restored = np.rint(np.clip(restored, 0, 1) * np.float32(top)).astype(image.pixels.dtype)
        result = dataclasses.replace(image, pixels=restored, alpha=restorer.magnify_alpha(image.alpha))
        with self.write(destination, made_from[destination]) as path:
            write_image(path, result)

        line = f"({seconds:.1f} s)"
        if restorer.scale > 1:
            pixels = np.clip(resized(_unit(pixels), restorer.scale), 0, 1)  # to look at and to compare with
        panels, captions = [("Input", pixels), ("Restored", restored)], ["", ""]
        if target is not None:
            captions = [f"{psnr(_unit(each), target, data_range=1):.2f} dB" for _, each in panels] + [""]
            line += f", PSNR {captions[0]} -> {captions[1]}"
            panels.append(("Target", target))
        if job.comparison is not None:
            with self.write(job.comparison, made_from[job.comparison]) as path:
                side_by_side([(title, to_picture(each)) for title, each in panels], captions=captions).save(path)
        return line


def restorer_options(args: argparse.Namespace) -> dict[str, Any]:
    """The options of a :class:`Restorer` but its device."""
    return {name: getattr(args, name) for name in ("task", "tile", "overlap", "blend", "self_ensemble", "dtype")}


def degraded(image: Image, noise: float | None) -> np.ndarray:
    """The pixels that the model gets: those of the image, or floats with the noise that ``--noise`` adds."""
    if noise is None:
        return image.pixels
    return get_protocol("rgb").add_noise(image.pixels / np.iinfo(image.pixels.dtype).max, noise)


def read_target(job: Job, image: Image, args: argparse.Namespace, scale: int) -> np.ndarray | None:
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


def _unit(pixels: np.ndarray) -> np.ndarray:
    return pixels if pixels.dtype.kind == "f" else pixels / np.float32(np.iinfo(pixels.dtype).max)
