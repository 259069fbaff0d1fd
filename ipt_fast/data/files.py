"""Which files are images, and the images of a folder, a pattern or a tar shard; nothing is decoded here."""

import glob
import tarfile
from pathlib import Path, PurePath
from typing import NamedTuple

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".webp", ".bmp")


class Entry(NamedTuple):
    """Where the content of an image lies: in a file, from byte ``offset`` on, ``size`` bytes or all (-1)."""

    path: Path
    offset: int = 0
    size: int = -1


def is_image_file(path: Path) -> bool:
    """Whether ``path`` is a file with one of IMAGE_SUFFIXES and not hidden, as the companions of other systems are."""
    return _has_image_name(path) and path.is_file()


def list_images(folder: str | Path, *, recursive: bool = False) -> list[Path]:
    """The image files of a folder, with ``recursive`` those of its subfolders too, sorted by path; no hidden files.

    Raises:
        ValueError: it is no folder or holds no image.
    """
    if not Path(folder).is_dir():
        raise ValueError(f"folder must exist; got {folder}")
    paths = find_images(Path(folder), recursive=recursive)
    if not paths:
        raise ValueError(f"folder must hold images ({', '.join(IMAGE_SUFFIXES)}); got none in {folder}")
    return paths


def find_images(folder: Path, *, recursive: bool = False) -> list[Path]:
    """As :func:`list_images`, of a folder that may hold none."""
    return sorted(path for path in (folder.rglob("*") if recursive else folder.iterdir()) if is_image_file(path))


def match_images(name: str) -> list[Path]:
    """The images that a user means by ``name``: one file, whatever its suffix; a folder's images; or a pattern's.

    Raises:
        ValueError: there are none.
    """
    path = Path(name)
    if path.is_dir():
        return list_images(path)
    if path.is_file():
        return [path]
    paths = [match for match in map(Path, sorted(glob.glob(name, recursive=True))) if is_image_file(match)]
    if not paths:
        raise ValueError(f"images must be a file, a folder or a pattern that some match; got {name}")
    return paths


def list_shard(shard: Path) -> list[Entry]:
    """The images of a tar archive that is not compressed, in its order; only the headers are read.

    Raises:
        ValueError: the archive cannot be read.
    """
    try:
        with tarfile.open(shard, "r:") as archive:
            return [
                Entry(shard, member.offset_data, member.size)
                for member in archive
                if member.isfile() and _has_image_name(PurePath(member.name))
            ]
    except (tarfile.TarError, OSError) as error:
        raise ValueError(f"cannot read the shard {shard}: {error}") from error


def _has_image_name(path: PurePath) -> bool:
    return path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".")
