"""``ipt-fast info``: what is installed, and which backend runs which operator; or what a model is."""

import argparse
import dataclasses
import platform

import torch

import ipt_fast

from .. import _extension
from ..acceleration import accelerate
from ..models import PretrainedModel, shipped_models
from ._arguments import Subparsers
from ._models import MODEL_HELP, described, open_any, recognised


def add_parser(subparsers: Subparsers) -> None:
    parser = subparsers.add_parser("info", help="versions, hardware, and which backend runs which operator")
    parser.add_argument("--model", help=f"tell of this instead: {MODEL_HELP}")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    if args.model is not None:
        return _tell_of_model(args.model)
    print(f"ipt-fast {ipt_fast.__version__}, torch {torch.__version__}, Python {platform.python_version()}")
    print(f"CPU      {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads")
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    print(f"GPU      {', '.join(gpus) or 'none'}")
    print(f"models   {', '.join(ipt_fast.list_models())}")
    for name, purpose in shipped_models().items():
        print(f"ships    {name}: {purpose}")
    if error := _extension.error():
        print(f"C++      {error}")
    else:
        build = ", ".join(f"{name} {value}" for name, value in _extension.build_info().items())
        print(f"C++      instruction set {_extension.isa()}; built with {build}")
    for operator, table in ipt_fast.explain().items():
        print(operator)
        for backend, reason in table.items():
            print(f"  {backend:<10} {reason or 'yes'}")
    return 0


def _tell_of_model(source: str) -> int:
    model = open_any(source)
    if isinstance(model, PretrainedModel):
        print(f"model    {type(model).__name__}, of ipt_fast")
        print(f"config   {', '.join(f'{name} {value}' for name, value in dataclasses.asdict(model.config).items())}")
        print(f"weights  {sum(parameter.numel() for parameter in model.parameters()) / 1e6:.2f} M")
        return 0
    print(*described(model), *recognised(accelerate(model, verify=False)), sep="\n")
    return 0
