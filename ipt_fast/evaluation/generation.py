"""How like real images generated ones are: FID, sFID, Inception Score, precision and recall.

They are defined as by the evaluator of ADM (Dhariwal and Nichol, "Diffusion Models Beat GANs on Image Synthesis",
NeurIPS 2021), whose figures the tables of the field have. All are computed in float64 from the features that a network
has of the images, see :mod:`ipt_fast.evaluation.features`, a block at a time.
"""

import dataclasses
import math
import os
import warnings
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .._files import atomic_write
from ..data.npz import IMAGES, has_images, read_npz
from .features import Features

NEAREST = 3  # neighbours that the manifold of precision and recall is made of
SPLIT = 5000  # images that one Inception Score is of
FIGURES = ("fid", "sfid", "inception_score", "precision", "recall")
_KEYS = {"pool": ("mu", "sigma"), "spatial": ("mu_s", "sigma_s")}  # in the .npz files of ADM and others
_BLOCK = 4096  # images at once


@dataclasses.dataclass(frozen=True)
class Gaussian:
    """The normal distribution that features are taken for.

    Args:
        mean: (D,) float64.
        covariance: (D, D) float64.

    Raises:
        ValueError: another shape, or a value that is not finite.
    """

    mean: Tensor
    covariance: Tensor

    def __post_init__(self) -> None:
        width = self.mean.shape[-1:]
        if self.mean.dim() != 1 or self.covariance.shape != (*width, *width):
            shapes = f"{tuple(self.mean.shape)} and {tuple(self.covariance.shape)}"
            raise ValueError(f"mean and covariance must be (D,) and (D, D); got {shapes}")
        if not (self.mean.isfinite().all() and self.covariance.isfinite().all()):
            raise ValueError("mean and covariance must be finite; got NaN or infinity")


def gaussian_of(features: Tensor) -> Gaussian:
    """The mean and the unbiased covariance of features (N, D).

    Raises:
        ValueError: another shape, or fewer than 2 images.
    """
    _check_features("features", features, 2, "a covariance")
    blocks = features.split(_BLOCK)
    mean = sum(block.sum(0, dtype=torch.float64) for block in blocks) / len(features)
    scatter = sum(centred.T @ centred for centred in (block.double() - mean for block in blocks))
    return Gaussian(mean, scatter / (len(features) - 1))  # type: ignore[arg-type]  # there is a block


def frechet_distance(first: Gaussian, second: Gaussian) -> float:
    """|μ₁ - μ₂|² + tr(Σ₁ + Σ₂ - 2 (Σ₁ Σ₂)^½), the squared Fréchet distance (Heusel et al., NeurIPS 2017, eq. 6).

    With A Aᵀ = Σ₁ the trace of the root is the sum of the roots of the eigenvalues of Aᵀ Σ₂ A, which is symmetric: it
    takes no root of a matrix, and stays exact where a covariance is singular.

    Raises:
        ValueError: they differ in width.
    """
    if first.mean.shape != second.mean.shape:
        raise ValueError(
            f"features must be as wide as those they are compared with, {len(second.mean)}; got {len(first.mean)}"
        )
    values, vectors = torch.linalg.eigh(first.covariance)
    # What rounding leaves of an eigenvalue of 0 would count by its root, which is much larger.
    kept = values > values.abs().max() * len(values) * torch.finfo(values.dtype).eps
    root = vectors[:, kept] * values[kept].sqrt()
    trace_of_root = torch.linalg.eigvalsh(root.T @ second.covariance @ root).clamp(min=0).sqrt().sum()
    distance = (first.mean - second.mean).square().sum() + first.covariance.trace() + second.covariance.trace()
    return max(0.0, (distance - 2 * trace_of_root).item())


def inception_score(logits: Tensor, split: int = SPLIT) -> float:
    """exp of the mean KL(p(y|x) ‖ p(y)) of a classifier (Salimans et al., NeurIPS 2016), averaged over splits.

    Args:
        logits: (N, classes), in the order of the images.
        split: images of each split; the last one may be smaller.

    Raises:
        ValueError: another shape, or no image.
    """
    _check_features("logits", logits, 1, "an Inception Score")
    scores = []
    for part in logits.split(split):
        probabilities = part.double().softmax(1)
        mean = probabilities.mean(0)
        # KL is the entropy of the mean less the mean entropy.
        gain = torch.special.entr(mean).sum() - torch.special.entr(probabilities).sum(1).mean()
        scores.append(gain.exp())
    return torch.stack(scores).mean().item()


def precision_and_recall(samples: Tensor, reference: Tensor, nearest: int = NEAREST) -> tuple[float, float]:
    """The share of samples in the manifold of the reference, and the reverse (Kynkäänniemi et al., NeurIPS 2019).

    The manifold of a set is the union of balls around its images, each as large as to reach the ``nearest``-th
    neighbour in the set.

    Args:
        samples, reference: features (N, D) and (M, D).
        nearest: at least 1.

    Raises:
        ValueError: they differ in width, or a set has no so many neighbours.
    """
    for name, features in (("samples", samples), ("reference", reference)):
        _check_features(name, features, nearest + 1, f"balls to the neighbour {nearest}")
    if samples.shape[1] != reference.shape[1]:
        raise ValueError(f"samples must be as wide as the reference, {reference.shape[1]}; got {samples.shape[1]}")
    of_samples, of_reference = _radii(samples, nearest), _radii(reference, nearest)
    within_reference = torch.zeros(len(samples), dtype=torch.bool, device=samples.device)
    within_samples = torch.zeros(len(reference), dtype=torch.bool, device=samples.device)
    for i in range(0, len(samples), _BLOCK):
        for j in range(0, len(reference), _BLOCK):
            rows, columns = slice(i, i + _BLOCK), slice(j, j + _BLOCK)
            distances = _squared_distances(samples[rows], reference[columns])
            within_reference[rows] |= (distances <= of_reference[columns]).any(1)
            within_samples[columns] |= (distances <= of_samples[rows, None]).any(0)
    return within_reference.double().mean().item(), within_samples.double().mean().item()


def _radii(features: Tensor, nearest: int) -> Tensor:
    """(N,) the squared distance of each to its ``nearest``-th neighbour; the smallest distance is that to itself."""
    radii = []
    for rows in features.split(_BLOCK):
        smallest = torch.empty(len(rows), 0, dtype=torch.float64, device=features.device)
        for columns in features.split(_BLOCK):
            distances = torch.cat([smallest, _squared_distances(rows, columns)], 1)
            smallest = distances.topk(min(nearest + 1, distances.shape[1]), 1, largest=False).values
        radii.append(smallest.amax(1))
    return torch.cat(radii)


def _squared_distances(rows: Tensor, columns: Tensor) -> Tensor:
    """(N, M) float64 of features (N, D) and (M, D): |a|² + |b|² - 2ab, three times as fast as ``torch.cdist``."""
    rows, columns = rows.double(), columns.double()
    distances = torch.addmm(columns.square().sum(1), rows, columns.T, alpha=-2)
    return distances.add_(rows.square().sum(1, keepdim=True)).clamp_(min=0)


def _check_features(name: str, features: Tensor, least: int, what: str) -> None:
    if features.dim() != 2:
        raise ValueError(f"{name} must be (N, D); got {tuple(features.shape)}")
    if len(features) < least:
        raise ValueError(f"{name} must be of at least {least} images for {what}; got {len(features)}")
    if not math.isfinite(features.sum(dtype=torch.float64).item()):
        raise ValueError(f"{name} must be finite; got NaN or infinity")


@dataclasses.dataclass(frozen=True)
class Statistics:
    """What is known of a set of images, with which others are compared.

    Attributes:
        pool: of the pooled features, for FID.
        spatial: of the spatial features, for sFID, or None.
        points: the pooled features (N, D), for precision and recall, or None.
    """

    pool: Gaussian
    spatial: Gaussian | None = None
    points: Tensor | None = None


def statistics_of(features: Features) -> Statistics:
    """Those of a set of images by its features; ValueError for fewer than 2."""
    spatial = None if features.spatial is None else gaussian_of(features.spatial)
    return Statistics(gaussian_of(features.pool), spatial, features.pool)


def read_statistics(path: str | os.PathLike[str]) -> Statistics | None:
    """Those that a .npz file holds, ``mu`` and ``sigma``, and maybe ``mu_s`` and ``sigma_s``; None of one of images.

    Raises:
        ValueError: the file cannot be read, holds neither of the two, or arrays of other shapes.
    """
    arrays = read_npz(path)
    found: dict[str, Gaussian] = {}
    for name, keys in _KEYS.items():
        if all(key in arrays for key in keys):
            try:
                found[name] = Gaussian(*(torch.from_numpy(arrays[key].astype(np.float64)) for key in keys))
            except (ValueError, TypeError) as error:
                raise ValueError(f"{' and '.join(keys)} in {path} must be mean and covariance: {error}") from error
    if "pool" in found:
        return Statistics(found["pool"], found.get("spatial"))
    if not has_images(path):
        names = ", ".join(arrays) or "nothing"
        raise ValueError(f"{path} must hold statistics, mu and sigma, or images, {IMAGES}; got {names}")
    return None


def write_statistics(path: str | os.PathLike[str], statistics: Statistics) -> None:
    """Write a .npz file that :func:`read_statistics` reads, and other programs; replaced atomically."""
    arrays: dict[str, Any] = {}
    for name, keys in _KEYS.items():
        if (gaussian := getattr(statistics, name)) is not None:
            arrays |= dict(zip(keys, (gaussian.mean.numpy(), gaussian.covariance.numpy()), strict=True))
    with atomic_write(path) as temporary, temporary.open("wb") as file:
        np.savez(file, **arrays)


def figures_of(samples: Features, reference: Statistics | None) -> dict[str, float | None]:
    """{figure: its value, or None where the network or the reference does not have what it takes}, for all FIGURES.

    Raises:
        ValueError: the reference has features of another width, or a set has too few images.
    """
    figures: dict[str, float | None] = dict.fromkeys(FIGURES)
    if samples.logits is not None:
        figures["inception_score"] = inception_score(samples.logits)
    if reference is None:
        return figures
    images, width = samples.pool.shape
    figures["fid"] = frechet_distance(gaussian_of(samples.pool), reference.pool)
    if images <= width:
        warnings.warn(
            f"FID of {images} images is larger than that of many, as {width} features have a covariance of full rank "
            f"from {width + 1} images on",
            stacklevel=2,
        )
    if samples.spatial is not None and reference.spatial is not None:
        figures["sfid"] = frechet_distance(gaussian_of(samples.spatial), reference.spatial)
    if reference.points is not None:
        figures["precision"], figures["recall"] = precision_and_recall(samples.pool, reference.points)
    return figures
