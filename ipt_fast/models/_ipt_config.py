"""The shape of an IPT, given or read from a file of weights with the published names."""

import dataclasses
import math
import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..modules import _check
from ._pretrained import build_config

# In the order of the published six-task file. Any other name may be a task too: "sr_x<n>" magnifies, others do not.
TASKS = ("sr_x2", "sr_x3", "sr_x4", "derain", "denoise30", "denoise50")
MEAN = (0.4488, 0.4371, 0.4040)  # of DIV2K, RGB
SCALES = (1, 2, 3, 4)


def scale_of(task: str) -> int:
    """How many times larger the output of a task is: n for "sr_x<n>", else 1."""
    match = re.fullmatch(r"sr_x(\d+)", task)
    return int(match[1]) if match else 1


@dataclasses.dataclass(frozen=True)
class IPTConfig:
    """Shape of an IPT; the defaults are the published denoising model.

    Args:
        tasks: names, each with a head, a tail and an embedding of its own; ``sr_x2``, ``sr_x3`` and ``sr_x4`` magnify.
        image_size: S, the side of the square input in pixels; ``patch_size`` divides it.
        patch_size: P, the side of the patches that become tokens; there are N = (S / P)^2.
        features: C, channels of the heads' maps; tokens have D = C P^2 channels.
        layers: of the encoder, and as many of the decoder.
        heads: of each attention; divides D. It cannot be seen in a file of weights.
        ratio: hidden channels of the feed-forward networks over D.
        value_range: the value of white; the published models take 0..255.
        no_norm: the layers have no norms.
        no_pos: tokens have no learned positions.
        pos_every: positions are added to queries and keys in every layer instead of once.
        no_mlp: neither embedding nor output layers around the body, and so no task embedding.
        task_embedding: False leaves the task embedding out (an ablation of the paper).
    """

    tasks: tuple[str, ...] = ("denoise50",)
    image_size: int = 48
    patch_size: int = 3
    features: int = 64
    layers: int = 12
    heads: int = 12
    ratio: int = 4
    value_range: float = 255.0
    no_norm: bool = False
    no_pos: bool = False
    pos_every: bool = False
    no_mlp: bool = False
    task_embedding: bool = True

    def __post_init__(self) -> None:
        if isinstance(self.tasks, list):  # as JSON has it
            object.__setattr__(self, "tasks", tuple(self.tasks))
        if not isinstance(self.tasks, tuple) or not self.tasks or not all(isinstance(t, str) and t for t in self.tasks):
            raise ValueError(f"tasks must be one or more names; got {self.tasks!r}")
        if len(set(self.tasks)) < len(self.tasks):
            raise ValueError(f"tasks must differ; got {', '.join(self.tasks)}")
        for task in self.tasks:
            if scale_of(task) not in SCALES:
                raise ValueError(f"tasks must magnify {', '.join(map(str, SCALES[1:]))} times, or not; got {task!r}")
        names = ("image_size", "patch_size", "features", "layers", "heads", "ratio")
        _check.positive_ints(**{name: getattr(self, name) for name in names})
        flags = ("no_norm", "no_pos", "pos_every", "no_mlp", "task_embedding")
        _check.flags(**{name: getattr(self, name) for name in flags})
        if self.image_size % self.patch_size:
            raise ValueError(f"patch_size must divide image_size {self.image_size}; got {self.patch_size}")
        if self.dim % self.heads:
            raise ValueError(f"heads must divide the {self.dim} channels of a token; got {self.heads}")
        if isinstance(self.value_range, bool) or not isinstance(self.value_range, int | float) or self.value_range <= 0:
            raise ValueError(f"value_range must be a positive number; got {self.value_range!r}")

    @property
    def dim(self) -> int:
        """D, channels of a token."""
        return self.features * self.patch_size**2

    @property
    def tokens(self) -> int:
        """N, tokens of an input."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def in_channels(self) -> int:
        """3: the model is for colour."""
        return 3


def config_of(
    state: dict[str, Tensor], source: object, *, heads: int, tasks: str | Sequence[str] | None = None, **options: Any
) -> IPTConfig:
    """The :class:`IPTConfig` of weights with the published names; arguments as :meth:`IPT.from_checkpoint`'s."""
    needed = ["head.0.0.weight", "tail.0.1.weight", *(f"body.encoder.layers.0.{n}.weight" for n in ("linear1",))]
    if missing := [name for name in needed if name not in state]:
        raise ValueError(f"path must hold an IPT; got {source}, which lacks {', '.join(missing)}")
    ranks = {r"(head|tail)\.\d+\.[\d.]*weight": 4, r"body\.encoder\.layers\.0\.linear1\.weight": 2}
    ranks |= {r"body\.(query_embed|position_encoding\.pe)\.weight": 2}
    for name, value in state.items():
        if any(
            re.fullmatch(pattern, name) and (value.dim() != rank or 0 in value.shape) for pattern, rank in ranks.items()
        ):
            raise ValueError(f"path must hold an IPT; got {source}, whose {name} has shape {tuple(value.shape)}")
    features = state["head.0.0.weight"].shape[0]
    hidden, dim = state["body.encoder.layers.0.linear1.weight"].shape
    patch_size = math.isqrt(dim // features)
    positions = state.get("body.position_encoding.pe.weight")
    queries = state.get("body.query_embed.weight")
    if positions is None and queries is None and "image_size" not in options:
        raise ValueError(
            f"image_size must be given where no positions or task embeddings tell it; got weights of {source}"
        )
    tokens = len(positions) if positions is not None else queries.shape[1] // dim if queries is not None else None
    fields = {
        "tasks": _tasks_of(state, source, tasks),
        "image_size": None if tokens is None else math.isqrt(tokens) * patch_size,
        "patch_size": patch_size,
        "features": features,
        "layers": sum(bool(re.fullmatch(r"body\.encoder\.layers\.\d+\.linear1\.weight", name)) for name in state),
        "ratio": hidden // dim,
        "value_range": _value_range_of(state, options.get("value_range")),
        "no_norm": "body.encoder.layers.0.norm1.weight" not in state,
        "no_pos": positions is None,
        "no_mlp": "body.linear_encoding.weight" not in state,
        "task_embedding": queries is not None or "body.linear_encoding.weight" not in state,
    }
    told = {name: value for name, value in fields.items() if value is not None}
    for name, value in options.items():
        if told.get(name, value) != value:
            raise ValueError(f"{name} must be {told[name]} as in {source}; got {value!r}")
    return build_config(IPTConfig, {**told, "heads": heads, **options})


def _value_range_of(state: dict[str, Tensor], given: object) -> float | None:
    """What the frozen mean colour says, within the rounding of its dtype; None where it is another data set's."""
    added = state.get("add_mean.bias")
    if added is None or added.shape != (3,) or not added.is_floating_point():
        return None
    ratios = added.double() / torch.tensor(MEAN, dtype=torch.float64)
    found = ratios.mean().item()
    rounding = max(1e-4, torch.finfo(added.dtype).eps)
    if not (found > 0 and (ratios - found).abs().max() <= rounding * found):
        return None
    for value in (given, 255.0, 1.0):
        if isinstance(value, int | float) and abs(value - found) <= rounding * found:
            return value
    return round(found, 3)


def _tasks_of(state: dict[str, Tensor], source: object, tasks: str | Sequence[str] | None) -> tuple[str, ...]:
    scales: list[int] = []
    while f"tail.{len(scales)}.1.weight" in state:
        convolutions = (state.get(f"tail.{len(scales)}.0.{i}.weight") for i in (0, 2))
        scales.append(math.prod(math.isqrt(w.shape[0] // w.shape[1]) for w in convolutions if w is not None))
    if tasks is None and scales == [scale_of(task) for task in TASKS]:
        return TASKS
    if tasks is None and len(scales) == 1 and scales[0] > 1:
        return (f"sr_x{scales[0]}",)
    text = ", ".join(f"x{scale}" for scale in scales)
    if tasks is None:
        raise ValueError(
            f"tasks must be given where tails magnify as several tasks do; got {source}, whose tails magnify {text}"
        )
    tasks = (tasks,) if isinstance(tasks, str) else tuple(tasks)
    if [scale_of(task) for task in tasks] != scales:
        raise ValueError(f"tasks must fit {source}, whose tails magnify {text}; got {', '.join(tasks)}")
    return tasks
