"""Complete models by name."""

import dataclasses
import os
import pathlib
from typing import Any

from . import _pretrained
from ._pretrained import PretrainedModel
from .checkpoint import load_checkpoint, load_state, read_state_dict
from .ipt import IPT, IPTConfig, config_of
from .ipt_v2 import IPTV2, IPTV2Config

__all__ = [
    "IPT",
    "IPTConfig",
    "IPTV2",
    "IPTV2Config",
    "create_model",
    "list_models",
    "load_checkpoint",
    "open_checkpoint",
    "open_model",
    "saved_folder",
]

ASSETS = pathlib.Path(__file__).parents[1] / "assets"


@dataclasses.dataclass(frozen=True)
class _Preset:
    model: type[PretrainedModel]
    config: dict[str, Any]
    pretrained: str | None = None  # a folder in ipt_fast/assets


_PRESETS = {
    "ipt": _Preset(IPT, {}),
    "ipt_tiny": _Preset(
        IPT,
        dict(tasks=("sr_x2", "derain", "denoise30", "denoise50"), features=16, layers=2, heads=6, ratio=4),
        "ipt_tiny",
    ),
    "ipt_v2_tiny": _Preset(
        IPTV2,
        dict(width=16, depths=(1, 2, 2, 1), refinement=0, window_size=16, grid_size=8, ffn_ratio=2, inner_ratio=1),
        "ipt_v2_tiny",
    ),
    "ipt_v2_small": _Preset(IPTV2, dict(width=32, depths=(4, 6, 6, 8), refinement=0, window_size=32, grid_size=8)),
    "ipt_v2_base": _Preset(IPTV2, dict(width=48, depths=(4, 6, 6, 8), refinement=4, window_size=32, grid_size=16)),
    "ipt_v2_base_plus": _Preset(
        IPTV2, dict(width=48, depths=(6, 8, 8, 10), refinement=6, window_size=32, grid_size=16)
    ),
}


def list_models() -> list[str]:
    """The names :func:`create_model` knows."""
    return list(_PRESETS)


def create_model(name: str, pretrained: bool = False, **config: Any) -> PretrainedModel:
    """Build a model by name, in training form unless ``merged=True``.

    Args:
        name: one of :func:`list_models`.
        pretrained: load the weights that ship with the package ("ipt_v2_tiny": blind colour Gaussian denoising,
            σ 5 to 50 on the 0..255 scale; "ipt_tiny": its four tasks).
        config: fields of the model's config to change, such as ``in_channels=1`` or ``norm="with_bias"``.
            ``out_channels`` follows ``in_channels`` unless given (3 for two views in 6 channels).

    Returns:
        The module: a new one in training mode, a pretrained one in eval mode.

    Raises:
        ValueError: an unknown name or config field, or no shipped weights (for this config).
    """
    preset = _preset(name)
    if "in_channels" in config:
        config.setdefault("out_channels", 3 if config["in_channels"] == 6 else config["in_channels"])
    if pretrained:
        folder = _shipped_folder(name)
        saved = _pretrained.read_config(folder / "config.json")
        for field, value in config.items():  # those without tensors would spoil the weights unnoticed
            if (
                field != "merged"
                and field in saved
                and saved[field] != (list(value) if type(value) is tuple else value)
            ):
                raise ValueError(f"pretrained: the weights of {name} are for {field}={saved[field]!r}; got {value!r}")
        return preset.model.from_pretrained(folder, **config)
    return preset.model(_pretrained.build_config(preset.model.config_class, {**preset.config, **config}))


def _preset(name: object) -> _Preset:
    preset = _PRESETS.get(name) if isinstance(name, str) else None
    if preset is None:
        raise ValueError(f"name must be one of {', '.join(_PRESETS)}; got {name!r}")
    return preset


def open_checkpoint(path: str | os.PathLike[str], name: str, **config: Any) -> PretrainedModel:
    """A model in eval mode from a file of weights, which must fit one to one.

    Args:
        path: see :func:`load_checkpoint`.
        name: its architecture, one of :func:`list_models`. Of an IPT the shape is read from the tensors, and the name
            tells the number of heads, which they do not have.
        config: fields of the model's config that differ from the name's; of an IPT those of
            :meth:`IPT.from_checkpoint`.

    Raises:
        ValueError: an unknown name or config field, or a file that does not fit.
    """
    preset = _preset(name)
    if preset.model is not IPT:
        return load_checkpoint(create_model(name, **config), path).eval()
    state = read_state_dict(path)
    if "heads" not in config:
        found, named = config_of(state, path, **{**config, "heads": 1}), IPTConfig(**preset.config)
        if any(getattr(found, field) != getattr(named, field) for field in ("features", "patch_size", "layers")):
            raise ValueError(f"heads must be given: {path} has another shape than {name}, which would tell them")
        config = {**config, "heads": named.heads}
    model = IPT(config_of(state, path, **config))
    load_state(model, state, path)
    return model.eval()


def open_model(source: str | os.PathLike[str]) -> PretrainedModel:
    """A trained model in eval mode: a name with shipped weights, or a folder written by ``save_pretrained``.

    Raises:
        ValueError: neither of the two.
    """
    folder = saved_folder(source)
    name = _pretrained.read_config(folder / "config.json").get("model")
    classes = {preset.model.__name__: preset.model for preset in _PRESETS.values()}
    if not isinstance(name, str) or name not in classes:
        raise ValueError(f"{folder} holds an unknown architecture: {name!r}")
    return classes[name].from_pretrained(folder)


def saved_folder(source: str | os.PathLike[str]) -> pathlib.Path:
    """The folder of a saved model, which ``source`` is or, as the name of one that ships, stands for.

    Raises:
        ValueError: neither of the two.
    """
    if str(source) in _PRESETS:
        return _shipped_folder(str(source))
    folder = pathlib.Path(source)
    if not folder.is_dir():
        shipped = ", ".join(name for name, preset in _PRESETS.items() if preset.pretrained)
        raise ValueError(f"model must be a folder written by save_pretrained or one of {shipped}; got {source}")
    return folder


def _shipped_folder(name: str) -> pathlib.Path:
    folder = _PRESETS[name].pretrained
    if folder is None:
        shipped = ", ".join(name for name, preset in _PRESETS.items() if preset.pretrained)
        raise ValueError(f"pretrained: no weights ship for {name}; they do for {shipped}")
    return ASSETS / folder
