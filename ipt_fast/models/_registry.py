"""The models by name: made, opened from a file of weights or from a folder that was saved."""

import dataclasses
import os
import pathlib
from typing import Any, TypeVar

from torch import Tensor

from . import record
from ._pretrained import PretrainedModel, build_config, read_config
from .checkpoint import load_state, read_state_dict

ASSETS = pathlib.Path(__file__).parents[1] / "assets"
CLASSES: dict[str, type[PretrainedModel]] = {}  # by the name of the class, which a saved model holds
PRESETS: dict[str, type[PretrainedModel]] = {}  # by the names of presets

ModelT = TypeVar("ModelT", bound=type[PretrainedModel])


def register(model: ModelT) -> ModelT:
    """Class decorator: the model can be made and opened by the names of its ``presets``.

    Raises:
        ValueError: there is a model of that name.
    """
    if taken := sorted(model.presets.keys() & PRESETS.keys()) or [model.__name__] * (model.__name__ in CLASSES):
        raise ValueError(f"presets must have new names; got {', '.join(taken)}")
    CLASSES[model.__name__] = model
    PRESETS.update(dict.fromkeys(model.presets, model))
    return model


def list_models() -> list[str]:
    """The names :func:`create_model` knows."""
    return list(PRESETS)


def shipped_models() -> dict[str, str]:
    """{name: what it was trained for} of the models whose trained weights ship with the package."""
    presets = {name: model.presets[name] for name, model in PRESETS.items()}
    return {name: preset.trained_for for name, preset in presets.items() if preset.ships}


def create_model(name: str, pretrained: bool = False, **config: Any) -> PretrainedModel:
    """Build a model by name, in training form unless ``merged=True``.

    Args:
        name: one of :func:`list_models`.
        pretrained: load the weights that ship with the package; :func:`shipped_models` tells of which and for what.
        config: fields of the model's config to change, such as ``in_channels=1`` or ``norm="with_bias"``.
            ``out_channels`` follows ``in_channels`` unless given (3 for two views in 6 channels).

    Returns:
        The module: a new one in training mode, a pretrained one in eval mode.

    Raises:
        ValueError: an unknown name or config field, or no shipped weights (for this config).
    """
    model = _class_of(name)
    config = model.with_implied_fields(config)
    if not pretrained:
        return model.from_fields({**model.presets[name].config, **config})
    folder = _shipped_folder(name)
    fields = read_config(folder / "config.json")
    fields.pop("model", None)
    saved = dataclasses.asdict(build_config(model.config_class, fields))  # with those that are newer than the file
    for field in sorted(config.keys() & saved.keys() - model.free_fields):  # they could spoil the weights unnoticed
        value = tuple(config[field]) if type(config[field]) is list else config[field]
        if saved[field] != value:
            raise ValueError(
                f"{field} must be {saved[field]} as in the weights that ship for {name}; got {config[field]!r}"
            )
    return model.from_pretrained(folder, **config)


def open_checkpoint(
    path: str | os.PathLike[str], name: str, *, average: bool | None = None, **config: Any
) -> PretrainedModel:
    """A model in eval mode from a file of weights, which must fit one to one.

    Args:
        path: see :func:`load_checkpoint`.
        name: its architecture, one of :func:`list_models`. Of an IPT and a Restormer the shape is read from the
            tensors; of an IPT the name tells the number of heads, which they do not have.
        average: which weights of a file that holds an average, too, see :func:`read_state_dict`.
        config: fields of the model's config that differ from the name's; of an IPT those of
            :meth:`IPT.from_checkpoint`.

    Raises:
        ValueError: an unknown name or config field, or a file that does not fit.
    """
    return _class_of(name).open_weights(path, name, average=average, **config)


def open_model(source: str | os.PathLike[str]) -> PretrainedModel:
    """A trained model in eval mode: a name with shipped weights, or what ``save_pretrained`` wrote.

    That is a folder, or a file of weights that tells what it is: one of IPT-V2 by the config that it holds, too, one of
    Restormer, also as it was published, by its tensors.

    Raises:
        ValueError: none of these.
    """
    if str(source) not in PRESETS and pathlib.Path(source).is_file():
        return _open_file(source)
    folder = saved_folder(source)
    name = read_config(folder / "config.json").get("model")
    return _class_in(name, f"{folder}/config.json").from_pretrained(folder)


def open_state(state: dict[str, Tensor], source: str | os.PathLike[str]) -> PretrainedModel:
    """The model, in eval mode, of a state dict that tells what it is; ``source`` is for messages.

    Raises:
        ValueError: it does not, or it is damaged.
    """
    told = [(model, fields) for model in CLASSES.values() if (fields := model.fields_told_by(state)) is not None]
    if record.NAME in state:
        fields = record.from_record(state[record.NAME])
        told = [(_class_in(fields.pop("model", None), source), fields)]
    if not told:
        raise ValueError(
            f"model must be a file that tells what it is, as those of Restormer do, and those of IPT-V2 that "
            f"save_pretrained writes; got {source}, which does not: its architecture has to be named (open_checkpoint, "
            "--checkpoint)"
        )
    model = told[0][0].from_fields(told[0][1])
    load_state(model, state, source)
    return model.eval()


def _open_file(path: str | os.PathLike[str]) -> PretrainedModel:
    return open_state(read_state_dict(path), path)


def _class_in(name: object, source: str | os.PathLike[str]) -> type[PretrainedModel]:
    if not isinstance(name, str) or name not in CLASSES:
        raise ValueError(f"model in {source} must be one of {', '.join(CLASSES)}; got {name!r}")
    return CLASSES[name]


def saved_folder(source: str | os.PathLike[str]) -> pathlib.Path:
    """The folder of a saved model, which ``source`` is or, as the name of one that ships, stands for.

    Raises:
        ValueError: neither of the two.
    """
    if str(source) in PRESETS:
        return _shipped_folder(str(source))
    folder = pathlib.Path(source)
    if not folder.is_dir():
        raise ValueError(f"model must be a folder written by save_pretrained or one of {_shipped()}; got {source}")
    return folder


def _class_of(name: object) -> type[PretrainedModel]:
    model = PRESETS.get(name) if isinstance(name, str) else None
    if model is None:
        raise ValueError(f"name must be one of {', '.join(PRESETS)}; got {name!r}")
    return model


def _shipped() -> str:
    return ", ".join(shipped_models())


def _shipped_folder(name: str) -> pathlib.Path:
    if not PRESETS[name].presets[name].ships:
        raise ValueError(f"name must be one of {_shipped()}, for which trained weights ship; got {name!r}")
    return ASSETS / name
