"""IPT (Chen et al., Pre-Trained Image Processing Transformer, CVPR 2021)."""

import dataclasses
import numbers
import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..modules import _check, _fusion
from ..modules.convolution import Conv2d, PixelShuffle, pixel_shuffle, pixel_unshuffle
from ..modules.transformer import DecoderLayer, EncoderLayer, in_dtype_of, without_autocast
from ._ipt_config import MEAN, IPTConfig, config_of, scale_of
from ._ipt_config import TASKS as TASKS
from ._pretrained import Preset, PretrainedModel
from ._registry import register
from .checkpoint import load_state, read_state_dict
from .contract import Contract

PART_TOKENS = 4096  # that a CPU infers at once: with more, memory that is new to the process costs a third of the time


@_fusion.stock
class MeanShift(Conv2d):
    """A frozen 1 x 1 convolution that subtracts (sign -1) or adds the mean colour."""

    def __init__(self, value_range: float, sign: int) -> None:
        super().__init__(3, 3, 1)
        with torch.no_grad():
            self.weight.copy_(torch.eye(3).view(3, 3, 1, 1))
            assert self.bias is not None
            self.bias.copy_(sign * value_range * torch.tensor(MEAN))
        self.requires_grad_(False)


class ResBlock(nn.Module):
    """x + conv(relu(conv(x))) with 5 x 5 convolutions."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        first, second = (Conv2d(channels, channels, 5, padding=2) for _ in range(2))
        self.body = nn.Sequential(first, nn.ReLU(inplace=True), second)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


def _upsampler(channels: int, scale: int) -> nn.Sequential:
    """A convolution and a pixel shuffle for each prime factor of the scale."""
    stages = []
    while scale > 1:
        factor = 2 if scale % 2 == 0 else scale
        stages += [Conv2d(channels, factor**2 * channels, 3, padding=1), PixelShuffle(factor)]
        scale //= factor
    return nn.Sequential(*stages)


class Tail(nn.Sequential):
    """Upsampling and the convolution to colours, which autocast leaves in the weights' precision."""

    def __init__(self, features: int, scale: int) -> None:
        super().__init__(_upsampler(features, scale), Conv2d(features, 3, 3, padding=1))

    def forward(self, maps: Tensor) -> Tensor:
        upsample, *to_colours = self
        maps = upsample(maps)
        with without_autocast(maps):
            maps = in_dtype_of(self, maps)
            for module in to_colours:
                maps = module(maps)
            return maps


class Positions(nn.Module):
    """The learned positions (N, D); ``position_ids`` is in the published files and counts them."""

    def __init__(self, tokens: int, dim: int) -> None:
        super().__init__()
        self.pe = nn.Embedding(tokens, dim)
        self.register_buffer("position_ids", torch.arange(tokens).view(1, -1))

    def forward(self) -> Tensor:
        return self.pe(self.position_ids)[0]


class Encoder(nn.Module):
    """The encoder's layers, one after the other."""

    def __init__(self, layers: int, shape: tuple[int, int, int, bool]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(EncoderLayer(*shape) for _ in range(layers))

    def forward(self, x: Tensor, positions: Tensor | None = None) -> Tensor:
        for layer in self.layers:
            x = layer(x, positions)
        return x


class Decoder(nn.Module):
    """The decoder's layers, one after the other."""

    def __init__(self, layers: int, shape: tuple[int, int, int, bool]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(DecoderLayer(*shape) for _ in range(layers))

    def forward(self, x: Tensor, memory: Tensor, task: Tensor | None = None, positions: Tensor | None = None) -> Tensor:
        for layer in self.layers:
            x = layer(x, memory, task, positions)
        return x


class Body(nn.Module):
    """The transformer: (B, C, S, S) -> patch features (B, N, D)."""

    def __init__(self, config: IPTConfig) -> None:
        super().__init__()
        self.config = config
        dim, hidden = config.dim, config.ratio * config.dim
        self.query_embed: nn.Embedding | None = None
        if not config.no_mlp:
            self.linear_encoding = nn.Linear(dim, dim)
            # Where the published model has dropouts of 0 there is nothing.
            nothing = nn.Identity()
            self.mlp_head = nn.Sequential(nn.Linear(dim, hidden), nothing, nn.ReLU(), nn.Linear(hidden, dim))
            if config.task_embedding:
                self.query_embed = nn.Embedding(len(config.tasks), config.tokens * dim)
        if not config.no_pos:
            self.position_encoding = Positions(config.tokens, dim)
        shape = dim, config.heads, config.ratio, not config.no_norm
        self.encoder, self.decoder = Encoder(config.layers, shape), Decoder(config.layers, shape)
        if config.no_norm:
            for module in self.modules():
                if isinstance(module, nn.Linear):
                    nn.init.normal_(module.weight, std=1 / module.in_features)

    def forward(self, x: Tensor, index: int) -> Tensor:
        config = self.config
        x = pixel_unshuffle(x, config.patch_size).flatten(2).transpose(1, 2)  # channels first within a token
        if not config.no_mlp:
            x = self.linear_encoding(x) + x
        task = None
        if self.query_embed is not None:
            number = torch.full((), index, dtype=torch.long, device=x.device)
            task = self.query_embed(number).view(config.tokens, -1)
        positions = None if config.no_pos else self.position_encoding()
        if positions is not None and not config.pos_every:
            x, positions = x + positions, None
        # The sums of the layers are not autocast's to round.
        memory = self.encoder(in_dtype_of(self.encoder, x), positions)
        x = self.decoder(memory, memory, task, positions)
        return x if config.no_mlp else self.mlp_head(x) + x


@register
class IPT(PretrainedModel):
    """The image processing transformer: a head and a tail for each task around one encoder-decoder (section 3.1).

    Shape: (B, 3, S, S) -> (B, 3, s S, s S) with S of the config and s of the task, values nominally in
    [0, value_range]. Larger images are cut into tiles by :func:`ipt_fast.restore`. On a CPU and without gradients a
    large batch goes through the submodules in parts.

    Args:
        config: an :class:`IPTConfig`.
    """

    config_class = IPTConfig
    shape_is_in_weights = True
    presets = {
        "ipt": Preset({}),
        "ipt_tiny": Preset(
            dict(tasks=("sr_x2", "derain", "denoise30", "denoise50"), features=16, layers=2, heads=6, ratio=4),
            ships=True,
            trained_for="colour photos: sr_x2 doubles what was shrunk bicubically, derain removes synthetic streaks, "
            "denoise30 and denoise50 Gaussian noise of σ 30 and 50 (of 255), drawn for each channel by "
            "itself; noise that is equal in all channels, as in gray photos, stays for the most part",
        ),
    }

    def __init__(self, config: IPTConfig) -> None:
        super().__init__()
        if not isinstance(config, IPTConfig):
            raise TypeError(f"config must be an IPTConfig; got {type(config).__name__}")
        self.config = config
        features = config.features
        self.sub_mean, self.add_mean = MeanShift(config.value_range, -1), MeanShift(config.value_range, 1)
        self.head = nn.ModuleList(
            nn.Sequential(Conv2d(3, features, 3, padding=1), ResBlock(features), ResBlock(features))
            for _ in config.tasks
        )
        self.body = Body(config)
        self.tail = nn.ModuleList(Tail(features, scale_of(task)) for task in config.tasks)

    @property
    def contract(self) -> Contract:
        """Square colour images of one size, and several tasks, of which some magnify."""
        config = self.config
        return Contract(
            in_channels=config.in_channels,
            out_channels=config.in_channels,
            image_size=config.image_size,
            value_range=config.value_range,
            tasks=config.tasks,
            takes_task=True,
            scale=self.scale,
            objective="pretraining",
        )

    def task_index(self, task: str | int | None = None) -> int:
        """The number of a task given by its name or number; None stands for the only one.

        Raises:
            ValueError: there is no such task, or there are several and none is given.
        """
        tasks = self.config.tasks
        if task is None and len(tasks) == 1:
            return 0
        if task in tasks:
            return tasks.index(task)
        if isinstance(task, numbers.Integral) and not isinstance(task, bool) and 0 <= task < len(tasks):
            return int(task)
        numbered = "" if isinstance(task, str) else f" or a number below {len(tasks)}"
        got = "none" if task is None else repr(task)
        raise ValueError(f"task must be one of {', '.join(tasks)}{numbered}; got {got}")

    def scale(self, task: str | int | None = None) -> int:
        """How many times larger the output of a task is."""
        return scale_of(self.config.tasks[self.task_index(task)])

    def only(self, task: str | int) -> "IPT":
        """A new model with the head, the tail and the embedding of one task, for fine-tuning (section 3.2).

        Raises:
            ValueError: there is no such task.
        """
        index = self.task_index(task)
        model = type(self)(dataclasses.replace(self.config, tasks=(self.config.tasks[index],)))
        state = {}
        for name, value in self.state_dict().items():
            kept: str | None = name
            part, _, rest = name.partition(".")
            if part in ("head", "tail"):
                number, _, rest = rest.partition(".")
                kept = f"{part}.0.{rest}" if int(number) == index else None
            elif name == "body.query_embed.weight":
                value = value[index : index + 1]
            if kept:
                state[kept] = value
        model.load_state_dict(state)
        return model.to_reference() if self.plain else model

    def forward(self, x: Tensor, task: str | int | None = None) -> Tensor:
        index = self.task_index(task)
        self._check_image(x)
        if self.plain or x.device.type != "cpu" or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return self._run(x, index)[0]
        size = max(1, PART_TOKENS // self.config.tokens)
        outputs = [self._run(part, index)[0] for part in x.split(size)]
        return torch.cat(outputs) if len(outputs) > 1 else outputs[0]

    def forward_with_features(self, x: Tensor, task: str | int | None = None) -> tuple[Tensor, Tensor]:
        """The output and the decoder's patch features (B, N, D), which the contrastive loss compares."""
        index = self.task_index(task)
        self._check_image(x)
        return self._run(x, index)

    def position_embedding(self) -> Tensor | None:
        return None if self.config.no_pos else self.body.position_encoding.pe.weight

    def task_embeddings(self) -> dict[str, Tensor]:
        if self.body.query_embed is None:
            return {}
        rows = self.body.query_embed.weight
        return {task: row.view(self.config.tokens, -1) for task, row in zip(self.config.tasks, rows, strict=True)}

    def _check_image(self, x: Tensor) -> None:
        _check.image(x, 3, self.sub_mean)
        size = self.config.image_size
        if tuple(x.shape[2:]) != (size, size):
            raise ValueError(
                f"x must be (B, 3, {size}, {size}), ipt_fast.restore takes images of any size; got {tuple(x.shape)}"
            )

    def _run(self, x: Tensor, index: int) -> tuple[Tensor, Tensor]:
        # Autocast would round values of up to 255 to 8 bits of mantissa, on their way in and out.
        with without_autocast(x):
            centred = self.sub_mean(in_dtype_of(self.sub_mean, x))
        maps = self.head[index](centred)
        features = self.body(maps, index)
        colours = self.tail[index](self._to_map(features) + maps)
        with without_autocast(x):
            return self.add_mean(colours), features

    def _to_map(self, x: Tensor) -> Tensor:
        """(B, N, D) -> (B, C, S, S)."""
        side = self.config.image_size // self.config.patch_size
        return pixel_shuffle(x.transpose(1, 2).unflatten(2, (side, side)), self.config.patch_size)

    @classmethod
    def open_weights(
        cls, path: str | os.PathLike[str], preset: str, *, average: bool | None = None, **fields: Any
    ) -> "IPT":
        state = read_state_dict(path, average=average)
        if "heads" not in fields:
            found, named = config_of(state, path, **{**fields, "heads": 1}), IPTConfig(**cls.presets[preset].config)
            shapes = [(config.features, config.patch_size, config.layers) for config in (found, named)]
            if shapes[0] != shapes[1]:
                raise ValueError(
                    f"heads must be given for a shape other than that of {preset}, which would tell them; got {path}"
                )
            fields = {**fields, "heads": named.heads}
        return cls._with_weights(state, path, fields)

    @classmethod
    def _with_weights(cls, state: dict[str, Tensor], path: str | os.PathLike, fields: dict[str, Any]) -> "IPT":
        model = cls(config_of(state, path, **fields))
        load_state(model, state, path)
        return model.eval()

    @classmethod
    def from_checkpoint(
        cls,
        path: str | os.PathLike,
        *,
        heads: int,
        tasks: Sequence[str] | None = None,
        average: bool | None = None,
        **options: Any,
    ) -> "IPT":
        """Open a file of weights with the published names, in eval mode.

        Its shape is read from the tensors. What they do not tell has to be given.

        Args:
            path: a PyTorch or safetensors file, see :func:`ipt_fast.load_checkpoint`.
            heads: of each attention; 12 in the published models.
            tasks: names of the file's heads, in order. Needed unless they follow from the scales of the tails: the six
                of the published pre-trained model, or a single one that magnifies.
            average: which weights of a file that holds an average, too, see :func:`ipt_fast.models.read_state_dict`.
            options: ``pos_every`` where it differs from the published models', ``image_size`` of a model with neither
                positions nor task embeddings.

        Raises:
            ValueError: the file is no IPT, or an argument does not fit it.
        """
        state = read_state_dict(path, average=average)
        return cls._with_weights(state, path, {"heads": heads, "tasks": tasks, **options})
