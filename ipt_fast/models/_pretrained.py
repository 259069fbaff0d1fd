"""Saving a model as config.json and model.safetensors, and opening it again."""

import copy
import dataclasses
import json
import os
import pathlib
from typing import Any, Self

import huggingface_hub
import safetensors.torch
from torch import nn

from .._files import atomic_write
from .checkpoint import load_state, read_state_dict


class PretrainedModel(nn.Module):
    """A module with ``config``, an instance of the frozen dataclass ``config_class``, saved beside its weights."""

    config: Any
    config_class: type
    plain = False  # True in a plain twin

    def to_reference(self) -> Self:
        """A twin in plain PyTorch with copies of the same weights, for export to other runtimes.

        It computes the papers' formulas by PyTorch's own operations, module by module: `torch.export`, `torch.onnx` and
        what reads their files know all of them. Sizes may stay dynamic, see docs/models.md. Its state dict is the
        model's.
        """
        twin = copy.deepcopy(self)
        module: Any
        for module in twin.modules():
            if hasattr(type(module), "plain"):
                module.plain = True
        return twin

    def save_pretrained(self, directory: str | os.PathLike) -> None:
        """Write config.json and model.safetensors into ``directory``, made if need be.

        Each file is replaced atomically. Weights keep their dtype.

        Raises:
            ValueError: ``directory`` cannot be made, or the model is merged in part.
        """
        config = {"model": type(self).__name__, **dataclasses.asdict(self.config)}
        directory = pathlib.Path(directory)
        try:
            directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"directory must be a folder that can be written; got {directory} ({error})") from error
        state = {name: value.detach().cpu().contiguous() for name, value in self.state_dict().items()}
        with atomic_write(directory / "model.safetensors") as path:
            safetensors.torch.save_file(state, path, metadata={"format": "pt"})
        with atomic_write(directory / "config.json") as path:
            path.write_text(json.dumps(config, indent=2) + "\n")

    @classmethod
    def from_pretrained(cls, source: str | os.PathLike, **overrides: Any) -> Self:
        """Open a saved model, in eval mode.

        Args:
            source: a folder written by :meth:`save_pretrained` (needs no network), or a repository on the Hugging
                Face hub as "owner/name".
            overrides: config fields to change, such as ``merged=True``.

        Raises:
            ValueError: no such model there, another architecture, or a damaged file.
        """
        folder = pathlib.Path(source)
        if not folder.is_dir():
            folder = _download(source)
        config = read_config(folder / "config.json")
        if config.pop("model", cls.__name__) != cls.__name__:
            raise ValueError(f"{folder} holds another architecture than {cls.__name__}")
        model = cls(build_config(cls.config_class, {**config, **overrides}))
        load_state(model, read_state_dict(folder), folder)
        return model.eval()


def read_config(path: pathlib.Path) -> dict[str, Any]:
    """The fields of a config.json."""
    try:
        config = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise ValueError(f"{path.parent} holds no saved model: {path.name} is missing") from error
    except ValueError as error:
        raise ValueError(f"{path} is not readable JSON: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path} must hold one JSON object; got {type(config).__name__}")
    return config


def build_config(config_class: type, fields: dict[str, Any]) -> Any:
    """``config_class(**fields)``; unknown fields raise a ValueError that lists the known ones."""
    known = [field.name for field in dataclasses.fields(config_class)]
    if unknown := sorted(fields.keys() - set(known)):
        raise ValueError(f"unknown config field {', '.join(unknown)}; {config_class.__name__} has {', '.join(known)}")
    return config_class(**fields)


def _download(source: str | os.PathLike) -> pathlib.Path:
    try:
        return pathlib.Path(
            huggingface_hub.snapshot_download(os.fspath(source), allow_patterns=["config.json", "model.safetensors"])
        )
    except Exception as error:
        raise ValueError(f"{source} is neither a folder nor a model that can be downloaded: {error}") from error
