"""activation(DW(norm(x))): see ipt_fast.ops.depthwise_layer.

The norm is a kernel of its own, the convolution and the GELU after it are one (_forms.py). Traffic a pixel, for C
channels: 2 C values, and 2 C more for a norm. Backward: the normalised map is made again, then, where there is a GELU,
the convolved one, the gradient of which comes from a pass of its own.
"""

from ._forms import formed, gelu_backward
from .depthwise import depthwise, depthwise_weight_gradient
from .layer_norm_2d import layer_norm_2d, layer_norm_2d_backward
from .projection_backward import bias_gradient


def _normalised(x, norm_weight, *norm):
    return x if norm_weight is None else layer_norm_2d(x, norm_weight, *norm)


def depthwise_layer(x, weight, bias, norm_weight, norm_bias, activation, eps, centered):
    normal = _normalised(x, norm_weight, norm_bias, eps, centered)
    return formed("gelu", normal, weight, bias) if activation == "gelu" else depthwise(normal, weight, bias)


def depthwise_layer_backward(grad, x, weight, bias, norm_weight, norm_bias, activation, eps, centered):
    norm = norm_weight, norm_bias, eps, centered
    normal = _normalised(x, *norm)
    if activation == "gelu":
        grad = gelu_backward(grad, depthwise(normal, weight, bias))
    grad_weight = depthwise_weight_gradient(grad, normal, weight.shape[-1]).to(weight.dtype)
    grad_x, grads_norm = depthwise(grad, weight, flip=True), (None, None)
    if norm_weight is not None:
        grad_x, *grads_norm = layer_norm_2d_backward(grad_x, x, *norm)
    return grad_x, grad_weight, bias_gradient(grad, bias), *grads_norm
