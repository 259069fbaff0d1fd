"""TIFF's tags: what they tell of a picture, and writing a picture with them."""

import itertools
import struct
import zlib
from collections.abc import Container
from typing import BinaryIO

import numpy as np
import PIL.Image
from PIL.ExifTags import Base

from . import _directory
from ._directory import ASCII, BYTE, LONG, LONG8, RATIONAL, SHORT, UNDEFINED, Directory, Value, name_of, value
from ._exif import upright_xmp, xmp_orientation
from ._image import Block, Image, turned_upright, usable_resolution

ALPHA_KINDS = ("unspecified", "associated", "unassociated")  # by the number that ExtraSamples holds
SUB_DIRECTORIES = 330
_RESOLUTIONS = Base.XResolution, Base.YResolution
_UNIT = Base.ResolutionUnit
_INCHES = {2: 1.0, 3: 1 / 2.54}  # in a unit of resolution, by its number
_DEFLATE = 8
_IPTC_MARK = 0x1C  # with which each entry of a record begins
_STRIP_BYTES = 1 << 20
_PARTS = 10_000  # of a pixel per inch
_CLASSIC_BYTES = 4_000_000_000  # of pixels; a file with more gets offsets of 64 bits

_TEXTS = (
    Base.ImageDescription,
    Base.Make,
    Base.Model,
    Base.Software,
    Base.DateTime,
    Base.Artist,
    Base.HostComputer,
    Base.Copyright,
)
# The types that a value must have to be what its tag says.
_TYPES: dict[int, tuple[int, ...]] = {
    **dict.fromkeys(_TEXTS, (BYTE, ASCII, UNDEFINED)),
    **dict.fromkeys(_RESOLUTIONS, (SHORT, LONG, RATIONAL)),
    _UNIT: (SHORT,),
}
# What describes the photo: also what Windows says of it, and what programs write here that belongs into EXIF.
_PHOTO_TAGS: set[int] = {*_TYPES, Base.WhitePoint, Base.PrimaryChromaticities, Base.Rating, Base.RatingPercent}
_PHOTO_TAGS |= {*range(Base.XPTitle, Base.XPSubject + 1), Base.ExposureTime, Base.FNumber, *range(0x8822, 0x8836)}
_PHOTO_TAGS |= {*range(Base.ExifVersion, 0x9500), 0xA000, 0xA001, *range(Base.FlashEnergy, 0xA463), Base.Gamma}
_PHOTO_TAGS |= {_directory.EXIF, _directory.GPS}
# What describes how the pixels are stored.
_LAYOUT_TAGS = {*range(254, 262), *range(263, 267), 273, *range(275, 282), 284, 292, 293, 317, 320, *range(322, 326)}
_LAYOUT_TAGS |= {SUB_DIRECTORIES, *range(338, 342), 347, *range(512, 522), *range(529, 532)}
_APPLIED_TAGS = {Base.Orientation, Base.PhotometricInterpretation}
_YCBCR = 6
# What an image holds by another name.
_KNOWN_TAGS = {*_APPLIED_TAGS, _directory.XMP, _directory.IPTC, _directory.ICC_PROFILE}


def described(file: BinaryIO, offset: int | None, image: Image) -> Image:
    """A picture as it is stored, turned upright and with what its directory, the first by default, tells of it."""
    directory, damaged = _directory.read(file, offset, without=_LAYOUT_TAGS)
    if _whole(directory, Base.PhotometricInterpretation) == _YCBCR:
        directory.pop(Base.ReferenceBlackWhite, None)  # which says how its colours are stored
    photo, others = _photo(directory, _KNOWN_TAGS)
    xmp = (_bytes(directory, _directory.XMP) or b"").rstrip(b"\0") or None
    orientation = _whole(directory, Base.Orientation) or xmp_orientation(xmp or b"")
    if orientation in (5, 6, 7, 8) and all(tag in photo for tag in _RESOLUTIONS):
        photo.update(zip(_RESOLUTIONS, [photo[tag] for tag in reversed(_RESOLUTIONS)], strict=True))
    return Image(
        turned_upright(image.pixels, orientation),
        None if image.alpha is None else turned_upright(image.alpha, orientation),
        icc_profile=_bytes(directory, _directory.ICC_PROFILE),
        exif=_directory.to_block(photo) if photo else None,
        xmp=upright_xmp(xmp) if xmp else None,
        iptc=_iptc(_bytes(directory, _directory.IPTC)),
        resolution=_resolution(photo),
        alpha_kind=image.alpha_kind,
        blocks=(*image.blocks, *(Block("", name) for name in (*others, *damaged))),
    )


def of_pillow(exif: PIL.Image.Exif) -> tuple[bytes | None, list[str]]:
    """The EXIF block of the tags that Pillow read from a TIFF, and the names of those that cannot be in it."""
    directory, dropped = Directory(), list[str]()
    for pointer in (None, _directory.EXIF, _directory.GPS):
        tags, entries = (exif if pointer is None else exif.get_ifd(pointer)), Directory()
        for tag, content in tags.items():
            if tag in (_directory.EXIF, _directory.GPS) or (pointer is None and tag in _LAYOUT_TAGS):
                continue
            one = PIL.Image.Exif()
            try:
                if isinstance(content, str) and not content.isascii():  # which Pillow would write as "?"
                    content = content.encode("latin-1")
                (one if pointer is None else one.get_ifd(pointer))[tag] = content
                found = _directory.of_block(one.tobytes())[0]
                below = found if pointer is None else found[pointer]
                assert isinstance(below, dict)
                entries[tag] = below[tag]
            except Exception:  # Pillow raises what it likes about values of another type than the tag's
                dropped.append(name_of(tag, pointer or "main"))
        directory |= entries if pointer is None else {pointer: entries} if entries else {}
    photo, others = _photo(directory, _KNOWN_TAGS)
    return _directory.to_block(photo) if photo else None, dropped + others


def not_held(exif: bytes) -> list[str]:
    """The names of what a TIFF's tags cannot hold of an EXIF block."""
    directory, damaged = _directory.of_block(exif, without=_LAYOUT_TAGS)
    return _photo(directory, _APPLIED_TAGS)[1] + damaged


def write(file: BinaryIO, image: Image) -> None:
    """Write a TIFF: strips compressed with deflate, in little-endian order."""
    channels = image.channels
    if image.alpha is not None and image.alpha_kind == "associated":
        channels = np.dstack([_multiplied_by_alpha(image), image.alpha])
    height, width, count = channels.shape
    rows = max(1, _STRIP_BYTES // (width * count * channels.itemsize))
    little = np.ascontiguousarray(channels, channels.dtype.newbyteorder("<"))
    strips = [zlib.compress(little[row : row + rows].tobytes()) for row in range(0, height, rows)]
    sizes = [len(strip) for strip in strips]
    big = sum(sizes) > _CLASSIC_BYTES
    directory: Directory = {
        Base.ImageWidth: value(LONG, width),
        Base.ImageLength: value(LONG, height),
        Base.BitsPerSample: value(SHORT, *[8 * channels.itemsize] * count),
        Base.Compression: value(SHORT, _DEFLATE),
        Base.PhotometricInterpretation: value(SHORT, 2 if image.pixels.shape[2] == 3 else 1),  # RGB, black is zero
        Base.SamplesPerPixel: value(SHORT, count),
        Base.RowsPerStrip: value(LONG, rows),
        Base.StripByteCounts: value(LONG, *sizes),
    }
    if image.alpha is not None:
        directory[Base.ExtraSamples] = value(SHORT, ALPHA_KINDS.index(image.alpha_kind))
    for tag, data, type in (
        (_directory.ICC_PROFILE, image.icc_profile, UNDEFINED),
        (_directory.XMP, image.xmp, BYTE),
        (_directory.IPTC, image.iptc, UNDEFINED),
    ):
        if data:
            directory[tag] = Value(type, data)
    if image.resolution:
        directory[_UNIT] = value(SHORT, 2)
        for tag, number in zip(_RESOLUTIONS, image.resolution, strict=True):
            directory[tag] = value(RATIONAL, round(number * _PARTS), _PARTS)
    if image.exif:
        directory |= _photo(_directory.of_block(image.exif, without=_LAYOUT_TAGS)[0], set())[0]
    head = b"II+\0\x08\0\0\0" + struct.pack("<Q", 16) if big else b"II*\0" + struct.pack("<L", 8)

    def with_strips_at(place: int) -> bytes:
        places = itertools.accumulate(sizes[:-1], initial=place)
        strips: Directory = {Base.StripOffsets: value(LONG8 if big else LONG, *places)}
        return head + _directory.packed(directory | strips, len(head), big)

    file.write(with_strips_at(len(with_strips_at(0))))
    file.writelines(strips)


def _photo(directory: Directory, known: Container[int]) -> tuple[Directory, list[str]]:
    """What describes the photo, and the names of the rest but for what is ``known``."""
    photo, others = Directory(), []
    for tag, content in sorted(directory.items(), key=lambda item: item[0]):
        fits = isinstance(content, dict) or content.type in _TYPES.get(tag, (content.type,))
        if tag in _PHOTO_TAGS and fits:
            photo[tag] = content
        elif tag not in known:
            others.append(name_of(tag))
    return photo, others


def _multiplied_by_alpha(image: Image) -> np.ndarray:
    assert image.alpha is not None
    top = np.uint32(np.iinfo(image.pixels.dtype).max)
    return ((image.pixels * image.alpha[:, :, None].astype(np.uint32) + top // 2) // top).astype(image.pixels.dtype)


def _resolution(photo: Directory) -> tuple[float, float] | None:
    numbers = [_numbers(photo, tag) for tag in _RESOLUTIONS]
    inches = _INCHES.get(_whole(photo, _UNIT) or 2)
    if inches is None or any(len(each) != 1 for each in numbers):
        return None
    return usable_resolution(*(each[0] / inches for each in numbers))


def _numbers(directory: Directory, tag: int) -> tuple[float, ...]:
    content = directory.get(tag)
    return content.numbers if isinstance(content, Value) else ()


def _whole(directory: Directory, tag: int) -> int:
    """The one whole number of a tag, 0 where there is none."""
    numbers = _numbers(directory, tag)
    return int(numbers[0]) if len(numbers) >= 1 and numbers[0] == numbers[0] // 1 else 0


def _bytes(directory: Directory, tag: int) -> bytes | None:
    content = directory.get(tag)
    return content.data if isinstance(content, Value) and content.data else None


def _iptc(record: bytes | None) -> bytes | None:
    """The record in its own order: some programs wrote it as numbers of 32 bits in the file's."""
    if record and len(record) % 4 == 0 and record[0] != _IPTC_MARK and record[3] == _IPTC_MARK:
        return np.frombuffer(record, np.uint32).byteswap().tobytes()
    return record
