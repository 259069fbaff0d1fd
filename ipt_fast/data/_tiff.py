"""Reading TIFF files: by tifffile, or by Pillow where that is known to be right. Their tags are read in _tiff_tags.

Gray of any depth and either direction, RGB and palettes are read, with one channel of alpha or of unknown meaning.
Depths up to 8 bits become 8, others up to 16 become 16.
"""

import contextlib
import dataclasses
import logging
from collections.abc import Iterator
from types import ModuleType
from typing import Any, BinaryIO

import numpy as np
import PIL.Image

from ._image import Block, Image
from ._tiff_tags import ALPHA_KINDS, SUB_DIRECTORIES, described

SIGNATURES = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
MISSING = "TIFF of 16 bits, and of kinds that Pillow reads wrongly, need tifffile: pip install ipt-fast[io]"

_WHITE_IS_ZERO, _RGB, _PALETTE, _YCBCR, _JPEG = 0, 2, 3, 6, 7
_COLOURS = {0: 1, 1: 1, 2: 3, 3: 1, 6: 3}  # samples of a pixel, by photometric interpretation
_OTHER_COLOURS = {4: "a mask", 5: "CMYK", 6: "YCbCr", 8: "Lab", 9: "Lab", 10: "Lab", 32803: "a raw photo"}
_SAMPLE_FORMATS = {2: "signed integers", 3: "floating point", 5: "complex numbers", 6: "complex numbers"}
_LARGEST_TILE = 1 << 24  # pixels, of a small image; larger ones are made to fill the memory
_REDUCED = 1  # a bit of NewSubfileType
_PILLOW_COMPRESSIONS = (1, 5, 8, 32773, 32946)  # none, LZW, deflate, PackBits

logging.getLogger("tifffile").addHandler(logging.NullHandler())  # or Python prints what it logs about damage


def read_header(file: BinaryIO) -> tuple[int, int, np.dtype]:
    """Height and width as they are stored, and the dtype that the pixels will have.

    Raises:
        ValueError: of a kind that is not read.
        ImportError: it takes tifffile, which is not installed.
    """
    if _import_tifffile() is None:
        with _opened_by_pillow(file) as image:
            return image.height, image.width, np.dtype(np.uint8)
    with _opened(file) as page:
        return page.imagelength, page.imagewidth, _dtype(page)


def read(file: BinaryIO) -> Image:
    """The one picture of a file, upright, with what describes it.

    Raises:
        ValueError: of a kind that is not read, or damaged.
        ImportError: it takes tifffile, which is not installed.
    """
    if _import_tifffile() is None:
        with _opened_by_pillow(file) as image:
            channels = np.array(image).reshape(image.height, image.width, -1)
            colours = channels.shape[2] - ("A" in image.mode)
            alpha = channels[:, :, colours] if colours < channels.shape[2] else None
            return described(file, None, Image(channels[:, :, :colours], alpha))
    with _opened(file) as page:
        image = _decode(page)
        if page.subifds or len(page.parent.pages) > 1:
            image = dataclasses.replace(image, blocks=(*image.blocks, Block("", "smaller pictures")))
        return described(file, page.offset, image)


def _import_tifffile() -> ModuleType | None:
    try:
        import imagecodecs  # noqa: F401  # decodes what tifffile reads
        import tifffile
    except ImportError:
        return None
    return tifffile


# --- by tifffile


@contextlib.contextmanager
def _opened(file: BinaryIO) -> Iterator[Any]:
    """The one page of a file, if its pixels are of a kind that is read."""
    tifffile = _import_tifffile()
    assert tifffile is not None
    file.seek(0)
    with contextlib.ExitStack() as stack:
        with _naming_damage():
            tiff = stack.enter_context(tifffile.TiffFile(file))
            pages = [page for page in tiff.pages if not page.subfiletype & _REDUCED]
            inside = [each for page in tiff.pages if page.subifds for each in page.pages or ()]
            others = [each for each in (*tiff.pages, *inside) if each is not pages[0]] if pages else inside
            count = len(pages)
            if tiff.is_imagej:  # which keeps many pictures in one page
                count = max(count, int((tiff.imagej_metadata or {}).get("images", 1)))
            if tiff.is_shaped and any(each.get("truncated") for each in tiff.shaped_metadata or ()):
                count = max(count, 2)
        if not pages:
            raise ValueError(f"it must have a page that is not marked as a smaller copy; got {_larger(inside)}")
        if count != 1:
            raise ValueError(f"it must have one frame or page; got {count}")
        page = pages[0]
        if any(each.imagewidth * each.imagelength > page.imagewidth * page.imagelength for each in others):
            size = f"{page.imagewidth} x {page.imagelength}"
            raise ValueError(f"its page must be its largest picture; got {size}, and {_larger(others)}")
        _check_kind(page)
        yield pages[0]


def _larger(others: list[Any]) -> str:
    """What a sentence says of the pictures that stand beside or inside of the pages."""
    sizes = [(each.imagewidth * each.imagelength, each) for each in others]
    if not sizes:
        return "none"
    largest = max(sizes, key=lambda each: each[0])[1]
    return f"one of {largest.imagewidth} x {largest.imagelength} beside it or in a SubIFD"


@contextlib.contextmanager
def _naming_damage() -> Iterator[None]:
    """What tifffile and its codecs raise about damage, and about what they do not read, becomes a ValueError."""
    try:
        yield
    except (RuntimeError, ArithmeticError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"it is damaged, or stored in a way that is not read ({error})") from error


def _check_kind(page: Any) -> None:
    if 0 in (page.imagewidth, page.imagelength):
        raise ValueError(f"it must have at least one pixel; got {page.imagewidth} x {page.imagelength}")
    if page.imagedepth != 1:
        raise ValueError(f"it must have one layer of pixels; got {page.imagedepth}")
    kind = int(page.photometric) if 262 in page.tags else -1
    if kind not in _COLOURS or (kind == _YCBCR and page.compression != _JPEG):
        name = _OTHER_COLOURS.get(kind, f"photometric interpretation {kind}" if kind >= 0 else "none named")
        raise ValueError(f"its colours must be gray, RGB or a palette; got {name}")
    bits = page.bitspersample
    if page.sampleformat in _SAMPLE_FORMATS or not isinstance(bits, int) or not 1 <= bits <= 16:
        got = _SAMPLE_FORMATS.get(page.sampleformat, f"{bits} bits")
        raise ValueError(f"its channels must be unsigned integers, all of the same depth, of 1 to 16 bits; got {got}")
    shape = np.shape(page.colormap) if kind == _PALETTE and page.colormap is not None else ()
    if kind == _PALETTE and shape != (3, 1 << bits):
        got = " x ".join(map(str, shape)) or "none"
        raise ValueError(f"its palette must have 3 x {1 << bits} numbers; got {got}")
    if page.is_tiled and page.tilewidth * page.tilelength > max(_LARGEST_TILE, 4 * page.imagewidth * page.imagelength):
        raise ValueError(f"its tiles must be about as large as it or less; got {page.tilewidth} x {page.tilelength}")
    extras = page.samplesperpixel - _COLOURS[kind]
    if extras not in (0, 1):
        name = {_RGB: "RGB", _PALETTE: "a palette", _YCBCR: "YCbCr"}.get(kind, "gray")
        raise ValueError(f"{name} must have {_COLOURS[kind]} channels and at most one more; got {page.samplesperpixel}")
    if kind == _YCBCR and extras:
        raise ValueError("YCbCr must have 3 channels; got 4")
    if kind == _WHITE_IS_ZERO and extras and _alpha_kind(page) == "associated":
        raise ValueError("associated alpha must come with colours in which black is zero; got white is zero")


def _dtype(page: Any) -> np.dtype:
    deep = page.bitspersample > 8
    if page.photometric == _PALETTE:
        deep = deep or not _has_8_bits(page.colormap)
    return np.dtype(np.uint16 if deep else np.uint8)


def _has_8_bits(colours: np.ndarray) -> bool:
    """Whether a palette of 16 bits holds only what 8 bits do, in either of the ways that programs write it."""
    return bool(colours.max() < 256 or not (colours % 257).any() or not (colours % 256).any())


def _alpha_kind(page: Any) -> str:
    number = int(page.extrasamples[0]) if page.extrasamples else 0
    return ALPHA_KINDS[number] if number < len(ALPHA_KINDS) else "unspecified"


def _decode(page: Any) -> Image:
    dtype, kind = _dtype(page), page.photometric
    samples = _samples(page)
    colours = _COLOURS[kind]
    if kind == _PALETTE:
        pixels = _palette(page, dtype)[samples[:, :, 0]]
    else:
        pixels = _scaled(samples[:, :, :colours], page.bitspersample, dtype)
    if kind == _WHITE_IS_ZERO:
        pixels = np.iinfo(dtype).max - pixels
    if samples.shape[2] == colours:
        return Image(pixels)
    image = Image(pixels, _scaled(samples[:, :, colours], page.bitspersample, dtype), alpha_kind=_alpha_kind(page))
    return image if image.alpha_kind != "associated" else _divided_by_alpha(image)


def _samples(page: Any) -> np.ndarray:
    """(H, W, samples) as they are stored; every strip or tile must be there, as tifffile fills in what is not."""
    with _naming_damage():
        size, segments = page.parent.filehandle.size, int(np.prod(page.chunked))
    places = list(zip(page.dataoffsets, page.databytecounts, strict=False))
    if len(places) < segments and not page.is_contiguous:
        raise ValueError(f"it must have {segments} strips or tiles; got {len(places)}")
    if any(not start or not length or start + length > size for start, length in places):
        raise ValueError("it must have all its strips or tiles; got a damaged or truncated file")
    with _naming_damage():
        samples = page.asarray(squeeze=False)  # (samples apart, depth, height, width, samples together)
    return np.moveaxis(samples[:, 0], 0, -1).reshape(page.imagelength, page.imagewidth, -1)


def _scaled(samples: np.ndarray, bits: int, dtype: np.dtype) -> np.ndarray:
    """Samples of a depth as those of a dtype: black stays black and white becomes white."""
    top, white = np.iinfo(dtype).max, (1 << bits) - 1
    if top == white:
        return np.ascontiguousarray(samples, dtype)
    values = np.arange(white + 1, dtype=np.uint32)
    return ((values * top + white // 2) // white).astype(dtype)[samples.astype(np.uint16)]


def _palette(page: Any, dtype: np.dtype) -> np.ndarray:
    """(colours, 3)."""
    colours = np.ascontiguousarray(page.colormap.T)
    if dtype == np.uint8 and colours.max() > 255:
        colours = colours >> 8
    return colours.astype(dtype)


def _divided_by_alpha(image: Image) -> Image:
    """The same picture with colours that are not multiplied by its alpha."""
    assert image.alpha is not None
    alpha = image.alpha[:, :, None].astype(np.uint32)
    top = np.iinfo(image.pixels.dtype).max
    colours = (image.pixels.astype(np.uint32) * np.uint32(top) + alpha // 2) // np.maximum(alpha, 1)
    blocks = (Block("", "colours brighter than their associated alpha"),) if (image.pixels > alpha).any() else ()
    pixels = np.where(alpha, np.minimum(colours, top), 0).astype(image.pixels.dtype)
    return Image(pixels, image.alpha, alpha_kind=image.alpha_kind, blocks=blocks)


# --- by Pillow


@contextlib.contextmanager
def _opened_by_pillow(file: BinaryIO) -> Iterator[Any]:
    """Where Pillow reads a file rightly: 8 bits a channel, black is zero, in usual compressions."""
    file.seek(0)
    try:
        image: Any = PIL.Image.open(file, formats=["TIFF"])
    except PIL.UnidentifiedImageError as error:
        raise ImportError(MISSING) from error
    with image:
        if image.n_frames > 1:
            raise ValueError(f"it must have one frame or page; got {image.n_frames}")
        tags = image.tag_v2
        known = (
            image.mode in ("L", "RGB", "RGBA", "LA")
            and set(tags.get(258, (1,))) == {8}
            and tags.get(262) in (1, 2)
            and tags.get(259, 1) in _PILLOW_COMPRESSIONS
            and tags.get(284, 1) == 1
            and tags.get(266, 1) == 1
            and tags.get(317, 1) in (1, 2)
            and set(tags.get(339, (1,))) == {1}
            and tags.get(338, ()) in ((), (2,))
            and ("A" in image.mode) == (338 in tags)
            and SUB_DIRECTORIES not in tags
        )
        if not known:
            raise ImportError(MISSING)
        yield image
