"""x + gate * project(form(expand(norm(x)))): see ipt_fast.ops.feed_forward_layer.

The norm is part of the expansion, and so is the GELU after it; the convolution and what a form makes of it are one
kernel (_forms.py), gate and residual part of the projection. Traffic a pixel, for C channels and M hidden ones: C + M,
M + M (M / 2 with gates), M (M / 2) + 2 C values.

Backward: normalised pixels and hidden maps are made again, then each part's own backward runs.
"""

import torch

from ._forms import formed, gelu_backward
from ._launch import matmul
from .depthwise import depthwise, depthwise_weight_gradient
from .layer_norm_2d import layer_norm_2d, layer_norm_2d_backward
from .leffn import leffn_layer, leffn_layer_backward
from .pointwise import map_of, pixels_of, pointwise
from .pointwise_backward import pointwise_norm_backward
from .projection_backward import bias_gradient, projection_gradients

# What follows the convolution; "mlp" has none, and "leffn" is an operator of its own.
_FORMS = {"leff": "gelu", "mix": "gelu", "conv_ffn": "added", "gdfn": "gated", "sgfn": "multiplied"}
_NOT_ACTIVATED = ("mix", "gdfn")  # forms that convolve what was expanded, without a GELU before


def _halves(tensor):
    return (None, None) if tensor is None else tensor.chunk(2)


def feed_forward_layer(
    x, norm_weight, norm_bias, expand_weight, depthwise_weight, project_weight, form, expand_bias, depthwise_bias,
    project_bias, inner_weight, inner_bias, gate, eps, centered, inner_eps,
):  # fmt: skip
    norm = norm_weight, norm_bias, eps, centered
    if form == "leffn":
        weights, biases = (expand_weight, depthwise_weight, project_weight), (expand_bias, depthwise_bias, project_bias)
        return leffn_layer(x, norm_weight, norm_bias, *weights, *biases, gate, eps, centered)
    if form == "sgfn":  # each half a map of its own
        beside, hidden = (
            pointwise(x, weight, *norm, gelu=True, bias=bias)
            for weight, bias in zip(_halves(expand_weight), _halves(expand_bias), strict=True)
        )
        hidden = layer_norm_2d(hidden, inner_weight, inner_bias, inner_eps, True)
    else:
        hidden = pointwise(x, expand_weight, *norm, gelu=form not in _NOT_ACTIVATED, bias=expand_bias)
        beside = hidden if form == "conv_ffn" else None
    if form != "mlp":
        hidden = formed(_FORMS[form], hidden, depthwise_weight, depthwise_bias, beside)
    return pointwise(hidden, project_weight, residual=x, bias=project_bias, gate=gate)


def feed_forward_layer_backward(
    grad, x, norm_weight, norm_bias, expand_weight, depthwise_weight, project_weight, form, expand_bias, depthwise_bias,
    project_bias, inner_weight, inner_bias, gate, eps, centered, inner_eps,
):  # fmt: skip
    norm = norm_weight, norm_bias, eps, centered
    if form == "leffn":
        weights, biases = (expand_weight, depthwise_weight, project_weight), (expand_bias, depthwise_bias, project_bias)
        *grads, grad_gate = leffn_layer_backward(grad, x, *norm[:2], *weights, *biases, gate, *norm[2:])
        return *grads, None, None, grad_gate
    normal = layer_norm_2d(x, *norm)
    expanded = pointwise(normal, expand_weight, bias=expand_bias)
    activated = expanded
    if form not in _NOT_ACTIVATED:
        activated = pointwise(normal, expand_weight, gelu=True, bias=expand_bias)
    beside = hidden = activated
    if form == "sgfn":
        beside, second = (half.contiguous(memory_format=torch.channels_last) for half in activated.chunk(2, dim=1))
        hidden = layer_norm_2d(second, inner_weight, inner_bias, inner_eps, True)
    projected = hidden
    if form != "mlp":
        projected = formed(_FORMS[form], hidden, depthwise_weight, depthwise_bias, beside)
    grad_branch, grad_project, *grads_end = projection_gradients(grad, projected, project_weight, project_bias, gate)
    del projected
    grad_projected = map_of(matmul(grad_branch, project_weight.flatten(1)), x)
    grad_hidden, grads_depthwise, grads_inner = grad_projected, (None, None), (None, None)
    if form != "mlp":
        convolved = depthwise(hidden, depthwise_weight, depthwise_bias)
        if form == "sgfn":  # bare products are PyTorch's
            grad_first, grad_convolved = grad_projected * convolved, grad_projected * beside
        else:
            grad_convolved = gelu_backward(grad_projected, convolved, gated=form == "gdfn")
        del convolved
        grad_taps = depthwise_weight_gradient(grad_convolved, hidden, depthwise_weight.shape[-1])
        grads_depthwise = grad_taps.to(depthwise_weight.dtype), bias_gradient(grad_convolved, depthwise_bias)
        grad_hidden = depthwise(grad_convolved, depthwise_weight, flip=True)
    if form == "sgfn":
        of_norm = inner_weight, inner_bias, inner_eps, True
        grad_second, *grads_inner = layer_norm_2d_backward(grad_hidden, second, *of_norm)
        grad_hidden = torch.cat([grad_first, grad_second], dim=1).contiguous(memory_format=torch.channels_last)
    if form not in _NOT_ACTIVATED:
        grad_hidden = gelu_backward(grad_hidden, expanded, grad_projected if form == "conv_ffn" else None)
    grad_x, *grads_norm = pointwise_norm_backward(grad_hidden, expand_weight, x, *norm, residual=grad)
    grad_expand = matmul(pixels_of(grad_hidden).t(), pixels_of(normal)).view_as(expand_weight)
    grad_project_bias, grad_gate = grads_end
    return (
        grad_x,
        *grads_norm,
        grad_expand,
        grads_depthwise[0],
        grad_project,
        bias_gradient(grad_hidden, expand_bias),
        grads_depthwise[1],
        grad_project_bias,
        *grads_inner,
        grad_gate,
    )
