"""Large sets of training images: files in folders and in tar shards, decoded when they are asked for."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ._fingerprint import fingerprint
from .files import IMAGE_SUFFIXES, Entry, find_images, list_shard, walk
from .files import is_image_file as is_image_file  # kept for older imports
from .io import read_8_bit_image, with_channels


class ImageStream(Sequence[Tensor]):
    """The 8-bit images of a folder and its subfolders, and of the tar shards in it (WebDataset), as uint8 (3, H, W).

    Only names are read at the start, and of shards the headers; any image can then be had in any order by any number
    of processes, so that training goes on exactly where it stopped. Shards must not be compressed. Images are read as
    :func:`ipt_fast.data.io.read_image` reads them, upright; gray becomes three equal channels, alpha is dropped.

    Args:
        source: a folder, searched recursively and through links but for what is hidden, or one .tar file.
        memory_budget: decoded images are kept until they take so many bytes in this process.

    Raises:
        ValueError: there is no such folder or file, no image in it, or a shard that cannot be read. When an image is
            asked for: it cannot be read or has 16 bits, several pages, or a kind of colour other than gray and RGB.
    """

    def __init__(self, source: str | Path, memory_budget: int = 2 * 2**30):
        self.source = source = Path(source)
        self.entries: list[Entry] = []
        if source.is_dir():
            self.entries = [Entry(path) for path in find_images(source, recursive=True, besides=(".tar",))]
            shards = sorted(path for path in walk(source) if path.suffix == ".tar" and path.is_file())
        elif source.suffix == ".tar" and source.is_file():
            shards = [source]
        else:
            raise ValueError(f"source must be a folder or a .tar file; got {source}")
        for shard in shards:
            self.entries += list_shard(shard)
        if not self.entries:
            raise ValueError(f"source must hold images ({', '.join(IMAGE_SUFFIXES)}); got none in {source}")
        self.room = memory_budget
        self._kept: dict[int, Tensor] = {}

    def __len__(self) -> int:
        return len(self.entries)

    def fingerprint(self) -> dict[str, Any]:
        """By which a resumed run recognises its data, see :func:`ipt_fast.data._fingerprint.fingerprint`."""
        return fingerprint(self.entries, self.source if self.source.is_dir() else self.source.parent)

    def __getitem__(self, index: int) -> Tensor:  # type: ignore[override]  # no slices
        if index in self._kept:
            return self._kept[index]
        image = read_8_bit_image(*self.entries[index])
        decoded = torch.from_numpy(with_channels(image, 3)).permute(2, 0, 1)
        if decoded.numel() <= self.room:
            self.room -= decoded.numel()
            self._kept[index] = decoded
        return decoded
