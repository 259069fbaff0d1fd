"""Parameters of norms and gates: (C,), or (B, C) where each image has its own.

Where a kernel gets the latter (EACH_IMAGE), each of its programs stays in one image, whose values `of_image` finds, and
all that follows knows of that image alone. Without it nothing of this is compiled.
"""

import triton
import triton.language as tl


@triton.jit
def of_image(x, i_image, pixels, C: tl.constexpr):
    """Where the values of an image begin in ``x``, which has C values for each of so many pixels."""
    return x + i_image.to(tl.int64) * pixels * C


def alike(batch, *parameters):
    """The parameters, some of which are None; all of them (batch, C) if one of them is."""
    if not is_each_image(*parameters):
        return parameters
    return [p if p is None or p.dim() == 2 else p.expand(batch, -1).contiguous() for p in parameters]


def is_each_image(*parameters):
    """Whether one of the parameters is (B, C)."""
    return any(p is not None and p.dim() == 2 for p in parameters)


def images_and_pixels(x, channels, each_image):
    """How many images a kernel tells apart, all of them being one to it without EACH_IMAGE, and pixels of each."""
    if each_image:
        return x.shape[0], x.shape[2] * x.shape[3]
    return 1, x.numel() // channels


def gradient_like(gradient, parameter):
    """A gradient (images, C) in the form and dtype of the parameter; None where that is."""
    if parameter is None:
        return None
    if parameter.dim() == 1:
        gradient = gradient[0] if len(gradient) == 1 else gradient.sum(dim=0)
    return gradient.to(parameter.dtype)
