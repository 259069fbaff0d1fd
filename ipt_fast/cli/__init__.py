"""The command line: ``ipt-fast restore | eval | train | finetune | convert | plot | info``."""

import argparse
import importlib
import sys
from collections.abc import Sequence

import ipt_fast

COMMANDS = ("restore", "eval", "train", "finetune", "convert", "plot", "info")


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``ipt-fast``; returns the exit status: 0, 1 where some images failed, 2 for a wrong call or bad input."""
    parser = argparse.ArgumentParser(prog="ipt-fast", description="Image-restoration transformers, exact and fast.")
    parser.add_argument("--version", action="version", version=f"ipt-fast {ipt_fast.__version__}")
    subparsers = parser.add_subparsers(required=True, metavar="command")
    for command in COMMANDS:
        importlib.import_module(f"{__name__}.{command}").add_parser(subparsers)
    args = parser.parse_args(argv)
    try:
        return args.run(args)
    except (ValueError, TypeError, OSError, RuntimeError) as error:
        print(f"ipt-fast: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("ipt-fast: interrupted", file=sys.stderr)
        return 130
