"""Operations of what several operators have in them, from shapes: two for each multiply-accumulate."""

import math

from ._operator import Shape


def convolutions(x: Shape, *weights: Shape) -> int:
    """Convolutions of a map (B, C, H, W) that keep its size, from the shapes of their weights."""
    batch, _, height, width = x
    return 2 * batch * height * width * sum(map(math.prod, weights))


def linear(x: Shape, weight: Shape) -> int:
    """x W^T."""
    return 2 * math.prod(x) * weight[0]
