"""Others' models at their published widths, heads and windows, with few blocks, and random weights."""

import functools

import torch
from torch import nn

from tests.acceleration.comparison import randomised
from tests.oracles.public import public_module

SPANDREL, EXTRA = "spandrel.architectures", "spandrel_extra_arches.architectures"


def build(package, name, whole=lambda model: model, **options):
    file = {"DRCT": "drct_arch", "RGT": "rgt", "ATD": "atd_arch", "GRL": "grl", "SPAN": "span"}.get(name, name)
    return randomised(whole(getattr(public_module(f"{package}.{name}.__arch.{file}"), name)(**options)))


def _maker(package, name, *whole, **options):
    return functools.partial(build, package, name, *whole, **options)


class Shallow(nn.Module):
    """The first and the last stage of a Uformer."""

    def __init__(self, model):
        super().__init__()
        self.first, self.encoder = model.input_proj, model.encoderlayer_0
        self.decoder, self.last = model.decoderlayer_3, model.output_proj

    def forward(self, x):
        y = self.first(x)
        return self.last(self.decoder(torch.cat((y, self.encoder(y)), -1)))


SWIN = dict(img_size=64, mlp_ratio=2, num_heads=(6,), depths=(2,))
SWINIR = dict(SWIN, window_size=8)
LIGHT, MEDIUM = dict(SWINIR, embed_dim=60), dict(SWINIR, embed_dim=180)
SR = dict(upscale=2, upsampler="pixelshuffle")
HAT_S = dict(SWIN, embed_dim=144, window_size=16, overlap_ratio=0.5, compress_ratio=24, squeeze_factor=24)
HAT = dict(SWIN, embed_dim=96, window_size=8, overlap_ratio=0.5, compress_ratio=3, squeeze_factor=24)
RGT_S = dict(embed_dim=180, depth=(3,), num_heads=(6,), mlp_ratio=2, split_size=(8, 32), img_size=64)
ATD_LIGHT = dict(
    embed_dim=48, depths=(2,), num_heads=(4,), window_size=16, category_size=128, num_tokens=64, reducted_dim=8,
    convffn_kernel_size=7, mlp_ratio=1,
)  # fmt: skip
UFORMER = dict(img_size=64, embed_dim=32, depths=(2, 1, 1, 1, 1, 1, 1, 1, 2), win_size=8)
UFORMER_T = dict(UFORMER, embed_dim=16, token_mlp="mlp")
# {name: (function that makes the model, names of the rules that it runs by, rows and columns of an image)}
MODELS = {
    "SwinIR-light": (
        _maker(SPANDREL, "SwinIR", **LIGHT, upscale=2, upsampler="pixelshuffledirect"), ["SwinIR block"], (11, 16),
    ),
    "SwinIR-M": (_maker(SPANDREL, "SwinIR", **MEDIUM, **SR, ape=False), ["SwinIR block"], (9, 15)),
    "SwinIR-L, photos": (
        _maker(
            SPANDREL, "SwinIR", **dict(SWINIR, num_heads=(8,)), embed_dim=240, upscale=4, upsampler="nearest+conv",
            resi_connection="3conv", patch_norm=False,
        ),
        ["SwinIR block"], (9, 7),
    ),
    "SwinIR-M, JPEG": (
        _maker(SPANDREL, "SwinIR", **dict(MEDIUM, img_size=126, window_size=7), in_chans=1, img_range=255.0),
        ["SwinIR block"], (11, 16),
    ),
    "SwinIR, image of one window": (
        _maker(SPANDREL, "SwinIR", **dict(LIGHT, img_size=8), ape=True, qkv_bias=False), ["SwinIR block"], (8, 8),
    ),
    "HAT-S": (_maker(SPANDREL, "HAT", **HAT_S, **SR), ["HAT hybrid block", "HAT overlapping block"], (15, 19)),
    "HAT": (_maker(SPANDREL, "HAT", **HAT, **SR), ["HAT hybrid block", "HAT overlapping block"], (33, 38)),
    "DRCT": (
        _maker(SPANDREL, "DRCT", **dict(SWIN, depths=(6,)), embed_dim=180, window_size=16, gc=32, **SR),
        ["SwinIR block"], (16, 16),
    ),
    "Swin2SR": (_maker(SPANDREL, "Swin2SR", **MEDIUM, **SR), ["Swin2SR block"], (9, 15)),
    "SRFormer": (
        _maker(EXTRA, "SRFormer", **SWIN, embed_dim=180, window_size=24, **SR), ["SRFormer block"], (21, 24),
    ),
    "RGT-S": (_maker(SPANDREL, "RGT", **RGT_S), ["RGT block", "RGT windows"], (17, 20)),
    "ATD-light": (
        _maker(SPANDREL, "ATD", **ATD_LIGHT, upscale=2, upsampler="pixelshuffledirect"), ["ATD layer"], (15, 19),
    ),
    "Uformer-B": (_maker(SPANDREL, "Uformer", Shallow, **UFORMER, modulator=True), ["Uformer block"], (16, 16)),
    "Uformer-T, both modulators": (
        _maker(SPANDREL, "Uformer", Shallow, **UFORMER_T, modulator=True, cross_modulator=True),
        ["Uformer block"], (16, 16),
    ),
}  # fmt: skip
