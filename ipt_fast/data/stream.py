"""Large sets of training images: files in folders and in tar shards, decoded when they are asked for."""

import io
import tarfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import PIL.Image
import PIL.ImageOps
import torch
from torch import Tensor

from .io import IMAGE_SUFFIXES, is_image_file

Entry = tuple[Path, int | None, int | None]  # file, first byte and bytes of the image; None where it is all of it


class ImageStream(Sequence[Tensor]):
    """The images of a folder and its subfolders, and of the tar shards in it (WebDataset), as uint8 (3, H, W).

    Only names are read at the start, and of shards the headers; any image can then be had in any order by any number
    of processes, so that training goes on exactly where it stopped. Shards must not be compressed. Gray images become
    three equal channels, alpha is dropped.

    Args:
        source: a folder, or one .tar file.
        memory_budget: decoded images are kept until they take so many bytes in this process.

    Raises:
        ValueError: there is no such folder or file, no image in it, or a shard that cannot be read.
    """

    def __init__(self, source: str | Path, memory_budget: int = 2 * 2**30):
        source = Path(source)
        self.entries: list[Entry]
        if source.is_dir():
            paths = sorted(source.rglob("*"))
            shards = [path for path in paths if path.suffix == ".tar" and path.is_file()]
            self.entries = [(path, None, None) for path in paths if is_image_file(path)]
        elif source.suffix == ".tar" and source.is_file():
            shards, self.entries = [source], []
        else:
            raise ValueError(f"there is no folder and no .tar file at {source}")
        for shard in shards:
            self.entries += _members(shard)
        if not self.entries:
            raise ValueError(f"no images ({', '.join(IMAGE_SUFFIXES)}) in {source}")
        self.room = memory_budget
        self._kept: dict[int, Tensor] = {}

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, index: int) -> Tensor:  # type: ignore[override]  # no slices
        if index in self._kept:
            return self._kept[index]
        path, offset, size = self.entries[index]
        try:
            with path.open("rb") as file:
                file.seek(offset or 0)
                data = file.read(-1 if size is None else size)
            with PIL.Image.open(io.BytesIO(data)) as image:
                if image.mode.startswith(("I", "F")):
                    raise ValueError(f"training images must have 8 bits, its mode is {image.mode}")
                pixels = np.array(PIL.ImageOps.exif_transpose(image).convert("RGB"))
        except (OSError, ValueError, SyntaxError, PIL.Image.DecompressionBombError) as error:
            place = "" if offset is None else f", at byte {offset}"
            raise ValueError(f"cannot read the image in {path}{place}: {error}") from error
        decoded = torch.from_numpy(pixels).permute(2, 0, 1)
        if decoded.numel() <= self.room:
            self.room -= decoded.numel()
            self._kept[index] = decoded
        return decoded


def _members(shard: Path) -> list[Entry]:
    """(shard, first byte, bytes) of each image in it."""
    try:
        with tarfile.open(shard, "r:") as archive:
            return [
                (shard, member.offset_data, member.size)
                for member in archive
                if member.isfile()
                and not (name := Path(member.name)).name.startswith(".")
                and name.suffix.lower() in IMAGE_SUFFIXES
            ]
    except (tarfile.TarError, OSError) as error:
        raise ValueError(f"cannot read the shard {shard}: {error}") from error
