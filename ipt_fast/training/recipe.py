"""Recipes: YAML files with BasicSR's names, read into the fields of :class:`TrainingConfig`.

What a key means is data: :data:`KEYS`. Other keys are errors.
"""

import difflib
import os
import re
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import yaml

from ..data.degradations import find_task
from ..models import list_models, saved_folder, shipped_models
from .config import GENERATE, RESTORATION_FIELDS, TrainingConfig, per_stage

SHIPPED = Path(__file__).parent / "recipes"
MARK = "# Settings of a run; ipt-fast train --config FILE --out FOLDER repeats it."
RESTORMERS_CLIP = 0.01  # the norm that use_grad_clip stands for


def _same(key: str, value: Any) -> Any:
    return value


def _out(key: str, value: Any) -> Path:
    if not isinstance(value, str):
        raise ValueError(f"{key} must be a text; got {value!r}")
    return Path("experiments", value)


def _noise_levels(key: str, value: Any) -> Any:
    return (value, value) if isinstance(value, int | float) else value


def _warmup(key: str, value: Any) -> Any:
    return 0 if value == -1 else value  # which is BasicSR's for none


def _clip(key: str, value: Any) -> Any:
    return {True: RESTORMERS_CLIP, False: 0.0}[value] if isinstance(value, bool) else value


def _model(key: str, value: Any) -> Any:
    if value not in list_models():
        raise ValueError(f"{key} must be one of {', '.join(list_models())}; got {value!r}")
    return value


_SCHEDULES = {"CosineAnnealingLR": "cosine", "cosine": "cosine", "step": "step", "constant": "constant"}
# {key: (field of TrainingConfig, how its value is read, or the values by their names)}.
KEYS: dict[str, tuple[str, Callable[[str, Any], Any] | dict[str, str]]] = {
    "name": ("out", _out),
    "manual_seed": ("seed", _same),
    "threads": ("threads", _same),
    "device": ("device", _same),
    "datasets.train.task": ("task", _same),
    "datasets.train.sigma_range": ("sigma", _noise_levels),
    "datasets.train.shrink": ("shrink", _same),
    "datasets.train.weights": ("data_weights", _same),
    "datasets.train.enlarge": ("enlarge", _same),
    "datasets.train.use_hflip": ("flip", _same),
    "datasets.train.iters": ("iterations", _same),
    "datasets.train.batch_sizes": ("batch_size", _same),
    "datasets.train.num_worker_per_gpu": ("workers", _same),
    "datasets.val.sigma_test": ("val_sigma", _same),
    "network_g.type": ("model", _model),
    "train.warmup_iter": ("warmup", _warmup),
    "train.use_grad_clip": ("grad_clip", _clip),
    "train.ema_decay": ("ema", _same),
    "train.contrastive": ("contrastive", _same),
    "train.amp": ("amp", _same),
    "train.accumulate": ("accumulate", _same),
    "train.activation_checkpointing": ("activation_checkpointing", _same),
    "train.optim_g.type": ("", {"AdamW": "adamw"}),
    "train.optim_g.lr": ("lr", _same),
    "train.optim_g.weight_decay": ("weight_decay", _same),
    "train.optim_g.betas": ("betas", _same),
    "train.scheduler.type": ("schedule", _SCHEDULES),
    "train.scheduler.eta_min": ("lr_min", _same),
    "train.pixel_opt.type": ("loss", {"L1Loss": "l1", "CharbonnierLoss": "charbonnier"}),
    "logger.print_freq": ("log_every", _same),
    "logger.save_checkpoint_freq": ("save_every", _same),
    "logger.use_tb_logger": ("tensorboard", _same),
    "dist.strategy": ("strategy", _same),
}
_ROOTS = ("dataroot_gt", "dataroot_lq", "dataroot_lqL", "dataroot_lqR")
# {key: the field that it makes together with others}
_SEVERAL = {
    **{f"datasets.train.{root}": "data" for root in _ROOTS},
    **{f"datasets.val.{root}": "val" for root in _ROOTS},
    "scale": "patch_size",
    "datasets.train.gt_sizes": "patch_size",
    "train.total_iter": "iterations",
    "path.pretrain_network_g": "model",
}
# {fields of folders: those of the file that go with them}: where one is given beside the file, none of these is taken.
_GROUPS = {
    ("data", "target"): {"data", "target", "shrink", "data_weights"},
    ("val", "val_target"): {"val", "val_target", "val_sigma"},
}
_PATHS = ("data", "target", "val", "val_target", "out")


_MERGE = "tag:yaml.org,2002:merge"  # "<<: *anchor" puts in what another mapping has


class _Loader(yaml.SafeLoader):
    """YAML as people write it: 3e-4 is a number, and a key that comes twice an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value if key.tag != _MERGE]
        if twice := sorted({str(key) for key in keys if keys.count(key) > 1}):
            raise ValueError(f"keys must be there once; got {', '.join(twice)} twice")
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+"), list("-+.0123456789")
)


def shipped_recipes() -> dict[str, Path]:
    """The recipes that ship, by name."""
    return {path.stem: path for path in sorted(SHIPPED.glob("*.yml"))}


def read_recipe(source: str | Path, given: Collection[str] = ()) -> dict[str, Any]:
    """The fields of a :class:`TrainingConfig` that a recipe sets.

    Args:
        source: a YAML file, or the name of a recipe that ships.
        given: fields that are set elsewhere; the recipe's are left out, with those that belong to them.

    Raises:
        ValueError: there is no such file, it is no YAML, a key is not known or a value is not allowed, or a path has a
            variable of the environment that is not set. The message names the file and the key.
    """
    recipes = shipped_recipes()
    path = recipes.get(str(source), Path(source))
    if not path.is_file():
        raise ValueError(f"config must be a YAML file or one of {', '.join(recipes)}; got {source}")
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), _Loader)
        fields = _fields(_flat(content))
        dropped = {*given}.union(*(group for folders, group in _GROUPS.items() if not {*given}.isdisjoint(folders)))
        fields = {name: value for name, value in fields.items() if name not in dropped}
        return {name: _expanded(name, value) if name in _PATHS else value for name, value in fields.items()}
    except (yaml.YAMLError, ValueError, OSError) as error:
        raise ValueError(f"config must be a recipe; got {path}, in which {' '.join(str(error).split())}") from error


def _flat(content: Any, prefix: str = "") -> dict[str, Any]:
    """{"a.b": value}; a mapping that is a value, as the task's may be, stays one."""
    if not isinstance(content, Mapping):
        raise ValueError(f"{prefix.rstrip('.') or 'the file'} must be a mapping; got {content!r}")
    known = [*KEYS, *_SEVERAL]
    flat: dict[str, Any] = {}
    for name, value in content.items():
        key = f"{prefix}{name}"
        if key in known or prefix == "network_g.":
            flat[key] = value
        elif key == "network_g" or any(each.startswith(f"{key}.") for each in known):
            flat |= _flat({} if value is None else value, f"{key}.")
        else:
            sections = {each.rpartition(".")[0] for each in known} - {""}
            nearest = difflib.get_close_matches(key, [*known, *sorted(sections)], 1, cutoff=0)[0]
            raise ValueError(f"{key} is no known key; the nearest one is {nearest}")
    return flat


def _fields(keys: dict[str, Any]) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for key, (field, read) in KEYS.items():
        if keys.get(key) is None:
            continue
        if isinstance(read, dict) and keys[key] not in [*read]:
            raise ValueError(f"{key} must be one of {', '.join(read)}; got {keys[key]!r}")
        fields[field] = read[keys[key]] if isinstance(read, dict) else read(key, keys[key])
    fields.pop("", None)  # of a key that has one value only
    shape = [name for name in keys if name.startswith("network_g.") and name not in KEYS]
    fields["model_config"] = {name.removeprefix("network_g."): keys[name] for name in shape}
    fields |= _folders(keys, "datasets.train.", "data", "target") | _folders(keys, "datasets.val.", "val", "val_target")
    sizes, scale = keys.get("datasets.train.gt_sizes"), 1 if keys.get("scale") is None else keys["scale"]
    if sizes is not None:
        sizes = sizes if isinstance(sizes, list) else [sizes]
        if type(scale) is not int or scale < 1:
            raise ValueError(f"scale must be an integer of at least 1; got {scale!r}")
        if any(type(size) is not int or size % scale for size in sizes):
            raise ValueError(f"datasets.train.gt_sizes must be multiples of scale = {scale}; got {sizes}")
        fields["patch_size"] = tuple(size // scale for size in sizes)
    total = keys.get("train.total_iter")
    stages = fields.setdefault("iterations", total)
    # Values that are no integers are refused with those of all other fields.
    listed = stages if isinstance(stages, list) and all(isinstance(each, int) for each in stages) else None
    if total is not None and total != (stages if listed is None else sum(listed)):
        raise ValueError(f"train.total_iter must be the sum of datasets.train.iters, {stages}; got {total}")
    start = keys.get("path.pretrain_network_g")
    if start is not None:
        if "model" in fields or fields["model_config"]:
            raise ValueError("network_g must be left out where path.pretrain_network_g tells the model; got both")
        if not isinstance(start, str):
            raise ValueError(f"path.pretrain_network_g must be a folder or a model that ships; got {start!r}")
        shipped = start in shipped_models()
        fields["model"] = str(saved_folder(start) if shipped else _expanded("path.pretrain_network_g", start))
    return {name: value for name, value in fields.items() if value not in (None, {})}


def _folders(keys: dict[str, Any], prefix: str, data: str, target: str) -> dict[str, Any]:
    """BasicSR's ground truth and low quality as inputs and targets; clean images have no low quality."""
    clean, degraded, left, right = (_listed(keys.get(f"{prefix}{root}")) for root in _ROOTS)
    if bool(left) != bool(right) or (left and degraded):
        raise ValueError(f"{prefix}dataroot_lqL must come with dataroot_lqR and without dataroot_lq; got others")
    if len(left) != len(right):
        raise ValueError(f"{prefix}dataroot_lqR must be one for each dataroot_lqL; got {len(right)} for {len(left)}")
    views = [list(each) for each in zip(left, right, strict=True)] if left else [[each] for each in degraded]
    inputs = [[each for each in places if each is not None] for places in views]
    if not any(inputs):
        return {data: clean or None}
    if len(inputs) != len(clean):
        raise ValueError(f"{prefix}dataroot_gt must be one folder for each input; got {len(clean)} for {len(inputs)}")
    both = list(zip(inputs, clean, strict=True))
    return {
        data: [each for places, truth in both for each in places or [truth]],
        target: [truth if places else None for places, truth in both],
    }


def _listed(value: Any) -> list[Any]:
    return [] if value is None else list(value) if isinstance(value, list) else [value]


def _expanded(key: str, value: Any) -> Any:
    """Paths with the environment's variables in their places."""
    if isinstance(value, list):
        return [_expanded(key, each) for each in value]
    if value is None:
        return None
    path = os.path.expandvars(os.path.expanduser(str(value)))
    if unset := re.search(r"\$\{?\w+\}?", path):
        raise ValueError(f"{key} must be a path whose variables are set; got {value}, and {unset[0]} is not")
    return Path(path)


def recipe_of(config: TrainingConfig) -> str:
    """The text of a recipe that repeats a run, but for its folder."""
    keys: dict[str, Any] = {}
    of_others = RESTORATION_FIELDS if config.task == GENERATE else ()
    for key, (field, read) in KEYS.items():
        value = getattr(config, field) if field not in ("", "out", "model", *of_others) else None
        names = [name for name, each in read.items() if each == value] if isinstance(read, dict) else [value]
        keys[key] = _plain(names[0]) if names else None
    if config.model in list_models():
        keys["network_g.type"] = config.model
        keys |= {f"network_g.{name}": _plain(value) for name, value in config.model_config.items()}
    else:
        keys["path.pretrain_network_g"] = str(Path(config.model).absolute())
    if config.patch_size is not None:
        scale = find_task(config.task).scale if isinstance(config.task, str) else 1
        keys |= {"scale": scale, "datasets.train.gt_sizes": [scale * size for size in per_stage(config.patch_size)]}
    keys |= _roots("datasets.train.", [(places, target) for places, target, _ in config.sources])
    if config.val is not None:
        val = config.val if isinstance(config.val, tuple) else (config.val,)
        keys |= _roots("datasets.val.", [(val, config.val_target)])
    nested: dict[str, Any] = {}
    for key, value in keys.items():
        if value is not None:
            *sections, name = key.split(".")
            place = nested
            for section in sections:
                place = place.setdefault(section, {})
            place[name] = value
    return f"{MARK}\n{yaml.safe_dump(nested, sort_keys=False)}"


def is_recipe_of_run(path: Path) -> bool:
    """Whether a file is one that a run wrote, by :func:`recipe_of`."""
    return path.read_text(errors="replace").startswith(MARK)


def _roots(prefix: str, sources: list[tuple[tuple[Path, ...], Path | None]]) -> dict[str, Any]:
    """The inverse of :func:`_folders`."""
    clean = [str((target or places[0]).absolute()) for places, target in sources]
    roots: dict[str, Any] = {f"{prefix}dataroot_gt": clean}
    pairs = [places for places, target in sources if target is not None]
    for number, root in enumerate(_ROOTS[1:2] if pairs and len(pairs[0]) == 1 else _ROOTS[2:] if pairs else ()):
        roots[prefix + root] = [
            None if target is None else str(places[number].absolute()) for places, target in sources
        ]
    return roots


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
