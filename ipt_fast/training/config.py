"""What a training run is: one frozen, validated dataclass."""

import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Self

from ..models import list_models
from .losses import LOSSES

# Fields that do not change the sequence of weights, so a resumed run may set them anew.
# The data may lie elsewhere; where they are others, the run warns.
_FREE_ON_RESUME = {"data", "out", "val", "val_sigma", "log_every", "save_every", "workers", "threads", "device"}
# How a step is carried out: of the weights only the rounding changes.
_FREE_ON_RESUME |= {"accumulate", "activation_checkpointing", "strategy", "tensorboard"}


@dataclass(frozen=True)
class TrainingConfig:
    """Settings of one training run: blind Gaussian denoising, or all tasks of a model that has tasks.

    ``iterations``, ``patch_size`` and ``batch_size`` are integers, or tuples of one length with one value for each
    stage of progressive training (Restormer, CVPR 2022, section 3.3).

    Args:
        data: folder of clean training images.
        out: folder for ``checkpoint.pth``, ``log.csv`` and the EMA model (``config.json``, ``model.safetensors``).
        model: name of a model, which is trained from scratch, or folder of a saved model to start from.
        model_config: fields of the model's config, with a name only.
        task: of a model with several tasks, the one whose head, tail and embedding are kept.
        contrastive: λ of the contrastive loss (IPT, eq. 6).
        sigma: lowest and highest noise level on the 0..255 scale, drawn uniformly for each patch.
        patch_size: None takes the model's size of input, 128 where it has none.
        lr, lr_min, warmup: learning rate after ``warmup`` linear iterations, then down to ``lr_min`` by ``schedule``.
        schedule: "cosine", or "step": from ``lr`` to ``lr_min`` after two thirds of the iterations, as IPT was trained.
        grad_clip: largest norm of all gradients together; 0 turns clipping off.
        ema: decay of the exponential moving average of the weights, which is what is saved as the model.
        amp: "bf16" runs the forward pass under autocast.
        val, val_sigma: folder of images whose PSNR is measured at each checkpoint, and its noise level.
        log_every, save_every: iterations between rows of the log, and between checkpoints.
        workers: processes that prepare batches; 0 prepares them in this one.
        threads: CPU threads of this process; None leaves PyTorch's choice.
        device: "cpu", "cuda" …; None takes a GPU where there is one.
        accumulate: micro-batches into which each process divides its share of a batch, one after the other.
        activation_checkpointing: keep only the inputs of transformer layers for the backward pass.
        strategy: of several processes, "ddp" (each has all weights) or "fsdp" (each keeps a part of them, FSDP2).
        tensorboard: write the log into the folder ``tensorboard``, too.

    Raises:
        TypeError, ValueError: a field has the wrong type or value; the message names it.
    """

    data: Path
    out: Path
    model: str = "ipt_v2_tiny"
    model_config: dict[str, Any] = field(default_factory=dict)
    task: str | None = None
    contrastive: float = 0.0
    sigma: tuple[float, float] = (5.0, 50.0)
    iterations: int | tuple[int, ...] = 100_000
    patch_size: int | tuple[int, ...] | None = None
    batch_size: int | tuple[int, ...] = 8
    lr: float = 3e-4
    lr_min: float = 1e-6
    warmup: int = 500
    schedule: str = "cosine"
    weight_decay: float = 1e-4
    grad_clip: float = 1.0
    loss: str = "charbonnier"
    ema: float = 0.999
    seed: int = 0
    amp: str = "none"
    val: Path | None = None
    val_sigma: float = 25.0
    log_every: int = 100
    save_every: int = 1000
    workers: int = 0
    threads: int | None = None
    device: str | None = None
    # How a step is carried out.
    accumulate: int = 1
    activation_checkpointing: bool = False
    strategy: str = "ddp"
    tensorboard: bool = False

    def __post_init__(self) -> None:
        def put(name: str, value: Any) -> None:
            object.__setattr__(self, name, value)

        put("data", Path(self.data))
        put("out", Path(self.out))
        put("val", None if self.val is None else Path(self.val))
        stage_fields = [n for n in ("iterations", "patch_size", "batch_size") if getattr(self, n) is not None]
        for name in stage_fields:
            value = getattr(self, name)
            put(name, per_stage(value))
            for entry in getattr(self, name):
                _check_integer(name, entry, 1)
        stages = {len(getattr(self, name)) for name in stage_fields}
        if len(stages) != 1 or 0 in stages:
            raise ValueError(
                "iterations, patch_size and batch_size must have one value for each stage; "
                f"got {self.iterations}, {self.patch_size} and {self.batch_size}"
            )
        for name, least in (("warmup", 0), ("seed", 0), ("log_every", 1), ("save_every", 1), ("workers", 0)):
            _check_integer(name, getattr(self, name), least)
        if self.threads is not None:
            _check_integer("threads", self.threads, 1)
        for name in ("lr_min", "weight_decay", "grad_clip", "contrastive"):
            _check_number(name, getattr(self, name), 0, float("inf"))
        _check_number("lr", self.lr, self.lr_min, float("inf"))
        _check_number("ema", self.ema, 0, 1)
        if not isinstance(self.sigma, list | tuple) or len(self.sigma) != 2:
            raise ValueError(f"sigma must be a pair (lowest, highest); got {self.sigma!r}")
        for name, value in (("sigma", self.sigma[0]), ("sigma", self.sigma[1]), ("val_sigma", self.val_sigma)):
            _check_number(name, value, 0, float("inf"))
            if value > 255:
                raise ValueError(f"{name} must be at most 255, the range of the values; got {value}")
        put("sigma", tuple(float(value) for value in self.sigma))
        if self.sigma[0] > self.sigma[1]:
            raise ValueError(f"sigma must be a pair (lowest, highest); got {self.sigma}")
        _check_choice("loss", self.loss, tuple(LOSSES))
        _check_choice("amp", self.amp, ("none", "bf16"))
        _check_choice("schedule", self.schedule, ("cosine", "step"))
        if self.task is not None and not isinstance(self.task, str):
            raise TypeError(f"task must be a name; got {self.task!r}")
        self._check_execution()
        if not isinstance(self.model_config, dict):
            raise TypeError(f"model_config must be a dict; got {type(self.model_config).__name__}")

    def _check_execution(self) -> None:
        _check_integer("accumulate", self.accumulate, 1)
        _check_choice("strategy", self.strategy, ("ddp", "fsdp"))
        for name in ("activation_checkpointing", "tensorboard"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} must be True or False; got {getattr(self, name)!r}")
        if self.contrastive and self.accumulate > 1:
            raise ValueError(
                "accumulate must be 1 with the contrastive loss, which compares all images of a batch; "
                f"got {self.accumulate}"
            )

    @property
    def total_iterations(self) -> int:
        return sum(per_stage(self.iterations))

    def is_default(self, name: str) -> bool:
        """Whether a field has the value that it has where it is not given."""
        return getattr(self, name) == next(entry.default for entry in fields(self) if entry.name == name)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as stored in a checkpoint: paths are absolute, as a run may be resumed from anywhere."""
        values = asdict(self)
        for name, value in values.items():
            if isinstance(value, Path) or (name == "model" and value not in list_models()):
                values[name] = str(Path(value).absolute())
        return values

    @classmethod
    def resumed(cls, saved: dict[str, Any], **given: Any) -> Self:
        """The settings of the run that ``saved`` describes, and those that are given again or, where free, anew.

        Raises:
            ValueError: one that is given contradicts the run.
        """
        known = {entry.name for entry in fields(cls)}
        config = cls(**{**{name: value for name, value in saved.items() if name in known}, **given})
        config.check_resumable(saved)
        return config

    def check_resumable(self, saved: dict[str, Any]) -> None:
        """Raise ValueError naming the first field in which this run contradicts the one that ``saved`` describes."""
        current = self.to_dict()
        for name in (entry.name for entry in fields(self) if entry.name not in _FREE_ON_RESUME):
            if name not in saved:
                raise ValueError(f"checkpoint must be of this version to be resumed; got one without {name}")
            if not _same(name, current[name], saved[name]):
                raise ValueError(f"{name} must be {saved[name]!r}, as in the run to resume; got {current[name]!r}")


def _same(name: str, current: Any, saved: Any) -> bool:
    if name == "model" and saved not in list_models() and current not in list_models():
        return Path(current).resolve() == Path(saved).resolve()  # older checkpoints have relative paths
    return json.dumps(current, default=repr) == json.dumps(saved, default=repr)  # to which tuples are lists


def per_stage(value: int | list[int] | tuple[int, ...]) -> tuple[int, ...]:
    """A setting as one value for each stage."""
    return tuple(value) if isinstance(value, list | tuple) else (value,)


def _check_integer(name: str, value: Any, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} must be an integer; got {value!r}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}; got {value}")


def _check_number(name: str, value: Any, least: float, bound: float) -> None:
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise TypeError(f"{name} must be a number; got {value!r}")
    if not least <= value < bound:
        raise ValueError(f"{name} must be in [{least}, {bound}); got {value}")


def _check_choice(name: str, value: Any, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}; got {value!r}")
