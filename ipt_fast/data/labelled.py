"""Training data of generators: images in a folder for each class, or latents of such, and what is drawn of them."""

from itertools import zip_longest
from pathlib import Path
from typing import TypeAlias

import numpy as np
import PIL.Image
import torch
from torch import Tensor
from torch.utils.data import Dataset

from .dataset import _draw, _generator
from .files import WHOLE
from .io import Image, read_image, to_pil, with_channels
from .latents import CachedLatents, is_latents
from .stream import MEMORY_BUDGET, ImageStream


class ClassImages(ImageStream):
    """The images of a folder that has one subfolder for each class, or images alone; squares of one size.

    Classes are numbered in the order of their subfolders' names, and what lies deeper belongs to them; images in the
    folder itself have label 0. An image's centre is cut out as :func:`centre_square` does it.

    Args:
        folder: searched recursively and through links; what is hidden is left out.
        size: sides of the squares in pixels.
        channels: 3 for RGB, 1 for gray (ITU-R 601-2 luma).
        classes: names by which to number the subfolders, such as those of the training images; None takes their own.
        memory_budget: squares are kept until they take so many bytes in this process.

    Raises:
        ValueError: there is no such folder, no image in it, or images both in subfolders and beside them; a subfolder
            is none of ``classes``. When an image is asked for: it cannot be read.
    """

    def __init__(
        self,
        folder: str | Path,
        size: int,
        channels: int = 3,
        *,
        classes: tuple[str, ...] | None = None,
        memory_budget: int = MEMORY_BUDGET,
    ):
        super().__init__(folder, memory_budget, channels=channels)
        if shard := next((entry.path for entry in self.entries if entry.part != WHOLE), None):
            raise ValueError(f"data must be a folder of image files, in which a class is a folder; got {shard}")
        self.size = size
        places = [entry.path.relative_to(self.source).parts for entry in self.entries]
        found = sorted({parts[0] for parts in places if len(parts) > 1})
        if found and (alone := next((parts[0] for parts in places if len(parts) == 1), None)):
            raise ValueError(
                f"data must hold images in one folder for each class, or without any; got {alone} beside {found[0]}"
            )
        self.classes = tuple(found) if classes is None else classes
        numbers = {name: number for number, name in enumerate(self.classes)}
        if strange := [name for name in found if name not in numbers]:
            raise ValueError(f"classes must hold the names of all subfolders; got none for {strange[0]} in {folder}")
        self.labels = torch.tensor([numbers[parts[0]] if found else 0 for parts in places])

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.channels[0], self.size, self.size

    def preload(self, processes: int = 1) -> None:
        if len(self) * self.channels[0] * self.size**2 <= self.room:
            for number in range(len(self)):
                self.take(number)
        else:
            self.memory_budget //= processes
            self.room = self.memory_budget
        self.note_failures()

    def example(self, number: int, mirrored: bool = False) -> tuple[Tensor, int]:
        """An image (C, size, size) float32 in [-1, 1], and its label; of one that cannot be read, the next one's.

        Raises:
            ValueError: none can be read.
        """
        for step in range(len(self)):
            place = (number + step) % len(self)
            if (images := self.take(place)) is not None:
                return to_range(images[0], mirrored), int(self.labels[place])
        self.note_failures()
        raise ValueError(f"data must hold an image that can be read; got none: {next(iter(self.skipped.values()))}")

    def _decode(self, number: int) -> tuple[Tensor, ...]:
        entry = self.entries[number]
        pixels = with_channels(read_image(entry.path), self.channels[0])
        return (torch.from_numpy(centre_square(pixels, self.size)).permute(2, 0, 1).contiguous(),)


Labelled: TypeAlias = ClassImages | CachedLatents


def open_labelled(folder: Path, shape: tuple[int, int, int], classes: tuple[str, ...] | None = None) -> Labelled:
    """The latents of a folder that has some, else its images.

    Args:
        shape: (C, H, W) that the model takes.
        classes: names that the labels must have, of latents in this order; None takes any.

    Raises:
        ValueError: they cannot be had in that shape, or with those classes.
    """
    channels, height, width = shape
    if not is_latents(folder):
        if channels not in (1, 3):
            raise ValueError(
                f"data must be latents, as `ipt-fast encode` writes them, for a model of {channels} channels; "
                f"got {folder} without any"
            )
        return ClassImages(folder, height, channels, classes=classes)
    latents = CachedLatents(folder)
    if latents.shape != shape:
        raise ValueError(f"data must be latents of shape {shape}, as the model takes; got {latents.shape} in {folder}")
    if classes is not None and latents.classes != classes:
        pairs = enumerate(zip_longest(classes, latents.classes, fillvalue="none"))
        number, wanted, found = next((number, *names) for number, names in pairs if names[0] != names[1])
        raise ValueError(f"classes must be the same; got {found} as number {number} in {folder}, not {wanted}")
    return latents


class NoisingExamples(Dataset):
    """What a generator learns from: (x_0, label, timestep, noise), x_0 and noise float32 (C, H, W).

    Item ``n``, for any n >= 0, is a pure function of (seed, n): the image, whether it is mirrored, the timestep, which
    is uniform, and the normal noise.

    Args:
        data: images or latents.
        timesteps: number of them.
        flip: whether half of the images are mirrored; latents must have been made of mirrored images, too.
        seed: at least 0.

    Raises:
        ValueError: ``flip`` is set, and there are no latents of mirrored images.
    """

    def __init__(self, data: Labelled, timesteps: int, *, flip: bool = True, seed: int = 0):
        if flip and isinstance(data, CachedLatents) and not data.info.mirrored:
            raise ValueError(
                f"flip must be False for latents without those of mirrored images; got {flip} and {data.folder}"
            )
        self.data, self.timesteps, self.flip, self.seed = data, timesteps, flip, seed

    def __getitem__(self, number: int) -> tuple[Tensor, int, int, Tensor]:
        generator = _generator(self.seed, number)
        place = _draw(len(self.data), generator)
        mirrored = self.flip and _draw(2, generator) == 1
        timestep = _draw(self.timesteps, generator)
        x_0, label = self.data.example(place, mirrored)
        return x_0, label, timestep, torch.randn(x_0.shape, generator=generator)


def centre_square(pixels: np.ndarray, size: int) -> np.ndarray:
    """The centre of an image (H, W, C), resized so that its shorter side is ``size``; (size, size, C) uint8.

    As Dhariwal & Nichol (Diffusion Models Beat GANs, 2021) prepare images: halved by boxes while both sides are at
    least twice as long, then bicubic, both by Pillow. 16 bits are rounded to 8 first.
    """
    if pixels.dtype == np.uint16:
        pixels = ((pixels.astype(np.uint32) + 128) // 257).astype(np.uint8)
    picture = to_pil(Image(pixels))
    while min(picture.size) >= 2 * size:
        picture = picture.resize((picture.width // 2, picture.height // 2), PIL.Image.Resampling.BOX)
    scale = size / min(picture.size)
    picture = picture.resize(
        (round(picture.width * scale), round(picture.height * scale)), PIL.Image.Resampling.BICUBIC
    )
    left, top = (picture.width - size) // 2, (picture.height - size) // 2
    square = np.array(picture.crop((left, top, left + size, top + size)))
    return square if square.ndim == 3 else square[:, :, None]


def to_range(image: Tensor, mirrored: bool = False) -> Tensor:
    """A uint8 image (..., W) as float32 in [-1, 1], flipped from left to right where ``mirrored``."""
    values = image.float() / 127.5 - 1
    return values.flip(-1) if mirrored else values
