"""``ipt-fast train``: train a model on a folder of images."""

import argparse
import warnings
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

from ..data.degradations import described_tasks
from ..training.checkpoint import find_checkpoint, load_checkpoint
from ..training.config import SCHEDULES, TrainingConfig
from ..training.distributed import FailedElsewhereError, World
from ..training.log import is_log
from ..training.loop import train
from ..training.losses import LOSSES
from ..training.parallel import STRATEGIES
from ..training.recipe import is_recipe_of_run, read_recipe, shipped_recipes
from ._arguments import Subparsers, json_object
from ._outputs import Outputs, model_files


class _Option(argparse.Action):
    """Stores a value, and its name in ``given``: a run that is resumed must tell it from a default."""

    def __call__(self, parser: Any, namespace: argparse.Namespace, values: Any, option_string: Any = None) -> None:
        setattr(namespace, self.dest, values)
        namespace.given = {*getattr(namespace, "given", ()), self.dest}


def _field(option: str) -> str:
    """The field of the settings that an option sets."""
    return "patch_size" if option == "patch" else option


def _mixture(text: str) -> tuple[str, float | None]:
    """NAME or NAME=WEIGHT."""
    name, equals, weight = text.partition("=")
    try:
        return name, float(weight) if equals else None
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be NAME or NAME=WEIGHT; got {text!r}") from None


class _Folders(_Option):
    """A folder, or a list of several."""

    def __call__(self, parser: Any, namespace: argparse.Namespace, values: Any, option_string: Any = None) -> None:
        super().__call__(parser, namespace, values[0] if len(values) == 1 else values, option_string)


class _Task(_Option):
    """One name, or names with weights."""

    def __call__(self, parser: Any, namespace: argparse.Namespace, values: Any, option_string: Any = None) -> None:
        alone = len(values) == 1 and values[0][1] is None
        mixture = {name: 1.0 if weight is None else weight for name, weight in values}
        super().__call__(parser, namespace, values[0][0] if alone else mixture, option_string)


class _Flag(argparse.BooleanOptionalAction):
    """The same for --name and --no-name."""

    def __call__(self, parser: Any, namespace: argparse.Namespace, values: Any, option_string: Any = None) -> None:
        super().__call__(parser, namespace, values, option_string)
        namespace.given = {*getattr(namespace, "given", ()), self.dest}


def add_parser(subparsers: Subparsers) -> None:
    add_training_parser(
        subparsers,
        "train",
        help="train a model on clean images or on pairs, or a generator on images of classes",
        description="Train a model for a task or a mixture of tasks, or all tasks of a model that has some of its own; "
        "or a generator (--task generate) on a folder with a subfolder for each class, or on latents.",
    )


def add_training_parser(subparsers: Subparsers, name: str, *, help: str, description: str) -> argparse.ArgumentParser:
    """A command that takes all settings of a training run; with torchrun it runs on several processes."""
    parser = subparsers.add_parser(
        name,
        help=help,
        description=f"{description} Data are clean images, of which training pairs are made, or pairs (--target), in "
        "folders or WebDataset shards. The output folder receives the averaged model (config.json, model.safetensors), "
        "checkpoint.pth and log.csv. Ctrl-C saves and stops.",
        epilog=f"Tasks: {'; '.join(f'{name}: {summary}' for name, summary in described_tasks().items())}; "
        f"generate: images out of noise. Recipes that ship: {', '.join(shipped_recipes())}.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    default = {entry.name: entry.default for entry in fields(TrainingConfig)}

    def option(name: str, action: type[argparse.Action] = _Option, **settings: Any) -> None:
        parser.add_argument(name, action=action, **settings)

    parser.add_argument("--config", default=None, metavar="FILE",
                        help="YAML file of settings, or a recipe that ships; options given here win")  # fmt: skip
    option("--data", action=_Folders, type=Path, nargs="+", default=None, metavar="FOLDER",
           help="clean training images with subfolders, or .tar shards; with --target inputs of pairs")  # fmt: skip
    option("--target", action=_Folders, type=Path, nargs="+", default=None, metavar="FOLDER",
           help="targets of pairs, by the same names; with two views one for each two folders of --data")  # fmt: skip
    option("--shrink", type=int, nargs="+", default=[default["shrink"]], metavar="N",
           help="make clean images so many times smaller first, as is good for JPEGs")  # fmt: skip
    option("--enlarge", type=float, default=default["enlarge"], metavar="N",
           help="enlarge half of the clean patches up to N times, to be as soft as photos of cameras")  # fmt: skip
    option("--data-weights", type=float, nargs="+", default=None, metavar="W",
           help="how often each folder is drawn from; None: by the number of its images")  # fmt: skip
    option("--out", type=Path, default=None, metavar="FOLDER", help="where the model, checkpoint and log go")
    option("--model", default=default["model"], help="name of a model, or folder of a saved one to start from")
    option("--model-config", type=json_object, default={}, metavar="JSON", help="fields of the model's config")
    option("--flip", action=_Flag, default=default["flip"],
           help="flip half of the images that a generator learns from")  # fmt: skip
    option("--task", action=_Task, type=_mixture, nargs="+", default=None, metavar="NAME[=WEIGHT]",
           help="what the images suffer from, one task or a mixture; of a model with several tasks a single name keeps "
           "only that one; None: denoise, or all tasks of the model")  # fmt: skip
    option("--contrastive", type=float, default=default["contrastive"], metavar="LAMBDA",
           help="weight of the contrastive loss (IPT)")  # fmt: skip
    option("--sigma", type=float, nargs=2, default=default["sigma"], metavar=("LOW", "HIGH"),
           help="noise levels on the 0..255 scale")  # fmt: skip
    option("--iterations", type=int, nargs="+", default=[default["iterations"]], metavar="N",
           help="updates; several values are stages, with as many values of --patch and --batch-size")  # fmt: skip
    option("--patch", type=int, nargs="+", default=None, metavar="N",
           help="patch size in pixels; None takes the model's size of input, 128 where it has none")  # fmt: skip
    option("--batch-size", type=int, nargs="+", default=[default["batch_size"]], metavar="N", help="patches an update")
    option("--lr", type=float, default=default["lr"], help="highest learning rate (AdamW)")
    option("--lr-min", type=float, default=default["lr_min"], help="learning rate at the end of the cosine")
    option("--warmup", type=int, default=default["warmup"], metavar="N", help="iterations of linear warm-up")
    option("--schedule", choices=list(SCHEDULES), default=default["schedule"], help="how the learning rate falls")
    option("--weight-decay", type=float, default=default["weight_decay"], help="AdamW weight decay")
    option("--grad-clip", type=float, default=default["grad_clip"], help="largest gradient norm, 0 for none")
    option("--loss", choices=list(LOSSES), default=default["loss"], help="what to minimise")
    option("--ema", type=float, default=default["ema"], help="decay of the averaged weights")
    option("--seed", type=int, default=default["seed"], help="seed of the weights and of the data")
    option("--amp", choices=["none", "bf16"], default=default["amp"], help="mixed precision")
    option("--betas", type=float, nargs=2, default=default["betas"], metavar=("B1", "B2"), help="AdamW's betas")
    option("--val", action=_Folders, type=Path, nargs="+", default=None, metavar="FOLDER",
           help="images for a quick PSNR at each checkpoint; of a generator for its loss")  # fmt: skip
    option("--val-target", type=Path, default=None, metavar="FOLDER", help="targets, where --val are inputs of pairs")
    option("--val-sigma", type=float, default=default["val_sigma"], help="noise level of that PSNR")
    option("--log-every", type=int, default=default["log_every"], metavar="N", help="iterations between log rows")
    option("--save-every", type=int, default=default["save_every"], metavar="N", help="iterations between checkpoints")
    option("--workers", type=int, default=default["workers"], metavar="N", help="processes that prepare batches")
    option("--threads", type=int, default=None, metavar="N", help="CPU threads; None leaves PyTorch's choice")
    option("--device", default=None, help="cpu, cuda ...; None takes a GPU where there is one")
    # How a step is carried out.
    option("--accumulate", type=int, default=default["accumulate"], metavar="N",
           help="micro-batches an update, one after the other: less memory")  # fmt: skip
    option("--activation-checkpointing", action=_Flag, default=default["activation_checkpointing"],
           help="compute activations of transformer layers again: less memory")  # fmt: skip
    option("--strategy", choices=list(STRATEGIES), default=default["strategy"],
           help="several processes have all weights each, or parts of them (FSDP2)")  # fmt: skip
    option("--tensorboard", action=_Flag, default=default["tensorboard"], help="log for TensorBoard, too")
    parser.add_argument(
        "--resume",
        action="store_true",
        help="continue the run in OUT, which has its settings; those given must agree",
    )
    parser.set_defaults(run=run)
    return parser


def run(args: argparse.Namespace, prepare: Callable[[argparse.Namespace], None] = lambda args: None) -> int:
    """Train as the parsed arguments say; 0 when finished, 130 when stopped by a signal.

    Of several processes the first one prints.

    Args:
        prepare: checks and changes the arguments first.
    """
    world = World.join()
    if world.rank:
        warnings.simplefilter("ignore")  # the first one warns
    try:
        config = world.together(lambda: _settings(args, prepare))
        finished = train(config, resume=args.resume, say=print)
    except FailedElsewhereError:
        return 2
    except ImportError as error:  # of an extra
        raise ValueError(str(error)) from error
    except FloatingPointError as error:  # in all processes, which have the same gradients
        if world.rank:
            return 2
        saved = find_checkpoint(config.out).exists()
        kept = f"the last checkpoint in {config.out} is kept" if saved else "no checkpoint was saved yet"
        raise ValueError(f"training diverged: {error}; {kept}") from error
    world.leave()
    stopped = finished < config.total_iterations
    if world.rank == 0 and stopped:
        print(f"stopped and saved after {finished} of {config.total_iterations} iterations; --resume continues")
    elif world.rank == 0:
        print(f"finished {finished} iterations; the model is in {config.out}")
    return 130 if stopped else 0


def _settings(args: argparse.Namespace, prepare: Callable[[argparse.Namespace], None]) -> TrainingConfig:
    """Those of a new run, or those of the run in OUT and what is given beside."""
    args.given = {_field(option) for option in getattr(args, "given", ())}
    args.patch_size = args.patch
    if args.config is not None:
        for name, value in read_recipe(args.config, args.given).items():
            setattr(args, name, value)
            args.given.add(name)
    prepare(args)
    if args.out is None:
        raise ValueError("--out must be a folder for the run; got none")
    if args.resume:
        given = {name: getattr(args, name) for name in args.given}
        config = TrainingConfig.resumed(load_checkpoint(find_checkpoint(args.out))["config"], **given)
    elif args.data is None:
        raise ValueError("--data must be a folder of clean images; got none")
    else:
        config = TrainingConfig(**{entry.name: getattr(args, entry.name) for entry in fields(TrainingConfig)})
    _check_out(config, args.resume)
    return config


def _check_out(config: TrainingConfig, resume: bool) -> None:
    """Raise ValueError where the run would write over a file that no run made; the loop looks for its checkpoint."""
    outputs = Outputs(model_files(config.model))
    if not resume and not find_checkpoint(config.out).exists():
        for name in ("config.json", "model.safetensors"):
            outputs.claim(f"{name} in --out", config.out / name, lambda _: False)
    outputs.claim("log.csv in --out", config.out / "log.csv", is_log)
    outputs.claim("recipe.yml in --out", config.out / "recipe.yml", is_recipe_of_run)
