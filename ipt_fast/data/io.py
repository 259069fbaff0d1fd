"""Image files in and out: 8 bit through Pillow, 16 bit PNG and TIFF through OpenCV, with alpha, ICC profile and EXIF.

The pixels come upright: the EXIF orientation is applied on reading and gone from the EXIF that is written. Gray stays
gray and colour stays colour; a palette becomes RGB or RGBA, 1 bit becomes 8-bit gray. Other metadata (XMP, comments,
resolution outside EXIF) is not kept; of a TIFF's tags those that describe the photo, Exif and GPS are. Pillow alone
would read 16-bit colour as 8 bit without a word, so the depth is taken from the file's own header first.
"""

import contextlib
import dataclasses
import io
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, BinaryIO

import numpy as np
import PIL.Image
import PIL.ImageFile
from PIL import ExifTags, ImageOps, TiffImagePlugin, TiffTags

from .._files import atomic_write
from .files import IMAGE_SUFFIXES
from .files import is_image_file as is_image_file  # it was defined here once

SIXTEEN_BIT_SUFFIXES = (".png", ".tif", ".tiff")
ALPHA_SUFFIXES = (".png", ".tif", ".tiff", ".webp")

_FORMATS = ("PNG", "JPEG", "TIFF", "WEBP", "BMP")
_MODES = {"1": "L", "L": "L", "LA": "LA", "RGB": "RGB", "RGBA": "RGBA", "P": "RGB", "PA": "RGBA"}
_READ_ERRORS = (OSError, ValueError, SyntaxError, EOFError, struct.error, PIL.Image.DecompressionBombError)
_ORIENTATION = ExifTags.Base.Orientation
# What describes the photo; the other tags of a TIFF's first directory describe how its pixels are stored.
_PHOTO_TAGS = (
    ExifTags.Base.ImageDescription,
    ExifTags.Base.Make,
    ExifTags.Base.Model,
    ExifTags.Base.XResolution,
    ExifTags.Base.YResolution,
    ExifTags.Base.ResolutionUnit,
    ExifTags.Base.Software,
    ExifTags.Base.DateTime,
    ExifTags.Base.Artist,
    ExifTags.Base.HostComputer,
    ExifTags.Base.Copyright,
)
_PHOTO_DIRECTORIES = (ExifTags.IFD.Exif, ExifTags.IFD.GPSInfo)


@dataclasses.dataclass(frozen=True)
class Image:
    """One upright image and what its file carried.

    Attributes:
        pixels: (H, W, C) uint8 or uint16, C = 1 (gray) or 3 (RGB).
        alpha: (H, W) of the same dtype, or None.
        icc_profile: the embedded colour profile, or None.
        exif: the EXIF block (starting with ``Exif\\0\\0``) without orientation, or None.
    """

    pixels: np.ndarray
    alpha: np.ndarray | None = None
    icc_profile: bytes | None = None
    exif: bytes | None = None


def read_header(path: str | Path) -> tuple[int, int, np.dtype]:
    """Height and width as they are stored, not yet upright, and the dtype of the pixels; nothing is decoded.

    Raises:
        ValueError: as ``read_image``, as far as the header shows it.
    """
    with _naming(path), Path(path).open("rb") as file, _opened(file) as image:
        if _is_16_bit(file, image):
            return image.height, image.width, np.dtype(np.uint16)
        _check_mode(image)
        return image.height, image.width, np.dtype(np.uint8)


def read_image(path: str | Path) -> Image:
    """Read a PNG, JPEG, TIFF, WebP or BMP file of 8 or 16 bits per channel.

    Raises:
        ValueError: the file is missing, no image, truncated, an animation, larger than Pillow's decompression limit, or
            of a kind that is not restored (CMYK, Lab, floating point, 16-bit gray with alpha).
        ImportError: the file has 16 bits and OpenCV is not installed.
    """
    with _naming(path), Path(path).open("rb") as file:
        return _read(file)


def read_8_bit_image(path: Path, offset: int = 0, size: int = -1) -> Image:
    """As :func:`read_image`, of an image with 8 bits per channel, which may be a part of a file.

    Args:
        path: the file.
        offset, size: the image's first byte in it and the number of its bytes, such as in a tar archive; all of the
            file by default.

    Raises:
        ValueError: as ``read_image``, and where the image has 16 bits.
    """
    with _naming(f"{path}, at byte {offset}" if offset else path):
        with path.open("rb") as file:
            file.seek(offset)
            content = file.read(size)
        return _read(io.BytesIO(content), only_8_bits=True)


def with_channels(image: Image, channels: int) -> np.ndarray:
    """The pixels of an 8-bit image, without alpha, as contiguous uint8 (H, W, channels).

    ``channels`` is 1 or 3: gray becomes three equal channels, colour becomes its ITU-R 601-2 luma.
    """
    if image.pixels.shape[2] == channels:
        return np.ascontiguousarray(image.pixels)
    mode = {1: "L", 3: "RGB"}[channels]
    return np.atleast_3d(np.array(to_pil(Image(image.pixels)).convert(mode)))


def write_image(path: str | Path, image: Image) -> None:
    """Write ``image`` to ``path`` atomically, in the format of the suffix.

    16 bit goes to PNG and TIFF only and is never reduced to 8. JPEG is written at quality 95 with full chroma, WebP
    lossless, TIFF with deflate. ICC profile and EXIF go into every format that holds them (BMP holds neither).

    Raises:
        ValueError: unknown suffix, or a format that cannot hold the depth or the alpha channel.
        OSError: the file cannot be written.
    """
    path = Path(path)
    check_writable_as(path, image)
    suffix = path.suffix.lower()
    with atomic_write(path) as temporary:
        if suffix in (".tif", ".tiff"):
            temporary.write_bytes(_encode_tiff(image))
        elif image.pixels.dtype == np.uint16:
            temporary.write_bytes(_encode_png_16_bit(image))
        else:
            options: dict[str, Any] = {"quality": 95, "subsampling": 0} if suffix in (".jpg", ".jpeg") else {}
            options |= {"lossless": True, "exact": True} if suffix == ".webp" else {}
            to_pil(image).save(temporary, icc_profile=image.icc_profile, exif=image.exif or b"", **options)


def check_suffix(path: Path) -> None:
    """Raise ValueError unless the suffix of ``path`` names a format that is written."""
    if path.suffix.lower() not in IMAGE_SUFFIXES:
        raise ValueError(f"path must end in {', '.join(IMAGE_SUFFIXES)}; got {path}")


def check_writable_as(path: Path, image: Image) -> None:
    """Raise ValueError unless the format that ``path`` names can hold the depth and the channels of ``image``."""
    check_suffix(path)
    suffix = path.suffix.lower()
    if image.pixels.dtype == np.uint16 and suffix not in SIXTEEN_BIT_SUFFIXES:
        raise ValueError(f"path must end in {', '.join(SIXTEEN_BIT_SUFFIXES)} for an image of 16 bits; got {path}")
    if image.alpha is not None and suffix not in ALPHA_SUFFIXES:
        raise ValueError(f"path must end in {', '.join(ALPHA_SUFFIXES)} for an image with alpha; got {path}")


def from_pil(image: PIL.Image.Image, *, upright: bool = False) -> Image:
    """The 8-bit pixels of a Pillow image: mode L, LA, RGB or RGBA as it is, 1 as gray, P as RGB or RGBA.

    ``upright=True`` applies the EXIF orientation. Raises ValueError for every other mode.
    """
    _check_mode(image)
    if 0 in image.size:
        raise ValueError(f"an image must have at least one pixel; got {image.width} x {image.height}")
    mode = _MODES[image.mode]
    if "transparency" in image.info and mode in ("L", "RGB"):
        mode = {"L": "LA", "RGB": "RGBA"}[mode]
    if upright:
        ImageOps.exif_transpose(image, in_place=True)
    exif = _exif_bytes(image)
    channels = np.array(image.convert(mode)).reshape(image.height, image.width, -1)
    colour = 3 if mode.startswith("RGB") else 1
    alpha = channels[:, :, colour] if channels.shape[2] > colour else None
    return Image(channels[:, :, :colour], alpha, image.info.get("icc_profile"), exif)


def to_pil(image: Image) -> PIL.Image.Image:
    """The Pillow image (mode L, LA, RGB or RGBA) of an 8-bit ``image``, without metadata."""
    channels = _with_alpha(image)
    return PIL.Image.fromarray(channels[:, :, 0] if channels.shape[2] == 1 else channels)


@contextlib.contextmanager
def _naming(name: str | Path) -> Iterator[None]:
    """Whatever goes wrong with an image file becomes a ValueError that names it."""
    try:
        yield
    except PIL.UnidentifiedImageError as error:  # whose text has the address of an object
        kinds = ", ".join(_FORMATS)
        raise ValueError(f"cannot read image {name}: it must be one of {kinds}; got another kind or damage") from error
    except _READ_ERRORS as error:
        raise ValueError(f"cannot read image {name}: {error}") from error


@contextlib.contextmanager
def _opened(file: BinaryIO) -> Iterator[PIL.ImageFile.ImageFile]:
    """The Pillow image of a file, not yet decoded."""
    with PIL.Image.open(file, formats=_FORMATS) as image:
        # The second picture of an MPO file is a phone's preview or stereo half, not a frame.
        frames = getattr(image, "n_frames", 1)
        if frames > 1 and image.format != "MPO":
            raise ValueError(f"it must have one frame or page; got {frames}")
        yield image


def _read(file: BinaryIO, only_8_bits: bool = False) -> Image:
    with _opened(file) as image:
        if not _is_16_bit(file, image):
            return from_pil(image, upright=True)
        if only_8_bits:
            raise ValueError("training images must have 8 bits; got 16")
        return _read_16_bit(file, image)


def _check_mode(image: PIL.Image.Image) -> None:
    if image.mode not in _MODES:
        raise ValueError(f"its mode must be {', '.join(_MODES)}, or 16-bit gray, RGB or RGBA; got {image.mode}")


def _is_16_bit(file: BinaryIO, image: PIL.ImageFile.ImageFile) -> bool:
    if image.format == "PNG":
        return _png_kind(file)[0] == 16
    tags = getattr(image, "tag_v2", {})
    return image.format == "TIFF" and max(tags.get(TiffImagePlugin.BITSPERSAMPLE, (1,))) == 16


def _png_kind(file: BinaryIO) -> tuple[int, ...]:
    """(bit depth, colour type), which stand behind signature, length, name, width and height of the first chunk."""
    return tuple(_content(file, 26)[24:])


def _content(file: BinaryIO, size: int = -1) -> bytes:
    """The first ``size`` bytes or all of them; Pillow goes on reading where it was."""
    position = file.tell()
    file.seek(0)
    content = file.read(size)
    file.seek(position)
    return content


def _read_16_bit(file: BinaryIO, image: PIL.ImageFile.ImageFile) -> Image:
    tags = getattr(image, "tag_v2", {})
    gray_alpha = _png_kind(file)[1] == 4 if image.format == "PNG" else tags.get(TiffImagePlugin.SAMPLESPERPIXEL, 1) == 2
    if gray_alpha or (image.mode == "I;16" and "transparency" in image.info):
        raise ValueError(
            "its 16 bits must be gray, RGB or RGBA; got 16-bit gray with alpha, which OpenCV cannot write back"
        )
    if image.mode not in ("I;16", "RGB", "RGBA") or tags.get(TiffImagePlugin.PHOTOMETRIC_INTERPRETATION, 1) not in (
        1,
        2,
    ):
        raise ValueError(f"its 16 bits must be unsigned gray, RGB or RGBA; got mode {image.mode}")
    channels = _decode(file, image.format)
    if channels is None or channels.dtype != np.uint16:
        raise OSError("image file is damaged or truncated")
    channels = channels.reshape(*channels.shape[:2], -1)
    if image.format == "PNG":  # OpenCV turns a TIFF upright by itself, a PNG not with IMREAD_UNCHANGED
        channels = _turn_upright(channels, image.getexif().get(_ORIENTATION, 1))
    colour = 1 if channels.shape[2] == 1 else 3
    alpha = channels[:, :, 3].copy() if channels.shape[2] == 4 else None
    pixels = np.ascontiguousarray(channels[:, :, colour - 1 :: -1])  # BGR to RGB
    return Image(pixels, alpha, image.info.get("icc_profile"), _exif_bytes(image))


def _decode(file: BinaryIO, format: str | None) -> np.ndarray | None:
    """The file as OpenCV stores it, or None; without what libpng and OpenCV print about damage."""
    cv2 = _import_cv2()
    content = _content(file)
    if format == "PNG":
        with PIL.Image.open(io.BytesIO(content), formats=[format]) as image:
            image.verify()  # compares the checksums
    level = cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
    try:
        return cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_UNCHANGED)
    finally:
        cv2.utils.logging.setLogLevel(level)


def _turn_upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    if orientation in (3, 4, 6, 7):
        pixels = pixels[::-1]
    if orientation in (2, 3, 7, 8):
        pixels = pixels[:, ::-1]
    return pixels.swapaxes(0, 1) if orientation in (5, 6, 7, 8) else pixels


def _exif_bytes(image: PIL.Image.Image) -> bytes | None:
    exif = image.getexif()
    if image.format == "TIFF":
        exif = _photo_exif(exif)
    elif _ORIENTATION not in exif:
        return image.info.get("exif") or (exif.tobytes() if len(exif) else None)
    else:
        del exif[_ORIENTATION]
    return exif.tobytes() if len(exif) or exif._ifds else None


def _photo_exif(exif: PIL.Image.Exif) -> PIL.Image.Exif:
    photo = PIL.Image.Exif()
    photo.update({tag: exif[tag] for tag in _PHOTO_TAGS if tag in exif})
    for directory in _PHOTO_DIRECTORIES:
        if exif.get_ifd(directory):
            photo.get_ifd(directory).update(exif.get_ifd(directory))
    return photo


def _with_alpha(image: Image) -> np.ndarray:
    return image.pixels if image.alpha is None else np.dstack([image.pixels, image.alpha])


def _encode_png_16_bit(image: Image) -> bytes:
    cv2 = _import_cv2()
    channels = _with_alpha(image)
    order = {1: [0], 3: [2, 1, 0], 4: [2, 1, 0, 3]}.get(channels.shape[2])
    if order is None:
        raise ValueError("image must be gray, RGB or RGBA for a PNG of 16 bits; got 16-bit gray with alpha")
    kinds, blocks = [], []
    if image.exif:
        kinds.append(cv2.IMAGE_METADATA_EXIF)
        blocks.append(np.frombuffer(image.exif.removeprefix(b"Exif\0\0"), np.uint8))
    if image.icc_profile:
        kinds.append(cv2.IMAGE_METADATA_ICCP)
        blocks.append(np.frombuffer(image.icc_profile, np.uint8))
    return cv2.imencodeWithMetadata(".png", np.ascontiguousarray(channels[:, :, order]), kinds, blocks)[1].tobytes()


def _encode_tiff(image: Image) -> bytes:
    # OpenCV writes no metadata into TIFF and Pillow no 16-bit colour: the directory is Pillow's, the one strip ours.
    channels = _with_alpha(image)
    height, width, count = channels.shape
    strip = zlib.compress(np.ascontiguousarray(channels, channels.dtype.newbyteorder("<")).tobytes())
    directory = TiffImagePlugin.ImageFileDirectory_v2(prefix=b"II")
    directory[TiffImagePlugin.IMAGEWIDTH] = width
    directory[TiffImagePlugin.IMAGELENGTH] = height
    directory[TiffImagePlugin.BITSPERSAMPLE] = (8 * channels.itemsize,) * count
    directory[TiffImagePlugin.COMPRESSION] = TiffImagePlugin.COMPRESSION_INFO_REV["tiff_adobe_deflate"]
    directory[TiffImagePlugin.PHOTOMETRIC_INTERPRETATION] = 2 if image.pixels.shape[2] == 3 else 1  # RGB, black is zero
    directory.tagtype[TiffImagePlugin.STRIPOFFSETS] = TiffTags.LONG
    directory[TiffImagePlugin.STRIPOFFSETS] = 0  # save() moves it to the end of the directory
    directory[TiffImagePlugin.SAMPLESPERPIXEL] = count
    directory[TiffImagePlugin.ROWSPERSTRIP] = height
    directory.tagtype[TiffImagePlugin.STRIPBYTECOUNTS] = TiffTags.LONG
    directory[TiffImagePlugin.STRIPBYTECOUNTS] = len(strip)
    if image.alpha is not None:
        directory[TiffImagePlugin.EXTRASAMPLES] = 2  # alpha, not multiplied into the colours
    if image.icc_profile:
        directory[TiffImagePlugin.ICCPROFILE] = image.icc_profile
    if image.exif:
        exif = PIL.Image.Exif()
        exif.load(image.exif)
        photo = _photo_exif(exif)
        for tag, value in (*photo.items(), *((tag, photo.get_ifd(tag)) for tag in _PHOTO_DIRECTORIES)):
            if value:
                directory[tag] = value
    file = io.BytesIO()
    directory.save(file)
    file.write(strip)
    return file.getvalue()


def _import_cv2() -> ModuleType:
    try:
        import cv2
    except ImportError as error:
        raise ImportError("16-bit images need OpenCV: pip install ipt-fast[io]") from error
    return cv2
