"""Which files are images, and the images of a folder, a pattern or a tar shard; nothing is decoded here.

What is no image is left out with a warning that counts and names it, so that no photo is missed without a word.
"""

import glob
import io
import os
import tarfile
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePath
from typing import Any, BinaryIO, NamedTuple, TypeAlias

from .formats import IMAGE_SUFFIXES as IMAGE_SUFFIXES  # it was defined here once
from .formats import missing_plugin

NAMED = 10  # files that a warning names


# The first byte of an image in a file and the number of its bytes, all for -1.
Part: TypeAlias = tuple[int, int]
WHOLE = (0, -1)


class Entry(NamedTuple):
    """Where the content of an image lies: in a file, from byte ``offset`` on, ``size`` bytes or all (-1)."""

    path: Path
    offset: int = 0
    size: int = -1

    @property
    def part(self) -> Part:
        return self.offset, self.size

    def __str__(self) -> str:
        return f"{self.path}, at byte {self.offset}" if self.offset else str(self.path)


class _Window(io.RawIOBase):
    """A part of a file as a file."""

    def __init__(self, file: BinaryIO, start: int, size: int):
        self._file, self._start, self._size, self._place = file, start, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._place, os.SEEK_END: self._size}[whence]
        self._place = max(0, base + offset)
        return self._place

    def readinto(self, buffer: Any) -> int:
        self._file.seek(self._start + self._place)
        content = self._file.read(min(len(buffer), max(0, self._size - self._place)))
        buffer[: len(content)] = content
        self._place += len(content)
        return len(content)

    def close(self) -> None:
        self._file.close()
        super().close()


def open_part(path: str | Path, part: Part = WHOLE) -> BinaryIO:
    """A file, or a part of one as if it were one, open for reading."""
    file = Path(path).open("rb")  # noqa: SIM115 - the caller closes it
    return file if part == WHOLE else io.BufferedReader(_Window(file, *part))


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
    return [entry for _, entry in named_images(shard)]


def named_images(shard: Path) -> list[tuple[str, Entry]]:
    """As :func:`list_shard`, each with its name in the archive."""
    try:
        with tarfile.open(shard, "r:") as archive:
            members = [member for member in archive if member.isfile()]
    except (tarfile.TarError, OSError) as error:
        raise ValueError(f"cannot read the shard {shard}: {error}") from error
    images = [member for member in members if _has_image_name(PurePath(member.name))]
    # In a WebDataset the files of a sample share their name up to its first dot: labels are no images left out.
    samples = {sample_key(member.name) for member in images}
    left_out = [member.name for member in members if sample_key(member.name) not in samples]
    _warn_of_left_out([PurePath(name) for name in left_out], shard)
    return [(member.name, Entry(shard, member.offset_data, member.size)) for member in images]


def sample_key(name: str) -> str:
    """What the members of one sample of a WebDataset share: the name up to the first dot of its last part."""
    folder, slash, file = name.rpartition("/")
    return folder + slash + file.partition(".")[0]


def match_by_name(inputs: dict[str, Entry], targets: dict[str, Entry]) -> tuple[list[tuple[str, str]], dict[str, str]]:
    """Names of inputs and of their targets, by the rule of :func:`partner_of`, and {name: why it has no partner}.

    Args:
        inputs, targets: by their names within their folders.
    """
    stems: dict[str, list[str]] = {}
    for name in targets:
        stems.setdefault(_stem(name), []).append(name)
    rivals = Counter(map(_stem, inputs))
    pairs, lonely = [], {}
    for name in inputs:
        alike = [name] if name in targets else stems.get(_stem(name), [])
        if not alike:
            lonely[str(inputs[name])] = "it has no target of its name"
        elif len(alike) > 1 or (alike != [name] and rivals[_stem(name)] > 1):
            lonely[str(inputs[name])] = f"more than one file could be its target or mean it ({', '.join(alike)})"
        else:
            pairs.append((name, alike[0]))
    met, meant = {target for _, target in pairs}, {_stem(name) for name in inputs}
    alone = [name for name in targets if name not in met and _stem(name) not in meant]
    return pairs, lonely | {str(targets[name]): "no input has its name" for name in alone}


def _stem(name: str) -> str:
    return PurePath(name).with_suffix("").as_posix()


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
