"""Pictures that a command draws, marked as its own, so that it can draw them again in their place."""

from pathlib import Path

import PIL.Image
from PIL import PngImagePlugin

from .._files import atomic_write


def save_picture(picture: PIL.Image.Image, path: Path, command: str) -> None:
    """Write a PNG atomically, with the name of the command that drew it."""
    mark = PngImagePlugin.PngInfo()
    for key, value in _mark(command).items():
        mark.add_text(key, value)
    with atomic_write(path) as temporary:
        picture.save(temporary, pnginfo=mark)


def is_picture_of(path: Path, command: str) -> bool:
    """Whether a file is a PNG that :func:`save_picture` wrote for this command, or empty."""
    try:
        with PIL.Image.open(path, formats=["PNG"]) as picture:
            return picture.info.items() >= _mark(command).items()
    except OSError:
        return path.stat().st_size == 0


def _mark(command: str) -> dict[str, str]:
    return {"Software": f"ipt-fast {command}"}
