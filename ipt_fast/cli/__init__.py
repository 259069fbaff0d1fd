"""The command line ``ipt-fast``: one module for each command."""

import argparse
import importlib
import signal
import sys
import warnings
from collections.abc import Sequence
from typing import Any

import ipt_fast

from ._streams import printing_never_fails

COMMANDS = (
    "restore", "eval", "train", "finetune", "sample", "encode", "fid", "convert", "plot", "attribute", "info",
)  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``ipt-fast``; returns the exit status: 0, 1 where some images failed, 2 for a wrong call or bad input.

    The status is about the work: what cannot be printed changes nothing.
    """
    with printing_never_fails(), warnings.catch_warnings():
        warnings.showwarning = _show_warning
        return _run(argv)


def _run(argv: Sequence[str] | None) -> int:
    parser = argparse.ArgumentParser(prog="ipt-fast", description="Image-restoration transformers, exact and fast.")
    parser.add_argument("--version", action="version", version=f"ipt-fast {ipt_fast.__version__}")
    subparsers = parser.add_subparsers(required=True, metavar="command")
    for command in COMMANDS:
        importlib.import_module(f"{__name__}.{command}").add_parser(subparsers)
    args, rest = parser.parse_known_args(argv)
    if rest and not getattr(args, "take_rest", lambda *_: False)(args, rest):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    try:
        return args.run(args)
    except BrokenPipeError:  # whoever read a report has seen enough
        return 128 + signal.SIGPIPE
    except (ValueError, TypeError, OSError, RuntimeError) as error:
        print(f"ipt-fast: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("ipt-fast: interrupted", file=sys.stderr)
        return 130


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    print(f"ipt-fast: warning: {message}", file=sys.stderr)
