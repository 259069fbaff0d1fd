"""Which tiles an image is cut into. A tile is a rectangle of the image that the model sees in one piece."""

import dataclasses
from typing import NamedTuple

from torch import Tensor

from ..tiling import blend_weights, procedure_tiles, tile_starts

SMALLEST_RETRY = 128


class Span(NamedTuple):
    """One axis of a tile: its first pixel in the image, and a weight for each pixel of its output."""

    start: int
    weights: Tensor


@dataclasses.dataclass(frozen=True)
class Plan:
    """The tiles of an image: every row with every column. Where tiles overlap their weights add up to 1."""

    rows: list[Span]
    columns: list[Span]


@dataclasses.dataclass(frozen=True)
class TileSize:
    """Height and width of all tiles of an image, at most its own, and the pixels that neighbours share at least."""

    height: int
    width: int
    overlap: int

    def plan(self, height: int, width: int, blend: str, scale: int = 1) -> Plan:
        """The tiles of an image of ``height`` x ``width`` pixels, spread evenly; their output is ``scale`` larger."""

        def axis(length: int, tile: int) -> list[Span]:
            starts = tile_starts(length, tile, self.overlap)
            places = [start * scale for start in starts]
            weights = blend_weights(length * scale, tile * scale, self.overlap * scale, blend, places)
            return [Span(*span) for span in zip(starts, weights, strict=True)]

        return Plan(axis(height, self.height), axis(width, self.width))

    def halved(self) -> "TileSize | None":
        """Half the larger side, and the other at most that; no side below 128 that was not. None: it cannot be less."""
        limit = max(max(self.height, self.width) // 2, SMALLEST_RETRY)
        height, width = min(self.height, limit), min(self.width, limit)
        if (height, width) == (self.height, self.width):
            return None
        return TileSize(height, width, min(self.overlap, max(height, width) // 2))

    def __str__(self) -> str:
        return f"{self.height} x {self.width}"


def plan_procedure(procedure: str, height: int, width: int, size: int, scale: int) -> Plan:
    """The tiles for a model whose input is ``size`` x ``size`` pixels, see :func:`ipt_fast.tiling.procedure_tiles`."""
    rows, columns = (
        [Span(*span) for span in procedure_tiles(procedure, length, size, scale)] for length in (height, width)
    )
    return Plan(rows, columns)
