"""Training data: patches of clean images with their degraded versions, and patches of pairs."""

import math
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset

from .degradations import add_gaussian_noise as add_gaussian_noise  # an "as" marks names kept for older imports
from .degradations import degrade, find_task, target_of
from .degradations import random_sigma as random_sigma
from .files import IMAGE_SUFFIXES as IMAGE_SUFFIXES
from .files import is_image_file as is_image_file
from .io import Image as Image
from .io import read_header as read_header
from .io import read_image as read_image
from .io import to_pil as to_pil
from .stream import MEMORY_BUDGET, ImageStream, PairStream, TrainingData


class ImageFolder(ImageStream):
    """The images of a folder and its subfolders in the order of their names, of which none may be bad.

    Where all decoded images together take at most ``memory_budget`` bytes they are decoded once, here; otherwise each
    is decoded when it is asked for.

    Args:
        folder: searched recursively and through links; what is hidden is left out.
        channels: 3 for RGB, 1 for gray (ITU-R 601-2 luma).
        memory_budget: bytes.

    Raises:
        ValueError: the folder is missing or has no images, ``channels`` is neither 1 nor 3, or an image cannot be read
            (where images are decoded on demand, what the header does not show comes then, and so does that the size has
            changed).
    """

    def __init__(self, folder: str | Path, channels: int = 3, memory_budget: int = MEMORY_BUDGET):
        if channels not in (1, 3):
            raise ValueError(f"channels must be 1 or 3; got {channels}")
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise ValueError(f"folder must exist; got {folder}")
        super().__init__(self.folder, memory_budget, channels=channels)
        self.paths = [entry.path for entry in self.entries]
        self.preload()
        if self.skipped:
            raise ValueError(next(iter(self.skipped.values())))


class Patches(Dataset):
    """Random patches of training data as pairs (degraded, clean), float32 (C, H, W).

    Item ``n``, for any n >= 0, is a pure function of (seed, n) and, with ``batch_size``, of that: a task, a source, an
    image, a crop, one of the 8 flips and transposes, and what the degradation draws. So training can go on from
    anywhere, with any number of processes. A clean image is degraded by the task; a pair is taken as it is, both images
    cropped at the same place and turned alike. Where an image cannot be read the next one in order takes its place.

    Args:
        data: the sources.
        patch_size: sides of the degraded patch in pixels; those of the clean one are as many times larger as the task
            magnifies.
        tasks: {name: how often, in proportion}, names as :func:`ipt_fast.data.degradations.degrade` takes them.
        batch_size: draws one task for each batch, and appends its number to the items; None draws one for each item.
        sigma: range of noise levels of tasks without one, on the 0..255 scale.
        enlarge: half of the patches of clean images are enlarged by a factor drawn from 1 to this, as photos straight
            from a camera are softer than those that were shrunk.
        seed: at least 0.

    Raises:
        ValueError: a source has no image that is large enough for a task. When an item is asked for: no image of its
            source can be read.
    """

    def __init__(
        self,
        data: TrainingData,
        patch_size: int,
        tasks: dict[str, float],
        *,
        batch_size: int | None = None,
        sigma: tuple[float, float] = (5.0, 50.0),
        enlarge: float = 1.0,
        seed: int = 0,
    ):
        self.data, self.patch_size, self.batch_size = data, patch_size, batch_size
        self.enlarge = enlarge
        self.tasks, self.shares = list(tasks), torch.tensor([*tasks.values()], dtype=torch.float64)
        self.sigma, self.seed = sigma, seed
        # Arrays, which take a tenth of the memory of lists of numbers.
        self.places = [[np.array(self._usable(stream, task)) for stream in data.streams] for task in self.tasks]

    def __getitem__(self, number: int) -> tuple[Tensor, Tensor] | tuple[Tensor, Tensor, int]:
        generator = _generator(self.seed, number)
        if self.batch_size is None:
            task = _draw_by(self.shares, generator)
        else:
            task = _draw_by(self.shares, _generator(self.seed, number // self.batch_size, 1))
        places = self.places[task]
        counts = [len(numbers) for numbers in places] if self.data.weights is None else self.data.weights
        source = _draw_by(torch.tensor(counts, dtype=torch.float64), generator)
        images = self._images(source, places[source], generator)
        pair = self._pair(images, self.tasks[task], generator)
        return pair if self.batch_size is None else (*pair, task)

    def _usable(self, stream: ImageStream | PairStream, task: str) -> list[int]:
        side = self.patch_size * (find_task(task).scale if isinstance(stream, ImageStream) else 1)
        numbers = stream.usable(side)
        if not numbers:
            largest = max((min(size) for size in stream.sizes if size is not None), default=None)
            if largest is None:
                raise ValueError(f"data must hold an image that can be used; got none: {_first(stream.skipped)}")
            raise ValueError(
                f"patch_size must be at most {largest * self.patch_size // side} for {task}, by the largest image; "
                f"got {self.patch_size}"
            )
        return numbers

    def _images(self, source: int, numbers: np.ndarray, generator: torch.Generator) -> tuple[Tensor, ...]:
        stream, start = self.data.streams[source], _draw(len(numbers), generator)
        for step in range(len(numbers)):
            if (images := stream.take(int(numbers[(start + step) % len(numbers)]))) is not None:
                return images
        stream.note_failures()
        raise ValueError(f"data must hold an image that can be used; got none: {_first(stream.skipped)}")

    def _pair(self, images: tuple[Tensor, ...], task: str, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        *inputs, target = images
        height, width = (inputs or [target])[0].shape[1:]
        scale = target.shape[1] // height if inputs else 1
        side = self.patch_size * (1 if inputs else find_task(task).scale)
        cut = side if inputs else self._side_before(side, generator)
        top, left = _draw(height - cut + 1, generator), _draw(width - cut + 1, generator)
        symmetry = _draw(8, generator)
        clean = _patch(target, scale * top, scale * left, scale * cut, symmetry)
        if inputs:
            return torch.cat([_patch(image, top, left, side, symmetry) for image in inputs]), clean
        if cut < side:
            clean = F.interpolate(clean.unsqueeze(0), (side, side), mode="bicubic")[0].clamp(0, 1)
        clean = target_of(clean, task)
        return degrade(clean, task, generator, self.sigma).contiguous(), clean.contiguous()

    def _side_before(self, side: int, generator: torch.Generator) -> int:
        """Of the crop that is enlarged to ``side``."""
        if self.enlarge == 1:
            return side
        chance, place = torch.rand(2, generator=generator).tolist()
        return side if chance < 0.5 else math.ceil(side / (1 + (self.enlarge - 1) * place))


class NoisyPatches(Patches):
    """:class:`Patches` for Gaussian denoising of images that must all be at least as large as the patch.

    Raises:
        ValueError: an image is smaller.
    """

    def __init__(self, images: ImageFolder, patch_size: int, sigma: tuple[float, float], seed: int = 0):
        for path, size in zip(images.paths, images.sizes, strict=True):
            if size is not None and min(size) < patch_size:
                raise ValueError(
                    f"patch_size must be at most the height and width of every image; got {patch_size} and {path} of "
                    f"{size[0]}x{size[1]} pixels"
                )
        super().__init__(TrainingData([images]), patch_size, {"denoise": 1.0}, sigma=sigma, seed=seed)


class TaskPatches(Patches):
    """:class:`Patches` of clean images, all of a batch of one of several tasks, which are drawn alike.

    Args:
        tasks: {name: magnification}.
    """

    def __init__(
        self,
        images: ImageStream,
        patch_size: int,
        tasks: dict[str, int],
        batch_size: int,
        sigma: tuple[float, float] = (5.0, 50.0),
        seed: int = 0,
    ):
        equal = dict.fromkeys(tasks, 1.0)
        super().__init__(TrainingData([images]), patch_size, equal, batch_size=batch_size, sigma=sigma, seed=seed)


def _generator(*numbers: int) -> torch.Generator:
    # SeedSequence mixes the integers, so that neighbouring samples and seeds are unrelated.
    return torch.Generator().manual_seed(int(np.random.SeedSequence(numbers).generate_state(1)[0]))


def _draw(bound: int, generator: torch.Generator) -> int:
    return int(torch.randint(bound, (), generator=generator))


def _draw_by(shares: Tensor, generator: torch.Generator) -> int:
    """A number of ``shares`` (N,), drawn in proportion; where there is one, nothing is drawn."""
    return 0 if len(shares) == 1 else int(torch.multinomial(shares, 1, generator=generator))


def _first(skipped: dict[str, str]) -> str:
    return next((why if name in why else f"{name}: {why}" for name, why in skipped.items()), "there is none")


def _patch(image: Tensor, top: int, left: int, size: int, symmetry: int) -> Tensor:
    """A crop of a uint8 or uint16 image in one of 8 orientations, float32 in [0, 1], as precise as the image."""
    patch = image[:, top : top + size, left : left + size].float() / torch.iinfo(image.dtype).max
    return apply_symmetry(patch, symmetry).contiguous()


def apply_symmetry(image: Tensor, index: int) -> Tensor:
    """One of the 8 symmetries of the square, ``index`` 0 to 7: bit 0 flips rows, bit 1 columns, bit 2 transposes."""
    if index & 1:
        image = image.flip(-2)
    if index & 2:
        image = image.flip(-1)
    return image.transpose(-2, -1) if index & 4 else image
