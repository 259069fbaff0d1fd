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
_FREE_ON_RESUME |= {"target", "val_target"}
# How a step is carried out: of the weights only the rounding changes.
_FREE_ON_RESUME |= {"accumulate", "activation_checkpointing", "strategy", "tensorboard"}
_PATHS = ("data", "out", "target", "val", "val_target")
GENERATE = "generate"  # the task of generators
# Fields of which that has no use.
RESTORATION_FIELDS = (
    *("target", "shrink", "enlarge", "data_weights", "sigma", "patch_size"),
    *("contrastive", "loss", "val_target", "val_sigma"),
)
SCHEDULES = ("cosine", "step", "constant")


@dataclass(frozen=True)
class TrainingConfig:
    """Settings of one training run.

    ``iterations``, ``patch_size`` and ``batch_size`` are integers, or tuples of one length with one value for each
    stage of progressive training (Restormer, CVPR 2022, section 3.3).

    Args:
        data: folder of clean training images or WebDataset shards, or several of them; where ``target`` is given, the
            degraded images of pairs. Of a generator one folder: of images, with a subfolder for each class, or of
            latents, as ``ipt-fast encode`` writes them.
        target: folder of the clean images of pairs, one for each folder of ``data``, or for each two where the model
            takes two views (left, right). None among several targets marks a folder of clean images.
        shrink: how many times smaller the clean images of ``data`` are made first; one value, or one for each source.
        enlarge: half of the patches of clean images are enlarged by a factor drawn from 1 to this, as photos straight
            from a camera are softer than those that were shrunk.
        data_weights: how often each source is drawn from, in proportion; None: by the number of its images.
        out: folder for ``checkpoint.pth``, ``log.csv`` and the EMA model (``config.json``, ``model.safetensors``).
        model: name of a model, which is trained from scratch, or folder of a saved model to start from.
        model_config: fields of the model's config, with a name only.
        task: what the degraded images are, a name of :data:`ipt_fast.data.degradations.DEGRADATIONS` such as "derain",
            or {name: weight} for a mixture from which each sample draws; None is "denoise". "generate" is that of a
            generator, which has no other. Of a model with several tasks a name tells whose head, tail and embedding are
            kept, a mixture how often a batch is drawn for each, and None is all of them.
        contrastive: λ of the contrastive loss (IPT, eq. 6).
        sigma: lowest and highest noise level on the 0..255 scale, drawn uniformly for each patch.
        patch_size: None takes the model's size of input, 128 where it has none.
        lr, lr_min, warmup: learning rate after ``warmup`` linear iterations, then down to ``lr_min`` by ``schedule``.
        schedule: "cosine"; "step": from ``lr`` to ``lr_min`` after two thirds of the iterations, as IPT was trained; or
            "constant", always ``lr``.
        betas: of AdamW.
        grad_clip: largest norm of all gradients together; 0 turns clipping off.
        ema: decay of the exponential moving average of the weights, which is what is saved as the model.
        amp: "bf16" runs the forward pass under autocast.
        val, val_target, val_sigma: clean images whose PSNR is measured at each checkpoint, and their noise level where
            a task has none; or the inputs (two folders for two views) and the targets of pairs. Of a generator a folder
            as ``data`` is, of which the loss is measured.
        log_every, save_every: iterations between rows of the log, and between checkpoints.
        workers: processes that prepare batches; 0 prepares them in this one.
        threads: CPU threads of this process; None leaves PyTorch's choice.
        device: "cpu", "cuda" …; None takes a GPU where there is one.
        accumulate: micro-batches into which each process divides its share of a batch, one after the other.
        activation_checkpointing: keep only the inputs of transformer layers for the backward pass.
        strategy: of several processes, "ddp" (each has all weights) or "fsdp" (each keeps a part of them, FSDP2).
        tensorboard: write the log into the folder ``tensorboard``, too.
        flip: a generator learns from half of the images mirrored, left and right.

    Raises:
        TypeError, ValueError: a field has the wrong type or value; the message names it.
    """

    data: Path | tuple[Path, ...]
    out: Path
    model: str = "ipt_v2_tiny"
    model_config: dict[str, Any] = field(default_factory=dict)
    task: str | dict[str, float] | None = None
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
    val: Path | tuple[Path, ...] | None = None
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
    target: Path | tuple[Path | None, ...] | None = None
    shrink: int | tuple[int, ...] = 1
    data_weights: tuple[float, ...] | None = None
    enlarge: float = 1.0
    val_target: Path | None = None
    betas: tuple[float, float] = (0.9, 0.999)
    flip: bool = True

    def __post_init__(self) -> None:
        def put(name: str, value: Any) -> None:
            object.__setattr__(self, name, value)

        for name in _PATHS:
            put(name, _as_path(name, getattr(self, name)))
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
        if self.seed >= 2**63:
            raise ValueError(f"seed must be less than 2**63; got {self.seed}")
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
        _check_choice("schedule", self.schedule, SCHEDULES)
        if not isinstance(self.betas, list | tuple) or len(self.betas) != 2:
            raise ValueError(f"betas must be a pair; got {self.betas!r}")
        for beta in self.betas:
            _check_number("betas", beta, 0, 1)
        put("betas", tuple(self.betas))
        put("shrink", per_stage(self.shrink))
        if not isinstance(self.data_weights, list | tuple | None):
            raise TypeError(f"data_weights must be one value for each source; got {self.data_weights!r}")
        put("data_weights", None if self.data_weights is None else tuple(self.data_weights))
        self._check_data()
        self._check_execution()
        if not isinstance(self.model_config, dict):
            raise TypeError(f"model_config must be a dict; got {type(self.model_config).__name__}")

    def _check_data(self) -> None:
        if not isinstance(self.task, str | dict | None):
            raise TypeError(f"task must be a name or {{name: weight}}; got {self.task!r}")
        if isinstance(self.task, dict):
            if names := [name for name in self.task if not isinstance(name, str)]:
                raise TypeError(f"task must be a name or {{name: weight}}; got {names[0]!r} as a name")
            _check_weights("task", tuple(self.task.values()))
        if self.data_weights is not None:
            _check_weights("data_weights", self.data_weights)
        for times in per_stage(self.shrink):
            _check_integer("shrink", times, 1)
        _check_number("enlarge", self.enlarge, 1, 16)
        count = len(self.sources)
        if len(per_stage(self.shrink)) not in (1, count):
            raise ValueError(f"shrink must have one value for each of {count} sources; got {self.shrink}")
        if self.data_weights is not None and len(self.data_weights) != count:
            raise ValueError(f"data_weights must have one value for each of {count} sources; got {self.data_weights}")
        if isinstance(self.val, tuple) and self.val_target is None:
            raise ValueError(
                f"val must be one folder where there is no val_target; got {', '.join(map(str, self.val))}"
            )
        if isinstance(self.val_target, tuple) or (self.val_target is not None and self.val is None):
            raise ValueError(f"val_target must be the folder of targets of val; got {self.val_target}")

    def _check_execution(self) -> None:
        _check_integer("accumulate", self.accumulate, 1)
        _check_choice("strategy", self.strategy, ("ddp", "fsdp"))
        for name in ("activation_checkpointing", "tensorboard", "flip"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} must be True or False; got {getattr(self, name)!r}")
        if self.contrastive and self.accumulate > 1:
            raise ValueError(
                "accumulate must be 1 with the contrastive loss, which compares all images of a batch; "
                f"got {self.accumulate}"
            )

    @property
    def total_iterations(self) -> int:
        return sum(self.stages)

    @property
    def stages(self) -> tuple[int, ...]:
        """The iterations of each stage."""
        return per_stage(self.iterations)

    @property
    def sources(self) -> list[tuple[tuple[Path, ...], Path | None, int]]:
        """(folders, target or None, shrink) of each source of training images.

        Raises:
            ValueError: there are not as many folders as the targets ask for.
        """
        folders = [*self.data] if isinstance(self.data, tuple) else [self.data]
        targets: list[Path | None] = [None] * len(folders)
        if self.target is not None:
            targets = [*self.target] if isinstance(self.target, tuple) else [self.target]
        clean = targets.count(None)
        views, rest = divmod(len(folders) - clean, max(1, len(targets) - clean))
        if rest or views not in ((0,) if clean == len(targets) else (1, 2)):
            raise ValueError(
                f"target must be one folder for each of data, or for each two of them; got {len(targets)} "
                f"for {len(folders)}"
            )
        places = iter(folders)
        parts = [tuple(next(places) for _ in range(views if target else 1)) for target in targets]
        shrinking = per_stage(self.shrink)
        return [
            (part, target, shrinking[min(number, len(shrinking) - 1)])
            for number, (part, target) in enumerate(zip(parts, targets, strict=True))
        ]

    def is_default(self, name: str) -> bool:
        """Whether a field has the value that it has where it is not given."""
        default: Any = next(entry.default for entry in fields(self) if entry.name == name)
        return getattr(self, name) in (default, per_stage(default))

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as stored in a checkpoint: paths are absolute, as a run may be resumed from anywhere."""
        values = asdict(self)
        for name, value in values.items():
            if isinstance(value, Path) or (name == "model" and value not in list_models()):
                values[name] = str(Path(value).absolute())
            elif name in _PATHS and isinstance(value, tuple):
                values[name] = tuple(None if each is None else str(each.absolute()) for each in value)
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


def _as_path(name: str, value: Any) -> Any:
    """A path, or several as a tuple; one alone is no tuple. None stays."""
    if isinstance(value, list | tuple):
        if not value:
            raise ValueError(f"{name} must be a folder or several; got none")
        paths = tuple(_as_path(name, each) for each in value)
        return paths[0] if len(paths) == 1 else paths
    if value is None and name in ("data", "out"):
        raise TypeError(f"{name} must be a path; got None")
    return None if value is None else Path(value)


def _check_weights(name: str, values: tuple[Any, ...]) -> None:
    for value in values:
        _check_number(name, value, 0, float("inf"))
    if not sum(values) > 0:
        raise ValueError(f"{name} must have weights of which one is positive; got {values}")


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
