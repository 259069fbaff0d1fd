"""Reading weights strictly: wrappers and prefixes are unwrapped, everything else must fit."""

import os
import pathlib
import re
import warnings
import zipfile
from typing import Any, TypeVar

import safetensors.torch
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ..modules.feed_forward import Reparameterized
from . import record

ModuleT = TypeVar("ModuleT", bound=nn.Module)
# Names under which files have weights: averages over training (EMA), and the weights of the last iteration.
AVERAGES = ("params_ema", "ema", "average", "model_ema", "state_dict_ema", "ema_state_dict")
WRAPPERS = (*AVERAGES, "params", "state_dict", "model", "net")
PREFIXES = ("module.", "_orig_mod.")
# Wrappers of a model, which is their attribute ``module``.
PARALLEL = (nn.DataParallel, nn.parallel.DistributedDataParallel, AveragedModel)


def read_state_dict(path: str | os.PathLike, *, average: bool | None = None) -> dict[str, Tensor]:
    """The tensors of a .safetensors or PyTorch file, by parameter name, on the CPU.

    Unwraps one dict under a name of ``WRAPPERS`` (in this order, repeatedly), strips the prefixes "module." and
    "_orig_mod." (this also within names) and the counter "n_averaged" of torch.optim.swa_utils.AveragedModel. Pickles
    are read with ``weights_only=True``.

    Args:
        path: a file, such as the checkpoint.pth of a training run, or a folder written by ``save_pretrained``.
        average: of a file that holds an average over training (EMA) and the last iteration's weights, whether the
            average is taken. None takes it, with a UserWarning.

    Raises:
        ValueError: there is no such file, it is damaged, it holds something else than tensors by name, or it does not
            hold what ``average`` asks for.
        PermissionError: it may not be read.
    """
    path = pathlib.Path(path)
    if path.is_dir():
        path = path / "model.safetensors"
    if not path.is_file():
        raise ValueError(f"path must be a file of weights; got {path}, which is not there")
    try:
        if path.suffix == ".safetensors":
            state: Any = safetensors.torch.load_file(path)
        else:
            check_archive(path)
            state = torch.load(path, map_location="cpu", weights_only=True)
    except PermissionError:
        raise
    except Exception as error:  # what a damaged file raises depends on where the damage is
        raise ValueError(f"path must be a readable file of weights; got {path} ({_first_line(error)})") from error

    state = _unwrapped_weights(state, path, average)
    if not isinstance(state, dict) or not state:
        raise ValueError(f"path must hold a state dict, tensors by parameter name; got {path}, which holds none")
    if not all(isinstance(name, str) and isinstance(value, torch.Tensor) for name, value in state.items()):
        raise ValueError(f"path must hold a state dict, tensors by parameter name; got {path}, which holds none")
    state = {name: value for name, value in state.items() if name != "n_averaged" or value.dim() > 0}
    stripped = {_strip(name): value for name, value in state.items()}
    if len(stripped) < len(state):
        raise ValueError(f"path must hold one tensor of a name once {PREFIXES} are stripped; got several in {path}")
    return stripped


def _unwrapped_weights(state: Any, path: pathlib.Path, average: bool | None) -> Any:
    """What lies within the wrappers of a file: the average where there is one, unless ``average`` says otherwise."""
    averaged: str | None = None
    while isinstance(state, dict) and (names := [name for name in WRAPPERS if isinstance(state.get(name), dict)]):
        averages, last = ([name for name in names if (name in AVERAGES) == each] for each in (True, False))
        if averages and last and average is None:
            warnings.warn(
                f"took the averaged weights ({averages[0]}) of {path}, which holds those of the last iteration, too "
                f"({last[0]})",
                stacklevel=4,
            )
        name = (averages + last)[0] if average is not False else (last + averages)[0]
        averaged = averaged or (name if name in AVERAGES else None)
        state = state[name]
    if average is not None and average != (averaged is not None):
        kind, found = ("averaged weights", "none") if average else ("weights of the last iteration", averaged)
        raise ValueError(f"path must hold {kind}; got {path}, which holds {found}")
    return state


def check_archive(path: pathlib.Path) -> None:
    """Compare the checksums of a zip-format file, which torch.load does not."""
    if zipfile.is_zipfile(path) and (damaged := zipfile.ZipFile(path).testzip()):
        raise ValueError(f"{damaged} does not have its checksum")


def _first_line(error: Exception) -> str:
    """What went wrong in one line, whatever the library at fault prints."""
    lines = re.sub(r"\x1b\[[0-9;]*m", "", str(error)).splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _strip(name: str) -> str:
    for wrapper in ("_orig_mod.", "_checkpoint_wrapped_module."):  # torch's own around parts of a model
        name = name.replace(wrapper, "")
    while name.startswith("module."):
        name = name.removeprefix("module.")
    return name


def load_checkpoint(model: ModuleT, path: str | os.PathLike, *, average: bool | None = None) -> ModuleT:
    """Load a checkpoint into ``model``, in place and strictly; on any error the model is left as it was.

    A training-form file is merged on its way into a merged model; the reverse is refused.

    Args:
        model: a module, usually from :func:`ipt_fast.create_model`. It may be compiled, in DataParallel,
            DistributedDataParallel or an AveragedModel. Parameters on the meta device become real, on the CPU.
        path: a .safetensors or PyTorch file, or a folder written by ``save_pretrained``.
        average: which weights of a file that holds an average, too, see :func:`ipt_fast.models.read_state_dict`.

    Returns:
        ``model``.

    Raises:
        ValueError: there is no such file, it is damaged, or its tensors do not fit the model one to one (the message
            lists how). TypeError: ``model`` is no module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module; got {type(model).__name__}")
    load_state(model, read_state_dict(path, average=average), path)
    return model


def _unwrapped(model: nn.Module) -> nn.Module:
    inner: Any = model
    while isinstance(inner, PARALLEL) or "_orig_mod" in inner._modules:
        inner = inner.module if isinstance(inner, PARALLEL) else inner._orig_mod
    return inner


def load_state(model: nn.Module, state: dict[str, Tensor], source: Any) -> None:
    """Load tensors by name strictly, checking everything before the first is copied; ``source`` is for messages."""
    model, state = _unwrapped(model), {name: value for name, value in state.items() if name != record.NAME}
    for name, module in model.named_modules():
        if isinstance(module, Reparameterized):
            module.merge_state(state, _strip(f"{name}.") if name else "")
    names = {_strip(name): name for name in model.state_dict()}
    expected = {_strip(name): value for name, value in model.state_dict().items()}
    for name, value in expected.items():
        if is_traceable_wrapper_subclass(value):
            raise ValueError(
                f"model must not be sharded or quantised before loading; got {name}, a {type(value).__name__}"
            )
    missing, unexpected = sorted(expected.keys() - state.keys()), sorted(state.keys() - expected.keys())
    shapes = [
        f"{k} {tuple(state[k].shape)} instead of {tuple(expected[k].shape)}"
        for k in expected.keys() & state.keys()
        if state[k].shape != expected[k].shape
    ]
    problems = [
        f"{len(found)} {what} ({', '.join(found[:3])}{', …' if len(found) > 3 else ''})"
        for what, found in (("missing", missing), ("unexpected", unexpected), ("of another shape", sorted(shapes)))
        if found
    ]
    if problems:
        hint = ""
        if _needs_branches(model, state):
            hint = "; it holds merged weights, from which the branches cannot be recovered: use merged=True"
        raise ValueError(f"path must fit this {type(model).__name__}; got {source}: {', '.join(problems)}{hint}")
    # Copying into the meta device would do nothing, without a word: there the tensors themselves are taken.
    assign = any(value.is_meta for value in expected.values())
    if assign:
        state = {name: _like(value, expected[name]) for name, value in state.items()}
    model.load_state_dict({names[name]: value for name, value in state.items()}, strict=True, assign=assign)


def _like(value: Tensor, tensor: Tensor) -> Tensor:
    return value.to(value.device if tensor.is_meta else tensor.device, tensor.dtype)


def _needs_branches(model: nn.Module, state: dict[str, Tensor]) -> bool:
    return any(
        _strip(f"{name}.weight") in state
        for name, module in model.named_modules()
        if isinstance(module, Reparameterized) and not module.merged
    )
