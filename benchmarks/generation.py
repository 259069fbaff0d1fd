"""``python -m benchmarks.generation``: latent IPT-V2 beside DiT, both small, at equal multiplications and equal steps.

Both learn the same images by ``ipt-fast train --task generate``: the digits of scikit-learn (Optical Recognition of
Handwritten Digits, UCI), enlarged to 16 x 16 pixels, or crops of photos, of their upper and of their lower edges.
Samples are judged by a small classifier of the classes, which is trained here: the Fréchet distance of its features,
and how often it finds the class that was asked for. Rows go to benchmarks/results/generation.csv, losses to
generation_loss.csv, pictures to docs.
"""

import argparse
import copy
import csv
import pathlib
import time

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import ipt_fast
from benchmarks import results
from ipt_fast._files import atomic_write
from ipt_fast.data.files import list_images
from ipt_fast.data.io import read_image
from ipt_fast.diffusion import sample
from ipt_fast.evaluation import generation
from ipt_fast.models import open_model
from ipt_fast.training import TrainingConfig, train

PATH = results.FOLDER / "generation.csv"
LOSSES = results.FOLDER / "generation_loss.csv"
DOCS = pathlib.Path(__file__).parents[1] / "docs"
GUIDANCE = (1.0, 2.0, 4.0)
SIDE = 16

# Shapes of about the same multiplications at 16 x 16 pixels.
MODELS = {
    "latent_ipt_v2": ("latent_ipt_v2_s", dict(width=16, depths=(2, 2, 2), heads=(1, 1, 2), window_size=8, grid_size=4)),
    "dit": ("dit_s_2", dict(width=68, layers=6, heads=2)),
}


def digits(folder: pathlib.Path) -> int:
    """Writes the digits as PNG files, a folder for each class; returns the number of classes."""
    from sklearn.datasets import load_digits

    found = load_digits()
    for index, (pixels, label) in enumerate(zip(found.images, found.target, strict=True)):
        image = torch.from_numpy(pixels / 16).float()[None, None]
        image = F.interpolate(image, (SIDE, SIDE), mode="bicubic", align_corners=False).clamp(0, 1)
        _save(folder / str(label) / f"{index}.png", image[0])
    return 10


def photos(folder: pathlib.Path, source: pathlib.Path, each: int = 2000, shrink: int = 8) -> int:
    """Writes crops of photos, ``shrink`` times smaller than these: of their upper edge, and of their lower one."""
    draw = np.random.default_rng(0)
    small = [_shrunk(read_image(path).pixels, shrink) for path in list_images(source)]
    small = [image for image in small if min(image.shape[1:]) >= SIDE and len(image) == 3]
    for name in ("lower", "upper"):
        for count in range(each):
            image = small[draw.integers(len(small))]
            left = draw.integers(image.shape[2] - SIDE + 1)
            rows = image[:, :SIDE] if name == "upper" else image[:, -SIDE:]
            _save(folder / name / f"{count}.png", rows[:, :, left : left + SIDE])
    return 2


def _shrunk(pixels: np.ndarray, factor: int) -> Tensor:
    image = torch.from_numpy(pixels / np.iinfo(pixels.dtype).max).float().permute(2, 0, 1)
    return F.avg_pool2d(image[None], factor)[0]


def _save(path: pathlib.Path, image: Tensor) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = (image * 255).round().clamp(0, 255).byte().permute(1, 2, 0).numpy()
    Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels).save(path)


def load(folder: pathlib.Path) -> tuple[Tensor, Tensor]:
    """Images (N, C, H, W) in [-1, 1] and their classes (N,), in the order of the classes' names."""
    images, labels = [], []
    for label, each in enumerate(sorted(path for path in folder.iterdir() if path.is_dir())):
        for path in sorted(each.iterdir()):
            pixels = torch.from_numpy(read_image(path).pixels.copy())
            images.append(pixels.reshape(SIDE, SIDE, -1).permute(2, 0, 1) / 127.5 - 1)
            labels.append(label)
    return torch.stack(images), torch.tensor(labels)


class Classifier(nn.Module):
    """A small convolutional classifier; ``features`` are 64 numbers of an image."""

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels, 32, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(32, 64, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(64 * (SIDE // 4) ** 2, 64),
            nn.ReLU(),
        )
        self.head = nn.Linear(64, classes)

    def features(self, images: Tensor) -> Tensor:
        return self.body(images)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.features(images))


def trained_classifier(images: Tensor, labels: Tensor, classes: int, steps: int = 600) -> tuple[Classifier, float]:
    """A classifier of four fifths of the images, and its accuracy on the rest."""
    torch.manual_seed(0)
    order = torch.randperm(len(images))
    held, seen = order[: len(order) // 5], order[len(order) // 5 :]
    model = Classifier(images.shape[1], classes)
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
    for _ in range(steps):
        batch = seen[torch.randint(len(seen), (128,))]
        optimizer.zero_grad()
        F.cross_entropy(model(images[batch]), labels[batch]).backward()
        optimizer.step()
    with torch.no_grad():
        return model.eval(), (model(images[held]).argmax(1) == labels[held]).float().mean().item()


def merged(model: nn.Module) -> nn.Module:
    """A copy without branches, as it is sampled."""
    model = copy.deepcopy(model)
    if hasattr(model, "reparameterize"):
        model.reparameterize()
    return model


def multiplications(model: nn.Module) -> int:
    """Multiply-accumulates of one image."""
    channels, side = model.config.in_channels, model.config.sample_size
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, channels, side, side), torch.zeros(1, dtype=torch.long), torch.zeros(1, dtype=torch.long))
    return counter.get_total_flops() // 2


def picture(path: pathlib.Path, rows: list[Tensor], scale: int = 3) -> None:
    """Rows of images in [-1, 1] as one PNG."""
    grid = torch.cat([torch.cat(list(F.pad(row, (1, 1, 1, 1), value=1)), 2) for row in rows], 1)
    pixels = ((grid + 1) * 127.5).round().clamp(0, 255).byte().permute(1, 2, 0).numpy()
    image = Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)
    with atomic_write(path) as part:
        image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST).save(part, "PNG")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.generation", description=__doc__.split("\n\n")[0])
    parser.add_argument("images", choices=("digits", "photos"))
    parser.add_argument("--photos", type=pathlib.Path, help="folder of photos, such as the training images of BSDS500")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("build/generation"))
    parser.add_argument("--iterations", type=int, default=4000)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument(
        "--ema", type=float, default=0.998, help="decay of the average that is sampled; less in short runs"
    )
    parser.add_argument("--samples", type=int, default=1000, help="at each guidance")
    parser.add_argument("--steps", type=int, default=100, help="of DDPM")
    parser.add_argument("--only", choices=MODELS, help="train this model alone, and measure nothing")
    args = parser.parse_args(argv)
    out = args.out / args.images
    data = out / "images"
    if not data.exists():
        if args.images == "digits":
            digits(data)
        else:
            if args.photos is None:
                parser.error("--photos must name a folder of photos")
            photos(data, args.photos)
    images, labels = load(data)
    classes = int(labels.max()) + 1
    for name in [args.only] if args.only else MODELS:
        fit(name, data, out / name, images.shape[1], classes, args)
    if not args.only:
        judge(out, images, labels, classes, args)


def fit(name: str, data: pathlib.Path, out: pathlib.Path, channels: int, classes: int, args: argparse.Namespace):
    preset, fields = MODELS[name]
    fields = {**fields, "in_channels": channels, "sample_size": SIDE, "num_classes": classes}
    config = TrainingConfig(
        data=data,
        out=out,
        task="generate",
        model=preset,
        model_config=fields,
        iterations=args.iterations,
        batch_size=args.batch_size,
        lr=1e-3,
        schedule="cosine",
        ema=args.ema,
        flip=args.images == "photos",  # a digit mirrored is none
        log_every=50,
        save_every=1000,
    )
    train(config, resume=(out / "checkpoint.pth").exists())


def judge(out: pathlib.Path, images: Tensor, labels: Tensor, classes: int, args: argparse.Namespace) -> None:
    classifier, accuracy = trained_classifier(images, labels, classes)
    with torch.no_grad():
        real = generation.gaussian_of(classifier.features(images))
    asked = torch.arange(args.samples) % classes
    shown, rows, losses = [], results.read(PATH) if PATH.exists() else [], []
    for name in MODELS:
        model = merged(open_model(out / name).eval())
        with open(out / name / "log.csv", newline="") as file:
            log = list(csv.DictReader(file))
        losses += [{"images": args.images, "model": name, **{k: row[k] for k in ("iteration", "loss")}} for row in log]
        shared = {
            "images": args.images,
            "model": name,
            "parameters": sum(p.numel() for p in model.parameters()),
            "mmac": f"{multiplications(model) / 1e6:.1f}",
            "iterations": args.iterations,
            "batch_size": args.batch_size,
            "classifier_accuracy": f"{accuracy:.4f}",
            "loss": f"{np.mean([float(row['loss']) for row in log[-10:]]):.4f}",
        }
        frozen = ipt_fast.freeze(model)
        for guidance in GUIDANCE:
            start = time.perf_counter()
            made = sample(
                frozen, asked, seeds=range(args.samples), guidance=guidance, steps=args.steps, clip=True
            ).clamp(-1, 1)
            seconds = time.perf_counter() - start
            made = ((made + 1) * 127.5).round() / 127.5 - 1  # as files have them
            with torch.no_grad():
                features = classifier.features(made)
                right = (classifier(made).argmax(1) == asked).float().mean().item()
            distance = generation.frechet_distance(generation.gaussian_of(features), real)
            rows.append(
                {
                    **results.environment(),
                    **shared,
                    "guidance": guidance,
                    "steps": args.steps,
                    "samples": args.samples,
                    "frechet": f"{distance:.3f}",
                    "right_class": f"{right:.4f}",
                    "seconds": f"{seconds:.1f}",
                }
            )
            print(rows[-1], flush=True)
            shown.append(made[: 2 * classes if classes > 5 else 20])
    results.write(PATH, rows)
    known = [row for row in results.read(LOSSES) if row["images"] != args.images] if LOSSES.exists() else []
    results.write(LOSSES, known + losses)
    picture(DOCS / f"generation_{args.images}.png", shown)


if __name__ == "__main__":
    main()
