"""TIFF's tags: what they tell of a picture, and writing a picture with them."""

import itertools
import zlib
from typing import Any, BinaryIO

import numpy as np
import PIL.Image
from PIL import ExifTags, TiffImagePlugin, TiffTags

from ._exif import upright_xmp, xmp_orientation
from ._image import Block, Image, turned_upright, usable_resolution

ALPHA_KINDS = ("unspecified", "associated", "unassociated")  # by the number that ExtraSamples holds
SUB_DIRECTORIES = 330
_BYTE, _LONG, _UNDEFINED, _LONG8 = 1, 4, 7, 16
_ICC_PROFILE, _XMP, _IPTC = 34675, 700, 33723
_RESOLUTIONS = ExifTags.Base.XResolution, ExifTags.Base.YResolution
_UNIT = ExifTags.Base.ResolutionUnit
_INCHES = {2: 1.0, 3: 1 / 2.54}  # in a unit of resolution, by its number
_STRIP_BYTES = 1 << 20
_CLASSIC_BYTES = 4_000_000_000  # of pixels; a file with more gets offsets of 64 bits

# What describes the photo.
_PHOTO_TAGS = (
    ExifTags.Base.ImageDescription,
    ExifTags.Base.Make,
    ExifTags.Base.Model,
    *_RESOLUTIONS,
    _UNIT,
    ExifTags.Base.Software,
    ExifTags.Base.DateTime,
    ExifTags.Base.Artist,
    ExifTags.Base.HostComputer,
    ExifTags.Base.Copyright,
)
_PHOTO_DIRECTORIES = (ExifTags.IFD.Exif, ExifTags.IFD.GPSInfo)
# What describes how the pixels are stored; the orientation is applied.
_LAYOUT_TAGS = {*range(254, 267), *range(273, 282), *range(290, 294), *range(317, 326), *range(512, 522)}
_LAYOUT_TAGS |= {284, SUB_DIRECTORIES, *range(338, 342), 347, *range(529, 533)}


def described(file: BinaryIO, offset: int | None, image: Image) -> Image:
    """A picture as it is stored, turned upright and with what its directory, the first by default, tells of it."""
    exif = PIL.Image.Exif()
    file.seek(0)
    if offset is not None:
        signature = file.read(4)
        exif.endian, exif.bigtiff = "<" if signature[:2] == b"II" else ">", b"+" in signature
    exif.load_from_fp(file, offset)
    tags = dict(exif)
    photo, xmp = photo_exif(exif), _bytes(tags.get(_XMP))
    orientation = tags.get(ExifTags.Base.Orientation, xmp_orientation(xmp or b""))
    if orientation in (5, 6, 7, 8) and all(tag in photo for tag in _RESOLUTIONS):
        photo.update(zip(_RESOLUTIONS, [photo[tag] for tag in reversed(_RESOLUTIONS)], strict=True))
    known = _LAYOUT_TAGS | {*_PHOTO_TAGS, *_PHOTO_DIRECTORIES, _ICC_PROFILE, _XMP, _IPTC}
    others = [Block("", TiffTags.lookup(tag).name) for tag in sorted(tags.keys() - known)]
    return Image(
        turned_upright(image.pixels, orientation),
        None if image.alpha is None else turned_upright(image.alpha, orientation),
        icc_profile=_bytes(tags.get(_ICC_PROFILE)),
        exif=photo.tobytes() if len(photo) or photo._ifds else None,
        xmp=upright_xmp(xmp) if xmp else None,
        iptc=_bytes(tags.get(_IPTC)),
        resolution=_resolution(photo),
        alpha_kind=image.alpha_kind,
        blocks=(*image.blocks, *others),
    )


def photo_exif(exif: PIL.Image.Exif) -> PIL.Image.Exif:
    """What describes the photo, without what describes a file's pixels."""
    photo = PIL.Image.Exif()
    photo.update({tag: exif[tag] for tag in _PHOTO_TAGS if tag in exif})
    for directory in _PHOTO_DIRECTORIES:
        if exif.get_ifd(directory):
            photo.get_ifd(directory).update(exif.get_ifd(directory))
    return photo


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
    directory = TiffImagePlugin.ImageFileDirectory_v2(b"II+\0\x08\0\0\0" + bytes(8) if big else b"II*\0" + bytes(4))

    def add(tag: int, value: Any, type: int | None = None) -> None:
        if type is not None:
            directory.tagtype[tag] = type
        directory[tag] = value

    add(TiffImagePlugin.IMAGEWIDTH, width)
    add(TiffImagePlugin.IMAGELENGTH, height)
    add(TiffImagePlugin.BITSPERSAMPLE, (8 * channels.itemsize,) * count)
    add(TiffImagePlugin.COMPRESSION, TiffImagePlugin.COMPRESSION_INFO_REV["tiff_adobe_deflate"])
    add(TiffImagePlugin.PHOTOMETRIC_INTERPRETATION, 2 if image.pixels.shape[2] == 3 else 1)  # RGB, black is zero
    # save() adds what stands before the strips.
    add(TiffImagePlugin.STRIPOFFSETS, (0, *itertools.accumulate(sizes[:-1])), _LONG8 if big else _LONG)
    add(TiffImagePlugin.SAMPLESPERPIXEL, count)
    add(TiffImagePlugin.ROWSPERSTRIP, rows)
    add(TiffImagePlugin.STRIPBYTECOUNTS, tuple(sizes), _LONG)
    if image.alpha is not None:
        add(TiffImagePlugin.EXTRASAMPLES, ALPHA_KINDS.index(image.alpha_kind))
    for tag, data, type in ((_ICC_PROFILE, image.icc_profile, _UNDEFINED), (_XMP, image.xmp, _BYTE)):
        if data:
            add(tag, data, type)
    if image.iptc:
        add(_IPTC, image.iptc, _UNDEFINED)
    if image.resolution:
        add(_UNIT, 2)
        for tag, value in zip(_RESOLUTIONS, image.resolution, strict=True):
            add(tag, TiffImagePlugin.IFDRational(round(value * 10000), 10000))
    if image.exif:
        exif = PIL.Image.Exif()
        exif.load(image.exif)
        photo = photo_exif(exif)
        for tag, value in (*photo.items(), *((tag, photo.get_ifd(tag)) for tag in _PHOTO_DIRECTORIES)):
            if value:
                add(tag, value)
    directory.save(file)
    file.writelines(strips)


def _multiplied_by_alpha(image: Image) -> np.ndarray:
    assert image.alpha is not None
    top = np.uint32(np.iinfo(image.pixels.dtype).max)
    return ((image.pixels * image.alpha[:, :, None].astype(np.uint32) + top // 2) // top).astype(image.pixels.dtype)


def _resolution(exif: PIL.Image.Exif) -> tuple[float, float] | None:
    inches = _INCHES.get(exif.get(_UNIT, 2))
    if inches is None or not all(isinstance(exif.get(tag), (TiffImagePlugin.IFDRational, int)) for tag in _RESOLUTIONS):
        return None
    across, down = (float(exif[tag]) / inches for tag in _RESOLUTIONS)
    return usable_resolution(across, down)


def _bytes(value: Any) -> bytes | None:
    """The value of a tag of bytes; some programs write IPTC as whole numbers."""
    if isinstance(value, tuple):
        return b"".join(int(each).to_bytes(4, "little") for each in value)
    return value.encode("latin-1") if isinstance(value, str) else value
