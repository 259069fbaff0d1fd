"""Noise schedules: how much noise each step of a diffusion process adds, and fewer steps for sampling."""

import dataclasses
import functools
import itertools
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

    Raises:
        TypeError, ValueError: they are not such tensors, of two steps or more.
    """

    betas: Tensor
    timesteps: Tensor

    def __post_init__(self) -> None:
        _check_vector("betas", self.betas, torch.float64)
        _check_vector("timesteps", self.timesteps, torch.int64)
        if len(self.betas) < 2:
            raise ValueError(f"betas must be of at least 2 steps; got {len(self.betas)}")
        if len(self.timesteps) != len(self.betas):
            raise ValueError(f"timesteps must be {len(self.betas)} as betas; got {len(self.timesteps)}")
        if wrong := [beta for beta in self.betas.tolist() if not 0 < beta < 1]:
            raise ValueError(f"betas must be in (0, 1); got {wrong[0]}")
        _check_ascending("timesteps", self.timesteps)

    @classmethod
    def linear(cls, steps: int = 1000, first: float = 1e-4, last: float = 0.02) -> Self:
        """Betas that grow linearly; the defaults are those of Ho et al. 2020, and of every model here.

        Raises:
            TypeError, ValueError: ``steps`` is not an integer of at least 2, or ``first`` or ``last`` not in (0, 1).
        """
        _check_int("steps", steps)
        if steps < 2:
            raise ValueError(f"steps must be at least 2; got {steps}")
        for name, beta in (("first", first), ("last", last)):
            if not isinstance(beta, int | float):
                raise TypeError(f"{name} must be a number; got {beta!r}")
            if not 0 < beta < 1:
                raise ValueError(f"{name} must be in (0, 1); got {beta}")
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
        _check_int("steps", steps)
        if not 2 <= steps <= len(self):
            raise ValueError(f"steps must be from 2 to the {len(self)} of the schedule; got {steps}")
        return self.at(torch.linspace(0, len(self) - 1, steps, dtype=torch.float64).round().long())

    def at(self, steps: Tensor) -> "Schedule":
        """The schedule of the given ones of these steps, (S',) int64 and ascending, two or more.

        Raises:
            TypeError, ValueError: ``steps`` are not such, or not from 0 to the number of steps there are minus 1.
        """
        _check_vector("steps", steps, torch.int64)
        if len(steps) < 2:
            raise ValueError(f"steps must be at least 2; got {len(steps)}")
        if wrong := [step for step in steps.tolist() if not 0 <= step < len(self)]:
            raise ValueError(f"steps must be from 0 to {len(self) - 1}; got {wrong[0]}")
        _check_ascending("steps", steps)
        kept = self.alphas_cumprod[steps]
        before = torch.cat([kept.new_ones(1), kept[:-1]])
        return Schedule(1 - kept / before, self.timesteps[steps])


def _check_int(name: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} must be an integer; got {value!r}")


def _check_vector(name: str, value: object, dtype: torch.dtype) -> None:
    if not isinstance(value, Tensor) or value.dtype != dtype:
        got = value.dtype if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f"{name} must be a tensor of {dtype}; got {got}")
    if value.dim() != 1:
        raise ValueError(f"{name} must be (S,); got {tuple(value.shape)}")


def _check_ascending(name: str, value: Tensor) -> None:
    numbers = value.tolist()
    for number, following in itertools.pairwise(numbers):
        if following <= number:
            raise ValueError(f"{name} must be ascending; got {following} after {number}")
