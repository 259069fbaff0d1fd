"""What an image file holds, whatever its format."""

import dataclasses

import numpy as np

ALPHA_KINDS = ("unassociated", "associated", "unspecified")


@dataclasses.dataclass(frozen=True)
class Block:
    """Metadata that only one format holds.

    Attributes:
        format: Pillow's name of the format, or "" where no result can hold it, as it would no longer be true.
        name: what a warning calls it; of a PNG the chunk's.
        data: as the format stores it.
    """

    format: str
    name: str
    data: bytes = b""


@dataclasses.dataclass(frozen=True)
class Image:
    """One upright image and what its file carried.

    Attributes:
        pixels: (H, W, C) uint8 or uint16, C = 1 (gray) or 3 (RGB). They are not multiplied by alpha, whatever its kind.
        alpha: (H, W) of the same dtype, or None.
        icc_profile: the embedded colour profile, or None.
        exif: the EXIF block (starting with ``Exif\\0\\0``) of an upright image, without a thumbnail, or None.
        xmp: the XMP packet, or None.
        iptc: the IPTC record, or None.
        resolution: pixels per inch (across, down), or None.
        alpha_kind: how a TIFF stores ``alpha``: "unassociated"; "associated", with colours multiplied by it; or
            "unspecified", a channel that is kept but does not say what is visible.
        blocks: metadata that only the file's own format holds, or none.
    """

    pixels: np.ndarray
    alpha: np.ndarray | None = None
    icc_profile: bytes | None = None
    exif: bytes | None = None
    xmp: bytes | None = None
    iptc: bytes | None = None
    resolution: tuple[float, float] | None = None
    alpha_kind: str = "unassociated"
    blocks: tuple[Block, ...] = ()

    @property
    def channels(self) -> np.ndarray:
        """Pixels and alpha in one array (H, W, C or C + 1)."""
        return self.pixels if self.alpha is None else np.dstack([self.pixels, self.alpha])


def usable_resolution(across: float, down: float) -> tuple[float, float] | None:
    """Two numbers of a file as a resolution in pixels per inch; None where they cannot be one."""
    return (across, down) if 0 < across < 1e6 and 0 < down < 1e6 else None


def turned_upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """(H, W, ...) as an EXIF orientation (1 to 8) says that it is to be shown."""
    if orientation in (3, 4, 6, 7):
        pixels = pixels[::-1]
    if orientation in (2, 3, 7, 8):
        pixels = pixels[:, ::-1]
    return np.ascontiguousarray(pixels.swapaxes(0, 1) if orientation in (5, 6, 7, 8) else pixels)
