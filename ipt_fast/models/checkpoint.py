"""Reading weights strictly: wrappers and prefixes are unwrapped, everything else must fit."""

import pathlib
import re
import zipfile

import safetensors.torch
import torch
from torch import nn

from ..modules.feed_forward import Reparameterized

WRAPPERS = ("params_ema", "ema", "params", "state_dict", "model", "net")
PREFIXES = ("module.", "_orig_mod.")


def read_state_dict(path):
    """The tensors of a .safetensors or PyTorch file, by parameter name, on the CPU.

    Unwraps one dict under "params_ema", "ema", "params", "state_dict", "model" or "net" (in this order, repeatedly)
    and strips the prefixes "module." and "_orig_mod.". Pickles are read with ``weights_only=True``.

    Raises:
        ValueError: there is no such file, it is damaged, or it holds something else than tensors by name.
        PermissionError: it may not be read.
    """
    path = pathlib.Path(path)
    if path.is_dir():
        path = path / "model.safetensors"
    if not path.is_file():
        raise ValueError(f"there is no checkpoint at {path}")
    try:
        if path.suffix == ".safetensors":
            state = safetensors.torch.load_file(path)
        else:
            check_archive(path)
            state = torch.load(path, map_location="cpu", weights_only=True)
    except PermissionError:
        raise
    except Exception as error:  # what a damaged file raises depends on where the damage is
        raise ValueError(f"{path} is not a readable checkpoint: {_first_line(error)}") from error

    while isinstance(state, dict) and (wrapper := next((k for k in WRAPPERS if isinstance(state.get(k), dict)), None)):
        state = state[wrapper]
    if not isinstance(state, dict) or not state:
        raise ValueError(f"{path} holds no state dict (tensors by parameter name)")
    if not all(isinstance(name, str) and isinstance(value, torch.Tensor) for name, value in state.items()):
        raise ValueError(f"{path} holds no state dict (tensors by parameter name)")
    stripped = {_strip(name): value for name, value in state.items()}
    if len(stripped) < len(state):
        raise ValueError(f"{path} holds several tensors of one name once the prefixes {PREFIXES} are stripped")
    return stripped


def check_archive(path):
    """Compare the checksums of a zip-format file, which torch.load does not."""
    if zipfile.is_zipfile(path) and (damaged := zipfile.ZipFile(path).testzip()):
        raise ValueError(f"{damaged} does not have its checksum")


def _first_line(error):
    """What went wrong in one line, whatever the library at fault prints."""
    lines = re.sub(r"\x1b\[[0-9;]*m", "", str(error)).splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _strip(name):
    while name.startswith(PREFIXES):
        name = name.removeprefix("module.").removeprefix("_orig_mod.")
    return name


def load_checkpoint(model, path):
    """Load a checkpoint into ``model``, in place and strictly; on any error the model is left as it was.

    A training-form file is merged on its way into a merged model; the reverse is refused.

    Args:
        model: a module, usually from :func:`ipt_fast.create_model`.
        path: a .safetensors or PyTorch file, or a folder written by ``save_pretrained``.

    Returns:
        ``model``.

    Raises:
        ValueError: there is no such file, it is damaged, or its tensors do not fit the model one to one (the message
            lists how). TypeError: ``model`` is no module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module; got {type(model).__name__}")
    load_state(model, read_state_dict(path), path)
    return model


def load_state(model, state, source):
    """Load tensors by name strictly, checking everything before the first is copied; ``source`` is for messages."""
    state = dict(state)
    for name, module in model.named_modules():
        if isinstance(module, Reparameterized):
            module.merge_state(state, f"{name}." if name else "")
    expected = model.state_dict()
    missing, unexpected = sorted(expected.keys() - state.keys()), sorted(state.keys() - expected.keys())
    shapes = [
        f"{k} {tuple(state[k].shape)} instead of {tuple(expected[k].shape)}"
        for k in expected.keys() & state.keys()
        if state[k].shape != expected[k].shape
    ]
    problems = [
        f"{len(names)} {what} ({', '.join(names[:3])}{', …' if len(names) > 3 else ''})"
        for what, names in (("missing", missing), ("unexpected", unexpected), ("of another shape", sorted(shapes)))
        if names
    ]
    if problems:
        hint = ""
        if _needs_branches(model, state):
            hint = "; it holds merged weights, from which the branches cannot be recovered: use merged=True"
        raise ValueError(f"{source} does not fit this {type(model).__name__}: {'; '.join(problems)}{hint}")
    model.load_state_dict(state, strict=True)


def _needs_branches(model, state):
    return any(
        f"{name}.weight" in state
        for name, module in model.named_modules()
        if isinstance(module, Reparameterized) and not module.merged
    )
