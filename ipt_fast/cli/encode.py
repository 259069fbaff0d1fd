"""``ipt-fast encode``: images to latents, once, for training."""

import argparse
import dataclasses
import hashlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from .._device import usable_device
from .._files import make_folder, remove_abandoned
from .._precision import DTYPES
from ..data.labelled import ClassImages, to_range
from ..data.latents import INDEX, LatentsInfo, is_latents, shard_metadata, shard_path, write_index, write_shard
from ..diffusion.vae import VAE, open_vae
from ._arguments import Subparsers

_RECORD = "ipt-fast encode"  # in the metadata of a shard: what it was made from, and {image: why} of those left out


def add_parser(subparsers: Subparsers) -> None:
    parser = subparsers.add_parser(
        "encode",
        help="make latents of images, once, for the training of a diffusion model",
        description="Encode the images of a folder, which has a subfolder for each class, by an autoencoder, and each "
        "image flipped from left to right, too. The centre of an image is resized to a square. What is there already "
        "is kept, so that a run that was stopped goes on. ipt-fast train --task generate takes the folder. Exit "
        "status: 0, 1 where some images could not be read, 2 for a wrong call.",
    )
    option = parser.add_argument
    option("input", type=Path, metavar="IN", help="folder of images, with a subfolder for each class")
    option("output", type=Path, metavar="OUT", help="folder for the latents")
    option("--vae", type=Path, required=True, metavar="FOLDER", help="autoencoder of diffusers (AutoencoderKL)")
    option("--size", type=int, default=256, metavar="PIXELS", help="side of the squares (%(default)s)")
    option("--no-flip", action="store_true", help="leave out the flipped images")
    option("--draw", action="store_true", help="draw latents from the encoder's distribution instead of its mean")
    option("--seed", type=int, default=0, help="of --draw (%(default)s)")
    option("--dtype", choices=DTYPES, default="float32", help="of the latents in the files (%(default)s)")
    option("--shard-size", type=int, default=4096, metavar="N", help="images of a file (%(default)s)")
    option("--batch-size", type=int, default=8, metavar="N", help="images in the autoencoder at once (%(default)s)")
    option("--workers", type=int, default=0, metavar="N", help="processes that read images ahead (%(default)s)")
    option("--device", help="cpu, cuda ... (a GPU where there is one)")
    option("--overwrite", action="store_true", help="encode again what is in OUT already, and replace it")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Encode as the parsed arguments say; 0, or 1 where an image could not be read.

    Raises:
        ValueError: bad arguments, no images, an autoencoder that does not go with them, or other latents in OUT.
    """
    for name, least in (("size", 1), ("seed", 0), ("shard_size", 1), ("batch_size", 1), ("workers", 0)):
        if (value := getattr(args, name)) < least:
            raise ValueError(f"--{name.replace('_', '-')} must be at least {least}; got {value}")
    if args.output.resolve() == args.input.resolve():
        raise ValueError(f"OUT must be another folder than IN; got {args.output} for both")
    device = usable_device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    try:
        vae = open_vae(args.vae)
    except ImportError as error:  # of an extra
        raise ValueError(str(error)) from error
    if args.size % vae.downsampling:
        raise ValueError(f"--size must be a multiple of {vae.downsampling} for this autoencoder; got {args.size}")
    if vae.channels not in (1, 3):
        raise ValueError(f"--vae must be of images of 1 or 3 channels; got one of {vae.channels}")
    images = ClassImages(args.input, args.size, vae.channels, memory_budget=0)
    side = args.size // vae.downsampling
    info = LatentsInfo(
        shape=(vae.latent_channels, side, side),
        classes=images.classes,
        mirrored=not args.no_flip,
        image_size=args.size,
        vae={"name": args.vae.resolve().name, "sha256": vae.digest(), "scaling_factor": vae.scaling_factor},
    )
    made_from = _made_from(args, images, info)
    make_folder("OUT", args.output)
    count = -(-len(images) // args.shard_size)
    kept = _kept(args, count, made_from)
    remove_abandoned(args.output)
    encoder = _Encoder(vae.to(device), images, args)
    with tqdm(total=len(images), unit="image", leave=False, disable=None) as bar:
        for number in range(count):
            if number in kept:
                bar.update(len(encoder.places(number)))
            else:
                encoder.write(number, bar, made_from)
    return _finish(args, images, info, count, len(kept))


def _made_from(args: argparse.Namespace, images: ClassImages, info: LatentsInfo) -> str:
    """SHA-256 of all that decides what a shard is, beside its number."""
    options = {name: getattr(args, name) for name in ("draw", "seed", "dtype", "shard_size")}
    content = {"images": images.fingerprint(), **dataclasses.asdict(info), **options}
    content["vae"] = info.vae["sha256"]  # whatever its folder is called
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _record(shard: Path) -> dict[str, Any]:
    """What :meth:`_Encoder.write` recorded in a shard; nothing in a file of something else."""
    return json.loads((shard_metadata(shard) or {}).get(_RECORD, "{}"))


def _kept(args: argparse.Namespace, count: int, made_from: str) -> set[int]:
    """The shards that an earlier run made of the same; the index goes, if one of them is missing.

    Raises:
        ValueError: OUT holds what was made of something else, or by something else.
    """
    shards = sorted(args.output.glob("[0-9]*.safetensors"))
    known = {path: _record(path).get("made_from") for path in shards}
    foreign = [path for path, value in known.items() if value is None]
    if not shards and is_latents(args.output):
        foreign.append(args.output / INDEX)
    if foreign:
        raise ValueError(f"OUT must hold no other files by the names of its own; got {foreign[0]}")
    same = {shard_path(args.output, number) for number in range(count)}
    same = set() if args.overwrite else {path for path in same if known.get(path) == made_from}
    if (others := [path for path in shards if path not in same]) and not args.overwrite:
        raise ValueError(
            f"OUT must be a new folder, or hold latents of these images with these options; got {others[0]}, which is "
            "of others (--overwrite replaces it)"
        )
    if len(same) < count and is_latents(args.output):
        (args.output / INDEX).unlink()  # it would promise what is not there yet
    for path in others:
        path.unlink()
    return {number for number in range(count) if shard_path(args.output, number) in same}


def _finish(args: argparse.Namespace, images: ClassImages, info: LatentsInfo, count: int, kept: int) -> int:
    """Write the index, and say what was done; the exit status."""
    samples, skipped = [], 0
    for number in range(count):
        bad = len(_record(shard_path(args.output, number))["skipped"])
        samples.append(min(args.shard_size, len(images) - number * args.shard_size) - bad)
        skipped += bad
    if not any(samples):
        raise ValueError(f"IN must hold an image that can be read; got {skipped} that cannot")
    write_index(args.output, info, samples)
    if kept:
        print(f"kept {kept} of {count} files, which an earlier run made")
    print(
        f"{args.output}: {sum(samples)} latents of shape {info.shape}, {len(info.classes)} classes, "
        f"skipped {skipped} images"
    )
    return 1 if skipped else 0


class _Encoder:
    """From the images of a shard to its file."""

    def __init__(self, vae: VAE, images: ClassImages, args: argparse.Namespace) -> None:
        self._vae, self._images, self._args = vae, images, args
        side = args.size // vae.downsampling
        self._none = torch.empty(0, vae.latent_channels, side, side, dtype=DTYPES[args.dtype])

    def places(self, number: int) -> range:
        """The numbers of a shard's images."""
        start = number * self._args.shard_size
        return range(start, min(start + self._args.shard_size, len(self._images)))

    def write(self, number: int, bar: tqdm, made_from: str) -> None:
        """Encode and write a shard; what cannot be read is named and left out."""
        args, images = self._args, self._images
        labels: list[int] = []
        latents: dict[bool, list[Tensor]] = {False: []} if args.no_flip else {False: [], True: []}
        skipped: dict[str, str] = {}
        for places, pixels in self._batches(number):
            good = [(place, image) for place, image in zip(places, pixels, strict=True) if image is not None]
            for place in sorted({*places} - {place for place, _ in good}):
                skipped[str(images.entries[place])] = reason = _reason(images, place)
                bar.write(f"{images.entries[place]}: error: {reason}", file=sys.stderr)
            if good:
                stacked = torch.stack([image for _, image in good])
                for mirrored, found in latents.items():
                    seeds = [_seed(args.seed, place, mirrored) for place, _ in good] if args.draw else None
                    encoded = self._vae.encode(to_range(stacked, mirrored), seeds)
                    found.append(encoded.to("cpu", DTYPES[args.dtype]))
                    if not found[-1].isfinite().all():
                        named = ", ".join(str(images.entries[place]) for place, _ in good)
                        raise ValueError(f"--vae must give finite latents in {args.dtype}; got others, of {named}")
                labels += [int(images.labels[place]) for place, _ in good]
            bar.update(len(places))
        joined = {mirrored: torch.cat([self._none, *found]) for mirrored, found in latents.items()}
        record = {_RECORD: json.dumps({"made_from": made_from, "skipped": skipped})}
        numbers = torch.tensor(labels, dtype=torch.int64)
        write_shard(args.output, number, joined[False], numbers, joined.get(True), metadata=record)

    def _batches(self, number: int) -> Iterator[tuple[list[int], list[Any]]]:
        places = self.places(number)
        loader = DataLoader(
            _Squares(self._images, places),
            batch_size=self._args.batch_size,
            num_workers=self._args.workers,
            collate_fn=list,
        )
        for start, pixels in zip(range(places.start, places.stop, self._args.batch_size), loader, strict=True):
            yield [*range(start, start + len(pixels))], pixels


class _Squares(Dataset):
    """Some of the images, (C, size, size) uint8; None of one that cannot be read."""

    def __init__(self, images: ClassImages, places: range) -> None:
        self._images, self._places = images, places

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, place: int) -> Tensor | None:
        found = self._images.take(self._places[place])
        return None if found is None else found[0]


def _reason(images: ClassImages, place: int) -> str:
    images.note_failures()
    return images.skipped[str(images.samples[place][0])]


def _seed(seed: int, place: int, mirrored: bool) -> int:
    # SeedSequence mixes the integers, so that neighbouring images are unrelated.
    return int(np.random.SeedSequence((seed, place, int(mirrored))).generate_state(1, np.uint64)[0] >> 1)
