"""The residual connection of a layer."""

from torch import Tensor


def gated_residual(x: Tensor | None, branch: Tensor, gate: Tensor | None) -> Tensor:
    """x + gate * branch; the gate is (C,), or (B, C) of each image, or 1; x may be absent."""
    gated = branch if gate is None else gate[..., None, None] * branch
    return gated if x is None else x + gated
