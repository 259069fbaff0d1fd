"""Which files are images, and the images of a folder, a pattern or a tar shard; nothing is decoded here.

What is no image is left out with a warning that counts and names it, so that no photo is missed without a word.
"""

import glob
import os
import tarfile
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePath
from typing import NamedTuple

from .formats import IMAGE_SUFFIXES as IMAGE_SUFFIXES  # it was defined here once
from .formats import missing_plugin

NAMED = 10  # files that a warning names


class Entry(NamedTuple):
    """Where the content of an image lies: in a file, from byte ``offset`` on, ``size`` bytes or all (-1)."""

    path: Path
    offset: int = 0
    size: int = -1


def is_image_file(path: Path) -> bool:
    """Whether ``path`` is a file with one of IMAGE_SUFFIXES and not hidden, as the companions of other systems are."""
    return _has_image_name(path) and path.is_file()


def list_images(folder: str | Path, *, recursive: bool = False) -> list[Path]:
    """The image files of a folder, with ``recursive`` those of its subfolders too, sorted by path; nothing hidden.

    Raises:
        ValueError: it is no folder or holds no image.
    """
    if not Path(folder).is_dir():
        raise ValueError(f"folder must exist; got {folder}")
    paths = find_images(Path(folder), recursive=recursive)
    if not paths:
        raise ValueError(f"folder must hold images ({', '.join(IMAGE_SUFFIXES)}); got none in {folder}")
    return paths


def find_images(folder: Path, *, recursive: bool = False, besides: Sequence[str] = ()) -> list[Path]:
    """As :func:`list_images`, of a folder that may hold none.

    Args:
        besides: suffixes of files that the caller takes for something else, and that are not left out therefore.
    """
    paths = sorted(walk(folder) if recursive else (path for path in folder.iterdir() if not path.is_dir()))
    images = [path for path in paths if is_image_file(path)]
    rest = {*paths} - {*images}
    _warn_of_left_out([path for path in paths if path in rest and path.suffix not in besides], folder)
    return images


def walk(folder: Path) -> Iterator[Path]:
    """All that is no folder in a folder and those below it: each of these once, through links too; none hidden."""

    def fail(error: OSError) -> None:
        raise error

    seen = set()
    for place, folders, names in os.walk(folder, onerror=fail, followlinks=True):
        status = os.stat(place)
        if (status.st_dev, status.st_ino) in seen:  # a link to a folder above, or a second way to this one
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (Path(place, name) for name in names)


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
    if path.exists():
        raise ValueError(f"images must be files, which can be read twice; got {name}, which is a pipe or a device")
    matches = [match for match in map(Path, sorted(glob.glob(name, recursive=True))) if not match.is_dir()]
    paths = [match for match in matches if is_image_file(match)]
    _warn_of_left_out([match for match in matches if match not in {*paths}], name)
    if not paths:
        raise ValueError(f"images must be a file, a folder or a pattern that some match; got {name}")
    return paths


def partner_of(path: Path, inputs: Sequence[Path], targets: Sequence[Path]) -> Path:
    """The target of one of ``inputs``: of the same name, or else the only one that differs by its suffix alone.

    Raises:
        ValueError: there is none, or more than one could be meant, or more than one input could mean it.
    """
    if exact := [target for target in targets if target.name == path.name]:
        return exact[0]
    alike = [target.name for target in targets if target.stem == path.stem]
    rivals = [each.name for each in inputs if each.stem == path.stem]
    if not alike:
        raise ValueError(f"target must hold an image by the name of each input; got none for {path.name}")
    if len(alike) > 1 or len(rivals) > 1:
        raise ValueError(
            f"target must hold one image by the name of each input; got {', '.join(alike)} for {', '.join(rivals)}"
        )
    return next(target for target in targets if target.name == alike[0])


def list_shard(shard: Path) -> list[Entry]:
    """The images of a tar archive that is not compressed, in its order; only the headers are read.

    Raises:
        ValueError: the archive cannot be read.
    """
    try:
        with tarfile.open(shard, "r:") as archive:
            members = [member for member in archive if member.isfile()]
    except (tarfile.TarError, OSError) as error:
        raise ValueError(f"cannot read the shard {shard}: {error}") from error
    images = [member for member in members if _has_image_name(PurePath(member.name))]
    # In a WebDataset the files of a sample share their name up to its first dot: labels are no images left out.
    samples = {_sample(member.name) for member in images}
    left_out = [member.name for member in members if _sample(member.name) not in samples]
    _warn_of_left_out([PurePath(name) for name in left_out], shard)
    return [Entry(shard, member.offset_data, member.size) for member in images]


def _sample(name: str) -> tuple[str, str]:
    folder, _, file = name.rpartition("/")
    return folder, file.partition(".")[0]


def _has_image_name(path: PurePath) -> bool:
    return path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".")


def _warn_of_left_out(paths: Sequence[PurePath], place: object) -> None:
    """Hidden files are none that a user would miss."""
    paths = [path for path in paths if not path.name.startswith(".")]
    if not paths:
        return
    names = [path.name + (f" (needs {plugin})" if (plugin := missing_plugin(path.suffix)) else "") for path in paths]
    if len(names) > NAMED:
        rest = Counter(path.suffix.lower() or "no suffix" for path in paths[NAMED:])
        names[NAMED:] = [f"and {count} more of {suffix}" for suffix, count in rest.most_common()]
    warnings.warn(f"left out of {place}, as no image by name: {len(paths)} ({', '.join(names)})", stacklevel=3)
