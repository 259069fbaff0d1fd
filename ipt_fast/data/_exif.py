"""EXIF blocks and XMP packets that stay true: upright, of the picture's size, without a thumbnail of another picture.

EXIF is changed in place. A camera's own notes point to places in the block, so it must not be put together anew.
"""

import re
import struct

HEADER = b"Exif\0\0"
_ORIENTATION, _EXIF_DIRECTORY, _INTEROPERABILITY = 0x0112, 0x8769, 0xA005
_THUMBNAIL, _THUMBNAIL_SIZE = 0x0201, 0x0202
# Where a block says how wide and how high its picture is, by directory.
_WIDTHS = (("main", 0x0100), ("exif", 0xA002), ("interoperability", 0x1001))
_HEIGHTS = (("main", 0x0101), ("exif", 0xA003), ("interoperability", 0x1002))
_RESOLUTIONS = ("main", 0x011A), ("main", 0x011B)
_BYTE, _SHORT, _LONG = 1, 3, 4
_XMP_ORIENTATION = rb"tiff:Orientation"
_XMP_WIDTHS = rb"(?:tiff:ImageWidth|exif:PixelXDimension)"
_XMP_HEIGHTS = rb"(?:tiff:ImageLength|exif:PixelYDimension)"
_XMP_VALUE = rb"""(?:\s*=\s*["']|>)\s*"""


class Exif:
    """The bytes of an EXIF block, to be changed in place.

    Raises:
        ValueError: it is damaged.
    """

    def __init__(self, block: bytes) -> None:
        self._data = bytearray(block.removeprefix(HEADER).removeprefix(HEADER))
        self._order = {b"II*\0": "<", b"MM\0*": ">"}.get(bytes(self._data[:4]), "")
        self._places: dict[tuple[str, int], int] = {}  # of an entry, by its directory and tag
        if not self._order:
            raise ValueError("exif must begin as a TIFF does; got another block")
        try:
            self._next = self._read_directory("main", self._unpack("L", 4))
            self._unpack("L", self._next)
            self._read_subdirectory("exif", ("main", _EXIF_DIRECTORY))
            self._read_subdirectory("interoperability", ("exif", _INTEROPERABILITY))
        except struct.error as error:
            raise ValueError("exif must be whole; got a directory beyond its end") from error

    def tobytes(self) -> bytes:
        return HEADER + bytes(self._data)

    @property
    def orientation(self) -> int | None:
        """1 to 8, or None where the block does not say."""
        value = self._value(("main", _ORIENTATION))
        return value if value in range(1, 9) else None

    def turn_upright(self) -> None:
        """Say that the picture is upright, after it was turned as the orientation had said."""
        if (self.orientation or 1) >= 5 and self.has_resolution:
            across, down = (slice(self._places[key] + 8, self._places[key] + 12) for key in _RESOLUTIONS)
            self._data[across], self._data[down] = self._data[down], self._data[across]
        self._set(("main", _ORIENTATION), 1)

    def set_size(self, width: int, height: int) -> None:
        """Write the picture's size where the block says one."""
        for keys, value in ((_WIDTHS, width), (_HEIGHTS, height)):
            for key in keys:
                self._set(key, value)

    @property
    def has_resolution(self) -> bool:
        return all(key in self._places for key in _RESOLUTIONS)

    def drop_thumbnail(self) -> bool:
        """Take the thumbnail out; whether there was one."""
        start = self._unpack("L", self._next)
        if not start:
            return False
        try:
            self._read_directory("thumbnail", start)
            picture, size = self._value(("thumbnail", _THUMBNAIL)), self._value(("thumbnail", _THUMBNAIL_SIZE))
        except struct.error:  # a damaged one, which is only forgotten
            picture = size = 0
        end = min(picture + size, len(self._data))
        self._data[picture:end] = b"" if end == len(self._data) else bytes(max(0, end - picture))
        struct.pack_into(f"{self._order}L", self._data, self._next, 0)
        return True

    def _read_directory(self, name: str, start: int) -> int:
        """Note the entries of a directory; the place behind them."""
        end = start + 2 + 12 * self._unpack("H", start)
        for place in range(start + 2, end, 12):
            self._unpack("L", place + 8)
            self._places[name, self._unpack("H", place)] = place
        return end

    def _read_subdirectory(self, name: str, pointer: tuple[str, int]) -> None:
        if pointer in self._places:
            self._read_directory(name, self._value(pointer))

    def _value(self, key: tuple[str, int]) -> int:
        """The one number of an entry, 0 where there is none."""
        if key not in self._places:
            return 0
        place = self._places[key]
        return self._unpack({_BYTE: "B", _SHORT: "H"}.get(self._unpack("H", place + 2), "L"), place + 8)

    def _set(self, key: tuple[str, int], value: int) -> None:
        if key in self._places:
            place = self._places[key]
            short = self._unpack("H", place + 2) == _SHORT and value < 1 << 16
            # Both types have room for four bytes, so a short number can become a long one.
            entry = struct.pack(f"{self._order}HLHH", _SHORT, 1, value, 0) if short else None
            self._data[place + 2 : place + 12] = entry or struct.pack(f"{self._order}HLL", _LONG, 1, value)

    def _unpack(self, kind: str, place: int) -> int:
        return struct.unpack_from(self._order + kind, self._data, place)[0]


def xmp_orientation(xmp: bytes) -> int:
    """The orientation in an XMP packet, 1 where there is none."""
    found = re.search(_XMP_ORIENTATION + _XMP_VALUE + rb"([1-8])", xmp)
    return int(found[1]) if found else 1


def upright_xmp(xmp: bytes) -> bytes:
    """The packet of the picture after it was turned."""
    return _replaced(xmp, _XMP_ORIENTATION, 1)


def sized_xmp(xmp: bytes, width: int, height: int) -> bytes:
    """The packet with the picture's size where it says one."""
    return _replaced(_replaced(xmp, _XMP_WIDTHS, width), _XMP_HEIGHTS, height)


def _replaced(xmp: bytes, name: bytes, value: int) -> bytes:
    return re.sub(rb"(" + name + _XMP_VALUE + rb")\d+", rb"\g<1>%d" % value, xmp)
