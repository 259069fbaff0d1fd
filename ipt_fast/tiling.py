"""Where tiles lie, how they are blended, and how much memory one takes: pure functions."""

import math
import os
from pathlib import Path

import torch

from .models.contract import BYTES_PER_PIXEL_AND_CHANNEL as BYTES_PER_PIXEL_AND_CHANNEL
from .models.contract import BYTES_WITH_FUSED_LAYERS as BYTES_WITH_FUSED_LAYERS
from .models.contract import Memory

BLENDS = ("cosine", "average")
PROCEDURES = ("blend", "paper", "official")  # of models with one size of input
PROCEDURE_OVERLAP = 10
DEFAULT_TILE = 512
SMALLEST_AUTO_TILE = 128


def count_tiles(length: int, tile: int, overlap: int) -> int:
    """The least number of tiles that cover ``length`` with neighbours overlapping by at least ``overlap``."""
    return 1 if length <= tile else math.ceil((length - overlap) / (tile - overlap))


def tile_starts(length: int, tile: int, overlap: int) -> list[int]:
    """Where the tiles of one axis begin: every tile full and inside the image, spread evenly.

    One tile at 0 where ``length <= tile``. Spreading evenly gives all seams the same overlap and costs as much as
    moving only the last tile back.
    """
    count = count_tiles(length, tile, overlap)
    return [round(i * (length - tile) / (count - 1)) for i in range(count)] if count > 1 else [0]


def balanced_tile(length: int, limit: int, overlap: int) -> int:
    """The smallest tile size (a multiple of 8 at most ``limit``) that needs no more tiles than ``limit`` does.

    A row of 520 pixels is so cut into two tiles of 280 and not into two of 512, nearly all of them overlap.
    """
    count = count_tiles(length, limit, overlap)
    smallest = math.ceil((length + (count - 1) * overlap) / count)
    return min(limit, 8 * math.ceil(smallest / 8))


def blend_weights(
    length: int, tile: int, overlap: int, blend: str, starts: list[int] | None = None
) -> list[torch.Tensor]:
    """The weight of each tile along one axis: (tile,) float32 each, positive, summing to one at every pixel.

    "cosine" raises each tile from its inner edges over ``overlap`` pixels with half a period of a cosine; "average"
    gives all tiles that cover a pixel the same weight. In the plane a tile's weight is the outer product of its axes.
    Tiles begin at ``starts``, by default where :func:`tile_starts` has them.
    """
    starts = tile_starts(length, tile, overlap) if starts is None else starts
    size = min(tile, length)
    ramp = 0.5 - 0.5 * torch.cos(math.pi * (torch.arange(overlap) + 0.5) / max(overlap, 1))
    windows = [torch.ones(size) for _ in starts]
    if blend == "cosine":
        for window in windows[1:]:
            window[:overlap] *= ramp
        for window in windows[:-1]:
            window[size - overlap :] *= ramp.flip(0)
    total = torch.zeros(length)
    for start, window in zip(starts, windows, strict=True):
        total[start : start + size] += window
    return [window / total[start : start + size] for start, window in zip(starts, windows, strict=True)]


def procedure_tiles(procedure: str, length: int, tile: int, scale: int = 1) -> list[tuple[int, torch.Tensor]]:
    """(start, weights of its output) of each tile of one axis, as IPT was tested; ``length`` is at least ``tile``.

    "paper": neighbours share 10 pixels at least (a fourth of smaller tiles), all that cover a pixel count the same;
    "blend": the same tiles, faded into each other by cosines. "official", the released program: tiles begin every
    quarter of a tile, of each only the inner half counts, and these are averaged; the first quarter of the axis is the
    first tile's alone, and its end, which the steps do not meet, that of a tile which ends there.
    """
    if procedure != "official":
        blend = "cosine" if procedure == "blend" else "average"
        overlap = min(PROCEDURE_OVERLAP, tile // 4)
        starts = tile_starts(length, tile, overlap)
        weights = blend_weights(length * scale, tile * scale, overlap * scale, blend, [s * scale for s in starts])
        return list(zip(starts, weights, strict=True))
    step = tile // 4
    starts = list(range(0, length - tile + 1, step))
    top, end = step * scale, official_end(length, tile, scale)
    votes = {start: torch.zeros(length * scale) for start in [*starts, length - tile]}
    for start in starts:
        votes[start][(start + step) * scale : (start + tile - step) * scale] = 1
    for start, vote in votes.items():
        vote[:top], vote[end:] = float(start == 0), float(start == length - tile)
    total = sum(votes.values())
    return [
        (start, (vote / total)[start * scale : (start + tile) * scale].contiguous()) for start, vote in votes.items()
    ]


def official_end(length: int, tile: int, scale: int) -> int:
    """Where, in the output, the part begins that "official" gives to the last tile alone."""
    rest = (length - tile) % (tile // 4)
    return (length - rest) * scale - (tile - rest) * scale // 2


def largest_tile(memory: Memory | None, available: int, batch: int = 1, fused: bool = False) -> int:
    """The largest square tile, at least 128, for a forward pass that takes so much memory.

    Half of the ``available`` bytes may be taken. 512 where the memory is not known.
    """
    if memory is None:
        return DEFAULT_TILE
    size = memory.per_pixel_fused if fused else memory.per_pixel
    return max(math.isqrt(available // (2 * size * max(batch, 1))), SMALLEST_AUTO_TILE)


def tile_limit(config: object, available: int, batch: int = 1, fused: bool = False) -> int:
    """:func:`largest_tile` of a U-shaped model by the ``width`` of its config; 512 for a config without one."""
    width = getattr(config, "width", None)
    return largest_tile(None if width is None else Memory.of_width(width), available, batch, fused)


def available_memory(device: torch.device) -> int:
    """Bytes free on ``device``: of a GPU as its driver says, else of this machine within its control groups' limits."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:  # not Linux
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    kilobytes = next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    return min([1024 * kilobytes, *control_group_rooms()])


def control_group_rooms(root: Path = Path("/")) -> list[int]:
    """Bytes left under each memory limit of this process's control groups (version 1 or 2); file cache is free."""
    try:
        groups = [line.split(":", 2) for line in (root / "proc/self/cgroup").read_text().splitlines()]
    except OSError:
        return []
    rooms = []
    for _, controllers, group in groups:
        if controllers == "":
            top, names = root / "sys/fs/cgroup", ("memory.max", "memory.current", "inactive_file")
        elif controllers == "memory":
            top = root / "sys/fs/cgroup/memory"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        own = top / group.lstrip("/")
        for folder in (own, *own.parents):  # a limit holds for all groups below it
            if folder.is_relative_to(top):
                rooms += _room(folder, *names)
    return rooms


def _room(folder: Path, limit: str, used: str, cached: str) -> list[int]:
    try:
        statistics = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        room = int((folder / limit).read_text()) - int((folder / used).read_text()) + int(statistics[cached])
    except (OSError, ValueError, KeyError):  # the group is not visible here, or its limit is "max"
        return []
    return [max(room, 0)]
