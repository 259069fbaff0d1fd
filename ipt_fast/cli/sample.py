"""``ipt-fast sample``: draw images from a diffusion model."""

import argparse
import contextlib
import dataclasses
import functools
import itertools
import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch
from torch import Tensor
from tqdm import tqdm

from .. import freeze, use_backend
from .._device import usable_device
from .._files import make_folder
from .._precision import DTYPES, usable_dtype
from ..data.npz import comment_of, write_npz
from ..diffusion import sample
from ..diffusion.sampling import SAMPLERS
from ..diffusion.vae import VAE, open_vae
from ..evaluation.figures import image_grid
from ..models import open_model
from ..models.contract import describe
from ..ops._select import POLICIES, policy
from ._arguments import Subparsers
from ._journal import NAME, Journal, digest_of_model
from ._outputs import Outputs, check_writable, model_files
from ._pictures import is_picture_of, save_picture
from ._results import Results

COUNT = 8  # images, where nothing says how many
LARGEST_GRID = 1024  # images
_COMMENT = "ipt-fast sample"  # of .npz files, so that they can be written again in their place
# The options that make an image what it is, beside the model, the autoencoder, its class and its seed.
_DECISIVE = ("guidance", "sampler", "steps", "eta", "size", "dtype")


def add_parser(subparsers: Subparsers) -> None:
    parser = subparsers.add_parser(
        "sample",
        help="draw images from a diffusion model",
        description="Draw images. With --seeds each class is drawn with each seed; else --count images are drawn of "
        "the classes in turn, with the seeds 0, 1, 2 ... An image is made of its class and its seed, whatever else is "
        "drawn. What an earlier run drew into the same folder, with the same model and options, is kept, so that a run "
        "that was stopped goes on.",
    )
    option = parser.add_argument
    option("--model", required=True, help="a folder of a saved model, or the name of one that ships")
    option("--vae", type=Path, metavar="FOLDER",
           help="autoencoder of diffusers (AutoencoderKL) for models of latents; others make pixels")  # fmt: skip
    option("--out", type=Path, metavar="FOLDER", help="write a PNG for each image: CLASS_SEED.png")
    option("--grid", type=Path, metavar="FILE", help="write one PNG of all images in rows")
    option("--npz", type=Path, metavar="FILE", help="write the file that ADM's evaluator and ipt-fast fid take")
    option("--classes", type=int, nargs="+", metavar="C", help="numbers of the classes (all)")
    option("--seeds", type=int, nargs="+", metavar="S", help="draw each class with each of these")
    option("--count", type=int, metavar="N", help=f"images, where there are no --seeds (one of each class, or {COUNT})")
    option("--guidance", type=float, default=1.0, metavar="S",
           help="scale of classifier-free guidance, such as 1.5 or 4; 1 is none (%(default)s)")  # fmt: skip
    option("--sampler", choices=[*SAMPLERS], default="ddpm", help="(%(default)s)")
    option("--steps", type=int, default=250, metavar="N", help="of the 1000 that a model learns (%(default)s)")
    option("--eta", type=float, default=0.0, help="noise of ddim, from 0 to 1, that of ddpm (%(default)s)")
    option("--size", type=int, metavar="PIXELS", help="side of the images (that which the model was trained for)")
    option("--batch-size", type=int, metavar="N",
           help="images at once (1 on the CPU, where more gain little; 16 elsewhere)")  # fmt: skip
    option("--dtype", choices=("auto", *DTYPES), default="auto", help="precision of the model (%(default)s)")
    option("--device", help="cpu, cuda ... (a GPU where there is one)")
    option("--backend", choices=POLICIES, help="kernels to use (IPT_FAST_BACKEND, or auto)")
    option("--overwrite", action="store_true", help="draw again what is in --out already, and replace it")
    parser.set_defaults(run=run)


@dataclasses.dataclass(frozen=True)
class Image:
    """An image to draw: its class, None of a model without classes, and its seed."""

    label: int | None
    seed: int

    def __str__(self) -> str:
        return f"seed {self.seed}" if self.label is None else f"class {self.label}, seed {self.seed}"

    @property
    def name(self) -> str:
        return f"{self.seed:06d}.png" if self.label is None else f"{self.label:04d}_{self.seed:06d}.png"


def run(args: argparse.Namespace) -> int:
    """Draw as the parsed arguments say; 0.

    Raises:
        ValueError: bad arguments, a model that does not generate, or an output that is something else already.
        RuntimeError: the demanded backend cannot run the model.
    """
    if not (args.out or args.grid or args.npz):
        raise ValueError("--out, --grid or --npz must say where the images go; got none")
    args.backend = args.backend or policy()
    with use_backend(args.backend):
        return _run(args)


def _run(args: argparse.Namespace) -> int:
    model = open_model(args.model)
    if not describe(model).generates:
        raise ValueError(f"--model must generate images; got {args.model}, which restores them (ipt-fast restore)")
    images, columns = plan(args, model.config)
    if args.grid and len(images) > LARGEST_GRID:
        raise ValueError(f"--grid must be of at most {LARGEST_GRID} images; got {len(images)}")
    _check_outputs(args, images)
    device = usable_device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    vae = _open_vae(args, model.config.in_channels)
    args.batch_size = args.batch_size or (1 if device.type == "cpu" else 16)
    shape = _shape(args, model.config, vae)
    folder = _Folder(args, digest_of_model(model), None if vae is None else vae.digest())
    found = {image for image in images if folder.has(image)}
    if found:
        print(f"kept {len(found)} of {len(images)}, which an earlier run drew")
    drawn = _draw(images, _Sampler(model, vae, shape, args, device), folder, found, args)
    if args.grid:
        save_picture(image_grid(drawn, columns), args.grid, "sample")
    print(f"drew {len(images) - len(found)} images: {', '.join(str(x) for x in (args.out, args.grid, args.npz) if x)}")
    return 0


def _draw(
    images: list[Image], sampler: "_Sampler", folder: "_Folder", found: set[Image], args: argparse.Namespace
) -> list[np.ndarray]:
    """Draw what is not found, a batch at a time, and write all but the grid; the pixels for that."""
    drawn: list[np.ndarray] = []
    batches = [images[start : start + args.batch_size] for start in range(0, len(images), args.batch_size)]
    # The progress of a step counts too, so that a single image has an ETA.
    layout = "{desc}{percentage:3.0f}%|{bar}| {elapsed}<{remaining}"
    with contextlib.ExitStack() as stack:
        add = stack.enter_context(_npz(args, images)) if args.npz else None
        bar = stack.enter_context(tqdm(total=len(batches), bar_format=layout, leave=False, disable=None))
        for number, batch in enumerate(batches):
            bar.set_description(f"{min((number + 1) * args.batch_size, len(images))}/{len(images)} images")
            if found.issuperset(batch):
                pixels = [folder.read(image) for image in batch] if args.grid or args.npz else []
            else:
                pixels = sampler(batch, functools.partial(_advance, bar, number))
                for image, values in zip(batch, pixels, strict=True):
                    if args.out and image not in found:
                        folder.write(image, values)
            if add:
                for values in pixels:
                    add(np.broadcast_to(values, (*values.shape[:2], 3)))  # gray as three equal channels
            drawn += pixels if args.grid else []
            _advance(bar, number, 1)
    return drawn


def plan(args: argparse.Namespace, config: Any) -> tuple[list[Image], int]:
    """The images to draw, in order, and how many of them a row of the grid has.

    Raises:
        ValueError: classes, seeds or a count that do not go together, or that the model does not have.
    """
    classes: list[int | None] = [None] if config.num_classes == 0 else list(range(config.num_classes))
    if args.classes is not None:
        if config.num_classes == 0:
            raise ValueError("--classes must be left out for a model without classes; got some")
        if wrong := [label for label in args.classes if not 0 <= label < config.labels]:
            none = "" if config.null_class is None else f" ({config.null_class} is no class)"
            raise ValueError(f"--classes must be from 0 to {config.labels - 1}{none}; got {wrong[0]}")
        classes = _different("--classes", args.classes)
    if args.count is not None and (args.seeds or args.count < 1):
        raise ValueError(f"--count must be at least 1, and without --seeds; got {args.count}")
    if args.seeds is None:
        count = args.count or (len(classes) if args.classes else COUNT)
        turns = itertools.cycle(classes)
        return [Image(next(turns), seed) for seed in range(count)], math.ceil(math.sqrt(count))
    if wrong := [seed for seed in args.seeds if not 0 <= seed < 2**63]:
        raise ValueError(f"--seeds must be in [0, 2**63); got {wrong[0]}")
    seeds = _different("--seeds", args.seeds)
    return [Image(label, seed) for label in classes for seed in seeds], len(seeds)


def _different(name: str, numbers: list[int]) -> list[Any]:
    if repeated := [number for number, times in Counter(numbers).items() if times > 1]:
        raise ValueError(f"{name} must be different numbers; got {repeated[0]} twice")
    return numbers


def _check_outputs(args: argparse.Namespace, images: list[Image]) -> None:
    if args.batch_size is not None and args.batch_size < 1:
        raise ValueError(f"--batch-size must be at least 1; got {args.batch_size}")
    vae_files = [path for path in args.vae.rglob("*") if path.is_file()] if args.vae and args.vae.is_dir() else []
    outputs = Outputs([*model_files(args.model), *vae_files])
    kinds: dict[str, tuple[str, Callable[[Path], bool]]] = {
        "--grid": (".png", lambda path: is_picture_of(path, "sample")),
        "--npz": (".npz", lambda path: comment_of(path) == _COMMENT or path.stat().st_size == 0),
    }
    for name, (suffix, is_ours) in kinds.items():
        if (path := getattr(args, name[2:])) is None:
            continue
        if path.suffix.lower() != suffix:
            raise ValueError(f"{name} must be a {suffix} file; got {path}")
        outputs.claim(name, path, is_ours)
        check_writable(name, path)
    if args.out:
        make_folder("--out", args.out)
        for name in (NAME, *(image.name for image in images)):
            outputs.claim("--out", args.out / name)


def _open_vae(args: argparse.Namespace, channels: int) -> VAE | None:
    if args.vae is None:
        if channels not in (1, 3):
            raise ValueError(f"--vae must be an autoencoder for a model of {channels} channels, of latents; got none")
        return None
    try:
        vae = open_vae(args.vae)
    except ImportError as error:  # of an extra
        raise ValueError(str(error)) from error
    vae.check_channels(channels)
    return vae


def _shape(args: argparse.Namespace, config: Any, vae: VAE | None) -> tuple[int, int, int]:
    """(C, H, W) of what the model makes."""
    if args.size is None:
        return config.in_channels, config.sample_size, config.sample_size
    smaller = 1 if vae is None else vae.downsampling
    if args.size < 1 or args.size % smaller:
        raise ValueError(f"--size must be a positive multiple of {smaller}; got {args.size}")
    return config.in_channels, args.size // smaller, args.size // smaller


class _Folder:
    """The PNG files of a folder, and the record of what they were made from."""

    def __init__(self, args: argparse.Namespace, model: str, vae: str | None) -> None:
        options = {name: getattr(args, name) for name in _DECISIVE}
        self._made_with = {"model": model, "vae": vae, "options": options}
        self._folder, self._overwrite = args.out, args.overwrite
        self._journal = Journal(args.out) if args.out else None
        self._results = Results(self._journal, self._made_with)

    def has(self, image: Image) -> bool:
        """Whether it is there; ValueError where another file has its name."""
        if self._journal is None or self._overwrite or not (path := self._folder / image.name).exists():
            return False
        if path.is_dir() or not self._journal.holds(path, self._made_from(image)):
            raise ValueError(
                f"--out must hold no other file by the name of an image; got {path}, which is not known to be made by "
                "this model with these options (--overwrite replaces it)"
            )
        return True

    def read(self, image: Image) -> np.ndarray:
        """(H, W, C) uint8."""
        with PIL.Image.open(self._folder / image.name) as picture:
            pixels = np.asarray(picture)
        return pixels if pixels.ndim == 3 else pixels[..., None]

    def write(self, image: Image, pixels: np.ndarray) -> None:
        with self._results.write(self._folder / image.name, self._made_from(image)) as path:
            PIL.Image.fromarray(pixels if pixels.shape[2] == 3 else pixels[..., 0]).save(path)

    def _made_from(self, image: Image) -> dict[str, Any]:
        return {"class": image.label, "seed": image.seed, **self._made_with}


class _Sampler:
    """From images to draw to their pixels."""

    def __init__(
        self,
        model: torch.nn.Module,
        vae: VAE | None,
        shape: tuple[int, int, int],
        args: argparse.Namespace,
        device: torch.device,
    ) -> None:
        self._vae = None if vae is None else vae.to(device)
        self._dtype = usable_dtype(args.dtype, device)
        self._model = freeze(model.to(device), self._dtype)
        self._images = args.batch_size
        options = {name: getattr(args, name) for name in ("guidance", "sampler", "steps", "eta")}
        self._options = {"shape": shape, "clip": vae is None, **options}

    def __call__(self, batch: list[Image], progress: Callable[[float], None]) -> list[np.ndarray]:
        """(H, W, C) uint8 for each image of a batch.

        Libraries multiply a few rows otherwise than many, with other last bits: the model always gets as many images,
        the last batch is filled up. The autoencoder gets one.
        """
        filled = batch + [batch[-1]] * (self._images - len(batch))
        labels = None if batch[0].label is None else torch.tensor([image.label for image in filled])
        values = sample(
            self._model,
            labels,
            seeds=[image.seed for image in filled],
            progress=lambda done, steps: progress(done / steps),
            **self._options,
        )
        return [self._pixels(each, image) for each, image in zip(values[: len(batch)], batch, strict=True)]

    def _pixels(self, values: Tensor, image: Image) -> np.ndarray:
        if self._vae is not None:
            values = self._vae.decode(values[None])[0]
        if not values.isfinite().all():
            raise ValueError(
                f"--model must draw finite values; got NaN or infinity for {image} in {self._dtype} (--dtype float32 "
                "is the most exact)"
            )
        return ((values + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0).cpu().numpy()


def _npz(args: argparse.Namespace, images: list[Image]) -> contextlib.AbstractContextManager:
    labels = [image.label for image in images if image.label is not None]
    return write_npz(args.npz, len(images), labels or None, comment=_COMMENT)


def _advance(bar: tqdm, batches: int, share: float) -> None:
    """``share`` of the next batch is done, too."""
    bar.n = batches + share
    bar.refresh()
