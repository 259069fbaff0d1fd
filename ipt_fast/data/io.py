"""Image files in and out, of 8 or 16 bits per channel, with alpha and with what describes the photo.

The pixels come upright: the EXIF orientation is applied on reading, and what the file says of orientation and size is
kept true. Gray stays gray and colour stays colour; a palette becomes RGB or RGBA, 1 bit becomes 8-bit gray. ICC
profile, EXIF, XMP, IPTC, resolution, PNG's chunks and JPEG's comment are kept where the format written holds them, and
named in a warning where it does not. Pillow alone would read 16-bit colour as 8 bit without a word, so the depth is
taken from the file's own header first; TIFFs and 16-bit PNGs are decoded by tifffile and imagecodecs.
"""

import contextlib
import dataclasses
import struct
import threading
import warnings
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
import PIL.Image
import PIL.ImageFile
from PIL import PngImagePlugin

from .._files import atomic_write, check_name
from . import _metadata, _png, _tiff, _tiff_tags
from ._hidden import fill_hidden as fill_hidden
from ._image import Block as Block
from ._image import Image, turned_upright
from ._metadata import info_of_pil as info_of_pil
from .files import IMAGE_SUFFIXES as IMAGE_SUFFIXES  # they were defined here once
from .files import WHOLE, Part, open_part
from .files import is_image_file as is_image_file
from .formats import READ_FORMATS, WRITTEN_SUFFIXES, check_depth, kind_of

SIXTEEN_BIT_SUFFIXES = (".png", ".tif", ".tiff")
ALPHA_SUFFIXES = (".png", ".tif", ".tiff", ".webp")
TIFF_SUFFIXES = (".tif", ".tiff")

_MODES = {"1": "L", "L": "L", "LA": "LA", "RGB": "RGB", "RGBA": "RGBA", "P": "RGB", "PA": "RGBA"}
# What Pillow and the codecs raise about damage; a missing package is told apart.
_CODEC_ERRORS = (RuntimeError, SyntaxError, EOFError, LookupError, TypeError, AttributeError, ArithmeticError,
                 AssertionError, struct.error, zlib.error)  # fmt: skip
_LONGEST_SIDES = {"PNG": 2**31 - 1, "JPEG": 65500, "WEBP": 16383, "BMP": 2**31 - 1}
_limit_lock = threading.Lock()
_BMP_BYTES = 2**32 - 2048  # that its header can count, less its palette


def read_header(path: str | Path, max_pixels: int | None = None, *, part: Part = WHOLE) -> tuple[int, int, np.dtype]:
    """Height and width as they are stored, not yet upright, and the dtype of the pixels; nothing is decoded.

    Args:
        path, max_pixels, part: as of :func:`read_image`.

    Raises:
        ValueError, ImportError: as ``read_image``, as far as the header shows it.
    """
    _check_limit(max_pixels)
    with _naming(path, part), open_part(path, part) as file:
        if _is_tiff(file):
            return _tiff_header(file, max_pixels)
        with _opened(file, max_pixels) as image:
            if _is_16_bit(file, image):
                return image.height, image.width, np.dtype(np.uint16)
            _check_mode(image)
            return image.height, image.width, np.dtype(np.uint8)


def read_image(path: str | Path, max_pixels: int | None = None, *, part: Part = WHOLE) -> Image:
    """Read a file of one of :data:`ipt_fast.data.formats.READ_FORMATS`: 8 bits per channel, or 16 of PNG and TIFF.

    A TIFF may have any depth from 1 bit, which becomes 8 or 16 bits; associated alpha is divided out of the colours.

    Args:
        path: the file.
        max_pixels: how many pixels it may have at most, against files that are made to fill the memory. By default
            Pillow's limit, which is twice ``PIL.Image.MAX_IMAGE_PIXELS``.
        part: the image's first byte in the file and the number of its bytes, such as in a tar archive; all of it by
            default.

    Raises:
        ValueError: the file is missing, no image, damaged, an animation or of several pages, has too many pixels, or is
            of a kind that is not restored (CMYK, Lab, floating point).
        ImportError: it takes tifffile or imagecodecs, and they are not installed.
    """
    _check_limit(max_pixels)
    with _naming(path, part), open_part(path, part) as file:
        return _read(file, max_pixels)


def with_channels(image: Image, channels: int) -> np.ndarray:
    """The pixels of an image, without alpha, as contiguous (H, W, channels) of their own dtype.

    ``channels`` is 1 or 3: gray becomes three equal channels, colour becomes its ITU-R 601-2 luma.
    """
    pixels = image.pixels
    if pixels.shape[2] == channels:
        return np.ascontiguousarray(pixels)
    if channels == 3:
        return np.repeat(pixels, 3, axis=2)
    red, green, blue = np.moveaxis(pixels.astype(np.uint32), 2, 0)
    luma = (19595 * red + 38470 * green + 7471 * blue + 0x8000) >> 16  # as Pillow rounds it
    return luma.astype(pixels.dtype)[..., None]


def write_image(path: str | Path, image: Image) -> None:
    """Write ``image`` to ``path`` atomically, in the format of the suffix.

    16 bit goes to PNG and TIFF only and is never reduced to 8. JPEG is written at quality 95 with full chroma, WebP
    lossless, TIFF with deflate. Metadata that the format cannot hold is dropped with a UserWarning that names it.

    Raises:
        ValueError: as :func:`check_writable_as`.
        ImportError: a PNG of 16 bits, and imagecodecs is not installed.
        OSError: the file cannot be written.
    """
    path = Path(path)
    check_writable_as(path, image)
    format = _format_of(path)
    image, dropped = _metadata.held_by(format, _metadata.with_size(image))
    if dropped:
        warnings.warn(f"not kept in a {format} file: {', '.join(dropped)}", stacklevel=2)
    with atomic_write(path) as temporary, temporary.open("wb") as file:
        try:
            if format == "TIFF":
                _tiff_tags.write(file, image)
            elif format == "PNG":
                _png.write(file, image)
            else:
                to_pil(image).save(file, format, **_metadata.pillow_options(format, image))
        except _CODEC_ERRORS as error:
            raise ValueError(f"cannot write image {path}: {error}") from error


def check_suffix(path: Path) -> None:
    """Raise ValueError unless the suffix of ``path`` names a format that is written."""
    if path.suffix.lower() not in WRITTEN_SUFFIXES:
        raise ValueError(f"path must end in {', '.join(WRITTEN_SUFFIXES)}; got {path}")


def check_writable_as(path: Path, image: Image, scale: int = 1) -> None:
    """Raise ValueError unless ``path`` can be written with ``image`` made ``scale`` times larger.

    Its format must hold the depth, the channels and the size, and the file system the length of the name.
    """
    check_suffix(path)
    check_name(path)
    suffix = path.suffix.lower()
    if image.pixels.dtype == np.uint16 and suffix not in SIXTEEN_BIT_SUFFIXES:
        raise ValueError(f"path must end in {', '.join(SIXTEEN_BIT_SUFFIXES)} for an image of 16 bits; got {path}")
    if image.alpha is not None and suffix not in ALPHA_SUFFIXES:
        raise ValueError(f"path must end in {', '.join(ALPHA_SUFFIXES)} for an image with alpha; got {path}")
    if image.alpha is not None and image.alpha_kind == "unspecified" and suffix not in TIFF_SUFFIXES:
        suffixes = ", ".join(TIFF_SUFFIXES)
        raise ValueError(f"path must end in {suffixes} for an image with a channel of unspecified meaning; got {path}")
    height, width, channels = image.pixels.shape
    longest, format = scale * max(height, width), _format_of(path)
    if longest > _LONGEST_SIDES.get(format, longest) or (
        format == "BMP" and scale * height * (scale * width * channels + 3) > _BMP_BYTES
    ):
        fits = sorted({*IMAGE_SUFFIXES} & {".png", *TIFF_SUFFIXES})
        size = f"{scale * width} x {scale * height} pixels"
        raise ValueError(f"path must end in {', '.join(fits)} for an image of {size}; got {path}")


def from_pil(image: PIL.Image.Image, *, upright: bool = False) -> Image:
    """The 8-bit pixels of a Pillow image: mode L, LA, RGB or RGBA as it is, 1 as gray, P as RGB or RGBA.

    ``upright=True`` applies the EXIF orientation. Raises ValueError for every other mode.
    """
    _check_mode(image)
    if 0 in image.size:
        raise ValueError(f"image must have at least one pixel; got {image.width} x {image.height}")
    mode = _MODES[image.mode]
    if "transparency" in image.info and mode in ("L", "RGB"):
        mode = {"L": "LA", "RGB": "RGBA"}[mode]
    converted = image.convert("L") if image.mode == "1" else image
    converted = converted if converted.mode == mode else converted.convert(mode)  # which would copy
    channels = np.array(converted).reshape(image.height, image.width, -1)
    return _described(image, channels, upright)


def to_pil(image: Image) -> PIL.Image.Image:
    """The Pillow image (mode L, LA, RGB or RGBA) of an 8-bit ``image``, without metadata."""
    channels = image.channels
    return PIL.Image.fromarray(channels[:, :, 0] if channels.shape[2] == 1 else channels)


@contextlib.contextmanager
def _naming(name: str | Path, part: Part = WHOLE) -> Iterator[None]:
    """Whatever goes wrong with an image file becomes a ValueError that names it."""
    name = f"{name}, at byte {part[0]}" if part[0] else name
    try:
        yield
    except (OSError, ValueError, *_CODEC_ERRORS) as error:
        raise ValueError(f"cannot read image {name}: {error}") from error
    except ImportError as error:
        raise ImportError(f"cannot read image {name}: {error}") from error


def _read(file: BinaryIO, max_pixels: int | None = None) -> Image:
    if _is_tiff(file):
        _tiff_header(file, max_pixels)
        return _tiff.read(file)
    with _opened(file, max_pixels) as image:
        if image.format == "PNG":
            _png.correct_transparent_gray(file, image)
            if _png.has_late_text(file):
                with _pillow_limits():
                    image.load()
        if not _is_16_bit(file, image):
            read = from_pil(image, upright=True)
        else:
            read = _described(image, _png.decode(file), upright=True)
        if image.format == "BMP":
            return dataclasses.replace(read, icc_profile=_bmp_profile(file))
        blocks = _png.blocks(file) if image.format == "PNG" else _metadata.blocks_of_jpeg(image)
        return dataclasses.replace(read, blocks=(*read.blocks, *blocks))


@contextlib.contextmanager
def _opened(file: BinaryIO, max_pixels: int | None) -> Iterator[PIL.ImageFile.ImageFile]:
    """The Pillow image of a file, not yet decoded."""
    try:
        with _pillow_limits():
            image = PIL.Image.open(file, formats=[name for name in READ_FORMATS if name in PIL.Image.OPEN])
    except PIL.UnidentifiedImageError as error:  # whose text has the address of an object
        kinds = ", ".join(READ_FORMATS)
        raise ValueError(f"it must be one of {kinds}; got a file that is {kind_of(file)}") from error
    with image:
        check_depth(file, image)
        _check_size(image.height, image.width, max_pixels)
        # The second picture of an MPO file is a phone's preview or stereo half, not a frame.
        frames = getattr(image, "n_frames", 1)
        if frames > 1 and image.format != "MPO":
            raise ValueError(f"it must have one frame or page; got {frames}")
        yield image


@contextlib.contextmanager
def _pillow_limits() -> Iterator[None]:
    """Leave the number of pixels to ``max_pixels``, and allow large profiles and texts in PNG files.

    Pillow's limits are those of the whole process.
    """
    with _limit_lock:
        limits = PIL.Image.MAX_IMAGE_PIXELS, PngImagePlugin.MAX_TEXT_CHUNK
        PIL.Image.MAX_IMAGE_PIXELS, PngImagePlugin.MAX_TEXT_CHUNK = None, _metadata.TEXT_BYTES
        try:
            yield
        finally:
            PIL.Image.MAX_IMAGE_PIXELS, PngImagePlugin.MAX_TEXT_CHUNK = limits


def _is_tiff(file: BinaryIO) -> bool:
    file.seek(0)
    return file.read(4) in _tiff.SIGNATURES


def _tiff_header(file: BinaryIO, max_pixels: int | None) -> tuple[int, int, np.dtype]:
    height, width, dtype = _tiff.read_header(file)
    _check_size(height, width, max_pixels)
    return height, width, dtype


def _check_limit(max_pixels: int | None) -> None:
    if max_pixels is not None and max_pixels < 1:
        raise ValueError(f"max_pixels must be None or at least 1; got {max_pixels}")


def _check_size(height: int, width: int, max_pixels: int | None) -> None:
    limit = max_pixels
    if limit is None and PIL.Image.MAX_IMAGE_PIXELS is not None:
        limit = 2 * PIL.Image.MAX_IMAGE_PIXELS
    if limit is not None and height * width > limit:
        raise ValueError(f"it must have at most max_pixels = {limit} pixels; got {width} x {height}")


def _check_mode(image: PIL.Image.Image) -> None:
    if image.mode not in _MODES:
        raise ValueError(f"its mode must be {', '.join(_MODES)}, or 16-bit gray, RGB or RGBA; got {image.mode}")


def _is_16_bit(file: BinaryIO, image: PIL.ImageFile.ImageFile) -> bool:
    return image.format == "PNG" and _png.is_16_bit(file)


def _bmp_profile(file: BinaryIO) -> bytes | None:
    file.seek(0)
    found = _metadata.bmp_profile(file.read(138))
    if found is None:
        return None
    file.seek(found[0])
    return file.read(found[1])


def _format_of(path: Path) -> str:
    """Pillow's name of the format that a suffix stands for."""
    return PIL.Image.registered_extensions()[path.suffix.lower()]


def _described(image: PIL.Image.Image, channels: np.ndarray, upright: bool) -> Image:
    """(H, W, 1 to 4), as they are stored in ``image``, with its metadata."""
    orientation, metadata = _metadata.of_pil(image, upright)
    colours = 3 if channels.shape[2] > 2 else 1
    alpha = turned_upright(channels[:, :, colours], orientation) if channels.shape[2] > colours else None
    pixels = turned_upright(channels[:, :, :colours], orientation)
    return _metadata.with_size(dataclasses.replace(metadata, pixels=pixels, alpha=alpha))
