"""Local attribution maps: which pixels of the input a model restores a part of the output from.

Gu and Dong, "Interpreting Super-Resolution Networks with Local Attribution Maps", CVPR 2021. Figure 2 of the IPT-V2
paper is made of them.
"""

import dataclasses
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .freezing import prepared
from .models.contract import Contract, describe_restoring

Window = tuple[int, int, int]  # left, top, and the side of a square, in pixels


@dataclasses.dataclass(frozen=True, eq=False)
class Attribution:
    """What :func:`local_attribution_map` finds.

    Attributes:
        values: (C, H, W) float32, the share of every value of the input in ``change``. They have both signs, and sum to
            ``change`` up to the error of the integral.
        change: the detector's value for the image less that for the blurred image.
        output: (C', H', W') float32, what the model makes of the image.
        window: of the output.
    """

    values: Tensor
    change: float
    output: Tensor
    window: Window

    @property
    def magnitude(self) -> Tensor:
        """(H, W): the absolute values, summed over the channels."""
        return self.values.abs().sum(0)

    @property
    def diffusion_index(self) -> float:
        """:func:`diffusion_index` of the magnitude."""
        return diffusion_index(self.magnitude)


def gradient_magnitude(part: Tensor) -> Tensor:
    """The paper's detector of edges and textures: how much gradient there is in a part of an image.

    Args:
        part: (C, h, w), at least 2 x 2.

    Returns:
        The sum over channels and over every 2 x 2 pixels of the length of the gradient between them. (The authors'
        program takes differences to the next row and column instead, which depends on how the image is turned.)
    """
    along = (part[:, :, 1:] - part[:, :, :-1]).unfold(1, 2, 1).mean(-1)
    down = (part[:, 1:] - part[:, :-1]).unfold(2, 2, 1).mean(-1)
    # The gradient of a norm is zero where the norm is, that of a square root infinite.
    return torch.linalg.vector_norm(torch.stack([along, down]), dim=0).sum()


def blurred(image: Tensor, sigma: float) -> Tensor:
    """``image`` (C, H, W) under a Gaussian of ``sigma`` pixels, cut off at 4 sigma; borders are repeated.

    With ``sigma`` 0 it is the image itself.
    """
    if sigma == 0:
        return image
    radius = max(1, math.ceil(4 * sigma))
    place = torch.arange(-radius, radius + 1, dtype=torch.float64, device=image.device)
    kernel = torch.exp(-(place**2) / (2 * sigma**2))
    kernel = (kernel / kernel.sum()).expand(len(image), 1, 1, -1)
    padded = F.pad(image.double()[None], [radius] * 4, mode="replicate")
    rows = F.conv2d(padded, kernel, groups=len(image))
    return F.conv2d(rows, kernel.mT, groups=len(image))[0].to(image.dtype)


@torch.inference_mode(False)
@torch.enable_grad()
def local_attribution_map(
    model: nn.Module,
    image: Tensor,
    window: Window,
    *,
    task: str | int | None = None,
    sigma: float = 1.2,
    steps: int = 50,
    detector: Callable[[Tensor], Tensor] = gradient_magnitude,
) -> Attribution:
    """The local attribution map (LAM) of one window of the output.

    The gradient of the detector D of the output F with respect to the input is integrated along the progressive
    blurring path, from the blurred image to the image itself, with Gaussians whose sigma falls evenly:

        gamma(a) = G(sigma - a sigma) * I,   LAM_i = integral over a of dD(F(gamma(a))) / d gamma_i * d gamma_i / da

    Each of the steps adds the gradient halfway between two images of the path times their difference.

    Args:
        model: a module (C, H, W) -> (C', H', W') on batches; it is left as it is, and runs in float32 with its branches
            merged.
        image: (C, H, W), floats in [0, 1] (noise may leave that range), with the channels and the size that the model
            takes.
        window: (left, top, side) in pixels of the output, inside it, side at least 2.
        task: of a model with several.
        sigma: of the blurred image, in pixels; 1.2 is that of the authors' program, and so are 50 steps.
            At most the longer side of the image.
        steps: of the integral.
        detector: what is attributed, a differentiable function of the window (C', side, side) to a number.

    Raises:
        TypeError, ValueError: a bad argument; a flat image, which its blurred form equals; or an output that does not
            change along the path, so that there is nothing to attribute.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module; got {type(model).__name__}")
    contract = describe_restoring(model)
    _check_image(image, contract)
    if isinstance(sigma, bool) or not isinstance(sigma, int | float) or not 0 < sigma <= max(image.shape[1:]):
        raise ValueError(
            "sigma must be a positive number of pixels, at most the longer side of the image; "
            f"got {sigma!r} for {tuple(image.shape)}"
        )
    if type(steps) is not int or steps < 1:
        raise ValueError(f"steps must be an int of at least 1; got {steps!r}")
    if task is not None and not contract.takes_task:
        raise ValueError(f"task must be None for {type(model).__name__}, which has no tasks; got {task!r}")

    model = prepared(model, None).requires_grad_(False)
    parameter = next(model.parameters(), None)
    image = image.to("cpu" if parameter is None else parameter.device, torch.float32)

    def run(x: Tensor) -> Tensor:
        arguments = {} if task is None else {"task": task}
        white = contract.value_range
        return model(x[None] * white, **arguments)[0].float() / white

    with torch.no_grad():
        output = run(image)
        left, top, side = _checked_window(window, output)
        before = blurred(image, sigma)
        value = detector(_part(output, window))
        if not isinstance(value, Tensor) or value.numel() != 1:
            got = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"detector must make a tensor of one number; got {got}")
        change = value - detector(_part(run(before), window))
    values = torch.zeros_like(image)
    for step in range(1, steps + 1):
        after = blurred(image, sigma * (1 - step / steps))
        halfway = ((before + after) / 2).requires_grad_()
        (gradient,) = torch.autograd.grad(detector(_part(run(halfway), window)), halfway)
        values += gradient * (after - before)
        before = after
    if not values.isfinite().all():
        raise ValueError("model must have finite gradients; got NaN or infinity")
    if not values.any():
        raise ValueError(f"window must be one whose output changes with the image; got {window}, where nothing does")
    return Attribution(values, change.item(), output, (left, top, side))


def gini(values: Tensor) -> float:
    """The Gini coefficient of numbers of at least 0: 0 where all are equal, (n - 1) / n where one has everything.

    It is the mean absolute difference of two of them over twice their mean.

    Raises:
        ValueError: none, a negative one, one that is not finite, or all zero.
    """
    flat = values.detach().double().flatten().sort().values
    total = flat.sum().item()
    if not (len(flat) and flat[0] >= 0 and 0 < total < math.inf):
        raise ValueError("values must be finite and at least 0, and one of them above 0; got others")
    rank = torch.arange(1, len(flat) + 1, dtype=torch.float64, device=flat.device)
    return (2 * (rank * flat).sum().item() / total - (len(flat) + 1)) / len(flat)


def diffusion_index(values: Tensor) -> float:
    """DI = (1 - Gini) * 100 of attributions of at least 0: 100 where all pixels have a like share, 100 / n for one.

    Raises:
        ValueError: as of :func:`gini`.
    """
    return (1 - gini(values)) * 100


def _part(output: Tensor, window: Window) -> Tensor:
    left, top, side = window
    return output[:, top : top + side, left : left + side]


def _check_image(image: object, contract: Contract) -> None:
    if not isinstance(image, Tensor) or not image.is_floating_point():
        got = image.dtype if isinstance(image, Tensor) else type(image).__name__
        raise TypeError(f"image must be a tensor of floats in [0, 1]; got {got}")
    if image.dim() != 3 or 0 in image.shape or contract.in_channels not in (None, image.shape[0]):
        raise ValueError(f"image must be ({contract.in_channels or 'C'}, H, W); got {tuple(image.shape)}")
    size = contract.image_size
    if size is not None and image.shape[1:] != (size, size):
        raise ValueError(f"image must have the model's {size} x {size} pixels; got {tuple(image.shape)}")
    if not image.isfinite().all():
        raise ValueError("image must be finite; got NaN or infinity")
    if (image.flatten(1).amax(1) == image.flatten(1).amin(1)).all():
        raise ValueError("image must not be flat, as its blurred form is then the same; got one colour")


def _checked_window(window: object, output: Tensor) -> Window:
    height, width = output.shape[1:]
    if not (isinstance(window, tuple | list) and len(window) == 3 and all(type(each) is int for each in window)):
        raise ValueError(f"window must be three ints, left, top and side; got {window!r}")
    left, top, side = window
    if side < 2 or min(left, top) < 0 or left + side > width or top + side > height:
        raise ValueError(
            f"window must have a side of at least 2 and lie in the output of {width} x {height} pixels; got left "
            f"{left}, top {top}, side {side}"
        )
    return left, top, side
