"""Sampling of images from a diffusion model: DDPM (Ho et al. 2020), DDIM (Song et al. 2021), and guidance."""

import math
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..models.contract import attached_config
from .process import VARIANCES, GaussianDiffusion, split_output
from .schedule import Schedule

Progress = Callable[[int, int], None]


# no_grad and not inference_mode: callers may go on with the result in autograd.
@torch.no_grad()
def sample(
    model: nn.Module,
    labels: Tensor | Sequence[int] | None = None,
    *,
    seeds: Sequence[int],
    shape: tuple[int, int, int] | None = None,
    sampler: str = "ddpm",
    steps: int = 250,
    guidance: float = 1.0,
    eta: float = 0.0,
    clip: bool = False,
    variance: str = "fixed_small",
    schedule: Schedule | None = None,
    progress: Progress | None = None,
) -> Tensor:
    """One image or latent for each seed.

    All noise of an image comes from its own generator on the CPU, so it does not depend on the batch that the image
    is in, nor on the device. Each step calls the model once: with the batch, or with twice the batch under guidance.

    Args:
        model: ``model(x, timestep)``, or ``model(x, timestep, class_labels)`` with labels, in eval mode. It returns the
            noise in x (N, C, H, W), or the noise and v, (N, 2C, H, W). ``timestep`` is (N,) int64 of the full schedule.
            x has the dtype of its parameters; autocast is the caller's.
        labels: N class numbers; ``num_classes`` of the model's config is "no class".
        seeds: N integers in [0, 2**63); NumPy's and those of a tensor are taken, too.
        shape: (C, H, W), with as many channels as the model's config has; by default ``in_channels`` and
            ``sample_size`` of that.
        sampler: "ddpm", ancestral sampling; or "ddim", which adds no noise where ``eta`` is 0.
        steps: of the full schedule, evenly spaced.
        guidance: scale s of classifier-free guidance: the noise is that without a class plus s times the difference
            that the class makes, in all channels; v is that with the class. 1 turns it off.
        eta: of "ddim", in [0, 1]: how much of DDPM's noise each step adds.
        clip: keep the predicted images of all steps in [-1, 1], the range of pixels; latents have none.
        variance: of "ddpm" with a model that learns none: "fixed_small" (β̃) or "fixed_large" (β).
        schedule: the full one, which the model was trained with; 1000 linear steps by default.
        progress: is told (finished steps, steps) after each of them.

    Returns:
        (N, C, H, W) float32 on the model's device.

    Raises:
        TypeError, ValueError: an argument is none of these, or the model's output has another shape.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module; got {type(model).__name__}")
    if model.training:
        raise ValueError("model must be in eval mode, as labels are dropped in training; got one in training mode")
    _check_choice("sampler", sampler, tuple(SAMPLERS))
    _check_choice("variance", variance, VARIANCES)
    _check_number("guidance", guidance, -math.inf, math.inf)
    _check_number("eta", eta, 0, 1)
    if schedule is not None and not isinstance(schedule, Schedule):
        raise TypeError(f"schedule must be a Schedule; got {type(schedule).__name__}")
    diffusion = GaussianDiffusion((schedule or Schedule.linear()).respaced(steps))
    noise = _Noise(_seeds(seeds), _shape(model, shape), _device(model))
    predict = _Prediction(model, _classes(model, labels, len(noise.generators), guidance), guidance, noise.device)
    update = SAMPLERS[sampler](diffusion, variance=variance, eta=eta, clip=clip)
    x = noise.draw()
    for step in reversed(range(steps)):
        predicted, v = predict(x, int(diffusion.schedule.timesteps[step]))
        x = update(step, x, predicted, v, noise)
        if progress:
            progress(steps - step, steps)
    return x


class _Noise:
    """Standard normal noise for a batch of images, of each from its own generator."""

    def __init__(self, seeds: list[int], shape: tuple[int, int, int], device: torch.device):
        self.shape, self.device = (len(seeds), *shape), device
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def draw(self) -> Tensor:
        # A GPU works on the model while this draws and sends.
        noise = torch.empty(self.shape, pin_memory=self.device.type == "cuda")
        for image, generator in zip(noise, self.generators, strict=True):
            image.normal_(generator=generator)
        return noise.to(self.device, non_blocking=True)


class _Prediction:
    """The noise that a model predicts, under guidance, and v if it learns a variance; both float32."""

    def __init__(self, model: nn.Module, classes: Tensor | None, guidance: float, device: torch.device):
        self.model, self.guidance, self.device = model, guidance, device
        self.arguments = () if classes is None else (classes.to(device),)
        self.dtype = next((each.dtype for each in model.parameters() if each.is_floating_point()), torch.float32)

    def __call__(self, x: Tensor, timestep: int) -> tuple[Tensor, Tensor | None]:
        guided = self.guidance != 1
        # Always a copy, as a model may write into its input.
        inputs = torch.cat([x, x] if guided else [x]).to(self.dtype, memory_format=torch.channels_last)
        timesteps = torch.full((len(inputs),), timestep, device=self.device)
        output = self.model(inputs, timesteps, *self.arguments)
        noise, v = split_output(output, x.shape[1])
        if output.shape[0] != len(inputs) or output.shape[2:] != x.shape[2:]:
            raise ValueError(
                f"output of the model must be of {len(inputs)} images of {x.shape[2]} x {x.shape[3]}, as its input; "
                f"got shape {tuple(output.shape)}"
            )
        noise, v = noise.float(), None if v is None else v.float()
        if guided:
            with_class, without = noise.chunk(2)
            noise, v = without.lerp(with_class, self.guidance), None if v is None else v[: len(x)]
        return noise, v


class _Sampler:
    """The way from x_t to x_{t-1}, with the tables of a process as numbers."""

    def __init__(self, diffusion: GaussianDiffusion, *, variance: str, eta: float, clip: bool):
        self.tables = {name: table.tolist() for name, table in diffusion.tables.items()}
        self.clip = clip

    def predicted_x_0(self, step: int, x: Tensor, predicted: Tensor) -> Tensor:
        """The images that are left of x_t without the noise that is predicted; a new tensor."""
        x_0 = x * self.tables["sqrt_recip_alphas_cumprod"][step]
        x_0.sub_(predicted, alpha=self.tables["sqrt_recipm1_alphas_cumprod"][step])
        return x_0.clamp_(-1, 1) if self.clip else x_0

    def __call__(self, step: int, x: Tensor, predicted: Tensor, v: Tensor | None, noise: _Noise) -> Tensor:
        """x_{t-1}; x may be changed."""
        raise NotImplementedError


class _DDPM(_Sampler):
    """Ancestral sampling: x_{t-1} is drawn from a normal distribution around the posterior's mean (Ho, eq. 7)."""

    def __init__(self, diffusion: GaussianDiffusion, *, variance: str, eta: float, clip: bool):
        super().__init__(diffusion, variance=variance, eta=eta, clip=clip)
        self.low, self.high = self.tables["posterior_log_variance"], self.tables["log_betas"]
        self.fixed = self.low if variance == "fixed_small" else self.high

    def __call__(self, step: int, x: Tensor, predicted: Tensor, v: Tensor | None, noise: _Noise) -> Tensor:
        x_0 = self.predicted_x_0(step, x, predicted)
        x = x.mul_(self.tables["posterior_mean_coef2"][step])
        x.add_(x_0, alpha=self.tables["posterior_mean_coef1"][step])
        if step == 0:
            return x
        if v is None:
            return x.add_(noise.draw(), alpha=math.exp(0.5 * self.fixed[step]))
        # The deviation is exp(0.5 log variance), and the log goes linearly from low to high as v from -1 to 1.
        low, high = self.low[step], self.high[step]
        deviation = (v * (0.25 * (high - low))).add_(0.25 * (high + low)).exp_()
        return x.addcmul_(deviation, noise.draw())


class _DDIM(_Sampler):
    """x_{t-1} has the predicted image and noise; with ``eta`` a part of the noise is new (Song, eq. 12 and 16)."""

    def __init__(self, diffusion: GaussianDiffusion, *, variance: str, eta: float, clip: bool):
        super().__init__(diffusion, variance=variance, eta=eta, clip=clip)
        kept = diffusion.schedule.alphas_cumprod
        before = torch.cat([kept.new_ones(1), kept[:-1]])
        deviation = eta * ((1 - before) / (1 - kept)).sqrt() * (1 - kept / before).sqrt()
        self.of_x_0 = before.sqrt().tolist()
        self.of_noise = (1 - before - deviation.square()).clamp(min=0).sqrt().tolist()
        self.deviation = deviation.tolist()

    def __call__(self, step: int, x: Tensor, predicted: Tensor, v: Tensor | None, noise: _Noise) -> Tensor:
        x_0 = self.predicted_x_0(step, x, predicted)
        if self.clip:  # the noise that leaves the clipped image
            predicted = x.mul_(self.tables["sqrt_recip_alphas_cumprod"][step]).sub_(x_0)
            predicted.div_(self.tables["sqrt_recipm1_alphas_cumprod"][step])
        x = x_0.mul_(self.of_x_0[step]).add_(predicted, alpha=self.of_noise[step])
        return x.add_(noise.draw(), alpha=self.deviation[step]) if self.deviation[step] else x


SAMPLERS: dict[str, type[_Sampler]] = {"ddpm": _DDPM, "ddim": _DDIM}


def _integer(value: Any) -> int | None:
    """An int of Python or NumPy or of a tensor as Python's; None of anything else, truth values included."""
    if isinstance(value, bool) or (isinstance(value, Tensor) and (value.dim() or value.dtype == torch.bool)):
        return None
    try:
        return operator.index(value)
    except TypeError:
        return None


def _seeds(seeds: Any) -> list[int]:
    try:
        given = list(seeds)
    except TypeError as error:
        raise TypeError(f"seeds must be a sequence of integers, one for each image; got {seeds!r}") from error
    if not given:
        raise ValueError("seeds must be one for each image; got none")
    checked = []
    for seed in given:
        if (number := _integer(seed)) is None:
            raise TypeError(f"seeds must be integers; got {seed!r}")
        if not 0 <= number < 2**63:
            raise ValueError(f"seeds must be in [0, 2**63); got {number}")
        checked.append(number)
    return checked


def _shape(model: nn.Module, shape: tuple[int, int, int] | None) -> tuple[int, int, int]:
    config = attached_config(model)
    if shape is None:
        if not hasattr(config, "in_channels") or not hasattr(config, "sample_size"):
            raise ValueError(
                "shape must be given for a model whose config has no in_channels and sample_size; got None"
            )
        return config.in_channels, config.sample_size, config.sample_size
    sides = [_integer(each) or 0 for each in shape] if isinstance(shape, Sequence) else []
    if len(sides) != 3 or min(sides) < 1:
        raise ValueError(f"shape must be three positive integers, channels, height and width; got {shape!r}")
    channels, height, width = sides
    if channels != (taken := getattr(config, "in_channels", channels)):
        raise ValueError(f"shape must have {taken} channels, as the model takes; got {shape!r}")
    return channels, height, width


def _device(model: nn.Module) -> torch.device:
    """Where a model is; a frozen one has no parameters but tells."""
    tensors = (*model.parameters(), *model.buffers())
    return tensors[0].device if tensors else getattr(model, "device", torch.device("cpu"))


def _classes(model: nn.Module, labels: Any, images: int, guidance: float) -> Tensor | None:
    """The classes that the model is given at each step, those of "no class" for guidance included."""
    number = getattr(attached_config(model), "num_classes", None)
    # Where a model drops no labels in training, it has no "no class".
    has_null = bool(number) and getattr(attached_config(model), "label_dropout", 1) > 0
    if guidance != 1 and (labels is None or not has_null):
        why = "without labels" if labels is None else "with a model that was not trained without classes"
        raise ValueError(f"guidance must be 1 {why}; got {guidance}")
    if labels is None:
        if number:
            raise ValueError(f"labels must be given for a model of {number} classes; got None")
        return None
    if number == 0:
        raise ValueError("labels must be None for a model without classes; got some")
    try:
        classes = torch.as_tensor(labels).cpu()
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise TypeError(f"labels must be integers; got {labels!r}") from error
    if classes.shape != (images,):
        raise ValueError(f"labels must be one for each of {images} seeds; got shape {tuple(classes.shape)}")
    if classes.is_floating_point() or classes.is_complex() or classes.dtype == torch.bool:
        raise TypeError(f"labels must be integers; got {classes.dtype}")
    highest = math.inf if number is None else number if has_null else number - 1
    if bad := [label for label in classes.tolist() if not 0 <= label <= highest]:
        raise ValueError(f"labels must be from 0 to {highest}; got {bad[0]}")
    classes = classes.long()
    return classes if guidance == 1 or number is None else torch.cat([classes, torch.full_like(classes, number)])


def _check_choice(name: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}; got {value!r}")


def _check_number(name: str, value: object, least: float, most: float) -> None:
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise TypeError(f"{name} must be a number; got {value!r}")
    if not least <= value <= most or math.isinf(value):
        allowed = "finite" if math.isinf(most) else f"in [{least}, {most}]"
        raise ValueError(f"{name} must be {allowed}; got {value}")
