"""``ipt-fast convert``: make a file of weights a folder that every command's --model takes."""

import argparse
from pathlib import Path

from .._precision import DTYPES
from ..models import open_checkpoint, open_model, shipped_models
from ._arguments import RAW_HELP, Subparsers, json_object
from ._outputs import check_new_folder


def add_parser(subparsers: Subparsers) -> None:
    parser = subparsers.add_parser(
        "convert",
        help="make a file of weights a folder for --model",
        description="Read a PyTorch or safetensors file strictly and save config.json and model.safetensors into OUT. "
        "Of a published IPT or Restormer the shape is read from the tensors, but the heads of an IPT's attention are "
        "those of --model. "
        "With --dtype, FILE may also be the folder of a saved model, or the name of one that ships.",
    )
    option = parser.add_argument
    option("file", type=Path, metavar="FILE", help="weights, such as a published IPT")
    option("output", type=Path, metavar="OUT", help="a new folder")
    option("--model", help="the architecture, such as ipt; of a file")
    option("--dtype", choices=list(DTYPES), help="precision of the weights in OUT; opened, they are float32 again")
    option("--model-config", type=json_object, default={}, metavar="JSON",
           help="fields of the model's config, such as '{\"heads\": 6}'")  # fmt: skip
    option("--raw-weights", action="store_true", help=RAW_HELP)
    option("--tasks", nargs="+", metavar="TASK", help="names of an IPT's heads in order, where its tails do not tell")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Convert as the parsed arguments say; 0.

    Raises:
        ValueError: bad arguments, OUT holds something already, or the file does not fit.
    """
    check_new_folder("OUT", args.output)
    dtype = DTYPES[args.dtype] if args.dtype else None
    if dtype is not None and (args.file.is_dir() or str(args.file) in shipped_models()):
        if given := [name for name in ("model", "model_config", "tasks", "raw_weights") if getattr(args, name)]:
            names = ", ".join("--" + name.replace("_", "-") for name in given)
            raise ValueError(f"{names} must be left out where FILE is the folder of a saved model; got {args.file}")
        open_model(args.file).save_pretrained(args.output, dtype=dtype)
        print(args.output)
        return 0
    if args.file.is_dir() or (args.file.name == "model.safetensors" and (args.file.parent / "config.json").exists()):
        raise ValueError(
            f"FILE must be weights alone; got {args.file}, which is a saved model already, whose folder --model takes"
        )
    if args.model is None:
        raise ValueError("--model must name the architecture of FILE; got none")
    config = args.model_config
    if args.tasks is not None:
        if "tasks" in config:
            raise ValueError("--tasks must be left out where --model-config has tasks; got both")
        config = {**config, "tasks": tuple(args.tasks)}
    model = open_checkpoint(args.file, args.model, average=False if args.raw_weights else None, **config)
    model.save_pretrained(args.output, dtype=dtype)
    print(args.output)
    return 0
