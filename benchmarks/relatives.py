"""The published relatives of IPT-V2 at their published sizes, with random weights, from spandrel's own classes.

They need the packages of tests/oracles/public.py (``make test`` installs them).
"""

import functools

import torch

from tests.oracles.public import public_module

_SWINIR = dict(upscale=2, img_size=64, window_size=8, img_range=1.0, mlp_ratio=2)
_DAT = dict(upscale=2, img_size=64, img_range=1.0, split_size=[8, 32])
_HAT = dict(window_size=16, compress_ratio=3, squeeze_factor=30, conv_scale=0.01, overlap_ratio=0.5, mlp_ratio=2)

# name: (module, class, arguments)
MODELS = {
    "restormer": ("spandrel_extra_arches.architectures.Restormer.__arch.restormer_arch", "Restormer", {}),
    "swinir_light x2": (
        "spandrel.architectures.SwinIR.__arch.SwinIR", "SwinIR",
        dict(**_SWINIR, depths=[6] * 4, embed_dim=60, num_heads=[6] * 4, upsampler="pixelshuffledirect"),
    ),
    "swinir_m x2": (
        "spandrel.architectures.SwinIR.__arch.SwinIR", "SwinIR",
        dict(**_SWINIR, depths=[6] * 6, embed_dim=180, num_heads=[6] * 6, upsampler="pixelshuffle"),
    ),
    "dat_light x2": (
        "spandrel.architectures.DAT.__arch.DAT", "DAT",
        dict(**_DAT, embed_dim=60, depth=[18], num_heads=[6], expansion_factor=2, resi_connection="3conv",
             upsampler="pixelshuffledirect"),
    ),
    "dat x2": (
        "spandrel.architectures.DAT.__arch.DAT", "DAT",
        dict(**_DAT, embed_dim=180, depth=[6] * 6, num_heads=[6] * 6, expansion_factor=4, upsampler="pixelshuffle"),
    ),
    "hat x2": (
        "spandrel.architectures.HAT.__arch.HAT", "HAT",
        dict(**_HAT, upscale=2, img_size=64, embed_dim=180, depths=[6] * 6, num_heads=[6] * 6,
             upsampler="pixelshuffle"),
    ),
    "omnisr x2": (
        "spandrel.architectures.OmniSR.__arch.OmniSR", "OmniSR",
        dict(num_feat=64, block_num=1, res_num=5, up_scale=2, window_size=8, pe=True, bias=True),
    ),
    "fdat x2": ("spandrel.architectures.FDAT.__arch.fdat", "FDAT", dict(scale=2)),
}  # fmt: skip

# (name, side of the square image); (name, batch, side), the patches of their papers.
INFERENCE = [
    ("restormer", 256),
    ("swinir_light x2", 128),
    ("swinir_m x2", 128),
    ("dat_light x2", 64),
    ("dat x2", 64),
    ("hat x2", 64),
    ("omnisr x2", 256),
    ("fdat x2", 128),
]
TRAINING = [("restormer", 1, 128), ("swinir_light x2", 2, 64)]


@functools.cache
def plain(name):
    """A published model as its project computes it, in evaluation mode; nothing in it is zero."""
    module, cls, arguments = MODELS[name]
    torch.manual_seed(0)
    model = getattr(public_module(module), cls)(**arguments).eval()
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.is_floating_point() and not tensor.any():
                tensor.copy_(0.02 * torch.randn(tensor.shape))
    return model
