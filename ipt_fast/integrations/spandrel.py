"""spandrel, the library by which chaiNNer, ComfyUI and others open models (the extra [spandrel]), both ways.

:func:`install` lets it open files of IPT-V2; :func:`load_file` opens whatever files it knows. It is imported when these
are called.
"""

import os
import pathlib
from typing import Any

from torch import Tensor

from ..models import IPTV2, PretrainedModel, record
from ..models._registry import open_state

ID = "IPT-V2"
SUFFIXES = (".pth", ".pt", ".ckpt", ".safetensors")


def require_spandrel() -> Any:
    """The package spandrel.

    Raises:
        ImportError: it, or torchvision, which it needs, cannot be imported.
    """
    try:
        import spandrel
    except (ImportError, RuntimeError) as error:  # a torchvision that does not fit PyTorch
        reason = str(error).splitlines()[0]
        raise ImportError(f"spandrel is needed: pip install 'ipt-fast[spandrel]' ({reason})") from error
    return spandrel


def install(registry: Any = None) -> None:
    """Let spandrel open files of IPT-V2, in this process; once is enough, and again does nothing.

    A file is known by the tensor ``ipt_fast_config``, which has the config (:mod:`ipt_fast.models.record`):
    ``save_pretrained`` writes it, and :func:`state_dict` is for programs that save files themselves. The descriptor
    takes any size, may run in 16 bit, and may be cut into tiles.

    Args:
        registry: a ``spandrel.ArchRegistry``; that of all loaders, MAIN_REGISTRY, by default.

    Raises:
        ImportError: spandrel is not installed.
    """
    spandrel = require_spandrel()
    registry = spandrel.MAIN_REGISTRY if registry is None else registry
    if ID not in registry:
        # First of all, as no other file has that tensor.
        others = tuple(support.architecture.id for support in registry)
        registry.add(spandrel.ArchSupport.from_architecture(_architecture(spandrel), before=others))


def state_dict(model: PretrainedModel) -> dict[str, Tensor]:
    """A model's state dict with all that spandrel needs to open it, for ``torch.save`` or safetensors.

    Raises:
        TypeError: it is no IPT-V2.
    """
    if not isinstance(model, IPTV2):
        raise TypeError(f"model must be an IPTV2, which spandrel can open by install(); got {type(model).__name__}")
    return model.recorded_state_dict()


def load_file(path: str | os.PathLike[str]) -> Any:
    """The descriptor of a file that spandrel knows, on the CPU, as its ``ModelLoader`` makes it.

    Where spandrel_extra_arches is installed, its architectures are known, too.

    Returns:
        A ``spandrel.ImageModelDescriptor``, for :class:`ipt_fast.Restorer` and :func:`ipt_fast.accelerate`.

    Raises:
        ImportError: spandrel is not installed.
        ValueError: the file cannot be read, nothing in spandrel knows it, or it does not fit what it is taken for.
    """
    spandrel, path = require_spandrel(), pathlib.Path(path)
    if not path.is_file() or path.suffix.lower() not in SUFFIXES:
        what = "has another suffix" if path.is_file() else "is not there"
        raise ValueError(f"path must be a file of weights ({', '.join(SUFFIXES)}); got {path}, which {what}")
    try:
        state = spandrel.ModelLoader().load_state_dict_from_file(path)
    except Exception as error:  # what a damaged file raises depends on where the damage is
        raise ValueError(f"path must be a readable file of weights; got {path} ({_first_line(error)})") from error
    registry = _registry(spandrel)
    for support in registry.architectures("detection"):
        if support.detect(state):
            break
    else:
        raise ValueError(
            f"path must be a model that spandrel {spandrel.__version__} knows; got {path}, whose {len(state)} tensors, "
            f"such as {next(iter(state), None)!r}, it does not recognise: is it a model that restores images, and a "
            "later version of spandrel there?"
        )
    name = support.architecture.name
    try:
        return support.architecture.load(state)
    except Exception as error:
        raise ValueError(
            f"path must fit what it is taken for; got {path}, which spandrel {spandrel.__version__} takes for {name}, "
            f"but cannot open ({_first_line(error)}): is the file whole, or of a variant that a later version knows?"
        ) from error


def _registry(spandrel: Any) -> Any:
    """The architectures of spandrel, ours, and those of spandrel_extra_arches where that is installed."""
    registry = spandrel.MAIN_REGISTRY.copy()
    try:
        from spandrel_extra_arches import EXTRA_REGISTRY
    except ImportError:
        pass
    else:
        registry.add(*EXTRA_REGISTRY, ignore_duplicates=True)
    install(registry)
    return registry


def _architecture(spandrel: Any) -> Any:
    class IPTV2Architecture(spandrel.Architecture):
        """IPT-V2 for spandrel."""

        def __init__(self) -> None:
            super().__init__(id=ID, detect=lambda state: record.NAME in state)

        def load(self, state_dict: dict[str, Tensor]) -> Any:
            model = open_state(state_dict, "this state dict")
            contract, config = model.contract, model.config
            return spandrel.ImageModelDescriptor(
                model,
                state_dict,
                architecture=self,
                purpose="Restoration" if config.scale == 1 else "SR",
                tags=[f"{config.width}c", f"{sum(config.depths)}l", f"p{config.window_size}", f"g{config.grid_size}"],
                supports_half=True,
                supports_bfloat16=True,
                scale=config.scale,
                input_channels=contract.in_channels,
                output_channels=contract.out_channels,
                size_requirements=spandrel.SizeRequirements(),
                tiling=spandrel.ModelTiling.SUPPORTED,
            )

    return IPTV2Architecture()


def _first_line(error: Exception) -> str:
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {' '.join(line.strip() for line in lines[:2])}" if lines else type(error).__name__
