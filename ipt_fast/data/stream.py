"""Training images: files in folders and in tar shards, decoded when they are asked for.

A sample is a clean image, or the inputs and the target of a pair. Bad ones are named, skipped and counted.
"""

import functools
import hashlib
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ._fingerprint import fingerprint
from .files import IMAGE_SUFFIXES, NAMED, Entry, find_images, match_by_name, named_images, sample_key, walk
from .files import is_image_file as is_image_file  # kept for older imports
from .io import read_header, read_image, with_channels
from .resize import shrink

# Names that members of a shard have between key and suffix, where it holds pairs: 00001.input.png, 00001.target.png.
ROLES = {1: ("input", "target"), 2: ("left", "right", "target")}
MEMORY_BUDGET = 4 * 2**30


class Samples:
    """What clean images and pairs share. Only names are read at first; headers when ``sizes`` are asked for.

    Args:
        samples: the images of each sample, the target last.
        channels: 1 or 3 for each image of a sample.
        scale: how many times larger than its inputs a target is.
        shrinking: how many times smaller the images are made.
        memory_budget: decoded images are kept until they take so many bytes in this process.
    """

    def __init__(
        self,
        samples: Sequence[tuple[Entry, ...]],
        channels: tuple[int, ...],
        *,
        scale: int = 1,
        shrinking: int = 1,
        memory_budget: int = MEMORY_BUDGET,
    ):
        self.samples = samples
        self.channels = channels
        self.scale = scale
        self.shrinking = shrinking
        self.memory_budget = self.room = memory_budget
        self.skipped: dict[str, str] = {}  # {image: why}
        self._kept: dict[int, tuple[Tensor, ...]] = {}
        self._bytes = 0  # of all decoded images, once ``sizes`` are known
        # In shared memory: the processes that prepare batches tell this one which images cannot be decoded.
        self.failed = torch.zeros(len(samples), dtype=torch.bool).share_memory_()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_kept": {}, "room": self.memory_budget}  # a process that is not forked decodes anew

    def __len__(self) -> int:
        return len(self.samples)

    @functools.cached_property
    def sizes(self) -> list[tuple[int, int] | None]:
        """Height and width of each sample's inputs as stored, shrunk; None of a bad one, which is in ``skipped``."""
        numbers = tqdm(range(len(self)), "reading headers", delay=5, leave=False, disable=None)
        return [self._size(number) for number in numbers]

    def usable(self, side: int) -> list[int]:
        """The numbers of the samples whose inputs have at least ``side`` pixels a side; others are in ``skipped``."""
        numbers = []
        for number, size in enumerate(self.sizes):
            if size is not None and min(size) >= side:
                numbers.append(number)
            elif size is not None:
                small = f"it has {size[1]} x {size[0]} pixels, and a patch takes {side}"
                self.skipped.setdefault(str(self.samples[number][0]), small)
        return numbers

    def preload(self, processes: int = 1) -> None:
        """Decode all images now, once for all processes that are forked, where the budget holds them.

        Otherwise each of so many processes keeps its part of the budget.
        """
        good = [number for number, size in enumerate(self.sizes) if size is not None]
        if self._bytes <= self.room:
            for number in good:
                self.take(number)
        else:
            self.memory_budget //= processes
            self.room = self.memory_budget
        self.note_failures()

    def take(self, number: int) -> tuple[Tensor, ...] | None:
        """The images of a sample; None where they cannot be decoded, which is then known to all processes."""
        if self.failed[number]:
            return None
        try:
            return self.images(number)
        except (ValueError, ImportError):
            self.failed[number] = True
            return None

    def note_failures(self) -> None:
        """Put what could not be decoded, in any process, into ``skipped``."""
        for number in self.failed.nonzero().flatten().tolist():
            if str(self.samples[number][0]) not in self.skipped:
                try:
                    self._decode(number)
                    reason = "a process could not read it, though now it can be read"
                except (ValueError, ImportError) as error:
                    reason = str(error)
                self.skipped[str(self.samples[number][0])] = reason

    def images(self, number: int) -> tuple[Tensor, ...]:
        """(C, H, W), uint8 or uint16 each, upright.

        Raises:
            ValueError: one cannot be read, or is of a kind of colour other than gray and RGB, or they do not match.
            ImportError: it takes tifffile or imagecodecs, and they are not installed.
        """
        if number in self._kept:
            return self._kept[number]
        images = self._decode(number)
        taken = sum(image.nbytes for image in images)
        if taken <= self.room:
            self.room -= taken
            self._kept[number] = images
        return images

    def fingerprint(self) -> dict[str, Any]:
        """By which a resumed run recognises its data, see :func:`ipt_fast.data._fingerprint.fingerprint`."""
        raise NotImplementedError

    def _size(self, number: int) -> tuple[int, int] | None:
        sample = self.samples[number]
        try:
            headers = [read_header(entry.path, part=entry.part) for entry in sample]
            self._check_sizes([tuple(sorted(header[:2])) for header in headers])
        except (ValueError, ImportError) as error:
            self.skipped[str(sample[0])] = str(error)
            return None
        for (height, width, dtype), channels in zip(headers, self.channels, strict=True):
            self._bytes += height * width * channels * dtype.itemsize // self.shrinking**2
        height, width, _ = headers[0]
        return -(-height // self.shrinking), -(-width // self.shrinking)

    def _check_sizes(self, sizes: list[tuple[int, ...]]) -> None:
        expected = [sizes[0]] * (len(sizes) - 1) + [tuple(self.scale * side for side in sizes[0])]
        if len(sizes) > 1 and sizes != expected:
            raise ValueError(f"sizes must be {expected} of the images of a pair; got {sizes}")

    def _decode(self, number: int) -> tuple[Tensor, ...]:
        images = []
        for entry, channels in zip(self.samples[number], self.channels, strict=True):
            pixels = with_channels(read_image(entry.path, part=entry.part), channels)
            images.append(shrink(torch.from_numpy(pixels).permute(2, 0, 1), self.shrinking))
        self._check_sizes([tuple(image.shape[1:]) for image in images])
        known = self.__dict__.get("sizes")  # where headers have been read
        if known and sorted(known[number] or ()) != sorted(images[0].shape[1:]):
            place = self.samples[number][0]
            raise ValueError(f"images must stay as they are; got {place} of another size than at the start")
        return tuple(images)


class ImageStream(Samples, Sequence[Tensor]):
    """The images of a folder and its subfolders, and of the tar shards in it (WebDataset), each a tensor (C, H, W).

    They are uint8, or uint16 where a file has 16 bits. Only names are read at the start, and of shards the headers; any
    image can then be had in any order by any number of processes, so that training goes on exactly where it stopped.
    Shards must not be compressed. Images are read as :func:`ipt_fast.data.io.read_image` reads them, upright; gray
    becomes three equal channels, alpha is dropped.

    Args:
        source: a folder, searched recursively and through links but for what is hidden, or one .tar file.
        memory_budget: decoded images are kept until they take so many bytes in this process.
        channels: 3 for RGB, 1 for gray (ITU-R 601-2 luma).
        shrinking: how many times smaller images are made, by :func:`ipt_fast.data.resize.imresize` and rounded: the
            JPEGs of cameras become clean so.

    Raises:
        ValueError: there is no such folder or file, no image in it, or a shard that cannot be read. When an image is
            asked for: it cannot be read or has several pages, or a kind of colour other than gray and RGB.
    """

    def __init__(self, source: str | Path, memory_budget: int = 2 * 2**30, *, channels: int = 3, shrinking: int = 1):
        self.source = Path(source)
        self.entries, members = _list_source(self.source)
        self.entries += [entry for _, entry in members]
        if not self.entries:
            raise ValueError(f"data must hold images ({', '.join(IMAGE_SUFFIXES)}); got none in {source}")
        samples = [(entry,) for entry in self.entries]
        super().__init__(samples, (channels,), shrinking=shrinking, memory_budget=memory_budget)

    def __getitem__(self, index: int) -> Tensor:  # type: ignore[override]  # no slices
        return self.images(index)[0]

    def fingerprint(self) -> dict[str, Any]:
        return fingerprint(self.entries, self.source if self.source.is_dir() else self.source.parent)


class PairStream(Samples, Sequence[tuple[Tensor, ...]]):
    """Pairs of degraded and clean images: folders in which they have the same names, or tar shards that hold both.

    In a shard (WebDataset) the images of a pair are ``key.input.png`` and ``key.target.png``, with two views
    ``key.left.png``, ``key.right.png`` and ``key.target.png``; any suffix of an image will do.

    Args:
        inputs: a folder, or one for each view; without ``target`` one folder of shards or one .tar file.
        target: the folder of clean images; an image's suffix may differ from its partner's.
        channels: of each input and of the target, 1 or 3.
        scale: how many times larger than its input a target is.
        memory_budget: as of :class:`ImageStream`.

    Raises:
        ValueError: there is no such folder or file, no pair in it, or a shard that cannot be read.
    """

    def __init__(
        self,
        inputs: Sequence[str | Path],
        target: str | Path | None,
        channels: tuple[int, ...] = (3, 3),
        *,
        scale: int = 1,
        memory_budget: int = 2 * 2**30,
    ):
        self.folders = [Path(folder) for folder in (*inputs, *([] if target is None else [target]))]
        views = len(channels) - 1
        if target is not None and len(inputs) != views:
            wanted = "one folder" if views == 1 else f"{views} folders"
            raise ValueError(f"data must be {wanted} of inputs for each target; got {_names(self.folders[:-1])}")
        samples, lonely = (
            _pairs_in_shards(self.folders[0], len(channels) - 1) if target is None else _pairs(self.folders)
        )
        if not samples:
            raise ValueError(f"data must hold pairs of images of the same names; got none in {_names(self.folders)}")
        super().__init__(samples, channels, scale=scale, memory_budget=memory_budget)
        self.skipped |= lonely

    def __getitem__(self, index: int) -> tuple[Tensor, ...]:  # type: ignore[override]  # no slices
        return self.images(index)

    def fingerprint(self) -> dict[str, Any]:
        if len(self.folders) == 1:
            root = self.folders[0] if self.folders[0].is_dir() else self.folders[0].parent
            return fingerprint((entry for sample in self.samples for entry in sample), root)
        columns = zip(*self.samples, strict=True)
        return _together(fingerprint(column, folder) for column, folder in zip(columns, self.folders, strict=True))


class TrainingData:
    """All sources of a run, and how often each is drawn from.

    Args:
        streams: the sources.
        weights: how often, in proportion; None: by the number of usable samples.
    """

    def __init__(self, streams: Sequence[ImageStream | PairStream], weights: Sequence[float] | None = None):
        self.streams = list(streams)
        self.weights = None if weights is None else list(weights)
        self._named: set[str] = set()

    def fingerprint(self) -> dict[str, Any]:
        """By which a resumed run recognises its data: that of the only source, or of all of them together."""
        prints = [stream.fingerprint() for stream in self.streams]
        return prints[0] if len(prints) == 1 else _together(prints)

    @property
    def skipped(self) -> dict[str, str]:
        """{image: why it is not used}, as far as it is known by now."""
        for stream in self.streams:
            stream.note_failures()
        return {name: why for stream in self.streams for name, why in stream.skipped.items()}

    def warn_of_skipped(self) -> int:
        """Name in one warning what is newly skipped; returns how many are skipped in all."""
        skipped = self.skipped
        new = {name: why for name, why in skipped.items() if name not in self._named}
        self._named |= new.keys()
        if new:
            named = [why if name in why else f"{name}: {why}" for name, why in list(new.items())[:NAMED]]
            rest = f"; and {len(new) - NAMED} more" if len(new) > NAMED else ""
            warnings.warn(f"skipped {len(new)} of the images: {'; '.join(named)}{rest}", stacklevel=2)
        return len(skipped)


def open_source(
    data: Sequence[Path], target: Path | None, channels: tuple[int, ...], scale: int, shrinking: int, memory_budget: int
) -> ImageStream | PairStream:
    """Clean images where there is no target, unless they are shards of pairs; pairs else.

    Args:
        data: a folder or shard of clean images, or the folders of a pair's inputs.
        target: folder of the targets.
        channels: of each input of a pair and of the target, which clean images have too.
        scale, shrinking, memory_budget: as of the streams.
    """
    if target is not None or _holds_pairs(data[0]):
        if shrinking != 1:
            raise ValueError(f"shrink must be 1 for pairs; got {shrinking} for {_names(data)}")
        return PairStream(data, target, channels, scale=scale, memory_budget=memory_budget)
    return ImageStream(data[0], memory_budget, channels=channels[-1], shrinking=shrinking)


def _shards(source: Path) -> list[Path]:
    if source.is_dir():
        return sorted(path for path in walk(source) if path.suffix == ".tar" and path.is_file())
    if source.suffix == ".tar" and source.is_file():
        return [source]
    raise ValueError(f"data must be a folder or a .tar file; got {source}")


def _list_source(source: Path) -> tuple[list[Entry], list[tuple[str, Entry]]]:
    """The files of a folder that are images, and the images of its shards, with their names there."""
    members = [member for shard in _shards(source) for member in named_images(shard)]
    paths = find_images(source, recursive=True, besides=(".tar",)) if source.is_dir() else []
    return [Entry(path) for path in paths], members


def _role(name: str) -> str:
    return name[len(sample_key(name)) :].split(".")[1].lower()


def _holds_pairs(source: Path) -> bool:
    """As far as its first shard tells."""
    with warnings.catch_warnings(action="ignore"):  # what is left out is named where the source is opened
        return any(_role(name) == "target" for shard in _shards(source)[:1] for name, _ in named_images(shard))


def _pairs_in_shards(source: Path, views: int) -> tuple[list[tuple[Entry, ...]], dict[str, str]]:
    files, members = _list_source(source)
    skipped = {str(entry): "it lies beside shards of pairs" for entry in files}
    found: dict[tuple[Path, str], dict[str, Entry]] = {}
    for name, entry in members:
        found.setdefault((entry.path, sample_key(name)), {})[_role(name)] = entry
    samples = []
    for (shard, key), images in found.items():
        if missing := [role for role in ROLES[views] if role not in images]:
            skipped[f"{shard}, {key}"] = f"it has no {' and no '.join(missing)}"
        else:
            samples.append(tuple(images[role] for role in ROLES[views]))
    return samples, skipped


def _pairs(folders: list[Path]) -> tuple[list[tuple[Entry, ...]], dict[str, str]]:
    """Of the folders of inputs and, last, of targets."""
    listed = []
    for folder in folders:
        if not folder.is_dir():
            raise ValueError(f"folder must exist; got {folder}")
        paths = find_images(folder, recursive=True)
        listed.append({path.relative_to(folder).as_posix(): Entry(path) for path in paths})
    *inputs, targets = listed
    chosen: dict[str, list[Entry]] = {name: [] for name in targets}
    lonely: dict[str, str] = {}
    for images in inputs:
        pairs, alone = match_by_name(images, targets)
        lonely |= alone
        for name, target in pairs:
            chosen[target].append(images[name])
    samples = [(*views, targets[name]) for name, views in chosen.items() if len(views) == len(inputs)]
    return samples, lonely


def _together(prints: Iterable[dict[str, Any]]) -> dict[str, Any]:
    each = list(prints)
    digest = hashlib.sha256("\n".join(one["digest"] for one in each).encode())
    return {"images": sum(one["images"] for one in each), "digest": digest.hexdigest()}


def _names(folders: Sequence[Path]) -> str:
    return ", ".join(map(str, folders))
