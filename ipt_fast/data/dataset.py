"""Training data: a folder of clean images, and the degraded patches drawn from it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ._fingerprint import fingerprint
from .degradations import add_gaussian_noise, degrade, random_sigma
from .files import IMAGE_SUFFIXES as IMAGE_SUFFIXES  # an "as" marks names that are kept for older imports
from .files import Entry, list_images
from .files import is_image_file as is_image_file
from .io import Image as Image
from .io import read_header, read_image, with_channels
from .io import to_pil as to_pil


class ImageFolder(Sequence[Tensor]):
    """The 8-bit images of a folder and its subfolders in the order of their names, each a uint8 tensor (C, H, W).

    Where all decoded images together take at most ``memory_budget`` bytes they are decoded once, here; otherwise each
    is decoded when it is asked for. They are read by :func:`ipt_fast.data.io.read_image`: upright, and without alpha.

    Args:
        folder: searched recursively and through links; what is hidden is left out.
        channels: 3 for RGB, 1 for gray (ITU-R 601-2 luma).
        memory_budget: bytes.

    Raises:
        ValueError: the folder is missing or has no images, ``channels`` is neither 1 nor 3, or an image has 16 bits or
            cannot be read (where images are decoded on demand, what the header does not show comes then, and so does
            that the size has changed).
    """

    def __init__(self, folder: str | Path, channels: int = 3, memory_budget: int = 4 * 2**30):
        if channels not in (1, 3):
            raise ValueError(f"channels must be 1 or 3; got {channels}")
        self.channels = channels
        self.folder = Path(folder)
        self.paths = list_images(folder, recursive=True)
        self.sizes = [_read_size(path) for path in self.paths]
        fits = channels * sum(height * width for height, width in self.sizes) <= memory_budget
        self._images = [self._decode(path) for path in self.paths] if fits else None

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Tensor:  # type: ignore[override]  # no slices
        if self._images is not None:
            return self._images[index]
        image = self._decode(self.paths[index])
        if sorted(image.shape[1:]) != sorted(self.sizes[index]):
            raise ValueError(f"images must stay as they are; got {self.paths[index]} of another size than at the start")
        return image

    def fingerprint(self) -> dict[str, Any]:
        """By which a resumed run recognises its data, see :func:`ipt_fast.data._fingerprint.fingerprint`."""
        return fingerprint(map(Entry, self.paths), self.folder)

    def _decode(self, path: Path) -> Tensor:
        return torch.from_numpy(with_channels(read_image(path), self.channels)).permute(2, 0, 1)


def _read_size(path: Path) -> tuple[int, int]:
    height, width, dtype = read_header(path)
    if dtype != np.uint8:
        raise ValueError(f"training images must have 8 bits; got {8 * dtype.itemsize} in {path}")
    return height, width


class NoisyPatches(Dataset):
    """Pairs (noisy, clean) for Gaussian denoising: random patches, float32 (C, patch_size, patch_size).

    Item ``n``, for any n >= 0, is a pure function of (seed, n): a random image and crop, one of the 8 flips and
    transposes, a noise level uniform in ``sigma``, and noise that is not clipped. So training can go on from anywhere.

    Raises:
        ValueError: an image is smaller than the patch (the images are neither padded nor skipped).
    """

    def __init__(self, images: ImageFolder, patch_size: int, sigma: tuple[float, float], seed: int = 0):
        for path, size in zip(images.paths, images.sizes, strict=True):
            if min(size) < patch_size:
                raise ValueError(
                    f"patch_size must be at most the height and width of every image; got {patch_size} and {path} of "
                    f"{size[0]}x{size[1]} pixels"
                )
        self.images = images
        self.patch_size = patch_size
        self.sigma = sigma
        self.seed = seed

    def __getitem__(self, number: int) -> tuple[Tensor, Tensor]:
        generator = _generator(self.seed, number)
        clean = _random_patch(self.images[_draw(len(self.images), generator)], self.patch_size, generator)
        return add_gaussian_noise(clean, random_sigma(*self.sigma, generator), generator), clean


class TaskPatches(Dataset):
    """Triples (degraded, clean, task) for pre-training on several tasks (IPT, section 3.2).

    Item ``n`` belongs to batch ``n // batch_size``, and all of a batch to one task, drawn at random. The degraded patch
    has ``patch_size`` pixels a side, float32 in [0, 1] but for noise; the clean one as many times more as the task
    magnifies. ``task`` is the task's number. Item ``n`` is a pure function of (seed, n, batch_size); an image that is
    smaller than the patch is passed over for another one.

    Args:
        images: uint8 (3, H, W) each, such as :class:`ipt_fast.data.stream.ImageStream`.
        tasks: {name: magnification}, names as :func:`ipt_fast.data.degradations.degrade` takes them.
        sigma: range of noise levels of the task "denoise", on the 0..255 scale.
    """

    ATTEMPTS = 100

    def __init__(
        self,
        images: Sequence[Tensor],
        patch_size: int,
        tasks: dict[str, int],
        batch_size: int,
        sigma: tuple[float, float] = (5.0, 50.0),
        seed: int = 0,
    ):
        self.images = images
        self.patch_size = patch_size
        self.tasks = tasks
        self.batch_size = batch_size
        self.sigma = sigma
        self.seed = seed

    def __getitem__(self, number: int) -> tuple[Tensor, Tensor, int]:
        task = _draw(len(self.tasks), _generator(self.seed, number // self.batch_size, 1))
        name, scale = list(self.tasks.items())[task]
        generator = _generator(self.seed, number)
        for _ in range(self.ATTEMPTS):
            image = self.images[_draw(len(self.images), generator)]
            if min(image.shape[1:]) >= scale * self.patch_size:
                clean = _random_patch(image, scale * self.patch_size, generator)
                return degrade(clean, name, generator, self.sigma).contiguous(), clean, task
        raise ValueError(
            f"images must have at least {scale * self.patch_size} pixels a side for {name}; "
            f"got {self.ATTEMPTS} smaller ones in a row"
        )


def _generator(*numbers: int) -> torch.Generator:
    # SeedSequence mixes the integers, so that neighbouring samples and seeds are unrelated.
    return torch.Generator().manual_seed(int(np.random.SeedSequence(numbers).generate_state(1)[0]))


def _draw(bound: int, generator: torch.Generator) -> int:
    return int(torch.randint(bound, (), generator=generator))


def _random_patch(image: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """A random crop of a uint8 image in one of 8 orientations, float32 in [0, 1]."""
    top, left = _draw(image.shape[1] - size + 1, generator), _draw(image.shape[2] - size + 1, generator)
    patch = image[:, top : top + size, left : left + size]
    return apply_symmetry(patch, _draw(8, generator)).contiguous().float() / 255


def apply_symmetry(image: Tensor, index: int) -> Tensor:
    """One of the 8 symmetries of the square, ``index`` 0 to 7: bit 0 flips rows, bit 1 columns, bit 2 transposes."""
    if index & 1:
        image = image.flip(-2)
    if index & 2:
        image = image.flip(-1)
    return image.transpose(-2, -1) if index & 4 else image
