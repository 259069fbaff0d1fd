"""Models as commands name them: ours, and files of other people's, which spandrel opens and which are accelerated."""

import argparse
import collections
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import nn

from ..acceleration import Report, accelerate
from ..integrations import spandrel
from ..models import Described, create_model, list_models, load_checkpoint, open_checkpoint, open_model

MODEL_HELP = "a model that ships, a folder of a saved one, or a file of weights of any model that spandrel knows"


def open_named(args: argparse.Namespace) -> nn.Module:
    """The model of --model, --checkpoint and --raw-weights; with --verbose, what is known of other people's is printed.

    Raises:
        ValueError: there is none, it is damaged, or of a kind that neither we nor spandrel know.
    """
    if args.checkpoint is not None:
        return _open_checkpoint(args)
    if args.raw_weights:
        raise ValueError("--raw-weights must be left out without --checkpoint, which it is about; got it alone")
    model = open_any(args.model)
    if isinstance(model, nn.Module):
        return model
    report = _accelerated(model, args.model)
    if args.verbose:
        print(*described(model), *([] if report is None else recognised(report)), sep="\n")
        if report is not None and report.rows:
            print(report)
    return Described(model)  # after the flags for 16 bit were raised


def open_any(source: str) -> Any:
    """A model of ours, or the descriptor of a file of other people's.

    Raises:
        ValueError: it is neither, or damaged.
    """
    if source in list_models() or not Path(source).is_file():
        return open_model(source)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        try:
            model = open_model(source)
        except ValueError as error:
            reason = error
        else:
            for each in found:
                warnings.warn(each.message, stacklevel=2)
            return model
    try:
        return spandrel.load_file(source)
    except ImportError as error:
        raise ValueError(f"{reason}; for models of other people {error}") from error


def described(descriptor: Any) -> Iterator[str]:
    """Lines that tell what a descriptor is."""
    needs, parameters = descriptor.size_requirements, sum(p.numel() for p in descriptor.model.parameters())
    sizes = [f"at least {needs.minimum}"] * (needs.minimum > 1) + ["square"] * needs.square
    sizes += [f"multiples of {needs.multiple_of}"] * (needs.multiple_of > 1)
    half = ["bfloat16"] * descriptor.supports_bfloat16 + ["float16"] * descriptor.supports_half
    yield f"model    {descriptor.architecture.name}: {' '.join(descriptor.tags)}"
    yield f"does     {descriptor.purpose}, x{descriptor.scale}"
    yield f"takes    {descriptor.input_channels} channels, gives {descriptor.output_channels}"
    yield f"sizes    {', '.join(sizes) or 'any'}; tiles {descriptor.tiling.name.lower()}"
    yield f"16 bit   {', '.join(half) or 'none'}"
    yield f"weights  {parameters / 1e6:.2f} M"


def recognised(report: Report) -> Iterator[str]:
    """Lines that tell by which rules the modules of a model run, those of a kind together."""
    counts = collections.Counter((row.kind, row.rule or f"left: {row.reason}") for row in report.rows)
    if not counts:
        yield "modules  no rule knows one of them"
    for (kind, what), count in counts.items():
        yield f"modules  {count} {kind}: {what}"


def _accelerated(descriptor: Any, source: str) -> Report | None:
    try:
        return accelerate(descriptor)
    except (ValueError, RuntimeError) as error:
        warnings.warn(f"{source} runs as it is: {str(error).splitlines()[0]}", stacklevel=2)
        return None


def _open_checkpoint(args: argparse.Namespace) -> nn.Module:
    average = False if args.raw_weights else None
    model = create_model(args.model)
    if not model.shape_is_in_weights:
        model.reparameterize()  # the merged form takes checkpoints of both forms
        return load_checkpoint(model, args.checkpoint, average=average)
    try:
        return open_checkpoint(args.checkpoint, args.model, average=average)
    except ValueError as error:
        raise ValueError(
            f"--checkpoint must tell the shape of {args.model}: {error}; if it is one, make it a folder for --model "
            "first, with ipt-fast convert, to which the rest can be told"
        ) from error
