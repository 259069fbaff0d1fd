"""A web page of images before and after, in one file: pictures, style and script are in it, and it loads nothing.

A slider moves the border between two versions of an image. The page is written image by image, so it needs the memory
of one, however many it shows.
"""

import base64
import contextlib
import hashlib
import html
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import PIL.Image

from .._files import atomic_write
from .figures import to_picture

DEFAULT_SIZE = 1280  # pixels of the longer side
_LARGEST_PNG = 1 << 19  # bytes; beyond it a picture without alpha becomes a JPEG
_QUALITY = 93
_SMALL = 240  # pixels of the longer side; below it pixels are shown as squares
_MARK = '<meta name="generator" content="ipt-fast page">'
_FOLDER = Path(__file__).parent


@dataclass(frozen=True)
class Panel:
    """One version of an image.

    Attributes:
        title: what the version is called.
        pixels: (H, W), (H, W, 1) or (H, W, 3) uint8, uint16 or floats in [0, 1], which are clipped.
        alpha: (H, W) of the same dtype, or None.
        icc_profile: of the colours, or None.
    """

    title: str
    pixels: np.ndarray
    alpha: np.ndarray | None = None
    icc_profile: bytes | None = None


class Page:
    """A page that is being written; :func:`write_page` makes it.

    Args:
        file: what the page goes to.
        size: pixels of the longer side of a picture; larger ones are shrunk.
    """

    def __init__(self, file: BinaryIO, size: int) -> None:
        self._file, self._size = file, size

    def section(self, title: str, note: str = "") -> None:
        """Begin a part with a title and a line below it."""
        self._write(f"</div><h2>{_text(title)}</h2>{f'<p>{_text(note)}</p>' if note else ''}<div class=images>")

    def add(self, name: str, panels: Sequence[Panel], note: str = "") -> None:
        """Show one image.

        Args:
            name: of the image.
            panels: its versions, two or three, each of which is shown as large as the last but one.
            note: a line about it, such as its scores.
        """
        if len(panels) not in (2, 3):
            raise ValueError(f"panels must be two or three; got {len(panels)}")
        height, width = panels[1].pixels.shape[:2]
        shrink = min(1.0, self._size / max(height, width))
        size = max(round(width * shrink), 1), max(round(height * shrink), 1)
        label = html.escape(f"{name}: border between {panels[0].title} and {panels[1].title}", quote=True)
        kind = "view pixels" if max(size) < _SMALL else "view"
        pictures = "".join(
            f'<img class="{place}" alt="{_text(each.title)}" src="{_data_uri(each, size)}">'
            for each, place in zip(panels, ("first", "second", ""), strict=False)
        )
        choice = ""
        if len(panels) == 3:
            pairs = ((0, 1), (1, 2), (0, 2))
            choice = "<span class=pairs>" + "".join(
                f'<button type=button data-pair="{a}{b}">{_text(panels[a].title)} | {_text(panels[b].title)}</button>'
                for a, b in pairs
            )
            choice += "</span>"
        self._write(
            f"<figure><figcaption><b>{_text(name)}</b><span>{_text(note)}</span>{choice}"
            "<button type=button class=wide aria-pressed=false title='Full width'>&#x2922;</button></figcaption>"
            f'<div class="{kind}" style="--ratio:{size[0] / size[1]:.6g}">{pictures}'
            f"<span class=left>{_text(panels[0].title)}</span><span class=right>{_text(panels[1].title)}</span>"
            "<span class=bar></span>"
            f'<input type=range min=0 max=100 step=1 value=50 aria-label="{label}"></div></figure>\n'
        )

    def fail(self, name: str, reason: str) -> None:
        """Name an image that cannot be shown."""
        caption = f"<b>{_text(name)}</b><span>{_text(reason)}</span>"
        self._write(f"<figure class=failed><figcaption>{caption}</figcaption></figure>\n")

    def _write(self, text: str) -> None:
        self._file.write(text.encode("utf-8", "backslashreplace"))


@contextlib.contextmanager
def write_page(path: str | Path, title: str, note: str = "", *, size: int = DEFAULT_SIZE) -> Iterator[Page]:
    """Write an HTML file; it takes its place at once when the block succeeds.

    Args:
        path: the file.
        title, note: of the page; the note is a line below the title.
        size: pixels of the longer side of a picture; larger ones are shrunk.

    Raises:
        ValueError: ``size`` is below 16.
    """
    if size < 16:
        raise ValueError(f"size must be at least 16 pixels; got {size}")
    style, script = (_FOLDER.joinpath(name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    # Nothing is loaded and no other script runs, whatever the names of the images say.
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    head = (
        f'<!doctype html>\n<html lang=en><head><meta charset=utf-8>{_MARK}<meta http-equiv="Content-Security-Policy" '
        f'content="{policy}"><meta name=viewport content="width=device-width, initial-scale=1">'
        f"<title>{_text(title)}</title><style>{style}</style></head>\n<body><header><h1>{_text(title)}</h1>"
        f"<p>{_text(note)}</p></header><main><div class=images>"
    )
    tail = (
        f"</div></main><footer>Drag over an image, or use the arrow keys. Pictures are at most {size} pixels a side "
        f"and of 8 bits; large ones are JPEGs.</footer><script>{script}</script></body></html>\n"
    )
    with atomic_write(path) as temporary, temporary.open("wb") as file:
        file.write(head.encode("utf-8", "backslashreplace"))
        yield Page(file, size)
        file.write(tail.encode())


def is_page(path: str | Path) -> bool:
    """Whether a file is what :func:`write_page` writes, or empty."""
    with Path(path).open("rb") as file:
        start = file.read(200)
    return not start or _MARK.encode() in start


def _text(text: str) -> str:
    return html.escape(text, quote=True)


def _data_uri(panel: Panel, size: tuple[int, int]) -> str:
    pixels = to_picture(panel.pixels)
    picture = PIL.Image.fromarray(pixels[:, :, 0] if pixels.ndim == 3 and pixels.shape[2] == 1 else pixels)
    if panel.alpha is not None:
        picture.putalpha(PIL.Image.fromarray(to_picture(panel.alpha)))
    if picture.size != size:
        smaller = picture.width > size[0]
        picture = picture.resize(size, PIL.Image.Resampling.LANCZOS if smaller else PIL.Image.Resampling.BICUBIC)
    profile = panel.icc_profile
    content, kind = io.BytesIO(), "png"
    picture.save(content, "PNG", icc_profile=profile)
    if content.tell() > _LARGEST_PNG and panel.alpha is None:
        content, kind = io.BytesIO(), "jpeg"
        picture.save(content, "JPEG", quality=_QUALITY, subsampling=0, icc_profile=profile)
    return f"data:image/{kind};base64,{base64.b64encode(content.getvalue()).decode()}"
