"""Half a transformer layer: norm, one of several feed-forward networks, and residual as one operator."""

from typing import Any

from torch import Tensor

from .. import reference
from ..reference.feed_forward_layer import FORMS
from . import _check, _cpu, _flops, _norm, _triton
from ._operator import Operator, Shape

_HALVES = ("gdfn", "sgfn")  # forms that project half of the hidden channels


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
    """x + gate * PW(form(PW(norm(x)))), half a layer of most restoration transformers.

    Of the expanded map h, with the exact (erf) GELU and the depthwise convolution DW, a form makes

    - "mlp": GELU(h) (Swin, SwinIR, HAT);
    - "leffn": DW(GELU(h)) (IPT-V2, FDAT), as :func:`leffn_layer`;
    - "leff": GELU(DW(GELU(h))) (Uformer);
    - "mix": GELU(DW(h)) (SegFormer's Mix-FFN);
    - "conv_ffn": g + GELU(DW(g)) with g = GELU(h) (SRFormer);
    - "gdfn": GELU(a) b with a, b the halves of DW(h) (Restormer, eq. 2);
    - "sgfn": a DW(norm(b)) with a, b the halves of GELU(h) (DAT, eq. 8), the norm over the channels of b.

    Args:
        x: (B, C, H, W), any floating dtype and strides.
        norm_weight, norm_bias: (C,), or (B, C) of each image, the bias may be None, of :func:`layer_norm_2d`; dtype of
            ``x`` or float32.
        expand_weight: (M, C, 1, 1), dtype of ``x``, as the next two; M is even for "gdfn" and "sgfn".
        depthwise_weight: (M, 1, K, K), K odd; (M/2, 1, K, K) for "sgfn"; None for "mlp".
        project_weight: (C, M, 1, 1), or (C, M/2, 1, 1) for "gdfn" and "sgfn".
        form: one of those above.
        expand_bias, depthwise_bias, project_bias: of the three convolutions, or None.
        inner_weight, inner_bias, inner_eps: (M/2,), of the norm of "sgfn" and only there.
        gate: (C,), or (B, C) of each image, what the branch is multiplied by before ``x`` is added; None for 1. dtype
            of ``x`` or float32, as the biases.
        eps, centered: of :func:`layer_norm_2d`.

    Returns:
        (B, C, H, W), dtype of ``x`` (under autocast: the autocast dtype), channels-last.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, device or shape.
    """
    name = "feed_forward_layer"
    weights, biases = (expand_weight, depthwise_weight, project_weight), (expand_bias, depthwise_bias, project_bias)
    inner = (inner_weight, inner_bias)
    _operator.check_tensors(x, norm_weight, norm_bias, *weights, *biases, *inner, gate)
    if form not in FORMS:
        raise ValueError(f"{name}: form must be one of {', '.join(FORMS)}; got {form!r}")
    channels = _norm.norm_2d(name, x, norm_weight, norm_bias, eps, centered)
    _check.pointwise_weight(name, "expand_weight", expand_weight, channels)
    hidden = expand_weight.shape[0]
    if form in _HALVES and hidden % 2:
        raise ValueError(f"{name}: expand_weight must have an even number of outputs for {form}; got {hidden}")
    projected = hidden // 2 if form in _HALVES else hidden
    convolved = projected if form == "sgfn" else hidden
    if (depthwise_weight is None) != (form == "mlp"):
        raise ValueError(f"{name}: depthwise_weight must be {'None' if form == 'mlp' else 'given'} for {form}")
    if depthwise_weight is not None:
        _check.depthwise_weight(name, "depthwise_weight", depthwise_weight, convolved)
    elif depthwise_bias is not None:
        raise ValueError(f"{name}: depthwise_bias must be None for {form}")
    _check.shape(name, "project_weight", project_weight, (channels, projected, 1, 1))
    _check.biases(name, expand=(expand_bias, hidden), depthwise=(depthwise_bias, convolved))
    _check.biases(name, project=(project_bias, channels), inner=(inner_bias, projected))
    if (inner_weight is None) != (form != "sgfn") or (form != "sgfn" and inner_bias is not None):
        raise ValueError(f"{name}: inner_weight must be {'given' if form == 'sgfn' else 'None'} for {form}")
    if inner_weight is not None:
        _check.shape(name, "inner_weight", inner_weight, (projected,))
    _check.positive_number(name, "inner_eps", inner_eps)
    _norm.norm_parameters(name, x, gate=gate)
    return _operator(
        x, norm_weight, norm_bias, *weights, form, *biases, *inner, gate, float(eps), centered, float(inner_eps)
    )


def _operations(
    x: Shape,
    norm_weight: Shape,
    norm_bias: Shape | None,
    expand: Shape,
    depthwise: Shape | None,
    project: Shape,
    *others: Any,
) -> int:
    return _flops.convolutions(x, *([expand, project] if depthwise is None else [expand, depthwise, project]))


_operator = Operator(
    feed_forward_layer,
    "Tensor x, Tensor norm_weight, Tensor? norm_bias, "
    "Tensor expand_weight, Tensor? depthwise_weight, Tensor project_weight, str form, "
    "Tensor? expand_bias, Tensor? depthwise_bias, Tensor? project_bias, Tensor? inner_weight, Tensor? inner_bias, "
    "Tensor? gate, float eps, bool centered, float inner_eps",
    reference.feed_forward_layer,
    images=("x",),
    weights=("expand_weight", "depthwise_weight", "project_weight"),
    output_shape=lambda x, *_: x.shape,
    flops=_operations,
)


def _triton_limit(depthwise_weight: Tensor | None) -> str | None:
    return None if depthwise_weight is None else _triton.depthwise_limit(depthwise_weight)


_cpu.register(_operator, packs=True)
_triton.register(_operator, _triton_limit)
