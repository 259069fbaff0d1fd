"""Generators as the schedulers and pipelines of diffusers call their own, which is not imported."""

import dataclasses

import torch
from torch import Tensor, nn

from ..models.contract import attached_config


@dataclasses.dataclass(frozen=True)
class DiffusersConfig:
    """What diffusers reads of a model."""

    sample_size: int
    in_channels: int
    out_channels: int


@dataclasses.dataclass(frozen=True)
class DiffusersOutput:
    """What a model returns."""

    sample: Tensor


class ForDiffusers(nn.Module):
    """A generator in the form of diffusers' ``DiTTransformer2DModel``.

    In a loop of diffusers' schedulers the output goes to ``scheduler.step`` as it is: where it has a learned variance,
    the scheduler needs ``variance_type="learned_range"`` (DDPM), or gets the first half of the channels alone (others).

    In its ``DiTPipeline`` this stands for ``transformer``. That pipeline takes class 1000 for "no label", whatever the
    model's is, and drops the learned variance; so with guidance it is for models of 1000 classes only, and the images
    are those of a scheduler with a fixed variance. :func:`ipt_fast.diffusion.sample` has neither limit.

    Args:
        model: a generator, also frozen: its ``config`` has ``sample_size``, ``in_channels`` and ``out_channels``.

    Raises:
        TypeError: it is no module, or none that generates.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        config = attached_config(model)
        fields = [field.name for field in dataclasses.fields(DiffusersConfig)]
        if not isinstance(model, nn.Module) or not all(hasattr(config, name) for name in fields):
            raise TypeError(f"model must be a module that generates, such as dit_s_2; got {type(model).__name__}")
        self.model = model
        self.config = DiffusersConfig(*(getattr(config, name) for name in fields))

    @property
    def dtype(self) -> torch.dtype:
        """Of the latents that it takes."""
        found = getattr(self.model, "dtype", None)  # of a frozen model, which has no parameters
        return found or next(p.dtype for p in self.model.parameters() if p.is_floating_point())

    @property
    def device(self) -> torch.device:
        return getattr(self.model, "device", None) or next(self.model.parameters()).device

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor | float,
        class_labels: Tensor | None = None,
        return_dict: bool = True,
    ) -> DiffusersOutput | tuple[Tensor]:
        """The model's output as ``.sample``, or as a tuple of one; one timestep may stand for all images."""
        timestep = torch.as_tensor(timestep, device=hidden_states.device)
        sample = self.model(hidden_states, timestep.expand(hidden_states.shape[0]), class_labels)
        return DiffusersOutput(sample) if return_dict else (sample,)
