"""What the models that generate images have in common: fields of their configs, conditions, checks and contract."""

import dataclasses
import math
from typing import ClassVar

import torch
from torch import Tensor, nn

from ..modules import _check
from ..modules.transformer import in_dtype_of
from ._pretrained import PretrainedModel
from .contract import Contract

TIMESTEPS = 1000  # of the full schedule
FREQUENCIES = 256  # of a timestep: 128 cosines and as many sines (Peebles & Xie, DiT, section 3.2)


@dataclasses.dataclass(frozen=True)
class GeneratorConfig:
    """Fields that the config of every generator has.

    Args:
        in_channels: of the latents, or of the images where there is no autoencoder.
        learn_variance: the output has twice as many channels: the noise, then the variance within its range.
        sample_size: height and width of the latents that it learns to generate.
        num_classes: classes 0 to num_classes - 1; 0 for a model that takes no labels.
        label_dropout: probability with which training replaces a label by "no label", for guidance without a
            classifier. Where it is above 0, class ``num_classes`` is "no label".
    """

    in_channels: int = 4
    learn_variance: bool = True
    sample_size: int = 32
    num_classes: int = 1000
    label_dropout: float = 0.1

    def __post_init__(self) -> None:
        _check.positive_ints(in_channels=self.in_channels, sample_size=self.sample_size)
        _check.flags(learn_variance=self.learn_variance)
        if type(self.num_classes) is not int or self.num_classes < 0:
            raise ValueError(f"num_classes must be an int of at least 0; got {self.num_classes!r}")
        dropout = self.label_dropout
        if isinstance(dropout, bool) or not isinstance(dropout, int | float) or not 0 <= dropout < 1:
            raise ValueError(f"label_dropout must be a number of at least 0 and below 1; got {dropout!r}")

    @property
    def out_channels(self) -> int:
        return 2 * self.in_channels if self.learn_variance else self.in_channels

    @property
    def null_class(self) -> int | None:
        """The number that stands for "no label"; None of a model that knows none."""
        return self.num_classes if self.num_classes and self.label_dropout else None

    @property
    def labels(self) -> int:
        """How many numbers ``class_labels`` may hold, from 0."""
        return self.num_classes + (self.null_class is not None)


class Generator(PretrainedModel):
    """A model that predicts the noise in latents, under a timestep and a class.

    Its forward takes ``latents`` (B, in_channels, H, W), ``timestep`` (B,) and ``class_labels`` (B,), by position or
    by name, and returns (B, out_channels, H, W).
    """

    config_class: ClassVar[type[GeneratorConfig]]

    def __init__(self, config: GeneratorConfig) -> None:
        super().__init__()
        if not isinstance(config, self.config_class):
            raise TypeError(f"config must be a {self.config_class.__name__}; got {type(config).__name__}")
        self._config = config

    @property
    def config(self) -> GeneratorConfig:
        return self._config

    @property
    def contract(self) -> Contract:
        config = self._config
        return Contract(
            in_channels=config.in_channels,
            out_channels=config.out_channels,
            image_size=config.sample_size,
            reparameterize=self.reparameterize,
            objective="diffusion",
            generates=True,
        )

    def _checked_conditions(self, latents: Tensor, timestep: Tensor, class_labels: Tensor | None) -> Tensor | None:
        """Check timestep and labels; the labels, in training with some dropped.

        Values are checked on the CPU only, as reading them would make an accelerator wait.

        Raises:
            TypeError, ValueError: wrong type, shape, device or, on the CPU, value.
        """
        config, batch = self._config, latents.shape[0]
        _check.numbers("timestep", timestep, TIMESTEPS, latents, "latents", floats=True)
        if config.num_classes == 0:
            if class_labels is not None:
                raise ValueError("class_labels must be None for a model without classes; got some")
            return None
        if class_labels is None:
            null = "" if config.null_class is None else f" ({config.null_class} is no label)"
            raise ValueError(
                f"class_labels must be given, one of 0 to {config.labels - 1} for each image{null}; got None"
            )
        _check.numbers("class_labels", class_labels, config.labels, latents, "latents")
        if not self.training or config.null_class is None:
            return class_labels
        dropped = torch.rand(batch, device=latents.device) < config.label_dropout
        return torch.where(dropped, config.null_class, class_labels)


def timestep_features(timestep: Tensor) -> Tensor:
    """Cosines and sines (B, 256) of timesteps (B,), in float32: of frequencies from 1 down to nearly 1 / 10000."""
    half = FREQUENCIES // 2
    frequencies = torch.exp(torch.arange(half, device=timestep.device) * (-math.log(10000) / half))
    angles = timestep.float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=1)


class TimestepEmbedding(nn.Module):
    """Linear, SiLU, linear: (B, 256) features of timesteps -> (B, width)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        linears = nn.Linear(FREQUENCIES, width), nn.Linear(width, width)
        for linear in linears:
            nn.init.normal_(linear.weight, std=0.02)
            nn.init.zeros_(linear.bias)
        self.mlp = nn.Sequential(linears[0], nn.SiLU(), linears[1])

    def forward(self, features: Tensor) -> Tensor:
        return self.mlp(in_dtype_of(self, features))


class LabelEmbedding(nn.Module):
    """A learned vector for each label: (B,) -> (B, width)."""

    def __init__(self, labels: int, width: int) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(labels, width)
        nn.init.normal_(self.embedding_table.weight, std=0.02)

    def forward(self, labels: Tensor) -> Tensor:
        return self.embedding_table(labels)


def zeroed(module: nn.Linear | nn.Conv2d) -> nn.Module:
    """``module`` with weights and biases of zero."""
    nn.init.zeros_(module.weight)
    assert module.bias is not None
    nn.init.zeros_(module.bias)
    return module
