"""Many images in one .npz file, as ADM's evaluator takes them; written and read a few at a time, as they fill memories.

``arr_0`` is (N, H, W, C) uint8, and ``arr_1``, where it is there, (N,) int64 with their classes.
"""

import contextlib
import os
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np

from .._files import atomic_write

IMAGES, CLASSES = "arr_0", "arr_1"
_DAMAGE = (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error)


@contextlib.contextmanager
def write_npz(
    path: str | os.PathLike[str], images: int, classes: Sequence[int] | None = None, *, comment: str = ""
) -> Iterator[Callable[[np.ndarray], None]]:
    """Yield a function that takes one image (H, W, C) uint8 after the other; the file takes its place when all are in.

    Args:
        path: the file.
        images: how many there will be.
        classes: one for each image.
        comment: of the archive, by which :func:`comment_of` knows it again.

    Raises:
        ValueError: an image that differs in shape or dtype from the first, or another number of images.
    """
    with atomic_write(path) as temporary, zipfile.ZipFile(temporary, "w", allowZip64=True) as archive:
        archive.comment = comment.encode()
        with archive.open(f"{IMAGES}.npy", "w", force_zip64=True) as file:
            writer = _Writer(file, images)
            yield writer.add
            if writer.left:
                raise ValueError(f"images must be {images}, as was said; got {images - writer.left}")
        if classes is not None:
            with archive.open(f"{CLASSES}.npy", "w") as file:
                np.lib.format.write_array(file, np.asarray(classes, np.int64), allow_pickle=False)


def comment_of(path: str | os.PathLike[str]) -> str:
    """The comment that :func:`write_npz` gave a file; "" of any other file."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.comment.decode(errors="replace")
    except (OSError, zipfile.BadZipFile):
        return ""


class _Writer:
    def __init__(self, file: IO[bytes], images: int) -> None:
        self.file, self.images, self.left = file, images, images
        self.shape: tuple[int, ...] | None = None

    def add(self, image: np.ndarray) -> None:
        if self.shape is None:
            self.shape = image.shape
            header = {"descr": "|u1", "fortran_order": False, "shape": (self.images, *image.shape)}
            np.lib.format.write_array_header_1_0(self.file, header)
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape != self.shape or not self.left:
            raise ValueError(
                f"images must be {self.images} of shape {self.shape} and uint8; got one more of {image.shape} "
                f"{image.dtype}"
            )
        self.file.write(image.tobytes())
        self.left -= 1


def read_npz(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """The arrays of a .npz file but its images.

    Raises:
        ValueError: it cannot be read.
    """
    with _naming(path), zipfile.ZipFile(path):  # which a single array is not
        pass
    with _naming(path), np.load(path, allow_pickle=False) as archive:
        return {name: archive[name] for name in archive.files if name != IMAGES}


def has_images(path: str | os.PathLike[str]) -> bool:
    """Whether a .npz file has images; ValueError where it cannot be read."""
    with _naming(path), zipfile.ZipFile(path) as archive:
        return f"{IMAGES}.npy" in archive.namelist()


class NpzImages:
    """The images of a .npz file.

    Attributes:
        shape: (N, H, W, C).

    Raises:
        ValueError: it cannot be read, or its images are no (N, H, W, 1 or 3) uint8.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        with _naming(path), self._opened() as (_, self.shape):
            pass

    def __len__(self) -> int:
        return self.shape[0]

    def __iter__(self) -> Iterator[np.ndarray]:
        """Each (H, W, C) uint8, in order."""
        with _naming(self.path), self._opened() as (file, (images, *shape)):
            for _ in range(images):
                content = file.read(int(np.prod(shape)))
                yield np.frombuffer(content, np.uint8).reshape(shape)

    @contextlib.contextmanager
    def _opened(self) -> Iterator[tuple[IO[bytes], tuple[int, ...]]]:
        with zipfile.ZipFile(self.path) as archive, archive.open(f"{IMAGES}.npy") as file:
            version = np.lib.format.read_magic(file)
            shape, fortran, dtype = _read_header(file, version)
            if fortran or dtype != np.uint8 or len(shape) != 4 or shape[3] not in (1, 3) or 0 in shape:
                raise ValueError(f"{IMAGES} must be (N, H, W, 1 or 3) uint8; got {shape} {dtype}")
            yield file, shape


def _read_header(file: IO[bytes], version: tuple[int, int]) -> tuple[tuple[int, ...], bool, Any]:
    if version == (1, 0):
        return np.lib.format.read_array_header_1_0(file)
    return np.lib.format.read_array_header_2_0(file)


@contextlib.contextmanager
def _naming(path: str | os.PathLike[str]) -> Iterator[None]:
    try:
        yield
    except _DAMAGE as error:
        raise ValueError(f"cannot read {path}: {error}") from error
