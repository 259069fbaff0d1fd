"""What describes a photo beside its pixels: taken from Pillow's images, kept true, and given to what can hold it."""

import dataclasses
import numbers
import struct
from typing import Any

import numpy as np
import PIL.Image

from ._exif import HEADER, Exif, sized_xmp, upright_xmp, xmp_orientation
from ._image import Block, Image, usable_resolution
from ._tiff_tags import not_held, of_pillow

_NAMES = {"icc_profile": "ICC profile", "exif": "EXIF", "xmp": "XMP", "iptc": "IPTC", "resolution": "resolution"}
_HELD = {
    "PNG": ("icc_profile", "exif", "xmp", "resolution"),
    "JPEG": ("icc_profile", "exif", "xmp", "iptc", "resolution"),
    "TIFF": ("icc_profile", "exif", "xmp", "iptc", "resolution"),
    "WEBP": ("icc_profile", "exif", "xmp"),
    "BMP": ("resolution",),
}
TEXT_BYTES = 1 << 26  # of a compressed chunk in a PNG, against files that are made to fill the memory
# How many bytes a format holds. One segment of a JPEG file has 65533, XMP with its name before it; a profile takes 255.
_LIMITS = {
    "JPEG": {"exif": 65533, "xmp": 65533 - 29, "iptc": 65533 - 64, "icc_profile": 255 * (65533 - 14)},
    "PNG": {"icc_profile": TEXT_BYTES, "xmp": TEXT_BYTES},
}
_OPTIONS: dict[str, dict[str, Any]] = {
    "JPEG": {"quality": 95, "subsampling": 0},
    "WEBP": {"lossless": True, "exact": True},
}
_PHOTOSHOP, _IPTC_RESOURCE = b"Photoshop 3.0\0", 0x0404
_KNOWN_RESOURCES = {_IPTC_RESOURCE, 0x0425, 0x03ED}  # the record, its checksum, and the resolution
_BMP_EMBEDDED = b"DEBM"  # PROFILE_EMBEDDED, a number in little-endian order
# Segments of a JPEG file that hold what is read by other names, by number and beginning.
_READ_SEGMENTS = (
    ("APP0", b"JFIF"),
    ("APP1", b"Exif"),
    ("APP1", b"http://ns.adobe.com/xap/1.0/"),
    ("APP2", b"ICC_PROFILE"),
    ("APP13", _PHOTOSHOP),
    ("APP14", b"Adobe"),
    ("COM", b""),
)
_SEGMENT_NAMES = (
    ("APP0", b"JFXX", "thumbnail"),
    ("APP1", b"http://ns.adobe.com/xmp/ext", "extended XMP"),
    ("APP2", b"MPF", "further pictures"),
)
# What Pillow's info holds, by name.
_INFO_TYPES: dict[str, tuple[type, ...]] = {
    "icc_profile": (bytes,),
    "exif": (bytes,),
    "xmp": (bytes, str),
    "XML:com.adobe.xmp": (str,),
    "Raw profile type exif": (str,),
    "Raw profile type APP1": (str,),
    "photoshop": (dict,),
    "dpi": (tuple, list),
    "jfif_density": (tuple, list),
}
# What Pillow's info says of how the pixels were stored.
_LAYOUT_INFO = ("transparency", "compression", "background", "photoshop", "mp", "mpoffset", "sizes", "bbox")


def of_pil(image: PIL.Image.Image, upright: bool) -> tuple[int, Image]:
    """How the pixels are to be turned (1 unless ``upright``), and an image without pixels with all metadata."""
    info, unusable = _usable(image.info)
    exif, not_in_exif = _exif_of(image, info)
    xmp = info.get("xmp")
    xmp = xmp.encode() if isinstance(xmp, str) else xmp
    orientation: int | None = None
    blocks = [Block("", name) for name in (*unusable, *not_in_exif)]
    resolution = _resolution(image, info)
    if exif:
        try:
            block = Exif(exif)
        except ValueError:
            exif = None
            blocks.append(Block("", "damaged EXIF"))
        else:
            if block.drop_thumbnail():
                blocks.append(Block("", "EXIF thumbnail"))
            if upright:
                orientation = block.orientation
                block.turn_upright()
            exif = block.tobytes()
    if upright and xmp:
        orientation = orientation or xmp_orientation(xmp)
        xmp = upright_xmp(xmp)
    orientation = orientation or 1
    if resolution and orientation >= 5:
        resolution = resolution[::-1]
    iptc = info.get("photoshop", {}).get(_IPTC_RESOURCE)
    return orientation, Image(
        np.empty((0, 0, 0), np.uint8),
        None,
        info.get("icc_profile"),
        exif,
        xmp,
        iptc,
        resolution,
        blocks=tuple(blocks),
    )


def info_of_pil(image: PIL.Image.Image, width: int, height: int) -> tuple[dict[Any, Any], list[str]]:
    """What Pillow's ``info`` is to say of a restored ``image`` that has another size now, and what was dropped."""
    _, metadata = of_pil(image, upright=False)
    metadata = _sized(metadata, width, height)
    usable, _ = _usable(image.info)
    info = {name: value for name, value in usable.items() if name not in _LAYOUT_INFO}
    for name, value in (("exif", metadata.exif), ("xmp", metadata.xmp)):
        info.pop(name, None)
        if value:
            info[name] = value
    if "XML:com.adobe.xmp" in info and metadata.xmp:  # as Pillow calls it in a PNG
        info["XML:com.adobe.xmp"] = metadata.xmp.decode("utf-8", "replace")
    return info, [block.name for block in metadata.blocks]


def blocks_of_jpeg(image: PIL.Image.Image) -> list[Block]:
    """A JPEG's comment, and the names of the segments that do not stay true or are not known."""
    found = []
    if comment := image.info.get("comment"):
        found.append(Block("JPEG", "comment", comment if isinstance(comment, bytes) else comment.encode()))
    if set(image.info.get("photoshop") or ()) - _KNOWN_RESOURCES:
        found.append(Block("", "Photoshop's data"))
    for segment, data in getattr(image, "applist", ()):
        if any(segment == number and data.startswith(start) for number, start in _READ_SEGMENTS):
            continue
        names = (name for number, start, name in _SEGMENT_NAMES if segment == number and data.startswith(start))
        block = Block("", next(names, segment))
        if block not in found:
            found.append(block)
    return found


def bmp_profile(header: bytes) -> tuple[int, int] | None:
    """Where in a BMP file its colour profile begins and how long it is, by the file's first 138 bytes."""
    if len(header) < 138 or header[70:74] != _BMP_EMBEDDED or struct.unpack_from("<I", header, 14)[0] < 124:
        return None
    start, size = struct.unpack_from("<II", header, 126)
    return 14 + start, size


def with_size(image: Image) -> Image:
    """``image`` with EXIF and XMP that tell its own size."""
    return _sized(image, image.pixels.shape[1], image.pixels.shape[0])


def held_by(format: str, image: Image) -> tuple[Image, list[str]]:
    """What of the metadata a format can hold, and the names of the rest."""
    dropped = []
    for field, name in _NAMES.items():
        value = getattr(image, field)
        limit = _LIMITS.get(format, {}).get(field)
        too_long = value is not None and limit is not None and len(value) > limit
        if not value or (field in _HELD.get(format, ()) and not too_long):
            continue
        if field == "resolution" and "exif" in _HELD.get(format, ()) and image.exif and Exif(image.exif).has_resolution:
            continue
        dropped.append(f"{name} over {round((limit or 0) / 1024)} KB" if too_long else name)
        nothing: dict[str, Any] = {field: None}
        image = dataclasses.replace(image, **nothing)
    if format == "TIFF" and image.exif:
        dropped += not_held(image.exif)
    dropped += [block.name for block in image.blocks if block.format != format]
    return image, list(dict.fromkeys(dropped))


def pillow_options(format: str, image: Image) -> dict[str, Any]:
    """How Pillow is to save an image whose metadata the format can hold."""
    options = dict(_OPTIONS.get(format, {}))
    for name, value in (("icc_profile", image.icc_profile), ("exif", image.exif), ("xmp", image.xmp)):
        if value:
            options[name] = value
    if image.resolution:
        options["dpi"] = image.resolution
    for block in image.blocks:
        if block.format == format:
            options[block.name] = block.data
    if image.iptc and format == "JPEG":
        options["extra"] = _iptc_segment(image.iptc)
    return options


def _exif_of(image: PIL.Image.Image, info: dict[Any, Any]) -> tuple[bytes | None, list[str]]:
    """The EXIF block as it is in the file, a TIFF's made of its tags, and the names of what cannot be in it."""
    if image.format == "TIFF":
        return of_pillow(image.getexif())
    block = info.get("exif")
    if block is None and (text := info.get("Raw profile type exif") or info.get("Raw profile type APP1")):
        try:
            block = bytes.fromhex("".join(text.split("\n")[3:]))  # behind two names and the length
        except ValueError:
            return None, ["damaged EXIF"]
    return HEADER + block.removeprefix(HEADER) if block else None, []


def _resolution(image: PIL.Image.Image, info: dict[Any, Any]) -> tuple[float, float] | None:
    """Pixels per inch as the format itself says, and not EXIF, which may be all that a JPEG's ``dpi`` is made of."""
    inch = {1: 1.0, 2: 2.54}.get(info.get("jfif_unit", 0)) if image.format in ("JPEG", "MPO") else 1.0
    values = info.get("jfif_density" if image.format in ("JPEG", "MPO") else "dpi")
    if inch is None or values is None:
        return None
    return usable_resolution(float(values[0] * inch), float(values[1] * inch))


def _usable(info: dict[Any, Any]) -> tuple[dict[Any, Any], list[str]]:
    """Pillow's ``info``, in which a program may set anything, and what a warning calls the entries left out of it."""
    usable = {name: value for name, value in info.items() if value is not None or name not in _INFO_TYPES}
    odd = [name for name, types in _INFO_TYPES.items() if name in usable and not isinstance(usable[name], types)]
    for name in ("dpi", "jfif_density"):
        values = usable.get(name)
        if isinstance(values, tuple | list) and not (
            len(values) == 2 and all(isinstance(value, numbers.Real) for value in values)
        ):
            odd.append(name)
    return {name: value for name, value in usable.items() if name not in odd}, [f"info[{name!r}]" for name in odd]


def _sized(image: Image, width: int, height: int) -> Image:
    exif, xmp = image.exif, image.xmp
    if exif:
        block = Exif(exif)
        block.set_size(width, height)
        exif = block.tobytes()
    return dataclasses.replace(image, exif=exif, xmp=sized_xmp(xmp, width, height) if xmp else None)


def _iptc_segment(iptc: bytes) -> bytes:
    """A segment of a JPEG file with one of Photoshop's resources."""
    resource = b"8BIM" + struct.pack(">HHI", _IPTC_RESOURCE, 0, len(iptc)) + iptc + bytes(len(iptc) % 2)
    data = _PHOTOSHOP + resource
    return b"\xff\xed" + struct.pack(">H", 2 + len(data)) + data
