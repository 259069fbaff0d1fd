"""x + gate * project(attention(depthwise(qkv(norm(x))))): see ipt_fast.ops.channel_attention_layer.

The norm is part of the first projection, gate and residual of the second; the depthwise convolution, where there is
one, and the two passes of channel attention lie between: 14 C values a pixel, 8 C without the convolution.

Backward: everything is made again, then each part's own backward runs.
"""

from ._launch import matmul
from .channel_attention import attend_channels, attend_channels_backward
from .depthwise import depthwise, depthwise_weight_gradient
from .layer_norm_2d import layer_norm_2d
from .pointwise import map_of, pixels_of, pointwise
from .pointwise_backward import pointwise_norm_backward
from .projection_backward import bias_gradient, projection_gradients


def channel_attention_layer(
    x, norm_weight, norm_bias, qkv_weight, depthwise_weight, project_weight, temperature, qkv_bias, depthwise_bias,
    project_bias, gate, num_heads, window_size, dilation, overlapping, eps, centered, residual,
):  # fmt: skip
    qkv = pointwise(x, qkv_weight, norm_weight, norm_bias, eps, centered, bias=qkv_bias)
    if depthwise_weight is not None:
        qkv = depthwise(qkv, depthwise_weight, depthwise_bias)
    attended, _ = attend_channels([qkv], temperature, num_heads, window_size, dilation, overlapping)
    return pointwise(attended, project_weight, residual=x if residual else None, bias=project_bias, gate=gate)


def channel_attention_layer_backward(
    grad, x, norm_weight, norm_bias, qkv_weight, depthwise_weight, project_weight, temperature, qkv_bias,
    depthwise_bias, project_bias, gate, num_heads, window_size, dilation, overlapping, eps, centered, residual,
):  # fmt: skip
    norm = norm_weight, norm_bias, eps, centered
    normal = layer_norm_2d(x, *norm)
    qkv = projected = pointwise(normal, qkv_weight, bias=qkv_bias)
    if depthwise_weight is not None:
        qkv = depthwise(projected, depthwise_weight, depthwise_bias)
    groups = num_heads, window_size, dilation, overlapping
    attended, slots = attend_channels([qkv], temperature, *groups)
    grad_branch, grad_project, *grads_end = projection_gradients(grad, attended, project_weight, project_bias, gate)
    del attended
    grad_attended = map_of(matmul(grad_branch, project_weight.flatten(1)), x)
    (grad_qkv,), grad_temperature = attend_channels_backward(grad_attended, [qkv], temperature, *groups, slots)
    grad_projected = grad_qkv
    grads_depthwise = None, None
    if depthwise_weight is not None:
        grad_taps = depthwise_weight_gradient(grad_qkv, projected, 3)
        grads_depthwise = grad_taps.to(depthwise_weight.dtype), bias_gradient(grad_qkv, depthwise_bias)
        grad_projected = depthwise(grad_qkv, depthwise_weight, flip=True)
    grad_to_qkv = matmul(pixels_of(grad_projected).t(), pixels_of(normal))
    stream = grad if residual else None
    grad_x, *grads_norm = pointwise_norm_backward(grad_projected, qkv_weight, x, *norm, residual=stream)
    return (
        grad_x,
        *grads_norm,
        grad_to_qkv.view_as(qkv_weight),
        grads_depthwise[0],
        grad_project,
        grad_temperature,
        bias_gradient(grad_projected, qkv_bias),
        grads_depthwise[1],
        *grads_end,
    )
