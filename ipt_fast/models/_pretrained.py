"""The base class of the models: its contract, presets, and files; saved as config.json and model.safetensors."""

import copy
import dataclasses
import json
import os
import pathlib
from typing import Any, ClassVar, Self

import huggingface_hub
import safetensors.torch
import torch
from torch import Tensor

from .._files import atomic_write, make_folder, naming
from ..modules._fusion import Fusable
from . import record
from .checkpoint import load_state, read_state_dict
from .contract import Contract


@dataclasses.dataclass(frozen=True)
class Preset:
    """A model that has a name: the fields in which its config differs from the defaults of the class.

    ``ships`` says that trained weights lie in ipt_fast/assets, in a folder of the preset's name, and ``trained_for``
    what they are for and what they are not: for people who choose a model.
    """

    config: dict[str, Any]
    ships: bool = False
    trained_for: str = ""


class PretrainedModel(Fusable):
    """A module with ``config``, an instance of the frozen dataclass ``config_class``, saved beside its weights.

    A model needs these two, ``contract`` and a forward; whatever it can do beyond that overrides a method here. The
    decorator :func:`ipt_fast.models.register` lets it be made and opened by the names of its ``presets``.
    """

    config: Any
    config_class: ClassVar[type]
    presets: ClassVar[dict[str, Preset]] = {}
    # Fields of the config that may be others than those of saved weights, as the weights are brought into that form.
    free_fields: ClassVar[frozenset[str]] = frozenset()
    # Whether a file of weights is opened by its own shape, and a preset only tells what it does not: `open_weights`.
    shape_is_in_weights: ClassVar[bool] = False
    # Whether files of weights also hold the config, as a tensor (:mod:`ipt_fast.models.record`).
    records_config: ClassVar[bool] = False

    @property
    def contract(self) -> Contract:
        """What the model takes, gives and can do."""
        raise NotImplementedError(f"{type(self).__name__} must have a contract")

    def reparameterize(self) -> None:
        """Merge the branches, in place; idempotent. A model without branches is left as it is."""

    def only(self, task: str | int) -> "PretrainedModel":
        """The model for one task; of a model that does one thing, itself.

        Raises:
            ValueError: there is no such task.
        """
        if task != "denoise":
            raise ValueError(f"task must be denoise for {type(self).__name__}, which has no others; got {task!r}")
        return self

    def position_embedding(self) -> Tensor | None:
        """The learned positions of its tokens (N, D), row by row of a square; None where it has none."""
        return None

    def task_embeddings(self) -> dict[str, Tensor]:
        """The learned embedding of each task (N, D); empty where it has none."""
        return {}

    def forward_with_features(self, x: Tensor, task: str | int | None = None) -> tuple[Tensor, Tensor]:
        """The output, and patch features (B, N, D) for the contrastive loss: of models for pre-training only."""
        raise NotImplementedError(f"{type(self).__name__} has no patch features")

    def to_reference(self) -> Self:
        """A twin in plain PyTorch with copies of the same weights, for export to other runtimes.

        It computes the papers' formulas by PyTorch's own operations, module by module: `torch.export`, `torch.onnx` and
        what reads their files know all of them. Sizes may stay dynamic, see docs/changing_and_exporting.md. Its state
        dict is the model's.
        """
        twin = copy.deepcopy(self)
        for module in twin.modules():
            if isinstance(module, Fusable):
                module.plain = True
        return twin

    def save_pretrained(self, directory: str | os.PathLike, *, dtype: torch.dtype | None = None) -> None:
        """Write config.json and model.safetensors into ``directory``, made if need be.

        Each file is replaced atomically.

        Args:
            directory: a folder.
            dtype: of the floating-point weights in the file, such as ``torch.float16`` for half the size; opened, they
                have the dtype of a new model again. None keeps that of each.

        Raises:
            ValueError: ``directory`` cannot be made, the model is merged in part, or a weight is too large for
                ``dtype``.
            OSError: a file cannot be written, such as for want of space; the previous one is left.
        """
        config, directory = self._fields(), pathlib.Path(directory)
        state = {name: _stored(name, value, dtype) for name, value in self.recorded_state_dict().items()}
        make_folder("directory", directory)
        with naming(directory / "model.safetensors"), atomic_write(directory / "model.safetensors") as path:
            path.touch()
            mode = path.stat().st_mode
            safetensors.torch.save_file(state, path, metadata={"format": "pt"})
            path.chmod(mode)  # the library's own is for the owner alone
        with naming(directory / "config.json"), atomic_write(directory / "config.json") as path:
            path.write_text(json.dumps(config, indent=2) + "\n")

    def recorded_state_dict(self) -> dict[str, Tensor]:
        """The state dict, and in it the config as a tensor where models of this class have that in files."""
        state = dict(self.state_dict())
        return state | {record.NAME: record.to_record(self._fields())} if self.records_config else state

    def _fields(self) -> dict[str, Any]:
        return {"model": type(self).__name__, **dataclasses.asdict(self.config)}

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
        state_dict.pop(prefix + record.NAME, None)  # of a copy
        super()._load_from_state_dict(state_dict, prefix, *args)

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
            raise ValueError(f"source must hold a {cls.__name__}; got {folder}, which holds another architecture")
        model = cls.from_fields({**config, **overrides})
        load_state(model, read_state_dict(folder), folder)
        return model.eval()

    @classmethod
    def from_fields(cls, fields: dict[str, Any]) -> Self:
        """A new model by the fields of its config."""
        return cls(build_config(cls.config_class, fields))

    @classmethod
    def fields_told_by(cls, state: dict[str, Tensor]) -> dict[str, Any] | None:
        """The fields of the config where tensors alone tell that they are of this class, and all of its shape."""
        return None

    @classmethod
    def with_implied_fields(cls, fields: dict[str, Any]) -> dict[str, Any]:
        """Fields that a user gave, and those that follow from them."""
        return fields

    @classmethod
    def open_weights(
        cls, path: str | os.PathLike[str], preset: str, *, average: bool | None = None, **fields: Any
    ) -> Self:
        """The model of a preset, in eval mode, with a file of weights; see :func:`ipt_fast.models.open_checkpoint`."""
        model = cls.from_fields({**cls.presets[preset].config, **cls.with_implied_fields(fields)})
        load_state(model, read_state_dict(path, average=average), path)
        return model.eval()


def _stored(name: str, value: Tensor, dtype: torch.dtype | None) -> Tensor:
    value = value.detach().cpu().contiguous()
    if dtype is None or not value.is_floating_point():
        return value
    rounded = value.to(dtype)
    if not torch.equal(rounded.isfinite(), value.isfinite()):
        largest = value[value.isfinite()].abs().max().item()
        raise ValueError(f"dtype must hold all weights; got {dtype}, and {name} has one of {largest:.3g}")
    return rounded


def read_config(path: pathlib.Path) -> dict[str, Any]:
    """The fields of a config.json."""
    try:
        config = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise ValueError(
            f"source must be a folder of a saved model; got {path.parent}, which has no {path.name}"
        ) from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path.name} must be readable JSON; got {path} ({error})") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path} must hold one JSON object; got {type(config).__name__}")
    return config


def build_config(config_class: type, fields: dict[str, Any]) -> Any:
    """``config_class(**fields)``; unknown fields raise a ValueError that lists the known ones."""
    known = [field.name for field in dataclasses.fields(config_class)]
    if unknown := sorted(fields.keys() - set(known)):
        raise ValueError(
            f"config must have fields of {config_class.__name__}: {', '.join(known)}; got {', '.join(unknown)}"
        )
    return config_class(**fields)


def _download(source: str | os.PathLike) -> pathlib.Path:
    try:
        return pathlib.Path(
            huggingface_hub.snapshot_download(os.fspath(source), allow_patterns=["config.json", "model.safetensors"])
        )
    except Exception as error:
        raise ValueError(
            f"source must be a folder or a model that can be downloaded; got {source} ({error})"
        ) from error
