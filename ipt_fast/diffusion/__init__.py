"""Diffusion: how images are noised, what a model is trained to predict, and how images are sampled from it."""

from .process import GaussianDiffusion
from .sampling import sample
from .schedule import Schedule

__all__ = ["GaussianDiffusion", "Schedule", "sample"]
