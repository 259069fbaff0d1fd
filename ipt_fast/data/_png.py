"""PNG's chunks, of which Pillow knows only some, and images of 16 bits, which it reads as 8."""

import io
import struct
import zlib
from collections.abc import Iterator
from types import ModuleType
from typing import BinaryIO

import numpy as np
import PIL.Image

from ._image import Block, Image

SIGNATURE = b"\x89PNG\r\n\x1a\n"
# What the numbers of the pixels mean.
_COLOUR_CHUNKS = (b"gAMA", b"cHRM", b"sRGB", b"cICP", b"mDCV", b"cLLI")
# The pixels, and what Image holds by other names; the time is that of another file's last change.
_KNOWN_CHUNKS = (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND", b"iCCP", b"eXIf", b"tIME", b"sBIT", b"hIST", b"sPLT")
_XMP_KEYWORD = b"XML:com.adobe.xmp\0"
_OLD_PROFILE = b"Raw profile type "  # text that held EXIF, XMP and IPTC before there were chunks for them
_PER_METRE = 1 / 0.0254  # of a number per inch


def is_16_bit(file: BinaryIO) -> bool:
    """Whether a PNG file has 16 bits per channel."""
    file.seek(0)
    return file.read(25)[24:] == b"\x10"


def correct_transparent_gray(file: BinaryIO, image: PIL.Image.Image) -> None:
    """Scale the transparent gray of an image of 2 or 4 bits as Pillow scales its pixels to 8 bits, but not it."""
    file.seek(0)
    bits, kind = file.read(26)[24:]
    gray = image.info.get("transparency")
    if kind == 0 and bits in (2, 4) and isinstance(gray, int) and gray < 1 << bits:
        image.info["transparency"] = gray * 255 // ((1 << bits) - 1)


def decode(file: BinaryIO) -> np.ndarray:
    """(H, W, 1 to 4) uint16: gray or RGB, and alpha where there is an alpha channel or a transparent colour.

    Raises:
        ImportError: imagecodecs is not installed.
        ValueError: the file is damaged.
    """
    codecs = _import_imagecodecs()
    file.seek(0)
    content = file.read()
    _check_sums(content)
    try:
        channels = codecs.png_decode(content)
    except codecs.PngError as error:
        raise ValueError(f"it is damaged or truncated ({error})") from error
    return channels.reshape(*channels.shape[:2], -1)


def blocks(file: BinaryIO) -> tuple[Block, ...]:
    """The chunks that stay true when the pixels change, by PNG's own rule, and the names of those that do not."""
    found = []
    for name, data in _chunks(file):
        text = name in (b"tEXt", b"zTXt", b"iTXt")
        if name in _KNOWN_CHUNKS or data.startswith(_XMP_KEYWORD) or (name == b"pHYs" and data[8:] == b"\1"):
            continue
        if text and data.startswith(_OLD_PROFILE):
            if not data.startswith((_OLD_PROFILE + b"exif", _OLD_PROFILE + b"APP1")):  # which Pillow reads
                found.append(Block("", data[: data.index(b"\0")].decode("latin-1")))
            continue
        safe = name in _COLOUR_CHUNKS or name[3:].islower()  # the fourth letter says "safe to copy"
        found.append(Block("PNG" if safe else "", name.decode("latin-1"), data))
    return tuple(found)


def write(file: BinaryIO, image: Image) -> None:
    """Write a PNG of 8 or 16 bits, which may be gray with alpha.

    Raises:
        ImportError: it has 16 bits, and imagecodecs is not installed.
    """
    content = _encode(image)
    end = len(SIGNATURE) + 12 + 13  # of IHDR
    file.write(content[:end])
    for name, data in _metadata(image):
        file.write(struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)))
    file.write(memoryview(content)[end:])


def _encode(image: Image) -> bytes:
    channels = np.ascontiguousarray(image.channels)
    if channels.dtype == np.uint16:
        # numpy leaves any stride where a side has one pixel; imagecodecs wants that of a new array.
        return _import_imagecodecs().png_encode(channels.reshape(-1).reshape(channels.shape))
    file = io.BytesIO()
    PIL.Image.fromarray(channels[:, :, 0] if channels.shape[2] == 1 else channels).save(file, "PNG")
    return file.getvalue()


def _metadata(image: Image) -> Iterator[tuple[bytes, bytes]]:
    """The chunks between IHDR and the pixels."""
    if image.icc_profile:
        yield b"iCCP", b"ICC profile\0\0" + zlib.compress(image.icc_profile)
    if image.resolution:
        yield b"pHYs", struct.pack(">IIB", *(round(value * _PER_METRE) for value in image.resolution), 1)
    if image.exif:
        yield b"eXIf", image.exif.removeprefix(b"Exif\0\0")
    if image.xmp:
        yield b"iTXt", _XMP_KEYWORD + b"\0\0\0\0" + image.xmp
    for block in image.blocks:
        if block.format == "PNG":
            yield block.name.encode("latin-1"), block.data


def _chunks(file: BinaryIO) -> Iterator[tuple[bytes, bytes]]:
    """Names and contents, but for the pixels; up to where a damaged file ends."""
    file.seek(len(SIGNATURE))
    while len(head := file.read(8)) == 8:
        length, name = struct.unpack(">I4s", head)
        if name == b"IDAT":
            file.seek(length, io.SEEK_CUR)
            data = b""
        else:
            data = file.read(length)
        file.seek(4, io.SEEK_CUR)
        yield name, data


def has_late_text(file: BinaryIO) -> bool:
    """Whether text, which may be compressed, stands behind the pixels, where Pillow reads it after them."""
    names = [name for name, _ in _chunks(file)]
    return b"IDAT" in names and any(name.endswith(b"Xt") for name in names[names.index(b"IDAT") :])


def _check_sums(content: bytes) -> None:
    """Raise ValueError unless each chunk is what its checksum says; libpng looks at some of them only."""
    place = len(SIGNATURE)
    while place < len(content):
        length, name = struct.unpack_from(">I4s", content, place)
        end = place + 8 + length
        if struct.unpack_from(">I", content, end)[0] != zlib.crc32(memoryview(content)[place + 4 : end]):
            raise ValueError(f"it is damaged or truncated (checksum of {name.decode('latin-1')})")
        place = end + 4


def _import_imagecodecs() -> ModuleType:
    try:
        import imagecodecs
    except ImportError as error:
        raise ImportError("PNG of 16 bits need imagecodecs: pip install ipt-fast[io]") from error
    return imagecodecs
