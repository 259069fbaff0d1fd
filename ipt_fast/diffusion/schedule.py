"""Noise schedules: how much noise each step of a diffusion process adds, and fewer steps for sampling."""

import dataclasses
import functools
from typing import Self

import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True, eq=False)
class Schedule:
    """The steps of a diffusion process, the first of which adds the least noise to an image.

    Args:
        betas: (S,) float64 in (0, 1): the variance of the noise that each step adds (Ho et al. 2020, eq. 2).
        timesteps: (S,) int64, ascending: what the model is told at each step. They are 0 to S - 1 unless the schedule
            was respaced from a longer one.
    """

    betas: Tensor
    timesteps: Tensor

    @classmethod
    def linear(cls, steps: int = 1000, first: float = 1e-4, last: float = 0.02) -> Self:
        """Betas that grow linearly; the defaults are those of Ho et al. 2020, and of every model here."""
        return cls(torch.linspace(first, last, steps, dtype=torch.float64), torch.arange(steps))

    def __len__(self) -> int:
        return len(self.betas)

    @functools.cached_property
    def alphas_cumprod(self) -> Tensor:
        """(S,) float64: the share of the image's variance that is left after each step, ᾱ."""
        return (1 - self.betas).cumprod(0)

    def respaced(self, steps: int) -> "Schedule":
        """``steps`` of these steps, evenly spaced from the first to the last and rounded to whole ones.

        ᾱ stays what it was at the steps that are kept (Nichol & Dhariwal 2021, section 4, eq. 19).

        Raises:
            TypeError, ValueError: ``steps`` is not an integer from 2 to the number of steps there are.
        """
        if not isinstance(steps, int) or isinstance(steps, bool):
            raise TypeError(f"steps must be an integer; got {steps!r}")
        if not 2 <= steps <= len(self):
            raise ValueError(f"steps must be from 2 to the {len(self)} of the schedule; got {steps}")
        return self.at(torch.linspace(0, len(self) - 1, steps, dtype=torch.float64).round().long())

    def at(self, steps: Tensor) -> "Schedule":
        """The schedule of the given ones of these steps, (S',) int64 and ascending."""
        kept = self.alphas_cumprod[steps]
        before = torch.cat([kept.new_ones(1), kept[:-1]])
        return Schedule(1 - kept / before, self.timesteps[steps])
