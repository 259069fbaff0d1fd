"""Types of arguments that several commands take."""

import argparse
import json
from typing import TypeAlias

from ..models import shipped_models
from ..tiling import PROCEDURES

Subparsers: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"
RAW_HELP = "of a file with averaged weights (EMA), such as checkpoint.pth of a run, take those of the last iteration"
TILE_HELP = f"auto (by estimated memory), whole, or a size in pixels; of IPT {', '.join(PROCEDURES)}"
MODELS_HELP = "Models that ship: " + ". ".join(f"{name}: {purpose}" for name, purpose in shipped_models().items()) + "."


def tile_size(text: str) -> str | int | None:
    """``auto``, ``whole`` (None), a size in pixels or a procedure, as :func:`ipt_fast.restore` takes it."""
    if text in ("auto", "whole", *PROCEDURES):
        return None if text == "whole" else text
    try:
        return int(text)
    except ValueError:
        names = ", ".join(PROCEDURES)
        raise argparse.ArgumentTypeError(f"must be auto, whole, a size in pixels, {names}; got {text!r}") from None


def json_object(text: str) -> dict:
    """A JSON object."""
    try:
        value = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise argparse.ArgumentTypeError(f"not JSON: {error}") from error
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"must be a JSON object such as '{{\"width\": 24}}'; got {text}")
    return value
