"""Restoring a folder of images and measuring the result."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..data.files import IMAGE_SUFFIXES as IMAGE_SUFFIXES  # an "as" marks names that are kept for older imports
from ..data.files import is_image_file as is_image_file
from ..data.files import list_images, partner_of
from ..data.io import read_image
from ..data.resize import imresize as imresize
from ..data.resize import resized, shrunk
from .protocols import get_protocol, without_border

FIGURES = ("psnr_input", "psnr_output", "ssim_input", "ssim_output")
MORE_FIGURES = ("mae_input", "mae_output", "lpips_input", "lpips_output")  # where they were asked for
PAIRINGS = ("name", "order")
# What one image can fail with while the others go on.
FAILURES = (ValueError, OSError, ImportError, RuntimeError, MemoryError)


@dataclass(frozen=True)
class ImageScore:
    """PSNR (dB) and SSIM of one image before and after restoration, MAE in [0, 1] and LPIPS where measured."""

    image: str
    psnr_input: float
    psnr_output: float
    ssim_input: float
    ssim_output: float
    mae_input: float | None = None
    mae_output: float | None = None
    lpips_input: float | None = None
    lpips_output: float | None = None


@dataclass(frozen=True)
class Evaluation:
    """The scores of one data set at one noise level.

    Attributes:
        dataset: name of the folder; for a paired set with the folder above it.
        protocol: one of `ipt_fast.evaluation.protocols.PROTOCOLS`.
        sigma: noise level on the 0..255 scale, or None for a paired set.
        scores: one for each image that could be evaluated, in the order of the file names.
        failures: (file name, reason) of each that could not.
        folder: where the images are.
    """

    dataset: str
    protocol: str
    sigma: float | None
    scores: tuple[ImageScore, ...]
    failures: tuple[tuple[str, str], ...]
    folder: str = ""

    @property
    def figures(self) -> tuple[str, ...]:
        """What was measured: FIGURES, and those of MORE_FIGURES that the scores have."""
        more = [figure for figure in MORE_FIGURES if self.scores and getattr(self.scores[0], figure) is not None]
        return (*FIGURES, *more)

    def mean(self, figure: str) -> float:
        """Mean over the images of one of ``figures``; NaN where there is no image."""
        return float(np.mean([getattr(score, figure) for score in self.scores])) if self.scores else float("nan")


@dataclass(frozen=True)
class Shown:
    """One image of an evaluation, to look at.

    Attributes:
        before: (H, W, C) what the score of the input is of; the first view of two.
        after: (H, W, C) the restored image, neither clipped nor rounded.
        target: (H, W, C) the clean image.
        score: of this image.
    """

    before: np.ndarray
    after: np.ndarray
    target: np.ndarray
    score: ImageScore


def evaluate(
    restorer: Callable[[np.ndarray], np.ndarray],
    folder: str | Path,
    protocol: str = "rgb",
    *,
    sigma: float | None = None,
    target: str | Path | None = None,
    scale: int | None = None,
    crop: int = 0,
    limit: int | None = None,
    progress: Callable[[list[Path]], Iterable[Path]] = iter,
    second_view: str | Path | None = None,
    pair_by: str = "name",
    lpips: Callable[[np.ndarray, np.ndarray], float] | None = None,
    show: Callable[[Shown], None] | None = None,
) -> Evaluation:
    """Restore every image of a folder and measure it by a named protocol.

    Args:
        restorer: from an image, (H, W, C) floats in [0, 1] but with unclipped noise, to the restored one of the same
            shape or, for super-resolution, `scale` times larger, such as `ipt_fast.inference.Restorer(model)`.
        folder: clean images that get noise of level `sigma` or are shrunk by `scale`, or the degraded inputs of a
            paired set. Not searched recursively; alpha is ignored.
        protocol: "rgb", "ipt-y", "basicsr-y", "matlab-y" or "dpdd", see `ipt_fast.evaluation.protocols`.
        sigma: standard deviation of the Gaussian noise, on the 0..255 scale.
        scale: how many times images are shrunk, by MATLAB's bicubic imresize and rounded to 8 bits, after cropping to
            multiples of it; the scores of the input are those of enlarging it bicubically.
        target: folder with the targets of a paired set, under the same file names. The suffix may differ where
            that leaves one target for one input.
        crop: border pixels left out of the score.
        limit: take only so many images, the first by name.
        progress: wraps the list of files, as tqdm does.
        second_view: of a set of dual-pixel photos the folder of the right views, `folder` being that of the left ones.
            The restorer gets both in 6 channels, and the scores of the input are those of the left view.
        pair_by: "name", or "order" for folders of as many files whose sorted names belong together, as in DPDD.
        lpips: a distance of two images (H, W, C) in [0, 1], such as `ipt_fast.evaluation.lpips.LPIPS.compare`.
        show: called with each image that was scored.

    An image that cannot be read, restored (too little memory, say) or scored is reported in `failures`; the others go
    on.

    Raises:
        ValueError: unknown protocol, no image in the folder, not exactly one of sigma, target and scale, a second view
            without targets, folders that cannot be paired by order, or a bad number.
    """
    chosen = get_protocol(protocol)
    _check(sigma, target, scale, crop, limit, second_view, pair_by)
    images = list_images(folder)
    others = [[] if each is None else list_images(each) for each in (target, second_view)]
    if pair_by == "order" and any(each and len(each) != len(images) for each in others):
        counts = [len(images), *(len(each) for each in others if each)]
        raise ValueError(f"pair_by must be name for folders of {counts} images; got order, which needs as many in each")

    def partner(path: Path, files: list[Path]) -> np.ndarray:
        by_order = pair_by == "order"
        return read_float(files[images.index(path)] if by_order else partner_of(path, images, files))

    scores, failures = [], []
    for path in progress(images[:limit]):
        try:
            clean = image = before = read_float(path)
            if scale is not None:
                clean = clean[: clean.shape[0] // scale * scale, : clean.shape[1] // scale * scale]
                image = shrunk(clean, scale)
                before = np.clip(resized(image, scale), 0, 1)
            elif sigma is not None:
                image = before = chosen.add_noise(clean, sigma)
            else:
                clean = partner(path, others[0])
            if second_view is not None:
                image = both_views(image, partner(path, others[1]))
            output = restorer(image)
            figures = {"input": chosen.measure_input(before, clean, crop=crop)}
            figures["output"] = chosen.measure_output(output, clean, crop=crop)
            if lpips is not None:
                inner = without_border(clean, crop)
                figures["input"]["lpips"] = lpips(without_border(before, crop), inner)
                figures["output"]["lpips"] = lpips(without_border(output, crop), inner)
        except FAILURES as error:
            failures.append((path.name, str(error) or type(error).__name__))  # a MemoryError may say nothing
        else:
            named = {f"{name}_{side}": value for side, found in figures.items() for name, value in found.items()}
            scores.append(ImageScore(path.name, **named))
            if show is not None:
                show(Shown(before, output, clean, scores[-1]))
    folder = Path(folder).resolve()
    dataset = folder.name if target is None else f"{folder.parent.name}/{folder.name}"  # often just "input"
    return Evaluation(dataset, protocol, sigma, tuple(scores), tuple(failures), str(folder))


def _check(
    sigma: float | None,
    target: str | Path | None,
    scale: int | None,
    crop: int,
    limit: int | None,
    second_view: str | Path | None,
    pair_by: str,
) -> None:
    if [sigma, target, scale].count(None) != 2:
        given = {"sigma": sigma, "target": target, "scale": scale}
        raise ValueError(
            "exactly one of sigma (noise is added to clean images), target (a paired set) and scale must be given; got "
            + (", ".join(f"{name}={value}" for name, value in given.items() if value is not None) or "none")
        )
    if scale is not None and (type(scale) is not int or scale < 2):
        raise ValueError(f"scale must be an int of at least 2; got {scale!r}")
    if sigma is not None and not 0 < sigma < float("inf"):
        raise ValueError(f"sigma must be positive and finite; got {sigma}")
    if crop < 0:
        raise ValueError(f"crop must be at least 0; got {crop}")
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1; got {limit}")
    if second_view is not None and target is None:
        raise ValueError(f"second_view must be left out without target; got {second_view}")
    if pair_by not in PAIRINGS:
        raise ValueError(f"pair_by must be one of {', '.join(PAIRINGS)}; got {pair_by!r}")


def both_views(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Two views (H, W, 1 or 3) as (H, W, 6), gray ones as three equal channels.

    Raises:
        ValueError: their sizes differ.
    """
    if left.shape[:2] != right.shape[:2]:
        raise ValueError(f"views must have one size; got {left.shape[:2]} and {right.shape[:2]}")
    return np.dstack([np.broadcast_to(view, (*view.shape[:2], 3)) for view in (left, right)])


def dataset_names(folders: Sequence[str | Path]) -> list[str]:
    """The last part of each folder's path, and as many before it as tell it from the others."""
    paths = [Path(folder).resolve().parts for folder in folders]

    def name(path: tuple[str, ...]) -> str:
        others = {other for other in paths if other != path}
        enough = (n for n in range(1, len(path)) if all(other[-n:] != path[-n:] for other in others))
        return "/".join(path[-next(enough, len(path)) :])

    return [name(path) for path in paths]


def read_float(path: Path) -> np.ndarray:
    """An image file as (H, W, C) float64 in [0, 1], C = 1 or 3, without alpha; 255 times an 8-bit one is exact."""
    pixels = read_image(path).pixels
    return pixels / np.float64(np.iinfo(pixels.dtype).max)
