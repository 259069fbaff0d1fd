"""Directories of tags, as a TIFF file and a block of EXIF hold them: read and written byte by byte.

A value keeps its type and its bytes, whatever they are: text need not be ASCII, and a number need not be of the type
that the standards say.
"""

import io
import struct
from collections.abc import Container
from dataclasses import dataclass
from typing import BinaryIO, TypeAlias, Union

import numpy as np
from PIL import ExifTags, TiffTags

BYTE, ASCII, SHORT, LONG, RATIONAL, UNDEFINED, LONG8 = 1, 2, 3, 4, 5, 7, 16
EXIF, GPS, INTEROPERABILITY = 34665, 34853, 40965  # tags that point to further directories
XMP, IPTC, ICC_PROFILE = 700, 33723, 34675
_OPAQUE = (XMP, IPTC, ICC_PROFILE)  # bytes, also where a program called them numbers
_POINTERS = {"main": (EXIF, GPS), EXIF: (INTEROPERABILITY,)}
# The numbers that a value is made of, by its type; a rational number is two of them.
_NUMBERS = {1: "u1", 2: "u1", 3: "u2", 4: "u4", 5: "u4", 6: "i1", 7: "u1", 8: "i2", 9: "i4", 10: "i4", 11: "f4",
            12: "f8", 13: "u4", 16: "u8", 17: "i8", 18: "u8"}  # fmt: skip
_RATIONALS = (5, 10)
_WHOLE = (1, 3, 4, 13)
_PLACES = (4, 13)  # types of what points to a directory
_BIG_TYPES = {16: 4, 17: 9, 18: 13}  # that only files with offsets of 64 bits have, and their like of 32 bits


@dataclass(frozen=True)
class Value:
    """What a tag says: the number of its type, and little-endian bytes."""

    type: int
    data: bytes

    @property
    def numbers(self) -> tuple[float, ...]:
        """Whole or rational ones; none where it holds something else."""
        if self.type not in (*_WHOLE, *_RATIONALS):
            return ()
        found = np.frombuffer(self.data, f"<{_NUMBERS[self.type]}").tolist()
        if self.type in _RATIONALS:
            found = [a / b if b else float("nan") for a, b in zip(found[::2], found[1::2], strict=True)]
        return tuple(found)


Directory: TypeAlias = dict[int, Union[Value, "Directory"]]
Found: TypeAlias = tuple[Directory, list[str]]  # and the names of the tags that are damaged


def value(type: int, *numbers: int) -> Value:
    """A value of whole numbers, two of them for a rational one."""
    return Value(type, np.array(numbers, f"<{_NUMBERS[type]}").tobytes())


def name_of(tag: int, directory: int | str = "main") -> str:
    """What a warning calls a tag."""
    names = ExifTags.GPSTAGS if directory == GPS else ExifTags.TAGS
    name = TiffTags.lookup(tag).name
    return names.get(tag, f"tag {tag}" if name == "unknown" else name)


def of_block(exif: bytes, without: Container[int] = ()) -> Found:
    """The main directory of an EXIF block, with those it points to, but for the tags ``without``."""
    return read(io.BytesIO(exif.removeprefix(b"Exif\0\0")), without=without)


def to_block(directory: Directory) -> bytes:
    """The EXIF block with this main directory."""
    return b"Exif\0\0II*\0\x08\0\0\0" + packed(directory, 8)


def read(file: BinaryIO, start: int | None = None, without: Container[int] = ()) -> Found:
    """A directory of a file, with those it points to.

    Args:
        file: a TIFF file, or what follows the name of an EXIF block.
        start: where the directory begins; the file's first by default.
        without: tags of this directory that are passed over.

    Raises:
        ValueError: the directory itself is damaged.
    """
    return _Reader(file).directory(start, "main", without)


class _Reader:
    def __init__(self, file: BinaryIO) -> None:
        self.file, self.size = file, file.seek(0, io.SEEK_END)
        file.seek(0)
        signature = file.read(4)
        self.order, self.big = ("<" if signature[:2] == b"II" else ">"), b"+" in signature

    def directory(self, start: int | None, kind: int | str, without: Container[int] = ()) -> Found:
        room = 8 if self.big else 4  # of a place in the file, and of a value in an entry
        place, number = ("Q", "Q") if self.big else ("L", "H")
        if start is None:
            start = self.unpack(place, self.take(room, room))
        head = struct.calcsize(f"={number}")
        count = self.unpack(number, self.take(start, head))
        entries = self.take(start + head, count * (4 + 2 * room))
        found, damaged = Directory(), []
        for tag, type, length, data in struct.iter_unpack(f"{self.order}HH{place}{room}s", entries):
            if tag in without or not length:
                continue
            try:
                size = length * _size_of(type, self.big)
                if size > room:
                    data = self.take(self.unpack(place, data), size)
                content = self.value(tag, type, data[:size])
                if tag in _POINTERS.get(kind, ()):
                    below, more = self.directory(_place_in(content), tag)
                    damaged += more
                    if below:
                        found[tag] = below
                else:
                    found[tag] = content
            except ValueError:
                damaged.append(name_of(tag, kind))
        return found, damaged

    def value(self, tag: int, type: int, data: bytes) -> Value:
        if tag in _OPAQUE:
            return Value(UNDEFINED, data)
        numbers = np.frombuffer(data, f"{self.order}{_NUMBERS[type]}")
        type = _BIG_TYPES.get(type, type)
        little = numbers.astype(f"<{_NUMBERS[type]}")
        if numbers.dtype.kind != "f" and (little != numbers).any():
            raise ValueError("a number must have at most 32 bits to be kept; got a larger one")
        return Value(type, little.tobytes())

    def take(self, start: int, size: int) -> bytes:
        if start + size > self.size:
            raise ValueError("a directory must lie inside of its file; got a damaged or truncated one")
        self.file.seek(start)
        return self.file.read(size)

    def unpack(self, kind: str, data: bytes) -> int:
        return int(struct.unpack(self.order + kind, data)[0])


def _size_of(type: int, big: bool) -> int:
    if type not in _NUMBERS or (type in _BIG_TYPES and not big):
        raise ValueError(f"a tag must have one of the types of TIFF; got {type}")
    return np.dtype(_NUMBERS[type]).itemsize * (2 if type in _RATIONALS else 1)


def _place_in(pointer: Value) -> int:
    if pointer.type not in _PLACES or len(pointer.data) != 4:
        raise ValueError("it must point to a directory; got something else")
    return int(pointer.numbers[0])


def packed(directory: Directory, place: int, big: bool = False) -> bytes:
    """The bytes of a directory, and of all that it points to, which are to stand at ``place`` of a file."""
    room = 8 if big else 4
    head = struct.pack("<Q" if big else "<H", len(directory))
    end = place + len(head) + len(directory) * (4 + 2 * room) + room
    entries, behind = head, b""
    for tag, content in sorted(directory.items()):
        if isinstance(content, dict):
            data = packed(content, end + len(behind), big)
            entries += struct.pack("<HH", tag, LONG8 if big else LONG) + b"\1".ljust(room, b"\0")
            entries += (end + len(behind)).to_bytes(room, "little")
        else:
            data, type = content.data, content.type
            count = len(data) // _size_of(type, big)
            entries += struct.pack("<HH", tag, type) + count.to_bytes(room, "little")
            inside = len(data) <= room
            entries += data.ljust(room, b"\0") if inside else (end + len(behind)).to_bytes(room, "little")
            data = b"" if inside else data
        behind += data + bytes(len(data) % 2)
    return entries + bytes(room) + behind
