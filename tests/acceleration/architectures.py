"""Others' models at their published widths, heads and windows, with few blocks, and random weights."""

import functools

from tests.acceleration.comparison import randomised
from tests.oracles.public import public_module

SPANDREL, EXTRA = "spandrel.architectures", "spandrel_extra_arches.architectures"


def _build(package, name, **options):
    file = {"DRCT": "drct_arch", "RGT": "rgt", "ATD": "atd_arch", "GRL": "grl"}.get(name, name)
    return randomised(getattr(public_module(f"{package}.{name}.__arch.{file}"), name)(**options))


def _maker(package, name, **options):
    return functools.partial(_build, package, name, **options)


SWINIR = dict(img_size=64, window_size=8, mlp_ratio=2, num_heads=(6,), depths=(2,))
MEDIUM, LIGHT = dict(SWINIR, embed_dim=180), dict(SWINIR, embed_dim=60)
SWINIR_BLOCK = {"SwinIR block"}
# {name: (function that makes the model, names of the rules that it runs by)}
MODELS = {
    "SwinIR-light": (_maker(SPANDREL, "SwinIR", **LIGHT, upscale=2, upsampler="pixelshuffledirect"), SWINIR_BLOCK),
    "SwinIR-M": (_maker(SPANDREL, "SwinIR", **MEDIUM, upscale=2, upsampler="pixelshuffle"), SWINIR_BLOCK),
    "SwinIR-L, photos": (
        _maker(
            SPANDREL, "SwinIR", **dict(SWINIR, num_heads=(8,)), embed_dim=240, upscale=4, upsampler="nearest+conv",
            resi_connection="3conv",
        ),
        SWINIR_BLOCK,
    ),
    "SwinIR-M, JPEG": (
        _maker(SPANDREL, "SwinIR", **dict(MEDIUM, img_size=126, window_size=7), in_chans=1, img_range=255.0),
        SWINIR_BLOCK,
    ),
}  # fmt: skip
