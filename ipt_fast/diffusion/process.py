"""The diffusion process of images: adding noise, its posterior, and the loss by which a model learns to undo it.

Ho et al. 2020 (Denoising Diffusion Probabilistic Models) are the source of the process and of the simple loss,
Nichol & Dhariwal 2021 (Improved Denoising Diffusion Probabilistic Models) of the learned variance and the hybrid loss.
"""

import math

import torch
from torch import Tensor

from ..modules import _check
from .schedule import Schedule

VARIANCES = ("fixed_small", "fixed_large")
# Half of the distance of two neighbouring values of 8 bit in [-1, 1].
_HALF_BIN = 1 / 255


class GaussianDiffusion:
    """Tables of a schedule, and what is computed of them.

    Images are (B, C, H, W) of any float dtype, and the computation is in float32. ``step`` is (B,) int64, the index
    of a step of the schedule; the model is told ``schedule.timesteps[step]``. Every method raises TypeError or
    ValueError where images have other shapes, dtypes or devices than these, or steps other shapes, dtypes or devices;
    or other values, which are looked at on the CPU only, as reading them would make an accelerator wait.

    Args:
        schedule: 1000 linear steps by default.

    Attributes:
        tables: {name: (S,) float64} on the CPU:

            - ``sqrt_alphas_cumprod``, ``sqrt_one_minus_alphas_cumprod``: of the image and of the noise in x_t (eq. 4);
            - ``sqrt_recip_alphas_cumprod``, ``sqrt_recipm1_alphas_cumprod``: of x_t and of the noise in x_0;
            - ``posterior_mean_coef1``, ``posterior_mean_coef2``: of x_0 and of x_t in the posterior's mean (eq. 7);
            - ``posterior_log_variance``: log β̃ (eq. 7), at the first step that of the second one, as it is log 0 there;
            - ``log_betas``.
    """

    def __init__(self, schedule: Schedule | None = None):
        if schedule is not None and not isinstance(schedule, Schedule):
            raise TypeError(f"schedule must be a Schedule; got {type(schedule).__name__}")
        self.schedule = schedule = schedule or Schedule.linear()
        betas, kept = schedule.betas, schedule.alphas_cumprod
        before = torch.cat([kept.new_ones(1), kept[:-1]])
        posterior_variance = betas * (1 - before) / (1 - kept)
        self.tables = {
            "sqrt_alphas_cumprod": kept.sqrt(),
            "sqrt_one_minus_alphas_cumprod": (1 - kept).sqrt(),
            "sqrt_recip_alphas_cumprod": kept.rsqrt(),
            "sqrt_recipm1_alphas_cumprod": (1 / kept - 1).sqrt(),
            "posterior_mean_coef1": betas * before.sqrt() / (1 - kept),
            "posterior_mean_coef2": (1 - betas).sqrt() * (1 - before) / (1 - kept),
            "posterior_log_variance": torch.cat([posterior_variance[1:2], posterior_variance[1:]]).log(),
            "log_betas": betas.log(),
        }
        self._on_device: dict[torch.device, dict[str, Tensor]] = {}

    def q_sample(self, x_0: Tensor, step: Tensor, noise: Tensor) -> Tensor:
        """x_t: images with as much noise as there is after a step (eq. 4)."""
        self._check(step, x_0=x_0, noise=noise)
        return (
            self._at("sqrt_alphas_cumprod", step) * x_0.float()
            + self._at("sqrt_one_minus_alphas_cumprod", step) * noise.float()
        )

    def predict_x_0(self, x_t: Tensor, step: Tensor, noise: Tensor) -> Tensor:
        """The images of which x_t was made with this noise."""
        self._check(step, x_t=x_t, noise=noise)
        return (
            self._at("sqrt_recip_alphas_cumprod", step) * x_t.float()
            - self._at("sqrt_recipm1_alphas_cumprod", step) * noise.float()
        )

    def posterior_mean(self, x_0: Tensor, x_t: Tensor, step: Tensor) -> Tensor:
        """The mean of x_{t-1}, given x_0 and x_t (eq. 7)."""
        self._check(step, x_0=x_0, x_t=x_t)
        return (
            self._at("posterior_mean_coef1", step) * x_0.float() + self._at("posterior_mean_coef2", step) * x_t.float()
        )

    def log_variance(self, v: Tensor, step: Tensor) -> Tensor:
        """Log of the learned variance of x_{t-1}: from log β̃ where v is -1 to log β where it is 1.

        This is eq. 15 of Nichol & Dhariwal with its v in [0, 1] as (v + 1) / 2, as published models have it.
        """
        self._check(step, v=v)
        share = (v.float() + 1) / 2
        return share * self._at("log_betas", step) + (1 - share) * self._at("posterior_log_variance", step)

    def hybrid_loss(self, output: Tensor, x_0: Tensor, x_t: Tensor, noise: Tensor, step: Tensor) -> Tensor:
        """L_simple + λ L_vlb of each image (Nichol & Dhariwal, eq. 16).

        λ is 0.001 for 1000 steps, over which L_vlb is a sum; so the bound's term of one random step counts S / 1000
        times. It teaches the variance only: the mean in it is detached.

        Args:
            output: (B, 2C, H, W), the predicted noise and v; or (B, C, H, W), for which the loss is L_simple alone.

        Returns:
            (B,) float32.
        """
        self._check(step, x_0=x_0, x_t=x_t, noise=noise)
        predicted, v = split_output(output, x_t.shape[1])
        self._check(step, x_t=x_t, output=predicted)
        simple = (predicted.float() - noise.float()).square().flatten(1).mean(1)
        if v is None:
            return simple
        bound = self.variational_bound(predicted.detach(), v, x_0, x_t, step)
        return simple + len(self.schedule) / 1000 * bound

    def variational_bound(self, predicted: Tensor, v: Tensor, x_0: Tensor, x_t: Tensor, step: Tensor) -> Tensor:
        """One term of the variational bound of each image, L_{t-1} or, at the first step, L_0 (eq. 5).

        L_0 is the likelihood of values of 8 bit in [-1, 1] (eq. 13). As in published training code it is taken so for
        latents as well.

        Returns:
            (B,) float32, in bits for each value of an image.
        """
        self._check(step, x_0=x_0, x_t=x_t, predicted=predicted, v=v)
        x_0 = x_0.float()
        mean = self.posterior_mean(self.predict_x_0(x_t, step, predicted), x_t, step)
        log_variance = self.log_variance(v, step)
        true_mean, true_log_variance = self.posterior_mean(x_0, x_t, step), self._at("posterior_log_variance", step)
        divergence = _normal_kl(true_mean, true_log_variance, mean, log_variance).flatten(1).mean(1)
        likelihood = _discretized_log_likelihood(x_0, mean, log_variance).flatten(1).mean(1)
        return torch.where(step == 0, -likelihood, divergence) / math.log(2)

    def _check(self, step: Tensor, **images: Tensor) -> None:
        """Check that images are of one shape and device, and that there is a step of the schedule for each."""
        first, shape = next(iter(images)), None
        for name, value in images.items():
            if not isinstance(value, Tensor) or not value.is_floating_point():
                got = value.dtype if isinstance(value, Tensor) else type(value).__name__
                raise TypeError(f"{name} must be a floating-point tensor; got {got}")
            if shape is None and value.dim() != 4:
                raise ValueError(f"{name} must be (B, C, H, W); got {tuple(value.shape)}")
            shape = shape or tuple(value.shape)
            if value.shape != shape:
                raise ValueError(f"{name} must be {shape} as {first}; got {tuple(value.shape)}")
            if value.device != images[first].device:
                raise ValueError(f"{name} must be on {images[first].device} as {first}; got {value.device}")
        _check.numbers("step", step, len(self.schedule), images[first], first)

    def _at(self, name: str, step: Tensor) -> Tensor:
        """Entries of a table for images of a batch, (B, 1, 1, 1) float32."""
        if step.device not in self._on_device:
            tables = {name: table.to(step.device, torch.float32) for name, table in self.tables.items()}
            self._on_device[step.device] = tables
        return self._on_device[step.device][name][step].view(-1, 1, 1, 1)


def split_output(output: Tensor, channels: int) -> tuple[Tensor, Tensor | None]:
    """The predicted noise and v of a model's output; v is None where its variance is not learned.

    Raises:
        TypeError: the output is no tensor.
        ValueError: it has neither ``channels`` channels nor twice as many.
    """
    if not isinstance(output, Tensor):
        raise TypeError(f"output of the model must be a tensor; got {type(output).__name__}")
    if output.dim() != 4:
        raise ValueError(f"output of the model must be (B, C, H, W); got {tuple(output.shape)}")
    if output.shape[1] == channels:
        return output, None
    if output.shape[1] == 2 * channels:
        return output[:, :channels], output[:, channels:]
    raise ValueError(f"output of the model must have {channels} or {2 * channels} channels; got {output.shape[1]}")


def _normal_kl(mean: Tensor, log_variance: Tensor, other_mean: Tensor, other_log_variance: Tensor) -> Tensor:
    """KL divergence, in nats, of a second normal distribution from a first one, of each value."""
    difference = log_variance - other_log_variance
    return 0.5 * (difference.exp() - 1 - difference + (mean - other_mean).square() * (-other_log_variance).exp())


def _discretized_log_likelihood(x_0: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
    """Log probability, in nats, that a normal distribution has for the bin of each value (eq. 13).

    The bins are those of 8 bit in [-1, 1], and the outer ones have no end.
    """
    centered, deviation = x_0 - mean, (0.5 * log_variance).exp()
    # Of a point in the upper tail the mirrored one is taken, as floats resolve the lower tail only.
    distance = centered.abs()
    inner = torch.special.ndtr((_HALF_BIN - distance) / deviation) - torch.special.ndtr(
        (-_HALF_BIN - distance) / deviation
    )
    lowest = torch.special.log_ndtr((centered + _HALF_BIN) / deviation)
    highest = torch.special.log_ndtr((_HALF_BIN - centered) / deviation)
    log_inner = inner.clamp(min=1e-12).log()
    return torch.where(x_0 < -0.999, lowest, torch.where(x_0 > 0.999, highest, log_inner))
