"""``ipt-fast train``: train a model on a folder of images."""

import argparse
from dataclasses import fields
from pathlib import Path

import torch

from ..training.config import TrainingConfig
from ..training.loop import train
from ..training.losses import LOSSES
from ._arguments import Subparsers, json_object


def add_parser(subparsers: Subparsers) -> None:
    add_training_parser(
        subparsers,
        "train",
        help="train a model on a folder of clean images",
        description="Train a blind Gaussian denoiser, or all tasks of a model that has tasks.",
    )


def add_training_parser(subparsers: Subparsers, name: str, *, help: str, description: str) -> argparse.ArgumentParser:
    """A command that takes all settings of a training run; with torchrun it runs on several processes."""
    parser = subparsers.add_parser(
        name,
        help=help,
        description=f"{description} Training pairs are made from a folder of clean images (for models with tasks also "
        "from WebDataset shards). The output folder receives the averaged model (config.json, model.safetensors), "
        "checkpoint.pth and log.csv. Ctrl-C saves and stops.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    default = {entry.name: entry.default for entry in fields(TrainingConfig)}
    option = parser.add_argument
    option("--data", type=Path, required=True, metavar="FOLDER", help="clean training images, subfolders included")
    option("--out", type=Path, required=True, metavar="FOLDER", help="where the model, checkpoint and log go")
    option("--model", default=default["model"], help="name of a model, or folder of a saved one to start from")
    option("--model-config", type=json_object, default={}, metavar="JSON", help="fields of the model's config")
    option("--task", default=None, metavar="NAME", help="keep only this task of a saved model with several")
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
    option("--schedule", choices=["cosine", "step"], default=default["schedule"], help="how the learning rate falls")
    option("--weight-decay", type=float, default=default["weight_decay"], help="AdamW weight decay")
    option("--grad-clip", type=float, default=default["grad_clip"], help="largest gradient norm, 0 for none")
    option("--loss", choices=list(LOSSES), default=default["loss"], help="what to minimise")
    option("--ema", type=float, default=default["ema"], help="decay of the averaged weights")
    option("--seed", type=int, default=default["seed"], help="seed of the weights and of the data")
    option("--amp", choices=["none", "bf16"], default=default["amp"], help="mixed precision")
    option("--val", type=Path, default=None, metavar="FOLDER", help="images for a quick PSNR at each checkpoint")
    option("--val-sigma", type=float, default=default["val_sigma"], help="noise level of that PSNR")
    option("--log-every", type=int, default=default["log_every"], metavar="N", help="iterations between log rows")
    option("--save-every", type=int, default=default["save_every"], metavar="N", help="iterations between checkpoints")
    option("--workers", type=int, default=default["workers"], metavar="N", help="processes that prepare batches")
    option("--threads", type=int, default=None, metavar="N", help="CPU threads; None leaves PyTorch's choice")
    option("--device", default=None, help="cpu, cuda ...; None takes a GPU where there is one")
    option("--resume", action="store_true", help="continue the run in OUT, with the same settings")
    parser.set_defaults(run=run)
    return parser


def run(args: argparse.Namespace) -> int:
    """Train as the parsed arguments say; 0 when finished, 130 when stopped by a signal."""
    settings = {entry.name: getattr(args, entry.name) for entry in fields(TrainingConfig) if entry.name != "patch_size"}
    config = TrainingConfig(patch_size=args.patch, **settings)
    if args.threads is not None:
        if args.threads < 1:
            raise ValueError(f"threads must be at least 1; got {args.threads}")
        torch.set_num_threads(args.threads)
    try:
        finished = train(config, resume=args.resume)
    except FloatingPointError as error:
        saved = (config.out / "checkpoint.pth").exists()
        kept = f"the last checkpoint in {config.out} is kept" if saved else "no checkpoint was saved yet"
        raise ValueError(f"training diverged: {error}; {kept}") from error
    if finished < config.total_iterations:
        print(f"stopped and saved after {finished} of {config.total_iterations} iterations; --resume continues")
        return 130
    print(f"finished {finished} iterations; the model is in {config.out}")
    return 0
