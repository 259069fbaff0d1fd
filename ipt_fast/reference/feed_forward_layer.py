"""Half a transformer layer: norm, one of several feed-forward networks, and residual."""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from ._gate import gated_residual
from ._precision import in_full_precision
from .layer_norm_2d import layer_norm_2d

# Each takes the expanded map and a function that convolves maps depthwise, and returns what is projected.


def _gated(hidden: Tensor, depthwise: Callable[[Tensor], Tensor], norm: Callable[[Tensor], Tensor]) -> Tensor:
    first, second = depthwise(hidden).chunk(2, dim=1)
    return F.gelu(first) * second


def _spatially_gated(hidden: Tensor, depthwise: Callable[[Tensor], Tensor], norm: Callable[[Tensor], Tensor]) -> Tensor:
    first, second = F.gelu(hidden).chunk(2, dim=1)
    return first * depthwise(norm(second))


def _with_inner_residual(
    hidden: Tensor, depthwise: Callable[[Tensor], Tensor], norm: Callable[[Tensor], Tensor]
) -> Tensor:
    hidden = F.gelu(hidden)
    return hidden + F.gelu(depthwise(hidden))


FORMS: dict[str, Callable[..., Tensor]] = {
    "mlp": lambda hidden, depthwise, norm: F.gelu(hidden),
    "leffn": lambda hidden, depthwise, norm: depthwise(F.gelu(hidden)),
    "leff": lambda hidden, depthwise, norm: F.gelu(depthwise(F.gelu(hidden))),
    "mix": lambda hidden, depthwise, norm: F.gelu(depthwise(hidden)),
    "conv_ffn": _with_inner_residual,
    "gdfn": _gated,
    "sgfn": _spatially_gated,
}


@in_full_precision
def feed_forward_layer(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor | None,
    expand_weight: Tensor,
    depthwise_weight: Tensor | None,
    project_weight: Tensor,
    *,
    form: str,
    expand_bias: Tensor | None = None,
    depthwise_bias: Tensor | None = None,
    project_bias: Tensor | None = None,
    inner_weight: Tensor | None = None,
    inner_bias: Tensor | None = None,
    gate: Tensor | None = None,
    eps: float = 1e-5,
    centered: bool = True,
    inner_eps: float = 1e-5,
) -> Tensor:
    """x + gate * PW(form(PW(norm(x)))) with the exact (erf) GELU. With DW the depthwise convolution, form(h) is

    "mlp": GELU(h); "leffn": DW(GELU(h)); "leff": GELU(DW(GELU(h))); "mix": GELU(DW(h));
    "conv_ffn": g + GELU(DW(g)) with g = GELU(h); "gdfn": GELU(a) b with a, b the halves of DW(h);
    "sgfn": a DW(norm(b)) with a, b the halves of GELU(h), the norm over the channels of b.
    """

    def depthwise(hidden: Tensor) -> Tensor:
        assert depthwise_weight is not None
        padding = depthwise_weight.shape[-1] // 2
        return F.conv2d(hidden, depthwise_weight, depthwise_bias, padding=padding, groups=hidden.shape[1])

    def norm(hidden: Tensor) -> Tensor:
        assert inner_weight is not None
        return layer_norm_2d.formula(hidden, inner_weight, inner_bias, eps=inner_eps)

    y = layer_norm_2d.formula(x, norm_weight, norm_bias, eps=eps, centered=centered)
    y = FORMS[form](F.conv2d(y, expand_weight, expand_bias), depthwise, norm)
    return gated_residual(x, F.conv2d(y, project_weight, project_bias), gate)
