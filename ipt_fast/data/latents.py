"""Latents that an autoencoder made of labelled images once, kept in a folder for training.

The folder holds shards (safetensors) and, written last, ``latents.json``::

    {"format": "ipt_fast latents", "version": 1, "shape": [4, 32, 32], "classes": ["cat", "dog"], "mirrored": true,
     "image_size": 256, "vae": {"scaling_factor": 0.18215}, "shards": [{"file": "00000.safetensors", "samples": 1024}]}

A shard holds ``latents`` (N, C, h, w) in float32, float16 or bfloat16, as the model is to see them, which is shifted
and scaled; ``labels`` (N,) int64, which count ``classes``; and, where ``mirrored``, ``mirrored`` (N, C, h, w), the
latents of the images flipped from left to right, as a flipped latent is not quite that.
"""

import dataclasses
import functools
import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .._files import atomic_write, make_folder, naming

INDEX = "latents.json"
_FORMAT, _VERSION = "ipt_fast latents", 1
_DTYPES = ("F32", "F16", "BF16")  # safetensors' names


@dataclasses.dataclass(frozen=True)
class LatentsInfo:
    """What all latents of a folder have in common.

    Args:
        shape: (C, h, w) of each.
        classes: names, in the order of their numbers; empty where the images have none, and all labels are 0.
        mirrored: whether there is a second latent of every image, flipped from left to right.
        image_size: sides in pixels of the images they were made of.
        vae: what is to be known of the autoencoder, as JSON can hold it: its name, its ``scaling_factor``.
    """

    shape: tuple[int, int, int]
    classes: tuple[str, ...] = ()
    mirrored: bool = False
    image_size: int | None = None
    vae: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        shape = self.shape
        if len(shape) != 3 or any(type(side) is not int or side < 1 for side in shape):
            raise ValueError(f"shape must be three positive integers, channels, height and width; got {shape}")
        if any(type(name) is not str for name in self.classes) or len({*self.classes}) != len(self.classes):
            raise ValueError(f"classes must be different names; got {self.classes}")
        if type(self.mirrored) is not bool:
            raise ValueError(f"mirrored must be True or False; got {self.mirrored!r}")


def shard_path(folder: str | os.PathLike[str], number: int) -> Path:
    """Where shard ``number``, from 0, lies."""
    return Path(folder, f"{number:05d}.safetensors")


def write_shard(
    folder: str | os.PathLike[str],
    number: int,
    latents: Tensor,
    labels: Tensor,
    mirrored: Tensor | None = None,
    *,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a shard atomically, replacing one of the same number.

    Args:
        folder: made if need be.
        latents, labels, mirrored: as in the module's description.
        metadata: texts to recognise the shard by when encoding is taken up again, see :func:`shard_metadata`.

    Raises:
        ValueError: the tensors are not of such shapes and dtypes. OSError: the file cannot be written.
    """
    if latents.dim() != 4 or latents.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(
            f"latents must be (N, C, h, w) in float32, float16 or bfloat16; got {tuple(latents.shape)} {latents.dtype}"
        )
    if labels.shape != latents.shape[:1] or labels.dtype != torch.int64:
        raise ValueError(
            f"labels must be ({len(latents)},) int64, one for each latent; got {tuple(labels.shape)} {labels.dtype}"
        )
    if mirrored is not None and (mirrored.shape != latents.shape or mirrored.dtype != latents.dtype):
        raise ValueError(
            f"mirrored must be {tuple(latents.shape)} {latents.dtype}, as latents; "
            f"got {tuple(mirrored.shape)} {mirrored.dtype}"
        )
    tensors = {"latents": latents, "labels": labels} | ({} if mirrored is None else {"mirrored": mirrored})
    make_folder("folder", Path(folder))
    path = shard_path(folder, number)
    with naming(path), atomic_write(path) as temporary:
        temporary.touch()
        mode = temporary.stat().st_mode
        contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        safetensors.torch.save_file(contiguous, temporary, metadata=dict(metadata or {}))
        temporary.chmod(mode)  # the library's own is for the owner alone


def shard_metadata(path: str | os.PathLike[str]) -> dict[str, str] | None:
    """The metadata of a whole shard; None where there is none, or only a damaged one."""
    try:
        with safe_open(path, "pt") as file:
            return dict(file.metadata() or {})
    except (OSError, SafetensorError):
        return None


def write_index(folder: str | os.PathLike[str], info: LatentsInfo, samples: Sequence[int]) -> None:
    """Write ``latents.json`` atomically, once all shards are there.

    Args:
        samples: how many latents each shard has.
    """
    shards = [{"file": shard_path(folder, number).name, "samples": count} for number, count in enumerate(samples)]
    content = {"format": _FORMAT, "version": _VERSION, **dataclasses.asdict(info), "shards": shards}
    path = Path(folder, INDEX)
    with naming(path), atomic_write(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n")


def is_latents(folder: str | os.PathLike[str]) -> bool:
    """Whether a folder holds latents that are complete."""
    return Path(folder, INDEX).is_file()


class CachedLatents:
    """The latents of a folder, any of which can be had by its number, by any number of processes.

    Files are mapped into memory, so a latent is read when it is asked for.

    Args:
        folder: with a ``latents.json``.

    Raises:
        ValueError: it has none, or one that is damaged; or shards that are missing, damaged or of other shapes.
    """

    def __init__(self, folder: str | os.PathLike[str]):
        self.folder = Path(folder)
        self.info, self.shards = _read_index(self.folder)
        self.starts = np.cumsum([0, *self.shards.values()])
        for number, (path, samples) in enumerate(self.shards.items()):
            _check_shard(path, samples, self.info, self._open(number))

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_files"}

    def __len__(self) -> int:
        return int(self.starts[-1])

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.info.shape

    @property
    def classes(self) -> tuple[str, ...]:
        return self.info.classes

    @functools.cached_property
    def labels(self) -> Tensor:
        """(N,) int64, of all latents."""
        return torch.cat([self._open(number).get_tensor("labels") for number in range(len(self.shards))])

    def example(self, number: int, mirrored: bool = False) -> tuple[Tensor, int]:
        """A latent (C, h, w) float32, and its label."""
        shard = int(np.searchsorted(self.starts, number, side="right")) - 1
        place = number - int(self.starts[shard])
        latent = self._open(shard).get_slice("mirrored" if mirrored else "latents")[place]
        return latent.float(), int(self.labels[number])

    def fingerprint(self) -> dict[str, Any]:
        """By which a resumed run recognises its data: how many latents there are, and a digest of their index."""
        digest = hashlib.sha256((self.folder / INDEX).read_bytes())
        for path in self.shards:
            digest.update(f"{path.name}\0{path.stat().st_size}\n".encode())
        return {"images": len(self), "digest": digest.hexdigest()}

    def warn_of_skipped(self) -> int:
        """How many latents cannot be used: none, as all were checked."""
        return 0

    def _open(self, shard: int) -> Any:
        """The file of a shard, opened once."""
        files = self.__dict__.setdefault("_files", {})
        if shard not in files:
            path = [*self.shards][shard]
            try:
                files[shard] = safe_open(path, "pt").__enter__()
            except (OSError, SafetensorError) as error:
                raise ValueError(
                    f"{path} must be a shard of latents; got a missing or damaged file ({error})"
                ) from error
        return files[shard]


def _read_index(folder: Path) -> tuple[LatentsInfo, dict[Path, int]]:
    """What ``latents.json`` says, and {path: samples} of the shards."""
    path = folder / INDEX
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{INDEX} must be there and readable JSON; got {path} ({error})") from error
    if not isinstance(content, dict) or content.get("format") != _FORMAT:
        raise ValueError(f"{INDEX} must be one that ipt-fast encode wrote; got {path}")
    if content.get("version") != _VERSION:
        raise ValueError(f"version in {path} must be {_VERSION}; got {content.get('version')!r}")
    try:
        values = {entry.name: content[entry.name] for entry in dataclasses.fields(LatentsInfo)}
        info = LatentsInfo(**values | {"shape": tuple(values["shape"]), "classes": tuple(values["classes"])})
        shards = {folder / shard["file"]: shard["samples"] for shard in content["shards"]}
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} must be whole; got one that is damaged ({error!r})") from error
    for name, samples in shards.items():
        if not re.fullmatch(r"\d+\.safetensors", name.name) or type(samples) is not int or samples < 0:
            raise ValueError(f"shards in {path} must have names and numbers of samples; got {name.name}, {samples!r}")
    if sum(shards.values()) == 0:
        raise ValueError(f"{path} must have latents; got none")
    return info, shards


def _check_shard(path: Path, samples: int, info: LatentsInfo, file: Any) -> None:
    expected = {"latents": (samples, *info.shape), "labels": (samples,)}
    if info.mirrored:
        expected["mirrored"] = (samples, *info.shape)
    for name, shape in expected.items():
        found = file.get_slice(name) if name in file.keys() else None  # noqa: SIM118 - it is no dict
        if found is None or tuple(found.get_shape()) != shape:
            got = "none" if found is None else tuple(found.get_shape())
            raise ValueError(f"{name} in {path} must have shape {shape}; got {got}")
        if found.get_dtype() not in (("I64",) if name == "labels" else _DTYPES):
            raise ValueError(f"{name} in {path} must be {' or '.join(_DTYPES)}; got {found.get_dtype()}")
    labels, most = file.get_tensor("labels"), max(1, len(info.classes))
    if samples and not 0 <= int(labels.min()) <= int(labels.max()) < most:
        raise ValueError(f"labels in {path} must be from 0 to {most - 1}; got {labels.min()} to {labels.max()}")
