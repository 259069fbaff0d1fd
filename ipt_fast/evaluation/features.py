"""Features of images by a network that is given as a file, on which the figures of generation stand.

No network ships. FID and the others are comparable only between images of one network: tables have ADM's Inception.
"""

import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

SUFFIXES = (".pt2", ".onnx", ".pt", ".pth", ".ts", ".torchscript")
SPATIAL_CHANNELS = 7  # of which sFID is
_RETURN = "return_features"  # an argument of the TorchScript file of Inception that StyleGAN's authors published


class Features(NamedTuple):
    """What a network tells of N images, float32 on the CPU.

    Attributes:
        pool: (N, D) pooled features, for FID, precision and recall.
        spatial: (N, 7hw) features of the first 7 channels at every place, all of a place together, for sFID, or None.
        logits: (N, classes) of a classifier, for the Inception Score, or None.
    """

    pool: Tensor
    spatial: Tensor | None = None
    logits: Tensor | None = None


class FeatureNetwork:
    """A network whose outputs are known by their names.

    Args:
        run: from images (B, 3, H, W) uint8 to ``pool`` (B, D) or (B, D, 1, 1); or to a dictionary of it and, if it has
            them, ``spatial`` (B, channels, h, w) and ``logits`` (B, classes).
        name: for messages.
        device: where ``run`` takes images.
    """

    def __init__(self, run: Callable[[Tensor], Any], name: str, device: torch.device | str = "cpu") -> None:
        self._run, self.name, self.device = run, name, torch.device(device)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Features:
        """The features of images (B, 3, H, W) uint8.

        Raises:
            ValueError: the network fails on such images, or returns something else than it should.
        """
        try:
            found = self._run(images.to(self.device))
        except Exception as error:  # of other people's networks, in any of three runtimes
            raise ValueError(
                f"features must be a network that takes {tuple(images.shape)} uint8; got {self.name}, which fails: "
                f"{_reason(error)}"
            ) from error
        outputs = found if isinstance(found, Mapping) else {"pool": found}
        pool, spatial, logits = (self._output(outputs, name, len(images)) for name in Features._fields)
        if pool is None:
            raise ValueError(f"features must be a network with an output pool; got {self.name} with {[*outputs]}")
        if spatial is not None:
            # Place by place, as in ADM's files of statistics.
            spatial = spatial[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)
        return Features(pool.flatten(1), spatial, None if logits is None else logits.flatten(1))

    def _output(self, outputs: Mapping[str, Any], name: str, images: int) -> Tensor | None:
        value = outputs.get(name)
        if value is None:
            return None
        places = (4,) if name == "spatial" else (2, 4)
        if not isinstance(value, Tensor) or value.dim() not in places or len(value) != images:
            shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            allowed = "(B, C, h, w)" if name == "spatial" else "(B, D)"
            raise ValueError(f"{name} of the network must be {allowed} for {images} images; got {shape} of {self.name}")
        return value.float().cpu()


def open_features(path: str | os.PathLike[str], device: torch.device | str = "cpu") -> FeatureNetwork:
    """The network of a file: TorchScript (.pt, .pth, .ts, .torchscript), torch.export (.pt2) or ONNX (.onnx).

    A TorchScript network whose forward has an argument ``return_features`` is called with it.

    Raises:
        ValueError: another suffix, or a file that cannot be read.
        ImportError: an ONNX file, and onnxruntime is not installed.
    """
    path = Path(path)
    if path.suffix.lower() not in SUFFIXES or not path.is_file():
        raise ValueError(f"features must be a file that ends in {', '.join(SUFFIXES)}; got {path}")
    opener = {".pt2": _exported, ".onnx": _onnx}.get(path.suffix.lower(), _torchscript)
    try:
        run = opener(path, torch.device(device))
    except ImportError:
        raise
    except Exception as error:  # the kinds of three libraries have no common base
        raise ValueError(f"features must be a network that can be read; got {path} ({_reason(error)})") from error
    return FeatureNetwork(run, str(path), device)


def _reason(error: Exception) -> str:
    """The line of an error that says what is wrong: TorchScript's last, ONNX Runtime's first."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return lines[0] if lines[0].startswith("[ONNXRuntimeError]") else lines[-1]


def _torchscript(path: Path, device: torch.device) -> Callable[[Tensor], Any]:
    network = torch.jit.load(path, map_location=device).eval()
    if any(argument.name == _RETURN for argument in network.forward.schema.arguments):
        return lambda images: network(images, **{_RETURN: True})
    return network


def _exported(path: Path, device: torch.device) -> Callable[[Tensor], Any]:
    return torch.export.load(path).module().to(device)


def _onnx(path: Path, device: torch.device) -> Callable[[Tensor], Any]:
    try:
        import onnxruntime
    except ImportError as error:
        raise ImportError(f"{path.name} must be run by onnxruntime: pip install 'ipt-fast[fid]'; got none") from error
    session = onnxruntime.InferenceSession(path, providers=onnxruntime.get_available_providers())
    names = [output.name for output in session.get_outputs()]
    images_name = session.get_inputs()[0].name

    def run(images: Tensor) -> Any:
        values = map(torch.from_numpy, session.run(None, {images_name: images.cpu().numpy()}))
        return dict(zip(names, values, strict=True)) if len(names) > 1 else next(values)

    return run


def collect(network: FeatureNetwork, images: Iterable[np.ndarray], batch_size: int = 32) -> Features:
    """The features of all images, in their order.

    Args:
        images: (H, W, 1 or 3) uint8 each, gray becomes three equal channels; those of one size that follow each other
            go through the network together.
        batch_size: how many at most.

    Raises:
        ValueError: there is no image, or the network cannot take them.
    """
    parts: list[Features] = []
    batch: list[Tensor] = []

    def flush() -> None:
        if batch:
            parts.append(network(torch.stack(batch)))
            batch.clear()

    for pixels in images:
        image = torch.tensor(pixels).permute(2, 0, 1).expand(3, -1, -1)
        if len(batch) == batch_size or (batch and batch[0].shape != image.shape):
            flush()
        batch.append(image)
    flush()
    if not parts:
        raise ValueError("images must be at least one; got none")
    return Features(*(_joined(values) for values in zip(*parts, strict=True)))


def _joined(values: tuple[Tensor | None, ...]) -> Any:
    found = [value for value in values if value is not None]
    widths = {value.shape[1] for value in found}
    if len(widths) > 1:
        raise ValueError(f"features must be of one width for all images; got {sorted(widths)}")
    return torch.cat(found) if found else None
