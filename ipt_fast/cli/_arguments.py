"""Types of arguments that several commands take."""

import argparse


def tile_size(text: str) -> str | int | None:
    """``auto``, ``whole`` (None) or a size in pixels, as :func:`ipt_fast.restore` takes it."""
    if text in ("auto", "whole"):
        return None if text == "whole" else text
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be auto, whole or a size in pixels, got {text!r}") from None
