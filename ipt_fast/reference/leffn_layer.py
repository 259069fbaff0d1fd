"""Half a transformer layer of IPT-V2: norm, feed-forward network and residual (equations 1 and 5)."""

from torch import Tensor

from ._gate import gated_residual
from ._precision import in_full_precision
from .layer_norm_2d import layer_norm_2d
from .leffn import leffn

# Composed of the bare formulas, so that it, too, computes in the dtype it is given.


@in_full_precision
def leffn_layer(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor | None,
    expand_weight: Tensor,
    depthwise_weight: Tensor,
    project_weight: Tensor,
    *,
    expand_bias: Tensor | None = None,
    depthwise_bias: Tensor | None = None,
    project_bias: Tensor | None = None,
    gate: Tensor | None = None,
    eps: float = 1e-5,
    centered: bool = True,
) -> Tensor:
    """x + gate * LeFFN(norm(x)), the network as in :func:`leffn`."""
    y = layer_norm_2d.formula(x, norm_weight, norm_bias, eps=eps, centered=centered)
    biases = dict(expand_bias=expand_bias, depthwise_bias=depthwise_bias, project_bias=project_bias)
    return gated_residual(x, leffn.formula(y, expand_weight, depthwise_weight, project_weight, **biases), gate)
