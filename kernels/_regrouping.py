"""Groups of pixels that are not windows beside each other, each copied to an image of its own: dilated, overlapping.

A copy there and a copy back, so 2 C values a pixel more of every map, as many times as groups cover the pixel.
"""

import dataclasses

import torch

from ._launch import cdiv


@dataclasses.dataclass(frozen=True)
class Regrouping:
    """``slices``: rows and columns of each group; ``size``: of the images, filled with zeros, that they become."""

    slices: list
    size: tuple

    def apart(self, x):
        """A channels-last map (B, C, H, W) as (B * groups, C, rows, columns)."""
        batch, channels, _, _ = x.shape
        parts = x.new_zeros(batch, len(self.slices), *self.size, channels)
        for i, part in enumerate(self._parts_of(x)):
            parts[:, i, : part.shape[1], : part.shape[2]] = part
        return parts.flatten(0, 1).permute(0, 3, 1, 2)

    def joined(self, parts, x):
        """The inverse, in fp32 and with the size of ``x``: sums, where groups overlap."""
        total = torch.zeros(len(x), *x.shape[2:], parts.shape[1], device=x.device).permute(0, 3, 1, 2)
        groups = parts.permute(0, 2, 3, 1).unflatten(0, (len(x), len(self.slices)))
        for i, part in enumerate(self._parts_of(total)):
            part += groups[:, i, : part.shape[1], : part.shape[2]]
        return total

    def counts(self, x):
        """How many groups each pixel of ``x`` is in, (1, 1, H, W) in fp32."""
        ones = torch.ones(len(self.slices), 1, *self.size, device=x.device)
        return self.joined(ones, x[:1])

    def _parts_of(self, x):
        pixels = x.permute(0, 2, 3, 1)
        return [pixels[:, rows, columns] for rows, columns in self.slices]


def _evenly(size, window):
    """As few windows as cover an axis, spread evenly; the last one ends with it."""
    window = min(size, window)
    count = cdiv(size, window)
    step = cdiv(size - window, count - 1) if count > 1 else 1
    return [slice(min(i * step, size - window), min(i * step, size - window) + window) for i in range(count)]


def regrouping_of(x, window, dilation, overlapping):
    """The `Regrouping` of a map, or None where groups are the whole image or windows beside each other."""
    sizes = x.shape[2:]
    if dilation is not None:
        axes = [[slice(i, size, dilation) for i in range(min(size, dilation))] for size in sizes]
        size = tuple(cdiv(each, dilation) for each in sizes)
    elif overlapping:
        axes = [_evenly(*axis) for axis in zip(sizes, window, strict=True)]
        size = tuple(map(min, sizes, window))
    else:
        return None
    return Regrouping([(rows, columns) for rows in axes[0] for columns in axes[1]], size)
