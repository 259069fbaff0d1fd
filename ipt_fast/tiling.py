"""Where tiles lie, how they are blended, and how much memory one takes: pure functions."""

import math
import os
from pathlib import Path

import torch

BLENDS = ("cosine", "average")


def count_tiles(length: int, tile: int, overlap: int) -> int:
    """The least number of tiles that cover ``length`` with neighbours overlapping by at least ``overlap``."""
    return 1 if length <= tile else math.ceil((length - overlap) / (tile - overlap))


def tile_starts(length: int, tile: int, overlap: int) -> list[int]:
    """Where the tiles of one axis begin: every tile full and inside the image, spread evenly.

    One tile at 0 where ``length <= tile``. Spreading evenly gives all seams the same overlap, at the same cost as moving only
    the last tile back.
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


def blend_weights(length: int, tile: int, overlap: int, blend: str) -> list[torch.Tensor]:
    """The weight of each tile along one axis: (tile,) float32 each, positive, summing to one at every pixel.

    "cosine" raises each tile from its inner edges over ``overlap`` pixels with half a period of a cosine; "average" gives
    all tiles that cover a pixel the same weight. The weight of a tile in the plane is the outer product of its two axes.
    """
    starts = tile_starts(length, tile, overlap)
    size = min(tile, length)
    ramp = 0.5 - 0.5 * torch.cos(math.pi * (torch.arange(overlap) + 0.5) / max(overlap, 1))
    windows = [torch.ones(size) for _ in starts]
    if blend == "cosine":
        for window in windows[1:]:
            window[:overlap] *= ramp
        for window in windows[:-1]:
            window[size - overlap :] *= ramp.flip(0)
    total = torch.zeros(length)
    for start, window in zip(starts, windows):
        total[start : start + size] += window
    return [window / total[start : start + size] for start, window in zip(starts, windows)]


def available_memory(device: torch.device) -> int:
    """Bytes that can be taken on ``device`` now: of a GPU as the driver says, else of this machine or control group."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    try:
        fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        available = 1024 * int(fields["MemAvailable"].split()[0])
    except OSError:  # not Linux
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    return min([available, *_control_group_rooms()])


def _control_group_rooms():
    for limit, used in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        try:
            room = [int(Path("/sys/fs/cgroup", name).read_text()) for name in (limit, used)]
        except (OSError, ValueError):  # another version of control groups, or "max": no limit
            continue
        yield max(room[0] - room[1], 0)
