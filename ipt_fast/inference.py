"""Restoring images of any kind and size with a model: tiles, blending, self-ensemble, half precision."""

import copy
import inspect
import itertools
import warnings
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np
import PIL.Image
import torch
from torch import Tensor, nn

from . import _extension
from ._precision import usable_dtype
from .data import io
from .data.degradations import imresize
from .models.ipt_v2 import crop, pad_to_size
from .modules.feed_forward import reason_against_merging
from .ops._explain import explain
from .ops._select import policy
from .tiling import (
    BLENDS,
    PROCEDURES,
    available_memory,
    balanced_tile,
    blend_weights,
    official_end,
    procedure_tiles,
    tile_limit,
    tile_starts,
)

SMALLEST_TILE = 16
DEFAULT_OVERLAP = 32
SMALLEST_RETRY = 128
TILES_AT_ONCE = 32  # of a model with one size of input

ImageT = TypeVar("ImageT", PIL.Image.Image, np.ndarray, Tensor)


def restore(
    image: ImageT,
    model: nn.Module,
    *,
    task: str | int | None = None,
    tile: int | str | None = "auto",
    overlap: int | None = None,
    blend: str = "cosine",
    self_ensemble: bool = False,
    dtype: torch.dtype | str = "auto",
    device: torch.device | str | None = None,
) -> ImageT:
    """Restore one image (or a batch) with ``model``, which is left as it is.

    Args:
        image: a PIL image, an (H, W) or (H, W, C) array of uint8, uint16 or floats in [0, 1], or a (B, C, H, W) tensor
            of floats in [0, 1]. PIL modes are L, LA, RGB, RGBA and I;16; mode 1 is taken as L and P as RGB or RGBA.
            Alpha is kept as it is. Gray into a model of 3 channels runs as three equal channels and gives back their
            mean.
        model, task, tile, overlap, blend, self_ensemble, dtype, device: see :class:`Restorer`, which saves preparing
            the model again for each of many images.

    Returns:
        The same kind, dtype and range: integers are rounded (half to even) and clipped, floats are not clipped. The
        number of channels is the model's, which differs from the image's for two views in 6 channels.

    Raises:
        TypeError: ``image`` is of another kind or dtype.
        ValueError: a bad argument, an empty image, NaN or infinity in it, channels the model does not take, or an
            output that is not finite even in float32.
    """
    restorer = Restorer(
        model,
        task=task,
        tile=tile,
        overlap=overlap,
        blend=blend,
        self_ensemble=self_ensemble,
        dtype=dtype,
        device=device,
    )
    return restorer(image)


class Restorer:
    """A model made ready for inference: a merged copy in eval mode, called on images as :func:`restore` takes them.

    Args:
        model: a module (B, C, H, W) -> (B, C', H, W), of values in [0, 1] or [0, ``config.value_range``]. One without
            a ``config`` gets the image's channels as they are.
        task: name or number of one of the model's tasks, which may magnify; None where there is one or none.
        tile: None runs the image whole. A number of pixels, at least 16 and not necessarily a multiple of anything,
            cuts it into square tiles of exactly this size, moved together so that all lie inside. "auto" takes the
            whole image or as few equal tiles as half of the available memory allows (limit 512 for a model whose memory
            is not known). Attention that spans the whole image sees only its tile, so tiles change the result a little,
            and not only at the seams. A model with one size of input (``config.image_size``) gets tiles of that size,
            joined as ``tile`` says: "blend" (the same as "auto"), "paper" or "official", see
            :func:`ipt_fast.tiling.procedure_tiles`; smaller images are padded.
        overlap: pixels that neighbouring tiles share at least; at most half of ``tile``, 32 where that fits.
        blend: "cosine" fades tiles into each other, "average" weighs all that cover a pixel equally.
        self_ensemble: the mean over the 8 flips and transposes of each tile; 8 times the work.
        dtype: torch.float32, bfloat16 or float16, or their names. Half precision runs under autocast, so the input and
            everything autocast deems delicate stay in float32. "auto" takes half precision on a GPU, and bfloat16 on a
            CPU with instructions for it. A tile that comes out non-finite is run again in float32, with a warning.
        device: where to run; the model's own by default.
        progress: called as ``progress(done, total)`` after each tile.

    When memory runs out the image is started again with half the tile, with a warning, down to 128 pixels.

    Raises:
        ValueError, TypeError: a bad argument.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        task: str | int | None = None,
        tile: int | str | None = "auto",
        overlap: int | None = None,
        blend: str = "cosine",
        self_ensemble: bool = False,
        dtype: torch.dtype | str = "auto",
        device: torch.device | str | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        if not isinstance(model, torch.nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, as create_model makes; got {type(model).__name__}")
        if not isinstance(self_ensemble, bool):
            raise TypeError(f"self_ensemble must be True or False; got {self_ensemble!r}")
        self.image_size: int | None = getattr(getattr(model, "config", None), "image_size", None)
        if self.image_size:
            _check_procedure(tile, overlap, type(model).__name__, self.image_size)
        else:
            _check_tile(tile)
        _check_overlap(overlap, tile)
        if blend not in BLENDS:
            raise ValueError(f"blend must be one of {', '.join(BLENDS)}; got {blend!r}")
        if self.image_size and tile == "blend" and blend == "average":
            raise ValueError('blend must be "cosine" where tile is "blend"; tile="paper" is the average')
        if task is not None and not hasattr(model, "task_index") and not _takes_task(model):
            raise ValueError(f"task must be None for {type(model).__name__}, which has no tasks; got {task!r}")
        scale: Any = getattr(model, "scale", None)  # knows its tasks
        self.scale: int = 1 if scale is None else scale(task)
        self.arguments: dict[str, Any] = {} if task is None else {"task": task}
        self.tile, self.overlap, self.blend, self.self_ensemble = tile, overlap, blend, self_ensemble
        self.device = _usable_device(device, model)
        if dtype == "auto" and any(".quantized" in type(module).__module__ for module in model.modules()):
            dtype = torch.float32  # PyTorch's quantised layers take no other
        self.dtype = usable_dtype(dtype, self.device)
        self.model: nn.Module = copy.deepcopy(model).to(self.device, torch.float32).eval()
        # Branches with hooks or adapters cannot be merged: they run as they are.
        reparameterize: Any = getattr(self.model, "reparameterize", None)
        if reparameterize is not None and reason_against_merging(self.model) is None:
            reparameterize()
        self.config: Any = getattr(self.model, "config", None)
        self.value_range = getattr(self.config, "value_range", 1.0)
        self.progress = progress

    def __call__(self, image: ImageT) -> ImageT:
        if isinstance(image, PIL.Image.Image):
            return self._restore_pil(image)
        if isinstance(image, np.ndarray):
            return self._restore_array(image)
        if isinstance(image, torch.Tensor):
            return self._restore_tensor(image)
        raise TypeError(f"image must be a PIL image, a numpy array or a tensor; got {type(image).__name__}")

    def _restore_pil(self, image: PIL.Image.Image) -> PIL.Image.Image:
        if image.mode == "I;16":
            restored = PIL.Image.fromarray(self._restore_array(np.asarray(image)))
        else:
            record = io.from_pil(image)
            pixels = self._restore_array(record.pixels)
            restored = io.to_pil(io.Image(pixels, self.magnify_alpha(record.alpha)))
        restored.info = {name: value for name, value in image.info.items() if name != "transparency"}
        return restored

    def magnify_alpha(self, alpha: np.ndarray | None) -> np.ndarray | None:
        """An alpha channel (H, W), or None, for the image that the model returns: resized bicubically."""
        if alpha is None or self.scale == 1:
            return alpha
        larger = imresize(torch.from_numpy(alpha.astype(np.float64)), self.scale).round_()
        return larger.clamp_(0, np.iinfo(alpha.dtype).max).numpy().astype(alpha.dtype)

    def _restore_array(self, image: np.ndarray) -> np.ndarray:
        if image.dtype not in (np.uint8, np.uint16) and image.dtype.kind != "f":
            raise TypeError(f"image must be uint8, uint16 or floating point in [0, 1]; got {image.dtype}")
        if image.ndim not in (2, 3) or 0 in image.shape:
            raise ValueError(f"image must be (H, W) or (H, W, C) and not empty; got shape {image.shape}")
        top = 1 if image.dtype.kind == "f" else np.iinfo(image.dtype).max
        channels_last = image.astype(np.float32).reshape(*image.shape[:2], -1)
        output = self._restore_float(torch.from_numpy(channels_last / np.float32(top)).permute(2, 0, 1)[None])
        restored = output[0].permute(1, 2, 0).numpy()
        if top > 1:
            restored = np.clip(np.rint(restored * np.float32(top)), 0, top)
        if image.ndim == 2 and restored.shape[2] == 1:
            restored = restored[:, :, 0]
        return restored.astype(image.dtype)

    def _restore_tensor(self, image: Tensor) -> Tensor:
        if not image.is_floating_point():
            raise TypeError(f"image must be a floating-point tensor in [0, 1]; got {image.dtype}")
        if image.dim() != 4 or 0 in image.shape[1:]:
            raise ValueError(f"image must be (B, C, H, W) with C, H and W at least 1; got {tuple(image.shape)}")
        return self._restore_float(image.detach().float()).to(image.dtype)

    def _restore_float(self, image: Tensor) -> Tensor:
        """(B, C, H, W) float32 on any device -> the same, not clipped."""
        if not image.isfinite().all():
            raise ValueError("image holds NaN or infinity")
        takes = getattr(self.config, "in_channels", image.shape[1])
        gray_as_colour = image.shape[1] == 1 and takes == 3
        if gray_as_colour:
            image = image.expand(-1, 3, -1, -1)
        elif image.shape[1] != takes:
            raise ValueError(f"image must have {takes} channels for this model; got {image.shape[1]}")
        output = self._run_tiled(image)
        return output.mean(1, keepdim=True) if gray_as_colour else output

    def _run_tiled(self, image: Tensor) -> Tensor:
        if self.image_size:
            return self._run_procedure(image, self.image_size)
        tiles, overlap = self._tiles_for(image)
        while True:
            try:
                rows, columns = (
                    list(zip(tile_starts(*axis, overlap), blend_weights(*axis, overlap, self.blend), strict=True))
                    for axis in zip(image.shape[2:], tiles, strict=True)
                )
                return self._run_tiles(image, rows, columns, at_once=1)
            except RuntimeError as error:
                smaller = _halved(tiles)
                if not _is_out_of_memory(error) or smaller == tiles:
                    raise
            # Outside the handler, whose traceback keeps the failed attempt's tensors alive.
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
            warnings.warn(f"out of memory with tiles of {_size(tiles)} pixels, trying {_size(smaller)}", stacklevel=2)
            tiles, overlap = smaller, min(overlap, max(smaller) // 2)

    def _run_procedure(self, image: Tensor, size: int) -> Tensor:
        lengths = image.shape[2:]
        procedure = str(self.tile) if self.tile != "auto" else "blend" if self.blend == "cosine" else "paper"
        padded = pad_to_size(image, *(max(length, size) for length in lengths))
        rows, columns = (procedure_tiles(procedure, length, size, self.scale) for length in padded.shape[2:])
        limit = TILES_AT_ONCE
        while True:
            try:
                output = self._run_tiles(padded, rows, columns, max(1, limit // max(1, len(image))), limit)
                break
            except RuntimeError as error:
                if not _is_out_of_memory(error) or limit == 1:
                    raise
            # Outside the handler, whose traceback keeps the failed attempt's tensors alive.
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
            limit //= 2
            warnings.warn(f"out of memory, trying {limit} tiles at once", stacklevel=2)
        if procedure == "official":  # has the left border as wide as a tile, which shows where it meets the top
            corner = self._run_limited(padded[..., :size, :size], limit).to(output.device)
            bottom, right = size // 4 * self.scale, official_end(padded.shape[3], size, self.scale)
            output[..., :bottom, :right][..., : corner.shape[3]] = corner[..., :bottom, :right]
        return crop(output, *(length * self.scale for length in lengths))

    def _tiles_for(self, image: Tensor) -> tuple[tuple[int, int], int]:
        """((tile height, tile width), overlap) for an image; no tile is larger than the image."""
        batch, _, height, width = image.shape
        if self.tile is None:
            limit = max(height, width)
        elif self.tile == "auto":
            limit = tile_limit(self.config, available_memory(self.device), batch, fused=self._layers_are_fused())
            if self.overlap is not None:
                limit = max(limit, 2 * self.overlap)
        else:
            limit = int(self.tile)
        overlap = min(DEFAULT_OVERLAP, limit // 4) if self.overlap is None else self.overlap
        if self.tile == "auto":
            return (balanced_tile(height, limit, overlap), balanced_tile(width, limit, overlap)), overlap
        return (min(height, limit), min(width, limit)), overlap

    def _layers_are_fused(self) -> bool:
        fused = self.device.type == "cpu" and policy() in ("auto", "cpu") and _extension.load()
        return fused and not any(explain(self.model).values())

    def _run_limited(self, tiles: Tensor, limit: int) -> Tensor:
        """The model's output of tiles, at most ``limit`` of them at once."""
        if len(tiles) <= limit:
            return self._run_tile(tiles)
        return torch.cat([self._run_tile(some) for some in tiles.split(limit)])

    def _run_tiles(
        self,
        image: Tensor,
        rows: Sequence[tuple[int, Tensor]],
        columns: Sequence[tuple[int, Tensor]],
        at_once: int,
        limit: int | None = None,
    ) -> Tensor:
        """The sum of the tiles' outputs, weighted.

        ``rows`` and ``columns`` have of each tile where it begins and the weights of its output. The model gets
        ``at_once`` tiles of every image, but never more than ``limit`` in all.
        """
        batch, scale = len(image), self.scale
        output: Tensor | None = None
        done, total = 0, len(rows) * len(columns)
        places = itertools.product(rows, columns)
        while chunk := list(itertools.islice(places, at_once)):
            parts = [
                image[..., top : top + len(weight_y) // scale, left : left + len(weight_x) // scale]
                for (top, weight_y), (left, weight_x) in chunk
            ]
            stacked = torch.cat(parts) if len(parts) > 1 else parts[0]
            restored = self._run_limited(stacked, limit or len(stacked)).to(image.device)
            done += len(chunk)
            if self.progress:
                self.progress(done, total)
            if total == 1:
                return restored
            if output is None:
                output = image.new_zeros(batch, restored.shape[1], *(length * scale for length in image.shape[2:]))
            for ((top, weight_y), (left, weight_x)), part in zip(chunk, restored.tensor_split(len(chunk)), strict=True):
                top, left, weight = top * scale, left * scale, weight_y[:, None] * weight_x
                place = (..., slice(top, top + len(weight_y)), slice(left, left + len(weight_x)))
                output[place] += part * weight.to(image.device)
        assert output is not None  # there is a tile
        return output

    def _run_tile(self, tile: Tensor) -> Tensor:
        tile = tile.to(self.device, copy=True, memory_format=torch.channels_last)  # a model may write into it
        # no_grad and not inference_mode: callers may go on with the result in autograd.
        with torch.no_grad():
            output = self._run_model(tile, self.dtype)
            if output.isfinite().all():
                return output
            if self.dtype != torch.float32:
                name = str(self.dtype).removeprefix("torch.")
                warnings.warn(f"a tile came out non-finite in {name}, running it again in float32", stacklevel=2)
                output = self._run_model(tile, torch.float32)
                if output.isfinite().all():
                    return output
        raise ValueError("the model's output is not finite in float32")

    def _run_model(self, tile: Tensor, dtype: torch.dtype) -> Tensor:
        with torch.autocast(self.device.type, dtype, enabled=dtype != torch.float32):
            if not self.self_ensemble:
                return self._forward(tile)
            return sum(
                (_transform(self._forward(_transform(tile, *way)), *way, undo=True) for way in _WAYS[1:]),
                self._forward(tile),
            ) / len(_WAYS)

    def _forward(self, tile: Tensor) -> Tensor:
        output = self.model(tile * self.value_range, **self.arguments).float() / self.value_range
        if output.dim() != 4 or output.shape[2:] != tuple(self.scale * length for length in tile.shape[2:]):
            raise ValueError(
                f"model must return (B, C, H, W) of {'the' if self.scale == 1 else f'{self.scale} times the'} input's "
                f"size; got {tuple(output.shape)} for {tuple(tile.shape)}"
            )
        return output


# (transpose, flipped axes), the identity first
_WAYS = [(transpose, axes) for transpose in (False, True) for axes in ((), (2,), (3,), (2, 3))]


def _transform(x: Tensor, transpose: bool, axes: tuple[int, ...], undo: bool = False) -> Tensor:
    if undo:
        x = x.flip(axes)
        return x.transpose(2, 3) if transpose else x
    return (x.transpose(2, 3) if transpose else x).flip(axes)


def _check_tile(tile: object) -> None:
    if tile is None or (isinstance(tile, str) and tile == "auto"):
        return
    if type(tile) is not int or tile < SMALLEST_TILE:
        raise ValueError(f'tile must be "auto", None or an int of at least {SMALLEST_TILE}; got {tile!r}')


def _takes_task(model: nn.Module) -> bool:
    return "task" in inspect.signature(model.forward).parameters


def _check_procedure(tile: object, overlap: object, name: str, size: int) -> None:
    if tile != "auto" and tile not in PROCEDURES:
        names = ", ".join(PROCEDURES)
        raise ValueError(f"tile must be auto, {names} for {name}, whose input has {size} x {size} pixels; got {tile!r}")
    if tile == "official" and size % 4:
        raise ValueError(f"tile can be official only where 4 divides the input's {size} pixels")
    if overlap is not None:
        raise ValueError(f"overlap must be None for {name}, whose tiles lie where `tile` says; got {overlap!r}")


def _check_overlap(overlap: object, tile: object) -> None:
    if overlap is None:
        return
    if type(overlap) is not int or overlap < 0:
        raise ValueError(f"overlap must be None or an int of at least 0; got {overlap!r}")
    if type(tile) is int and overlap > tile // 2:
        raise ValueError(f"overlap must be at most half of the tile, {tile // 2}; got {overlap}")


def _usable_device(device: torch.device | str | None, model: nn.Module) -> torch.device:
    if device is None:
        parameter = next(model.parameters(), None)
        if parameter is not None and parameter.is_meta:
            raise ValueError(
                "model has weights on the meta device, offloaded or not loaded: restore needs them in memory"
            )
        return torch.device("cpu") if parameter is None else parameter.device
    try:
        device = torch.device(device)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, TypeError) as error:  # PyTorch without CUDA raises an AssertionError
        raise ValueError(f"device {device} cannot be used: {str(error).splitlines()[0]}") from error
    return device


def _is_out_of_memory(error: RuntimeError) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)


def _halved(tiles: tuple[int, int]) -> tuple[int, int]:
    """Half the larger side (and the other down to that), but no side below 128 that was not."""
    limit = max(max(tiles) // 2, SMALLEST_RETRY)
    return min(tiles[0], limit), min(tiles[1], limit)


def _size(tiles: tuple[int, int]) -> str:
    return f"{tiles[0]} x {tiles[1]}"
