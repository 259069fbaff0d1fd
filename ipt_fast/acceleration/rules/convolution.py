"""Dense 3 x 3 convolutions, which most restoration models have between their blocks or consist of."""

from typing import Any

from torch import Tensor, nn

from ...modules import _fusion
from ._layers import LEAST_CHANNELS, WINOGRAD, convolve
from ._rule import Rule


def _misfit(conv: Any) -> str | None:
    if getattr(conv, "plain_class", type(conv)) is not nn.Conv2d:
        return "it is another class of this name"
    if min(conv.in_channels, conv.out_channels) < LEAST_CHANNELS:
        return "it has few channels"
    if conv.weight.dtype not in WINOGRAD:
        return f"PyTorch convolves {conv.weight.dtype} as fast"
    return _fusion.dense(conv)


def _forward(conv: nn.Conv2d, x: Tensor) -> Tensor:
    return convolve(x, conv)


RULES = (Rule("dense convolution", ("Conv2d",), _misfit, lambda conv: (), _forward, silent=True),)
