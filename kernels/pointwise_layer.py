"""residual + activation(PW(norm(x))): see ipt_fast.ops.pointwise_layer.

Forward: the norm, the product, its bias, the GELU and the residual are one kernel (pointwise.py), but for the norm of
wide or fp32 maps, which is one of its own; a bare product is PyTorch's. Traffic a pixel, for C channels and N outputs:
C + N values, 2 C more for a norm of its own, N for a residual.

Backward: the normalised map is made again and, where there is a GELU, what it took, the gradient of which comes from a
pass of its own. The product and the norm behind it are one kernel for maps of 16 bits (pointwise_backward.py), and the
weight's gradient is PyTorch's product.
"""

from ._forms import gelu_backward
from ._launch import matmul
from .layer_norm_2d import layer_norm_2d
from .pointwise import map_of, pixels_of, pointwise
from .pointwise_backward import pointwise_norm_backward
from .projection_backward import bias_gradient


def pointwise_layer(x, weight, bias, residual, norm_weight, norm_bias, activation, eps, centered):
    norm = norm_weight, norm_bias, eps, centered
    return pointwise(x, weight, *norm, gelu=activation == "gelu", residual=residual, bias=bias)


def pointwise_layer_backward(grad, x, weight, bias, residual, norm_weight, norm_bias, activation, eps, centered):
    norm = norm_weight, norm_bias, eps, centered
    normal = x if norm_weight is None else layer_norm_2d(x, *norm)
    grad_residual = None if residual is None else grad.clone()  # never the upstream one itself
    if activation == "gelu":
        grad = gelu_backward(grad, pointwise(normal, weight, bias=bias))
    of_outputs = pixels_of(grad)
    grad_weight = matmul(of_outputs.t(), pixels_of(normal)).view_as(weight)
    if norm_weight is None:
        grad_x, grads_norm = map_of(matmul(of_outputs, weight.flatten(1)), x), (None, None)
    else:
        grad_x, *grads_norm = pointwise_norm_backward(grad, weight, x, *norm)
    return grad_x, grad_weight, bias_gradient(grad, bias), grad_residual, *grads_norm
