"""Which formats of image files are read and written, and what a file is that is none of them."""

import contextlib
import io
import re
from typing import BinaryIO

import PIL.Image
import PIL.ImageFile

with contextlib.suppress(ImportError):
    import pillow_heif

    pillow_heif.register_heif_opener()

# Formats of photos, as Pillow names them. The last one has no magic number: what is any other must not be taken for it.
READ_FORMATS = ("PNG", "JPEG", "MPO", "TIFF", "WEBP", "BMP", "DIB", "GIF", "PPM", "AVIF", "HEIF", "TGA")
_NOT_PHOTOS = (".pfm", ".avifs", ".heifs", ".heics", ".hif")  # floating point, sequences
JPEG_SUFFIXES = (".jpg", ".jpeg", ".jpe", ".jfif")
WRITTEN_SUFFIXES = (".png", *JPEG_SUFFIXES, ".tif", ".tiff", ".webp", ".bmp")

_PLUGINS = {".heic": "pillow-heif", ".heif": "pillow-heif", ".avif": "a Pillow with AVIF"}
_MAGIC = (
    (re.compile(rb"....ftyp(heic|heix|heim|heis|hevc|mif1|msf1)", re.DOTALL), "HEIC"),
    (re.compile(rb"....ftypavi[fs]", re.DOTALL), "AVIF"),
    (re.compile(rb"....ftypcrx", re.DOTALL), "a camera's raw format CR3"),
    (re.compile(rb"....ftyp", re.DOTALL), "a video"),
    (re.compile(rb"\x1aE\xdf\xa3|RIFF....AVI ", re.DOTALL), "a video"),
    (re.compile(rb"\xff\x0a|\0\0\0\x0cJXL "), "JPEG XL"),
    (re.compile(rb"FUJIFILMCCD-RAW"), "a camera's raw format RAF"),
    (re.compile(rb"v/1\x01"), "OpenEXR"),
    (re.compile(rb"#\?RADIANCE"), "Radiance HDR"),
    (re.compile(rb"%PDF"), "PDF"),
    (re.compile(rb"PK\x03\x04"), "a ZIP archive"),
    (re.compile(rb"\x1f\x8b"), "a gzip archive"),
    (re.compile(rb"version https://git-lfs"), "a pointer of Git LFS, whose content was not fetched"),
    (re.compile(rb"\s*<(\?xml.*?)?svg", re.DOTALL), "SVG"),
    (re.compile(rb"\s*<(!doctype )?html", re.IGNORECASE), "HTML"),
)


def _read_suffixes() -> tuple[str, ...]:
    """Those that Pillow knows, and the plugins that are installed, of READ_FORMATS; those that are written first."""
    known = PIL.Image.registered_extensions()  # loads Pillow's plugins
    readable = {*PIL.Image.OPEN, "MPO"}  # which the plugin for JPEG opens
    suffixes = [suffix for suffix, name in known.items() if name in READ_FORMATS and name in readable]
    return (*WRITTEN_SUFFIXES, *sorted({*suffixes} - {*WRITTEN_SUFFIXES, *_NOT_PHOTOS}))


IMAGE_SUFFIXES = _read_suffixes()


def missing_plugin(suffix: str) -> str | None:
    """What must be installed to read files of this suffix; None where nothing is known that would help."""
    return None if suffix.lower() in IMAGE_SUFFIXES else _PLUGINS.get(suffix.lower())


def kind_of(file: BinaryIO) -> str:
    """What a file is that is no image of READ_FORMATS, as the end of "it is …"."""
    file.seek(0)
    head = file.read(4096)
    if not head:
        return "empty"
    for pattern, name in _MAGIC:
        if pattern.match(head):
            if f".{name.lower()}" not in _PLUGINS:
                return name
            plugin = missing_plugin(f".{name.lower()}")
            return f"{name}, which needs {plugin}" if plugin else f"damaged {name}"
    if not head.strip(b"\0"):
        return "nothing but zeros"
    try:
        with PIL.Image.open(io.BytesIO(head + file.read())) as image:
            return f"{image.format}, which is not read"
    except Exception:  # Pillow's plugins raise what they like about files that are not theirs
        pass
    if not re.search(rb"[\0-\x08\x0e-\x1a\x1c-\x1f\x7f]", head):
        return "text"
    return "damaged, or of an unknown kind"


def check_depth(file: BinaryIO, image: PIL.ImageFile.ImageFile) -> None:
    """Raise ValueError where Pillow would make 8 bits of more, without a word; of PNG and TIFF io.py looks."""
    bits = 8
    if image.format == "PPM":
        arguments = image.tile[0].args or ()
        largest = max([number for number in arguments if isinstance(number, int)], default=255)
        deep = largest > 255 or "I;16B" in arguments
        bits = 16 if deep else 8
    elif image.format in ("AVIF", "HEIF"):
        position = file.tell()
        file.seek(0)
        head = file.read(1 << 20)
        file.seek(position)
        # The box pixi: version and flags, the number of channels, and the bits of each.
        boxes = [head[each.end() : each.end() + each[1][0]] for each in re.finditer(rb"pixi\0{4}(.)", head, re.DOTALL)]
        bits = max((max(box, default=8) for box in boxes), default=8)
    if bits > 8:
        raise ValueError(f"it must have 8 bits for a file of this format; got {bits}, which PNG and TIFF can hold")
