"""``ipt-fast finetune``: go on training one task of a pre-trained model."""

import argparse

from ..models import list_models, open_model, saved_folder
from ..training.config import TrainingConfig
from . import train
from ._arguments import Subparsers

# As IPT was fine-tuned (section 4).
DEFAULTS = {"model": None, "lr": 2e-5, "lr_min": 2e-5, "warmup": 0, "weight_decay": 0.0, "loss": "l1"}


def add_parser(subparsers: Subparsers) -> None:
    parser = train.add_training_parser(
        subparsers,
        "finetune",
        help="go on training one task of a pre-trained model",
        description="Keep one head, tail and task embedding of a model with several tasks (--task), and train it on.",
    )
    parser.set_defaults(run=run, **DEFAULTS)


def run(args: argparse.Namespace) -> int:
    """Fine-tune as the parsed arguments say; exit status as :func:`ipt_fast.cli.train.run`.

    Raises:
        ValueError: --model is no trained model, or it has several tasks and --task names none.
    """
    return train.run(args, _prepare)


def _prepare(args: argparse.Namespace) -> None:
    """A name means the weights that ship; a resumed run needs no model, as it has its own."""
    if args.resume and args.model not in list_models():
        return
    if args.model is None:
        raise ValueError("--model must be the folder of a saved model, or one that ships; got none")
    args.model = str(saved_folder(args.model))
    contract = open_model(args.model).contract
    if contract.generates and "loss" not in args.given:
        args.loss = TrainingConfig.loss
    tasks = contract.tasks
    if args.task is None and len(tasks) > 1 and not args.resume:
        raise ValueError(f"--task must be the one of {', '.join(tasks)} to keep; got none")
