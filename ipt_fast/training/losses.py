"""Restoration losses, which take (output, target) of one shape, and a contrastive one; scalar means in fp32."""

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint


def l1_loss(output: Tensor, target: Tensor) -> Tensor:
    """Mean absolute error."""
    return F.l1_loss(output.float(), target.float())


def charbonnier_loss(output: Tensor, target: Tensor, eps: float = 1e-3) -> Tensor:
    """mean sqrt((output - target)² + eps²), a smooth L1 (Charbonnier et al., ICIP 1994; eps as in MPRNet)."""
    return torch.sqrt((output.float() - target.float()).square() + eps**2).mean()


def contrastive_loss(features: Tensor, everyone: Tensor | None = None, first: int = 0) -> Tensor:
    """Patches of one image are to be alike and unlike those of others (IPT, eq. 5).

    The mean over images j and patches a, b of -log(exp d(f_a^j, f_b^j) / sum_{k != j} exp d(f_a^j, f_b^k)), d the
    cosine. Memory is that of one image's N x B x N cosines; the backward makes them again.

    Args:
        features: (B, N, D), the decoder's patch features.
        everyone: those of all B' >= 2 images, of which ``features`` are images ``first`` and on; ``features`` if None.

    Raises:
        ValueError: there are less than two images.
    """
    normal = F.normalize(features.float(), dim=2)
    others = normal if everyone is None else F.normalize(everyone.float(), dim=2)
    if len(others) < 2:
        raise ValueError(
            f"features must be of at least 2 images, which the contrastive loss compares; got {len(others)}"
        )
    means = [checkpoint(_contrast, own, others, first + j, use_reentrant=False) for j, own in enumerate(normal)]
    return torch.stack(means).mean()


def _contrast(own: Tensor, everyone: Tensor, index: int) -> Tensor:
    """own: (N, D) of image ``index`` of everyone's (B, N, D); normalised."""
    cosines = torch.einsum("ad,kbd->kab", own, everyone)
    others = torch.cat([cosines[:index], cosines[index + 1 :]])
    return (others.logsumexp(0) - cosines[index]).mean()


LOSSES = {"l1": l1_loss, "charbonnier": charbonnier_loss}
