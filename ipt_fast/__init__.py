"""ipt_fast: image-restoration transformers, exact and fast.

Models by name (:func:`create_model`), restoration of images (:func:`restore`, :class:`Restorer`), models for inference
(:func:`freeze`), drop-in modules (:mod:`ipt_fast.modules`) and operators (:mod:`ipt_fast.ops`) with several backends
(:func:`use_backend`).
"""

from typing import TYPE_CHECKING, Any

from . import models, modules, ops, reference
from ._version import __version__ as __version__
from .acceleration import accelerate
from .freezing import freeze
from .models import create_model, list_models, load_checkpoint
from .ops._explain import explain
from .ops._select import keep_backend, use_backend

__all__ = [
    "Restorer",
    "accelerate",
    "create_model",
    "explain",
    "freeze",
    "keep_backend",
    "list_models",
    "load_checkpoint",
    "models",
    "modules",
    "ops",
    "reference",
    "restore",
    "use_backend",
]

if TYPE_CHECKING:
    from .inference import Restorer, restore
else:

    def __getattr__(name: str) -> Any:
        if name in ("Restorer", "restore"):  # these import Pillow, which models and operators do not need
            from . import inference

            return getattr(inference, name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
