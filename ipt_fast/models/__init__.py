"""Complete models by name. A model is a file here that registers its class, and its line below."""

from ._pretrained import Preset, PretrainedModel
from ._registry import ASSETS as ASSETS
from ._registry import create_model, list_models, open_checkpoint, open_model, register, saved_folder, shipped_models
from .checkpoint import load_checkpoint, load_state, read_state_dict
from .contract import Contract, Sizes, describe
from .described import Described, as_module
from .dit import DiT, DiTConfig
from .ipt import IPT, IPTConfig, config_of
from .ipt_v2 import IPTV2, IPTV2Config
from .latent_ipt_v2 import LatentIPTV2, LatentIPTV2Config
from .restormer import Restormer, RestormerConfig

__all__ = [
    "IPT",
    "IPTConfig",
    "IPTV2",
    "IPTV2Config",
    "Contract",
    "Described",
    "DiT",
    "DiTConfig",
    "LatentIPTV2",
    "LatentIPTV2Config",
    "Preset",
    "PretrainedModel",
    "Restormer",
    "RestormerConfig",
    "Sizes",
    "as_module",
    "config_of",
    "create_model",
    "describe",
    "list_models",
    "load_checkpoint",
    "load_state",
    "open_checkpoint",
    "open_model",
    "read_state_dict",
    "register",
    "saved_folder",
    "shipped_models",
]
